"""Students keep DeiT's parameter names; teachers stay frozen and normalise their own input."""

from __future__ import annotations

import argparse
import logging
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from deit_fast.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig, RunConfig, ViewConfig
from deit_fast.errors import InputError
from deit_fast.models import create_student, forward_heads, load_teacher, load_weights
from deit_fast.models.convnet import small_convnet
from deit_fast.models.weights import digest_weights, fit_weights, start_from
from deit_fast.training.state import create_state

TINY = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def tiny_student(**changes) -> nn.Module:
    arguments = {"num_classes": 7, "drop_path": 0.0, "img_size": 16} | TINY | changes
    return create_student("deit_tiny_distilled_patch16_224", **arguments)


def official_names(depth: int, distilled: bool) -> set[str]:
    """Parameter names of facebookresearch/deit's published checkpoints."""
    block = [f"{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1",
             "mlp.fc2") for kind in ("weight", "bias")]  # fmt: skip
    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    names |= {f"blocks.{i}.{name}" for i in range(depth) for name in block}
    names |= {f"{part}.{kind}" for part in ("norm", "head") for kind in ("weight", "bias")}
    if distilled:
        names |= {"dist_token", "head_dist.weight", "head_dist.bias"}
    return names


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("distilled", [True, False])
def test_student_has_the_published_names_and_shapes(size, distilled):
    with torch.device("meta"):
        model = create_student(
            f"deit_{size}_{'distilled_' if distilled else ''}patch16_224", num_classes=1000
        )
    state = model.state_dict()
    width = {"tiny": 192, "small": 384, "base": 768}[size]
    assert set(state) == official_names(12, distilled)
    assert state["pos_embed"].shape == (1, 198 if distilled else 197, width)
    assert state["head.weight"].shape == (1000, width)
    assert state["blocks.11.attn.qkv.weight"].shape == (3 * width, width)


