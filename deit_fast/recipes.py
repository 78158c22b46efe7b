"""Named, documented run configurations. Each docstring holds command, expected time and accuracy.

Accuracies are those that DeiT's authors published (arXiv 2012.12877, tables 3 and 9, figure 3, and
their repository); "not run" means that this project has not repeated the run. Two things differ
from DeiT's recipe: Mixup/CutMix draw lambda per pair of samples instead of per batch, with the same
distribution per image, and the learning rate changes every step, not one epoch late. Both are as in
DeiT's code with `--compat deit`, which excludes a cache.

The moving average of the weights has DeiT's decay, 0.99996, where a recipe does not say otherwise.
After 300 epochs at batch 1024 that is a mean age of 6.7 % of the run (computed: the share of the
weights of k steps ago is (1 - d) d^k).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from deit_fast.config import (
    CodecConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    Target,
    ViewConfig,
)
from deit_fast.errors import InputError, did_you_mean


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


def _deit_soft(recipe: str, model: str) -> RunConfig:
    """DeiT, section 5: soft distillation with tau 3 and weight 0.1; KL per sample (batchmean)."""
    return _deit(recipe, model, "soft").replace(
        loss={"alpha": 0.1, "tau": 3.0, "reduction": "batchmean"}
    )


def deit_tiny_distilled_soft() -> RunConfig:
    """DeiT-Ti, soft distillation at the paper's tau 3 and weight 0.1, KL per sample (batchmean).

    Command: as deit_tiny_distilled, with --recipe deit_tiny_distilled_soft.
    Time: not measured yet. Accuracy: published for usual soft distillation 72.2 %; not run.
    """
    return _deit_soft("deit_tiny_distilled_soft", "deit_tiny_distilled_patch16_224")


def deit_small_distilled_soft() -> RunConfig:
    """DeiT-S, soft distillation at the paper's tau 3 and weight 0.1, KL per sample (batchmean).

    Command: as deit_tiny_distilled, with --recipe deit_small_distilled_soft.
    Time: not measured yet. Accuracy: published for usual soft distillation 79.8 %; not run.
    """
    return _deit_soft("deit_small_distilled_soft", "deit_small_distilled_patch16_224")


def deit_base_distilled_soft() -> RunConfig:
    """DeiT-B, soft distillation at the paper's tau 3 and weight 0.1, KL per sample (batchmean).

    Command: as deit_tiny_distilled, with --recipe deit_base_distilled_soft.
    Time: not measured yet. Accuracy: published for usual soft distillation 81.8 %; not run.
    """
    return _deit_soft("deit_base_distilled_soft", "deit_base_distilled_patch16_224")


def deit_base_distilled_1000ep() -> RunConfig:
    """DeiT-B, hard distillation, 1000 epochs: 1002 views of each image, stored as decisions only.

    The `hard` codec takes 2 bytes per view, 2.6 GB for ImageNet; top-16 would take 92 GB. The
    moving average has a mean age of 2.0 % of the run (computed).

    Command: as deit_tiny_distilled, with --recipe deit_base_distilled_1000ep.
    Time: not measured yet. Accuracy: published 84.2 %; not run.
    """
    recipe = "deit_base_distilled_1000ep"
    return _deit(recipe, "deit_base_distilled_patch16_224", "hard").replace(
        epochs=1000, codec={"name": "hard"}
    )


def deit_base_distilled_384() -> RunConfig:
    """Fine-tuning of a trained DeiT-B at 384 pixels with hard distillation.

    The settings are those of DeiT's command for 384 pixels: 30 epochs, batch 512, a learning rate
    that is constant at 5e-6 after the usual warm-up from 1e-6, weight decay 1e-8. DeiT's code
    refuses distillation here, but its paper uses it, with a teacher at the same resolution: the
    teacher sees the 384-pixel views. Position embeddings are interpolated when weights are loaded.
    With DeiT's decay, which its command keeps, the moving average has a mean age of 31.7 % of the
    run (computed); at 0.9998 it would be 6.7 %.

    Command: deit-fast precompute --recipe deit_base_distilled_384 --data.root IMAGENET
    --teacher timm:regnety_160.deit_in1k --cache CACHE384, then
    deit-fast train --recipe deit_base_distilled_384 --data.root IMAGENET --cache CACHE384
    --model.weights runs/deit_base_distilled/model.safetensors
    Time: not measured yet. Accuracy: published 84.5 % after 300 epochs at 224, 85.2 % after 1000;
    not run.
    """
    recipe = "deit_base_distilled_384"
    return _deit(recipe, "deit_base_distilled_patch16_384", "hard").replace(
        epochs=30,
        batch_size=512,
        view={"image_size": 384},
        optim={"lr": 5e-6, "min_lr": 5e-6, "weight_decay": 1e-8},
    )


def _deit3(recipe: str, model: str, drop_path: float, lr: float) -> RunConfig:
    """DeiT-III on ImageNet-1k: its repository's commands, whose ``lr`` is for 2048 samples."""
    return RunConfig(
        recipe=recipe,
        output=f"runs/{recipe}",
        epochs=800,
        batch_size=2048,
        view=ViewConfig(augment="three_augment", color_jitter=0.3, erase_prob=0.0),
        data=DataConfig(eval_crop=1.0),
        model=ModelConfig(name=model, drop_path=drop_path),
        loss=LossConfig(kind="none", base="bce", smoothing=0.0),
        optim=OptimConfig(name="lamb", lr=lr),
    )


