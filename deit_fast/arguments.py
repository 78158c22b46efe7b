"""Command-line arguments to typed values: tyro reads them, and wrong ones become one clear line.

tyro explains a mistake in a box of several lines. Here the tokens are split by flag first, which
finds unknown flags and missing values; what tyro then refuses is judged flag by flag, so that the
message names the one flag and its value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

from deit_fast.errors import InputError, did_you_mean

HELP = ("-h", "--help")


class Option(NamedTuple):
    """One flag of the command line with its tokens."""

    flag: str  # as typed
    hint: Any  # type of the value
    values: list[str]


def parse(
    target: Callable[..., Any],
    verb: str,
    args: list[str],
    default: Any = None,
    description: str | None = None,
) -> Any:
    """Read ``args`` into a config dataclass, or into a call of a function that is yet to be made.

    Args:
        target: a dataclass; or a function whose positional-only parameters are positional
            arguments and whose keyword-only parameters are flags.
        verb: the verb, for messages and help.
        args: tokens after the verb.
        default: instance of the dataclass that holds the defaults.
        description: head of the help; none: the target's docstring.

    Returns:
        The dataclass instance, or ``functools.partial(function, ...)``.

    Raises:
        InputError: one line that names the flag and its value.
        SystemExit: status 0, after help was printed.
    """
    function = not inspect.isclass(target)
    if function and not args and _needs_nothing(target):
        return functools.partial(target)  # `doctor` has to answer where tyro is missing
    import tyro

    spec = _deferred(target) if function else target
    keywords: dict[str, Any] = {} if function else {"default": default}
    keywords |= {"prog": f"deit-fast {verb}", "description": description}
    if any(token in HELP for token in args):
        with quiet_pipe():
            try:
                tyro.cli(spec, args=["--help"], **keywords)
            finally:
                sys.stdout.flush()
        raise SystemExit(0)
    flags, positional = _function_hints(target) if function else (_class_hints(target), {})
    values, options = _split(args, flags, positional, verb)
    given = {_plain_flag(option.flag).removeprefix("--") for option in options}
    for name in _required_flags(target) if function else []:
        if name not in given:
            raise InputError(f"{verb} needs --{name}; see `deit-fast {verb} --help`")
    # positional arguments first: tyro wants them side by side
    ordered = values + [t for o in options for t in (_for_tyro(o.flag, flags), *o.values)]
    boxes = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxes):
            return tyro.cli(spec, args=ordered, **keywords)
    except SystemExit as stop:
        if (refusal := _input_error(stop)) is not None:
            raise InputError(str(refusal)) from None
    for option in options:
        _judge(option)
    raise InputError(f"cannot read the arguments: {_one_line(boxes.getvalue())}")


def _needs_nothing(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return all(p.default is not p.empty for p in parameters)


def _required_flags(function: Callable[..., Any]) -> list[str]:
    return [
        _plain_flag(name)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
    ]


def _deferred(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the same signature that only remembers its arguments."""
    import tyro

    def remember(*args: Any, **keywords: Any) -> Any:
        return functools.partial(function, *args, **keywords)

    hints = typing.get_type_hints(function)
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        if parameter.kind is parameter.POSITIONAL_ONLY:
            hint = Annotated[hint, tyro.conf.arg(metavar=_metavar(name, hint))]
        parameters.append(parameter.replace(annotation=hint))
    remember.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    remember.__annotations__ = {p.name: p.annotation for p in parameters}
    remember.__doc__ = function.__doc__
    return remember


def _class_hints(cls: Any, prefix: str = "") -> dict[str, Any]:
    flags = {}
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            flags.update(_class_hints(hint, f"{prefix}{item.name}."))
        else:
            flags[(prefix + item.name).replace("_", "-")] = hint
    return flags


