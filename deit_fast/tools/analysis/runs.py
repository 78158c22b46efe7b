"""`analyze`: measure the runs one after the other, compare them, write what was found beside each.

Each run folder gets `analysis/analysis.json` and its pictures; the report shows them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deit_fast.errors import InputError
from deit_fast.runtime.distributed import choose_device, read_process_group
from deit_fast.runtime.files import write_json
from deit_fast.tools.analysis.subject import measure, open_subject, undistilled
from deit_fast.tools.run_folder import ANALYSIS_FILE, ANALYSIS_FOLDER


def analyze(
    runs: list[Path],
    *,
    teacher: str | None = None,
    data_root: str | None = None,
    ema: bool = False,
    max_images: int | None = None,
    sample: int | None = None,
    maps: int = 4,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Analyse finished runs on their held-out images; runs on the same images are compared.

    Args:
        runs: run folders with config.json and model.safetensors (ema.safetensors with ``ema``).
        teacher: spec of the teacher of all runs; none: each run's own, see ``find_teacher``.
        data_root: another image folder than the runs' own.
        max_images: take this many, evenly spaced; none: all.
        sample: id of the held-out image whose softening is shown and whose attention map comes
            first; none: the one that the teacher is least sure of.
        maps: images to draw attention of.
        device: auto, cpu or cuda.

    Returns:
        A JSON object per run, as written to its `analysis/analysis.json`. What could not be
        measured is absent and stands with its reason under `left_out`.

    Raises:
        InputError: a run, its weights or data are missing or damaged; matplotlib is missing.
        OSError: a run folder cannot be written.
    """
    if read_process_group().world_size > 1:
        raise InputError("analyze runs in one process: start it without torchrun")
    _require_matplotlib()
    from deit_fast.tools.analysis import pictures
    from deit_fast.tools.analysis.describe import attention, describe, softening

    place = choose_device(device)
    subjects = [
        open_subject(run, teacher, data_root, ema, max_images, sample, place) for run in runs
    ]
    for number, subject in enumerate(subjects):
        measure(subject, subjects[:number], place)
    results = []
    for subject in subjects:
        found = describe(subject, undistilled(subject, subjects), ema, place)
        folder = subject.path / ANALYSIS_FOLDER
        folder.mkdir(exist_ok=True)
        first = sample
        if "teacher" in found:
            found["teacher"]["sample"] = softening(subject, sample, place)
            first = found["teacher"]["sample"]["id"]
        found |= attention(subject, first, maps, folder, place, found["left_out"])
        pictures.draw(found, folder)
        write_json(folder / ANALYSIS_FILE, found)
        results.append(found)
    return results


def _require_matplotlib() -> None:
    """Before minutes of measuring."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError("analyze draws with matplotlib: pip install matplotlib") from None
