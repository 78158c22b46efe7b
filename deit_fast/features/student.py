"""The student's side of feature distillation: its tokens, and projectors to a teacher's features.

Logits and tokens come from one forward, so that a step with features computes the logits of a step
without them. ``FeatureStudent`` is the one module that a step calls, compiles and wraps in DDP; the
student inside stays a model of its own, whose weights are saved without the projectors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deit_fast.errors import InputError, first_line
from deit_fast.models.fuse import head_tokens, last_tokens
from deit_fast.models.student import apply_heads, mean_logits

PROJECTORS = ("linear", "mlp", "none")
TOKENS = ("auto", "class", "distillation", "mean")

# ---------------------------------------------------------------------------------------------
# The student's tokens
# ---------------------------------------------------------------------------------------------


class StudentTokens(NamedTuple):
    """Tokens of a batch. The patches are row by row and hold no prefix token.

    A fused model that was asked for prefix tokens only computes no others: N is then 0.
    """

    prefix: Tensor  # [B, P, C]: class token, distillation token, registers, as the model has them
    patches: Tensor  # [B, N, C]


def student_tokens(
    model: nn.Module, images: Tensor, block: int | None = None, is_whole: bool = True
) -> tuple[Tensor, Tensor | None, StudentTokens]:
    """Class logits, distillation logits and tokens of a student, from one forward.

    The logits are those of ``forward_heads``: in training mode bit for bit those of
    ``model(images)`` with the generator in the same state. The exception is a fused model of which
    all tokens are taken: ``model(images)`` computes its last block for the prefix tokens alone,
    which rounds differently.

    Args:
        model: a timm model, or one with ``forward_features`` and ``forward_head`` like timm's.
        images: float [B, 3, S, S], normalised.
        block: take the output of this block, from 0, before the final norm, negative from the last;
            for timm's vision transformers. None: the output of ``forward_features``.
        is_whole: whether all tokens are needed, or prefix tokens only.

    Returns:
        Two tensors [B, C], the second None for a model with one head, and the tokens.
    """
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    transformer = model if isinstance(model, VisionTransformer) else None
    if transformer is not None and (block is not None or is_whole):
        tap = block if block is None or block >= 0 else block + len(transformer.blocks)
        normed, tapped = last_tokens(transformer, images, tap, is_whole)
        tokens = normed if block is None else tapped
    elif transformer is not None:
        normed = tokens = head_tokens(transformer, images)
    else:
        normed = tokens = _call(model, "forward_features", images)
    if isinstance(model, VisionTransformerDistilled) and not model.training:
        class_logits, distill_logits = apply_heads(model, normed)
    else:
        outputs = _call(model, "forward_head", normed)
        class_logits, distill_logits = outputs if isinstance(outputs, tuple) else (outputs, None)
    if tokens.dim() == 4:  # a map of features
        is_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        tokens = tokens.flatten(1, 2) if is_last else tokens.flatten(2).mT
    return class_logits, distill_logits, StudentTokens(tokens[:, :prefix], tokens[:, prefix:])


def _call(model: Any, method: str, x: Tensor) -> Any:
    return getattr(model, method)(x)


class _Trial(NamedTuple):
    """What a student gives for one image."""

    width: int  # C
    prefix: int  # P
    patches: int  # N


def _try_student(model: nn.Module, block: int | None, size: int) -> _Trial:
    """Run a copy of a student on noise.

    Raises:
        InputError: it gives no tokens, has no such block, or its logits are not made of its tokens.
    """
    name = type(model).__name__
    lacking = [each for each in ("forward_features", "forward_head") if not hasattr(model, each)]
    if lacking:
        raise InputError(
            f"features need a student with forward_features and forward_head, as timm's models "
            f"have; {name} lacks {lacking[0]}"
        )
    if block is not None:
        if not isinstance(model, VisionTransformer):
            raise InputError(
                f"features.student_block={block} needs a vision transformer of timm, not {name}: "
                f"leave it out"
            )
        depth = len(model.blocks)
        if not -depth <= block < depth:
            raise InputError(f"features.student_block={block}: the student has {depth} blocks")
    device = next(model.parameters()).device
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        student = copy.deepcopy(model).eval()
        try:
            class_logits, distill_logits, tokens = student_tokens(student, images, block)
        except Exception as error:  # whatever a model of another kind does
            raise InputError(
                f"features need a student whose forward_features and forward_head work like "
                f"timm's; {name} fails: {first_line(error, with_type=True)}"
            ) from None
        logits, expected = mean_logits(class_logits, distill_logits), student(images)
    if logits.shape != expected.shape or not torch.allclose(logits, expected, 1e-3, 1e-4):
        raise InputError(
            f"features need a student whose logits are forward_head(forward_features(images)); "
            f"those of {name} are not"
        )
    (_, prefix, width), patches = tokens.prefix.shape, tokens.patches.shape[1]
    return _Trial(width, prefix, patches)


# ---------------------------------------------------------------------------------------------
# From tokens to predictions
# ---------------------------------------------------------------------------------------------


class HeadSpec(NamedTuple):
    """What one projector predicts."""

    tokens: int  # T of the teacher's features [B, T, D]
    width: int  # D
    is_grid: bool  # whether they are patches, on a grid of side sqrt(T)
    projector: str  # of PROJECTORS


class FeatureHeads(nn.Module):
    """A projector for each feature that a student learns.

    A feature of one token is predicted from one token of the student, patches from its patches. The
    student's grid is brought to the teacher's by average pooling if its side is a whole multiple,
    else by bilinear interpolation (align_corners False); a larger grid before the projector, a
    smaller one after it, for which a linear projector makes no difference.

        linear      a linear layer with a bias
        mlp         linear, LayerNorm, GELU, linear (LightlyTrain's v2)
        none        the token itself

    Weights are drawn from a truncated normal distribution of deviation 0.02, biases are 0.

    Args:
        model: the student; it is read, and does not become a part of this module.
        specs: the features.
        hidden: width inside an mlp.
        token: the student's token that predicts a feature of one token: "class", "distillation" or
            "mean", that of all patches. "auto": the distillation token if there is one, else the
            class token if the classifier reads it, else the mean.
        block: see ``student_tokens``.
        image_size: side of the views, pixels.

    Raises:
        InputError: the student lacks what is asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Sequence[HeadSpec],
        *,
        hidden: int = 2048,
        token: str = "auto",
        block: int | None = None,
        image_size: int = 224,
    ) -> None:
        super().__init__()
        trial = _try_student(model, block, image_size)
        self.specs, self.block = tuple(specs), block
        self.token = _choose_token(model, token)
        self.is_whole = self.token == "mean" or any(spec.is_grid for spec in specs)
        if any(spec.is_grid for spec in specs):
            _require_grid(model, trial)
        self.projectors = nn.ModuleList(
            _projector(spec.projector, trial.width, spec.width, hidden) for spec in specs
        )

    def forward(self, tokens: StudentTokens) -> list[Tensor]:
        """A prediction [B, T, D] for each feature."""
        return [
            self._patches(tokens.patches, spec, projector) if spec.is_grid
            else projector(self._single(tokens))
            for spec, projector in zip(self.specs, self.projectors, strict=True)
        ]  # fmt: skip

    def _single(self, tokens: StudentTokens) -> Tensor:
        """[B, 1, C]"""
        if self.token == "mean":
            return tokens.patches.mean(1, keepdim=True)
        index = 0 if self.token == "class" else 1
        return tokens.prefix[:, index : index + 1]

    def _patches(self, patches: Tensor, spec: HeadSpec, projector: nn.Module) -> Tensor:
        side = math.isqrt(spec.tokens)
        if math.isqrt(patches.shape[1]) < side:
            return resize_grid(projector(patches), side)
        return projector(resize_grid(patches, side))  # type: ignore[no-any-return]


