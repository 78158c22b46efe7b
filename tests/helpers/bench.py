"""Parts of a bench's result file, and of a chart."""

from __future__ import annotations

import re
from pathlib import Path

META = {
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "versions": {"torch": "2.11.0"},
    "commit": "c0ffee",
    "date": "2026-01-01",
    "command": "python -m bench gpu",
}


def chart_texts(path: Path) -> list[str]:
    """What an SVG says, in its order; another matplotlib draws the same with other paths."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())
