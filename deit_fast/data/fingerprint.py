"""Are these the same pixels? The contract of decoder and resize, and digests of views."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from deit_fast.config import DataConfig, RunConfig
from deit_fast.data.batch import ViewBatch
from deit_fast.data.jpeg_index import require_dali
from deit_fast.data.open import open_loader
from deit_fast.data.sources import Source, digest_images
from deit_fast.errors import InputError
from deit_fast.kernels.ingest import PLAN_COLUMNS
from deit_fast.views.plan import ViewPlan
from deit_fast.views.plan import fingerprint as view_fingerprint
from deit_fast.views.rng import NO_MIX

_RESIZE_SHA256 = "dec5d06961c1f2ba275d52c28a64289c2a37f8196f8d37bd2bdcb493c8617081"
_IMAGES = [PLAN_COLUMNS.index("image"), PLAN_COLUMNS.index("partner_image")]
_VIEWS_PER_BATCH = 16


def views_fingerprint(config: RunConfig, source: Source) -> dict[str, Any]:
    """What decides which pixels belong to a (sample, view): settings, data set, decoder.

    Part of a cache's fingerprint. Its `contract.pixel_digests` says that the cache holds digests of
    some views.

    Raises:
        InputError: as `pixel_contract`.
    """
    return (
        view_fingerprint(config.view)
        | source.fingerprint()
        | pixel_contract(config.data)
        | {"contract.pixel_digests": 1}
    )


def pixel_contract(data: DataConfig) -> dict[str, Any]:
    """What decides the pixels of the configured loader; part of a cache's fingerprint.

    Raises:
        InputError: a Pillow with other pixels, or no DALI where it is needed.
    """
    pillow = _pillow_contract()  # with DALI too, Pillow decodes all files but plain JPEGs
    if data.loader != "pillow":
        require_dali()
    return _dali_contract(data) if data.loader == "dali-gpu" else pillow


def _dali_contract(data: DataConfig) -> dict[str, Any]:
    import nvidia.dali
    from nvidia import nvimgcodec

    return {
        "contract.pixels": "dali-decoded/gpu",
        "contract.dali": nvidia.dali.__version__,
        "contract.nvimgcodec": nvimgcodec.__version__,
        "contract.hw_decoder_load": data.dali_hw_decoder_load,
    }


def _pillow_contract() -> dict[str, str]:
    """Pillow 11.0 to 12.3 give the same pixels. 13.0 changes 2.2 % of resized values, and forks
    differ within one version number, so a small resize is checked as well."""
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
    """Digest of a fixed image of 211 x 157 pixels resized down, up, and one axis each way."""
    values = np.arange(157 * 211 * 3, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(24)
    image = Image.fromarray(values.astype(np.uint8).reshape(157, 211, 3))
    digest = hashlib.sha256()
    for size in ((64, 64), (224, 224), (250, 90)):
        digest.update(image.resize(size, Image.Resampling.BICUBIC).tobytes())
    return digest.hexdigest()


def identify(source: Source, held_out: Source) -> dict[str, Any]:
    """The facts of a run's identity about its data; decodes a few images."""
    return {
        "data.images": source.fingerprint(),
        "data.classes": source.classes,
        "data.pixels": digest_images(source),
        "val.images": held_out.fingerprint(),
        "val.pixels": digest_images(held_out),
    }


def digest_views(batch: ViewBatch, rows: Iterable[int]) -> list[str]:
    """BLAKE2b-128, in hex, of everything that decides a finished view.

    That is the own and the partner's pixels, the plan's row without its image indices
    (little-endian int32), and both labels and lambda (int64, int64, float32).
    """
    rows = list(rows)
    plan = batch.plan.cpu().numpy()[rows].astype("<i4")
    # Only the images of these rows are copied from the device.
    images, image_of = np.unique(plan[:, _IMAGES], return_inverse=True)
    indices = torch.from_numpy(images.astype(np.int64)).to(batch.images.device)
    pixels, image_of = batch.images[indices].cpu().numpy(), image_of.reshape(len(rows), 2)
    values = (batch.labels, batch.partner_labels, batch.lam)
    labels, partners, lams = (value.cpu()[rows].tolist() for value in values)
    plan[:, _IMAGES] = 0
    digests = []
    for row in range(len(rows)):
        digest = hashlib.blake2b(digest_size=16)
        for image in image_of[row].tolist():
            digest.update(pixels[image].tobytes())
        digest.update(plan[row].tobytes())
        digest.update(struct.pack("<qqf", labels[row], partners[row], lams[row]))
        digests.append(digest.hexdigest())
    return digests


def require_same_pixels(
    records: Sequence[tuple[int, int, str]],
    source: Source,
    plan: ViewPlan,
    *,
    data: DataConfig,
    device: torch.device | str,
    where: str,
) -> None:
    """Make views again and compare their digests with stored ones.

    Args:
        records: (view, sample, digest) as stored.
        data, device: the loader's.
        where: what holds the records, for the message.

    Raises:
        InputError: a view differs; names sample, view and files.
    """
    views = [view for view, _, _ in records]
    parts = [records[part] for part in plan.batches_of(views, _VIEWS_PER_BATCH)]
    batches = [
        (np.array([sample for _, sample, _ in part]), np.array([view for view, _, _ in part]))
        for part in parts
    ]
    data = dataclasses.replace(data, workers=0)  # starting processes would take longer
    loader = open_loader(data, source, plan, batches, device=device)
    for part, batch in zip(parts, loader, strict=True):
        for (view, sample, stored), digest in zip(
            part, digest_views(batch, range(len(part))), strict=True
        ):
            if digest == stored:
                continue
            row = plan.rows([sample], [view])[0]
            files = source.paths[sample]
            if row["mix_kind"] != NO_MIX:
                files += f" or its partner {source.paths[int(row['partner'])]}"
            raise InputError(
                f"{where}: the teacher saw other pixels of sample {sample} view {view}: check "
                f"whether {files} was replaced, and whether Pillow (or DALI) is built as it was"
            )