def deit3_small() -> RunConfig:
    """DeiT-III ViT-S (arXiv 2204.07118): ThreeAugment, BCE, LayerScale, no teacher.

    What differs: LayerScale starts at timm's 1e-6, not at 1e-4.

    Command: deit-fast train --recipe deit3_small --data.root IMAGENET
    Time: not measured yet. Accuracy: published 81.4 %; not run.
    """
    return _deit3("deit3_small", "deit3_small_patch16_224", drop_path=0.05, lr=1e-3)


def deit3_base() -> RunConfig:
    """DeiT-III ViT-B (arXiv 2204.07118): ThreeAugment, BCE, LayerScale, no teacher.

    What differs: DeiT-III trains at 192 pixels and fine-tunes 20 epochs at 224; here all 800 epochs
    are at 224. LayerScale starts at timm's 1e-6, not at 1e-4. The moving average has a mean age of
    5.0 % of the run (computed).

    Command: deit-fast train --recipe deit3_base --data.root IMAGENET
    Time: not measured yet. Accuracy: published 83.8 % (192, then 224 pixels); not run.
    """
    return _deit3("deit3_base", "deit3_base_patch16_224", drop_path=0.2, lr=7.5e-4)


def funmatch_small() -> RunConfig:
    """A patient and consistent teacher (Beyer et al., arXiv 2106.05237) for a DeiT-S.

    As in their released configuration: student and teacher see the same view, crops and flips and
    Mixup of every pair with lambda ~ U(0, 1); the loss is the KL to the teacher at temperature 1
    alone, no labels; batch 4096, gradients clipped at 1, 5000 steps of warm-up, 1200 epochs, each
    with a view of its own.
    What differs: the student is a DeiT-S with one head instead of a ResNet-50, so optimiser,
    learning rate and weight decay are those of DeiT. Views are cached, so the teacher's 1200 passes
    are needed once and not in every run (top-16: 110 GB; with --teacher instead of --cache nothing
    is stored). All classes outside the top 16 count as one.

    Command: deit-fast precompute --recipe funmatch_small --data.root IMAGENET
    --teacher timm:resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k --cache CACHE, then
    deit-fast train --recipe funmatch_small --data.root IMAGENET --cache CACHE
    Time: not measured yet. Accuracy: none published for this student; not run.
    """
    return RunConfig(
        recipe="funmatch_small",
        output="runs/funmatch_small",
        epochs=1200,
        batch_size=4096,
        view=ViewConfig(
            crop_scale=(0.05, 1.0),
            augment="none",
            erase_prob=0.0,
            mixup_alpha=1.0,
            cutmix_alpha=0.0,
            repeats=1,
        ),
        model=ModelConfig(name="deit_small_patch16_224", drop_path=0.0),
        loss=LossConfig(kind="soft", alpha=1.0, tau=1.0, reduction="batchmean", smoothing=0.0),
        optim=OptimConfig(clip_grad=1.0, warmup_epochs=16.0, ema_decay=0.0),
    )


