"""Command-line arguments as typed values, and errors about them in one line; tyro does the work."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from deit_fast.config import TEACHER_SETTINGS, Count, RunConfig, check
from deit_fast.config_file import (
    RETIRED,
    describe_setting,
    explain_retired,
    load_config,
    recipe_of,
)
from deit_fast.errors import InputError, did_you_mean
from deit_fast.flags import settings_flags, short_help
from deit_fast.recipes import find_recipe

HELP, HELP_ALL = ("-h", "--help"), "--help-all"
_NONE = (["none"], ["None"])

log = logging.getLogger("deit_fast")


def parse(target: Callable[..., Any], verb: str, args: list[str], default: Any = None) -> Any:
    """Read ``args`` into a dataclass, or into a deferred call of a function.

    Args:
        target: a dataclass; or a function whose positional-only parameters are positional
            arguments and whose keyword-only parameters are flags.
        verb: the verb, for messages and help.
        args: tokens after the verb.
        default: instance of the dataclass with the default values.

    Returns:
        The dataclass instance, or ``functools.partial(function, ...)``.

    Raises:
        InputError: one line that names the flag and its value.
        SystemExit: status 0, after help was printed.
    """
    for before, token in itertools.pairwise([verb, *args]):
        if token == "" or re.fullmatch("--[^=]+=", token):  # an empty path would mean `.`
            raise InputError(f"the value after {token or before} is empty")
    function = not inspect.isclass(target)
    if function and not args and _has_only_defaults(target):
        return functools.partial(target)  # so that `doctor` works without tyro
    import tyro

    args = [HELP[1] if token == HELP_ALL else token for token in args]
    # tyro writes the switch that turns off `--model.fused` as `--model.no-fused`.
    args = [re.sub(r"^--no-((?:\w+\.)+)", r"--\1no-", token) for token in args]
    keywords: dict[str, Any] = {} if function else {"default": default}
    keywords |= {"prog": f"deit-fast {verb}", "registry": _value_types()}
    box = io.StringIO()
    with contextlib.redirect_stderr(box), quiet_pipe():
        try:
            return tyro.cli(_deferred(target) if function else target, args=args, **keywords)
        except SystemExit as stop:
            if stop.code:
                if isinstance(default, RunConfig):
                    flags = [flag.key for flag in settings_flags(type(default))]
                else:
                    flags = [*inspect.signature(target).parameters]
                message = _explain(box.getvalue(), args, flags)
                if unread := re.match(r"--(\S+) cannot be read from", message):
                    kind = describe_setting(unread[1].replace("-", "_")) if not function else ""
                    message += f": it takes {kind}" if kind else ""
                message += f"; see `deit-fast {verb} --help`"
                raise _input_error(stop) or InputError(message) from None
            sys.stdout.flush()
    raise SystemExit(0)


def _has_only_defaults(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return all(p.default is not p.empty for p in parameters)


def _deferred(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the same signature and help that checks and stores its arguments."""
    import tyro

    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    hints = typing.get_type_hints(function, include_extras=True)

    def deferred(*args: Any, **keywords: Any) -> Any:
        for name, value in signature.bind(*args, **keywords).arguments.items():
            is_flag = signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            shown = f"--{name.replace('_', '-')}" if is_flag else name.upper()
            check(shown, hints[name], value)
        return functools.partial(function, *args, **keywords)

    annotations = dict(hints)
    for name in (p.name for p in parameters if p.kind is p.POSITIONAL_ONLY):
        annotations[name] = Annotated[hints[name], tyro.conf.arg(metavar=name.upper())]
    deferred.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p.replace(annotation=annotations[p.name]) for p in parameters]
    )
    deferred.__annotations__, deferred.__doc__ = annotations, function.__doc__
    return deferred


def _value_types() -> Any:
    """tyro's types, where an optional value takes `none`, or like tyro `None`."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        kinds = [kind for kind in typing.get_args(info.type) if kind is not type(None)]
        is_union = info.type_origin in (typing.Union, types.UnionType)
        if not is_union or len(kinds) != 1:
            return None
        inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], set()))
        assert isinstance(inner, PrimitiveConstructorSpec)
        count = inner.nargs if isinstance(inner.nargs, int) else None

        def read(words: list[str]) -> Any:
            if words in _NONE:
                return None
            if count not in (None, len(words)):
                given = f", not {' '.join(words)}" if words else ""
                raise ValueError(f"needs {count} value(s), or none{given}")
            return inner.instance_from_str(words)

        return PrimitiveConstructorSpec(
            nargs=inner.nargs if count is None else (1, count),
            metavar=f"{inner.metavar}|none",
            instance_from_str=read,
            is_instance=lambda v: v is None or inner.is_instance(v),
            str_from_instance=lambda v: ["none"] if v is None else inner.str_from_instance(v),
        )

    return registry


def _input_error(error: BaseException | None) -> InputError | None:
    """The InputError of a config class that made tyro exit."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


