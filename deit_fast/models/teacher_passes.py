"""How a teacher's network is run, so that one pass gives its logits and its features.

- ``NetworkPass``: the network as it is called, for logits alone.
- ``OutputPass``: it returns features by name, or as one tensor.
- ``TimmPass``: it has ``forward_features``, as timm's networks do.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deit_fast.errors import InputError
from deit_fast.models.teacher_features import FEATURES, FeatureTarget, Parts, given_by
from deit_fast.models.teacher_outputs import describe, require_floats

# What networks of others call them: factories after this package, facebookresearch's DINOv2 and
# DINOv3, Hugging Face.
_NAMES = {
    "cls": ("cls", "x_norm_clstoken"),
    "mean": ("mean",),
    "pooled": ("pooled", "pooler_output"),
    "patches": ("patches", "x_norm_patchtokens"),
}
_HIDDEN = "last_hidden_state"
_REMEDY = f"return a dict with some of logits, {', '.join(FEATURES)}"


class NetworkPass:
    """Runs a network as it is called: logits alone.

    A call returns the output that has the logits, None where they are not made, and the parts of
    features: of each block, and under None of the network's end.
    """

    gives_features = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, images: Tensor) -> tuple[Any, dict[int | None, Parts]]:
        return self.model(images), {}

    def compile(self) -> None:
        """Compile it on the first batch. Each batch size is compiled separately."""
        self.model.compile(dynamic=False)

    def gives(self, parts: Parts, block: int | None) -> list[str]:
        """Names of what can be asked of ``block``, whose parts are given."""
        return given_by(parts)


class OutputPass(NetworkPass):
    """Runs a network that returns features.

    By name, in a dict or as attributes: `cls`, `mean`, `pooled` [B, D], `patches` [B, N, D] or
    [B, D, h, w]; Hugging Face's `pooler_output`, and `last_hidden_state` where ``model.config``
    tells patches from registers. One tensor [B, D] is `pooled`, one [B, D, h, w] `patches`.
    """

    gives_features = True

    def __call__(self, images: Tensor) -> tuple[Any, dict[int | None, Parts]]:
        output = self.model(images)
        if isinstance(output, Tensor):
            return output, {None: self._of_tensor(output)}
        parts = named_parts(output)
        if (hidden := _entry(output, _HIDDEN)) is not None:
            parts = self._of_hidden(hidden, images.shape[-1]) | parts
        return output, {None: parts}

    def _of_tensor(self, output: Tensor) -> dict[str, Tensor]:
        if output.dim() == 2:
            return {"pooled": output}
        if output.dim() == 4:
            return {"patches": as_tokens(output)}
        raise InputError(
            f"it returns a tensor {tuple(output.shape)}; of one tensor, [B, D] is pooled and "
            f"[B, D, h, w] is patches; or {_REMEDY}"
        )

    def _of_hidden(self, hidden: Any, side: int) -> dict[str, Tensor]:
        """Of Hugging Face's last hidden state, for images of ``side`` pixels."""
        require_floats(_HIDDEN, hidden)
        if hidden.dim() == 4:
            return {"patches": as_tokens(hidden)}
        config = getattr(self.model, "config", None)
        patch = getattr(config, "patch_size", None)
        if hidden.dim() != 3 or type(patch) is not int:
            raise InputError(
                f"its {_HIDDEN} is {tuple(hidden.shape)}, and no config.patch_size says which "
                f"tokens are patches: {_REMEDY}"
            )
        registers = getattr(config, "num_register_tokens", None) or 0
        prefix = hidden.shape[1] - (side // patch) ** 2
        if prefix < registers:
            raise InputError(
                f"its {_HIDDEN} has {hidden.shape[1]} tokens, fewer than {registers} registers "
                f"and the patches of {patch} pixels"
            )
        return split_tokens(hidden, prefix, has_class=prefix > registers)


class TimmPass(NetworkPass):
    """Runs a network with ``forward_features``; blocks need ``forward_intermediates``.

    Args:
        targets: features, with blocks from 0.
        gives_logits: run its head too.

    Raises:
        InputError: it has not what the targets need; the message is the end of a sentence.
    """

    gives_features = True

    def __init__(
        self, model: nn.Module, targets: Sequence[FeatureTarget], gives_logits: bool
    ) -> None:
        super().__init__(model)
        self.gives_logits = gives_logits
        self.has_pooled = "pre_logits" in _parameters(model, "forward_head")
        self.pools = self.has_pooled and any(target.name == "pooled" for target in targets)
        self.needs_end = gives_logits or any(target.block is None for target in targets)
        self.blocks = sorted({t.block for t in targets if t.block is not None})
        norms = {target.norm for target in targets if target.block is not None}
        if len(norms) > 1:
            raise InputError("blocks are asked for with and without the final norm: choose one")
        self.options: dict[str, Any] = {"norm": True in norms, "output_fmt": "NCHW"}
        if self.blocks and "return_prefix_tokens" in _parameters(model, "forward_intermediates"):
            self.options["return_prefix_tokens"] = True
        if gives_logits and not _parameters(model, "forward_head"):
            raise InputError("it has no forward_head, so it gives features alone, not logits")
        self._forward: Any = self._run

    def __call__(self, images: Tensor) -> tuple[Any, dict[int | None, Parts]]:
        return self._forward(images)

    def compile(self) -> None:
        self._forward = torch.compile(self._run, dynamic=False)

    def gives(self, parts: Parts, block: int | None) -> list[str]:
        own = given_by(parts)
        if block is None and self.has_pooled and "pooled" not in own:
            own.append("pooled")
        return own

    def _run(self, images: Tensor) -> tuple[Any, dict[int | None, Parts]]:
        model: Any = self.model
        end, outputs, logits = None, [], None
        if not self.blocks:
            end = model.forward_features(images)
        else:
            only = not self.needs_end
            found = model.forward_intermediates(
                images, indices=self.blocks, intermediates_only=only, stop_early=only,
                **self.options,
            )  # fmt: skip
            end, outputs = (None, found) if only else found
        parts: dict[int | None, Parts] = {
            block: self._of_block(output)
            for block, output in zip(self.blocks, outputs, strict=True)
        }
        if end is not None:
            parts[None] = self._of_end(end)
        if self.gives_logits:
            logits = model.forward_head(end)
        return logits, parts

    def _of_block(self, output: Any) -> dict[str, Tensor]:
        if isinstance(output, Tensor):
            return {"patches": as_tokens(output)}
        patches, prefix = output
        return _class_of(prefix, has_class_token(self.model)) | {"patches": as_tokens(patches)}

    def _of_end(self, end: Any) -> dict[str, Tensor]:
        parts = self._tokens(end)
        if self.pools:
            model: Any = self.model
            parts["pooled"] = model.forward_head(end, pre_logits=True)
        return parts

    def _tokens(self, end: Any) -> dict[str, Tensor]:
        """The parts of what ``forward_features`` returns."""
        if not isinstance(end, Tensor):
            return named_parts(end)
        if end.dim() == 4:
            is_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            return {"patches": as_tokens(end.permute(0, 3, 1, 2) if is_last else end)}
        if end.dim() == 3:
            return split_tokens(end, self._prefix(end), has_class_token(self.model))
        return {}

    def _prefix(self, end: Tensor) -> int:
        """Number of tokens before the patches.

        Raises:
            InputError: the network does not say; the message is the end of a sentence.
        """
        prefix = getattr(self.model, "num_prefix_tokens", None)
        if type(prefix) is int:
            return prefix
        is_square = math.isqrt(end.shape[1]) ** 2 == end.shape[1]
        if getattr(self.model, "cls_token", None) is None and is_square:
            return 0
        raise InputError(
            f"forward_features returns {tuple(end.shape)}, and no num_prefix_tokens says which "
            f"tokens are patches"
        )


def choose_pass(
    model: nn.Module, targets: Sequence[FeatureTarget], gives_logits: bool, output: Any,
    num_classes: int | None = None,
) -> tuple[NetworkPass, tuple[FeatureTarget, ...]]:  # fmt: skip
    """How to run a network for logits and features; and the targets, with blocks from 0.

    Args:
        output: what the network returned for a batch.
        num_classes: what it was asked for; tells logits from features.

    Raises:
        InputError: it gives no features, or none of a block; the message is the end of a sentence.
    """
    if not targets:
        return NetworkPass(model), ()
    is_named = not isinstance(output, Tensor) and has_names(output)
    if not is_named and callable(getattr(model, "forward_features", None)):
        targets = [_with_block_from_0(target, model) for target in targets]
        return TimmPass(model, targets, gives_logits), tuple(targets)
    if not is_named and not isinstance(output, Tensor):
        raise InputError(f"it returns {describe(output)}, no features by name: {_REMEDY}")
    if isinstance(output, Tensor) and gives_logits:
        raise InputError(
            f"it returns one tensor {tuple(output.shape)}, logits or features but not both: "
            f"{_REMEDY}"
        )
    if isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] == num_classes:
        raise InputError(
            f"it returns one tensor {tuple(output.shape)} with a column for each class, so "
            f"logits, not features: {_REMEDY}"
        )
    if blocks := [target.block for target in targets if target.block is not None]:
        raise InputError(
            f"features.block={blocks[0]}: it has no forward_intermediates, which gives the "
            f"outputs of blocks; omit features.block"
        )
    return OutputPass(model), tuple(targets)


