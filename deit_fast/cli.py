"""The command line: ``deit-fast VERB``, the same as ``python -m deit_fast VERB``.

A verb is a function that returns its text for stdout. Its imports are inside it, so that help and
errors need no torch. Wrong input is one line on stderr and exit status 2. A failed check, a loss
that is not finite and exhausted memory are status 1; units of work in quarantine 3; a run that
SIGTERM ended 75, an interrupt 130. Any other exception is a bug and shows its traceback.
"""

from __future__ import annotations

import errno
import inspect
import io
import json
import logging
import os
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from deit_fast import api, cache_verbs, dry_runs, predict_verb
from deit_fast.arguments import (
    HELP,
    PrecomputeArguments,
    TrainArguments,
    columns,
    number_range,
    parse,
    plain,
    quiet_pipe,
    read_settings,
)
from deit_fast.config import (
    Count,
    CountOrZero,
    DataConfig,
    Deviation,
    RunConfig,
    Seed,
    Share,
    Workers,
)
from deit_fast.config_file import by_dotted_key, to_dict
from deit_fast.errors import CheckFailed, InputError, Quarantined, did_you_mean, printable
from deit_fast.inputs import (
    require_data_root,
    require_images,
    require_run,
    require_teacher,
    why_download,
    with_local_output,
)
from deit_fast.recipes import RECIPES, find_recipe
from deit_fast.runtime.distributed import read_process_group
from deit_fast.runtime.files import require_writable
from deit_fast.runtime.signals import Preempted
from deit_fast.runtime.weights_header import WeightsChoice, split_key
from deit_fast.students import for_each, read_students, require_agreement

# ---------------------------------------------------------------------------------------------
# Verbs
# ---------------------------------------------------------------------------------------------


def demo(
    *,
    output: Path = Path("runs/demo"),
    seeds: tuple[Seed, ...] = (0,),
    workers: Workers = 1,
    save: Path | None = None,
    save_analysis: Path | None = None,
) -> str:
    """Distil a small transformer on a CPU in minutes, and compare it with plain training.

    Args:
        output: Folder of data, runs and report; a second call resumes what it finds there.
        seeds: One teacher and three students are trained for each seed.
        workers: Decoding processes.
        save: Also write the accuracies of all seeds, with versions and command, to this JSON file.
        save_analysis: Likewise the analysis of all students: tokens, heads, disagreement,
            calibration.
    """
    from deit_fast.tools.demo import demo as run

    require_writable("--output", output)
    for flag, path in (("--save", save), ("--save-analysis", save_analysis)):
        if path is not None:
            require_writable(flag, path, is_folder=False)
    result = run(output, seeds=seeds, workers=workers, save=save, save_analysis=save_analysis)

    def accuracies(row: dict[str, float]) -> str:
        return "  ".join(f"{k} {100 * v:.2f} %" for k, v in row.items() if k != "seed")

    rows = [
        *((f"seed {row['seed']}", accuracies(row)) for row in result["rows"]),
        ("mean", accuracies(result["mean"])),
        ("gain", f"{result['gain']:+.2f} points by distillation"),
        *(("observed", line) for line in result["observed"]),
        ("report", result["report"]),
    ]
    return columns(rows)


def train(args: list[str]) -> str:
    """Train a student against a teacher, or against its cached logits."""
    arguments, config = read_settings(TrainArguments, "train", args)
    given = read_students(config, arguments.students) or [config]
    configs = [*map(with_local_output, given)]
    require_agreement(configs)
    if arguments.print_config:
        found = [to_dict(config) for config in configs]
        return json.dumps(found if arguments.students else found[0], indent=2)
    if arguments.dry_run:
        return "\n\n".join(for_each(configs, dry_runs.training))
    results = api.train_together(configs)
    texts = [summary({"run": str(result.path), **result.details}) for result in results]
    return "\n\n".join(texts)


