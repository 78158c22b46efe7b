"""The Hugging Face hub's cache on this machine, as a download of timm's weights leaves it."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

COMMIT = "0" * 40


def write_pretrained(cache: Path, *names: str) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights in place of those that timm offers as NAME.TAG; the state dicts by name.

    Programs find them with HF_HUB_CACHE=cache and HF_HUB_OFFLINE=1.
    """
    states = {}
    for name in names:
        torch.manual_seed(0)
        model = timm.create_model(name)  # with the entry's classes: 1000
        states[name] = {key: value.contiguous() for key, value in model.state_dict().items()}
        repository = cache / f"models--timm--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text(COMMIT)
        (repository / "snapshots" / COMMIT).mkdir(parents=True)
        save_file(states[name], repository / "snapshots" / COMMIT / "model.safetensors")
    return states


def use_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_HUB_CACHE and HF_HUB_OFFLINE do, in a process that has read them."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
