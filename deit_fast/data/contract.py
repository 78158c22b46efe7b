"""The pixel contract of Pillow: which builds of it make the pixels that views are made of."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import PIL
from PIL import Image

from deit_fast.errors import InputError

_RESIZE_SHA256 = "dec5d06961c1f2ba275d52c28a64289c2a37f8196f8d37bd2bdcb493c8617081"


def pillow_contract() -> dict[str, str]:
    """Which decoder and resize made the pixels; part of a cache's fingerprint.

    Pillow 11.0 to 12.3 give the same pixels; 13.0 changes 2.2 % of resized values, and forks differ
    within one version number, so a small resize is checked as well.

    Raises:
        InputError: another Pillow.
    """
    major = PIL.__version__.split(".")[0]
    if major not in ("11", "12"):
        raise InputError(f"views need the pixels of Pillow 11 or 12, not {PIL.__version__}")
    if _resize_digest() != _RESIZE_SHA256:
        raise InputError(
            f"this build of Pillow {PIL.__version__} resizes to other pixels than Pillow 11 and 12"
        )
    return {"contract.pixels": "pillow/11-12"}


@functools.cache
def _resize_digest() -> str:
    """Digest of a resize down, up and in both, of a fixed image of 211 x 157 pixels."""
    values = np.arange(157 * 211 * 3, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(24)
    image = Image.fromarray(values.astype(np.uint8).reshape(157, 211, 3))
    digest = hashlib.sha256()
    for size in ((64, 64), (224, 224), (250, 90)):
        digest.update(image.resize(size, Image.Resampling.BICUBIC).tobytes())
    return digest.hexdigest()
