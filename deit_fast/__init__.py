"""Distillation engine for vision transformers: replayable views, a verified teacher-logit cache,
fused kernels. The public names are imported on first use, so that ``import deit_fast`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deit_fast.cache import LogitCache, LogitCacheWriter
    from deit_fast.losses import DistillationLoss
    from deit_fast.models import create_student, load_teacher
    from deit_fast.models.fuse import fuse, unfuse
    from deit_fast.prediction import load_student, predict
    from deit_fast.tools.analysis.measures import soften
    from deit_fast.tools.export.exporting import export
    from deit_fast.views.plan import ViewPlan

__version__ = "0.1.0"

__all__ = [
    "DistillationLoss",
    "LogitCache",
    "LogitCacheWriter",
    "ViewPlan",
    "create_student",
    "export",
    "fuse",
    "load_student",
    "load_teacher",
    "predict",
    "soften",
    "unfuse",
]

_HOMES = {
    "DistillationLoss": "deit_fast.losses",
    "LogitCache": "deit_fast.cache",
    "LogitCacheWriter": "deit_fast.cache",
    "ViewPlan": "deit_fast.views.plan",
    "create_student": "deit_fast.models",
    "export": "deit_fast.tools.export.exporting",
    "fuse": "deit_fast.models",
    "soften": "deit_fast.tools.analysis.measures",
    "unfuse": "deit_fast.models",
    "load_student": "deit_fast.prediction",
    "load_teacher": "deit_fast.models",
    "predict": "deit_fast.prediction",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deit_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