def _with_block_from_0(target: FeatureTarget, model: nn.Module) -> FeatureTarget:
    if target.block is None:
        return target
    if not callable(getattr(model, "forward_intermediates", None)):
        raise InputError(
            f"features.block={target.block}: it has no forward_intermediates, which gives the "
            f"outputs of blocks; omit features.block"
        )
    stages: Any = getattr(model, "feature_info", None) or getattr(model, "blocks", ())
    block = target.block + len(stages) * (target.block < 0)
    if not 0 <= block < len(stages):
        raise InputError(
            f"features.block={target.block}: its blocks are 0 to {len(stages) - 1}, or "
            f"-{len(stages)} to -1"
        )
    return replace(target, block=block)


def require_part(target: FeatureTarget, parts: Parts, given: Sequence[str]) -> None:
    """
    Raises:
        InputError: a target cannot be made of the parts; the message is the end of a sentence.
    """
    if target.name not in given_by(parts):
        where = "" if target.block is None else f" after block {target.block}"
        has = ", ".join(given) or "no features"
        raise InputError(f"it has no {target.name}{where}; it has {has}")


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def has_names(output: Any) -> bool:
    """Whether an output has features by name."""
    names = [name for names in _NAMES.values() for name in names]
    return any(_entry(output, name) is not None for name in [*names, _HIDDEN])