def test_published_checkpoint_form_round_trips(tmp_path):
    model = tiny_student()
    path = tmp_path / "deit.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1e-3)}, path)
    other = tiny_student()
    fit_weights(other, load_weights(path), path)
    assert digest_weights(other) == digest_weights(model)
    save_file(other.state_dict(), tmp_path / "out.safetensors")
    again = load_weights(tmp_path / "out.safetensors")
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_weights_are_never_unpickled(tmp_path):
    class Boom:
        def __reduce__(self):
            return (exec, ("raise SystemExit('pickle ran')",))

    path = tmp_path / "bad.pth"
    torch.save({"model": Boom()}, path)
    with pytest.raises(InputError, match=r"bad\.pth cannot be read safely"):
        load_weights(path)
    path.write_bytes(pickle.dumps({"a": 1})[:5])
    with pytest.raises(InputError, match=r"bad\.pth"):
        load_weights(path)
    (tmp_path / "x.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(InputError, match=r"x\.safetensors is not a safetensors file"):
        load_weights(tmp_path / "x.safetensors")


def test_fit_weights_names_what_differs():
    model = tiny_student()
    state = model.state_dict()
    with pytest.raises(InputError, match="lacks cls_token"):
        fit_weights(model, {k: v for k, v in state.items() if k != "cls_token"}, "w")
    with pytest.raises(InputError, match=r"head.weight is \(5, 48\) there, \(7, 48\) in the model"):
        fit_weights(model, state | {"head.weight": torch.zeros(5, 48)}, "w")
    with pytest.raises(InputError, match="has extra"):
        fit_weights(model, state | {"extra": torch.zeros(1)}, "w")


def plain_student(**changes) -> nn.Module:
    arguments = {"num_classes": 7, "drop_path": 0.0, "img_size": 16} | TINY | changes
    return create_student("deit_tiny_patch16_224", **arguments)


@pytest.mark.parametrize("make", [tiny_student, plain_student])
@pytest.mark.parametrize("size", [8, 24, 40])
def test_positions_of_another_size_are_interpolated_as_timm_does(make, size, caplog):
    caplog.set_level(logging.INFO, "deit_fast")
    state = make(img_size=24).state_dict()
    state["pos_embed"].copy_(torch.randn_like(state["pos_embed"]))
    model = make(img_size=size)
    expected = checkpoint_filter_fn(dict(state), model)
    start_from(model, dict(state), "w.pth")
    loaded = model.state_dict()
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    prefix = 2 if "dist_token" in state else 1
    assert torch.equal(loaded["pos_embed"][:, :prefix], state["pos_embed"][:, :prefix])
    lines = [record.getMessage() for record in caplog.records]
    note = "weights file w.pth: position embedding interpolated from 3 x 3 to"
    assert lines == ([] if size == 24 else [f"{note} {size // 8} x {size // 8}"])


def test_plain_weights_initialise_a_distilled_student_at_another_size(caplog):
    caplog.set_level(logging.INFO, "deit_fast")
    state = plain_student(img_size=24).state_dict()
    state["pos_embed"].copy_(torch.randn_like(state["pos_embed"]))
    model = tiny_student(img_size=32)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    start_from(model, state, "w.pth")
    loaded = model.state_dict()
    for name in ("dist_token", "head_dist.weight", "head_dist.bias"):
        assert torch.equal(loaded[name], fresh[name])
    expected = checkpoint_filter_fn(dict(state), plain_student(img_size=32))["pos_embed"]
    assert torch.equal(loaded["pos_embed"], torch.cat([expected[:, :1], expected], dim=1))
    assert all(torch.equal(loaded[k], v) for k, v in state.items() if k != "pos_embed")
    assert [record.getMessage() for record in caplog.records] == [
        "weights file w.pth: no distillation token: dist_token and head_dist keep their "
        "initial values; the token gets the class token's position",
        "weights file w.pth: position embedding interpolated from 3 x 3 to 4 x 4",
    ]


def test_heads_of_another_class_count_keep_their_initial_values(caplog):
    caplog.set_level(logging.INFO, "deit_fast")
    state = tiny_student(num_classes=5).state_dict()
    model = tiny_student()
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    start_from(model, state, "w.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, (fresh if name.startswith("head") else state)[name]), name
    assert [record.getMessage() for record in caplog.records] == [
        f"weights file w.pth: {name} has 5 classes there, 7 here: it keeps its initial values"
        for name in ("head", "head_dist")
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dist_token": None}, "w lacks dist_token"),
        ({"head.weight": None}, "w lacks head.weight"),
        ({"extra": torch.zeros(1)}, "w has extra, which the model lacks"),
        ({"pos_embed": torch.zeros(1, 7, 48)}, r"pos_embed is \(1, 7, 48\) there, \(1, 6, 48\)"),
        ({"pos_embed": torch.zeros(1, 11, 32)}, r"pos_embed is \(1, 11, 32\) there"),
        ({"patch_embed.proj.weight": torch.zeros(48, 1, 8, 8)}, "patch_embed.proj.weight is"),
        ({"head.weight": torch.zeros(5, 32)}, r"head.weight is \(5, 32\) there, \(7, 48\)"),
        ({"head.weight": torch.zeros(5, 48)}, r"head.weight is \(5, 48\) there, \(7, 48\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(change, message, caplog):
    caplog.set_level(logging.INFO, "deit_fast")
    state = tiny_student().state_dict() | change
    model = tiny_student()
    before = digest_weights(model)
    with pytest.raises(InputError, match=message):
        start_from(model, {k: v for k, v in state.items() if v is not None}, "w")
    assert digest_weights(model) == before and not caplog.records


def test_model_weights_initialise_a_run_at_another_size(tmp_path):
    state = tiny_student(num_classes=10).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    model = ModelConfig(
        name="deit_tiny_distilled_patch16_224",
        weights=str(tmp_path / "w.safetensors"),
        args=tuple(f"{name}={number}" for name, number in TINY.items()),
    )
    config = RunConfig(model=model, view=ViewConfig(image_size=32))
    run = create_state(config, 10, torch.device("cpu"))
    for weights in (run.model.state_dict(), run.ema.module.state_dict()):
        assert weights["pos_embed"].shape == (1, 18, 48)
        assert all(torch.equal(weights[k], v) for k, v in state.items() if k != "pos_embed")


def test_distilled_weights_are_refused_by_a_plain_student():
    state = tiny_student(img_size=24).state_dict()
    with pytest.raises(InputError, match=r"pos_embed is \(1, 11, 48\) there, \(1, 5, 48\)"):
        start_from(plain_student(), state, "w")


def test_the_mean_of_both_heads_is_the_output_in_evaluation_mode():
    torch.manual_seed(1)
    model = tiny_student()
    images = torch.randn(3, 3, 16, 16)
    class_logits, distill_logits = model.train()(images)
    model.eval()
    with torch.no_grad():
        apart = forward_heads(model, images)
        together = model(images)
    torch.testing.assert_close(apart[0], class_logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(apart[1], distill_logits, rtol=1e-5, atol=1e-6)
    assert torch.equal((apart[0] + apart[1]) / 2, together), "both run the fused stream"
    assert not torch.allclose(apart[0], apart[1])


def test_hooks_on_blocks_run_when_both_heads_are_computed():
    model = tiny_student().eval()
    images, seen = torch.randn(3, 3, 16, 16), []
    with torch.no_grad():
        apart = forward_heads(model, images)
        for block in model.blocks:
            block.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
        watched = forward_heads(model, images)
    assert len(seen) == len(model.blocks)
    for mine, theirs in zip(watched, apart, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 5}, "image size 16 is no multiple of patch_size 5"),
        ({"embed_dim": 50}, "embed_dim 50 is no multiple of num_heads 3"),
    ],
)
def test_student_shape_errors(arguments, message):
    with pytest.raises(InputError, match=message):
        tiny_student(**arguments)


def test_errors_about_unknown_names_suggest_a_similar_one():
    with pytest.raises(InputError, match="did you mean deit_tiny_distilled_patch16_224"):
        create_student("deit_tiny_destilled_patch16_224", 10)
    with pytest.raises(InputError, match="did you mean timm:regnety_160"):
        load_teacher("timm:regnety_1600@x")
    with pytest.raises(InputError, match=r"takes no args, got \['depth'\]"):
        create_student("resnet18", 10, depth=3)
    with pytest.raises(InputError, match="has no factory 'nope'"):
        load_teacher("deit_fast.models.convnet:nope")
    with pytest.raises(InputError, match="cannot import 'no_such_package'"):
        load_teacher("no_such_package:model")


class TwoOutputs(nn.Module):
    """A student that returns a pair in evaluation mode."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = small_convnet(num_classes, 4)

    def forward(self, images):
        return self.net(images) if self.training else (self.net(images), images)


def test_a_student_that_returns_no_logits_is_refused_when_it_is_built():
    with pytest.raises(InputError, match=r"returns in evaluation mode.* a tuple of \(2, 5\)"):
        create_student(f"{__name__}:TwoOutputs", 5, img_size=32)


def test_teacher_is_frozen_and_stays_in_eval_mode():
    teacher = load_teacher("deit_fast.models.convnet:small_convnet", num_classes=5)
    wrapper = nn.ModuleList([teacher]).train()
    before = digest_weights(teacher.model)
    images = torch.randn(4, 3, 16, 16)
    teacher.model.train()  # bypassing the wrapper
    first = teacher(images)
    assert torch.equal(first, teacher(images))
    assert not first.requires_grad
    assert not any(module.training for module in wrapper[0].modules())
    assert digest_weights(teacher.model) == before, "batch statistics moved"


def test_teacher_undoes_the_students_normalisation():
    """The logits are those of images normalised with the teacher's own mean and std."""
    name = "resnetv2_18"
    model = timm.create_model(name, num_classes=4)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    assert tuple(mean) != IMAGENET_MEAN
    state = model.eval().state_dict()
    pixels = torch.rand(2, 3, 64, 64)

    def normalised(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        save_file(state, f"{folder}/w.safetensors")
        teacher = load_teacher(f"timm:{name}@{folder}/w.safetensors")
    assert teacher.num_classes == 4
    with torch.no_grad():
        expected = model(normalised(mean, std))
    torch.testing.assert_close(
        teacher(normalised(IMAGENET_MEAN, IMAGENET_STD)), expected, rtol=1e-4, atol=1e-5
    )


def test_fingerprint_follows_weights_not_paths(tmp_path):
    state = small_convnet(3).state_dict()
    spec = "deit_fast.models.convnet:small_convnet"
    for name in ("a", "b"):
        save_file(state, tmp_path / f"{name}.safetensors")
    prints = [
        load_teacher(f"{spec}@{tmp_path}/{name}.safetensors", num_classes=3).fingerprint()
        for name in ("a", "b")
    ]
    assert prints[0] == prints[1]
    state["0.weight"][0, 0, 0, 0] += 1e-6
    save_file(state, tmp_path / "b.safetensors")
    changed = load_teacher(f"{spec}@{tmp_path}/b.safetensors", num_classes=3).fingerprint()
    assert {k for k in changed if changed[k] != prints[0][k]} == {"teacher.weights_sha256"}


def test_weights_of_another_class_count_are_refused(tmp_path):
    save_file(small_convnet(3).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"weight is \(3, 64\) there, \(9, 64\) in the model"):
        load_teacher(
            f"deit_fast.models.convnet:small_convnet@{tmp_path}/w.safetensors", num_classes=9
        )
