"""Features of teachers: of timm's families, of other networks, at other image sizes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from deit_fast.cli import main
from deit_fast.config import RunConfig
from deit_fast.errors import CacheMismatch, InputError
from deit_fast.models import Teacher, load_teacher
from deit_fast.models.student import keep_trained_head
from deit_fast.models.teacher import load_class_matched_teacher
from deit_fast.models.teacher_features import FeatureTarget, pool_grid, targets_of
from deit_fast.precomputation import precompute
from deit_fast.recipes import digits_student
from deit_fast.training.loop import train
from helpers.images import picture
from helpers.runs import TWO_BLOCKS

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2}
VIT32, VIT28 = {"img_size": 32, **SMALL}, {"img_size": 28, **SMALL}
# By family: timm's name, size of the images, arguments, tokens before the patches, whether the
# first of them is a class token. None: a grid of channels.
FAMILIES: dict[str, tuple[str, int, dict[str, Any], int | None, bool]] = {
    "dinov2": ("vit_small_patch14_dinov2", 28, VIT28, 1, True),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", 28, VIT28, 5, True),
    "dinov3": ("vit_small_patch16_dinov3", 32, SMALL, 5, True),
    "eva02": ("eva02_tiny_patch14_224", 28, VIT28, 1, True),
    "siglip": ("vit_base_patch16_siglip_224", 32, VIT32, 0, False),
    "radio": ("vit_base_patch16_radio_v3", 32, VIT32, 8, True),
    "registers alone": ("vit_medium_patch16_reg4_gap_256", 32, VIT32, 4, False),
    "cait": ("cait_xxs24_224", 32, VIT32, 1, True),
    "deit": ("deit_tiny_distilled_patch16_224", 32, VIT32, 2, True),
    "vit": ("vit_tiny_patch16_224", 32, VIT32, 1, True),
    "convnext": ("test_convnext", 64, {}, None, False),
    "regnet": ("regnety_002", 64, {}, None, False),
    "resnet": ("test_resnet", 64, {}, None, False),
    "swin": ("swin_tiny_patch4_window7_224", 32, {"img_size": 32, "window_size": 2,
             "depths": (1, 1), "embed_dim": 24, "num_heads": (1, 1)}, None, False),
}  # fmt: skip
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def build(family: str, num_classes: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A network of random weights in evaluation mode, and images [3, 3, S, S]."""
    name, size, arguments, _, _ = FAMILIES[family]
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=num_classes, **arguments).eval()
    for parameter in model.parameters():  # tokens that start at 0 would hide each other
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model, torch.randn(3, 3, size, size)


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400, text
    return text