def named_parts(output: Any) -> dict[str, Tensor]:
    """The features that an output has by name.

    Raises:
        InputError: one is no tensor of floats; the message is the end of a sentence.
    """
    parts: dict[str, Tensor] = {}
    for part, names in _NAMES.items():
        found = [value for name in names if (value := _entry(output, name)) is not None]
        if found:
            require_floats(part, found[0])
            parts[part] = as_tokens(found[0]) if part == "patches" else found[0]
    return parts


def _entry(output: Any, name: str) -> Any:
    """The entry or attribute of that name; None where there is none. A method is none."""
    if isinstance(output, Mapping):
        return output.get(name)
    value = getattr(output, name, None)
    return None if callable(value) and not isinstance(value, Tensor) else value


def as_tokens(patches: Tensor) -> Tensor:
    """[B, N, D] of patches in that form or as a map [B, D, h, w].

    Raises:
        InputError: another shape, or a map that is no square; the message is the end of a sentence.
    """
    if patches.dim() == 4 and patches.shape[2] == patches.shape[3]:
        return patches.flatten(2).transpose(1, 2)
    if patches.dim() != 3:
        raise InputError(
            f"its patches have the shape {tuple(patches.shape)}, not [B, N, D] or a square map "
            f"[B, D, h, h]"
        )
    return patches


def split_tokens(tokens: Tensor, prefix: int, has_class: bool) -> dict[str, Tensor]:
    """Class token and patches of tokens [B, prefix + N, D]; the class token comes first."""
    return _class_of(tokens[:, :prefix], has_class) | {"patches": tokens[:, prefix:]}


def _class_of(prefix: Tensor, has_class: bool) -> dict[str, Tensor]:
    return {"cls": prefix[:, 0]} if has_class and prefix.shape[1] else {}


def has_class_token(model: nn.Module) -> bool:
    """Whether the first of a network's prefix tokens is a class token and not a register."""
    said = getattr(model, "has_class_token", None)
    if said is None and hasattr(model, "cls_token"):
        return model.cls_token is not None
    return said is not False


def _parameters(model: nn.Module, method: str) -> set[str]:
    """Names of the parameters of a method; none where there is no such method."""
    found = getattr(model, method, None)
    return {*inspect.signature(found).parameters} if callable(found) else set()
