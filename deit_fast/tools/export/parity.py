"""Whether an exported student gives the logits of the run's model."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from deit_fast.data.eval import Subset, spaced_ids
from deit_fast.data.open import open_source
from deit_fast.errors import CheckFailed, InputError
from deit_fast.evaluation import build_eval_loader, read_run_config
from deit_fast.prediction import Student
from deit_fast.tools.export.formats import Classifier
from deit_fast.tools.run_folder import folder_of

log = logging.getLogger("deit_fast")

IMAGES = 64
BATCHES = {7: IMAGES, 1: 7}  # size: number of images that go through the model in such batches
# Of the largest logit. A float32 sum of 1000 products in another order differs by about 1e-6 of it.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Parity:
    """How far the logits of an exported student are from those of the run's model.

    Attributes:
        images: number of images compared.
        batch_sizes: of the batches; those of 1 are of the first images alone.
        pixels: what the images were.
        max_difference: largest absolute difference of a logit.
        tolerance: the largest difference accepted.
        max_logit: largest absolute logit of the run's model.
        same_top1: images whose largest logit is that of the same class.
    """

    images: int
    batch_sizes: tuple[int, ...]
    pixels: str
    max_difference: float
    tolerance: float
    max_logit: float
    same_top1: int

    def __str__(self) -> str:
        return (
            f"logits differ by {self.max_difference:.1e} at most, the largest is "
            f"{self.max_logit:.3g}; same top-1 for {self.same_top1} of {self.pixels}"
        )


def sample_images(student: Student) -> tuple[Tensor, str]:
    """Held-out images of the student's run, evenly spaced; noise where they cannot be read.

    Returns:
        Normalised images, float32 [N, 3, S, S] with N at most ``IMAGES``, and what they are.
    """
    try:
        config = read_run_config(folder_of(student.path))
        config = config.replace(batch_size=IMAGES, data={"workers": 0})
        source = open_source(config.data, "val", student.image_size, list(student.classes))
        chosen = Subset(source, spaced_ids(source.num_samples, IMAGES))
        images, _, _ = next(iter(build_eval_loader(config, chosen, student.device)))
    except (InputError, OSError) as error:
        log.warning("the export is compared on noise, not on held-out images: %s", error)
        size = (IMAGES, 3, student.image_size, student.image_size)
        noise = torch.randn(size, generator=torch.Generator().manual_seed(0))
        return noise, f"{IMAGES} images of noise"
    return images, f"{len(images)} held-out images"


@torch.no_grad()
def compare(
    name: str, expected: Tensor, exported: Classifier, images: Tensor, pixels: str
) -> Parity:
    """Compare logits in batches of 7 and of 1, so that the batch axis is tried too.

    Args:
        name: what the message calls the exported student.
        expected: the run's logits of ``images``, float32 [N, C].
        pixels: what the images are.

    Raises:
        CheckFailed: a logit differs by more than the tolerance; or the largest logit is another
            class's, though it exceeds the second by more than all differences.
    """
    largest = expected.abs().max().item()
    tolerance = TOLERANCE * max(1.0, largest)
    difference, same = 0.0, torch.ones(len(images), dtype=torch.bool)
    for size, count in BATCHES.items():
        found = torch.cat([exported(batch) for batch in images[:count].split(size)])
        known = expected[:count]
        if found.shape != known.shape:
            raise CheckFailed(
                f"{name} gives logits {tuple(found.shape)}, the run's model {tuple(known.shape)}: "
                f"nothing is written"
            )
        # A NaN is larger than any tolerance.
        difference = max(difference, (found - known).abs().nan_to_num(torch.inf).max().item())
        same[:count] &= found.argmax(1) == known.argmax(1)
    top = expected.topk(min(2, expected.shape[1])).values
    margin = top[:, 0] - top[:, -1]
    wrong = int((~same & (margin > difference)).sum())
    if difference > tolerance or wrong:
        raise CheckFailed(
            f"{name} differs from the run's model: logits by {difference:.3g} ({tolerance:.3g} is "
            f"accepted), the top-1 class of {int((~same).sum())} of {len(images)} images: nothing "
            f"is written"
        )
    return Parity(
        images=len(images), batch_sizes=tuple(BATCHES), pixels=pixels, max_difference=difference,
        tolerance=tolerance, max_logit=largest, same_top1=int(same.sum()),
    )  # fmt: skip