def precompute(args: list[str]) -> str:
    """Write what a teacher gives of every augmented view, logits or features, into a cache."""
    arguments, config = read_settings(PrecomputeArguments, "precompute", args)
    views, blocks = (
        number_range(flag, text)
        for flag, text in (("--views", arguments.views), ("--blocks", arguments.blocks))
    )
    if views is not None and blocks is not None:
        raise InputError(
            f"--blocks {arguments.blocks} counts over all views: leave out --views "
            f"{arguments.views}"
        )
    if arguments.print_config:
        return json.dumps(to_dict(config), indent=2)
    if arguments.dry_run:
        return dry_runs.precomputing(config, views, arguments.bytes_per_image)
    if arguments.bytes_per_image is not None:
        raise InputError("--bytes-per-image proposes and writes nothing: add --dry-run")
    found = api.precompute(config, views=views, blocks=blocks).details
    text = summary({"cache": config.cache, **found})
    if found.get("quarantined"):
        from deit_fast.units import quarantine_text

        raise Quarantined(f"{text}\n{quarantine_text(found['quarantined'], str(config.cache))}")
    return text


def evaluate(
    run: str,
    /,
    *,
    data_root: str | None = None,
    batch_size: Count | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    weights: WeightsChoice = "last",
    model: str | None = None,
    late_fusion: Count | None = None,
) -> str:
    """Measure the accuracy of a finished run.

    Args:
        run: Folder of the run.
        data_root: Images to measure on, a folder of them or shards; none: the run's.
        batch_size: Images per step; none: the run's.
        device: `auto`: CUDA where available.
        weights: `last`, their moving average `ema`, or `best`, those of the best evaluation.
        model: The run's model, where it is `package.module:factory`: the file of a run does not
            decide which code is run.
        late_fusion: Also train classifiers on the sum and on the concatenation of both tokens'
            embeddings, on this many training images, evenly spaced; none: without.
    """
    result = api.evaluate(
        run, data_root=data_root, batch_size=batch_size, device=device, weights=weights,
        model=model, late_fusion=late_fusion,
    ).details  # fmt: skip
    for name, row in result.pop("late_fusion", {}).items():
        result |= {f"{name}_{key}": value for key, value in row.items()}
    return summary({"run": run, **result})


def analyze(
    runs: tuple[Path, ...],
    /,
    *,
    teacher: str | None = None,
    teacher_classes: str | None = None,
    teacher_mean: tuple[Share, Share, Share] | None = None,
    teacher_std: tuple[Deviation, Deviation, Deviation] | None = None,
    download: bool = False,
    data_root: str | None = None,
    weights: WeightsChoice = "last",
    model: str | None = None,
    max_images: Count | None = None,
    sample: CountOrZero | None = None,
    maps: CountOrZero = 4,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    output: Path | None = None,
    late_fusion: Count | None = None,
) -> str:
    """Analyse finished runs: tokens, heads, disagreement, calibration, attention, the teacher.

    Writes figures and pictures to RUN/analysis/, which `deit-fast report` shows. Runs on the same
    images are compared with each other; include the one without distillation.

    Args:
        runs: Folders of the runs.
        teacher: The runs' teacher with its weights; none: the one that each run names, if it is of
            timm.
        teacher_classes: File with a line for each output of the teacher, as for `precompute`.
        teacher_mean: Channel means that the teacher expects, as for `precompute`.
        teacher_std: Channel standard deviations that the teacher expects, as for `precompute`.
        download: Let timm fetch the weights of a teacher `timm:NAME` without a file.
        data_root: Images to measure on, a folder of them or shards; none: the runs'.
        weights: `last`, their moving average `ema`, or `best`, those of the best evaluation.
        model: The runs' model, where it is `package.module:factory`: the file of a run does not
            decide which code is run.
        max_images: Number of held-out images, evenly spaced; none: all.
        sample: ID of the held-out image whose softened teacher logits are shown; none: the one of
            which the teacher is least certain.
        maps: Number of images whose attention is drawn.
        device: `auto`: CUDA where available.
        output: JSON file to write as well, with the figures of all runs, versions and command.
        late_fusion: Also train classifiers on the sum and on the concatenation of both tokens'
            embeddings, on this many training images, evenly spaced; none: without.
    """
    _require_runs("analyze", runs)
    for run in runs:
        require_writable("the run's folder", run / "analysis")
    if output is not None:
        require_writable("--output", output, is_folder=False)
    for run in runs:
        require_run(run)
    if data_root is not None:
        require_data_root(data_root, "val")
    if teacher is not None:
        require_teacher(teacher)
        if not download and (reason := why_download(teacher)):
            raise InputError(reason)
    from deit_fast.runtime.run_names import short_names
    from deit_fast.tools.analysis.runs import analyze as measure
    from deit_fast.tools.analysis.table import render, write_summary

    results = measure(
        list(runs), teacher=teacher, teacher_classes=teacher_classes, teacher_mean=teacher_mean,
        teacher_std=teacher_std, download=download, data_root=data_root, weights=weights,
        max_images=max_images,
        sample=sample, maps=maps, device=device, models=[model] if model else [],
        late_fusion=late_fusion,
    )  # fmt: skip
    if output is not None:
        write_summary(results, output)
    text = render(results, short_names(runs), tty=sys.stdout.isatty())
    written = [*(run / "analysis" for run in runs), *([output] if output else [])]
    return f"{text}\nwrote {', '.join(map(str, written))}"


