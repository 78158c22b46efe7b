"""Section: settings, environment, commands."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from deit_fast.config import RunConfig, dotted_keys, to_dict
from deit_fast.tools.report.html import DASH, html_table, run_label, run_labels
from deit_fast.tools.report.runs import Run, group


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
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


def settings_title(runs: list[Run]) -> str:
    if len(runs) == 1:
        return "Settings that differ from the defaults"
    return "Settings that differ between the runs"


def settings(runs: list[Run]) -> str:
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
    table = html_table(["setting", *run_labels(runs)], rows, "text") if rows else "<p>None.</p>"
    return table + "".join(
        f"<details><summary>All settings of {escape(run.name)}</summary>"
        f"<pre>{escape(json.dumps(run.config, indent=2))}</pre></details>"
        for run in runs
    )


def environment(runs: list[Run]) -> str:
    tables = [_flat(group(run.result, "environment")) for run in runs]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    if not keys:
        return ""
    if all(table == tables[0] for table in tables):
        head = "all runs" if len(runs) > 1 else escape(runs[0].name)
        rows = [[escape(key), escape(_plain(tables[0][key]))] for key in keys]
        return html_table(["", head], rows, "text")
    rows = [[escape(key), *(escape(_plain(table.get(key))) for table in tables)] for key in keys]
    return html_table(["", *run_labels(runs)], rows, "text")


def commands(runs: list[Run]) -> str:
    return "".join(
        f"<h3>{run_label(run, index)}</h3><pre>{escape(str(command))}</pre>"
        for index, run in enumerate(runs)
        if (command := run.result.get("command"))
    )
