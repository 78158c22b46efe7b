"""Every setting has a declared range, and Python, JSON and the command line refuse the rest alike.

DEIT_FAST_SWEEP=1 gives the command line every wrong value instead of one for every third setting.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest

from deit_fast import cli
from deit_fast.config import LONGEST_TEXT, DataConfig, RunConfig, Within
from deit_fast.config_file import from_dict
from deit_fast.errors import InputError

BASE = RunConfig().replace(view={"augment": "none", "repeats": 1})  # no setting excludes another
NOT_NUMBERS = ["x", "", [], {}, None, True]
ACCEPTED = {
    "loss.teachers": [None, (100.0,), (0.0, 1.0)],
    "batch_schedule": [(), ((1, 1),), ((1, 2**31 - 1), (10**6, 1))],
    "model.args": [(), ("depth=1",), ("depth=999999999", "class_token=0")],
    "mirror": [None, "s3://bucket/run"],
    "data.image_column": [None],  # a name needs data.source=hf
    "data.label_column": [None],
    "model.head": ["standard"],  # the others need model.wide, which needs them
    "model.wide": [None],
    "view.size_schedule": [(), ((0, 224),), ((0, 8192), (3, 1), (999_999, 224))],
}
REFUSED: dict[str, list[Any]] = {
    "batch_schedule": [((0, 64),), ((2, 64), (2, 32)), ((3, 64), (1, 32)), ((1, 0),),
                       ((1, 2**31),), ((10**6 + 1, 64),), ((1, 64, 2),), (1, 64)],
    "model.args": [("depth",), ("depth=-1",), ("depth=1e3",), ("depth=1000000000",), ("=1",),
                   ("depth=6=6",), ("fused=1",), ("img_size=8",), ("num_classes=8",), "depth=6"],
    "data.image_column": ["x"],
    "data.label_column": ["x"],
    "model.head": ["lift", "wide_last"],
    "model.wide": [1, 65536],
    "track": [("wandb", "wandb")],
    "view.crop_scale": [(0.5, 0.25)],
    "view.size_schedule": [((3, 224),), ((0, 96), (0, 224)), ((0, 96), (6, 128), (3, 224)),
                           ((0, 96), (3, 128)), ((0, 0), (3, 224)),
                           ((0, 8193), (3, 224)), ((0, 96, 3), (3, 224, 3)), (0, 96, 3, 224)],
    "codec.temperatures": [()],
    "loss.teachers": [(), (0.0,)],
    "targets": [(), ("cls", "cls")],
    "more_caches": [("a", "a")],
    **{f"features.{name}": [()] for name in ("weights", "losses", "normalise", "projectors")},
}  # fmt: skip


def settings(config: Any = BASE, group: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and type of every setting."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for item in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from settings(getattr(config, item.name), f"{item.name}.")
        else:
            yield group + item.name, hints[item.name]


SETTINGS = dict(settings())


def ends(limits: Within, kind: type) -> tuple[list[Any], list[Any]]:
    """The outermost numbers of a range, and the nearest numbers outside of it."""
    low, high = kind(limits.low), kind(limits.high)
    if kind is int:
        return [low, high], [low - 1, high + 1]
    least = math.nextafter(low, math.inf) if limits.above else low
    most = math.nextafter(high, -math.inf) if limits.below else high
    return [least, most], [math.nextafter(least, -math.inf), math.nextafter(most, math.inf)]


def values(hint: Any) -> tuple[list[Any], list[Any]]:
    """Values that a setting of a type takes and that it refuses, those at the ends first."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        good, bad = ends(arguments[1], arguments[0])
        if arguments[0] is int:
            return good, [*bad, -(2**63), 2**70, 10**5000, 1.0, *NOT_NUMBERS]
        return good, [*bad, math.nan, math.inf, -math.inf, -1e308, 10**400, *NOT_NUMBERS]
    if origin in (typing.Union, types.UnionType):
        good, bad = values(arguments[0])
        return [*good, None], [value for value in bad if value is not None]
    if origin is Literal:
        return list(arguments), ["x", "", 0, None, [], arguments[0].upper()]
    if origin is tuple:
        good, _ = values(arguments[0])
        _, bad = values(arguments[0 if arguments[-1] is Ellipsis else -1])
        length = 1 if arguments[-1] is Ellipsis else len(arguments)
        wrong = [(good[0],) * (length - 1) + (value,) for value in bad]
        if arguments[-1] is not Ellipsis:
            wrong += [(good[0],) * (length - 1), (good[0],) * (length + 1)]
        return [(value,) * length for value in good], [*wrong, "x", 3, None, {}]
    if hint is bool:
        return [True, False], [0, 1, "true", "", None]
    assert hint is str, f"{hint} has no declared range"
    return ["x", "x" * LONGEST_TEXT], ["", "x" * (LONGEST_TEXT + 1), "a\0b", 3, None, b"x", []]


