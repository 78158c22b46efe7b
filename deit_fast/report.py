"""`report`: one self-contained HTML page about one or more runs; it opens offline."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from deit_fast.charts import COLOURS, Line, line_chart
from deit_fast.config import InputError, RunConfig, dotted_keys, to_dict
from deit_fast.report_style import STYLE

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
DASH = "\u2013"
TEXT_COLUMNS = ("distillation", "teacher")


@dataclass(frozen=True)
class Run:
    """The content of a run folder."""

    name: str
    config: dict[str, Any]
    result: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: bytes | None


def write_report(runs: list[Path], out: Path, title: str) -> None:
    """Write the page about ``runs`` to ``out``.

    Raises:
        InputError: a run's folder or file is missing or damaged; names it.
        OSError: ``out`` cannot be written.
    """
    page = build_report(runs, title)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def build_report(runs: list[Path], title: str) -> str:
    """The page about ``runs`` as HTML.

    Raises:
        InputError: no runs; a run's folder or file is missing or damaged; names it.
    """
    if not runs:
        raise InputError("a report needs at least one run folder")
    names = short_names(runs)
    loaded = [read_run(path, name) for path, name in zip(runs, names, strict=True)]
    sections = [
        ("Results", _results(loaded)),
        ("Learning curves", _curves(loaded)),
        ("Accuracy per class", _per_class(loaded)),
        ("Throughput", _throughput(loaded)),
        ("Views that the student saw", _samples(loaded)),
        (_settings_title(loaded), _settings(loaded)),
        ("Environment", _environment(loaded)),
        ("Commands", _commands(loaded)),
    ]
    body = "".join(
        f"<section><h2>{escape(heading)}</h2>{content}</section>"
        for heading, content in sections
        if content
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1><p>{_lead(loaded)}</p></header>"
        f"<main>{body}</main></body></html>\n"
    )


def short_names(runs: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [path.absolute().parts for path in runs]
    longest = max(len(p) for p in parts)
    for depth in range(1, longest + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in runs]


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def read_run(path: Path, name: str) -> Run:
    """Read a run folder.

    Raises:
        InputError: the folder or a file of it is missing or damaged; names it.
    """
    if not path.is_dir():
        raise InputError(f"run folder {path} does not exist")
    rows = _read_rows(path / "metrics.jsonl")
    samples = path / "samples.png"
    image = samples.read_bytes() if samples.exists() else None
    if image is not None and not image.startswith(PNG_SIGNATURE):
        raise InputError(f"{samples} is damaged: not a PNG image")
    return Run(
        name=name,
        config=_read_object(path / "config.json"),
        result=_read_object(path / "result.json"),
        train=[row for row in rows if row.get("kind") == "train"],
        evaluations=[row for row in rows if row.get("kind") == "eval"],
        samples=image,
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        unfinished = ": the run has not finished" if path.name == "result.json" else ""
        raise InputError(f"{path} does not exist{unfinished}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is damaged: not UTF-8 text") from None


def _read_object(path: Path) -> dict[str, Any]:
    return _parse_object(_read_text(path), str(path))


def _parse_object(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{place} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{place} is damaged: not a JSON object")
    return value


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows; a last line without its line feed was torn by a crash and is left out."""
    text = _read_text(path)
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [_parse_object(line, f"{path} line {i}") for i, line in enumerate(lines, 1) if line]


def _number(values: dict[str, Any], key: str) -> float | None:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _group(values: dict[str, Any], key: str) -> dict[str, Any]:
    group = values.get(key)
    return group if isinstance(group, dict) else {}


# ---------------------------------------------------------------------------------------------
# Text of values
# ---------------------------------------------------------------------------------------------


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.2f} %"


def _count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}".replace(",", "\u202f")


def _short(value: float) -> str:
    return f"{value:.4g}"


def _round_percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def _kind(run: Run) -> str:
    kind = run.result.get("distill") or _group(run.config, "loss").get("kind")
    return str(kind) if kind else DASH


def _teacher(run: Run) -> str:
    teacher = run.result.get("teacher")
    if not isinstance(teacher, dict):
        return DASH
    spec = teacher.get("teacher.spec") or teacher.get("teacher.name") or run.config.get("teacher")
    source = teacher.get("from")
    if spec and source == "cache":
        return f"{spec} (cached)"
    return str(spec or source or "yes")


def _data_wait(run: Run) -> float | None:
    shares = [share for row in run.train if (share := _number(row, "data_wait")) is not None]
    return sum(shares) / len(shares) if shares else None


