"""Configurations as dictionaries, files (JSON, YAML, TOML) and dotted keys: `view.image_size`."""

from __future__ import annotations

import dataclasses
import logging
import sys
import types
import typing
from pathlib import Path
from typing import Any

from deit_fast.config import OptimConfig, RunConfig, constants, describe, shown
from deit_fast.errors import InputError, did_you_mean, first_line
from deit_fast.runtime.files import read_file, read_json

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

# A run writes all of its settings, a user some. Before optim.ema_warmup all averages warmed up.
_ALL_RUNS_HAVE = {"lr", "min_lr", "warmup_epochs", "weight_decay", "ema_decay"}
# Before view.seed the views had the run's seed.
_ALL_VIEWS_HAVE = {
    "image_size", "crop_scale", "flip_prob", "erase_prob", "mixup_alpha", "cutmix_alpha", "repeats",
    "mean", "std",
}  # fmt: skip

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
_HINTON = (
    "batchmean with loss.alpha = 2 a / (1 + a), a being the alpha here, is the same loss up to a "
    "constant factor"
)


def explain_retired(key: str) -> str:
    """Why the dotted key of an earlier version is refused, and what to do instead."""
    remedy = _REPLACEMENTS.get(key, "remove it, or use the version that had it")
    value = "none" if RETIRED[key] is None else RETIRED[key]
    return f"is no longer a setting: its value is always {value}; {remedy}"


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionary of a config, ready for JSON (tuples become lists there)."""
    return dataclasses.asdict(config)


def from_earlier(values: dict[str, Any]) -> dict[str, Any]:
    """A run's settings from JSON, those of earlier versions under the names of this one.

    Raises:
        InputError: a value that is needed for it is out of range.
    """
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
    if _has_no_view_seed(values):
        values["view"] = values["view"] | {"seed": values["seed"]}
    if isinstance(optim, dict) and optim.keys() >= _ALL_RUNS_HAVE and "ema_warmup" not in optim:
        values["optim"] = optim = optim | {"ema_warmup": bool(optim["ema_decay"])}
    if isinstance(optim, dict) and {"lr", "lr_batch"} <= optim.keys():
        lr, samples = OptimConfig(lr=optim["lr"]).lr, optim["lr_batch"]
        if type(samples) is int and 0 < samples < 2**31:
            current = OptimConfig.lr_batch
            values["optim"] = optim | {"lr": lr * current / samples, "lr_batch": current}
    return values


def _has_no_view_seed(values: dict[str, Any]) -> bool:
    """Whether these are all settings of a run of a version before view.seed."""
    view, optim = values.get("view"), values.get("optim")
    return (
        isinstance(view, dict)
        and isinstance(optim, dict)
        and view.keys() >= _ALL_VIEWS_HAVE
        and optim.keys() >= _ALL_RUNS_HAVE
        and values.keys() >= {"seed", "data", "model", "loss", "codec"}
        and "seed" not in view
    )


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


def describe_setting(key: str) -> str:
    """What a value of a setting is, by its dotted key; empty where there is no such setting."""
    group, dot, name = key.rpartition(".")
    cls = _GROUPS.get(group + dot)
    hint = typing.get_type_hints(cls, include_extras=True).get(name) if cls else None
    return describe(hint) if hint is not None else ""


def load_config(path: str, base: RunConfig) -> RunConfig:
    """Read a config file over ``base``: YAML or TOML by its suffix, else JSON, as every run writes.

    In all of them the text `none` is also None, where a setting takes it: TOML has no other word.

    Raises:
        InputError: the file is missing or damaged (of YAML and TOML it names the line), or as
            ``from_dict``.
    """
    try:
        return from_dict(base, from_earlier(read_settings_file(path)))
    except InputError as error:
        raise InputError(f"config file {path}: {error}") from None


def read_settings_file(path: str) -> dict[str, Any]:
    """The values of a config file as they stand there.

    Raises:
        InputError: the file is missing or damaged.
    """
    read = {".yaml": _read_yaml, ".yml": _read_yaml, ".toml": _read_toml}
    try:
        return read.get(Path(path).suffix.lower(), read_json)(Path(path))
    except FileNotFoundError:
        raise InputError(f"config file {path} does not exist") from None


def recipe_of(path: str) -> str | None:
    """The recipe whose settings a config file changes; None where it has every setting itself.

    Raises:
        InputError: as ``read_settings_file``.
    """
    values = read_settings_file(path)
    name = values.get("recipe")
    if not isinstance(name, str) or name == RunConfig.recipe:
        return None
    return None if {*dotted_keys()} <= by_dotted_key(values).keys() else name


_MAX_TEXT_BYTES = 1 << 20  # a run writes some kilobytes


def _read_yaml(path: Path) -> dict[str, Any]:
    """YAML 1.2: `1e-3` is a number, `no` and `on` are text, and a key twice is an error."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        values = YAML(typ="safe", pure=True).load(_read_text(path))
    except (YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        reason = getattr(error, "problem", None) or first_line(error)
        raise InputError(f"config file {path}{line}: {reason}") from None
    if not isinstance(values, dict):
        raise InputError(f"config file {path} is no mapping of settings to values")
    return _text_keys(values, path)


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(_read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"config file {path}: {first_line(error)}") from None


def _read_text(path: Path) -> str:
    try:
        return read_file(path, _MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"config file {path} is damaged: not UTF-8 text") from None


def _text_keys(values: dict[Any, Any], path: Path) -> dict[str, Any]:
    for key, value in values.items():
        for name in (key, *(value if isinstance(value, dict) else ())):
            if not isinstance(name, str):
                raise InputError(f"config file {path}: the key {shown(name)} is no text")
    return values


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
                message = f"{key}, here {shown(value)}, {explain_retired(key)}"
                if key not in WITHOUT_INFLUENCE:
                    raise InputError(message)
                log.warning("%s", message)
        elif name not in names:
            raise InputError(f"unknown setting {shown(key)}{_nearest(name, prefix, names)}")
        elif dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise InputError(f"{key} is a group of settings, not {shown(value)}")
            changes[name] = from_dict(getattr(base, name), value, f"{key}.")
        elif key == "loss.reduction" and value == "hinton":
            raise InputError(f"loss.reduction=hinton is no longer a setting; {_HINTON}")
        elif value == "none" and _takes_none(hints[name]):
            changes[name] = None
        else:
            changes[name] = value
    return dataclasses.replace(base, **changes)


def _takes_none(hint: Any) -> bool:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return is_union and type(None) in typing.get_args(hint)


def _nearest(name: str, prefix: str, names: list[str]) -> str:
    """End of the message about an unknown key of a dictionary."""
    valid = dict.fromkeys([*(prefix + item for item in names), *dotted_keys()])
    group, _, inner = name.partition(".")
    if not prefix and name in valid:
        return f'; write {{"{group}": {{"{inner}": ...}}}}'
    return did_you_mean(prefix + name, valid)
