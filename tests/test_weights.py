"""Weights of other programs: every layout that timm's loaders take, and what is refused.

WEIGHTS_CASES=N tries N combinations of wrappers, layouts and kinds of files.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import logging
import os
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import load_checkpoint
from timm.models.vision_transformer import checkpoint_filter_fn
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from deit_fast.config import IMAGENET_MEAN, ModelConfig, RunConfig, ViewConfig
from deit_fast.errors import InputError
from deit_fast.models import create_student, load_teacher, load_weights
from deit_fast.models.weights import fit_weights, save_weights, start_from
from deit_fast.models.weights_facts import FACTS_KEY, facts_text
from deit_fast.training.state import create_state

CASES = int(os.environ.get("WEIGHTS_CASES", "40"))
CPU = torch.device("cpu")
TINY = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
State = dict[str, Tensor]


def transformer(name: str = "deit_tiny_distilled_patch16_224", **changes: Any) -> nn.Module:
    return timm.create_model(name, **({"num_classes": 10, "img_size": 32} | TINY | changes))


def layer_scaled(**changes: Any) -> nn.Module:
    return transformer("deit3_small_patch16_224", **changes)


def convnet(**changes: Any) -> nn.Module:
    return timm.create_model("test_resnet", **({"num_classes": 10} | changes))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "distilled": transformer, "layer scale": layer_scaled, "convnet": convnet,
}  # fmt: skip


def randomised(model: nn.Module, seed: int = 1) -> nn.Module:
    """With random numbers in all tensors, so that no two are equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator).abs())
    return model


def named(function: Callable[[str], str]) -> Callable[[State], State]:
    return lambda state: {function(name): value for name, value in state.items()}


def in_blocks(infix: str) -> Callable[[State], State]:
    """A wrapper of each block or layer, as activation checkpointing and FSDP leave it."""

    return named(lambda name: re.sub(r"^(\w+\.\d+\.)", rf"\1{infix}", name))


WRAPPERS: dict[str, Callable[[State], State]] = {
    "none": lambda state: state,
    "module": named(lambda name: f"module.{name}"),
    "compiled": named(lambda name: f"_orig_mod.{name}"),
    "both": named(lambda name: f"_orig_mod.module.{name}"),
    "both again": named(lambda name: f"module._orig_mod.{name}"),
    "fsdp": lambda s: named(lambda n: f"_fsdp_wrapped_module.{n}")(
        in_blocks("_fsdp_wrapped_module.")(s)
    ),
    "checkpointing": in_blocks("_checkpoint_wrapped_module."),
    "compiled blocks": in_blocks("_orig_mod."),
    "model": named(lambda name: f"model.{name}"),
    "lightning": named(lambda name: f"model.backbone.{name}"),
    "student": named(lambda name: f"student.{name}"),
    "deep": named(lambda name: f"module.net._orig_mod.trunk.{name}"),
}
BEYOND_TIMM = ("fsdp", "checkpointing", "compiled blocks", "model", "lightning", "student", "deep")

# What else there is beside the weights, the weights' key or None, that of their average or None.
LAYOUTS: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "bare": ({}, None, None),
    "deit": ({"args": argparse.Namespace(lr=1e-3), "epoch": 3}, "model", None),
    "deit with average": ({"optimizer": {"state": {}}, "epoch": 3}, "model", "model_ema"),
    "deit without": ({"model_ema": None}, "model", None),
    "timm": ({"arch": "vit", "epoch": 3}, "state_dict", None),
    "timm with average": ({"version": 2}, "state_dict", "state_dict_ema"),
    "lightning": ({"hyper_parameters": {"lr": 0.1}}, "state_dict", None),
    "others": ({"step": 3}, "model_state_dict", "ema_state_dict"),
    "dino": ({"epoch": 3}, "student", "teacher"),
}
TIMM_LAYOUTS = [name for name in LAYOUTS if name not in ("others", "dino")]
KINDS = ("pth", "legacy", "safetensors")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def to_deit3(state: State) -> State:
    return {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for name, value in state.items()
    }


