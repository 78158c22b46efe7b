"""What the students of one step share: the images of a batch, and an online teacher's logits."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from deit_fast.config import ViewConfig
from deit_fast.data.ingest import ingest_batch
from deit_fast.training.step_graph import Part

if TYPE_CHECKING:
    from deit_fast.training.teacher import RunTeacher

T = TypeVar("T")


class StepInputs:
    """Makes the inputs of one batch, once for all students that take them in the same form.

    Args:
        kept: whether another student may ask for them. Otherwise each is dropped after its use.
    """

    def __init__(self, kept: bool = False) -> None:
        self._kept: dict[Hashable, Any] | None = {} if kept else None
        self._versions: list[tuple[Tensor, int]] = []  # of images that are kept

    def images(self, part: Part, view: ViewConfig, dtype: torch.dtype, patch: int | None) -> Tensor:
        """As of ``ingest_batch``, of one part of the batch."""

        def make() -> Tensor:
            images = ingest_batch(part.batch, view, dtype, patch)
            if self._kept is not None:
                self._versions.append((images, images._version))
            return images

        return self._once(("images", part.offset, len(part.batch), dtype, patch), make)

    def teacher_outputs(self, part: Part, teacher: RunTeacher, images: Tensor) -> Any:
        """What an online teacher gives for the ``images`` of a part."""
        key = "teacher", part.offset, len(part.batch)
        return self._once(key, lambda: teacher.forward(images))

    @property
    def is_changed(self) -> bool:
        """Whether a model has written into images that other students take too."""
        return any(images._version != version for images, version in self._versions)

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        if self._kept is None:
            return make()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]  # type: ignore[no-any-return]
