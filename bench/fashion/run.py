"""python -m bench fashion run [--work FOLDER] [--results FOLDER] [--only TEXT] [--limit N]
python -m bench fashion page [--results FOLDER] [--out FILE] [--plots docs/plots] [--tables ...]
python -m bench fashion plan

`run` works through the protocol in order of importance: data, teachers, caches when an arm needs
them, students. The seeds of an arm are trained in one pass. It can be stopped at any time; the same
command resumes it. Each student leaves one JSON file in the results folder. `page` makes the tables
of them and fails if a run is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.fashion import protocol
from bench.fashion.data import write_data
from bench.fashion.protocol import CACHES, EPOCHS, TEACHERS, TUNINGS, VIEWS, Arm, arms
from bench.record import to_text
from deit_fast.tools.demo import write_digits

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "fashion"
WORK = Path("build/fashion")


class NotYet(Exception):
    """A run needs a setting that this version does not have, or a run before it."""


def digest_of(arm: Arm) -> str:
    """Digest of all that the protocol says of an arm: a result of other settings is not its own."""
    parts = (
        dataclasses.asdict(arm), *_bases(arm.data), TEACHERS,
        [dataclasses.asdict(CACHES[name]) for name in arm.caches],
        EPOCHS[arm.data], protocol.REUSE_IMAGES,
    )  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _bases(data: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of student and teacher for a data set."""
    if data == "digits":
        return protocol.DIGITS_STUDENT, protocol.DIGITS_TEACHER
    return protocol.STUDENT, protocol.TEACHER


def result_path(results: Path, arm: Arm, seed: int) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{arm.data} {arm.name}")
    return results / f"{name.lower()}-seed-{seed}.json"


def read_result(results: Path, arm: Arm, seed: int) -> dict[str, Any] | None:
    """The result of a run; None where there is none.

    Raises:
        SystemExit: the file is of another protocol.
    """
    path = result_path(results, arm, seed)
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    if found["protocol"] != digest_of(arm):
        raise SystemExit(f"{path} is of another protocol: remove it, and state why in README.md")
    return found


def tuned(results: Path, kind: str) -> float:
    """The value with the highest top-1 on the images for selection; of equal ones the lowest.

    Raises:
        NotYet: not all have been tried.
    """
    found = {}
    for value in TUNINGS[kind]:
        arm = next(a for a in arms() if a.data == "select" and a.name == f"{kind} {value:g}")
        result = read_result(results, arm, protocol.TUNING_SEED)
        if result is None:
            raise NotYet(f"the weight of {kind} is not chosen yet")
        found[value] = result["top1"]
    return min(found, key=lambda value: (-found[value], value))


