"""The teacher-logit cache: a teacher's logits of every view, verified when read.

The file format is docs/cache-format.md; the part in C++ is csrc/.
"""

from __future__ import annotations

from deit_fast.errors import CacheError, CacheMismatch

from .codecs import CODECS, Codec, codec_from_config
from .format import build_manifest
from .reader import LogitCache, ReadAhead
from .verify import info, verify
from .writer import LogitCacheWriter

__all__ = [
    "CODECS",
    "CacheError",
    "CacheMismatch",
    "Codec",
    "LogitCache",
    "LogitCacheWriter",
    "ReadAhead",
    "build_manifest",
    "codec_from_config",
    "info",
    "verify",
]