def _require_runs(verb: str, runs: tuple[Path, ...]) -> None:
    if not runs:
        raise InputError(f"{verb} needs the folder of a run; see `deit-fast {verb} --help`")


def pack(
    root: str,
    out: str,
    /,
    *,
    form: Literal["uint8", "jpeg"] = "uint8",
    short_side: int = 256,
    quality: int = 92,
    source: Literal["folder", "tar", "hf"] = "folder",
    workers: Workers | None = None,
) -> str:
    """Decode each image once and write shards that load without decoding.

    For hosts whose CPU cores are too slow to decode. `--data.source packed --data.root OUT` reads
    the shards. After an interruption the same command resumes.

    Args:
        root: Folder of images, tar shards or Hugging Face files, with both splits.
        out: Folder to write. ImageNet takes about 330 GB as uint8, 40 GB as jpeg.
        form: `uint8`: pixels. `jpeg`: smaller, but must still be decoded.
        short_side: Larger images are reduced to this shorter side, in pixels.
        quality: JPEG quality, 1 to 100.
        source: What `root` holds.
        workers: Number of processes; none: one less than there are cores, between 1 and 4.
    """
    require_writable("OUT", out)
    if os.path.realpath(root) == os.path.realpath(out):
        raise InputError(f"OUT {out} is ROOT itself: name a folder of its own for the shards")
    require_images(DataConfig(root=root, source=source), ("train", "val"))
    from deit_fast.tools.pack import pack as write

    data = DataConfig(root=root, source=source, workers=workers)
    result = write(data, out, form=form, short_side=short_side, quality=quality)
    unreadable = len(result.pop("unreadable"))
    return summary({**result, "unreadable": unreadable})


def report(
    runs: tuple[Path, ...],
    /,
    *,
    output: Path | None = None,
    title: str = "deit_fast runs",
    pictures: bool = True,
) -> str:
    """Write one self-contained HTML page about one or more runs.

    Runs that differ by their seeds alone are shown by their mean.

    Args:
        runs: Folders of the runs.
        output: File to write. None: report.html, in the folder of a single run, else here.
        title: Heading of the page.
        pictures: Show images of the data set; leave them out where they are private.
    """
    _require_runs("report", runs)
    if output is not None:
        require_writable("--output", output, is_folder=False)
    for run in runs:
        require_run(run)
    from deit_fast.tools.report.page import default_page, write_report

    output = default_page(runs) if output is None else output
    require_writable("--output", output, is_folder=False)
    write_report(runs, output, title, pictures)
    return f"wrote {output}"


