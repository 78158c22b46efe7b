"""``fuse``: run a timm vision transformer on this package's kernels.

Fusing changes the classes of modules and nothing else: parameters and their names stay, state dicts
load in both directions, and ``unfuse`` restores the classes. The kernels replace the memory-bound
operations between the matrix products:

    attention        attention_qkvpacked between the two projections
    add_layer_norm   residual + LayerScale + DropPath + the next LayerNorm, over block borders too
    bias_gelu        bias of the first MLP layer + GELU
    mlp_backward     with bias_gelu: its backward inside the matrix product before it

Fusing also leaves out products that no head reads. Where the heads read prefix tokens only
(``global_pool="token"``), the last block computes queries, projection and MLP for those tokens.
Keys and values still come from every token, so outputs and gradients are unchanged. At 198 tokens
and 12 blocks this saves 10/12 of one block's parameter products, 6.9 % of all.

add_layer_norm and attention also compute the gradients of the biases of qkv, proj and fc2, whose
rows they read anyway.

All of this is done for plain modules only (``deit_fast.models.plain``). Whatever has a hook, a
wrapper, a parametrisation and so on is called as in timm's model, and one log line names it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import Attention, DropPath, LayerNorm, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer
from torch import Tensor, nn

from deit_fast.errors import InputError
from deit_fast.models.fused import (
    FUSED_BLOCKS,
    FusedAttention,
    FusedBlock,
    FusedForward,
    FusedMlp,
    FusedPatchEmbed,
    FusedWideBlock,
    why_not_attention,
    why_not_mlp,
)  # fmt: skip
from deit_fast.models.plain import DROP_PATHS, is_plain
from deit_fast.models.stream import BatchPart
from deit_fast.models.swapped import swap_back, swap_model
from deit_fast.models.widen import WideBlock, plain_tokens

log = logging.getLogger("deit_fast")

KERNELS = ("attention", "add_layer_norm", "bias_gelu", "mlp_backward")
STOCHASTIC_DEPTH = ("sample", "subset")
RESIDUALS = {"float32": None, "bfloat16": torch.bfloat16}
"""Dtypes of the residual stream; None: the dtype of the embedding."""

DEFAULT_KERNELS = {
    # On a CPU the kernels run as PyTorch operations and save nothing.
    "cpu": (),
    # Chosen by the bytes that they save (docs/performance.md), not measured yet. mlp_backward stays
    # off until it has won in a compiled model: its first call times two implementations, whose
    # results differ by rounding, so two runs may differ.
    "sm_80": KERNELS[:3],
    "sm_90": KERNELS[:3],
    "sm_100": KERNELS[:3],
}


def default_kernels(device: torch.device | None = None) -> tuple[str, ...]:
    """The default kernels of a device; None: of this machine's first GPU, or of a CPU."""
    if not torch.cuda.is_available() or (device is not None and device.type == "cpu"):
        return DEFAULT_KERNELS["cpu"]
    major, _ = torch.cuda.get_device_capability(device)
    return DEFAULT_KERNELS.get(f"sm_{major}0", ())


_FUSED: dict[type, type] = {
    Attention: FusedAttention, Mlp: FusedMlp, Block: FusedBlock, WideBlock: FusedWideBlock,
    PatchEmbed: FusedPatchEmbed,
}  # fmt: skip

_WRAPPED = ("module", "_orig_mod", "model")
"""Where DDP, DataParallel and averages, torch.compile, and timm's feature extractor keep it."""


# ---------------------------------------------------------------------------------------------
# What can be fused
# ---------------------------------------------------------------------------------------------


