"""Weights files: safetensors, or torch checkpoints read with ``weights_only=True``.

The safetensors files that this package writes carry a checksum of all bytes in `__metadata__`.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deit_fast.config import MOST_INITIAL_SHARE
from deit_fast.errors import InputError, first_line, is_out_of_memory, printable
from deit_fast.inputs import require_weights_file
from deit_fast.models.pretrained import load_pretrained, pretrained_name
from deit_fast.models.weights_facts import class_names, identity_of, initial_share
from deit_fast.models.weights_layout import (
    MissingKey,
    adapt_layout,
    find_state,
    held_weights,
    shown_keys,
)
from deit_fast.models.wide_students import WideStudent
from deit_fast.runtime.files import open_regular
from deit_fast.runtime.tensor_files import digest_tensors, read_header, read_tensors, save_tensors
from deit_fast.runtime.torch_files import load_torch
from deit_fast.runtime.weights_header import split_key

log = logging.getLogger("deit_fast")

_NOUN = "weights file"


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a `.safetensors` file or a torch checkpoint.

    Of a checkpoint with several state dicts, an average of the weights is preferred, as timm's
    load_checkpoint does (`state_dict_ema`, `model_ema`), to the weights themselves (`state_dict`,
    `model`). A line of the log says which was taken. Prefixes of DistributedDataParallel, FSDP,
    torch.compile and activation checkpointing are removed.

    Args:
        path: FILE, or FILE#KEY: the state dict under the key, or the tensors whose names begin with
            the key and a dot. Or `timm:NAME`: timm's pretrained weights.

    Returns:
        Name to tensor, on the CPU.

    Raises:
        InputError: the file is missing or damaged, is not a weights file, or holds no tensors; timm
            has no such weights.
    """
    if (name := pretrained_name(path)) is not None:
        remedy = "give --model.weights FILE, or none to start from random weights"
        return load_pretrained(name, "weights", remedy).state_dict()
    require_weights_file(path)
    file, key = split_key(path)
    try:
        saved = read_tensors(file, _NOUN) if file.suffix == ".safetensors" else _read_torch(file)
        tensors, keys = find_state(saved, key)
    except MissingKey as error:
        raise InputError(f"weights file {printable(file)} {error}") from None
    if not tensors:
        raise InputError(f"weights file {path} holds no tensors{shown_keys(saved)}")
    if keys:
        others = [f"{file}#{name}" for name in held_weights(saved) if name not in keys]
        more = f"; there is also {', '.join(others)}" if others else ""
        log.info("weights file %s: %s is taken%s", file, ".".join(keys), more)
    if (
        key is None
        and keys == ["ema"]
        and (share := initial_share(saved, file)) > MOST_INITIAL_SHARE
    ):
        log.warning(
            "weights file %s: its average is %.1f %% the initial weights of its run: %s#model is "
            "what was trained", file, 100 * share, file,
        )  # fmt: skip
    for name, value in tensors.items():
        if value.is_meta or value.is_quantized or value.layout != torch.strided:
            kind = "has no values" if value.is_meta else "is quantised or sparse"
            raise InputError(f"weights file {path}: {printable(name)} {kind}: save dense weights")
    return tensors


def save_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state dict and texts about it as safetensors, atomically and with a checksum.

    Raises:
        OSError: names ``path``, where the old file stays.
    """
    save_tensors(path, state, metadata)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts of a safetensors file beside its tensors, empty in files of other programs.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        return read_header(Path(path), _NOUN)[1]
    except FileNotFoundError:
        raise InputError(f"weights file {path} does not exist") from None


def read_identity(path: str | Path) -> dict[str, Any]:
    """What the run was made of that wrote a weights file; empty where the file does not say.

    Raises:
        InputError: the file is missing or damaged.
    """
    return identity_of(read_metadata(path), path)


def fit_weights(
    model: nn.Module, state: dict[str, Tensor], path: str | Path, of_other_count: str = ""
) -> None:
    """Load ``state`` into ``model``; every name and shape must fit.

    Other names for the same weights, such as those of original repositories, are converted as timm
    does, and a prefix is removed; a line of the log says so.

    Args:
        of_other_count: end of the message about a tensor that differs in its number of rows alone,
            as those of a head do that has other classes.

    Raises:
        InputError: names the first missing, unknown or differently shaped tensor.
    """
    _load(model, *adapt_names(model, state, path), path, of_other_count)


def adapt_names(
    model: nn.Module, state: dict[str, Tensor], path: str | Path, resample: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` under the names of ``model``, and what was done, see ``adapt_layout``.

    Raises:
        InputError: the file holds the model more than once.
    """
    try:
        return adapt_layout(model, state, resample)
    except InputError as error:
        raise InputError(f"weights file {path}: {error}") from None