@torch.no_grad()
def naive(family: str, model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The features by timm's own functions and the known number of tokens before the patches."""
    prefix, has_class = FAMILIES[family][3:]
    end = model.forward_features(images)
    pooled = model.forward_head(end, pre_logits=True)
    if prefix is None:
        end = end.permute(0, 3, 1, 2) if family == "swin" else end
        rows = [end[:, :, y, x] for y in range(end.shape[2]) for x in range(end.shape[3])]
        patches = torch.stack(rows, 1)
    else:
        patches = end[:, prefix:]
    found = {"mean": patches.mean(1, keepdim=True), "pooled": pooled[:, None], "patches": patches}
    return found | ({"cls": end[:, :1]} if has_class else {})


# ---------------------------------------------------------------------------------------------
# timm's families
# ---------------------------------------------------------------------------------------------


@FAMILY
def test_features_and_logits_of_a_family_in_one_pass(family):
    model, images = build(family, num_classes=5)
    expected = naive(family, model, images)
    side = images.shape[-1]
    teacher = Teacher(model, family, image_size=side, targets=["logits", *expected])
    calls = []
    stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    handle = stem.register_forward_hook(lambda *_: calls.append(1))
    plain = Teacher(model, family, image_size=side)
    calls.clear()
    found = teacher.outputs(images * 1)
    assert len(calls) == 1
    handle.remove()
    assert torch.equal(found.logits, plain(images))  # bit for bit
    assert torch.equal(teacher(images), found.logits)
    for name, feature, shape in zip(expected, found.features, teacher.shapes, strict=True):
        assert feature.dtype == torch.float32 and feature.shape[1:] == shape
        torch.testing.assert_close(feature, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@FAMILY
def test_a_feature_extractor_needs_no_head(family):
    model, images = build(family)
    expected = naive(family, model, images)
    teacher = Teacher(model, family, image_size=images.shape[-1], targets=[*expected])
    found = teacher.outputs(images)
    assert found.logits is None and teacher.num_classes == 0
    for name, feature in zip(expected, found.features, strict=True):
        torch.testing.assert_close(feature, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(expected["pooled"][:, 0], model(images))  # what timm returns
    with pytest.raises(InputError, match="asked for features alone"):
        teacher(images)
    with pytest.raises(InputError, match=r"it is a feature extractor.*--targets pooled") as error:
        Teacher(model, family, image_size=images.shape[-1], targets=["logits", "mean"])
    one_line(error)


@pytest.mark.parametrize("family", [f for f in FAMILIES if not FAMILIES[f][4]])
def test_a_network_without_class_token_says_what_it_has(family):
    model, images = build(family, num_classes=5)
    with pytest.raises(InputError, match=r"it has no cls; it has mean, patches, pooled") as error:
        Teacher(model, family, image_size=images.shape[-1], targets=["cls"])
    one_line(error)
    with pytest.raises(InputError, match=r"it has no cls after block 1; it has mean, patches$"):
        Teacher(model, family, image_size=images.shape[-1], targets=[FeatureTarget("cls", block=1)])


TRANSFORMERS = [f for f in FAMILIES if FAMILIES[f][3] is not None]


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("norm", [True, False])
def test_the_output_of_a_block_with_and_without_the_final_norm(family, norm):
    model, images = build(family, num_classes=5)
    taken = {}
    blocks: Any = model.blocks
    handles = [
        block.register_forward_hook(lambda m, i, output, at=at: taken.update({at: output}))
        for at, block in enumerate(blocks)
    ]
    plain = Teacher(model, family, image_size=images.shape[-1])
    logits = plain(images)
    prefix, has_class = (0, False) if family == "cait" else FAMILIES[family][3:]
    tokens = {at: model.norm(value) if norm else value for at, value in taken.items()}
    for handle in handles:
        handle.remove()
    targets = [FeatureTarget("patches", -1, norm), FeatureTarget("mean", 0, norm)]
    targets += [FeatureTarget("cls", -2, norm)] if has_class else []
    for others in (["logits"], []):  # with the rest of the network, and without it
        teacher = Teacher(model, family, image_size=images.shape[-1], targets=[*others, *targets])
        assert [target.block for target in teacher.features] == [2, 0, 1][: len(targets)]
        found = teacher.outputs(images)
        assert found.logits is None if not others else torch.equal(found.logits, logits)
        torch.testing.assert_close(found.features[0], tokens[2][:, prefix:])
        torch.testing.assert_close(found.features[1][:, 0], tokens[0][:, prefix:].mean(1))
        if has_class:
            torch.testing.assert_close(found.features[2], tokens[1][:, :1])


def test_stages_of_a_convolutional_network():
    model, images = build("resnet", num_classes=5)
    teacher = Teacher(model, "t", image_size=64, targets=["logits", FeatureTarget("patches", -2)])
    expected = model.forward_intermediates(images, indices=[-2], intermediates_only=True)[0]
    found = teacher.outputs(images)
    assert torch.equal(found.features[0], expected.flatten(2).transpose(1, 2))
    fields = teacher.target_fingerprint(0)
    assert (fields["target.block"], fields["target.grid"]) == (3, expected.shape[-1])


def test_patches_are_pooled_by_whole_factors():
    patches = torch.arange(2 * 36 * 3, dtype=torch.float64).reshape(2, 36, 3) ** 1.5
    for grid in (1, 2, 3, 6):
        factor, found = 6 // grid, pool_grid(patches, grid)
        assert found.shape == (2, grid * grid, 3)
        for y in range(grid):
            for x in range(grid):
                square = [
                    patches[:, (y * factor + i) * 6 + x * factor + j]
                    for i in range(factor)
                    for j in range(factor)
                ]
                expected = sum(square) / factor**2
                torch.testing.assert_close(found[:, y * grid + x], expected)
    with pytest.raises(InputError, match=r"grid=4 .* 6 x 6 patches: choose one of 1, 2, 3, 6"):
        pool_grid(patches, 4)
    model, images = build("vit")
    teacher = Teacher(model, "t", image_size=32, targets=[FeatureTarget("patches", grid=1)])
    assert teacher.shapes == [(1, 32)]
    mean = Teacher(model, "t", image_size=32, targets=["mean"]).outputs(images).features[0]
    torch.testing.assert_close(teacher.outputs(images).features[0], mean)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "token"}, "unknown feature 'token': it must be one of cls, mean, pooled"),
        ({"name": "pooled", "block": 3}, "features.block=3 with the target pooled"),
        ({"name": "cls", "norm": False}, "--features.block -1 --no-features.norm"),
        ({"name": "cls", "grid": 2}, "the target cls has no grid"),
    ],
)
def test_settings_of_a_target_that_exclude_each_other(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        FeatureTarget(**arguments)
    one_line(error)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([FeatureTarget("cls", 3)], "features.block=3: its blocks are 0 to 2, or -3 to -1"),
        ([FeatureTarget("cls", -4)], "features.block=-4: its blocks are 0 to 2"),
        ([FeatureTarget("cls", 1), FeatureTarget("mean", 1, norm=False)], "with and without the"),
        ([FeatureTarget("patches", grid=3)], "grid=3 .* 2 x 2 patches: choose one of 1, 2$"),
    ],
)
def test_targets_that_a_network_does_not_have(targets, message):
    model, _ = build("vit")
    with pytest.raises(InputError, match=message) as error:
        Teacher(model, "t", image_size=32, targets=targets)
    one_line(error)