def finetune_teacher() -> RunConfig:
    """Fine-tune a convnet on your own images, to be their teacher.

    It starts from timm's pretrained RegNetY-1.6GF, the family of DeiT's teacher, or from any other
    network: --model.name NAME --model.weights FILE. Layers of other classes start afresh; lines of
    the log name them. Crops keep at least 35 % of the image, and nothing is mixed: a short training
    does not need more. Flips assume that a mirrored image keeps its class (--view.flip-prob 0).

    Command: deit-fast train --recipe finetune_teacher --data.root DIR --output runs/teacher
    Time: not measured yet. Accuracy: depends on the images; not run.
    """
    return RunConfig(
        recipe="finetune_teacher",
        output="runs/finetune_teacher",
        epochs=30,
        batch_size=32,
        view=ViewConfig(
            crop_scale=(0.35, 1.0),
            augment="none",
            erase_prob=0.0,
            mixup_alpha=0.0,
            cutmix_alpha=0.0,
            repeats=1,
        ),
        model=ModelConfig(name="regnety_016", drop_path=0.0, weights="timm:regnety_016.tv2_in1k"),
        loss=LossConfig(kind="none", smoothing=0.1),
        optim=OptimConfig(lr=4e-3, warmup_epochs=1.0, ema_decay=0.0),
        log_every=10,
        save_every=5,
    )


def own_images() -> RunConfig:
    """DeiT-Ti on a few thousand own images, from ImageNet's weights, hard distillation.

    The student starts from DeiT's own distilled DeiT-Ti; its heads start afresh. Another student:
    --model.name NAME --model.weights timm:NAME, or --model.weights none for random weights, which
    need more images and epochs. Crops keep at least 25 % of the image.

    Command: deit-fast train --recipe finetune_teacher --data.root DIR --output runs/teacher, then
    deit-fast precompute --recipe own_images --data.root DIR
    --teacher timm:regnety_016@runs/teacher/model.safetensors --cache CACHE, then
    deit-fast train --recipe own_images --data.root DIR --cache CACHE --output runs/student
    Time: not measured yet. Accuracy: depends on the images; not run.
    """
    return RunConfig(
        recipe="own_images",
        output="runs/own_images",
        epochs=100,
        batch_size=32,
        view=ViewConfig(crop_scale=(0.25, 1.0), repeats=1),
        model=ModelConfig(
            name="deit_tiny_distilled_patch16_224",
            drop_path=0.0,
            weights="timm:deit_tiny_distilled_patch16_224.fb_in1k",
        ),
        loss=LossConfig(kind="hard", alpha=0.5, tau=1.0, reduction="batchmean"),
        optim=OptimConfig(lr=1e-3, warmup_epochs=2.0, ema_decay=0.0),
        log_every=10,
        save_every=5,
    )


def _from_features(recipe: str, model: str, *targets: Target) -> RunConfig:
    """DeiT's recipe with a teacher's features in place of its logits: the class token learns the
    label, the distillation token the teacher's class token, the patches those of the teacher."""
    return _deit(recipe, model, "none").replace(
        num_views=12,
        targets=targets,
        features={"losses": ("cosine",), "grid": 7 if "patches" in targets else None},
    )


def deit_tiny_dinov3() -> RunConfig:
    """DeiT-Ti from the class token of DINOv3, any size of it; 12 views of each image.

    A view of ImageNet takes 0.5 GB with DINOv3-S (388 bytes an image), 1.3 GB with DINOv3-L
    (computed).

    Command: deit-fast precompute --recipe deit_tiny_dinov3 --data.root IMAGENET
    --teacher timm:vit_small_patch16_dinov3.lvd1689m --cache CACHE, then
    deit-fast train --recipe deit_tiny_dinov3 --data.root IMAGENET --cache CACHE/cls
    Time: not measured yet. Accuracy: none published; not run.
    """
    return _from_features("deit_tiny_dinov3", "deit_tiny_distilled_patch16_224", "cls")


