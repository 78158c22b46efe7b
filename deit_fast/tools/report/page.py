"""Fill the page's template; the template holds headings, notes and the style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from deit_fast.errors import InputError, printable
from deit_fast.runtime.files import write_atomically
from deit_fast.runtime.run_names import short_names
from deit_fast.tools.analysis.table import count as with_spaces
from deit_fast.tools.report import curves, mistakes, results, sections
from deit_fast.tools.report.charts import COLOURS, PROPERTIES, Line, dash, line_chart
from deit_fast.tools.report.groups import Group, group_runs
from deit_fast.tools.report.parts import Table
from deit_fast.tools.run_folder import read_run

PAGE = "report.html"


def write_report(runs: Sequence[Path], out: Path, title: str, pictures: bool = True) -> None:
    """Write the page about ``runs`` to ``out``; arguments as of ``build_report``.

    Raises:
        InputError: a run's folder or file is missing or damaged, or ``out`` is no file; names it.
        OSError: ``out`` cannot be written; the old page stays.
    """
    page = build_report(runs, printable(title), pictures)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page.encode(errors="backslashreplace"))


def default_page(runs: Sequence[Path]) -> Path:
    """Where the page is written: into the folder of a single run, else into the current folder."""
    return runs[0] / PAGE if len(runs) == 1 else Path(PAGE)


def build_report(runs: Sequence[Path], title: str, pictures: bool = True) -> str:
    """The page about ``runs`` as HTML.

    Args:
        pictures: show images of the data set: examples, first training views, attention maps.

    Raises:
        InputError: no runs; a run's folder or file is missing or damaged; names it.
    """
    if not runs:
        raise InputError("a report needs at least one run folder")
    names = short_names(runs)
    try:
        read = [read_run(*item) for item in zip(runs, names, count())]
        return render(title, **_sections(group_runs(read), pictures))
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"a file of {', '.join(names)} is damaged or was edited ({type(error).__name__}: "
            f"{error}); `deit-fast analyze` writes its files again, others need a copy"
        ) from error


def _sections(groups: list[Group], pictures: bool) -> dict[str, Any]:
    """The template's variables, by the names of the functions that make them."""
    analysed = [
        replace(group, runs=found)
        for group in groups
        if (found := [run for run in group.runs if run.analysis])
    ]
    of_all = (
        results.lead, results.results, results.costs, results.per_class, curves.curves,
        curves.throughput, mistakes.confusions, sections.settings, sections.environment,
        sections.commands,
    )  # fmt: skip
    of_analysed = (
        sections.tokens, sections.classifiers, sections.agreement, sections.teachers,
        sections.left_out,
    )  # fmt: skip
    parts: dict[str, Any] = {section.__name__: section(groups) for section in of_all}
    parts |= {section.__name__: section(analysed) for section in of_analysed}
    parts["examples"] = mistakes.examples(groups, pictures)
    if pictures:
        parts |= {"samples": sections.samples(groups), "attention": sections.attention(analysed)}
    return parts


def render(title: str, **parts: Any) -> str:
    """The page; ``parts`` are the template's variables, and sections without one are left out."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {
        "colours": len(COLOURS), "properties": PROPERTIES, "dash": dash, "count": with_spaces
    }  # fmt: skip
    page = environment.get_template("page.html").render(title=title, **parts)
    return page.strip() + "\n"


def build_cache_page(
    rows: list[tuple[str, str]],
    entropy_counts: list[tuple[float, int]] | None,
    fingerprint: list[tuple[str, str]],
) -> str:
    """The page of `cache info --html`.

    Args:
        rows: names and values of the summary.
        entropy_counts: middle of each bin, nats, and its records.
        fingerprint: fields and values.
    """
    tables: list[dict[str, Any]] = [{"heading": "Summary", "table": Table([], rows, "text")}]
    if entropy_counts:
        line = Line("records", 0, [(x, float(count)) for x, count in entropy_counts])
        chart = line_chart("Records by entropy", [line], "entropy, nats", "{:g}".format, 0.0)
        tables.append({"heading": "Entropy of the teacher's probabilities", "chart": chart})
    tables.append({"heading": "Fingerprint", "table": Table([], fingerprint, "text")})
    return render("Teacher cache", tables=tables)