def test_targets_of_a_configuration():
    config = RunConfig(targets=("cls", "logits", "patches"))
    config = config.replace(features={"block": -2, "grid": 7})
    expected = (FeatureTarget("cls", -2), "logits", FeatureTarget("patches", -2, grid=7))
    assert targets_of(config) == expected
    with pytest.raises(InputError, match=r"features.block=-2 with the target pooled"):
        targets_of(config.replace(targets=("pooled",)))


# ---------------------------------------------------------------------------------------------
# Files of timm's networks
# ---------------------------------------------------------------------------------------------


def test_a_file_without_a_head_serves_features_alone(tmp_path: Path):
    model = timm.create_model("test_vit", num_classes=0).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    spec = f"timm:test_vit@{tmp_path}/w.safetensors"
    with pytest.raises(InputError, match=r"lacks head.weight.*such as --targets pooled") as error:
        load_teacher(spec)
    one_line(error)
    config = RunConfig(teacher=spec, targets=("cls", "pooled"))
    config = config.replace(view={"image_size": 160, "mean": (0.1,) * 3})
    teacher = load_class_matched_teacher(config, ["cat", "dog"])
    images = torch.rand(2, 3, 160, 160)
    found = teacher.outputs((images - 0.1) / torch.tensor(config.view.std).view(3, 1, 1))
    expected = model.forward_features((images - 0.5) / 0.5)  # its own normalisation
    torch.testing.assert_close(found.features[0], expected[:, :1], rtol=1e-4, atol=1e-5)
    assert teacher.class_names is None and teacher.features[0].name == "cls"


def test_a_file_with_a_head_has_one_digest_for_all_targets(tmp_path: Path):
    save_file(timm.create_model("test_vit", num_classes=4).state_dict(), tmp_path / "w.safetensors")
    spec = f"timm:test_vit@{tmp_path}/w.safetensors"
    both = load_teacher(spec, targets=["logits", "cls"])
    alone, plain = load_teacher(spec, targets=["cls"]), load_teacher(spec)
    assert both.fingerprint() == plain.fingerprint()
    assert both.target_fingerprint(0) == alone.target_fingerprint(0)


def test_the_fingerprint_of_a_feature():
    model, _ = build("deit", num_classes=5)
    targets = [FeatureTarget("cls", -1), "pooled", FeatureTarget("patches", grid=1), "patches"]
    teacher = Teacher(model, "t", image_size=32, targets=targets)
    found = [teacher.target_fingerprint(index) for index in range(4)]
    own = [{key: value for key, value in row.items() if key[:7] == "target."} for row in found]
    assert own == [
        {"target.name": name, "target.block": block, "target.norm": True, "target.grid": grid,
         "target.width": 32}
        for name, block, grid in (("cls", 2, None), ("pooled", None, None), ("patches", None, 1),
                                  ("patches", None, 2))
    ]  # fmt: skip
    teachers = {key for row in found for key in row if key.startswith("teacher.")}
    assert teachers == {
        "teacher.spec", "teacher.weights_sha256", "teacher.mean", "teacher.std"
    }  # fmt: skip
    keep_trained_head(model, "class")  # decides what the head reads, and nothing else
    teacher = Teacher(model, "t", image_size=32, targets=["cls", "pooled"])
    assert "teacher.head" not in teacher.target_fingerprint(0)
    assert teacher.target_fingerprint(1)["teacher.head"] == "class"
    assert teacher.expected_fields({"teacher.size": 64}, 0)["teacher.size"] == "none"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype(dtype):
    model, images = build("vit")
    half = Teacher(model.to(dtype), "t", image_size=32, targets=["cls", "patches"])
    expected = naive("vit", model.float(), images)
    for name, feature in zip(("cls", "patches"), half.outputs(images).features, strict=True):
        assert feature.dtype == torch.float32
        torch.testing.assert_close(feature, expected[name])


