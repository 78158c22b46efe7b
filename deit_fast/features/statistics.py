"""Statistics of the features in a cache: measured once, stored beside the features, never refitted.

Mean, deviation and PHI-S rotation of each channel, and the projection to fewer channels. A rotation
made of eigenvectors is no function of the data alone: signs are free, axes of equal variance are
arbitrary, and LAPACKs differ. A target that was rotated otherwise is another target. So training
reads the stored matrices, and their SHA-256 is part of the cache's fingerprint.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deit_fast.errors import CacheError, InputError, RowError, printable
from deit_fast.features.hadamard import hadamard, has_hadamard
from deit_fast.runtime.files import open_regular
from deit_fast.runtime.tensor_files import digest_tensors, parse_tensors, save_tensors

log = logging.getLogger("deit_fast")

FILE = "statistics.safetensors"
TOKENS_OF_VIEW = 16
"""Most tokens of one view that a fit reads; more tokens of it say little that is new."""
DEAD_SHARE = 1e-3
"""A channel whose deviation is below this share of the median deviation is dead."""
REDUCTIONS = ("none", "pca", "random")

_CHUNK = 1024  # tokens merged at once
_FEW = 4  # tokens for each channel below which the rotation is rough
_NOUN = "statistics"
_REMEDY = "write this cache again"


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Statistics of features of D' channels, on the CPU.

    ``reduce`` makes D' channels of the teacher's D; without a projection D' is D. All the others
    are statistics of the D' channels.

    Attributes:
        mean: float64 [D'].
        std: float64 [D'], the standard deviation (divisor M - 1).
        phi: root of the mean variance of all channels, above 0.
        rotation: float32 [D', D'], orthonormal. PHI-S is z = (x - mean) @ rotation.T / phi
            (Ranzinger et al. 2024, arXiv 2410.01680): each channel of z has variance 1, and
            distances are those of x over phi. None where ``has_hadamard(D')`` is False.
        reduce_mean: float64 [D], subtracted before the projection; None: nothing is.
        reduce_matrix: float32 [D, D'] of orthonormal columns; None: no projection.
        count: number of tokens M measured.
    """

    mean: Tensor
    std: Tensor
    phi: float
    rotation: Tensor | None
    reduce_mean: Tensor | None
    reduce_matrix: Tensor | None
    count: int

    @property
    def width(self) -> int:
        """Number of channels D' of the features that are stored."""
        return len(self.mean)

    @property
    def floor(self) -> float:
        """Deviation below which a channel is dead: 1e-3 of the median of those above 0."""
        return DEAD_SHARE * float(self.std[self.std > 0].median())

    @property
    def dead(self) -> int:
        """Number of dead channels, whose features hardly vary."""
        return int((self.std < self.floor).sum())

    @property
    def scale(self) -> Tensor:
        """What standardised features are divided by, float64 [D']: std, at least ``floor``."""
        return self.std.clamp_min(self.floor)

    @property
    def sha256(self) -> str:
        """Of names, dtypes, shapes and bytes of all tensors."""
        return digest_tensors(self._tensors())

    def reduce(self, x: Tensor) -> Tensor:
        """Project features to the channels that are stored.

        The product is made in float64 and rounded once, so that the result hardly depends on how
        many tokens are projected together.

        Args:
            x: float [..., D].

        Returns:
            float32 [..., D'] on the device of ``x``; without a projection ``x`` as float32.
        """
        if self.reduce_matrix is None:
            return x.float()
        with torch.autocast(x.device.type, enabled=False):
            wide = x.double()
            if self.reduce_mean is not None:
                wide = wide - self.reduce_mean.to(x.device)
            return (wide @ self.reduce_matrix.to(x.device).double()).float()

    def save(self, path: Path) -> None:
        """Write the statistics, atomically and with a checksum.

        Raises:
            OSError: names ``path``, where the old file stays.
        """
        save_tensors(path, self._tensors(), {})

    def create(self, path: Path) -> None:
        """As ``save``, but a file that is there stays: of several processes, the first one writes.

        Raises:
            OSError: names ``path``.
        """
        save_tensors(path, self._tensors(), {}, is_new=True)

    @classmethod
    def load(cls, path: Path, width: int, sha256: str | None = None) -> FeatureStatistics:
        """Read what ``save`` wrote; nothing in the file is trusted.

        Args:
            width: number of channels D' of the cache.
            sha256: what ``sha256`` must be, as the cache's manifest says; None: not compared.

        Raises:
            CacheError: the file is missing or damaged, is not made of such statistics, or is of
                another fit.
        """
        try:
            with open_regular(path) as file:
                content = file.read()
        except FileNotFoundError:
            raise CacheError(f"{_NOUN} {printable(path)} are missing: {_REMEDY}") from None
        except InputError as error:
            raise CacheError(f"{error}; {_REMEDY}") from None
        return cls.parse(content, str(path), width, sha256)

    @classmethod
    def parse(
        cls,
        content: bytes,
        where: str,
        width: int,
        sha256: str | None = None,
        remedy: str = _REMEDY,
    ) -> FeatureStatistics:
        """As ``load`` of a file with this content.

        Args:
            where: names it in messages.
            remedy: at their end.
        """
        try:
            tensors = parse_tensors(content, where, _NOUN)
        except InputError as error:
            raise CacheError(f"{error}; {remedy}") from None
        try:
            found = cls._from_tensors(tensors, width)
        except ValueError as error:
            raise CacheError(f"{_NOUN} {printable(where)}: {error}; {remedy}") from None
        if sha256 not in (None, found.sha256):
            raise CacheError(
                f"{_NOUN} {printable(where)} are not those that the cache was written with "
                f"(SHA-256 {found.sha256[:12]}, in its manifest {printable(sha256)[:12]}); {remedy}"
            )
        return found

    def _tensors(self) -> dict[str, Tensor]:
        named = {
            "mean": self.mean, "std": self.std,
            "phi": torch.tensor([self.phi], dtype=torch.float64), "rotation": self.rotation,
            "reduce_mean": self.reduce_mean, "reduce_matrix": self.reduce_matrix,
            "count": torch.tensor([self.count]),
        }  # fmt: skip
        return {name: value for name, value in named.items() if value is not None}

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], width: int) -> FeatureStatistics:
        """
        Raises:
            ValueError: says what is wrong.
        """
        wide = tensors["reduce_matrix"].shape[:1] if "reduce_matrix" in tensors else (width,)
        shapes = {
            "mean": (width,), "std": (width,), "phi": (1,), "rotation": (width, width),
            "reduce_mean": (*wide,), "reduce_matrix": (*wide, width), "count": (1,),
        }  # fmt: skip
        dtypes = {
            "rotation": torch.float32, "reduce_matrix": torch.float32, "count": torch.int64
        }  # fmt: skip
        optional = {"rotation", "reduce_mean", "reduce_matrix"}
        if missing := sorted(shapes.keys() - optional - tensors.keys()):
            raise ValueError(f"{missing[0]} is not there")
        if "reduce_mean" in tensors and "reduce_matrix" not in tensors:
            raise ValueError("reduce_mean is there without reduce_matrix")
        for name, value in sorted(tensors.items()):
            if name not in shapes:
                raise ValueError(f"unknown tensor {printable(name)}")
            dtype = dtypes.get(name, torch.float64)
            if tuple(value.shape) != shapes[name] or value.dtype != dtype:
                raise ValueError(
                    f"{name} is {value.dtype} {list(value.shape)}, not {dtype} {list(shapes[name])}"
                )
            if not value.isfinite().all():
                raise ValueError(f"{name} is not finite")
        std, phi, count = tensors["std"], float(tensors["phi"]), int(tensors["count"])
        if (std < 0).any() or not (std > 0).any() or not phi > 0 or count < 2:
            raise ValueError("std or phi is not positive")
        for name in ("rotation", "reduce_matrix"):
            if name in tensors and not _is_orthonormal(tensors[name]):
                raise ValueError(f"the columns of {name} are not orthonormal")
        kept = {name: tensors.get(name) for name in optional}
        return cls(mean=tensors["mean"], std=std, phi=phi, count=count, **kept)


