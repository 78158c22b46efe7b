"""Parts of a bench's result file."""

from __future__ import annotations

META = {
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "versions": {"torch": "2.11.0"},
    "commit": "c0ffee",
    "date": "2026-01-01",
    "command": "python -m bench gpu",
}
