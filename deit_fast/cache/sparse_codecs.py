"""Codecs of logits that store some classes: `hard`, `topk`, `sampled`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deit_fast import _C
from deit_fast.cache.codec_base import (
    LogitCodec,
    finite_float32,
    id_bytes,
    id_bytes_of,
    ids_of,
    require_logits,
)
from deit_fast.cache.sampled import ViewKeys, draw_tails, sampled_form
from deit_fast.errors import CacheError, InputError, RowError

if TYPE_CHECKING:
    from torch import Tensor

    from deit_fast.kernels.distillation_loss import TopK

_CUDA_LIMITS = (1023, 8)  # k and temperatures that csrc/cuda/record_codec.cu takes
# FloatType in csrc/cuda, by torch's names
_CUDA_FLOATS = {"torch.float32": 0, "torch.bfloat16": 1, "torch.float16": 2}


@dataclass(frozen=True)
class HardCodec(LogitCodec):
    """The teacher's argmax: 2 bytes a record, 4 above 65,536 classes. Exact; ties: lowest id."""

    name = "hard"
    kind = _C.RecordKind.hard

    @property
    def ids_per_record(self) -> int:
        return 1

    @property
    def record_bytes(self) -> int:
        return id_bytes(self.num_classes)

    def encode(self, logits: Tensor, keys: ViewKeys | None = None) -> Tensor:
        largest = finite_float32(logits, self.num_classes).argmax(1)
        return id_bytes_of(largest.int()[:, None], self.num_classes)

    def decode(self, records: Tensor, tau: float) -> Tensor:
        return ids_of(records, self.num_classes)[:, 0].long()

    def outputs(self, count: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Class ids."""
        return (((count,), "int64"),)


@dataclass(frozen=True)
class TopKCodec(LogitCodec):
    """The k most probable classes and the exact mass of all others.

    Bytes: k class ids of 2 bytes (4 above 65,536 classes), k log-probabilities of 2, a log tail
    mass and a log normaliser of 4 each per temperature: 72 at k=16 and one temperature.

    Order: descending logit (as float32), ties by ascending id. A log-probability is
    z_i - logsumexp(z), rounded to float16; below -65504 it is stored as -65504. The log tail mass
    at T is log(sum outside the ids of exp(z/T) / sum of exp(z/T)), summed over the outside itself
    rather than as 1 - inside, rounded to float32; -inf for k = C. The log normaliser at T is
    logsumexp(l/T) of the log-probabilities as stored, less the log of their true mass at T, so that
    decoding is one product and one subtraction, and ids and tail together have mass one.

    csrc/topk_encode.h computes all that in float64 with IEEE operations in a fixed order, and the
    sums as integers of 2^-44: CPU and CUDA give the same bytes, whatever the batch. A sum's
    relative error is below C * 2^-44, under 2e-8 at 262,144 classes, the most it takes.

    Error at a recorded T, with l the true log-probabilities of the ids at T=1 and
    L = max |l|: |log p_i(T) - true| <= L / (1024 T) + 1e-5 (float16 rounds by at most
    L / 2048, and normalising adds no more than that again). The tail's relative error is below
    1e-6 of max(1, |log tail|).

    Attributes:
        true_class: records end with the true class's log-probability, float32. Caches of earlier
            versions may have it; it is skipped when read and no longer written.
    """

    k: int
    temperatures: tuple[float, ...]
    true_class: bool = False

    name = "topk"
    kind = _C.RecordKind.topk

    @property
    def record_bytes(self) -> int:
        return self._tail_offset + 8 * len(self.temperatures) + 4 * self.true_class

    @property
    def ids_per_record(self) -> int:
        return self.k

    @property
    def first_temperature(self) -> float:
        return self.temperatures[0]

    @property
    def _tail_offset(self) -> int:
        return self.k * (id_bytes(self.num_classes) + 2)

    def manifest(self) -> dict[str, Any]:
        values = super().manifest() | {"k": self.k, "temperatures": list(self.temperatures)}
        return values | ({"true_class": True} if self.true_class else {})

    def encode(self, logits: Tensor, keys: ViewKeys | None = None) -> Tensor:
        """On CUDA a kernel on the current stream; checking for values that are not finite then
        waits for it."""
        import torch

        require_logits(logits, self.num_classes)
        z = logits.detach()
        on_cuda = (
            z.is_cuda
            and _C.with_cuda
            and self.k <= _CUDA_LIMITS[0]
            and len(self.temperatures) <= _CUDA_LIMITS[1]
        )
        if not on_cuda:
            z = z.cpu().float()
        elif str(z.dtype) not in _CUDA_FLOATS:
            z = z.float()
        z = z.contiguous()
        size = self.record_bytes - 4 * self.true_class
        records = torch.empty((len(z), size), dtype=torch.uint8, device=z.device)
        arguments = (
            self.num_classes,
            self.k,
            id_bytes(self.num_classes),
            [1.0 / tau for tau in self.temperatures],
            z.data_ptr(),
        )
        if on_cuda:
            first = torch.full((1,), len(z), dtype=torch.int64, device=z.device)
            stream = torch.cuda.current_stream(z.device).cuda_stream
            with torch.cuda.device(z.device):
                _C.encode_topk_cuda(
                    *arguments, _CUDA_FLOATS[str(z.dtype)], len(z), records.data_ptr(),
                    first.data_ptr(), z.get_device(), stream,
                )  # fmt: skip
            found = int(first)
            bad = found if found < len(z) else -1
        else:
            bad = _C.encode_topk(*arguments, len(z), records.data_ptr())
        if bad >= 0:
            value = logits[bad][~torch.isfinite(z[bad]).to(logits.device)][0].item()
            raise RowError(bad, f"teacher logit {value:g} is not finite")
        records = torch.nn.functional.pad(records, (0, self.record_bytes - size))
        return records.to(logits.device)

    def layout(self, tau: float) -> _C.RecordLayout:
        """With l_i stored at T=1 and c the normaliser at tau, log p_i(tau) = l_i / tau - c."""
        offset = self._tail_offset + 8 * self._temperature_index(tau)
        return self._layout(k=self.k, tail_offset=offset, tau=tau)

    def outputs(self, count: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Class ids, log-probabilities, log tail mass."""
        return ((count, self.k), "int32"), ((count, self.k), "float32"), ((count,), "float32")

    def form(self, outputs: tuple[Tensor, ...], tau: float) -> TopK:
        from deit_fast.kernels.distillation_loss import TopK

        ids, log_probs, log_tail = outputs
        return TopK(ids, log_probs, log_tail)

    def _temperature_index(self, tau: float) -> int:
        for index, recorded in enumerate(self.temperatures):
            if math.isclose(recorded, tau, rel_tol=1e-12):
                return index
        known = ", ".join(f"{value:g}" for value in self.temperatures)
        raise CacheError(f"the cache has no tail mass at temperature {tau:g}; recorded: {known}")


@dataclass(frozen=True)
class SampledCodec(LogitCodec):
    """An exact head of the k most probable classes, and draws of the others: the expectation of the
    soft loss's gradient over views is that of all logits. k = 0 samples all classes, as "Sparse
    Logit Sampling" does (arXiv 2503.16870).

    The draws are with replacement, by the teacher's probabilities outside the head. A drawn class
    stands for 1 / draws of the tail's mass, so head and draws have mass one. Each temperature has
    draws of its own, made by the same random words, which are a function of seed, sample and view.

    Bytes: class ids of 2 bytes (4 above 65,536 classes): k of the head and, for each temperature,
    the draws; k log-probabilities of 2; a log tail mass and a log normaliser of 4 each per
    temperature: 48 at k=6 and 8 draws. For k = 0: the id of the most probable class and the draws.

    Error: the head and the tail mass have that of `topk`. The draws have no bias beyond it, but
    variance. A draw is frozen with its view: only distinct views average it out. A class that was
    drawn often may outweigh the most probable one: hard distillation takes ``decisions``.
    """

    k: int
    draws: int
    temperatures: tuple[float, ...]

    name = "sampled"
    kind = _C.RecordKind.copy

    @property
    def record_bytes(self) -> int:
        ids = self.ids_per_record * id_bytes(self.num_classes)
        return ids + (2 * self.k + 8 * len(self.temperatures) if self.k else 0)

    @property
    def ids_per_record(self) -> int:
        return self._head.k + self.draws * len(self.temperatures)

    @property
    def first_temperature(self) -> float:
        return self.temperatures[0]

    @property
    def _head(self) -> TopKCodec:
        """Of the exact part; for k = 0 of the record's first id."""
        return TopKCodec(self.num_classes, max(1, self.k), self.temperatures)

    def manifest(self) -> dict[str, Any]:
        values = {"k": self.k, "draws": self.draws, "temperatures": list(self.temperatures)}
        return super().manifest() | values

    def encode(self, logits: Tensor, keys: ViewKeys | None = None) -> Tensor:
        """On the host, also of logits on CUDA."""
        import torch

        if keys is None:
            raise InputError("codec sampled needs to know which views the logits are of")
        head = self._head.encode(logits).cpu()
        ids, rest = head.split([self._head_bytes, head.shape[1] - self._head_bytes], 1)
        heads = ids_of(ids, self.num_classes)[:, : self.k]
        z = logits.detach().cpu().float()
        draws = draw_tails(z, heads, self.temperatures, keys.words(self.draws))
        parts = [ids, id_bytes_of(draws.flatten(1), self.num_classes)]
        return torch.cat([*parts, rest] if self.k else parts, 1).to(logits.device)

    @property
    def _head_bytes(self) -> int:
        return self._head.k * id_bytes(self.num_classes)

    def decode(self, records: Tensor, tau: float) -> TopK:
        return self.form((records,), tau)

    def layout(self, tau: float) -> _C.RecordLayout:
        self._head.layout(tau)  # raises where nothing is recorded at tau
        return super().layout(tau)

    def outputs(self, count: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """The records themselves."""
        return (((count, self.record_bytes), "uint8"),)

    def form(self, outputs: tuple[Tensor, ...], tau: float) -> TopK:
        """A TopK of k + draws classes, with the tail mode "drop"."""
        import torch

        from deit_fast.kernels.distillation_loss import TopK

        records, size = outputs[0], self.draws * id_bytes(self.num_classes)
        start = self._head_bytes
        at = start + size * self._head._temperature_index(tau)
        draws = ids_of(records[:, at : at + size], self.num_classes)
        if self.k:
            rest = records[:, start + size * len(self.temperatures) :]
            head = self._head.decode(torch.cat([records[:, :start], rest], 1), tau)
        else:
            none = torch.empty((len(records), 0), device=records.device)
            head = TopK(none.int(), none, none.sum(1))
        return sampled_form(head, draws)

    def decisions(self, records: Tensor) -> Tensor:
        """The teacher's classes, int64 [n], from uint8 [n, record_bytes]."""
        return ids_of(records[:, : id_bytes(self.num_classes)], self.num_classes)[:, 0].long()
