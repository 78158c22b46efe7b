"""The command line: ``deit-fast VERB``, the same as ``python -m deit_fast VERB``.

A verb is a function of its raw arguments that returns the text for stdout; what it needs is
imported inside it, so that help and errors answer without torch. Wrong input is one line on stderr
and exit status 2, a loss that is not finite and memory that ran out one line and 1, a run that
SIGTERM ended 75, an interrupt 130; any other exception is a bug and shows its traceback.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import inspect
import json
import logging
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deit_fast import cache_verbs
from deit_fast.arguments import HELP, parse, quiet_pipe
from deit_fast.config import RunConfig
from deit_fast.config_file import dotted_keys, load_config, to_dict
from deit_fast.errors import InputError, did_you_mean
from deit_fast.outcome import Outcome, columns, plain, size_text, view_range
from deit_fast.runtime.signals import EXIT_STATUS, Preempted

# ---------------------------------------------------------------------------------------------
# Arguments of the verbs
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainArguments(RunConfig):
    """Train a student against a teacher, or against its cached logits.

    Settings come from --recipe, then --config, then the flags: the command line wins.
    """

    recipe: str = "custom"
    """Start from this recipe; `deit-fast recipes list` names them."""
    config: str | None = None
    """Start from this JSON file, such as the config.json that every run writes."""
    print_config: bool = False
    """Print the resolved settings as JSON, ready for --config, and exit."""


@dataclass(frozen=True, kw_only=True)
class PrecomputeArguments(TrainArguments):
    """Write a teacher's answers about every augmented view into a cache.

    Settings come from --recipe, then --config, then the flags: the command line wins.
    """

    views: str | None = None
    """Only the views A to B-1, written A:B; none: all views that the run needs."""
    dry_run: bool = False
    """Print bytes, blocks and time, measured on one batch, and write nothing."""


Arguments = typing.TypeVar("Arguments", bound=TrainArguments)


def _run_arguments(cls: type[Arguments], verb: str, args: list[str]) -> Arguments:
    """Recipe, then config file, then flags."""
    base = RunConfig()
    if name := _flag_value(args, "recipe"):
        base = _recipe(name)()
    if path := _flag_value(args, "config"):
        base = load_config(path, base)
    return parse(cls, verb, args, default=cls(**_fields(base)))


def _fields(config: RunConfig) -> dict[str, Any]:
    return {item.name: getattr(config, item.name) for item in dataclasses.fields(RunConfig)}


def _flag_value(args: list[str], name: str) -> str | None:
    value = None
    for index, token in enumerate(args):
        if token.startswith(f"--{name}="):
            value = token.partition("=")[2]
        elif token == f"--{name}" and index + 1 < len(args):
            value = args[index + 1]
    return value


def _recipe(name: str) -> Callable[[], RunConfig]:
    from deit_fast.recipes import RECIPES

    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES)
        raise InputError(f"unknown recipe {name!r}{hint}; see `deit-fast recipes list`")
    return RECIPES[name]


# ---------------------------------------------------------------------------------------------
# Verbs
# ---------------------------------------------------------------------------------------------

Verb = Callable[[list[str]], Outcome]


def _typed(verb: str) -> Callable[[Callable[..., Outcome]], Verb]:
    """Turn a typed function into a verb; positional-only parameters are positional arguments."""

    def wrap(function: Callable[..., Outcome]) -> Verb:
        @functools.wraps(function)
        def call(args: list[str]) -> Outcome:
            return typing.cast(Outcome, parse(function, verb, args)())

        return call

    return wrap


def demo(args: list[str]) -> Outcome:
    """Distil a small transformer on a CPU in minutes, and compare it with plain training."""
    from deit_fast.tools.demo import DemoConfig
    from deit_fast.tools.demo import demo as run

    config = parse(DemoConfig, "demo", args, default=DemoConfig(), description=demo.__doc__)
    result = run(config)
    rows = [
        (
            f"seed {row['seed']}",
            "  ".join(f"{k} {100 * v:.2f} %" for k, v in row.items() if k != "seed"),
        )
        for row in result["rows"]
    ]
    means = "  ".join(f"{name} {100 * value:.2f} %" for name, value in result["mean"].items())
    rows += [
        ("mean", means),
        ("gain", f"{result['gain']:+.2f} points by distillation"),
        *(("observed", line) for line in result["observed"]),
        ("report", str(result["report"])),
    ]
    return Outcome(columns(rows))


def train(args: list[str]) -> Outcome:
    """Train a student against a teacher, or against its cached logits."""
    arguments = _run_arguments(TrainArguments, "train", args)
    config = RunConfig(**_fields(arguments))
    if arguments.print_config:
        return Outcome(json.dumps(to_dict(config), indent=2))
    from deit_fast.train.loop import train as run

    return Outcome(summary({"run": config.output, **run(config)}))


def precompute(args: list[str]) -> Outcome:
    """Write a teacher's answers about every augmented view into a cache."""
    arguments = _run_arguments(PrecomputeArguments, "precompute", args)
    config = RunConfig(**_fields(arguments))
    views = view_range(arguments.views)
    if arguments.print_config:
        return Outcome(json.dumps(to_dict(config), indent=2))
    if arguments.dry_run:
        return _dry_run(config, views)
    from deit_fast.precompute import precompute as run

    return Outcome(summary({"cache": config.cache, **run(config, views)}))


