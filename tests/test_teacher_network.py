"""Networks of others as teachers: what they return, take, and are made of.

DEIT_FAST_SWEEP=N tries N combinations instead of 60.
"""

from __future__ import annotations

import inspect
import logging
import os
import random
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from deit_fast.errors import InputError
from deit_fast.models import Teacher, load_teacher
from deit_fast.models.names import build_from_factory
from deit_fast.models.normalisation import require_normalisation
from deit_fast.recipes import digits_student

HERE = "test_teacher_network"
Named = namedtuple("Named", "features logits")
Unnamed = namedtuple("Unnamed", "one two")


@dataclass
class Fields:
    logits: Any
    loss: float = 0.0


class ModelOutput(OrderedDict):
    """As that of transformers: a dict whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


# By name: what is made of logits [B, C] and features [B, 7], and whether it is accepted.
OUTPUTS: dict[str, tuple[Callable[[Any, Any], Any], bool]] = {
    "tensor": (lambda y, f: y, True),
    "pair with features": (lambda y, f: (y, f), True),
    "features first": (lambda y, f: [f, y], True),
    "loss first": (lambda y, f: (y.mean(), y), True),
    "one in a list": (lambda y, f: [y], True),
    "dict": (lambda y, f: {"logits": y, "features": f}, True),
    "model output": (lambda y, f: ModelOutput(loss=None, logits=y), True),
    "dataclass": (lambda y, f: Fields(y), True),
    "named tuple": (lambda y, f: Named(f, y), True),
    "tuple without the name": (lambda y, f: Unnamed(y, f), True),
    "two heads": (lambda y, f: (y, y), False),
    "other dict": (lambda y, f: {"out": y}, False),
    "text": (lambda y, f: "logits", False),
    "none": (lambda y, f: None, False),
    "empty": (lambda y, f: (), False),
    "no logits": (lambda y, f: {"logits": None}, False),
    "map": (lambda y, f: y[:, :, None, None].expand(-1, -1, 2, 2), False),
    "row of numbers": (lambda y, f: y.mean(1), False),
    "classes": (lambda y, f: y.argmax(1), False),
    "integers": (lambda y, f: y.long(), False),
    "mean over the batch": (lambda y, f: y.mean(0, keepdim=True), False),
    "squeezed": (lambda y, f: y.squeeze(), False),
    "not a number": (lambda y, f: y * float("nan"), False),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Network(nn.Module):
    """A linear layer, and what ``how`` makes of its output."""

    def __init__(self, size: int, channels: int, classes: int, how: str) -> None:
        super().__init__()
        self.first = nn.Linear(channels * size * size, classes)
        self.other = nn.Linear(channels * size * size, 7)
        self.how = how

    def forward(self, images: torch.Tensor) -> Any:
        pixels = images.flatten(1)
        return OUTPUTS[self.how][0](self.first(pixels), self.other(pixels))


def one_line(error: InputError) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 400, text
    return text


def test_any_network_is_a_teacher_or_refused_in_one_line() -> None:
    """The logits are those of the layer itself, in float32, on images of its own normalisation."""
    draw, counts = random.Random(0), {"taken": 0, "refused": 0}
    count = int(os.environ.get("DEIT_FAST_SWEEP", "60"))
    for trial in range(count):
        how = [*OUTPUTS][trial % len(OUTPUTS)]
        dtype, size = draw.choice(DTYPES), draw.choice((8, 32, 48))
        view, channels = draw.choice((size, size, size, 40)), draw.choice((3, 3, 3, 1))
        classes, mean = draw.choice((2, 5, 10)), (draw.random(), 0.4, 0.5)
        torch.manual_seed(trial)
        network = Network(size, channels, classes, how).to(dtype)
        weight, bias = network.first.weight.float(), network.first.bias.float()
        where = (trial, how, dtype, size, view, channels)
        try:
            teacher = Teacher(
                network, "t", mean=mean, std=(0.2, 0.3, 0.4), image_size=view, num_classes=classes
            )
        except InputError as error:
            one_line(error)
            counts["refused"] += 1
            assert not (OUTPUTS[how][1] and channels == 3 and view == size), where
            continue
        counts["taken"] += 1
        assert OUTPUTS[how][1] and channels == 3 and view == size, where
        assert teacher.num_classes == classes
        images = torch.randn(3, 3, size, size)
        own = (images * _row(0.229, 0.224, 0.225) + _row(0.485, 0.456, 0.406) - _row(*mean)) / _row(
            0.2, 0.3, 0.4
        )
        expected = nn.functional.linear(own.flatten(1), weight, bias)
        found = teacher(images)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=str(where))
    print(counts)
    assert min(counts.values()) > count // 5


def _row(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


# ---------------------------------------------------------------------------------------------
# Sizes and channels
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 48, 224, 384])
def test_a_fixed_size_is_named_with_the_views(size: int) -> None:
    network = Network(size, 3, 4, "tensor")
    with pytest.raises(InputError, match=f"takes images of {size} x {size} pixels, not 40 x 40: "
                                         f"give --teacher-size {size} ") as error:  # fmt: skip
        Teacher(network, "t", image_size=40)
    one_line(error.value)
    assert Teacher(network, "t").image_size == size  # found where none is given


def test_one_channel_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"takes images of 1 channel, .* images.mean\(1, keepdim"):
        Teacher(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(2)), "t", image_size=16)


def test_positions_of_a_timm_transformer_are_resampled(tmp_path: Path, caplog: Any) -> None:
    """As timm.create_model does with `img_size`; at its own size nothing changes."""
    caplog.set_level(logging.INFO, "deit_fast")
    save_file(timm.create_model("test_vit", num_classes=4).state_dict(), tmp_path / "w.safetensors")
    spec = f"timm:test_vit@{tmp_path}/w.safetensors"
    own = load_teacher(spec, image_size=160)
    assert "resampled" not in caplog.text
    larger = load_teacher(spec, image_size=192)
    assert "its position embeddings are resampled from 160 to 192 pixels" in caplog.text
    assert larger(torch.randn(2, 3, 192, 192)).shape == (2, 4)
    assert own.model.pos_embed.shape != larger.model.pos_embed.shape
    with pytest.raises(InputError, match=r"patches of 16 pixels, .* 100: give --teacher-size 96,"):
        load_teacher(spec, image_size=100)


# ---------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------


class Holder(nn.Sequential):
    """A network of its own statistics; a method or a layer of that name is none."""

    def __init__(self) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))


STATISTICS: dict[str, Any] = {
    "tuple": ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)), "scalar": (0.5, 0.25), "list": ([0.5], [0.25]),
    "numpy": (np.full(3, 0.5, np.float32), np.float64(0.25)),
    "tensor": (torch.full((1, 3, 1, 1), 0.5), torch.tensor(0.25)), "integers": (0, 1),
}  # fmt: skip


def with_statistics(num_classes: int) -> nn.Module:
    network = Holder()
    network.mean, network.std = STATISTICS[os.environ["STATISTICS"]]
    return network


@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_in_any_container(kind: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("STATISTICS", kind)
    teacher = load_teacher(f"{HERE}:with_statistics", num_classes=4)
    mean, std = (torch.as_tensor(value).flatten().double() for value in STATISTICS[kind])
    assert torch.allclose(torch.tensor(teacher.mean).double(), mean.expand(3))
    assert torch.allclose(torch.tensor(teacher.std).double(), std.expand(3))
    assert all(type(value) is float for value in (*teacher.mean, *teacher.std))


def refused_statistics(num_classes: int) -> nn.Module:
    network, case = Holder(), os.environ["STATISTICS"]
    if case == "of 255":
        network.mean, network.std = (123.675, 116.28, 103.53), (58.4, 57.1, 57.4)
    elif case == "one alone":
        network.mean = 0.5
    elif case == "two numbers":
        network.mean, network.std = (0.5, 0.5), (0.5, 0.5)
    elif case == "text":
        network.mean, network.std = "half", "half"
    elif case == "zero":
        network.mean, network.std = 0.5, 0.0
    else:
        network.register_buffer("mean", torch.full((3,), 0.5))
        network.register_buffer("std", torch.full((3,), 0.5))
    return network


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("of 255", r"is of pixels in \[0, 255\]: divide mean and std by 255"),
        ("one alone", "has an attribute mean but no std"),
        ("two numbers", "must be one number or three"),
        ("text", "must be one number or three"),
        ("zero", r"std must be 3 values, each a number in \[0.001, 10\]"),
        ("buffer", "may normalise by itself: give --teacher-mean 0 0 0"),
    ],
)
def test_statistics_that_cannot_be_right_are_refused(case, message, monkeypatch) -> None:
    monkeypatch.setenv("STATISTICS", case)
    with pytest.raises(InputError, match=message) as error:
        load_teacher(f"{HERE}:refused_statistics", num_classes=4)
    one_line(error.value)
    given = load_teacher(f"{HERE}:refused_statistics", num_classes=4, mean=(0.1,) * 3, std=[1.0])
    assert given.mean == (0.1,) * 3


def test_a_student_is_trained_in_the_statistics_that_it_names() -> None:
    config, network = digits_student(), Holder()
    require_normalisation(network, config)
    network.mean, network.std = config.view.mean, torch.tensor(config.view.std)
    require_normalisation(network, config)
    network.mean = (0.1, 0.2, 0.3)
    with pytest.raises(InputError, match=r"give --view.mean 0.1 0.2 0.3 --view.std 0.5") as error:
        require_normalisation(network, config)
    one_line(error.value)


# ---------------------------------------------------------------------------------------------
# Factories
# ---------------------------------------------------------------------------------------------


def by_name(num_classes: int = 3) -> nn.Module:
    return nn.Linear(2, num_classes)


def any_names(**options: int) -> nn.Module:
    return by_name(**options)


def by_position(classes: int, /, width: int = 2) -> nn.Module:
    return nn.Linear(width, classes)


def named_by_position(num_classes: int, /) -> nn.Module:
    return by_name(num_classes)


def without() -> nn.Module:
    return by_name(8)


def needs_two(num_classes: int, width: int) -> nn.Module:
    return nn.Linear(width, num_classes)


def needs_a_keyword(*, classes: int) -> nn.Module:
    return by_name(classes)


def fails(num_classes: int) -> nn.Module:
    raise KeyError("a\nb")


def no_module(num_classes: int) -> int:
    return num_classes


@pytest.mark.parametrize(
    ("name", "outputs"),
    [("by_name", 8), ("any_names", 8), ("by_position", 8), ("named_by_position", 8),
     ("without", 8)],
)  # fmt: skip
def test_factories_get_the_number_of_classes(name: str, outputs: int) -> None:
    assert build_from_factory(f"{HERE}:{name}", 8).out_features == outputs


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("needs_two", "the factory needs width"),
        ("needs_a_keyword", "the factory needs classes"),
        ("fails", "the factory failed: KeyError"),
        ("no_module", "the factory returned a int"),
    ],
)
def test_other_factories_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        build_from_factory(f"{HERE}:{name}", 8)
    one_line(error.value)


@pytest.mark.parametrize("name", ["by_position", "named_by_position"])
def test_a_factory_that_needs_the_classes_is_not_called_without(name: str) -> None:
    with pytest.raises(InputError, match="needs the number of classes"):
        build_from_factory(f"{HERE}:{name}", None)
    assert inspect.signature(by_name).parameters and build_from_factory(f"{HERE}:by_name", None)


def test_a_factory_without_a_file_is_said_to_make_its_own_weights(caplog: Any) -> None:
    caplog.set_level(logging.INFO, "deit_fast")
    load_teacher("deit_fast.models.convnet:small_convnet", num_classes=4)
    assert "its weights are those that the factory made" in caplog.text
    assert "of the views are assumed" in caplog.text
    caplog.clear()
    Teacher(nn.Sequential(Holder(), nn.Softmax(1)), "t")
    assert "t returns probabilities, not logits" in caplog.text


class InPlace(nn.Module):
    """A network that normalises its input in place."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.mul_(0.9).sub_(0.5).mean((2, 3)))


def test_a_network_that_works_in_place_leaves_the_students_images_as_they_are() -> None:
    images = torch.randn(2, 3, 8, 8)
    before = images.clone()
    Teacher(InPlace(), "in-place", image_size=8)(images)
    assert torch.equal(images, before)