def merged(base: dict[str, Any], *more: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries as one; later values win."""
    result = dict(base)
    for values in more:
        for key, value in values.items():
            inner = result.get(key)
            is_group = isinstance(value, dict) and isinstance(inner, dict)
            result[key] = merged(inner, value) if is_group else value  # type: ignore[arg-type]
    return result


def require_settings(settings: dict[str, Any]) -> None:
    """Raises NotYet where this version lacks a setting or one of its values."""
    from deit_fast.config_file import from_dict
    from deit_fast.errors import InputError
    from deit_fast.recipes import digits_student

    try:
        from_dict(digits_student(), settings)
    except InputError as error:
        raise NotYet(str(error)) from None


class Bench:
    """The queue: what is there is kept, what is missing is made."""

    def __init__(self, work: Path, results: Path) -> None:
        self.work, self.results = work, results
        results.mkdir(parents=True, exist_ok=True)

    def data(self, name: str) -> dict[str, Any]:
        if name == "digits":
            return {"root": str(self.work / "data" / name), "workers": 1}
        return {"source": "packed", "root": str(self.work / "data" / name), "workers": 1}

    def teacher(self, name: str, data: str) -> str:
        """Weights of a teacher, trained on the 50,000 images or on the digits."""
        import deit_fast

        factory, seed = TEACHERS[name]
        is_digits = data == "digits"
        label, images = (f"digits-{name}", data) if is_digits else (name, "test")
        output = self.work / f"teacher-{label}"
        weights = output / "model.safetensors"
        if not weights.exists():
            started = time.process_time()
            result = deit_fast.train(
                recipe="digits_teacher", data=self.data(images), output=output, seed=seed,
                **merged(_bases(data)[1], {
                    "model": {"name": f"bench.fashion.teacher:{factory}"}, "device": "cpu",
                    "eval_every": 100, "save_every": 1, "log_every": 50,
                }),
            )  # fmt: skip
            self._write(f"teacher-{label}.json", {
                "top1": result.top1, "nll": result.details["loss"], "seed": seed,
                "cpu_seconds": round(time.process_time() - started, 1),
                "environment": result.details["environment"],
            })  # fmt: skip
        return str(weights)

    def cache(self, name: str, data: str) -> Path:
        """The folder of a cache, complete."""
        import deit_fast

        cache = CACHES[name]
        base = _bases(data)[0]
        require_settings(merged(base, cache.settings))
        images = data if data in ("reuse", "digits") else "whole"
        folder = self.work / f"cache-{images}-{name}"
        done = folder.with_suffix(".done")
        if not done.exists():
            kind = TEACHERS[cache.teacher][0] + ("_features" if cache.folder else "")
            deit_fast.precompute(
                recipe="digits_student", data=self.data(data), cache=folder, device="cpu",
                teacher=f"bench.fashion.teacher:{kind}@{self.teacher(cache.teacher, data)}",
                epochs=EPOCHS[data], num_views=VIEWS[data],
                **merged(base, cache.settings),
            )  # fmt: skip
            done.touch()
        return folder / cache.folder

    def settings(self, arm: Arm, seed: int) -> dict[str, Any]:
        """All settings of a run but its caches.

        Raises:
            NotYet: a weight is not chosen, or a setting does not exist.
        """
        chosen: dict[str, Any] = {}
        for key, kind in arm.chosen.items():
            group, _, name = key.partition(".")
            value = tuned(self.results, kind)
            chosen = merged(chosen, {group: {name: value if group == "loss" else [value]}})
        tokens = "" if arm.settings["loss"]["kind"] == "none" else "distilled_"
        result = merged(_bases(arm.data)[0], arm.settings, chosen, {
            "model": {"name": f"deit_tiny_{tokens}patch16_224"},
            "epochs": EPOCHS[arm.data], "num_views": arm.views, "seed": seed, "device": "cpu",
            "eval_every": 1000, "save_every": 4, "log_every": 50,
        })  # fmt: skip
        more = {"more_caches": ["x"]} if len(arm.caches) > 1 else {}
        require_settings(result | more)
        return result

    def students(self, arm: Arm, seeds: Sequence[int]) -> None:
        """Train and measure an arm's students in one pass over the views, which leaves each as it
        would be alone; their JSON files are written at the end."""
        import deit_fast
        from bench.fashion.measure import measure
        from deit_fast.config_file import from_dict
        from deit_fast.recipes import digits_student

        settings = [self.settings(arm, seed) for seed in seeds]
        folders = [str(self.cache(name, arm.data)) for name in arm.caches]
        outputs = [self.work / "runs" / result_path(self.results, arm, seed).stem for seed in seeds]
        configs = [
            from_dict(digits_student(), {
                **given, "data": self.data(arm.data), "output": str(output),
                "cache": folders[0] if folders else None, "more_caches": folders[1:],
            })
            for given, output in zip(settings, outputs, strict=True)
        ]  # fmt: skip
        started = time.process_time()
        results = deit_fast.train_together(configs)
        seconds = (time.process_time() - started) / len(seeds)
        for seed, given, output, result in zip(seeds, settings, outputs, results, strict=True):
            self._write(result_path(self.results, arm, seed).name, {
                "arm": arm.name, "data": arm.data, "seed": seed, "protocol": digest_of(arm),
                "views": arm.views, "steps": result.details["steps"],
                "times_each_view_is_seen": round(EPOCHS[arm.data] / arm.views, 3),
                "bytes_per_image": sum(map(_record_bytes, folders)) * arm.views,
                "settings": {key: given[key] for key in ("loss", "features") if key in given},
                "cpu_seconds": round(seconds, 1), "trained_together": len(seeds),
                **measure(output), "environment": result.details["environment"],
            })  # fmt: skip

    def _write(self, name: str, content: dict[str, Any]) -> None:
        from deit_fast.runtime.files import write_atomically

        ordered = dict(sorted(content.items()))
        write_atomically(self.results / name, to_text(ordered).encode())


def _record_bytes(folder: str) -> int:
    from deit_fast.cache import LogitCache

    return int(LogitCache.open(folder).codec.record_bytes)


def run(options: argparse.Namespace) -> None:
    from deit_fast.errors import InputError

    bench = Bench(options.work, options.results)
    write_data(options.work / "data", protocol.REUSE_IMAGES)
    write_digits(options.work / "data" / "digits")
    count, waiting = 0, []
    for arm in arms():
        label = {seed: f"{arm.data}: {arm.name}, seed {seed}" for seed in arm.seeds}
        seeds = [
            seed for seed in arm.seeds
            if options.only in label[seed] and not read_result(options.results, arm, seed)
        ]  # fmt: skip
        if options.limit is not None:
            seeds = seeds[: options.limit - count]
        if not seeds:
            continue
        try:
            bench.students(arm, seeds)
        except (NotYet, InputError) as reason:  # the page names what is missing in the end
            waiting += [f"{label[seed]}: {reason}" for seed in seeds]
            continue
        count += len(seeds)
        for seed in seeds:
            print(f"{time.strftime('%H:%M:%S')} {label[seed]}", flush=True)
    if waiting:
        raise SystemExit("\n".join(f"waits: {line}" for line in waiting))


def plan(_: argparse.Namespace) -> None:
    """The runs in their order, with their steps."""
    from deit_fast.recipes import digits_student

    total = 0
    for arm in arms():
        images = {"reuse": protocol.REUSE_IMAGES, "digits": protocol.DIGITS_IMAGES}
        batch = _bases(arm.data)[0].get("batch_size", digits_student().batch_size)
        steps = images.get(arm.data, 50_000) // batch * EPOCHS[arm.data]
        total += steps * len(arm.seeds)
        print(f"{arm.data:7} {arm.name:32} seeds {arm.seeds}, {steps} steps")
    print(f"{sum(len(arm.seeds) for arm in arms())} runs, {total} steps")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench fashion", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("run", "page", "plan"):
        added = verbs.add_parser(verb)
        added.add_argument("--results", type=Path, default=RESULTS)
        if verb == "run":
            added.add_argument("--work", type=Path, default=WORK)
            added.add_argument("--only", default="", help="runs whose name contains this text")
            added.add_argument("--limit", type=int, help="stop after this many runs")
        if verb == "page":
            added.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
            added.add_argument("--plots", type=Path, help="folder of the reuse curve")
            added.add_argument(
                "--tables", nargs="+", choices=[*protocol.TABLES], default=[*protocol.TABLES]
            )
    options = parser.parse_args(arguments[1:])
    if options.verb == "page":
        from bench.fashion.page import write_page

        write_page(options.results, options.out, options.plots, options.tables)
        return
    {"run": run, "plan": plan}[options.verb](options)