def deit_small_dinov3() -> RunConfig:
    """DeiT-S from class token and patches of DINOv3; the grid of 14 x 14 is averaged to 7 x 7.

    A view of ImageNet takes 49 GB with DINOv3-B (772 bytes for each of 50 tokens), 593 GB for 12
    views (computed).

    Command: deit-fast precompute --recipe deit_small_dinov3 --data.root IMAGENET
    --teacher timm:vit_base_patch16_dinov3.lvd1689m --cache CACHE, then
    deit-fast train --recipe deit_small_dinov3 --data.root IMAGENET --cache CACHE/cls
    --more-caches CACHE/patches
    Time: not measured yet. Accuracy: none published; not run.
    """
    return _from_features("deit_small_dinov3", "deit_small_distilled_patch16_224", "cls", "patches")


def deit_small_eva02() -> RunConfig:
    """DeiT-S from the logits of EVA02-L, which looks at each view at 448 pixels; 48 views.

    Command: deit-fast precompute --recipe deit_small_eva02 --data.root IMAGENET
    --teacher timm:eva02_large_patch14_448.mim_m38m_ft_in22k_in1k --cache CACHE, then
    deit-fast train --recipe deit_small_eva02 --data.root IMAGENET --cache CACHE
    Time: not measured yet. Accuracy: none published; not run.
    """
    recipe = "deit_small_eva02"
    return _deit_soft(recipe, "deit_small_distilled_patch16_224").replace(
        num_views=48, teacher_size=448, loss={"alpha": 0.5, "tau": 1.0}
    )


def deit_small_logits_and_features() -> RunConfig:
    """DeiT-S from two teachers: the logits of RegNetY-16GF and the class token of DINOv3-B.

    Command: deit-fast precompute --recipe deit_small_logits_and_features --data.root IMAGENET
    --teacher timm:regnety_160.deit_in1k --cache REGNET, then
    deit-fast precompute --recipe deit_small_logits_and_features --data.root IMAGENET
    --teacher timm:vit_base_patch16_dinov3.lvd1689m --targets cls --cache DINO, then
    deit-fast train --recipe deit_small_logits_and_features --data.root IMAGENET --cache REGNET
    --more-caches DINO/cls
    Time: not measured yet. Accuracy: none published; not run.
    """
    recipe = "deit_small_logits_and_features"
    return _deit(recipe, "deit_small_distilled_patch16_224", "hard").replace(num_views=12)


def _wide(recipe: str, head: Literal["lift", "wide_last"], **features: object) -> RunConfig:
    """arXiv 2511.15572, its released code: DeiT's recipe without Mixup, CutMix and drop path."""
    return _deit_soft(recipe, "deit_tiny_patch16_224").replace(
        batch_size=2048,
        num_views=12,
        targets=("logits", "patches"),
        view={"mixup_alpha": 0.0, "cutmix_alpha": 0.0},
        model={"drop_path": 0.0, "head": head, "wide": 384},
        loss={"alpha": 0.9, "tau": 1.0},
        features={
            "block": 23, "norm": False, "weights": (0.2,), "projectors": ("none",), **features
        },
    )  # fmt: skip


def deit_tiny_lift() -> RunConfig:
    """DeiT-Ti with CaiT-S24's width after its last block, from its logits and patches.

    The published recipe sees new views in every epoch, with the teacher online. Here 12 views of
    each image are stored: 1.2 TB for ImageNet with the patches in fp8 (computed).

    Command: deit-fast precompute --recipe deit_tiny_lift --data.root IMAGENET
    --teacher timm:cait_s24_224.fb_dist_in1k --cache CACHE, then
    deit-fast train --recipe deit_tiny_lift --data.root IMAGENET --cache CACHE
    --more-caches CACHE/patches
    Time: not measured yet. Accuracy: published 77.5 %, its best epoch; not run.
    """
    return _wide("deit_tiny_lift", "lift", losses=("spectral",))


def deit_tiny_wide_last() -> RunConfig:
    """DeiT-Ti with a last block of CaiT-S24's width, from its logits and patches.

    Views and bytes as deit_tiny_lift.

    Command: as deit_tiny_lift, with --recipe deit_tiny_wide_last.
    Time: not measured yet. Accuracy: published 78.2 %, its best epoch; not run.
    """
    return _wide("deit_tiny_wide_last", "wide_last", losses=("mse",), student_block=-1)