def _is_orthonormal(matrix: Tensor) -> bool:
    """Whether a product with fixed vectors keeps their lengths; cheaper than all pairs."""
    generator = np.random.Generator(np.random.Philox(0))
    vectors = torch.from_numpy(generator.standard_normal((8, matrix.shape[1])))
    ratio = (vectors @ matrix.T.double()).norm(dim=1) / vectors.norm(dim=1)
    return bool(((ratio - 1).abs() < 1e-3).all())


def read_statistics(folder: Path, manifest: dict[str, Any]) -> FeatureStatistics:
    """The statistics of a feature cache.

    Raises:
        CacheError: they are missing, damaged or of another cache.
    """
    return FeatureStatistics.load(folder / FILE, *_expected(manifest))


def check_statistics(content: bytes, where: str, manifest: dict[str, Any], remedy: str) -> None:
    """Whether the content of a file is what ``read_statistics`` accepts.

    Raises:
        CacheError: it is not; names ``where``, and ends with ``remedy``.
    """
    FeatureStatistics.parse(content, where, *_expected(manifest), remedy)


def _expected(manifest: dict[str, Any]) -> tuple[int, str]:
    """Width and SHA-256 of the statistics of a cache."""
    digest = manifest["fingerprint"].get("statistics.sha256")
    return manifest["codec"]["width"], str(digest)


