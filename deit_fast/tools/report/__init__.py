"""`report`: one self-contained HTML page about one or more runs; it opens offline."""

from __future__ import annotations

from deit_fast.tools.report.page import build_report, write_report
from deit_fast.tools.report.runs import PNG_SIGNATURE, short_names

__all__ = ["PNG_SIGNATURE", "build_report", "short_names", "write_report"]
