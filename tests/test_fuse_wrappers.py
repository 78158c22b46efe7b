"""What is attached to the modules of a fused model acts as on timm's model.

A sweep compares fused models with timm's over options of models, attachments, modes and kernels.
``FUSE_CASES=20000 pytest tests/test_fuse_wrappers.py -k sweep`` is the large one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random

import pytest
import torch
from torch import Tensor

from deit_fast.models import fuse
from helpers.fuse_cases import ATTACHMENTS, Case, draw, global_hook, make
from helpers.kernels import DEVICE

CASES = int(os.environ.get("FUSE_CASES", 150))
SEED = int(os.environ.get("FUSE_SEED", 0))
SLOW = ("compile",)  # seconds
EAGER = tuple(name for name in ATTACHMENTS if name not in SLOW)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("group") / "store"
    store = torch.distributed.FileStore(str(path), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def result(case: Case, fused: bool) -> tuple[dict[str, Tensor | None], list, Tensor]:
    """Outputs and gradients by name, the calls of hooks, and the state of the generator."""
    choice = random.Random(case.seed)
    model = make(case.options).train(case.training)
    case.events = []
    attach = ATTACHMENTS[case.attachment]
    torch.manual_seed(3)
    if fused and case.fused_first:
        fuse(model, kernels=case.kernels)
    attach(model, case, choice)
    if fused and not case.fused_first:
        fuse(model, kernels=case.kernels)
    observed = global_hook(case) if case.attachment == "global_hook" else contextlib.nullcontext()
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    images.requires_grad_(True)
    torch.manual_seed(5)
    with observed:
        output = model(images)
        outputs = list(output) if isinstance(output, tuple) else [output]
        state = torch.get_rng_state()
        values: dict[str, Tensor | None] = {f"output {n}": o for n, o in enumerate(outputs)}
        if case.attachment != "quantize":
            torch.manual_seed(6)
            sum((out * torch.randn(out.shape).to(out)).sum() for out in outputs).backward()
            values["images"] = images.grad
            values |= {name: parameter.grad for name, parameter in model.named_parameters()}
    full = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in values.items()
    }
    return full, case.events, state


def difference(case: Case) -> str:
    """What differs between timm's model and the fused one; empty: nothing."""
    try:
        theirs, their_events, their_state = result(case, fused=False)
    except Exception as error:
        with pytest.raises(type(error)):
            result(case, fused=True)
        return ""
    mine, events, state = result(case, fused=True)
    if mine.keys() != theirs.keys():
        return f"other parameters: {sorted(mine.keys() ^ theirs.keys())}"
    largest = max(x.norm().item() for n, x in theirs.items() if x is not None and n != "images")
    for name, expected in theirs.items():
        got = mine[name]
        if (got is None) != (expected is None):
            return f"gradient of {name}: {got is not None}, timm's {expected is not None}"
        if got is None or expected is None:
            continue
        if got.shape != expected.shape:
            return f"{name}: {tuple(got.shape)}, timm's {tuple(expected.shape)}"
        error = (got - expected).norm().item()
        if not error <= 1e-5 * expected.norm().item() + 1e-6 * largest:
            return f"{name}: {error:.1e} of {expected.norm().item():.1e}"
    if events != their_events:
        for number, (a, b) in enumerate(zip(events, their_events, strict=False)):
            if a != b:
                return f"hook {number}: {a}, timm's {b}"
        return f"{len(events)} calls of hooks, timm's {len(their_events)}"
    return "" if torch.equal(state, their_state) else "other random numbers are drawn"


def test_sweep(process_group: None) -> None:
    """Outputs, gradients, hooks in their order, and the number of random draws."""
    found = []
    logging.getLogger("deit_fast").setLevel(logging.ERROR)
    for seed in range(SEED, SEED + CASES):
        case = draw(seed, EAGER)
        try:
            text = difference(case)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        if text:
            found.append(f"{case}: {text}")
    assert not found, "\n".join([f"{len(found)} of {CASES} differ", *found[:40]])