class FeatureStudent(nn.Module):
    """A student and its projectors as one module.

    Its state dict has the student's weights under ``model.`` and the projectors' under ``heads.``.
    """

    def __init__(self, model: nn.Module, heads: FeatureHeads) -> None:
        super().__init__()
        self.model, self.heads = model, heads

    def forward(self, images: Tensor) -> tuple[Any, list[Tensor]]:
        """What ``model(images)`` returns in training mode, and a prediction for each feature.

        In evaluation mode the first are the logits of both heads too, and not their mean.
        """
        class_logits, distill_logits, tokens = student_tokens(
            self.model, images, self.heads.block, self.heads.is_whole
        )
        outputs = class_logits if distill_logits is None else (class_logits, distill_logits)
        return outputs, self.heads(tokens)


def resize_grid(tokens: Tensor, side: int) -> Tensor:
    """Tokens of a square grid [B, N, C] on a grid of another side: [B, side^2, C].

    The interpolation is a product in float32 with a fixed matrix: the backward of torch's bilinear
    interpolation adds in an order that differs from run to run on a GPU.
    """
    own = math.isqrt(tokens.shape[1])
    if own == side:
        return tokens
    if own % side == 0:
        grid = tokens.mT.unflatten(2, (own, own))
        return F.avg_pool2d(grid, own // side).flatten(2).mT
    with torch.autocast(tokens.device.type, enabled=False):
        eye = torch.eye(own, device=tokens.device)
        line = F.interpolate(eye[None], size=side, mode="linear", align_corners=False)[0].T
        return (torch.kron(line, line) @ tokens.float()).to(tokens.dtype)


def _projector(kind: str, width: int, target: int, hidden: int) -> nn.Module:
    if kind not in PROJECTORS:
        raise InputError(f"features.projectors must be of {', '.join(PROJECTORS)}, not {kind!r}")
    if kind == "none":
        if width != target:
            raise InputError(
                f"features.projectors=none: the student's tokens have {width} channels, the "
                f"teacher's features {target}: choose linear"
            )
        return nn.Identity()
    if kind == "linear":
        return _linear(width, target)
    between = nn.LayerNorm(hidden), nn.GELU()
    return nn.Sequential(_linear(width, hidden), *between, _linear(hidden, target))


def _linear(width: int, target: int) -> nn.Linear:
    layer = nn.Linear(width, target)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def _choose_token(model: Any, token: str) -> str:
    """Where ``token`` is "auto", the one that it means."""
    if token not in TOKENS:
        raise InputError(f"features.token must be one of {', '.join(TOKENS)}, not {token!r}")
    has_distillation = isinstance(model, VisionTransformerDistilled)
    has_class = isinstance(getattr(model, "cls_token", None), Tensor)
    if token == "auto":
        if has_distillation:
            return "distillation"
        return (
            "class" if has_class and getattr(model, "global_pool", "token") == "token" else "mean"
        )
    if (token == "class" and not has_class) or (token == "distillation" and not has_distillation):
        raise InputError(
            f"features.token={token}: {type(model).__name__} has no {token} token: choose auto"
        )
    return token


def _require_grid(model: Any, trial: _Trial) -> None:
    if math.isqrt(trial.patches) ** 2 != trial.patches:
        raise InputError(
            f"the {trial.patches} patches of {type(model).__name__} form no square grid, which "
            f"features of patches need"
        )
    if (share := getattr(getattr(model, "patch_drop", None), "prob", 0.0)) > 0:
        raise InputError(
            f"model.patch_drop={share:g} leaves out patches that features of patches need: set it "
            f"to 0"
        )
