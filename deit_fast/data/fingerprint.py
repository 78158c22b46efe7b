"""Digests of views, to tell whether two loaders make the same pixels."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from deit_fast.config import DataConfig
from deit_fast.data.loader import ViewBatch
from deit_fast.data.open import open_loader
from deit_fast.data.sources import Source
from deit_fast.errors import InputError
from deit_fast.kernels.ingest import PLAN_COLUMNS
from deit_fast.views.plan import NO_MIX, ViewPlan

_IMAGES = [PLAN_COLUMNS.index("image"), PLAN_COLUMNS.index("partner_image")]


def digest_views(batch: ViewBatch, rows: Iterable[int]) -> list[str]:
    """BLAKE2b-128, in hex, of all that ingest makes a view of.

    That is both halves' pixels, the plan's row without its places in the batch (little-endian
    int32), and both labels and lambda (int64, int64, float32).
    """
    rows = list(rows)
    plan = batch.plan.cpu().numpy()[rows].astype("<i4")
    # Of a batch on a GPU only the images that are asked for come back.
    places, where = np.unique(plan[:, _IMAGES], return_inverse=True)
    wanted = torch.from_numpy(places.astype(np.int64)).to(batch.images.device)
    images, where = batch.images[wanted].cpu().numpy(), where.reshape(len(rows), 2)
    values = (batch.labels, batch.partner_labels, batch.lam)
    labels, partners, lams = (value.cpu()[rows].tolist() for value in values)
    plan[:, _IMAGES] = 0
    digests = []
    for row in range(len(rows)):
        digest = hashlib.blake2b(digest_size=16)
        for place in where[row].tolist():
            digest.update(images[place].tobytes())
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
    """Make views again and compare.

    Args:
        records: (view, sample, digest) as they should be.
        data, device: the loader's.
        where: what holds the records, for the message.

    Raises:
        InputError: a view differs; names sample, view and files.
    """
    parts = [records[first : first + 16] for first in range(0, len(records), 16)]
    batches = []
    for part in parts:
        views, samples, _ = zip(*part, strict=True)
        batches.append((np.array(samples), np.array(views)))
    data = dataclasses.replace(data, workers=0)  # so few are not worth a process
    loader = open_loader(data, source, plan, batches, device=device)
    for part, batch in zip(parts, loader, strict=True):
        for (view, sample, wanted), found in zip(
            part, digest_views(batch, range(len(part))), strict=True
        ):
            if found != wanted:
                row = plan.rows([sample], [view])[0]
                files = source.paths[sample]
                if row["mix_kind"] != NO_MIX:
                    files += f" or its partner {source.paths[int(row['partner'])]}"
                raise InputError(
                    f"{where}: the teacher saw other pixels of sample {sample} view {view}: check "
                    f"whether {files} was replaced, and whether Pillow (or DALI) is built as "
                    f"it was"
                )
