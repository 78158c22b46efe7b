"""What other projects stored of their teachers: for `cache info` and `cache export` alone.

No run can use these files, because this loader cannot make their views again; each format says why.
A format is a `Foreign`, in a file of its own. Nothing on disk is trusted: sizes are bounded, no
pickle runs, and what does not fit is a `Damage` that names its file and member.
"""

from __future__ import annotations

import os
from pathlib import Path

from deit_fast.cache.foreign.records import Damage, Foreign, Records

__all__ = ["Damage", "Foreign", "Records", "open_foreign"]

_LOOKED_AT = 8  # archives, and subfolders of a folder, that decide which format it is
_DEPTH = 4  # FKD keeps three levels of the images' folders


def open_foreign(path: str | Path) -> Foreign | None:
    """The reader of what ``path`` holds, a folder or one archive; None: no format known here."""
    from deit_fast.cache.foreign.fkd import Fkd
    from deit_fast.cache.foreign.raygen import RayGen
    from deit_fast.cache.foreign.tinyvit import TinyVit, epoch_folders

    path = Path(path)
    if os.path.lexists(path / "manifest.json"):
        return None  # a cache
    if os.path.isfile(path):
        tars = all_tars = [path] if path.suffix == ".tar" else []
    elif os.path.isdir(path):
        if epochs := epoch_folders(path):
            return TinyVit(path, epochs)
        tars, all_tars = _first_tars(path, _DEPTH), []
    else:
        return None
    for kind in (Fkd, RayGen):
        if any(kind.recognises(tar) for tar in tars):
            return kind(path, all_tars or sorted(path.rglob("*.tar")))
    return None


def _first_tars(folder: Path, depth: int) -> list[Path]:
    """A few archives below a folder, without a walk through all of it."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    tars = [folder / name for name in names if name.endswith(".tar")]
    if tars or depth == 0:
        return tars[:_LOOKED_AT]
    below = [folder / name for name in names]
    folders = [path for path in below if os.path.isdir(path) and not path.is_symlink()]
    found = (_first_tars(path, depth - 1) for path in folders[:_LOOKED_AT])
    return next((tars for tars in found if tars), [])
