"""The flags of every verb with their texts, for the short help and for completion; without tyro."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from deit_fast.recipes import RECIPES


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        key: the setting's dotted key, or the parameter's name.
        hint: type of its value.
        text: what it does.
        default: its value without the flag.
    """

    key: str
    hint: Any
    text: str
    default: Any = None

    @property
    def name(self) -> str:
        """As it is typed: `--optim.min-lr`."""
        return f"--{self.key.replace('_', '-')}"

    @property
    def switch_off(self) -> str:
        """What turns a switch off: `--no-resume`, `--model.no-fused`."""
        group, dot, last = self.key.replace("_", "-").rpartition(".")
        return f"--{group}{dot}no-{last}"

    @property
    def is_switch(self) -> bool:
        return self.hint is bool

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that can be listed; empty where there are too many."""
        if self.key == "recipe":
            return tuple(RECIPES)
        return _choices(self.hint)

    @property
    def value_name(self) -> str:
        """What stands for its value in help: `STR`, `{none,soft,hard}`."""
        if self.is_switch:
            return ""
        if self.choices and self.key != "recipe":
            return f"{{{','.join(self.choices)}}}"
        kinds = {int: "INT", float: "FLOAT"}
        return kinds.get(_bare(self.hint), "STR")


def _bare(hint: Any) -> Any:
    """A type without ranges and None."""
    while True:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated or origin in (typing.Union, types.UnionType):
            hint = arguments[0]
        else:
            return hint


def _choices(hint: Any) -> tuple[str, ...]:
    bare = _bare(hint)
    if typing.get_origin(bare) is tuple:
        return _choices(typing.get_args(bare)[0])
    if typing.get_origin(bare) is not Literal:
        return ()
    optional = ("none",) if type(None) in typing.get_args(hint) else ()
    return (*typing.get_args(bare), *optional)


def settings_flags(cls: type, default: Any = None, prefix: str = "") -> list[Flag]:
    """The flags of a dataclass and of the groups in it.

    Args:
        default: an instance with the defaults to show; None: the class's own.
    """
    hints, texts = typing.get_type_hints(cls, include_extras=True), _field_texts(cls)
    default = cls() if default is None else default
    flags: list[Flag] = []
    for item in dataclasses.fields(cls):
        hint, value = hints[item.name], getattr(default, item.name, None)
        if dataclasses.is_dataclass(hint):
            flags += settings_flags(typing.cast(type, hint), value, f"{prefix}{item.name}.")
        else:
            flags.append(Flag(prefix + item.name, hint, texts[item.name], value))
    return flags


def _field_texts(cls: type) -> dict[str, str]:
    """The docstring below each field, those of the base classes included."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            texts |= _texts_of_module(base.__module__).get(base.__name__, {})
    return texts


@functools.cache
def _texts_of_module(name: str) -> dict[str, dict[str, str]]:
    tree = ast.parse(inspect.getsource(sys.modules[name]))
    found: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = texts = {}
            for field, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    text = ast.literal_eval(below.value)
                    texts[ast.unparse(field.target)] = inspect.cleandoc(text)
    return found


def function_flags(function: Callable[..., Any]) -> tuple[list[Flag], list[Flag]]:
    """The positional arguments and the flags of a verb's function."""
    hints = typing.get_type_hints(function, include_extras=True)
    _, _, described = (inspect.getdoc(function) or "").partition("Args:\n")
    entries = re.findall(r"^ {4}(\w+): ((?:.*\n?)(?: {8}.*\n?)*)", described, re.M)
    texts = {name: " ".join(text.split()) for name, text in entries}
    positional: list[Flag] = []
    flags: list[Flag] = []
    for parameter in inspect.signature(function).parameters.values():
        name = parameter.name
        found = Flag(name, hints[name], texts.get(name, ""), parameter.default)
        (flags if parameter.kind is parameter.KEYWORD_ONLY else positional).append(found)
    return positional, flags


# ---------------------------------------------------------------------------------------------
# The short help of train and precompute
# ---------------------------------------------------------------------------------------------

COMMON = {
    "train": (
        "recipe", "config", "data.root", "teacher", "cache", "output", "model.name",
        "model.weights", "view.image_size", "epochs", "batch_size", "optim.lr", "data.workers",
        "seed", "dry_run",
    ),
    "precompute": (
        "recipe", "config", "data.root", "teacher", "teacher_classes", "cache", "view.image_size",
        "epochs", "num_views", "targets", "codec.name", "teacher_batch", "data.workers",
        "blocks", "dry_run",
    ),
}  # fmt: skip

_FILE = "timm:regnety_160@weights.safetensors"
EXAMPLES = {
    "train": (
        ("a teacher for your own classes",
         "deit-fast train --recipe finetune_teacher --data.root DIR --output runs/teacher"),
        ("a student, from the logits that precompute wrote",
         "deit-fast train --recipe deit_small_distilled --data.root DIR --cache CACHE"),
        ("a student, with the teacher in every step",
         f"deit-fast train --recipe deit_small_distilled --data.root DIR --teacher {_FILE}"),
        ("what a run has and needs, before it starts",
         "deit-fast train --recipe finetune_teacher --data.root DIR --dry-run"),
    ),
    "precompute": (
        ("every view that a run of the recipe needs",
         f"deit-fast precompute --recipe deit_small_distilled --data.root DIR --teacher {_FILE} "
         "--cache CACHE"),
        ("bytes and time, before anything is written",
         f"deit-fast precompute --config run.yaml --teacher {_FILE} --cache CACHE --dry-run"),
        ("on eight GPUs",
         "torchrun --nproc-per-node 8 -m deit_fast precompute --config run.yaml --cache CACHE"),
    ),
}  # fmt: skip


def short_help(verb: str, cls: type, default: Any) -> str:
    """The text of `deit-fast train --help`: the common flags and examples."""
    flags = {flag.key: flag for flag in settings_flags(cls, default)}
    lines = [f"usage: deit-fast {verb} [--recipe NAME] [--config FILE] [--FLAG VALUE ...]", ""]
    for paragraph in (inspect.getdoc(cls) or "").split("\n\n"):
        lines += [*textwrap.wrap(paragraph, 80), ""]
    lines.append("common flags:")
    for key in COMMON[verb]:
        flag = flags[key]
        lines.append(f"  {flag.name} {flag.value_name}".rstrip())
        shown = "none" if flag.default is None else flag.default
        ending = "" if flag.is_switch else f" (default: {shown})"
        lines += textwrap.wrap(
            " ".join(flag.text.split()) + ending, 80, initial_indent=" " * 6,
            subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    lines += ["", "examples:"]
    for purpose, command in EXAMPLES[verb]:
        lines += [f"  # {purpose}", f"  {command}"]
    lines += ["", f"`deit-fast {verb} --help-all` lists all {len(flags)} flags."]
    return "\n".join(lines)
