"""The teacher cache: a teacher's logits or features of every view, verified when read.

The file format is docs/cache-format.md; the part in C++ is csrc/.
"""

from __future__ import annotations

from deit_fast.errors import CacheError, CacheMismatch

from .codec_base import Codec
from .codecs import CODECS, codec_from_config
from .feature_codecs import FEATURE_CODECS, FeatureCodec, feature_codec
from .format import build_feature_manifest, build_manifest
from .reader import LogitCache, ReadAhead
from .record_order import RecordOrder, record_order
from .verify import info, verify
from .writer import LogitCacheWriter

__all__ = [
    "CODECS",
    "FEATURE_CODECS",
    "CacheError",
    "CacheMismatch",
    "Codec",
    "FeatureCodec",
    "LogitCache",
    "LogitCacheWriter",
    "ReadAhead",
    "RecordOrder",
    "build_feature_manifest",
    "build_manifest",
    "codec_from_config",
    "feature_codec",
    "info",
    "record_order",
    "verify",
]
