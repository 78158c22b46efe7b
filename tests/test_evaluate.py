"""Accuracy on held-out images, compared with direct counting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from deit_fast.data.eval import Normalise
from deit_fast.errors import InputError
from deit_fast.evaluation import Evaluated, evaluate_model, evaluate_models, evaluation_text
from helpers.like_cuda import CudaDivision

CPU = torch.device("cpu")
CLASSES = ["cat", "dog", "eel", "fox"]


class PixelLogits(nn.Module):
    """Returns the first four pixels of an image as logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :4]


class Operators(TorchDispatchMode):
    """Names of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


def batches(sizes: tuple[int, ...], classes: int = 4) -> list[tuple[Tensor, Tensor, None]]:
    return [(torch.randn(size, 3, 2, 2), torch.randint(classes, (size,)), None) for size in sizes]


def test_results_equal_direct_counts() -> None:
    data = batches((7, 7, 5), classes=3)  # no fox
    labels = torch.cat([labels for _, labels, _ in data])
    logits = torch.cat([images.flatten(1)[:, :4] for images, _, _ in data])
    model = PixelLogits().train()
    found = evaluate_model(model, data, CLASSES, CPU)
    right = logits.argmax(1) == labels
    assert found["samples"] == 19 and found["top1"] == pytest.approx(right.float().mean().item())
    assert found["loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-6)
    assert found["per_class"] == {
        name: pytest.approx(right[labels == label].float().mean().item())
        for label, name in enumerate(CLASSES[:3])
    }
    assert model.training and not {"top1_distill", "top5"} & found.keys()


def test_top5_counts_where_there_are_more_than_five_classes() -> None:
    """Twelve pixels are the logits of twelve classes; five would always be among five."""
    data = [(torch.randn(40, 3, 2, 2), torch.randint(12, (40,)), None)]
    (images, labels, _), model = data[0], nn.Flatten()
    found = evaluate_model(model, data, [f"class {i}" for i in range(12)], CPU)
    ranks = images.flatten(1).argsort(1, descending=True).argsort(1)
    among = ranks.gather(1, labels[:, None]) < 5
    assert 0.2 < found["top5"] < 0.7 and found["top5"] == pytest.approx(among.float().mean().item())
    assert evaluation_text(found | {"top1": 0.5, "top1_class": 0.25, "ema_top1": 1.0}) == (
        f"top-1 50.00 % (class 25.00 %, average 100.00 %)  top-5 {100 * found['top5']:.2f} %  "
        f"loss {found['loss']:.4f}"
    )


def test_the_last_batch_is_padded_for_compiled_code() -> None:
    data, sizes = batches((7, 7, 5)), []

    def forward(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(images))
        logits = model(images)
        return logits, -logits

    plain = evaluate_model(PixelLogits(), data, CLASSES, CPU, forward=forward)
    assert sizes == [7, 7, 5] and plain["samples"] == 19
    padded = evaluate_model(PixelLogits(), data, CLASSES, CPU, forward=forward, rows=7)
    assert sizes[3:] == [7, 7, 7]
    assert padded == plain and "top1_distill" in plain


def test_models_that_share_a_pass_get_the_results_of_their_own() -> None:
    """Also beside one that writes into its images, which each model has for itself."""

    class Writes(PixelLogits):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.mul_(-1.0))

    def both(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(images)
        return logits, logits.flip(1)

    class Loader:
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            return iter([(images.clone(), labels, ids) for images, labels, ids in data])

    data = batches((7, 7, 5))
    loader = Loader()
    models = [
        Evaluated(Writes().train()),
        Evaluated(PixelLogits(), both),
        Evaluated(Writes(), both, rows=7),
        Evaluated(PixelLogits()),
    ]
    found = evaluate_models(models, loader, CLASSES, CPU)
    assert loader.passes == 1 and models[0].model.training
    for each, result in zip(models, found, strict=True):
        alone = evaluate_model(
            each.model, loader, CLASSES, CPU, forward=each.forward, rows=each.rows
        )
        assert alone == result
    assert len({result["loss"] for result in found}) == len(models)


def test_batches_do_not_wait_for_the_device() -> None:
    """No operator needs the size or value of a result on the host, as bincount would."""
    between: list[set[str]] = []
    with Operators() as operators:
        evaluate_model(
            PixelLogits(), batches((4, 4)), CLASSES, CPU,
            between_batches=lambda: between.append(set(operators.seen)),
        )  # fmt: skip
    assert len(between) == 2 and "index_add_" in between[-1]
    assert not between[-1] & {"bincount", "nonzero", "index", "_local_scalar_dense"}
    assert "_local_scalar_dense" in operators.seen  # at the end


def test_no_image_is_an_error() -> None:
    with pytest.raises(InputError, match="evaluation saw no images"):
        evaluate_model(PixelLogits(), [], CLASSES, CPU)


def test_a_gpu_normalises_pixels_to_the_same_bits() -> None:
    """As `Student` on a CPU does, although torch divides by 255 in another way there."""
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(3, 16, 16).permute(1, 2, 0)[None]
    normalise = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "cpu")
    with CudaDivision():
        assert not torch.equal(torch.arange(256.0) / 255, torch.arange(256.0) / torch.tensor(255.0))
        found = normalise(pixels)
    assert torch.equal(found, normalise(pixels))
