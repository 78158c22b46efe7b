"""Weights as other programs save them, brought to a model's own names and shapes.

Accepted is what timm's loaders accept (`load_checkpoint`, and the conversions that `create_model`
applies to published files), and prefixes that wrappers leave in names.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deit_fast.errors import InputError, is_out_of_memory, printable


class MissingKey(Exception):
    """A checkpoint has no weights under a key."""


# Where checkpoints keep weights, first the averages, as timm's load_checkpoint prefers them:
# timm, facebookresearch/deit, others, this package; DINO, see ``held_weights``.
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher")
_KEYS = (*_AVERAGES, "state_dict", "model", "model_state_dict", "student", "encoder")

_MAX_DEPTH = 4  # of mappings around weights

# torch.compile, FSDP and activation checkpointing of a module inside the model.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def find_state(saved: Mapping[str, Any], key: str | None) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a checkpoint, and the keys that lead to it.

    Prefixes of DistributedDataParallel, of averages and of compiled or sharded modules are removed.

    Args:
        saved: what the file holds.
        key: the key to take, or the prefix of the names to take; None: the average of the weights
            where there is one.

    Raises:
        MissingKey: there is no such key, or the checkpoint holds itself.
    """
    path: list[str] = []
    keys = shown_keys(saved)
    while key is not None and key not in path:
        found = saved[key] if isinstance(saved.get(key), Mapping) else _under(f"{key}.", saved)
        names = held_weights(saved)
        if _has_weights(found):
            path, saved = [*path, key], found
        elif names:
            path, saved = _descend(path, saved, names[0])
        else:
            raise MissingKey(f"has no weights under the key {printable(key)!r}{keys}")
    while names := held_weights(saved):
        path, saved = _descend(path, saved, names[0])
    state = {
        _without_wrappers(name): value
        for name, value in saved.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if all(name == "n_averaged" or name.startswith("module.") for name in state):
        state.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
    return {name.removeprefix("module."): value for name, value in state.items()}, path


def held_weights(saved: Mapping[str, Any]) -> list[str]:
    """The keys under which a checkpoint holds weights, the preferred one first.

    `teacher` is preferred only as the average of `student`.
    """
    held = [key for key in _KEYS if _has_weights(saved.get(key))]
    if "teacher" in held and not _is_average(saved["teacher"], saved.get("student")):
        held.remove("teacher")
        held.append("teacher")
    return held


def shown_keys(saved: Mapping[str, Any]) -> str:
    """The end of a message: a checkpoint's first keys."""
    names = [printable(key)[:40] for key in list(saved)[:8]]
    return f"; its keys are {', '.join(names)}{', ...' * (len(saved) > len(names))}" * bool(names)


def _descend(path: list[str], saved: Mapping[str, Any], key: str) -> tuple[list[str], Any]:
    """
    Raises:
        MissingKey: the mappings hold each other without an end.
    """
    if len(path) == _MAX_DEPTH:
        raise MissingKey(
            f"holds itself under {printable(key)!r}: save the model's state dict alone"
        )
    return [*path, key], saved[key]


def _has_weights(value: Any, depth: int = _MAX_DEPTH) -> bool:
    """Whether a mapping, or one inside it, has a tensor that is no scalar, such as a decay."""
    if not isinstance(value, Mapping):
        return False
    if any(isinstance(inner, Tensor) and inner.dim() > 0 for inner in value.values()):
        return True
    return depth > 0 and any(_has_weights(inner, depth - 1) for inner in value.values())


def _is_average(teacher: Mapping[str, Any], student: Any) -> bool:
    """Whether all tensors of DINO's teacher are those of its student, which may have more: one
    that distils has another network under `teacher`."""
    own = _shapes(student)
    return bool(own) and _shapes(teacher).items() <= own.items()


def _shapes(value: Any, depth: int = _MAX_DEPTH) -> dict[str, Any]:
    """The shape of each tensor in a mapping, by its name there."""
    if not isinstance(value, Mapping) or not depth:
        return {}
    shapes: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, Tensor):
            shapes[_without_wrappers(str(name)).removeprefix("module.")] = inner.shape
        else:
            shapes |= _shapes(inner, depth - 1)
    return shapes