def to_linear_patches(state: State) -> State:
    weight = state.get("patch_embed.proj.weight")
    return state if weight is None else state | {"patch_embed.proj.weight": weight.flatten(1)}


FORMS: dict[str, Callable[[State], State]] = {
    "own": lambda state: state, "deit3": to_deit3, "linear patches": to_linear_patches,
    "no batch counts": lambda s: {n: v for n, v in s.items() if "num_batches" not in n},
}  # fmt: skip


def write(folder: Path, kind: str, layout: str, weights: State, average: State) -> Path:
    """A file in one of LAYOUTS; safetensors holds the weights alone."""
    path = folder / f"w.{'safetensors' if kind == 'safetensors' else 'pth'}"
    rest, key, average_key = LAYOUTS[layout]
    saved: dict[str, Any] = weights if key is None else {key: weights, **rest}
    if kind == "safetensors":
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
        return path
    if average_key is not None:
        saved[average_key] = average
    torch.save(saved, path, _use_new_zipfile_serialization=kind == "pth")
    return path


def by_timm(path: Path, make: Callable[..., nn.Module], form: str) -> State:
    """What timm's loader makes of the file."""
    model = make()
    filters = {
        "deit3": lambda state, model: checkpoint_filter_fn(state, model, adapt_layer_scale=True),
        "linear patches": checkpoint_filter_fn,
    }
    load_checkpoint(model, str(path), filter_fn=filters.get(form))
    return model.state_dict()


def as_student(model: nn.Module, path: Path) -> State:
    start_from(model, load_weights(path), path)
    return model.state_dict()


def as_fitted(model: nn.Module, path: Path) -> State:
    fit_weights(model, load_weights(path), path)
    return model.state_dict()


def test_files_are_read_as_timm_reads_them(tmp_path: Path) -> None:
    """Bit for bit timm's weights, and beyond timm those that were wrapped."""
    combinations = list(itertools.product(MODELS, WRAPPERS, LAYOUTS, KINDS, FORMS, DTYPES))
    counts = {"as timm": 0, "beyond timm": 0}
    built = {name: make() for name, make in MODELS.items()}
    for case in random.Random(3).sample(combinations, CASES):
        model, wrapper, layout, kind, form, dtype = case

        def make(model: str = model) -> nn.Module:
            return copy.deepcopy(built[model])

        states = []
        for seed in (1, 2):
            own = randomised(make(), seed).state_dict()
            states.append({
                name: value.to(dtype) if value.is_floating_point() else value
                for name, value in own.items()
            })  # fmt: skip
        has_average = kind != "safetensors" and LAYOUTS[layout][2] is not None
        expected = make()
        expected.load_state_dict(states[1 if has_average else 0])
        path = write(
            tmp_path, kind, layout, *(WRAPPERS[wrapper](FORMS[form](state)) for state in states)
        )
        for load in (as_student, as_fitted):
            got = load(make(), path)
            for name, value in expected.state_dict().items():
                assert torch.equal(got[name], value), (case, load.__name__, name)
        is_timms = wrapper not in BEYOND_TIMM and (layout in TIMM_LAYOUTS or kind == "safetensors")
        counts["as timm" if is_timms else "beyond timm"] += 1
        if is_timms:
            theirs = by_timm(path, make, form)
            assert all(torch.equal(theirs[name], value) for name, value in got.items()), case
    print(counts)


# ---------------------------------------------------------------------------------------------
# What was chosen
# ---------------------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "deit_fast"]


