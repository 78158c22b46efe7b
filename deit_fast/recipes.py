"""Named, documented run configurations. Each docstring holds command, expected time and accuracy.

Accuracies are those that DeiT's authors published (arXiv 2012.12877, tables 3 and 9, and their
repository); "not run" says that this project has not repeated the run. What differs from DeiT's
recipe: Mixup/CutMix draw lambda per pair of samples instead of per batch (the same law per image).
"""

from __future__ import annotations

from collections.abc import Callable

from deit_fast.config import (
    CodecConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ViewRecipe,
)


def _deit(recipe: str, model: str, kind: str) -> RunConfig:
    """DeiT, table 9: 300 epochs at batch 1024, AdamW 5e-4 * batch / 512, cosine, warm-up 5."""
    return RunConfig(
        recipe=recipe,
        output=f"runs/{recipe}",
        epochs=300,
        batch_size=1024,
        model=ModelConfig(name=model, drop_path=0.1),
        loss=LossConfig(kind=kind, alpha=0.5, tau=1.0, reduction="numel"),  # type: ignore[arg-type]
    )


def deit_tiny() -> RunConfig:
    """DeiT-Ti without distillation.

    Command: deit-fast train --recipe deit_tiny --data.root IMAGENET
    Time: not measured yet. Accuracy: published 72.2 %; not run.
    """
    return _deit("deit_tiny", "deit_tiny_patch16_224", "none")


def deit_small() -> RunConfig:
    """DeiT-S without distillation.

    Command: deit-fast train --recipe deit_small --data.root IMAGENET
    Time: not measured yet. Accuracy: published 79.9 %; not run.
    """
    return _deit("deit_small", "deit_small_patch16_224", "none")


def deit_base() -> RunConfig:
    """DeiT-B without distillation.

    Command: deit-fast train --recipe deit_base --data.root IMAGENET
    Time: not measured yet. Accuracy: published 81.8 %; not run.
    """
    return _deit("deit_base", "deit_base_patch16_224", "none")


def deit_tiny_distilled() -> RunConfig:
    """DeiT-Ti, hard distillation through the distillation token.

    Command: deit-fast precompute --recipe deit_tiny_distilled --data.root IMAGENET
    --teacher timm:regnety_160.deit_in1k --cache CACHE, then
    deit-fast train --recipe deit_tiny_distilled --data.root IMAGENET --cache CACHE
    Time: not measured yet. Accuracy: published 74.5 %; not run.
    """
    return _deit("deit_tiny_distilled", "deit_tiny_distilled_patch16_224", "hard")


def deit_small_distilled() -> RunConfig:
    """DeiT-S, hard distillation through the distillation token.

    Command: as deit_tiny_distilled, with --recipe deit_small_distilled.
    Time: not measured yet. Accuracy: published 81.2 %; not run.
    """
    return _deit("deit_small_distilled", "deit_small_distilled_patch16_224", "hard")


def deit_base_distilled() -> RunConfig:
    """DeiT-B, hard distillation through the distillation token.

    Command: as deit_tiny_distilled, with --recipe deit_base_distilled.
    Time: not measured yet. Accuracy: published 83.4 %; not run.
    """
    return _deit("deit_base_distilled", "deit_base_distilled_patch16_224", "hard")


def deit_small_distilled_soft() -> RunConfig:
    """DeiT-S, soft distillation at the paper's tau 3 and weight 0.1, KL per sample (batchmean).

    Command: as deit_tiny_distilled, with --recipe deit_small_distilled_soft.
    Time: not measured yet. Accuracy: published for usual soft distillation 79.8 %; not run.
    """
    return _deit("deit_small_distilled_soft", "deit_small_distilled_patch16_224", "soft").replace(
        loss={"alpha": 0.1, "tau": 3.0, "reduction": "batchmean"}
    )


def digits_teacher() -> RunConfig:
    """The demo's teacher: a small convolutional network on 16-pixel views, no mixing.

    Command: deit-fast demo
    Time and accuracy: bench/results/cpu/demo-*.json.
    """
    return RunConfig(
        recipe="digits_teacher",
        epochs=30,
        batch_size=64,
        view=_digits_view(mixup_alpha=0.0, cutmix_alpha=0.0, repeats=1),
        model=ModelConfig(name="deit_fast.models.convnet:small_convnet", drop_path=0.0),
        loss=LossConfig(kind="none", smoothing=0.1),
        optim=OptimConfig(lr=2e-3, lr_batch=64, warmup_epochs=2.0, ema_decay=0.0),
        log_every=10,
        eval_every=10,
        save_every=10,
    )


def digits_student() -> RunConfig:
    """The demo's student: a four-block DeiT of width 64 on 16-pixel views, patch 4.

    Command: deit-fast demo
    Time and accuracy: bench/results/cpu/demo-*.json.
    """
    return RunConfig(
        recipe="digits_student",
        epochs=70,
        batch_size=64,
        num_views=30,
        view=_digits_view(),
        model=ModelConfig(
            name="deit_tiny_distilled_patch16_224",
            drop_path=0.0,
            patch_size=4,
            embed_dim=64,
            depth=4,
            num_heads=4,
        ),
        loss=LossConfig(kind="hard", alpha=0.5, tau=1.0, reduction="batchmean"),
        optim=OptimConfig(lr=1e-3, lr_batch=64, warmup_epochs=5.0, ema_decay=0.0),
        codec=CodecConfig(name="topk", block_records=256),
        log_every=10,
        eval_every=5,
        save_every=10,
    )


def _digits_view(**changes: object) -> ViewRecipe:
    """Digits are neither mirrored nor cropped to a corner: that would change the label."""
    settings: dict = {
        "image_size": 16,
        "crop_scale": (0.5, 1.0),
        "flip_prob": 0.0,
        "augment": "none",
        "erase_prob": 0.0,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    return ViewRecipe(**(settings | changes))


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        deit_tiny,
        deit_small,
        deit_base,
        deit_tiny_distilled,
        deit_small_distilled,
        deit_base_distilled,
        deit_small_distilled_soft,
        digits_teacher,
        digits_student,
    )
}