def _under(prefix: str, names: Mapping[str, Any]) -> dict[str, Any]:
    """What has the prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in names.items()
        if isinstance(name, str) and name.startswith(prefix)
    }


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def adapt_layout(
    model: nn.Module, state: dict[str, Tensor], resample: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under the names of ``model``, and what was done, for the log.

    Args:
        resample: let timm's conversion change sizes, such as that of patches.

    Raises:
        InputError: the file holds the model under more than one prefix.
    """
    own = {name: value.shape for name, value in model.state_dict().items()}
    if {name: value.shape for name, value in state.items()} == own:
        return state, []
    converted = _convert(model, state, resample)
    choices: list[tuple[dict[str, Tensor], list[str]]] = [(state, []), (converted, [_CONVERTED])]
    prefixes = _common_prefixes(own, state)
    if prefixes:
        inner = _under(prefixes[0], state)
        inner |= {name: value for name, value in state.items() if name in own}
        outside = [name for name in state if name not in own and not name.startswith(prefixes[0])]
        notes = [f"names without their prefix {printable(prefixes[0])}"]
        if outside:
            notes.append(f"left out {len(outside)} others, the first is {printable(outside[0])}")
        converted = _convert(model, inner, resample)
        choices += [(inner, notes), (converted, [*notes, _CONVERTED])]
    chosen, notes = max(choices, key=lambda choice: _fit(own, choice[0]))
    if len(prefixes) > 1 and notes and notes[0] != _CONVERTED:
        first, second = (printable(prefix.removesuffix(".")) for prefix in prefixes[:2])
        raise InputError(f"the model is there as {first} and as {second}: choose by FILE#{first}")
    for name in chosen.keys() & state.keys():
        if chosen[name].numel() != state[name].numel():
            sizes = f"{tuple(state[name].shape)} to {tuple(chosen[name].shape)}"
            notes = [*notes, f"{name} resampled from {sizes}"]
    return chosen, notes


_CONVERTED = "converted by timm"


def _fit(own: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """How well weights fit: names of the model, names it lacks, tensors of its shapes."""
    known = own.keys() & state.keys()
    return len(known), len(known) - len(state), sum(state[n].shape == own[n] for n in known)


def _common_prefixes(own: Collection[str], state: Collection[str]) -> list[str]:
    """The prefixes that leave the most names of the model: one, or several that leave as many."""
    counts: Counter[str] = Counter()
    for name in state:
        for at, char in enumerate(name):
            if char == "." and name[at + 1 :] in own:
                counts[name[: at + 1]] += 1
    most = max(counts.values(), default=0)
    return [prefix for prefix, count in counts.items() if count == most]


# ---------------------------------------------------------------------------------------------
# timm's conversions
# ---------------------------------------------------------------------------------------------


def _convert(model: nn.Module, state: dict[str, Tensor], resample: bool) -> dict[str, Tensor]:
    """What timm's conversion of published files makes of weights; it may not be able to."""
    found = _conversion_of(model)
    if found is None:
        return state
    target: Any = model
    if isinstance(model, VisionTransformer):  # without position embeddings: they are not resampled
        target = SimpleNamespace(patch_embed=model.patch_embed, head=model.head, pos_embed=None)
    try:
        converted = found(dict(state), target)
    except Exception as error:  # whatever weights of another model do to it
        if is_out_of_memory(error):
            raise
        return state
    if resample:
        return converted
    return {
        name: state[name] if name in state and state[name].numel() != value.numel() else value
        for name, value in converted.items()
    }


def _conversion_of(model: nn.Module) -> Callable[..., dict[str, Tensor]] | None:
    """timm's function of a model's file that converts checkpoints, DeiT-III's gammas included."""
    for cls in type(model).__mro__:
        function = None
        if cls.__module__.startswith("timm.models."):
            function = getattr(sys.modules[cls.__module__], "checkpoint_filter_fn", None)
        if function is None:
            continue
        parameters = inspect.signature(function).parameters
        options = {"adapt_layer_scale": True} if "adapt_layer_scale" in parameters else {}
        takes_model = "model" in parameters
        return lambda state, model: function(state, *[model] * takes_model, **options)
    return None