class StatisticsFit:
    """Measures features, view by view.

    Sums are float64 and are merged by the formula of Chan, Golub and LeVeque (1979), in chunks of
    1,024 tokens: how the views were split into batches has no influence. Of each view 16 tokens at
    most are read, which move on by one token from view to view, so that all positions count.

    Args:
        width: number of channels D of the teacher.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.views = self.count = 0
        self._mean = torch.zeros(width, dtype=torch.float64)
        self._squares = torch.zeros(width, width, dtype=torch.float64)  # centred
        self._waiting: list[Tensor] = []
        self._waiting_tokens = 0

    def add(self, features: Tensor) -> None:
        """Read features of the next views.

        Args:
            features: float [n, T, D], before any reduction.

        Raises:
            RowError: a view whose features are not finite.
            InputError: another shape.
        """
        if features.dim() != 3 or features.shape[2] != self.width:
            raise InputError(
                f"features must be [views, tokens, {self.width}], not {list(features.shape)}"
            )
        if bad := (~features.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
            raise RowError(bad[0], "its features are not finite")
        views, tokens = features.shape[:2]
        taken = min(tokens, TOKENS_OF_VIEW)
        steps = torch.arange(taken) * tokens // taken
        starts = torch.arange(self.views, self.views + views)
        chosen = (steps + starts[:, None]) % tokens  # [n, taken]
        rows = torch.arange(views)[:, None].expand_as(chosen)
        device = features.device
        picked = features.detach()[rows.to(device), chosen.to(device)]
        self._waiting.append(picked.flatten(0, 1).cpu().double())
        self._waiting_tokens += views * taken
        self.views += views
        while self._waiting_tokens >= _CHUNK:
            waiting = torch.cat(self._waiting)
            self._merge(waiting[:_CHUNK])
            self._waiting, self._waiting_tokens = [waiting[_CHUNK:]], len(waiting) - _CHUNK

    def _merge(self, x: Tensor) -> None:
        count = self.count + len(x)
        mean = x.mean(0)
        centred = x - mean
        shift = mean - self._mean
        self._squares += centred.T @ centred
        self._squares += torch.outer(shift, shift) * (self.count * len(x) / count)
        self._mean += shift * (len(x) / count)
        self.count = count

    def result(
        self, reduce: str = "none", dim: int | None = None, seed: int = 0
    ) -> FeatureStatistics:
        """The statistics of all features so far, those of the channels that ``reduce`` leaves.

        Args:
            reduce: "pca" projects on the axes of largest variance, after the mean was subtracted;
                "random" on random orthonormal axes, which keeps inner products on average.
                The random axes come from Philox and a QR factorisation, whose last bits differ
                between machines: they are stored like the others, never made again.
            dim: number of channels D' after the projection.
            seed: of the random axes.

        Raises:
            InputError: too few tokens, features without any variance, or a ``dim`` that is missing
                or too large.
        """
        if self._waiting_tokens:
            self._merge(torch.cat(self._waiting))
            self._waiting, self._waiting_tokens = [], 0
        if self.count < 2:
            raise InputError(
                f"statistics need features of two tokens or more, not {self.count}: raise "
                f"features.fit_views"
            )
        mean, covariance = self._mean.clone(), self._squares / (self.count - 1)
        if not float(covariance.diagonal().sum()) > 0:
            raise InputError(
                f"the teacher's features of {self.views} views are all equal: it does not look at "
                f"the images, or its weights are damaged"
            )
        reduce_mean = reduce_matrix = None
        if reduce != "none":
            reduce_matrix = self._projection(covariance, reduce, dim, seed)
            wide = reduce_matrix.double()
            if reduce == "pca":
                reduce_mean, mean = mean, torch.zeros(wide.shape[1], dtype=torch.float64)
            else:
                mean = mean @ wide
            covariance = wide.T @ covariance @ wide
        width = len(mean)
        variances = covariance.diagonal().clamp_min(0)
        rotation = None
        if has_hadamard(width):
            if self.count < _FEW * width:
                log.warning(
                    "statistics: %d tokens for %d channels: PHI-S is rough below %d tokens; raise "
                    "features.fit_views", self.count, width, _FEW * width,
                )  # fmt: skip
            axes = _principal_axes(covariance)
            signs = torch.from_numpy(hadamard(width).astype(np.float64))
            rotation = (signs @ axes.T / math.sqrt(width)).float()
        return FeatureStatistics(
            mean=mean, std=variances.sqrt(), phi=math.sqrt(float(variances.mean())),
            rotation=rotation, reduce_mean=reduce_mean, reduce_matrix=reduce_matrix,
            count=self.count,
        )  # fmt: skip

    def _projection(self, covariance: Tensor, reduce: str, dim: int | None, seed: int) -> Tensor:
        """float32 [D, dim] of orthonormal columns."""
        if reduce not in REDUCTIONS:
            raise InputError(f"features.reduce must be one of {', '.join(REDUCTIONS)}")
        if dim is None:
            raise InputError(f"features.reduce={reduce} needs features.dim, the number of channels")
        if not 1 <= dim <= self.width:
            raise InputError(
                f"features.dim={dim} must lie in [1, {self.width}], the teacher's channels"
            )
        if reduce == "pca":
            if dim >= self.count:
                raise InputError(
                    f"features.dim={dim} needs features of more than {dim} tokens, not "
                    f"{self.count}: raise features.fit_views"
                )
            return _principal_axes(covariance)[:, :dim].float().contiguous()
        generator = np.random.Generator(np.random.Philox(seed))
        axes, _ = np.linalg.qr(generator.standard_normal((self.width, dim)))
        return _with_fixed_signs(torch.from_numpy(axes)).float()


def _principal_axes(covariance: Tensor) -> Tensor:
    """Eigenvectors as columns, that of the largest eigenvalue first, float64 [D, D]."""
    return _with_fixed_signs(torch.linalg.eigh(covariance)[1].flip(1))


def _with_fixed_signs(columns: Tensor) -> Tensor:
    """Columns whose largest entry is positive."""
    largest = columns.abs().argmax(0, keepdim=True)
    return columns * columns.gather(0, largest).sign()
