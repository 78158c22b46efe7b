"""Configurations as dictionaries, JSON files and dotted keys such as `view.image_size`."""

from __future__ import annotations

import dataclasses
import logging
import types
import typing
from pathlib import Path
from typing import Any, Literal

from deit_fast.config import OptimConfig, RunConfig, constants
from deit_fast.errors import InputError, did_you_mean
from deit_fast.runtime.files import read_json

log = logging.getLogger("deit_fast")

_GROUPS: dict[str, Any] = {
    "": RunConfig,
    **{
        f"{name}.": hint
        for name, hint in typing.get_type_hints(RunConfig).items()
        if dataclasses.is_dataclass(hint)
    },
}

# Settings of earlier versions that model.args has replaced.
_SHAPE = ("patch_size", "embed_dim", "depth", "num_heads")

RETIRED: dict[str, Any] = {
    prefix + name: list(value) if isinstance(value, tuple) else value
    for prefix, cls in _GROUPS.items()
    for name, value in constants(cls).items()
} | {
    "cache_on_device": False,
    "compress_gradients": False,
    "memory_snapshot": False,
    "save_minutes": None,
    "data.train": "train",
    "data.val": "val",
    "data.dali_decoder": "cpu",
    **{f"model.{name}": None for name in _SHAPE},
}
"""Settings of earlier versions by dotted key, each with the only value that it has now."""

# Retired settings that never changed a result: another value is ignored with a warning.
WITHOUT_INFLUENCE = frozenset(
    {"max_rollbacks", "save_minutes", "memory_snapshot", "cache_on_device", "codec.block_records"}
)

_REPLACEMENTS = {
    "save_minutes": "set save_steps",
    "data.train": "link your folder under the name train",
    "data.val": "link your folder under the name val",
    "data.dali_decoder": "set data.loader=dali-gpu",
    **{f"model.{name}": "give it in model.args" for name in _SHAPE},
    "optim.lr_batch": "scale optim.lr, which is for 512 samples",
}


def explain_retired(key: str) -> str:
    """Why the dotted key of an earlier version is refused, and what to do instead."""
    remedy = _REPLACEMENTS.get(key, "remove it, or use the version that had it")
    value = "none" if RETIRED[key] is None else RETIRED[key]
    return f"is no longer a setting: its value is always {value}; {remedy}"


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionary of a config, ready for JSON (tuples become lists there)."""
    return dataclasses.asdict(config)


def from_earlier(values: dict[str, Any]) -> dict[str, Any]:
    """A run's settings from JSON, those of earlier versions under the names of this one."""
    values = dict(values)
    model, data, optim = values.get("model"), values.get("data"), values.get("optim")
    if isinstance(model, dict) and "args" not in model:
        shape = {name: model[name] for name in _SHAPE if type(model.get(name)) is int}
        rest = {name: value for name, value in model.items() if name not in shape}
        args = [f"{name}={value}" for name, value in shape.items()]
        values["model"] = rest | ({"args": args} if args else {})
    if isinstance(data, dict) and data.get("loader") in ("dali", "dali-triton"):
        loader = "dali-gpu" if data.get("dali_decoder") == "gpu" else "dali-cpu"
        if data["loader"] == "dali":
            log.warning(
                "data.loader=dali, which augmented by DALI, is no longer a setting: read as %s, "
                "whose pixels differ slightly",
                loader,
            )
        values["data"] = data | {"loader": loader}
        if loader == "dali-gpu":
            values["data"].pop("dali_decoder")
    if isinstance(optim, dict) and {"lr", "lr_batch"} <= optim.keys():
        lr, samples = optim["lr"], optim["lr_batch"]
        if type(lr) is float and type(samples) is int and 0 < samples < 2**31:
            current = OptimConfig.lr_batch
            values["optim"] = optim | {"lr": lr * current / samples, "lr_batch": current}
    return values


def by_dotted_key(values: dict[str, Any]) -> dict[str, Any]:
    """The settings in a dictionary of ``to_dict``, or of a JSON file, by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if f"{name}." in _GROUPS and isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def dotted_keys() -> list[str]:
    """The dotted keys of all settings."""
    return list(by_dotted_key(to_dict(RunConfig())))


def load_config(path: str, base: RunConfig) -> RunConfig:
    """Read a JSON config file over ``base``; the file that every run writes is one."""
    try:
        values = read_json(Path(path))
    except FileNotFoundError:
        raise InputError(f"config file {path} does not exist") from None
    return from_dict(base, from_earlier(values))


def from_dict(base: Any, values: dict[str, Any], prefix: str = "") -> Any:
    """The config ``base`` with the values of a nested dictionary, whose keys start with ``prefix``.

    Raises:
        InputError: an unknown key (the message names the nearest valid one), a value of the wrong
            type, or another value of a retired setting than this version has, unless it has no
            influence on results: that gives a warning.
    """
    hints = typing.get_type_hints(type(base))
    names = [item.name for item in dataclasses.fields(base)]
    changes = {}
    for name, value in values.items():
        key = prefix + name
        if key in RETIRED:
            if value != RETIRED[key]:
                message = f"config key {key!r}, here {value}, {explain_retired(key)}"
                if key not in WITHOUT_INFLUENCE:
                    raise InputError(message)
                log.warning("%s", message)
        elif name not in names:
            valid = dict.fromkeys([*(prefix + n for n in names), *dotted_keys()])
            raise InputError(f"unknown config key {key!r}{did_you_mean(key, valid)}")
        elif dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise InputError(f"config key {key!r} is a group, not {value!r}")
            changes[name] = from_dict(getattr(base, name), value, f"{key}.")
        else:
            try:
                changes[name] = _convert(hints[name], value)
            except TypeError:
                what = _type_name(hints[name])
                raise InputError(f"config key {key!r} needs {what}, not {value!r}") from None
    return dataclasses.replace(base, **changes)


def _convert(hint: Any, value: Any) -> Any:
    """A JSON value as a setting of type ``hint``. Raises TypeError where it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # `X | None`
        return None if value is None else _convert(arguments[0], value)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(hints) == len(value):
            for item_hint, item in zip(hints, value, strict=True):
                _convert(item_hint, item)
            return tuple(value)
    if hint is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is hint:
        return value
    raise TypeError


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
