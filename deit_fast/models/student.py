"""Students: timm's vision transformers under timm's parameter names, which are DeiT's own."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from deit_fast.config import ModelConfig, RunConfig
from deit_fast.errors import InputError, did_you_mean, first_line
from deit_fast.models.fuse import fuse, head_tokens
from deit_fast.models.fused import PREFIX_HEADS
from deit_fast.models.names import build_from_factory, is_timm_transformer
from deit_fast.models.padded_head import pad_heads
from deit_fast.models.teacher_outputs import describe
from deit_fast.models.wide_students import WideLastDistilled, make_wide

log = logging.getLogger("deit_fast")

# Factories of this package, which a file may name like a timm model.
_OWN_FACTORIES = ("deit_fast.models.convnet:small_convnet",)


def require_no_code(spec: str, given: Sequence[str], where: str, flag: str) -> None:
    """Refuse to import a module that only a file names.

    Args:
        spec: name of a model as the file has it.
        given: the names that the user gave by ``flag``.

    Raises:
        InputError: ``spec`` is a factory that the user did not give.
    """
    if ":" in spec and spec not in (*_OWN_FACTORIES, *given):
        raise InputError(
            f"{where} names the model {spec!r}, and a file may not decide which code is run: if "
            f"you trust this module, give {flag} {spec}"
        )


class OneHeadTrained(VisionTransformerDistilled):
    """A distilled transformer of whose two heads only one was trained.

    In evaluation mode ``model(x)`` returns that head's logits alone, and not the mean with those of
    a head that is still random. In training mode it returns both, as timm's class.
    """

    # In statements that torch.jit.script compiles; scripted, it returns one head in both modes.
    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        if self.training and not pre_logits and not torch.jit.is_scripting():
            return super().forward_head(x)
        if self.trained_head == "class":
            return x[:, 0] if pre_logits else self.head(x[:, 0])
        return x[:, 1] if pre_logits else self.head_dist(x[:, 1])


class WideLastOneHeadTrained(WideLastDistilled, OneHeadTrained):
    """WideLast with two heads, of which only one was trained."""


PREFIX_HEADS.add(OneHeadTrained.forward_head)
_ONE_HEAD: dict[type, type] = {
    VisionTransformerDistilled: OneHeadTrained, WideLastDistilled: WideLastOneHeadTrained,
}  # fmt: skip
_TRAINED = {"class": (0, "head"), "distillation": (1, "head_dist")}  # its token and its name


def keep_trained_head(model: nn.Module, head: str) -> None:
    """Make evaluation use one head of a distilled transformer, which must not be fused yet.

    Args:
        head: "class" or "distillation"; "both", like a model without two heads, changes nothing.
    """
    if head == "both" or not isinstance(model, VisionTransformerDistilled):
        return
    if head not in _TRAINED:
        raise InputError(f"the trained head must be class, distillation or both, not {head!r}")
    model.trained_head = head  # type: ignore[assignment]
    # another subclass decides what model(x) returns
    model.__class__ = _ONE_HEAD.get(type(model), type(model))


def trained_head(model: nn.Module) -> str:
    """The head of a distilled transformer that is evaluated alone; "both": their mean."""
    return str(getattr(model, "trained_head", "both"))


def create_student(
    name: str,
    num_classes: int,
    drop_path: float = 0.0,
    img_size: int = 224,
    *,
    fused: bool = True,
    stochastic_depth: str = "sample",
    residual: str = "float32",
    kernels: tuple[str, ...] | None = None,
    pad_head: bool = False,
    trained_head: str = "both",
    patch_drop: float = 0.0,
    other_sizes: Sequence[int] = (),
    head: str = "standard",
    wide: int | None = None,
    **args: Any,
) -> nn.Module:
    """Build a model to train, with random weights.

    Distilled transformers return ``(class_logits, distill_logits)`` in training mode and the mean
    of both in evaluation mode (DeiT, section 4), or one of them, see ``trained_head``. State dicts
    of facebookresearch/deit load unchanged.

    Args:
        name: a timm model name, or ``package.module:factory``. A factory takes ``num_classes`` and
            decides everything else; the remaining arguments must keep their defaults.
        num_classes: classes of each head.
        drop_path: stochastic depth rate of the last block; it rises linearly from 0 at the first.
        img_size: side of the input, pixels.
        fused: run a timm VisionTransformer on this package's kernels, see ``fuse``.
        stochastic_depth: "sample" or "subset", see ``fuse``; "subset" needs ``fused``.
        residual: "float32" or "bfloat16", see ``fuse``; "bfloat16" needs ``fused``.
        kernels: see ``fuse``; None: the default of this machine's GPU. Others need ``fused``.
        pad_head: align the rows of the logits to 16 bytes, see ``pad_heads``.
        trained_head: "class" or "distillation": the only head of a distilled transformer that the
            loss trains. In evaluation mode the model returns its logits. Others ignore it.
        patch_drop: share of the patches that training leaves out of a vision transformer.
        other_sizes: sides of images beside ``img_size`` that it must take, pixels. A transformer
            resamples its position embeddings for each (timm's ``dynamic_img_size``).
        head: "lift" or "wide_last" gives a transformer features of ``wide`` channels, see
            ``deit_fast.models.wide_students``; "standard": the named model.
        wide: channels of these features.
        args: arguments of timm's transformer, such as ``depth``, in place of the named model's.

    Raises:
        InputError: unknown name, or an option that the model does not support.
    """
    fuse_options: dict[str, Any] = {
        "stochastic_depth": stochastic_depth, "residual": residual, "kernels": kernels
    }  # fmt: skip
    ModelConfig(head=head, wide=wide)  # type: ignore[arg-type]  # or it raises
    is_factory = ":" in name
    if not is_factory and not timm.is_model(name):
        raise InputError(f"unknown model {name!r}{did_you_mean(name, timm.list_models())}")
    is_transformer = is_timm_transformer(name)
    if args and not is_transformer:
        raise InputError(f"model {name!r} takes no args, got {sorted(args)}")
    if not is_transformer:
        _refuse(
            {"patch_drop": patch_drop, "head": head}, f"a vision transformer of timm, not {name!r}"
        )
    if is_factory:
        _refuse({**fuse_options, "pad_head": pad_head}, f"a timm model, not {name!r}")
        model = build_from_factory(name, num_classes)
        keep_trained_head(model, trained_head)
        _require_sizes(name, model, other_sizes)
        _require_logits(name, model, img_size)
        return model
    arguments: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": drop_path}
    if is_transformer:
        arguments |= {"img_size": img_size} | ({"dynamic_img_size": True} if other_sizes else {})
        arguments |= {"patch_drop_rate": patch_drop} if patch_drop > 0 else {}
        _check_shape(name, img_size, args)
    if args:
        _try_arguments(name, arguments | args)
    model = timm.create_model(name, pretrained=False, **(arguments | args))
    _require_sizes(name, model, (img_size, *other_sizes) if other_sizes else ())
    if wide is not None:
        make_wide(name, model, head, wide)
    if isinstance(model, VisionTransformerDistilled):
        model.set_distilled_training(True)
        if patch_drop > 0:  # timm counts one prefix token, and would drop the distillation token
            model.patch_drop.num_prefix_tokens = model.num_prefix_tokens
        keep_trained_head(model, trained_head)
    if pad_head:
        pad_heads(model)
    if fused and isinstance(model, VisionTransformer):
        return fuse(model, **fuse_options)
    _refuse(fuse_options, "a fused transformer")
    return model


def _refuse(options: dict[str, Any], needed: str) -> None:
    """Raise for an option that does not have its default."""
    for name, value in options.items():
        if value != inspect.signature(create_student).parameters[name].default:
            raise InputError(f"{name}={value!r} needs {needed}")


def _try_arguments(name: str, arguments: dict[str, Any]) -> None:
    """Build the model without memory for its weights, and run it.

    Raises:
        InputError: timm does not know an argument, or cannot build or run such a model.
    """
    size, classes = arguments["img_size"], arguments["num_classes"]
    with torch.device("meta"), torch.no_grad():
        try:
            model = timm.create_model(name, pretrained=False, **arguments)
            shape = model.eval()(torch.zeros(1, 3, size, size)).shape
        except Exception as error:  # whatever an unfit number does to timm
            given = {key: value for key, value in arguments.items() if key != "num_classes"}
            raise InputError(
                f"model {name!r} with args {given}: {first_line(error, with_type=True)}; "
                f"see model.args"
            ) from None
    if shape != (1, classes):
        raise InputError(f"model {name!r} with args {arguments}: its output is {tuple(shape)}")


def _require_logits(name: str, model: nn.Module, size: int) -> None:
    """
    Raises:
        InputError: a factory's model runs on images of ``size`` pixels and returns no logits.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = copy.deepcopy(model).eval()(torch.zeros(2, 3, size, size))
    except Exception:  # it may need a GPU: the first step says what it lacks
        return
    if not isinstance(output, torch.Tensor) or output.dim() != 2 or len(output) != 2:
        raise InputError(
            f"model {name!r} returns in evaluation mode, for 2 images, {describe(output)}, "
            f"not a tensor of logits [2, C]"
        )


def _require_sizes(name: str, model: nn.Module, sizes: Sequence[int]) -> None:
    """
    Raises:
        InputError: the model does not take square images of one of these sizes.
    """
    if not sizes:
        return
    patch = model.patch_embed.patch_size[0] if isinstance(model, VisionTransformer) else 1
    wrong = [size for size in sizes if size % patch]
    if wrong:
        raise InputError(
            f"model {name!r} has patches of {patch} pixels, and the image size {wrong[0]} of "
            f"view.size_schedule is no multiple of that"
        )
    plain = copy.deepcopy(model).to("meta").eval()
    for size in sizes:
        try:
            with torch.no_grad():
                plain(torch.empty(2, 3, size, size, device="meta"))
        except Exception as error:  # whatever a model with one size does
            raise InputError(
                f"model {name!r} takes no images of {size} pixels, a size of view.size_schedule "
                f"({first_line(error, with_type=True)}): choose a model that takes every size"
            ) from None


def _check_shape(name: str, img_size: int, shape: dict[str, int]) -> None:
    most = {"patch_size": 8192, "embed_dim": 65536, "depth": 1000, "num_heads": 1024}
    for key in shape.keys() & most.keys():
        if not 1 <= shape[key] <= most[key]:
            raise InputError(
                f"model {name!r}: {key} must lie in [1, {most[key]}], not {shape[key]}"
            )
    patch = shape.get("patch_size")
    if patch is not None and img_size % patch:
        raise InputError(
            f"model {name!r}: image size {img_size} is no multiple of patch_size {patch}"
        )
    width, heads = shape.get("embed_dim"), shape.get("num_heads")
    if width is not None and heads is not None and width % heads:
        raise InputError(f"model {name!r}: embed_dim {width} is no multiple of num_heads {heads}")


def build_model(config: RunConfig, num_classes: int) -> nn.Module:
    """The student that a run's configuration names, with random weights.

    Of two heads it evaluates those that the run's loss trains; one line says where that is one.
    """
    options = dataclasses.asdict(config.model)
    del options["weights"], options["args"]
    options |= config.model.timm_arguments()
    size = config.view.image_size
    others = [other for other in config.view.sizes if other != size]
    options |= {"img_size": size, "other_sizes": others, "trained_head": config.loss.trained_head}
    model = create_student(num_classes=num_classes, **options)
    if (head := trained_head(model)) != "both":
        loss = config.loss
        setting = "kind=none" if loss.kind == "none" else f"alpha={loss.alpha:g}"
        log.info("loss.%s trains the %s head alone: evaluation leaves the other out", setting, head)
    return model


def forward_heads(
    model: nn.Module, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits of the class head and, where there is one, of the distillation head.

    Unlike ``model(images)``, which returns the mean of the heads in evaluation mode, this returns
    both heads in either mode.

    Args:
        images: float [B, 3, S, S], normalised.

    Returns:
        Two tensors [B, C]; the second is None for a model with one head. In evaluation mode also
        for one with one *trained* head, whose logits the first is then.
    """
    if not isinstance(model, VisionTransformerDistilled):
        return model(images), None
    if model.training:
        return model(images)
    return apply_heads(model, head_tokens(model, images))


def mean_logits(class_logits: torch.Tensor, distill_logits: torch.Tensor | None) -> torch.Tensor:
    """The mean of what ``forward_heads`` returns, as DeiT's code (its paper: of softmaxes)."""
    return class_logits if distill_logits is None else (class_logits + distill_logits) / 2


def top_classes(logits: torch.Tensor, count: int) -> torch.Tensor:
    """IDs of the classes with the ``count`` largest logits, int64 [B, count], the largest first.

    Of equal logits, which bfloat16 often has, the lower ID comes first, as ``argmax`` decides.
    ``topk`` may decide otherwise.
    """
    return logits.sort(stable=True, dim=1, descending=True).indices[:, :count]


def apply_heads(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``forward_heads`` of a distilled transformer from its ``head_tokens``."""
    if (only := trained_head(model)) != "both":
        index, head = _TRAINED[only]
        return getattr(model, head)(tokens[:, index]), None
    heads: Any = model
    return heads.head(tokens[:, 0]), heads.head_dist(tokens[:, 1])