# tyro's wording -> ours; a text that matches none stays as it is
_REWORDED = [
    (r"^Error parsing (--\S+): ", r"\1 "),
    (r"^Missing value for argument '(\S+)'\. Expected (\d+) values", r"\1 needs \2 value(s)"),
    (r"^invalid choice (.+) for argument '(\S+)'\. Expected one of \((.+)\)",
     r"\2 needs one of \3, not \1"),
    (r"invalid literal for int\(\) with base 10: ", "needs a whole number, not "),
    (r"Exceeds the limit .*", "needs a number of fewer digits"),
    (r"could not convert string to float: ", "needs a number, not "),
    (r"Could not find valid parse for arguments: \[(.*)\]", r"cannot be read from \1"),
    (r"^(.+ needs .+)\.$", r"\1"),
    (r"Could not parse arguments \[(.*?)\] into .*", r"cannot be read from \1"),
]  # fmt: skip


def _explain(box: str, args: list[str], flags: Iterable[str]) -> str:
    """tyro's message in one line, and for an unknown flag the nearest of ``flags``."""
    text = re.sub("[│╭╮╰╯]", " ", box)
    # the frame has a title, a rule, the message, and perhaps more parts after more rules
    message = " ".join(re.split("[─-]{5,}", text)[1].split()).rstrip(".")
    if missing := re.match(r"Missing from deit-fast (.+?): (.+)", message):
        return f"{missing[1]} needs {_describe_missing(missing[2])}"
    for pattern, replacement in _REWORDED:
        message = re.sub(pattern, replacement, message)
    unknown = re.match(r"Unrecognized options: (\S+?)(,|$)", message)
    if unknown is None:
        return message
    words = [word for token in args for word in token.split("=", 1)]
    index = words.index(unknown[1]) if unknown[1] in words else 0
    after = f" after {words[index - 1]}" if index and words[index - 1].startswith("--") else ""
    if not unknown[1].startswith("-"):
        return f"unexpected argument {unknown[1]!r}{after}"
    valid = [flag.replace("_", "-") for flag in flags]
    name = unknown[1].partition("=")[0].lstrip("-").replace("_", "-")
    if name == "ema" and "weights" in valid:
        return f"{unknown[1]} is now --weights ema"
    if (key := name.removeprefix("no-").replace("-", "_")) in RETIRED:
        return f"{unknown[1]} {explain_retired(key)}"
    return f"unknown flag {unknown[1]}{did_you_mean(name, valid, prefix='--')}"


def _describe_missing(text: str) -> str:
    """`RUN (folder of the run) and --format (timm, onnx)` of tyro's list of required arguments."""
    found = []
    for item in filter(None, (part.strip() for part in text.split("(required)"))):
        name, _, rest = item.partition(" ")
        choices = re.match(r"\{(.+?)\}", rest)
        if name.startswith("--"):
            rest = rest.partition(" ")[2]  # after the kind of its value
        sentence = re.split(r"\.( |$)", rest)[0]
        meaning = choices[1].replace(",", ", ") if choices else sentence[:1].lower() + sentence[1:]
        found.append(f"{name} ({meaning})" if meaning else name)
    return " and ".join(found)


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Around writes to stdout: a reader that closed the pipe, as `| head -1` does, is no error."""
    try:
        yield
    except OSError as error:
        # Python would write the rest again at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


# ---------------------------------------------------------------------------------------------
# Settings of a run
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunArguments(RunConfig):
    """The settings of a run, and where they come from."""

    recipe: str = "custom"
    """Start from this recipe; `deit-fast recipes list` names them."""
    config: str | None = None
    """Start from this file: JSON, as every run writes (config.json), or .yaml, .yml or .toml."""
    print_config: bool = False
    """Print the resolved settings as JSON, ready for --config, and exit."""
    dry_run: bool = False
    """Print what the run has and needs: data, cache, memory, steps, and time, measured on a few
    images; write nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainArguments(RunArguments):
    """Train a student against a teacher, or against its cached logits.

    Settings come from --recipe, then --config, then the flags: the command line wins.
    """

    students: tuple[str, ...] = ()
    """Train several students in one pass over the views: for each a file like that of --config,
    with its own settings, such as output, seed, model, loss and optim. It wins over the flags,
    which are for all students. Without output in the file: OUTPUT/NAME, the name of the file."""