def two_states(make: Callable[..., nn.Module] = transformer) -> tuple[State, State]:
    return randomised(make(), 1).state_dict(), randomised(make(), 2).state_dict()


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_one_line_says_what_was_taken_and_what_else_there_is(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO, "deit_fast")
    own, average = two_states()
    path = tmp_path / "w.pth"
    torch.save({"state_dict": own, "state_dict_ema": average, "epoch": 3}, path)
    assert equal(load_weights(path), average)
    assert equal(load_weights(f"{path}#state_dict"), own)
    assert equal(load_weights(f"{path}#state_dict_ema"), average)
    average_line = f"weights file {path}: state_dict_ema is taken; there is also {path}#state_dict"
    own_line = f"weights file {path}: state_dict is taken; there is also {path}#state_dict_ema"
    assert lines(caplog) == [average_line, own_line, average_line]
    with pytest.raises(InputError, match=r"w\.pth has no weights under the key 'ema'"):
        load_weights(f"{path}#ema")


def test_only_tensors_count_as_the_weights_under_a_key(tmp_path: Path) -> None:
    """Settings may have the same keys, and a teacher of another network is no average."""
    path = tmp_path / "w.pth"
    own, average = two_states()
    smaller = {"weight": torch.zeros(3, 3)}
    wrapped = {f"module.{name}": value for name, value in own.items()}
    for saved, expected in (
        ({"model": own, "ema": {"decay": 0.999, "updates": torch.tensor(3)}}, own),
        ({"model": own, "ema": {"decay": 0.999, "shadow_params": list(average.values())}}, own),
        ({"model": own, "teacher": {"name": "regnet"}}, own),
        ({"state_dict": own, "model": {"arch": "vit"}}, own),
        ({"model": own, "teacher": average}, own),
        ({"student": own, "teacher": smaller}, own),
        ({"student": wrapped | {"mask": torch.zeros(3)}, "teacher": average}, average),
        ({"teacher": average}, average),
    ):
        torch.save(saved, path)
        assert equal(load_weights(path), expected), saved.keys()
    torch.save({"arch": "vit", "ema": {"decay": 0.9}}, path)
    with pytest.raises(InputError, match=r"holds no tensors; its keys are arch, ema$"):
        load_weights(path)
    torch.save(own, path)
    with pytest.raises(InputError, match=r"no weights under the key 'head\.weight'; its keys are"):
        load_weights(f"{path}#head.weight")