def _dry_run(config: RunConfig, views: range | None) -> Outcome:
    from deit_fast.precompute import duration, estimate

    found = estimate(config, views)
    speed = f"{found['images_per_s']:.0f} img/s a process, {found['processes']} of them"
    rows = [
        ("cache", str(config.cache)),
        ("views", str(found["views"])),
        ("blocks", f"{found['blocks']} to write, {found['kept']} there"),
        ("images", str(found["images"])),
        ("bytes", f"{found['bytes']} ({size_text(found['bytes'])}) of new files, "
                  f"{size_text(found['free'])} free"),
        ("time", f"{duration(found['seconds'])} at {speed}"),
        ("measured", f"one batch of {found['batch']} views: loading "
                     f"{found['loader_seconds']:.3g} s (shared by {config.data.workers} workers), "
                     f"teacher {found['teacher_seconds']:.3g} s"),
    ]  # fmt: skip
    return Outcome(columns(rows))


@_typed("evaluate")
def evaluate(
    run: str,
    /,
    *,
    data_root: str | None = None,
    batch_size: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    ema: bool = False,
) -> Outcome:
    """Measure the accuracy of a finished run.

    Args:
        run: Folder of the run.
        data_root: Image folder to measure on; none: the run's own.
        batch_size: Images per step; none: the run's own.
        device: `auto`: CUDA where there is one.
        ema: Use the moving average of the weights.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, not {batch_size}")
    from deit_fast.evaluate import evaluate as measure

    result = measure(run, data_root=data_root, batch_size=batch_size, device=device, ema=ema)
    return Outcome(summary({"run": run, **result}))


@_typed("analyze")
def analyze(
    runs: tuple[str, ...],
    /,
    *,
    teacher: str | None = None,
    data_root: str | None = None,
    ema: bool = False,
    max_images: int | None = None,
    sample: int | None = None,
    maps: int = 4,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: str | None = None,
) -> Outcome:
    """Look into finished runs: tokens, heads, disagreement, calibration, attention, the teacher.

    Writes RUN/analysis/ with figures and pictures, which `deit-fast report` shows. Runs on the
    same images are compared; give the one without distillation too.

    Args:
        runs: Folders of the runs.
        teacher: The runs' teacher, with its weights; none: as each run names it.
        data_root: Image folder to measure on; none: the runs' own.
        ema: Use the moving average of the weights.
        max_images: Take so many held-out images, evenly spaced; none: all.
        sample: Id of a held-out image to show softened; none: the teacher's least certain.
        maps: Images to draw attention of.
        device: `auto`: CUDA where there is one.
        out: Also write the figures of all runs, with versions and command, to this JSON file.
    """
    for flag, value, least in (("max-images", max_images, 1), ("maps", maps, 0)):
        if value is not None and value < least:
            raise InputError(f"--{flag} must be at least {least}, not {value}")
    from deit_fast.tools.analysis.runs import analyze as measure
    from deit_fast.tools.analysis.summary import write_summary
    from deit_fast.tools.analysis.table import render
    from deit_fast.tools.run_folder import short_names

    paths = [Path(run) for run in runs]
    results = measure(
        paths, teacher=teacher, data_root=data_root, ema=ema, max_images=max_images,
        sample=sample, maps=maps, device=device,
    )  # fmt: skip
    if out is not None:
        write_summary(results, Path(out))
    text = render(results, short_names(paths), tty=sys.stdout.isatty())
    written = [*(f"{path}/analysis" for path in paths), *([out] if out else [])]
    return Outcome(f"{text}\nwrote {', '.join(written)}")


@_typed("pack")
def pack(
    root: str,
    out: str,
    /,
    *,
    form: Literal["uint8", "jpeg"] = "uint8",
    short_side: int = 256,
    quality: int = 92,
    source: Literal["folder", "tar"] = "folder",
    train: str = "train",
    val: str = "val",
    workers: int = 4,
) -> Outcome:
    """Decode each image once and write shards that load without decoding.

    For hosts whose cores cannot keep up. `--data.source packed --data.root OUT` reads them. The
    same command goes on after an interruption.

    Args:
        root: Image folder or tar shards with both splits.
        out: Folder to write; uint8 images of ImageNet take about 330 GB, jpeg 40 GB.
        form: `uint8`: pixels. `jpeg`: smaller, and still to be decoded.
        short_side: Images are reduced to this shorter side, pixels; smaller ones stay.
        quality: Of jpeg, 1 to 100.
        source: What `root` holds.
        train: Name of the training split's folder.
        val: Name of the held-out split's folder.
        workers: Processes.
    """
    from deit_fast.config import DataConfig
    from deit_fast.tools.pack import pack as write

    data = DataConfig(root=root, source=source, train=train, val=val, workers=workers)
    result = write(data, out, form=form, short_side=short_side, quality=quality)
    unreadable = len(result.pop("unreadable"))
    return Outcome(summary({**result, "unreadable": unreadable}))


@_typed("report")
def report(
    runs: tuple[str, ...], /, *, out: str = "report.html", title: str = "deit_fast runs"
) -> Outcome:
    """Write one self-contained HTML page about one or more runs.

    Args:
        runs: Folders of the runs.
        out: File to write.
        title: Heading of the page.
    """
    from deit_fast.tools.report.page import write_report

    write_report([Path(run) for run in runs], Path(out), title)
    return Outcome(f"wrote {out}")


@_typed("doctor")
def doctor(*, output: str = "runs", workers: int = 4, report: bool = False) -> Outcome:
    """Say what this machine has, what is slow on it, and what to do about it.

    Args:
        output: Where runs are written; its disk is measured.
        workers: Decoding processes to plan shared memory for.
        report: Write deit-fast-report.txt instead, for a bug report: this, versions, the newest
            run's configuration and last log rows. Variables that may hold a secret are left out.
    """
    from deit_fast.tools.doctor import examine, has_problem, render

    findings = examine(Path(output), workers)
    if report:
        from deit_fast.tools.bug_report import write_report

        path = Path("deit-fast-report.txt")
        write_report(findings, Path(output), path)
        return Outcome(f"wrote {path}; read it before you send it")
    return Outcome(render(findings, tty=sys.stdout.isatty()), int(has_problem(findings)))


@_typed("recipes list")
def recipes_list() -> Outcome:
    """List the named run configurations."""
    from deit_fast.recipes import RECIPES

    rows = [(name, _first_line(function)) for name, function in RECIPES.items()]
    return Outcome(columns(rows))


@_typed("recipes show")
def recipes_show(name: str, /) -> Outcome:
    """Show a recipe: its command, time and accuracy, and the settings that it changes.

    Args:
        name: Name of the recipe.
    """
    function = _recipe(name)
    config, default = function(), RunConfig()
    rows = [
        (key, plain(_lookup(config, key)))
        for key in dotted_keys()
        if _lookup(config, key) != _lookup(default, key)
    ]
    text = (
        f"{name}\n\n{inspect.getdoc(function) or ''}\n\nSettings that differ from the defaults:\n"
    )
    return Outcome(text + columns(rows, indent="  "))


VERBS: dict[str, Verb] = {
    "demo": demo,
    "pack": pack,
    "train": train,
    "precompute": precompute,
    "evaluate": evaluate,
    "analyze": analyze,
    "report": report,
    "cache info": _typed("cache info")(cache_verbs.info),
    "cache verify": _typed("cache verify")(cache_verbs.verify),
    "cache export": _typed("cache export")(cache_verbs.export),
    "cache import-tinyvit": _typed("cache import-tinyvit")(cache_verbs.import_tinyvit),
    "doctor": doctor,
    "recipes list": recipes_list,
    "recipes show": recipes_show,
}

# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------


def overview() -> str:
    """The answer to `deit-fast --help`."""
    rows = [(verb, _first_line(function)) for verb, function in VERBS.items()]
    return (
        "usage: deit-fast VERB ...\n\n"
        "Distillation engine for vision transformers.\n\n"
        f"{columns(rows, indent='  ')}\n\n"
        "`deit-fast VERB --help` lists a verb's flags, `deit-fast --version` the version.\n"
        "Several GPUs: torchrun --nproc-per-node N -m deit_fast VERB ..."
    )


def summary(result: dict[str, Any]) -> str:
    """The plain values of a verb's result, one a line; accuracies in percent."""
    rows = []
    for key, value in result.items():
        if key == "substituted" and isinstance(value, list):
            value = len(value)
        if isinstance(value, float):
            value = f"{100 * value:.2f} %" if "top1" in key else f"{value:.4g}"
        if isinstance(value, (str, int)):
            rows.append((key.replace("_", " "), str(value)))
    return columns(rows)


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _lookup(config: Any, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def version() -> str:
    """Version of the installed package."""
    from importlib import metadata

    try:
        return metadata.version("deit-fast")
    except metadata.PackageNotFoundError:
        return "(not installed, run from its source folder)"


# ---------------------------------------------------------------------------------------------
# Entry
# ---------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run a verb; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    _log_to_stderr()
    try:
        outcome = _dispatch(words)
        if _rank() == 0:
            with quiet_pipe():
                print(outcome.text, flush=True)
        return outcome.status
    except InputError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(_os_message(error))
    except (FloatingPointError, MemoryError) as error:
        return _fail(str(error) or "out of memory", status=1)
    except Preempted as error:
        return _fail(str(error), status=EXIT_STATUS)
    except KeyboardInterrupt:
        print("deit-fast: interrupted", file=sys.stderr)
        return 130


class _LogFormat(logging.Formatter):
    """Information as it is; warnings and errors say so."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return line if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {line}"


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LogFormat())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # the other ranks would say the same again
    logging.getLogger("deit_fast").setLevel(logging.WARNING if _rank() else logging.INFO)


def _dispatch(words: list[str]) -> Outcome:
    if not words or words[0] in HELP:
        return Outcome(overview())
    if words[0] == "--version":
        return Outcome(f"deit-fast {version()}")
    groups = {verb.split()[0] for verb in VERBS if " " in verb}
    if words[0] in groups:
        return _dispatch_group(words[0], words[1:])
    if words[0] not in VERBS:
        known = [verb for verb in VERBS if " " not in verb] + sorted(groups)
        hint = did_you_mean(words[0], known)
        raise InputError(f"unknown verb {words[0]!r}{hint}; see `deit-fast --help`")
    return VERBS[words[0]](words[1:])


def _dispatch_group(group: str, words: list[str]) -> Outcome:
    members = [verb.split()[1] for verb in VERBS if verb.startswith(f"{group} ")]
    if words and words[0] in members:
        return VERBS[f"{group} {words[0]}"](words[1:])
    if words and words[0] in HELP:
        rows = [(f"{group} {name}", _first_line(VERBS[f"{group} {name}"])) for name in members]
        return Outcome(f"usage: deit-fast {group} VERB ...\n\n{columns(rows, indent='  ')}")
    choices = " or ".join(f"`deit-fast {group} {name}`" for name in members)
    if not words:
        raise InputError(f"{group} needs a verb: {choices}")
    hint = did_you_mean(words[0], members)
    raise InputError(f"unknown verb '{group} {words[0]}'{hint}; there is {choices}")


def _rank() -> int:
    """Rank of this process under torchrun; only the first prints results."""
    return int(os.environ.get("RANK", "0"))


def _fail(message: str, status: int = 2) -> int:
    line = " ".join(message.splitlines())
    rank = f"rank {_rank()}: " if _rank() else ""
    print(f"deit-fast: error: {rank}{line}", file=sys.stderr)
    return status


def _os_message(error: OSError) -> str:
    what = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "no space left to write; free some, or choose a folder on another disk"
    return what if error.filename is None else f"{os.fsdecode(error.filename)}: {what}"