# ---------------------------------------------------------------------------------------------
# Image sizes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [(0.5, 0.5), (0.2, 0.3)])
def test_views_are_resized_for_the_teacher(statistics):
    model, _ = build("vit", num_classes=5)
    mean, std = ((value,) * 3 for value in statistics)
    options = {"mean": mean, "std": std, "targets": ["logits", "patches"]}
    teacher = Teacher(model, "t", image_size=24, size=32, **options)
    own = Teacher(model, "t", image_size=32, **options)
    views = torch.randn(2, 3, 24, 24)
    resized = nn.functional.interpolate(
        views, size=(32, 32), mode="bicubic", antialias=True, align_corners=False
    )
    found, expected = teacher.outputs(views), own.outputs(resized)
    assert torch.equal(found.logits, expected.logits) and torch.equal(teacher(views), found.logits)
    assert torch.equal(found.features[0], expected.features[0])
    before = views.clone()
    teacher.outputs(views)
    assert torch.equal(views, before)
    extra = {"teacher.size": 32, "teacher.resize": "bicubic-antialias"}
    assert teacher.fingerprint() == own.fingerprint() | extra
    assert teacher.target_fingerprint(0) == own.target_fingerprint(0) | extra
    images = torch.randn(2, 3, 32, 32)  # of that size they stay as they are
    assert torch.equal(teacher(images), own(images))


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("cait", 48, "it takes images of 32 x 32 pixels, not 48 x 48: give --teacher-size 32 "),
        ("vit", 40, "it has patches of 16 pixels, .* divide images of 40: give --teacher-size 32,"),
        ("dinov3", 40, "patches of 16 pixels, .* images of 40: give --teacher-size 32,"),
        ("eva02", 224, "it takes images of 28 x 28 pixels, not 224 x 224: give --teacher-size 28 "),
    ],
)
def test_another_size_is_refused_with_the_remedy(family, size, message):
    model, _ = build(family)
    with pytest.raises(InputError, match=message) as error:
        Teacher(model, "t", image_size=size, targets=["mean"])
    one_line(error)


@pytest.mark.parametrize("family", ["eva02", "dinov2", "siglip"])
def test_a_network_is_prepared_for_the_size_of_the_views(family):
    from deit_fast.models.teacher_images import resample_positions

    model, _ = build(family)
    patch = FAMILIES[family][1] // 2
    name, _, arguments, _, _ = FAMILIES[family]
    larger = timm.create_model(name, num_classes=0, **arguments | {"img_size": 3 * patch}).eval()
    resample_positions(model, 3 * patch, "t")
    larger.load_state_dict(model.state_dict())
    teacher = Teacher(model, "t", image_size=3 * patch, targets=["patches"])
    images = torch.randn(2, 3, 3 * patch, 3 * patch)
    expected = naive(family, larger, images)["patches"]
    torch.testing.assert_close(teacher.outputs(images).features[0], expected)
    assert teacher.shapes == [(9, 32)]


def fixed(num_classes: int) -> nn.Module:
    """A teacher of images of 16 pixels alone."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))


def test_a_teacher_of_another_size_caches_verifies_and_teaches(tmp_path: Path, capsys):
    for name, seed in (("train/a", 0), ("train/b", 10), ("val/a", 20), ("val/b", 30)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(3):
            image = picture(seed + number, 32, 32)
            image.save(tmp_path / "data" / name / f"{number}.png")
    config = digits_student().replace(
        epochs=1, num_views=1, batch_size=6, compile="none", output=str(tmp_path / "cached"),
        teacher=f"{__name__}:fixed", cache=str(tmp_path / "cache"),
        model={"args": TWO_BLOCKS}, view={"repeats": 1, "image_size": 32},
        data={"root": str(tmp_path / "data"), "workers": 0}, loss={"kind": "soft"},
        codec={"name": "dense-fp32"},
    )  # fmt: skip
    with pytest.raises(InputError, match="takes images of 16 x 16 pixels, not 32 x 32: give --te"):
        precompute(config)
    assert not (tmp_path / "cache").exists()
    sized = config.replace(teacher_size=16)
    precompute(sized)
    cached = train(sized.replace(check_teacher_every=1))
    online = train(sized.replace(cache=None, output=str(tmp_path / "online")))
    assert cached["loss"] == online["loss"]
    verify = ["cache", "verify", str(config.cache), "--teacher", str(config.teacher)]
    assert main([*verify, "--data-root", str(config.data.root)]) == 0
    assert ", 0 differ" in capsys.readouterr().out
    with pytest.raises(CacheMismatch, match=r"teacher\.size is 16, expected 20"):
        train(sized.replace(teacher=f"{__name__}:any_size", teacher_size=20))


def any_size(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(16), *fixed(num_classes))


# ---------------------------------------------------------------------------------------------
# Networks of others
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Fields:
    cls: Any = None
    patches: Any = None
    logits: Any = None


class Network(nn.Module):
    """Logits [B, 4], a vector [B, 6], 3 x 3 patches of 6 channels; ``how`` names the output."""

    def __init__(self, how: str, **config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.how = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 4), how
        self.config = SimpleNamespace(**config)

    def parts(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grid = self.embed(images)
        vector = grid.amax((2, 3))
        return self.head(vector), vector, grid

    def forward(self, images: torch.Tensor) -> Any:
        logits, vector, grid = self.parts(images)
        tokens = grid.flatten(2).transpose(1, 2)
        extra = [vector[:, None] + number for number in range(3)]
        return {
            "dict": lambda: {"logits": logits, "cls": vector, "patches": tokens},
            "dataclass": lambda: Fields(vector, grid, logits),
            "map": lambda: grid,
            "vector": lambda: vector,
            "hub": lambda: {"x_norm_clstoken": vector, "x_norm_patchtokens": tokens},
            "hidden": lambda: {"last_hidden_state": torch.cat([*extra, tokens], 1),
                               "pooler_output": vector},
            "hidden map": lambda: {"last_hidden_state": grid},
            "half": lambda: {"cls": vector.half()},
            "tuple": lambda: (logits, vector),
            "text": lambda: "features",
            "other dict": lambda: {"out": vector},
            "only logits": lambda: {"logits": logits},
            "tokens": lambda: tokens,
            "integers": lambda: {"cls": vector.long()},
            "list": lambda: {"cls": [vector]},
            "not finite": lambda: {"cls": vector / 0},
            "squeezed": lambda: {"cls": vector.squeeze()},
            "no batch": lambda: {"cls": vector.mean(0)},
            "oblong": lambda: {"patches": grid[:, :, :2]},
            "seven": lambda: {"patches": tokens[:, :7]},
            "of the batch": lambda: {"cls": vector[:, : 2 + len(vector)]},
        }[self.how]()  # fmt: skip


@pytest.mark.parametrize(
    ("how", "targets", "config"),
    [
        ("dict", "logits cls mean patches", {}), ("dataclass", "cls patches logits", {}),
        ("map", "patches mean", {}), ("vector", "pooled", {}), ("hub", "cls mean", {}),
        ("hidden", "cls patches pooled", {"patch_size": 4, "num_register_tokens": 2}),
        ("hidden map", "mean patches", {}), ("half", "cls", {}), ("only logits", "logits", {}),
    ],
)  # fmt: skip
def test_networks_of_others_give_features_by_name(how, targets, config):
    network, images = Network(how, **config), torch.randn(5, 3, 12, 12)
    teacher = Teacher(network, "t", image_size=12, targets=targets.split())
    logits, vector, grid = network.parts(images)
    tokens = grid.flatten(2).transpose(1, 2)
    expected = {"cls": vector[:, None], "pooled": vector[:, None], "patches": tokens,
                "mean": tokens.mean(1, keepdim=True)}  # fmt: skip
    found = teacher.outputs(images)
    for target, feature in zip(teacher.features, found.features, strict=True):
        tolerance = 1e-3 if how == "half" else 1e-6
        torch.testing.assert_close(feature, expected[target.name], rtol=tolerance, atol=tolerance)
    assert (found.logits is None) == ("logits" not in targets)
    assert found.logits is None or torch.equal(found.logits, logits)


@pytest.mark.parametrize(
    ("how", "targets", "message"),
    [
        ("tuple", "cls", r"it returns a tuple of \(2, 4\), \(2, 6\), no features by name: return"),
        ("text", "cls", "it returns a str, no features by name"),
        ("other dict", "cls", "it returns a dict of out, no features by name"),
        ("only logits", "cls", "it returns a dict of logits, no features by name"),
        ("vector", "cls", "it has no cls; it has pooled"),
        ("vector", "logits pooled", r"one tensor \(2, 6\), logits or features but not both"),
        ("tokens", "patches", r"it returns a tensor \(2, 9, 6\); of one tensor, \[B, D\] is"),
        ("hub", "pooled", "it has no pooled; it has cls, mean, patches"),
        ("hub", "logits cls", "its output is a dict of .* without `logits`"),
        ("hidden", "cls", r"its last_hidden_state is \(2, 12, 6\), and no config.patch_size says"),
        ("integers", "cls", "its cls must be floats, not int64"),
        ("list", "cls", r"its cls must be a tensor, not a list of \(2, 6\)"),
        ("not finite", "cls", "its cls of noise is not finite"),
        ("squeezed", "cls", r"its cls of 1 images has the shape \(6,\), not \(1, D\)"),
        ("no batch", "cls", r"its cls of 2 images has the shape \(6,\), not \(2, D\)"),
        ("oblong", "mean", r"its patches have the shape \(2, 6, 2, 3\), not \[B, N, D\] or a"),
        ("seven", "patches", "its 7 patches are not those of a square grid"),
        ("of the batch", "cls", r"its features have other shapes, \[\(1, 3\)\], in a batch of 1"),
        ("dict", "block", "features.block=0: it has no forward_intermediates"),
    ],
)  # fmt: skip
def test_outputs_that_are_not_understood_are_refused_in_one_line(how, targets, message):
    asked = [FeatureTarget("cls", 0)] if targets == "block" else targets.split()
    with pytest.raises(InputError, match=message) as error:
        Teacher(Network(how), "t", image_size=12, targets=asked)
    assert one_line(error).startswith("teacher t: ")


def test_logits_are_not_taken_for_a_pooled_feature():
    """One tensor with a column for each class that the network was asked for."""
    network = Network("vector")  # (B, 6)
    with pytest.raises(InputError, match=r"with a column for each class, so logits, not") as error:
        Teacher(network, "t", image_size=12, targets=["pooled"], num_classes=6)
    assert one_line(error).startswith("teacher t: it returns one tensor (2, 6)")
    plain = Teacher(network, "t", image_size=12, targets=["pooled"], num_classes=5)
    assert plain.shapes == [(1, 6)]


class LikeTimm(nn.Module):
    """Own network with timm's interface: two registers, then a class token, which comes first."""

    num_prefix_tokens, num_classes = 3, 4

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.net, self.scale = Network("map"), scale

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        _, vector, grid = self.net.parts(images)
        prefix = torch.stack([vector, 9 + vector, -9 + vector], 1)
        return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], 1)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x[:, 0] if pre_logits else self.net.head(x[:, 0])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images)) * self.scale


def test_an_own_network_with_the_functions_of_timm():
    images, names = torch.randn(2, 3, 12, 12), ["logits", "cls", "pooled", "mean", "patches"]
    teacher = Teacher(LikeTimm(), "t", image_size=12, targets=names)
    logits, vector, grid = teacher.model.net.parts(images)
    found = teacher.outputs(images)
    expected = [vector[:, None]] * 2 + [grid.mean((2, 3))[:, None], grid.flatten(2).mT]
    torch.testing.assert_close(found.logits, logits)
    for feature, value in zip(found.features, expected, strict=True):
        torch.testing.assert_close(feature, value)
    with pytest.raises(InputError, match=r"forward is not forward_head.forward_features") as error:
        Teacher(LikeTimm(scale=2.0), "t", image_size=12, targets=["logits", "cls"])
    one_line(error)
    assert Teacher(LikeTimm(scale=2.0), "t", image_size=12, targets=["cls"]).shapes == [(1, 6)]
    silent = LikeTimm()
    silent.num_prefix_tokens = None  # type: ignore[assignment]
    assert math.isqrt(12) ** 2 != 12
    with pytest.raises(InputError, match=r"returns \(2, 12, 6\), and no num_prefix_tokens says"):
        Teacher(silent, "t", image_size=12, targets=["mean"])