@pytest.mark.parametrize("key", ["", "#net"])
def test_a_checkpoint_that_holds_itself_is_one_line(key: str, tmp_path: Path) -> None:
    saved: dict[str, Any] = {"weight": torch.zeros(3)}
    saved["model"] = saved["student"] = saved["teacher"] = saved
    torch.save(saved, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth holds itself under '(model|teacher)'"):
        load_weights(f"{tmp_path}/w.pth{key}")


def test_a_file_name_may_have_the_mark_of_a_key(tmp_path: Path) -> None:
    own, _ = two_states()
    save_file(own, tmp_path / "run#2.safetensors")
    assert equal(load_weights(tmp_path / "run#2.safetensors"), own)
    assert equal(load_weights(f"{tmp_path}/run#2.safetensors"), own)


def test_a_model_that_is_there_twice_is_chosen_by_its_prefix(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO, "deit_fast")
    student, teacher = two_states()
    both = {f"student.{name}": value for name, value in student.items()}
    both |= {f"teacher.{name}": value for name, value in teacher.items()}
    path = tmp_path / "w.pth"
    torch.save({"state_dict": both}, path)
    with pytest.raises(InputError, match="there as student and as teacher: choose by FILE#student"):
        fit_weights(transformer(), load_weights(path), path)
    for prefix, expected in (("student", student), ("teacher", teacher)):
        model = transformer()
        fit_weights(model, load_weights(f"{path}#{prefix}"), path)
        assert equal(model.state_dict(), expected)
    assert lines(caplog)[-1] == f"weights file {path}: state_dict.teacher is taken"


def test_self_supervised_weights_start_a_classifier(tmp_path: Path, caplog) -> None:
    """As DINO's: the average under `teacher`, with a backbone and a projection, and no head."""
    caplog.set_level(logging.INFO, "deit_fast")
    states = []
    for state in two_states(lambda: transformer("deit_tiny_patch16_224")):
        saved = {f"backbone.{n}": v for n, v in state.items() if not n.startswith("head.")}
        states.append(saved | {"head.mlp.0.weight": torch.zeros(4, 4)})
    path = tmp_path / "dino.pth"
    module = {f"module.{name}": value for name, value in states[0].items()}
    torch.save({"student": module, "teacher": states[1], "epoch": 1}, path)
    model = transformer("deit_tiny_patch16_224")
    head = model.head.weight.clone()
    start_from(model, load_weights(path), path)
    assert torch.equal(model.norm.weight, states[1]["backbone.norm.weight"])
    assert torch.equal(model.head.weight, head)
    assert lines(caplog) == [
        f"weights file {path}: teacher is taken; there is also {path}#student",
        f"weights file {path}: names without their prefix backbone.; left out 1 others, the first "
        "is head.mlp.0.weight",
        f"weights file {path}: head is not there: it keeps its initial values",
    ]
    with pytest.raises(InputError, match=r"dino\.pth lacks head\.weight"):
        fit_weights(transformer("deit_tiny_patch16_224"), load_weights(path), path)


def test_averages_of_torch_and_timm_are_read(tmp_path: Path) -> None:
    model = randomised(transformer())
    swa = torch.optim.swa_utils.AveragedModel(model)
    for average in (swa, ModelEmaV3(model)):
        torch.save(average.state_dict(), tmp_path / "w.pth")
        assert equal(load_weights(tmp_path / "w.pth"), model.state_dict())


def test_timms_conversions_of_published_files_are_applied(tmp_path: Path, caplog) -> None:
    """OpenCLIP's names of a timm transformer, whose head is outside of it."""
    caplog.set_level(logging.INFO, "deit_fast")
    model = randomised(transformer("deit_tiny_patch16_224"))
    model.head.bias.data.zero_()
    own = model.state_dict()
    saved = {f"visual.trunk.{n}": v for n, v in own.items() if not n.startswith("head.")}
    saved |= {"visual.head.proj.weight": own["head.weight"], "logit_scale": torch.zeros(())}
    other = transformer("deit_tiny_patch16_224")
    fit_weights(other, saved, "clip.pth")
    assert equal(other.state_dict(), own)
    assert lines(caplog) == ["weights file clip.pth: converted by timm"]


def test_patches_of_another_size_are_resampled_for_fine_tuning_alone(caplog) -> None:
    caplog.set_level(logging.INFO, "deit_fast")
    state = randomised(transformer()).state_dict()
    model = transformer(patch_size=8, img_size=16)
    with pytest.raises(InputError, match=r"proj.weight is \(32, 3, 16, 16\) there"):
        fit_weights(model, state, "w")
    start_from(model, state, "w")
    expected = checkpoint_filter_fn(dict(state), model)
    assert equal(model.state_dict(), expected)
    assert lines(caplog) == [
        "weights file w: converted by timm; patch_embed.proj.weight resampled from "
        "(32, 3, 16, 16) to (32, 3, 8, 8)"
    ]


@pytest.mark.parametrize("wrapper", ["module", "lightning", "checkpointing"])
@pytest.mark.parametrize("layout", ["bare", "timm with average"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_every_entry_point_reads_the_same_weights(
    name: str, layout: str, wrapper: str, tmp_path: Path, caplog
) -> None:
    caplog.set_level(logging.INFO, "deit_fast")
    states = [randomised(timm.create_model(name, num_classes=7), n).state_dict() for n in (1, 2)]
    path = write(tmp_path, "pth", layout, *(WRAPPERS[wrapper](state) for state in states))
    expected = states[LAYOUTS[layout][2] is not None]
    assert equal(load_teacher(f"timm:{name}@{path}").model.state_dict(), expected)
    config = RunConfig(
        model=ModelConfig(name=name, weights=str(path), drop_path=0.0),
        view=ViewConfig(image_size=160),
    )
    assert equal(create_state(config, 7, CPU).model.state_dict(), expected)
    if layout != "bare":
        line = f"weights file {path}: state_dict_ema is taken; there is also {path}#state_dict"
        assert lines(caplog).count(line) == 2


def test_a_factorys_weights_keep_prefixes_of_its_own(tmp_path: Path) -> None:
    """Modules called `model` and `module` are parts of the network here."""
    for part in ("model", "backbone"):
        network = nn.Sequential()
        network.add_module(part, nn.Linear(3, 2))
        other = copy.deepcopy(network)
        randomised(network)
        torch.save(network.state_dict(), tmp_path / "w.pth")
        fit_weights(other, load_weights(tmp_path / "w.pth"), "w")
        assert equal(other.state_dict(), network.state_dict())


# ---------------------------------------------------------------------------------------------
# Files that are refused
# ---------------------------------------------------------------------------------------------


class Runs:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('pickle ran')",)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    ("saved", "named_object"),
    [
        (lambda: transformer(), "timm.models.deit.VisionTransformerDistilled"),
        (lambda: {"model": Runs()}, "exec"),
        (lambda: {"state_dict": {}, "metric": np.float64(3)}, "numpy._core.multiarray.scalar"),
    ],
    ids=["module", "code", "numpy"],
)
def test_a_pickle_of_more_than_tensors_is_one_line(
    saved: Callable[[], Any], named_object: str, is_zip: bool, tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    torch.save(saved(), path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(InputError) as caught:
        load_weights(path)
    text = str(caught.value)
    assert text == (
        f"weights file {path} cannot be read safely: it is no plain state dict: it has an object "
        f"of {named_object}; where you trust it, load it in a sandbox and save its state dict as "
        "safetensors"
    )


def test_other_files_are_one_line_without_advice_to_run_them(tmp_path: Path, recwarn) -> None:
    script, pickled = tmp_path / "script.pt", tmp_path / "pickled.pth"
    archive = tmp_path / "jax.npz"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), script)
    pickled.write_bytes(pickle.dumps({"a": np.zeros(3)}))
    np.savez(archive, a=np.zeros(3))
    recwarn.clear()
    for path, reason in (
        (script, "it is a TorchScript archive"),
        (pickled, "torch.save did not write it"),
        (archive, "is of NumPy, as JAX's are"),
    ):
        with pytest.raises(InputError, match=reason) as caught:
            load_weights(path)
        text = str(caught.value)
        assert text.isprintable() and "weights_only" not in text and "Re-run" not in text
    assert not recwarn.list


@pytest.mark.parametrize("saved", [{}, {"epoch": 3}, {0: torch.zeros(1)}, {"model": {"a": 1}}])
def test_a_file_without_named_tensors_is_refused(saved: Any, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth holds no tensors"):
        load_weights(tmp_path / "w.pth")


# ---------------------------------------------------------------------------------------------
# Names of classes
# ---------------------------------------------------------------------------------------------

NAMES = [f"class {letter}" for letter in "abcdefghij"]


def with_classes(path: Path, state: State, names: list[str] | None) -> Path:
    facts = {} if names is None else {"identity": json.dumps({"data.classes": names})}
    save_weights(path, state, facts)
    return path


@pytest.mark.parametrize(
    ("theirs", "rows", "words"),
    [
        (NAMES, list(range(10)), None),
        (NAMES[::-1], list(range(9, -1, -1)), "its classes are in another order: the rows of"),
        ([*NAMES[:-1], "another"], None, "is of other classes there, such as 'another': it keeps"),
        (None, list(range(10)), "it does not name its classes:"),
    ],
    ids=["equal", "permuted", "others", "unnamed"],
)
@pytest.mark.parametrize("model", list(MODELS))
def test_heads_follow_the_names_of_the_classes(
    model: str, theirs: list[str] | None, rows: list[int] | None, words: str | None,
    tmp_path: Path, caplog,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "deit_fast")
    state = randomised(MODELS[model]()).state_dict()
    path = with_classes(tmp_path / "w.safetensors", state, theirs)
    student = MODELS[model]()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    start_from(student, load_weights(path), path, NAMES)
    heads = {"distilled": ("head", "head_dist"), "layer scale": ("head",), "convnet": ("fc",)}[
        model
    ]
    for name, value in student.state_dict().items():
        is_head = name.rpartition(".")[0] in heads
        expected = state[name]
        if is_head:
            expected = before[name] if rows is None else state[name][rows]
        assert torch.equal(value, expected), name
    said = [line for line in lines(caplog) if words and words in line]
    assert (
        len(lines(caplog))
        == len(said)
        == (0 if words is None else len(heads) if rows is None else 1)
    )


def test_a_run_gives_the_names_of_its_classes(tmp_path: Path) -> None:
    state = randomised(transformer("deit_tiny_patch16_224")).state_dict()
    path = with_classes(tmp_path / "w.safetensors", state, NAMES[::-1])
    args = tuple(f"{name}={number}" for name, number in TINY.items())
    config = RunConfig(
        model=ModelConfig(name="deit_tiny_patch16_224", weights=str(path), args=args),
        view=ViewConfig(image_size=32),
    )
    run = create_state(config, 10, CPU, NAMES)
    assert torch.equal(run.model.head.weight, state["head.weight"].flip(0))


@pytest.mark.parametrize("mean", [IMAGENET_MEAN, (0.5, 0.5, 0.5)])
def test_another_normalisation_of_the_weights_is_said(
    mean: tuple[float, float, float], tmp_path: Path, caplog
) -> None:
    caplog.set_level(logging.INFO, "deit_fast")
    args = tuple(f"{name}={number}" for name, number in TINY.items())
    model = ModelConfig(name="deit_tiny_patch16_224", args=args)
    other = RunConfig(model=model, view=ViewConfig(image_size=32, mean=mean))
    state = transformer("deit_tiny_patch16_224").state_dict()
    path = tmp_path / "w.safetensors"
    save_weights(path, state, {FACTS_KEY: facts_text(other, NAMES)})
    model = dataclasses.replace(model, weights=str(path))
    create_state(RunConfig(model=model, view=ViewConfig(image_size=32)), 10, CPU)
    said = [line for line in lines(caplog) if "trained on images of mean 0.5 0.5 0.5" in line]
    assert len(said) == (mean != IMAGENET_MEAN)


def test_a_checkpoint_of_a_run_starts_another(tmp_path: Path, caplog) -> None:
    """Its average, or `#model`."""
    caplog.set_level(logging.INFO, "deit_fast")
    args = tuple(f"{name}={number}" for name, number in TINY.items())
    config = RunConfig(
        model=ModelConfig(name="deit_tiny_patch16_224", args=args), view=ViewConfig(image_size=32)
    )
    run = create_state(config, 10, CPU)
    randomised(run.model)
    path = tmp_path / "step-1.pt"
    torch.save(run.to_checkpoint(config), path)
    student = create_student("deit_tiny_patch16_224", 10, img_size=32, **TINY)
    start_from(student, load_weights(f"{path}#model"), path)
    assert equal(student.state_dict(), run.model.state_dict())
    start_from(student, load_weights(path), path)
    assert equal(student.state_dict(), run.ema.module.state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.to("meta"), "has no values: save dense weights"),
        (lambda w: w.to_sparse(), "is quantised or sparse: save dense weights"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "is quantised or sparse"),
        (lambda w: (w * 100).to(torch.int8), "is of torch.int8 there, of torch.float32 in the"),
        (lambda w: w.to(torch.complex64), "is of torch.complex64 there, of torch.float32 in the"),
    ],
    ids=["meta", "sparse", "quantised", "int8", "complex"],
)
def test_tensors_that_are_no_dense_floats_are_refused_by_name(
    change: Callable[[Tensor], Tensor], words: str, tmp_path: Path
) -> None:
    state = dict(transformer().state_dict())
    state["blocks.0.mlp.fc1.weight"] = change(state["blocks.0.mlp.fc1.weight"])
    path = tmp_path / "w.pth"
    torch.save(state, path)
    with pytest.raises(InputError, match=re.escape(f"blocks.0.mlp.fc1.weight {words}")):
        start_from(transformer(), load_weights(path), path)


def test_a_file_that_names_fewer_classes_than_its_head_has_is_refused(tmp_path: Path) -> None:
    state = transformer().state_dict()
    path = with_classes(tmp_path / "w.safetensors", state, NAMES[:-1])
    with pytest.raises(InputError, match="it names 9 classes, head has 10"):
        start_from(transformer(), load_weights(path), path, NAMES)


@pytest.mark.parametrize("heads", [("head_dist",), ("head", "head_dist")])
def test_heads_that_a_distilled_file_lacks_keep_their_initial_values(
    heads: tuple[str, ...], tmp_path: Path, caplog
) -> None:
    caplog.set_level(logging.INFO, "deit_fast")
    state = randomised(transformer()).state_dict()
    path = tmp_path / "w.pth"
    torch.save({n: v for n, v in state.items() if n.rpartition(".")[0] not in heads}, path)
    student = transformer()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    start_from(student, load_weights(path), path)
    for name, value in student.state_dict().items():
        expected = before if name.rpartition(".")[0] in heads else state
        assert torch.equal(value, expected[name]), name
    assert sum("is not there: it keeps its initial values" in x for x in lines(caplog)) == len(
        heads
    )


# ---------------------------------------------------------------------------------------------
# Heads that are no linear layer with a bias
# ---------------------------------------------------------------------------------------------


class ConvolutionalHead(nn.Sequential):
    """As torchvision's SqueezeNet: a 1 x 1 convolution decides. The linear layer is no head."""

    def __init__(self, bias: bool = True, projections: int = 0) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 6)
        self.features = nn.Conv2d(3, 6, 3)
        self.classifier = nn.Conv2d(6, 10, 1, bias=bias)
        self.projections = nn.ModuleList(nn.Conv2d(10, 4, 1) for _ in range(projections))


