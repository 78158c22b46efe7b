"""Types of the compiled extension; csrc/bindings.cpp."""

from collections.abc import Callable
from enum import Enum

import numpy as np
from typing_extensions import Buffer

with_cuda: bool

class FormatError(ValueError): ...
class IdError(ValueError): ...

class BlockState(Enum):
    pending = ...
    complete = ...
    broken = ...

class Committed(Enum):
    written = ...
    kept = ...
    kept_others = ...

class ViewSpec:
    def __init__(
        self,
        *,
        num_records: int,
        record_bytes: int,
        block_records: int,
        view_id: int,
        ids_per_record: int,
        id_bytes: int,
        id_limit: int,
        manifest_sha256: bytes,
        version: int,
    ) -> None: ...
    @property
    def blocks(self) -> int: ...
    @property
    def file_bytes(self) -> int: ...
    @property
    def data_offset(self) -> int: ...

class ViewFile:
    def __init__(self, path: str, spec: ViewSpec) -> None: ...
    def table_states(self) -> list[BlockState]: ...
    def first_incomplete(self) -> int | None: ...
    def check_block(self, block: int) -> tuple[BlockState, str]: ...

class ViewWriter(ViewFile):
    def __init__(self, path: str, temporary: str, spec: ViewSpec, reserve: bool = True) -> None: ...
    def commit(self, block: int, data: int, size: int) -> Committed: ...
    def sync(self) -> None: ...

class ViewReader(ViewFile):
    def __init__(self, path: str, spec: ViewSpec, is_growing: bool = False) -> None: ...
    def will_need(self, block: int) -> None: ...
    def read_block(self, block: int) -> None: ...

def crc32c(data: Buffer, crc: int = 0) -> int: ...
def crc32c_table(data: Buffer, crc: int = 0) -> int: ...
def crc32c_hardware(data: Buffer, crc: int = 0) -> int: ...
def crc32c_has_hardware() -> bool: ...

class RecordKind(Enum):
    copy = ...
    hard = ...
    topk = ...
    int8 = ...
    fp8 = ...
    token_int8 = ...
    token_fp8 = ...

class RecordLayout:
    def __init__(
        self,
        kind: RecordKind,
        *,
        record_bytes: int,
        num_classes: int,
        id_bytes: int = 2,
        k: int = 0,
        tail_offset: int = 0,
        tau: float = 1.0,
        tokens: int = 1,
    ) -> None: ...

class CacheViews:
    def __init__(self, num_samples: int, open: Callable[[int], ViewReader], limit: int) -> None: ...
    def gather(
        self,
        samples: np.ndarray,
        view_ids: np.ndarray,
        layout: RecordLayout,
        outputs: list[int],
    ) -> None: ...
    def unread_blocks(
        self, samples: np.ndarray, view_ids: np.ndarray
    ) -> list[tuple[ViewReader, int]]: ...
    def will_need(self, samples: np.ndarray, view_ids: np.ndarray) -> int: ...

def decode_records(layout: RecordLayout, records: int, count: int, outputs: list[int]) -> None: ...
def encode_topk(
    num_classes: int,
    k: int,
    id_bytes: int,
    inverse_temperatures: list[float],
    logits: int,
    count: int,
    records: int,
) -> int: ...
def draw_tails(
    num_classes: int,
    k: int,
    draws: int,
    inverse_temperatures: list[float],
    logits: int,
    heads: int,
    words: int,
    count: int,
    ids: int,
) -> None: ...
def crop_resize(
    pixels: int,
    row_bytes: int,
    box: tuple[int, int, int, int],
    out_width: int,
    out_height: int,
    out: int,
) -> None: ...
def decode_records_cuda(
    layout: RecordLayout, records: int, count: int, outputs: list[int], device: int, stream: int
) -> None: ...
def encode_topk_cuda(
    num_classes: int,
    k: int,
    id_bytes: int,
    inverse_temperatures: list[float],
    logits: int,
    dtype: int,
    count: int,
    records: int,
    first_bad: int,
    device: int,
    stream: int,
) -> None: ...