def cases(key: str) -> tuple[list[Any], list[Any]]:
    good, bad = values(SETTINGS[key])
    return ACCEPTED.get(key, good), REFUSED.get(key, []) + bad


def nested(key: str, value: Any) -> dict[str, Any]:
    group, _, name = key.rpartition(".")
    return {group: {name: value}} if group else {name: value}


def setting(config: RunConfig, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("key", SETTINGS)
def test_a_setting_takes_the_ends_of_its_range_and_nothing_outside(key: str) -> None:
    good, bad = cases(key)
    for value in good:
        config = BASE.replace(**nested(key, value))
        assert setting(config, key) == value
        assert type(setting(config, key)) is type(value)
        assert from_dict(BASE, json.loads(json.dumps(nested(key, value)))) == config
    for value in bad:
        with pytest.raises(InputError, match=key) as python:
            BASE.replace(**nested(key, value))
        assert len(str(python.value).splitlines()) == 1 and len(str(python.value)) < 500
        with pytest.raises(InputError, match=key) as file:
            from_dict(BASE, nested(key, value))
        assert str(file.value) == str(python.value)


def flag(key: str, value: Any) -> list[str] | None:
    """The flag that sets a value, None where no flag can."""
    if isinstance(value, bool) and SETTINGS[key] is bool:
        group, _, name = key.rpartition(".")
        return [f"--{key}"] if value else [f"--{group}.no-{name}" if group else f"--no-{name}"]
    words = list(value) if isinstance(value, tuple) else [value]
    words = [w for word in words for w in (word if isinstance(word, tuple) else [word])]
    is_text = all(isinstance(word, (str, int, float)) or word is None for word in words)
    if not is_text or any(type(word) is int and word > 2**80 for word in words):
        return None
    return [f"--{key}", *("none" if word is None else str(word) for word in words)]


def test_the_command_line_takes_the_ends_of_every_range(capsys: pytest.CaptureFixture) -> None:
    for end in (0, 1, -1):
        words, expected = [], BASE
        for key in [key for key in SETTINGS if key != "recipe"]:  # which must exist
            good = cases(key)[0]
            value = good[min(end, len(good) - 1)]
            try:  # a setting that excludes one of those before keeps its default
                expected = expected.replace(**nested(key, value))
            except InputError:
                continue
            words += flag(key, value) or []
        assert cli.main(["train", *words, "--print-config"]) == 0, capsys.readouterr().err
        assert from_dict(RunConfig(), json.loads(capsys.readouterr().out)) == expected


def test_the_command_line_refuses_what_lies_outside(capsys: pytest.CaptureFixture) -> None:
    everything = "DEIT_FAST_SWEEP" in os.environ
    count = 0
    for number, key in enumerate([*SETTINGS][:: 1 if everything else 3]):
        bad = [words for value in cases(key)[1] if (words := flag(key, value))]
        if SETTINGS[key] is bool:
            bad = [[f"--{key}=false"]]
        for words in bad if everything else [bad[number % min(2, len(bad))]]:
            count += 1
            assert cli.main(["train", *words, "--print-config"]) == 2, words
            out, err = capsys.readouterr()
            assert out == "" and err.count("\n") == 1, (words, err)
            assert key in err or key.replace("_", "-") in err, (words, err)
    print(f"{count} wrong values refused")


def test_a_group_of_settings_is_an_object_of_its_class() -> None:
    for wrong in ({}, None, DataConfig(), 3):
        with pytest.raises(InputError, match="view must be a ViewConfig, not "):
            RunConfig(view=wrong)  # type: ignore[arg-type]