def _substituted(run: Run) -> str:
    paths = run.result.get("substituted")
    return str(len(paths)) if isinstance(paths, list) else DASH


def _lead(runs: list[Run]) -> str:
    scored = [(top1, run) for run in runs if (top1 := _number(run.result, "top1")) is not None]
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    if not scored:
        return f"{count}."
    top1, best = max(scored, key=lambda pair: pair[0])
    text = f"{count}. Highest top-1 accuracy: <b>{_percent(top1)}</b> ({escape(best.name)})"
    plain = [value for value, run in scored if _kind(run) == "none"]
    if plain and _kind(best) != "none":
        gain = 100 * (top1 - max(plain))
        text += f", {gain:.2f} points above the best run without distillation"
    return f"{text}."


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table of finished HTML cells; the first cell of a row is its heading."""
    top = "".join(c if c.startswith("<th") else f'<th scope="col">{c}</th>' for c in head)
    body = []
    for row in rows:
        first, *rest = row
        cells = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in rest)
        body.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _label(run: Run, index: int) -> str:
    return f'<i class="key" style="--c:var(--c{index % COLOURS})"></i>{escape(run.name)}'


def _labels(runs: list[Run]) -> list[str]:
    return [_label(run, index) for index, run in enumerate(runs)]


def _results(runs: list[Run]) -> str:
    columns: list[tuple[str, Callable[[Run], str]]] = [
        ("distillation", _kind),
        ("teacher", _teacher),
        ("top-1", lambda run: _percent(_number(run.result, "top1"))),
        ("class head", lambda run: _percent(_number(run.result, "top1_class"))),
        ("distil. head", lambda run: _percent(_number(run.result, "top1_distill"))),
        ("average (EMA)", lambda run: _percent(_number(run.result, "ema_top1"))),
        ("best epoch", _best),
        ("epochs", lambda run: _count(_number(run.result, "epochs"))),
        ("steps", lambda run: _count(_number(run.result, "steps"))),
        ("img/s", lambda run: _count(_number(run.result, "images_per_s"))),
        ("data wait", lambda run: _percent(_data_wait(run))),
        ("substituted", _substituted),
    ]
    texts = {name: [show(run) for run in runs] for name, show in columns}
    used = [name for name, values in texts.items() if set(values) != {DASH}]
    top = max((_number(run.result, "top1") or 0 for run in runs), default=0)
    rows = []
    for index, run in enumerate(runs):
        row = [_label(run, index)]
        for name in used:
            is_best = name == "top-1" and len(runs) > 1 and _number(run.result, "top1") == top
            text = escape(texts[name][index])
            text = f"<b>{text}</b>" if is_best else text
            row.append(text if name in TEXT_COLUMNS else f'<td class="number">{text}</td>')
        rows.append(row)
    note = (
        '<p class="note">Top-1 accuracy on held-out images after the last step; for a student with '
        "two heads, of their mean. Data wait: share of the time that training waited for images. "
        "Substituted: unreadable images whose place a neighbour took.</p>"
    )
    head = [
        name if name in TEXT_COLUMNS else f'<th scope="col" class="number">{name}</th>'
        for name in used
    ]
    return _table(["run", *head], rows, "wide") + note


def _best(run: Run) -> str:
    top1, epoch = _number(run.result, "best_top1"), _number(run.result, "best_epoch")
    return DASH if top1 is None or epoch is None else f"{epoch:.0f} ({_percent(top1)})"


def _per_class(runs: list[Run]) -> str:
    tables = [_group(run.result, "per_class") for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    if not names:
        return ""

    def mean(name: str) -> float:
        values = [v for table in tables if (v := _number(table, name)) is not None]
        return sum(values) / len(values) if values else 2.0

    rows = [
        [escape(name), *(_bar(_number(table, name), i) for i, table in enumerate(tables))]
        for name in sorted(names, key=mean)
    ]
    note = '<p class="note">Hardest classes first, by the mean of all runs.</p>'
    return note + _table(["class", *_labels(runs)], rows, "bars tall")


def _bar(value: float | None, index: int) -> str:
    if value is None:
        return f"<td>{DASH}</td>"
    width = 100 * min(max(value, 0.0), 1.0)
    style = f"--c:var(--c{index % COLOURS});--w:{width:.1f}%"
    return f'<td class="bar" style="{style}"><span>{100 * value:.1f} %</span></td>'


# ---------------------------------------------------------------------------------------------
# Charts
# ---------------------------------------------------------------------------------------------


def _points(run: Run, rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(epoch, value) of the rows that have both; the epoch is a fraction, from the step."""
    last = max(run.evaluations, key=lambda row: _number(row, "step") or 0, default={})
    step, epoch = _number(last, "step"), _number(last, "epoch")
    scale = epoch / step if step and epoch else None
    points = []
    for row in rows:
        value, at = _number(row, key), _number(row, "step")
        x = at * scale if at is not None and scale is not None else _number(row, "epoch")
        if x is not None and value is not None:
            points.append((x, value))
    return sorted(points)


