"""Soft labels of FKD (szq0214/FKD, FKD_SLG): one file of torch.save an image, named .tar.

A file is a list of three numpy arrays: coords [V, 4], the crop as shares of the image (top, left,
height, width); flip [V]; and the label: class ids [V] (`hard`), id and probability [V, 2]
(`smoothing`), or ids and probabilities [V, 2, K]. Label type, temperature and teacher are not
stored. With `--use_fp16` coords and labels are float16, ids included.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deit_fast.cache.foreign.archives import LIMIT, read_torch_arrays, unzip
from deit_fast.cache.foreign.records import Foreign, Records
from deit_fast.errors import InputError, printable
from deit_fast.runtime.files import read_file

if TYPE_CHECKING:
    from torch import Tensor

_EXACT = 2048  # the largest class id up to which float16 has all


class Fkd(Foreign):
    """Labels of FKD."""

    name = "FKD"
    replay = (
        "its crops are rounded shares of the image's sides, rendered by another version of PIL and "
        "torchvision; this loader cannot make the same pixels"
    )
    _in_half = False

    @staticmethod
    def recognises(path: Path) -> bool:
        try:
            return any(name.endswith("data.pkl") for name in unzip(read_file(path, LIMIT)))
        except (InputError, OSError):
            return False

    def read(self, file: Path) -> Iterator[Records]:
        arrays = read_torch_arrays(read_file(file, LIMIT))
        if len(arrays) != 3:
            raise InputError(f"it has {len(arrays)} arrays, not coords, flip and label")
        coords, flip, label = arrays
        count = len(label) if label.ndim else 0
        if coords.shape != (count, 4) or flip.shape != (count,) or not count:
            raise InputError(
                f"coords {coords.shape}, flip {flip.shape} and label {label.shape} are not those "
                f"of the same views"
            )
        if flip.dtype != bool or not ((coords >= 0) & (coords <= 1)).all():
            raise InputError("coords are not in [0, 1], or flip is not true or false")
        from torch import from_numpy

        tensors = {"coords": from_numpy(coords), "flip": from_numpy(flip), **self._label(label)}
        key = file.relative_to(self.path) if file != self.path else Path(file.name)
        named = {name: tensor[None] for name, tensor in tensors.items()}
        yield Records([printable(key.with_suffix(""))], named, {}, count)

    def rows(self) -> list[tuple[str, str]]:
        rows = [("not stored", "label type, temperature and teacher")]
        if self._in_half:
            rows.append(("rounded", f"ids in float16, exact up to {_EXACT}"))
        return rows

    def _label(self, label: np.ndarray) -> dict[str, Tensor]:
        """Class ids int32 [V], or [V, K] with probabilities."""
        from torch import from_numpy

        self._in_half |= label.dtype == np.float16
        if label.ndim == 1:
            return {"label": from_numpy(class_ids(label))}
        if label.ndim == 2:
            label = label[..., None]
        if label.ndim != 3 or label.shape[1] != 2:
            raise InputError(f"a label of shape {label.shape}, not [V], [V, 2] or [V, 2, K]")
        ids, probs = class_ids(label[:, 0]), np.ascontiguousarray(label[:, 1])
        # float16 may have made two ids of one value
        wrong = ~are_top_k(ids, probs, distinct=not self._in_half)
        if wrong.any():
            raise InputError(f"view {wrong.argmax()} has no different ids with probabilities")
        return {"ids": from_numpy(ids), "probs": from_numpy(probs)}


def class_ids(values: np.ndarray) -> np.ndarray:
    """Whole numbers of any dtype as int32 of the same shape."""
    wide = values.astype(np.float64)
    if not ((wide >= 0) & (wide < 2**31) & (wide == np.floor(wide))).all():  # NaN: false
        raise InputError("a label has class ids that are no whole numbers from 0 on")
    return wide.astype(np.int32)


def are_top_k(ids: np.ndarray, probs: np.ndarray, distinct: bool = True) -> np.ndarray:
    """[n]: whether rows [n, K] are different ids with probabilities."""
    wide = probs.astype(np.float64)
    right = ((wide >= 0) & (wide <= 1.001)).all(axis=1) & (wide.sum(axis=1) < 1.01)  # NaN: false
    if distinct:
        right &= (np.diff(np.sort(ids, axis=1), axis=1) > 0).all(axis=1)
    return right
