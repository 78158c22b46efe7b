"""Section: accuracy, speed and teacher of each run; accuracy per class."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from deit_fast.tools.report.charts import COLOURS
from deit_fast.tools.report.html import (
    DASH,
    count_text,
    html_table,
    percent_text,
    run_label,
    run_labels,
)
from deit_fast.tools.report.runs import Run, group, number

TEXT_COLUMNS = ("distillation", "teacher")


def _kind(run: Run) -> str:
    kind = run.result.get("distill") or group(run.config, "loss").get("kind")
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
    shares = [share for row in run.train if (share := number(row, "data_wait")) is not None]
    return sum(shares) / len(shares) if shares else None


def _substituted(run: Run) -> str:
    paths = run.result.get("substituted")
    return str(len(paths)) if isinstance(paths, list) else DASH


def lead(runs: list[Run]) -> str:
    scored = [(top1, run) for run in runs if (top1 := number(run.result, "top1")) is not None]
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    if not scored:
        return f"{count}."
    top1, best = max(scored, key=lambda pair: pair[0])
    text = f"{count}. Highest top-1 accuracy: <b>{percent_text(top1)}</b> ({escape(best.name)})"
    plain = [value for value, run in scored if _kind(run) == "none"]
    if plain and _kind(best) != "none":
        gain = 100 * (top1 - max(plain))
        text += f", {gain:.2f} points above the best run without distillation"
    return f"{text}."


def results(runs: list[Run]) -> str:
    columns: list[tuple[str, Callable[[Run], str]]] = [
        ("distillation", _kind),
        ("teacher", _teacher),
        ("top-1", lambda run: percent_text(number(run.result, "top1"))),
        ("class head", lambda run: percent_text(number(run.result, "top1_class"))),
        ("distil. head", lambda run: percent_text(number(run.result, "top1_distill"))),
        ("average (EMA)", lambda run: percent_text(number(run.result, "ema_top1"))),
        ("best epoch", _best),
        ("epochs", lambda run: count_text(number(run.result, "epochs"))),
        ("steps", lambda run: count_text(number(run.result, "steps"))),
        ("img/s", lambda run: count_text(number(run.result, "images_per_s"))),
        ("data wait", lambda run: percent_text(_data_wait(run))),
        ("substituted", _substituted),
    ]
    texts = {name: [show(run) for run in runs] for name, show in columns}
    used = [name for name, values in texts.items() if set(values) != {DASH}]
    top = max((number(run.result, "top1") or 0 for run in runs), default=0)
    rows = []
    for index, run in enumerate(runs):
        row = [run_label(run, index)]
        for name in used:
            is_best = name == "top-1" and len(runs) > 1 and number(run.result, "top1") == top
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
    return html_table(["run", *head], rows, "wide") + note


def _best(run: Run) -> str:
    top1, epoch = number(run.result, "best_top1"), number(run.result, "best_epoch")
    return DASH if top1 is None or epoch is None else f"{epoch:.0f} ({percent_text(top1)})"


def per_class(runs: list[Run]) -> str:
    tables = [group(run.result, "per_class") for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    if not names:
        return ""

    def mean(name: str) -> float:
        values = [v for table in tables if (v := number(table, name)) is not None]
        return sum(values) / len(values) if values else 2.0

    rows = [
        [escape(name), *(_bar(number(table, name), i) for i, table in enumerate(tables))]
        for name in sorted(names, key=mean)
    ]
    note = '<p class="note">Hardest classes first, by the mean of all runs.</p>'
    return note + html_table(["class", *run_labels(runs)], rows, "bars tall")


def _bar(value: float | None, index: int) -> str:
    if value is None:
        return f"<td>{DASH}</td>"
    width = 100 * min(max(value, 0.0), 1.0)
    style = f"--c:var(--c{index % COLOURS});--w:{width:.1f}%"
    return f'<td class="bar" style="{style}"><span>{100 * value:.1f} %</span></td>'