def export(
    run: str,
    /,
    *,
    format: Literal["timm", "onnx", "torch", "hf"],
    output: Path | None = None,
    weights: WeightsChoice = "last",
    model: str | None = None,
    license: str | None = None,
) -> str:
    """Write a student for timm, ONNX Runtime, torch.export or the Hugging Face Hub.

    The logits of the exported student are compared with those of the run's model on held-out
    images. Nothing is uploaded, and no existing output is replaced.

    Args:
        run: Folder of the run, or a weights file of one.
        format: `timm`: a state dict as safetensors. `onnx`: one ONNX file. `torch`: a program of
            torch.export. `hf`: a folder with weights, config.json and model card.
        output: File to write, or folder of `hf`; none: in RUN/export/.
        weights: Which weights of the run: the last, their moving average, or the best.
        model: The run's model, where it is `package.module:factory`: a file does not decide which
            code is run.
        license: Licence that the model card of `hf` names, such as `mit`; none: it names none.
    """
    if not split_key(run)[0].is_file():
        require_run(run)
    from deit_fast.tools.export.exporting import export as write

    result = write(
        run, format=format, output=output, weights=weights, model=model, license=license
    )  # fmt: skip
    rows = [("wrote", f"{result.path}"), ("figures", f"{result.figures}"),
            ("compared", f"{result.parity}"), ("load", result.load)]  # fmt: skip
    return columns(rows)


def doctor(
    *, output: Path = Path("runs"), workers: Workers | None = None, report: bool = False
) -> str:
    """Check this machine: what it has, what is slow on it, and what to do about it.

    Args:
        output: Folder of the runs, whose disk is measured.
        workers: Number of decoding processes, for which shared memory must suffice; none: as for a
            run, by the cores.
        report: Write deit-fast-report.txt instead, for a bug report: this, versions, the newest
            run's settings and last log rows. Variables that may hold a secret are left out.
    """
    from deit_fast.runtime.files import write_atomically
    from deit_fast.runtime.pipeline_time import loading_processes
    from deit_fast.tools.doctor import bug_report, examine, has_problem, render

    path = Path("deit-fast-report.txt")
    if report:
        require_writable("the report", path, is_folder=False)
    findings = examine(output, loading_processes(workers))
    if report:
        text = bug_report(findings, output, os.environ)
        write_atomically(path, text.encode(errors="backslashreplace"))
        return f"wrote {path}; read it before you send it"
    text = render(findings, tty=sys.stdout.isatty())
    if has_problem(findings):
        raise CheckFailed(text)
    return text


def recipes_list() -> str:
    """List the named run configurations."""
    docs = {name: inspect.getdoc(function) or "" for name, function in RECIPES.items()}
    return columns([(name, doc.partition("\n")[0]) for name, doc in docs.items()])


def recipes_show(name: str, /) -> str:
    """Show a recipe: its command, time, accuracy, and the settings that it changes.

    Args:
        name: Name of the recipe.
    """
    function = find_recipe(name)
    default = by_dotted_key(to_dict(RunConfig()))
    settings = by_dotted_key(to_dict(function()))
    rows = [(key, plain(value)) for key, value in settings.items() if value != default[key]]
    text = (
        f"{name}\n\n{inspect.getdoc(function) or ''}\n\nSettings that differ from the defaults:\n"
    )
    return text + columns(rows, indent="  ")


