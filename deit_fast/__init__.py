"""Distillation engine for vision transformers: replayable views, a verified teacher-logit cache,
fused kernels. The public names are imported on first use, so that ``import deit_fast`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deit_fast.api import (
        EvaluateResult,
        PrecomputeResult,
        TrainResult,
        evaluate,
        precompute,
        train,
        train_together,
    )
    from deit_fast.cache import LogitCache, LogitCacheWriter
    from deit_fast.config import (
        CodecConfig,
        DataConfig,
        LossConfig,
        ModelConfig,
        OptimConfig,
        RunConfig,
        ViewConfig,
    )
    from deit_fast.errors import InputError
    from deit_fast.losses import DistillationLoss
    from deit_fast.models import create_student, load_teacher
    from deit_fast.models.fuse import fuse, unfuse
    from deit_fast.prediction import Prediction, Student, load_student, predict
    from deit_fast.recipes import find_recipe
    from deit_fast.runtime.signals import Preempted
    from deit_fast.tools.analysis.measures import soften
    from deit_fast.tools.export.exporting import export
    from deit_fast.views.plan import ViewPlan

__version__ = "0.1.0"

__all__ = [
    "CodecConfig",
    "DataConfig",
    "DistillationLoss",
    "EvaluateResult",
    "InputError",
    "LogitCache",
    "LogitCacheWriter",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "PrecomputeResult",
    "Prediction",
    "Preempted",
    "RunConfig",
    "Student",
    "TrainResult",
    "ViewConfig",
    "ViewPlan",
    "create_student",
    "evaluate",
    "export",
    "find_recipe",
    "fuse",
    "load_student",
    "load_teacher",
    "precompute",
    "predict",
    "soften",
    "train",
    "train_together",
    "unfuse",
]

_HOMES = {
    "CodecConfig": "deit_fast.config",
    "DataConfig": "deit_fast.config",
    "DistillationLoss": "deit_fast.losses",
    "EvaluateResult": "deit_fast.api",
    "InputError": "deit_fast.errors",
    "LogitCache": "deit_fast.cache",
    "LogitCacheWriter": "deit_fast.cache",
    "LossConfig": "deit_fast.config",
    "ModelConfig": "deit_fast.config",
    "OptimConfig": "deit_fast.config",
    "PrecomputeResult": "deit_fast.api",
    "Prediction": "deit_fast.prediction",
    "Preempted": "deit_fast.runtime.signals",
    "RunConfig": "deit_fast.config",
    "Student": "deit_fast.prediction",
    "TrainResult": "deit_fast.api",
    "ViewConfig": "deit_fast.config",
    "ViewPlan": "deit_fast.views.plan",
    "create_student": "deit_fast.models",
    "evaluate": "deit_fast.api",
    "export": "deit_fast.tools.export.exporting",
    "find_recipe": "deit_fast.recipes",
    "fuse": "deit_fast.models.fuse",
    "load_student": "deit_fast.prediction",
    "load_teacher": "deit_fast.models",
    "precompute": "deit_fast.api",
    "predict": "deit_fast.prediction",
    "soften": "deit_fast.tools.analysis.measures",
    "train": "deit_fast.api",
    "train_together": "deit_fast.api",
    "unfuse": "deit_fast.models.fuse",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deit_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