@dataclass(frozen=True, kw_only=True)
class PrecomputeArguments(RunArguments):
    """Write a teacher's logits for every augmented view into a cache.

    Settings come from --recipe, then --config, then the flags: the command line wins.
    """

    views: str | None = None
    """Only the views A to B-1, written A:B. none: all views that the run needs."""
    blocks: str | None = None
    """In place of --views: only the units of work A to B-1 of all views, written A:B. Any process
    may compute any of them, several times and at once; --dry-run says how many there are."""
    dry_run: bool = False
    """Print bytes, blocks and time, measured on one batch, and write nothing."""
    bytes_per_image: Count | None = None
    """With --dry-run: also propose codecs and numbers of views for this many bytes an image, with
    the hours of this teacher."""


Arguments = typing.TypeVar("Arguments", bound=RunArguments)


def read_settings(cls: type[Arguments], verb: str, args: list[str]) -> tuple[Arguments, RunConfig]:
    """All arguments of a verb, and the run's settings: recipe, then config file, then flags."""
    base = first_settings(_last_value(args, "--recipe"), _last_value(args, "--config"))
    teacher = _last_value(args, "--teacher")
    if [teacher] not in _NONE:
        given = (word.partition("=")[0].removeprefix("--").replace("-", "_") for word in args)
        base = with_teacher(base, teacher, [*given])
    if any(token in HELP for token in args):
        with quiet_pipe():
            print(short_help(verb, cls, base), flush=True)
        raise SystemExit(0)
    arguments = parse(cls, verb, args, default=cls(**_fields(base)))
    return arguments, RunConfig(**_fields(arguments))


def first_settings(recipe: str | None, file: str | None) -> RunConfig:
    """The settings of a recipe, changed by those of a config file; without both the defaults.

    The file may name the recipe itself, by `recipe`.

    Raises:
        InputError: an unknown recipe, a wrong file, or the two name different recipes.
    """
    named = recipe_of(file) if file else None
    if recipe and named and recipe != named:
        raise InputError(
            f"--recipe {recipe}, but config file {file} changes settings of the recipe {named}: "
            f"name one recipe"
        )
    name = recipe or named
    base = find_recipe(name)() if name else RunConfig()
    return load_config(file, base) if file else base


def with_teacher(base: RunConfig, teacher: str | None, given: Container[str]) -> RunConfig:
    """``base`` with another teacher than its own; says which settings were those of its own.

    Args:
        teacher: None changes nothing.
        given: names of the settings that the user gave with the teacher.
    """
    if base.teacher is None or teacher is None:
        return base
    config = base.with_teacher(teacher)
    dropped = [
        name for name in TEACHER_SETTINGS
        if name not in given and getattr(config, name) != getattr(base, name)
    ]  # fmt: skip
    if dropped:
        log.info(
            "%s: not for teacher %s, but of %s: give their flags again if they hold for both",
            ", ".join(dropped), teacher, base.teacher,
        )  # fmt: skip
    return config


def _fields(config: RunConfig) -> dict[str, Any]:
    return {item.name: getattr(config, item.name) for item in dataclasses.fields(RunConfig)}


def _last_value(args: list[str], flag: str) -> str | None:
    words = [word for token in args for word in token.split("=", 1)]
    found = [value for word, value in itertools.pairwise(words) if word == flag]
    return found[-1] if found else None


# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------


def columns(rows: Sequence[tuple[str, str]], indent: str = "") -> str:
    """Names and values, one pair a line, the values aligned."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{indent}{name:<{width}}  {text}".rstrip() for name, text in rows)


def plain(value: Any) -> str:
    """A value without brackets, `none` for None."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(plain, value))
    return "none" if value is None else str(value)


def size_text(count: float) -> str:
    """`17 bytes`, `1.5 MiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def number_range(flag: str, text: str | None) -> range | None:
    """The value A:B of a flag.

    Raises:
        InputError: anything else.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,19}):(\d{1,19})", text)
    most = 31 if flag == "--views" else 62
    if not found or not int(found[1]) < int(found[2]) <= 2**most:
        raise InputError(
            f"{flag} needs A:B, two whole numbers with A < B, at most 2^{most}, not {text[:80]!r}"
        )
    return range(int(found[1]), int(found[2]))