def completion(shell: Literal["bash", "zsh", "fish"], /) -> str:
    """Print a script that completes verbs, flags and their values in a shell.

    For bash put `eval "$(deit-fast completion bash)"` into ~/.bashrc.

    Args:
        shell: The shell that reads the script.
    """
    from deit_fast.completion import Verb, script
    from deit_fast.flags import function_flags, settings_flags

    verbs = {}
    for name, function in VERBS.items():
        if name in _READ_THEIR_ARGUMENTS:
            flags = settings_flags(_READ_THEIR_ARGUMENTS[name])
            verbs[name] = Verb(_purpose(name), tuple(flags))
            continue
        positional, flags = function_flags(function)
        values = positional[0].choices if positional else ()
        if name == "recipes show":
            values = tuple(RECIPES)
        verbs[name] = Verb(_purpose(name), tuple(flags), values)
    return script(shell, verbs)


VERBS: dict[str, Callable[..., str]] = {
    "demo": demo,
    "pack": pack,
    "train": train,
    "precompute": precompute,
    "evaluate": evaluate,
    "predict": predict_verb.predict,
    "analyze": analyze,
    "report": report,
    "export": export,
    "cache info": cache_verbs.info,
    "cache verify": cache_verbs.verify,
    "cache export": cache_verbs.export,
    "cache copy": cache_verbs.copy,
    "cache plan": cache_verbs.plan,
    "doctor": doctor,
    "recipes list": recipes_list,
    "recipes show": recipes_show,
    "completion": completion,
}
_READ_THEIR_ARGUMENTS: dict[str, type] = {
    "train": TrainArguments,
    "precompute": PrecomputeArguments,
}

# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------


def overview(group: str = "") -> str:
    """The text of `deit-fast --help`, or of `deit-fast GROUP --help`."""
    rows = [(verb, _purpose(verb)) for verb in VERBS if verb.startswith(group)]
    return (
        f"usage: deit-fast {group}VERB ...\n\n"
        "Distillation engine for vision transformers.\n\n"
        f"{columns(rows, indent='  ')}\n\n"
        "`deit-fast VERB --help` lists a verb's flags, `deit-fast --version` the version.\n"
        'Tab completion: eval "$(deit-fast completion bash)", or zsh; fish: ... | source\n'
        "Several GPUs: torchrun --nproc-per-node N -m deit_fast VERB ..."
    )


def summary(result: dict[str, Any]) -> str:
    """The plain values of a verb's result, one a line; accuracies in percent."""
    rows = []
    for key, value in result.items():
        if key == "substituted" and isinstance(value, list):
            value = len(value)
        if isinstance(value, float):
            value = (
                f"{100 * value:.2f} %"
                if "top1" in key or key in ("top5", "teacher_agreement")
                else f"{value:.4g}"
            )
        if isinstance(value, (str, int)):
            rows.append((key.replace("_", " "), str(value)))
    return columns(rows)


def _purpose(verb: str) -> str:
    return (inspect.getdoc(VERBS[verb]) or "").partition("\n")[0]


# ---------------------------------------------------------------------------------------------
# Entry
# ---------------------------------------------------------------------------------------------


_KEPT = {  # what is on the disk when a verb is interrupted
    "precompute": "; complete blocks are kept, the same command makes the others",
    "pack": "; complete shards are kept, the same command writes the others",
}


def main(argv: list[str] | None = None, run: Callable[[list[str]], str] | None = None) -> int:
    """Run a verb; the exit status.

    Args:
        argv: its words; None: those of the process.
        run: takes the words in place of a verb, and returns the text for stdout.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a locale lacks is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    _log_to_stderr()
    try:
        try:
            text, status = (run or _dispatch)(words), 0
        except CheckFailed as failed:
            text, status = str(failed), 1
        except Quarantined as failed:
            text, status = str(failed), 3
        if _rank() == 0 and text:
            with quiet_pipe():
                print(_for_terminal(text), flush=True)
        return status
    except InputError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(_os_message(error))
    except (FloatingPointError, MemoryError) as error:
        return _fail(str(error) or "out of memory", status=1)
    except Preempted as error:
        return _fail(str(error), status=error.status)
    except KeyboardInterrupt:
        kept = "" if not words or "--dry-run" in words else _KEPT.get(words[0], "")
        print(f"deit-fast: interrupted{kept}", file=sys.stderr)
        return 130


def _open_closed_streams() -> None:
    """A closed output (`>&-`) becomes /dev/null: else the next file would get its descriptor."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is this one
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


