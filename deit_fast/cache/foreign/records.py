"""What a reader of another project's files gives, checked in the same way for all formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from deit_fast.errors import InputError, first_line, printable
from deit_fast.runtime.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor


class Records(NamedTuple):
    """Samples that follow one another in a file.

    Attributes:
        keys: their n names.
        tensors: by name, [n, V, ...] on the CPU; V may differ from one `Records` to the next.
        texts: by name, n texts.
        views: augmentations of each sample.
    """

    keys: list[str]
    tensors: dict[str, Tensor]
    texts: dict[str, list[str]]
    views: int


class Damage(NamedTuple):
    """Says which file or member of it cannot be read, and why."""

    text: str


class Foreign(ABC):
    """Files of one format.

    Attributes:
        name: of the format.
        replay: why no run can use its views.
    """

    name: ClassVar[str]
    replay: ClassVar[str]

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path, self.files = path, files

    @abstractmethod
    def read(self, file: Path) -> Iterator[Records | Damage]:
        """The samples of one of ``files``, in its order.

        Raises:
            InputError, OSError: the rest of the file cannot be read.
        """

    def rows(self) -> list[tuple[str, str]]:
        """Further facts of what was read so far: name and text."""
        return []

    def records(self) -> Iterator[Records | Damage]:
        """All samples; those that do not fit the ones before them are damage."""
        kinds: dict[str, str] = {}  # of the first sample
        with Progress("read", len(self.files), unit="file") as bar:
            for file in self.files:
                try:
                    for item in self.read(file):
                        yield item if isinstance(item, Damage) else _checked(item, kinds, file)
                except (InputError, OSError) as error:
                    text, name = printable(first_line(error, 300)), printable(file)
                    yield Damage(text if text.startswith(name) else f"{name}: {text}")
                bar.advance()


def kind_text(tensor: Tensor, views: str) -> str:
    """`float32 [5, 512]`: dtype, and shape of a sample, whose first length is given as a text."""
    shape = ", ".join([views, *map(str, tensor.shape[2:])])
    return f"{str(tensor.dtype).removeprefix('torch.')} [{shape}]"


def _checked(records: Records, kinds: dict[str, str], file: Path) -> Records | Damage:
    """The records, if they have the names, dtypes and shapes of ``kinds``, and are finite."""
    where = f"{printable(file)}: {printable(records.keys[0])}"
    own = {name: kind_text(tensor, "V") for name, tensor in records.tensors.items()}
    kinds.update({} if kinds else own)
    if own != kinds:
        texts = [", ".join(" ".join(item) for item in each.items()) for each in (own, kinds)]
        return Damage(f"{where} has {texts[0]}; the first sample has {texts[1]}")
    for name, tensor in records.tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            return Damage(f"{where}: {name} has {count} values that are not finite")
    return records
