"""Students by timm name, teachers by spec, and weights files, read without unpickling code."""

from __future__ import annotations

from deit_fast.models.fuse import fuse, unfuse
from deit_fast.models.student import create_student, forward_heads
from deit_fast.models.teacher import Teacher, load_teacher
from deit_fast.models.weights import load_weights

__all__ = [
    "Teacher",
    "create_student",
    "forward_heads",
    "fuse",
    "load_teacher",
    "load_weights",
    "unfuse",
]
