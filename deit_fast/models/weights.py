"""Weights files: safetensors, or torch checkpoints read with ``weights_only=True``."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
from torch import nn

from deit_fast.config import InputError

# Where training checkpoints keep the weights: facebookresearch/deit `model`, timm `state_dict`.
_WEIGHT_KEYS = ("model", "state_dict", "model_ema", "state_dict_ema")


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a `.safetensors` file or a torch checkpoint.

    Checkpoints that wrap the weights (`model` as in facebookresearch/deit, `state_dict` as in
    timm) are unwrapped, and a `module.` prefix of DistributedDataParallel is removed.

    Returns:
        Name to tensor, on the CPU.

    Raises:
        InputError: the file is missing, is not a weights file, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights file {path} does not exist")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = {name.removeprefix("module."): value for name, value in state.items()}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise InputError(f"weights file {path} holds no tensors")
    return tensors


def fit_weights(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load ``state`` into ``model``; every name and shape must fit.

    Raises:
        InputError: names the first missing, unknown or differently shaped tensor.
    """
    own = model.state_dict()
    for name, value in own.items():
        if name not in state:
            raise InputError(f"weights file {path} lacks {name}")
        if state[name].shape != value.shape:
            raise InputError(
                f"weights file {path}: {name} is {tuple(state[name].shape)} there, "
                f"{tuple(value.shape)} in the model"
            )
    unknown = sorted(set(state) - set(own))
    if unknown:
        raise InputError(f"weights file {path} has {unknown[0]}, which the model has not")
    model.load_state_dict(state)


def digest_weights(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"weights file {path} is not a safetensors file: {error}") from None


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    try:
        # facebookresearch/deit and timm keep their arguments beside the weights: a plain namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a bad file
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise InputError(f"weights file {path} cannot be read safely: {reason}") from None
    for key in _WEIGHT_KEYS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            return state[key]
    if not isinstance(state, dict):
        raise InputError(f"weights file {path} holds a {type(state).__name__}, not a state dict")
    return state