HEADS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "timm": (
        lambda: timm.create_model("resnetv2_18", num_classes=10, channels=(16, 16, 16, 32)),
        "head.fc",
    ),
    "factory": (ConvolutionalHead, "classifier"),
    "without bias": (lambda: ConvolutionalHead(bias=False), "classifier"),
    "linear without bias": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(), nn.Linear(6, 10, bias=False)),
        "2",
    ),
    "before other layers": (lambda: ConvolutionalHead(projections=2), "classifier"),
}


@pytest.mark.parametrize(
    "theirs",
    [NAMES[::-1], [*NAMES[:-1], "another"], NAMES[:4]],
    ids=["permuted", "others", "fewer"],
)
@pytest.mark.parametrize("model", list(HEADS))
def test_any_head_follows_the_names_of_the_classes(
    model: str, theirs: list[str], tmp_path: Path, caplog
) -> None:
    caplog.set_level(logging.INFO, "deit_fast")
    make, head = HEADS[model]
    state = randomised(make()).state_dict()
    if len(theirs) < 10:
        state |= {k: v[: len(theirs)] for k, v in state.items() if k.startswith(f"{head}.")}
    path = with_classes(tmp_path / "w.safetensors", state, theirs)
    student = make()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    start_from(student, load_weights(path), path, NAMES)
    for name, value in student.state_dict().items():
        expected = state[name]
        if name.startswith(f"{head}."):
            expected = state[name].flip(0) if theirs == NAMES[::-1] else before[name]
        assert torch.equal(value, expected), name
    words = {
        10: "is of other classes there, such as 'another': it keeps its initial values",
        4: "has 4 classes there, 10 here: it keeps its initial values",
    }[len(theirs)]
    if theirs == NAMES[::-1]:
        words = f"its classes are in another order: the rows of {head} follow their names"
    (line,) = lines(caplog)
    assert line.endswith(words) and head in line