def _figure(
    runs: list[Run],
    key: str,
    caption: str,
    show: Callable[[float], str],
    *,
    training: bool = False,
    floor: float | None = None,
) -> str:
    lines = [
        Line(run.name, index, _points(run, run.train if training else run.evaluations, key))
        for index, run in enumerate(runs)
    ]
    if not any(line.points for line in lines):
        return ""
    chart = line_chart(lines, title=caption, x_name="epoch", show=show, floor=floor)
    heading = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure>{heading}<div class="scroll">{chart}</div></figure>'


def _curves(runs: list[Run]) -> str:
    figures = (
        _figure(runs, "top1", "Top-1 accuracy on held-out images", _round_percent),
        _figure(runs, "ema_top1", "Top-1 accuracy of the averaged weights", _round_percent),
        _figure(runs, "loss", "Cross-entropy on held-out images", _short),
        _figure(runs, "loss", "Training loss", _short, training=True),
    )
    found = "".join(figures)
    return f'<div class="charts">{found}</div>' if found else ""


def _throughput(runs: list[Run]) -> str:
    figures = (
        _figure(runs, "images_per_s", "Images per second", _short, training=True, floor=0.0),
        _figure(
            runs, "data_wait", "Share of time spent waiting for images", _round_percent,
            training=True, floor=0.0,
        ),
    )  # fmt: skip
    found = "".join(figures)
    return f'<div class="charts">{found}</div>' if found else ""


def _samples(runs: list[Run]) -> str:
    """Each distinct picture once, under the names of the runs that share it."""
    owners: dict[bytes, list[str]] = {}
    for run in runs:
        if run.samples is not None:
            owners.setdefault(run.samples, []).append(run.name)
    figures = [
        f"<figure><figcaption>{escape(', '.join(names))}</figcaption>"
        f'<img alt="first views of {escape(", ".join(names))}" '
        f'src="data:image/png;base64,{base64.b64encode(image).decode()}"></figure>'
        for image, names in owners.items()
    ]
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


# ---------------------------------------------------------------------------------------------
# Settings, environment, commands
# ---------------------------------------------------------------------------------------------


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return DASH if value is None else str(value)


def _settings_title(runs: list[Run]) -> str:
    if len(runs) == 1:
        return "Settings that differ from the defaults"
    return "Settings that differ between the runs"


def _settings(runs: list[Run]) -> str:
    columns = [_flat(run.config) for run in runs]
    compared = columns
    if len(runs) == 1:
        defaults = json.loads(json.dumps(to_dict(RunConfig())))  # tuples to lists, as in the file
        compared = [*columns, _flat(defaults)]
    known = dotted_keys()
    keys = [*known, *(k for k in dict.fromkeys(k for c in columns for k in c) if k not in known)]
    rows = [
        [f"<code>{escape(key)}</code>", *(escape(_plain(column.get(key))) for column in columns)]
        for key in keys
        if key != "output" and len({json.dumps(column.get(key)) for column in compared}) > 1
    ]
    table = _table(["setting", *_labels(runs)], rows, "text") if rows else "<p>None.</p>"
    return table + "".join(
        f"<details><summary>All settings of {escape(run.name)}</summary>"
        f"<pre>{escape(json.dumps(run.config, indent=2))}</pre></details>"
        for run in runs
    )


def _environment(runs: list[Run]) -> str:
    tables = [_flat(_group(run.result, "environment")) for run in runs]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    if not keys:
        return ""
    if all(table == tables[0] for table in tables):
        head = "all runs" if len(runs) > 1 else escape(runs[0].name)
        rows = [[escape(key), escape(_plain(tables[0][key]))] for key in keys]
        return _table(["", head], rows, "text")
    rows = [[escape(key), *(escape(_plain(table.get(key))) for table in tables)] for key in keys]
    return _table(["", *_labels(runs)], rows, "text")


def _commands(runs: list[Run]) -> str:
    return "".join(
        f"<h3>{_label(run, index)}</h3><pre>{escape(str(command))}</pre>"
        for index, run in enumerate(runs)
        if (command := run.result.get("command"))
    )
