"""Where a run folder keeps its analysis, and in which form."""

from __future__ import annotations

FORMAT = 1
FOLDER, FILE_NAME = "analysis", "analysis.json"