class _LogFormat(logging.Formatter):
    """Prefixes warnings and errors with their level; escapes what would control a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        line = "\n".join(map(printable, super().format(record).split("\n")))
        return line if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {line}"


class _StderrHandler(logging.StreamHandler[typing.TextIO]):
    """Writes to the stderr of the moment: a bar replaces it, to show lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _for_terminal(text: str) -> str:
    """A verb's text, whose only control characters are colours on a terminal and line feeds."""
    parts = re.split("(\n|\x1b\\[[0-9;]*m)" if sys.stdout.isatty() else "(\n)", text)
    return "".join(part if i % 2 else printable(part) for i, part in enumerate(parts))


def _log_to_stderr() -> None:
    handler = _StderrHandler()
    handler.setFormatter(_LogFormat())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # The other ranks would repeat the same lines.
    logging.getLogger("deit_fast").setLevel(logging.WARNING if _rank() else logging.INFO)


def _dispatch(words: list[str]) -> str:
    """Find the verb, of one or two words, and run it with the rest."""
    if not words or words[0] in (*HELP, "help"):
        return overview()
    if words[0] == "--version":
        from deit_fast.runtime.environment import package_version

        version = package_version("deit-fast")
        return f"deit-fast {version or '(not installed, run from its source folder)'}"
    for length in (2, 1):
        verb, args = " ".join(words[:length]), words[length:]
        if verb in _READ_THEIR_ARGUMENTS:
            return VERBS[verb](args)
        if verb in VERBS:
            return typing.cast(str, parse(VERBS[verb], verb, args)())
    members = [verb for verb in VERBS if verb.startswith(f"{words[0]} ")]
    if not members:
        hint = did_you_mean(words[0], {verb.split()[0] for verb in VERBS})
        raise InputError(f"unknown verb {words[0]!r}{hint}; see `deit-fast --help`")
    if len(words) == 1:
        raise InputError(f"{words[0]} needs a verb: one of {', '.join(members)}")
    if words[1] in HELP:
        return overview(f"{words[0]} ")
    given = " ".join(words[:2])
    hint = did_you_mean(given, members)
    raise InputError(f"unknown verb {given!r}{hint}; see `deit-fast {words[0]} --help`")


def _rank() -> int:
    """Rank of this process under torchrun; only the first prints results."""
    try:
        return read_process_group().rank
    except InputError:  # the verb itself reports it
        return 0


def _fail(message: str, status: int = 2) -> int:
    line = printable(" ".join(message.splitlines()))
    rank = f"rank {_rank()}: " if _rank() else ""
    print(f"deit-fast: error: {rank}{line}", file=sys.stderr)
    return status


_REMEDIES = {  # by error number
    errno.ENOSPC: "no space left to write; free some, or choose a folder on another disk",
    errno.EDQUOT: "no space left to write; free some, or choose a folder on another disk",
    errno.EMFILE: "too many open files in a process: raise the limit, `ulimit -n 65536`",
    errno.ENFILE: "too many open files on this machine: raise the limit, `sysctl fs.file-max`",
    errno.ENOMEM: "out of memory: try fewer data.workers, or end other processes",
    errno.EIO: "input/output error: the disk or the mount fails; see the system's log",
    errno.ESTALE: "stale file handle: mount the file system again",
    errno.ETIMEDOUT: "the file system's server does not answer: mount it again",
    errno.ENOTCONN: "the file system's server is gone: mount it again",
}


def _os_message(error: OSError) -> str:
    what = error.strerror or str(error) or type(error).__name__
    if error.errno in _REMEDIES and what.startswith(os.strerror(error.errno)):
        what = _REMEDIES[error.errno]
    return what if error.filename is None else f"{os.fsdecode(error.filename)}: {what}"