def _why_not_block(module: nn.Module) -> str | None:
    if type(module) not in (Block, WideBlock, *FUSED_BLOCKS):
        return f"is {type(module).__name__}, not timm's Block"
    for name in ("norm1", "norm2"):
        norm = getattr(module, name)
        if type(norm) not in (LayerNorm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            return f"has {name} {type(norm).__name__}, not a LayerNorm with weight and bias"
    for name, known in (("ls", LayerScale), ("drop_path", DropPath)):
        for attribute in (f"{name}1", f"{name}2"):
            part = getattr(module, attribute)
            if type(part) not in (known, nn.Identity):
                return f"has {attribute} {type(part).__name__}"
    return None


def _takes_patches(model: VisionTransformer) -> bool:
    """Whether the patch embedding is one matrix product over the patches of RGB images."""
    embed: Any = model.patch_embed
    if type(embed) is not PatchEmbed or not embed.flatten or embed.dynamic_img_pad:
        return False
    conv = embed.proj
    if type(conv) is not nn.Conv2d:
        return False
    is_square = conv.kernel_size[0] == conv.kernel_size[1]
    is_product = conv.kernel_size == conv.stride and conv.groups == 1
    return is_square and is_product and conv.in_channels == 3 and not model.dynamic_img_size


def _has_plain_forward(model: nn.Module) -> bool:
    """Whether ``model(x)`` is timm's own: embed, blocks in order, norm, head."""
    kind = type(model)
    names = ("forward", "forward_features")
    return all(getattr(kind, name) is getattr(VisionTransformer, name) for name in names)


# ---------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------


def fuse(
    model: nn.Module,
    *,
    kernels: Iterable[str] | None = None,
    stochastic_depth: str = "sample",
    residual: str = "float32",
) -> nn.Module:
    """Fuse a timm vision transformer, in place.

    Parameters, buffers, their names and the output's shape do not change. A part that cannot be
    fused stays as it is; one log line names it and the reason.

    Args:
        model: any timm ``VisionTransformer``, distilled or not, with or without LayerScale and
            DropPath.
        kernels: names from ``KERNELS``; by default those of this machine's GPU
            (``DEFAULT_KERNELS``), none on a CPU.
        stochastic_depth: "sample" drops each sample's branch with probability p, as timm does.
            "subset" computes each branch for round(B (1 - p)) random samples only, scaled by
            B over that number, and so saves the work for dropped samples. Each sample is kept with
            the same probability, but the number kept is fixed instead of binomial: samples of a
            batch are no longer independent, and p is rounded to a multiple of 1 / B.
        residual: dtype of the residual stream of ``model(x)``. "float32" keeps the dtype of the
            embedding, which autocast leaves in float32. "bfloat16" rounds the embedding and the sum
            after each branch of a block to bfloat16, which halves the bytes that the norms read and
            write; their statistics and sums stay float32. It needs all blocks fused.

    Returns:
        The model.

    Raises:
        InputError: not a timm VisionTransformer, or an unknown kernel or option, by name.
    """
    names = default_kernels() if kernels is None else tuple(kernels)
    unknown = sorted(set(names) - set(KERNELS))
    if unknown:
        raise InputError(f"unknown kernel {unknown[0]!r}: choose from {', '.join(KERNELS)}")
    if "mlp_backward" in names and "bias_gelu" not in names:
        raise InputError("kernel 'mlp_backward' needs 'bias_gelu' beside it")
    for name, value, known in (
        ("stochastic_depth", stochastic_depth, STOCHASTIC_DEPTH),
        ("residual", residual, RESIDUALS),
    ):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    if not isinstance(model, VisionTransformer):
        inside = [n for n in _WRAPPED if isinstance(getattr(model, n, None), VisionTransformer)]
        raise InputError(
            f"fuse takes a timm VisionTransformer, not {type(model).__name__}"
            + (f": fuse(model.{inside[0]}) before it is wrapped" if inside else "")
        )
    unfuse(model)
    reasons: dict[str, list[int]] = {}
    for number, block in enumerate(model.blocks):
        for reason in _fuse_block(block, frozenset(names), stochastic_depth == "subset"):
            reasons.setdefault(reason, []).append(number)
    for reason, numbers in reasons.items():
        which = ", ".join(map(str, numbers))
        log.warning("not fused: block %s: %s", which, reason)
    if all(isinstance(block, FusedBlock) for block in model.blocks) and _has_plain_forward(model):
        swap_model(model, FusedForward)
        fused: Any = model
        fused.residual_dtype = RESIDUALS[residual]
        if _takes_patches(model):
            model.patch_embed.__class__ = FusedPatchEmbed
    elif residual != "float32":
        unfuse(model)
        raise InputError(
            f"residual={residual} needs a model whose blocks and forward are all fused, "
            f"which {type(model).__name__} is not: choose residual=float32"
        )
    return model


def _fuse_block(block: Any, kernels: frozenset[str], subset: bool) -> list[str]:
    """Fuse the parts of one block that can be; returns the reasons for the others."""
    reason = _why_not_block(block)
    if reason is not None:
        return [reason]
    reasons = []
    for name, part, why_not in (
        ("attention", block.attn, why_not_attention),
        ("bias_gelu", block.mlp, why_not_mlp),
    ):
        if name not in kernels:
            continue
        reason = why_not(part)
        if reason is None:
            part.__class__ = _FUSED.get(type(part), type(part))  # shared parts are fused already
        else:
            reasons.append(f"{name}: {reason}")
    if "mlp_backward" in kernels and type(block.mlp) is FusedMlp:
        block.mlp.joins_backward = True
    block.__class__ = _FUSED.get(type(block), type(block))
    block.kernels, block.subset = kernels, subset
    return reasons


def patch_side(model: nn.Module) -> int | None:
    """Side of the patches if ``model(x)`` accepts rows of patches [B, N, 3 side^2], else None.

    The rows are those of ``ingest(layout="patches")``.
    """
    if not isinstance(model, FusedForward):
        return None
    embed: Any = model.patch_embed
    if not is_plain(embed, (FusedPatchEmbed,)) or not is_plain(embed.proj, (nn.Conv2d,)):
        return None
    return int(embed.patch_size[0])


def set_batch_part(model: nn.Module, offset: int, batch_size: int) -> bool:
    """Make DropPath and PatchDropout draw for a whole batch of which the model processes a part.

    The next training forwards draw for ``batch_size`` samples and use the draws from sample
    ``offset`` on. Ranks and micro-batches with the same seed then drop the same samples as one
    process with the whole batch.

    Returns:
        False, without any effect, for a model whose stream is not fused, and for one with a block
        or DropPath that is called as a module and so draws for the samples that it sees.
    """
    if not isinstance(model, FusedForward):
        return False
    if not all(map(_draws_for_a_part, model.blocks)):
        model.batch_part = None
        return False
    device = next(model.parameters()).device
    part = model.batch_part
    if part is None or part.batch_size != batch_size or part.offset.device != device:
        memory = torch.empty(1, dtype=torch.int64, device=device)
        part = model.batch_part = BatchPart(memory, batch_size)
    part.offset.fill_(offset)  # on the device's stream: the host does not wait
    return True


def _draws_for_a_part(block: Any) -> bool:
    """Whether a block draws for the batch part of the model."""
    if not is_plain(block, FUSED_BLOCKS):
        return False
    return is_plain(block.drop_path1, DROP_PATHS) and is_plain(block.drop_path2, DROP_PATHS)


def head_tokens(model: VisionTransformer, images: Tensor) -> Tensor:
    """The tokens after the final norm, at least those that the heads read: [B, tokens, width].

    A fused model computes them on its fused stream.
    """
    if isinstance(model, FusedForward) and model.runs_stream():
        return model.forward_stream(images)
    return model.forward_features(images)


def last_tokens(
    model: VisionTransformer, images: Tensor, tap: int | None = None, is_whole: bool = True
) -> tuple[Tensor, Tensor]:
    """Tokens of the final norm and of one block in one forward, [B, tokens, width] each.

    A fused model computes them on its fused stream. The tokens of the final norm are bit for bit
    those of ``head_tokens``, except where ``is_whole`` makes a fused model compute tokens of its
    last block that no head reads.

    Args:
        tap: number of the block whose output is given; None: the last.
        is_whole: whether all tokens are needed, or those that the heads read.
    """
    if isinstance(model, FusedForward) and model.runs_stream():
        return model.forward_tokens(images, tap, is_whole)
    return plain_tokens(model, images, -1 if tap is None else tap)


def unfuse(model: nn.Module) -> nn.Module:
    """Undo ``fuse``, in place; no effect on a model that is not fused."""
    for module in model.modules():
        swap_back(module)
    return model