def _load(
    model: nn.Module, state: Mapping[str, Tensor], notes: Sequence[str], path: str | Path,
    of_other_count: str = "",
) -> None:  # fmt: skip
    own = model.state_dict()
    for name, value in own.items():
        if name not in state:
            if name.endswith("num_batches_tracked"):  # files of early versions of PyTorch
                continue
            raise InputError(f"weights file {path} lacks {name}")
        if state[name].shape != value.shape:
            same_rows = state[name].dim() > 0 and state[name].shape[1:] == value.shape[1:]
            raise InputError(
                f"weights file {path}: {name} is {tuple(state[name].shape)} there, "
                f"{tuple(value.shape)} in the model{of_other_count if same_rows else ''}"
            )
        if value.is_floating_point() != state[name].is_floating_point():
            raise InputError(
                f"weights file {path}: {name} is of {state[name].dtype} there, of {value.dtype} in "
                f"the model"
            )
    unknown = sorted(set(state) - set(own))
    if unknown:
        raise InputError(f"weights file {path} has {unknown[0]}, which the model lacks")
    model.load_state_dict(state, strict=False)
    if notes:
        log.info("weights file %s: %s", path, "; ".join(notes))


def start_from(
    model: nn.Module,
    state: dict[str, Tensor],
    path: str | Path,
    classes: Sequence[str] | None = None,
) -> None:
    """Load ``state`` into a model for fine-tuning, adapting what fine-tuning changes.

    As ``fit_weights``, and with one log line for each of these adaptations:

    - Position embeddings of another image size are interpolated by timm's resample_abs_pos_embed
      (bicubic with antialiasing, as timm loads checkpoints; facebookresearch/deit interpolates
      without antialiasing). Those of class and distillation token are kept.
    - Weights without a distillation token may initialise a distilled student. Its token and head
      keep their initial values, and the token gets a copy of the class token's position embedding:
      it starts as a class token with a small change, which the pretrained blocks can process.
    - Heads of another class count or of other classes keep their initial values, and those that
      the file lacks. Where it names the same classes in another order, the rows follow the names.
    - The wide parts of Lift and WideLast keep their initial values where the file has none.
    - Patch embeddings of another patch size are resampled by timm.

    Args:
        classes: names of the classes, in the order of the logits; None: not compared.

    Raises:
        InputError: as ``fit_weights``, for everything else that does not fit.
    """
    state, layout = adapt_names(model, state, path, resample=True)
    state = dict(state)
    notes = [*_adapt_heads(model, state, classes, path)]
    if isinstance(model, VisionTransformer):
        notes += _adapt_distillation(model, state)
        notes += _adapt_width(model, state)
        notes += _adapt_positions(model, state)
    _load(model, state, layout, path)
    for note in notes:
        log.info("weights file %s: %s", path, note)


# Each of these changes ``state`` in place and yields the log lines. Where the weights differ in
# another way it changes nothing, and fit_weights refuses them.


def _adapt_heads(
    model: nn.Module, state: dict[str, Tensor], classes: Sequence[str] | None, path: str | Path
) -> Iterator[str]:
    own = model.state_dict()
    theirs = class_names(path) if classes is not None else None
    equal = []
    for name in _heads(model, None if classes is None else len(classes)):
        weight = f"{name}.weight"
        keys = [key for key in (weight, f"{name}.bias") if key in own]
        if weight not in keys:
            continue
        why = ""
        is_new = name == "head_dist" and "dist_token" not in state  # see _adapt_distillation
        if not is_new and not {*keys} & state.keys():
            why = "is not there"
        elif {*keys} <= state.keys():
            count, ours = state[weight].shape[:1], own[weight].shape[:1]
            is_head = state[weight].shape[1:] == own[weight].shape[1:]
            if not is_head or any(state[key].shape[:1] != count for key in keys):
                continue
            if theirs is not None and len(theirs) != count[0]:
                raise InputError(
                    f"weights file {path}: it names {len(theirs)} classes, {name} has {count[0]}"
                )
            if count != ours:
                why = f"has {count[0]} classes there, {ours[0]} here"
            elif theirs and classes and sorted(theirs) != sorted(classes):
                other = next(item for item in theirs if item not in classes)
                why = f"is of other classes there, such as {printable(other)!r}"
            else:
                equal += keys
        if why:
            state |= {key: own[key] for key in keys}
            yield f"{name} {why}: it keeps its initial values"
    if not classes or not equal or theirs == list(classes):
        return
    names = " and ".join(dict.fromkeys(key.rpartition(".")[0] for key in equal))
    if theirs is None:
        yield f"it does not name its classes: those of {names} count in the order of the data's"
        return
    rows = [theirs.index(name) for name in classes]
    for key in equal:
        state[key] = state[key][rows]
    yield f"its classes are in another order: the rows of {names} follow their names"


def _heads(model: nn.Module, count: int | None) -> tuple[str, ...]:
    """Names of the model's heads: those of timm's entry, or its last layer that can be one.

    That is a linear layer or a 1 x 1 convolution, with ``count`` outputs where it has such a layer.
    """
    if isinstance(model, VisionTransformer):
        return "head", "head_dist"
    entry = getattr(model, "pretrained_cfg", None)
    named = entry.get("classifier") if isinstance(entry, dict) else None
    if named:
        return (named,) if isinstance(named, str) else tuple(named)
    outputs = {name: len(part.weight) for name, part in model.named_modules() if _can_be_head(part)}
    fitting = [name for name, number in outputs.items() if number == count] or [*outputs]
    return tuple(fitting[-1:])


def _can_be_head(part: Any) -> bool:
    is_convolution = isinstance(part, nn.Conv2d) and part.groups == 1
    return isinstance(part, nn.Linear) or (is_convolution and part.kernel_size == (1, 1))


def _adapt_distillation(model: VisionTransformer, state: dict[str, Tensor]) -> Iterator[str]:
    new = ("dist_token", "head_dist.weight", "head_dist.bias")
    if not isinstance(model, VisionTransformerDistilled) or any(name in state for name in new):
        return
    own = model.state_dict()
    state |= {name: own[name] for name in new}
    positions, text = state.get("pos_embed"), ""
    if positions is not None and positions.dim() == 3 and not model.no_embed_class:
        state["pos_embed"] = torch.cat([positions[:, :1], positions], dim=1)
        text = "; the token gets the class token's position"
    yield f"no distillation token: dist_token and head_dist keep their initial values{text}"


def _adapt_width(model: nn.Module, state: dict[str, Tensor]) -> Iterator[str]:
    if not isinstance(model, WideStudent) or f"{model.widen_path}.proj.weight" in state:
        return
    own: dict[str, Tensor] = model.state_dict()  # type: ignore[attr-defined]
    parts = [part for part in model.new_parts if any(name.startswith(f"{part}.") for name in own)]
    prefixes = tuple(f"{part}." for part in parts)
    for name in [name for name in state if name.startswith(prefixes)]:
        del state[name]
    state |= {name: value for name, value in own.items() if name.startswith(prefixes)}
    yield f"it is of another width: {', '.join(parts)} keep their initial values"


def _adapt_positions(model: VisionTransformer, state: dict[str, Tensor]) -> Iterator[str]:
    theirs, ours = state.get("pos_embed"), model.pos_embed
    if theirs is None or ours is None or theirs.dim() != 3 or theirs.shape[2] != ours.shape[2]:
        return
    if ("dist_token" in state) != isinstance(model, VisionTransformerDistilled):
        return  # the prefix tokens differ
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    patches = theirs.shape[1] - prefix
    side = math.isqrt(max(patches, 0))
    rows, columns = model.patch_embed.grid_size
    if patches < 1 or side * side != patches or theirs.shape[1] == ours.shape[1]:
        return
    state["pos_embed"] = resample_abs_pos_embed(theirs, [rows, columns], num_prefix_tokens=prefix)
    yield f"position embedding interpolated from {side} x {side} to {rows} x {columns}"


def digest_weights(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers."""
    return digest_state(model.state_dict())


def digest_state(state: Mapping[str, Tensor]) -> str:
    """``digest_weights`` of a state dict."""
    return digest_tensors(state)


def _read_torch(path: Path) -> dict[str, Any]:
    if path.suffix in (".npz", ".npy"):
        raise InputError(
            f"weights file {path} is of NumPy, as JAX's are: load it into timm's model "
            "with model.load_pretrained, and save model.state_dict() as safetensors"
        )
    try:
        # facebookresearch/deit and timm keep their arguments beside the weights: a plain namespace.
        with torch.serialization.safe_globals([argparse.Namespace]), open_regular(path) as file:
            state, _ = load_torch(file)
    except (FileNotFoundError, InputError):
        raise
    except Exception as error:  # torch raises half a dozen types for a bad file
        if is_out_of_memory(error):
            raise
        reason = printable(first_line(error))
        raise InputError(
            f"weights file {path} cannot be read safely: {reason}; where you trust it, load it in "
            "a sandbox and save its state dict as safetensors"
        ) from None
    if not isinstance(state, dict):
        raise InputError(f"weights file {path} holds a {type(state).__name__}, not a state dict")
    return state