def imagenet_100_small() -> RunConfig:
    """DeiT-S on 100 classes of ImageNet (about 127,000 images), hard distillation.

    The moving average has a mean age of 6.7 % of the run (computed for 127,000 images), as DeiT's
    on all of ImageNet.

    Command: as deit_tiny_distilled, with --recipe imagenet_100_small, --data.root a folder of the
    100 classes and --teacher timm:NAME@FILE. Of weights for all 1000 classes the 100 are selected.
    Time: not measured yet. Accuracy: none published; not run.
    """
    recipe = "imagenet_100_small"
    return _deit(recipe, "deit_small_distilled_patch16_224", "hard").replace(
        batch_size=512, optim={"warmup_epochs": 10.0, "ema_decay": 0.9998}
    )


def cifar_32() -> RunConfig:
    """DeiT-Ti with patches of 4 on 32-pixel images such as CIFAR's, hard distillation.

    Crops keep at least 40 % of the image, held-out images are not cropped; statistics are those of
    CIFAR-10's training images. Images are files: root/train/<class>/*.png and root/val likewise.
    The moving average has a mean age of 6.9 % of the run (computed for 50,000 images).

    Command: as deit_tiny_distilled, with --recipe cifar_32, --data.root such a folder and
    --teacher package.module:factory@FILE, a network for 32-pixel images.
    Time: not measured yet. Accuracy: none published; not run.
    """
    return RunConfig(
        recipe="cifar_32",
        output="runs/cifar_32",
        epochs=300,
        batch_size=512,
        view=ViewConfig(
            image_size=32,
            crop_scale=(0.4, 1.0),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
        ),
        data=DataConfig(eval_crop=1.0),
        model=ModelConfig(name="deit_tiny_distilled_patch16_224", args=("patch_size=4",)),
        loss=LossConfig(kind="hard", alpha=0.5, tau=1.0, reduction="numel"),
        optim=OptimConfig(lr=1e-3, warmup_epochs=10.0, ema_decay=0.9995),
    )


def digits_teacher() -> RunConfig:
    """The demo's teacher: a small convolutional network on 16-pixel views, without mixing.

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
        optim=OptimConfig(lr=16e-3, warmup_epochs=2.0, ema_decay=0.0),
        compile="none",  # on a GPU, compilation would take longer than the training
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
            args=("patch_size=4", "embed_dim=64", "depth=4", "num_heads=4"),
        ),
        loss=LossConfig(kind="hard", alpha=0.5, tau=1.0, reduction="batchmean"),
        optim=OptimConfig(lr=8e-3, warmup_epochs=5.0, ema_decay=0.0),
        codec=CodecConfig(name="topk"),
        compile="none",  # on a GPU, compilation would take longer than the training
        log_every=10,
        eval_every=5,
        save_every=10,
    )


def _digits_view(**changes: object) -> ViewConfig:
    """No flips and no small crops, because they would change the label."""
    settings: dict = {
        "image_size": 16,
        "crop_scale": (0.5, 1.0),
        "flip_prob": 0.0,
        "augment": "none",
        "erase_prob": 0.0,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    return ViewConfig(**(settings | changes))


RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        deit_tiny,
        deit_small,
        deit_base,
        deit_tiny_distilled,
        deit_small_distilled,
        deit_base_distilled,
        deit_tiny_distilled_soft,
        deit_small_distilled_soft,
        deit_base_distilled_soft,
        deit_base_distilled_1000ep,
        deit_base_distilled_384,
        deit3_small,
        deit3_base,
        funmatch_small,
        deit_tiny_dinov3,
        deit_small_dinov3,
        deit_small_eva02,
        deit_small_logits_and_features,
        deit_tiny_lift,
        deit_tiny_wide_last,
        finetune_teacher,
        own_images,
        imagenet_100_small,
        cifar_32,
        digits_teacher,
        digits_student,
    )
}


def find_recipe(name: str) -> Callable[[], RunConfig]:
    """The recipe of this name.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES)
        raise InputError(f"unknown recipe {name!r}{hint}; see `deit-fast recipes list`")
    return RECIPES[name]