def _function_hints(function: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    hints = typing.get_type_hints(function)
    flags, positional = {}, {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional[name] = hints[name]
        else:
            flags[name.replace("_", "-")] = hints[name]
    return flags, positional


def _split(
    args: list[str], flags: dict[str, Any], positional: dict[str, Any], verb: str
) -> tuple[list[str], list[Option]]:
    """Positional values, and flags with their values; finds all mistakes but wrong values."""
    values: list[str] = []
    options: list[Option] = []
    queue = list(args)
    flag = ""
    places = []
    while queue:
        token = queue.pop(0)
        if not _is_flag(token):
            values.append(token)
            places.append(f" after {flag}" if flag else "")
            continue
        flag, equals, value = token.partition("=")
        hint = _hint(flag, flags, verb)
        if equals:
            queue.insert(0, value)
        taken = _take(queue, hint, forced=bool(equals))
        if not taken and hint is not bool:
            raise InputError(f"{flag} needs {describe(hint)}, but got no value")
        options.append(Option(flag, hint, taken))
    if len(values) < len(positional):
        name = list(positional)[len(values)]
        missing = _metavar(name, positional[name])
        raise InputError(f"{verb} needs {missing}; see `deit-fast {verb} --help`")
    if len(values) > len(positional) and not any(map(_repeats, positional.values())):
        _refuse_extra(values[len(positional)], places[len(positional)], flags)
    return values, options


def _is_flag(token: str) -> bool:
    return token.startswith("-") and len(token) > 1 and not _is_number(token)


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def _repeats(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple and typing.get_args(hint)[-1] is Ellipsis


def _metavar(name: str, hint: Any) -> str:
    return f"{name.removesuffix('s').upper()}..." if _repeats(hint) else name.upper()


def _plain_flag(flag: str) -> str:
    return flag.replace("_", "-")


def _hint(flag: str, flags: dict[str, Any], verb: str) -> Any:
    name = _plain_flag(flag).removeprefix("--")
    if flag.startswith("--"):
        if name in flags:
            return flags[name]
        if _switched_off(name, flags) is not None:
            return bool
    valid = [*flags, *(f"no-{flag}" for flag, hint in flags.items() if hint is bool)]
    near = did_you_mean(name.lstrip("-"), valid, prefix="--")
    raise InputError(f"unknown flag {flag}{near}; see `deit-fast {verb} --help`")


def _switched_off(name: str, flags: dict[str, Any]) -> str | None:
    """The switch that `no-model.fused`, or `model.no-fused` as tyro writes it, turns off."""
    group, dot, last = name.rpartition(".")
    for plain in (name.removeprefix("no-"), f"{group}{dot}{last.removeprefix('no-')}"):
        if plain != name and flags.get(plain) is bool:
            return plain
    return None


def _for_tyro(flag: str, flags: dict[str, Any]) -> str:
    """The flag as tyro reads it: `no-` stands behind the names of groups."""
    plain = _plain_flag(flag)
    off = None if plain[2:] in flags else _switched_off(plain[2:], flags)
    if off is None:
        return plain
    group, dot, last = off.rpartition(".")
    return f"--{group}{dot}no-{last}"


def _take(queue: list[str], hint: Any, forced: bool) -> list[str]:
    """Remove a flag's values from the queue; ``forced``: the first was joined to it by `=`."""
    count = _arity(hint)
    taken = [queue.pop(0)] if forced else []
    while queue and len(taken) < count and not _is_flag(queue[0]):
        taken.append(queue.pop(0))
    return taken


def _arity(hint: Any) -> float:
    """How many tokens a value of this type takes at most."""
    if hint is bool:
        return 0
    options = [option for option in _options(hint) if option is not type(None)]
    if len(options) == 1 and typing.get_origin(options[0]) is tuple:
        return float("inf") if _repeats(options[0]) else len(typing.get_args(options[0]))
    return 1


def _options(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _refuse_extra(token: str, place: str, flags: dict[str, Any]) -> None:
    name, equals, value = token.partition("=")
    hint = did_you_mean(_plain_flag(name), flags, prefix="--") if equals else ""
    hint = hint.replace("?)", f" {value}?)")
    raise InputError(f"unexpected argument {token!r}{place}{hint}")


def _judge(option: Option) -> None:
    """Raise InputError if tyro refuses this flag's value."""
    import tyro

    given = " ".join(option.values)
    if option.hint is bool:
        if option.values:
            name = _plain_flag(option.flag).removeprefix("--").removeprefix("no-")
            switches = f"write --{name} or --no-{name}"
            raise InputError(f"{option.flag} takes no value, not {given!r}; {switches}")
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            tyro.cli(option.hint, args=option.values)
    except SystemExit:
        message = f"{option.flag} needs {describe(option.hint)}, not {given!r}"
        raise InputError(message) from None


def describe(hint: Any) -> str:
    """A type in plain words: `a whole number`, `one of auto, cpu, cuda`, `2 numbers`."""
    options = _options(hint)
    if len(options) > 1:
        return " or ".join("None" if o is type(None) else describe(o) for o in options)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        count = "one or more" if items[-1] is Ellipsis else str(len(items))
        if typing.get_origin(items[0]) is Literal:
            return f"{count} of {', '.join(map(str, typing.get_args(items[0])))}"
        things = {int: "whole numbers", str: "names"}.get(items[0], "numbers")
        return f"{count} {things}"
    words = {int: "a whole number", float: "a number", str: "a value", bool: "no value"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _input_error(error: BaseException | None) -> InputError | None:
    """The refusal of a config class behind tyro's exit."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def _one_line(box: str) -> str:
    words = "".join(" " if c in "╭╮╰╯─│\n" else c for c in box).split()
    return " ".join(words)


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Around writes to stdout: a reader that left, as `| head -1` does, is no error."""
    try:
        yield
    except OSError as error:
        # Python would write the rest again at exit, and fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise
