"""What people build with timm's vision transformers, and what they attach to them.

A case is a model, an attachment, a mode and a set of kernels. The attachment is applied in the same
way to timm's model and to the fused one, before or after fusing.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm.layers
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn.utils import prune as pruning

from helpers.fused import KERNELS
from helpers.kernels import DEVICE

SMALL: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7,
}  # fmt: skip
NO_TOKEN = {"class_token": False, "global_pool": "avg"}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "qkv_bias": {"qkv_bias": False},
    "qk_norm": {"qk_norm": True},
    "scale_attn_norm": {"scale_attn_norm": True},
    "scale_mlp_norm": {"scale_mlp_norm": True},
    "proj_bias": {"proj_bias": False},
    "init_values": {"init_values": 0.3},
    "class_token": NO_TOKEN,
    "reg_tokens": {"reg_tokens": 2},
    "no_embed_class": {"no_embed_class": True},
    "pos_embed": {"pos_embed": "none"},
    "pre_norm": {"pre_norm": True},
    "final_norm": {"final_norm": False},
    "fc_norm": {"fc_norm": True},
    "avg": {"global_pool": "avg"},
    "avg_fc_norm": {"global_pool": "avg", "fc_norm": False},
    "avgmax": {"global_pool": "avgmax"},
    "max": {"global_pool": "max"},
    "map": {"global_pool": "map"},
    "prr": {"global_pool": "prr"},
    "no_pool": {"global_pool": ""},
    "pool_include_prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "dynamic_img_size": {"dynamic_img_size": True},
    "dynamic_img_pad": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "drop_rate": {"drop_rate": 0.3},
    "pos_drop_rate": {"pos_drop_rate": 0.3},
    "patch_drop_rate": {"patch_drop_rate": 0.5},
    "proj_drop_rate": {"proj_drop_rate": 0.3},
    "attn_drop_rate": {"attn_drop_rate": 0.3},
    "drop_path_rate": {"drop_path_rate": 0.5},
    "norm_layer": {"norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    "rmsnorm": {"norm_layer": "rmsnorm"},
    "act_layer": {"act_layer": "relu"},
    "gelu_tanh": {"act_layer": "gelu_tanh"},
    "embed_norm_layer": {"embed_norm_layer": "layernorm"},
    "embed_layer": {"embed_layer": partial(timm.layers.PatchEmbed, strict_img_size=False)},
    "swiglu": {"mlp_layer": timm.layers.SwiGLU, "act_layer": "silu"},
    "swiglu_packed": {"mlp_layer": timm.layers.SwiGLUPacked},
    "res_post": {"block_fn": ResPostBlock},
    "parallel_scaling": {"block_fn": ParallelScalingBlock},
    "parallel_things": {"block_fn": ParallelThingsBlock},
    "diff": {"attn_layer": "diff"},
    "depth": {"depth": 1},
    "num_classes": {"num_classes": 0},
    "distilled": {"kind": VisionTransformerDistilled},
    "distilled_training": {"kind": VisionTransformerDistilled, "distilled_training": True},
}
Events = list[tuple[str, str, tuple[int, ...]]]


@dataclass
class Case:
    """Everything is drawn from the seed."""

    seed: int
    options: tuple[str, ...]
    attachment: str
    training: bool
    kernels: tuple[str, ...]
    fused_first: bool
    events: Events = field(default_factory=list)

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        kernels = "kernels" if self.kernels else "none"
        order = "attached later" if self.fused_first else "attached before"
        return (
            f"{self.seed}: {'+'.join(self.options)}, {self.attachment}, {mode}, {kernels}, {order}"
        )


def make(options: tuple[str, ...]) -> nn.Module:
    """A model with parameters that differ from 0 and 1; an invalid combination raises."""
    chosen = dict(SMALL)
    for name in options:
        chosen |= OPTIONS[name]
    kind = chosen.pop("kind", VisionTransformer)
    trains_both = chosen.pop("distilled_training", False)
    torch.manual_seed(1)
    model = kind(**chosen)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if trains_both:
        model.set_distilled_training(True)
    return model.to(DEVICE)


# ---------------------------------------------------------------------------------------------
# Attachments
# ---------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A low-rank update beside a linear layer, with dropout, as LoRA makes it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.drop = nn.Dropout(0.2)
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.drop(x)))


class Scaled(nn.Module):
    """Any module with its output scaled."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.factor = nn.Parameter(torch.tensor(1.2))

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.factor * self.inner(*arguments, **options)


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    blocks = model.get_submodule("blocks")
    return [(f"blocks.{name}", m) for name, m in blocks.named_modules() if type(m) is nn.Linear]


def inner(model: nn.Module, choice: random.Random) -> tuple[str, nn.Module]:
    """One module of the model, half of the time of the last block."""
    names = [name for name, module in model.named_modules() if name and name != "blocks"]
    last = [name for name in names if name.startswith(f"blocks.{len(model.blocks) - 1}.")]
    name = choice.choice(last if last and choice.random() < 0.5 else names)
    return name, model.get_submodule(name)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    model.set_submodule(name, module.to(DEVICE).train(model.training))


def adapt(model: nn.Module, case: Case, choice: random.Random) -> None:
    for name, layer in linears(model):
        replace(model, name, Adapter(layer))


def scale_one(model: nn.Module, case: Case, choice: random.Random) -> None:
    name, module = inner(model, choice)
    if name == "patch_embed":  # the model reads its attributes
        name, module = "norm", model.norm
    replace(model, name, Scaled(module))


def prune(model: nn.Module, case: Case, choice: random.Random) -> None:
    for _, layer in linears(model):
        pruning.random_unstructured(layer, "weight", 0.5)


def parametrize(model: nn.Module, case: Case, choice: random.Random) -> None:
    change = choice.choice((torch.nn.utils.parametrizations.weight_norm,
                            torch.nn.utils.parametrizations.spectral_norm))  # fmt: skip
    for _, layer in linears(model):
        change(layer)


def quantize(model: nn.Module, case: Case, choice: random.Random) -> None:
    kinds = {nn.Linear: torch.ao.quantization.default_dynamic_qconfig}
    torch.ao.quantization.quantize_dynamic(model, kinds, inplace=True)


def shard(model: nn.Module, case: Case, choice: random.Random) -> None:
    """Needs a process group."""
    from torch.distributed.fsdp import fully_shard

    which = choice.choice(("blocks", "parts", "model"))
    for block in model.blocks:
        if which == "blocks":
            fully_shard(block)
        elif which == "parts":
            for part in list(block.children())[:4:2]:
                if any(True for _ in part.parameters()):
                    fully_shard(part)
    fully_shard(model)


def checkpoint(model: nn.Module, case: Case, choice: random.Random) -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers

    kinds = tuple({type(block) for block in model.blocks})
    wrappers.apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, kinds))


def timms_checkpoint(model: nn.Module, case: Case, choice: random.Random) -> None:
    model.set_grad_checkpointing(True)


def compile_each(model: nn.Module, case: Case, choice: random.Random) -> None:
    for block in model.blocks:
        block.compile(backend="eager")


def note(case: Case, kind: str, name: str, change: bool) -> Callable[..., Any]:
    """A hook that records its call and, if asked, changes the tensor that it sees."""

    def hook(module: nn.Module, first: Any, *others: Any) -> Any:
        tensor = others[-1] if kind == "forward" else first
        tensor = tensor[0] if isinstance(tensor, tuple) and tensor else tensor
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
        case.events.append((kind, name, shape))
        return 1.1 * tensor if change and isinstance(tensor, Tensor) else None

    return hook


def hook(module: nn.Module, case: Case, kind: str, name: str, change: bool = False) -> None:
    register = {
        "forward": module.register_forward_hook,
        "pre": module.register_forward_pre_hook,
        "backward": module.register_full_backward_hook,
        "backward_pre": module.register_full_backward_pre_hook,
    }[kind]
    register(note(case, kind, name, change))


KINDS = ("forward", "pre", "backward", "backward_pre")


def hook_all(model: nn.Module, case: Case, choice: random.Random) -> None:
    kinds = KINDS if choice.random() < 0.5 else (choice.choice(KINDS),)
    for name, module in model.named_modules():
        for kind in kinds:
            hook(module, case, kind, name)


def hook_one(model: nn.Module, case: Case, choice: random.Random) -> None:
    name, module = inner(model, choice)
    kind = choice.choice(KINDS)
    hook(module, case, kind, name, change=kind in ("forward", "pre"))


def hook_with_options(model: nn.Module, case: Case, choice: random.Random) -> None:
    name, module = inner(model, choice)

    def see(_: nn.Module, arguments: tuple, options: dict) -> None:
        case.events.append(("options", name, tuple(sorted(options))))

    module.register_forward_pre_hook(see, with_kwargs=True)


def override_one(model: nn.Module, case: Case, choice: random.Random) -> None:
    module = inner(model, choice)[1]
    forward = module.forward
    module.forward = lambda *arguments, **options: 1.1 * forward(*arguments, **options)


def replace_blocks_method(model: nn.Module, case: Case, choice: random.Random) -> None:
    name = choice.choice(("forward_features", "forward_head", "pool", "_pos_embed"))
    if name == "pool" or (name == "forward_head" and not hasattr(model, "head_dist")):
        setattr(model, name, lambda x, *_: x[:, 1:].mean(1))  # reads what a class token does not
        return
    method = getattr(model, name)
    setattr(model, name, lambda *arguments, **options: method(*arguments, **options))


def explicit_attention(model: nn.Module, case: Case, choice: random.Random) -> None:
    """To see the attention weights: timm's slow path with a hook on the dropout in it."""
    for block in model.blocks:
        if hasattr(block, "attn"):
            block.attn.fused_attn = False
            hook(block.attn.attn_drop, case, "forward", "attn_drop", change=True)


def nothing(model: nn.Module, case: Case, choice: random.Random) -> None:
    pass


ATTACHMENTS: dict[str, Callable[[nn.Module, Case, random.Random], None]] = {
    "nothing": nothing, "adapt": adapt, "scale_one": scale_one, "prune": prune,
    "parametrize": parametrize, "quantize": quantize, "shard": shard, "checkpoint": checkpoint,
    "timms_checkpoint": timms_checkpoint, "hook_all": hook_all, "hook_one": hook_one,
    "hook_with_options": hook_with_options, "global_hook": nothing, "override_one": override_one,
    "method": replace_blocks_method, "explicit_attention": explicit_attention,
    "compile": compile_each,
}  # fmt: skip


@contextlib.contextmanager
def global_hook(case: Case) -> Iterator[None]:
    def see(module: nn.Module, _: Any, output: Any) -> None:
        kind = type(module)
        plain = getattr(kind, "swapped_from", kind).__name__.removeprefix("Fused")
        shape = tuple(output.shape) if isinstance(output, Tensor) else ()
        case.events.append(("global", plain, shape))

    handle = torch.nn.modules.module.register_module_forward_hook(see)
    yield
    handle.remove()


# ---------------------------------------------------------------------------------------------
# Draws of cases
# ---------------------------------------------------------------------------------------------


def draw(seed: int, attachments: tuple[str, ...]) -> Case:
    """A random combination of up to three options with one attachment."""
    choice = random.Random(seed)
    while True:
        options = tuple(choice.sample(list(OPTIONS), choice.choice((1, 1, 2, 3))))
        try:
            make(options)
        except (AssertionError, TypeError):  # a combination that timm does not build
            continue
        break
    return Case(
        seed, options, choice.choice(attachments), choice.random() < 0.6,
        choice.choice(((), KERNELS)), choice.random() < 0.6,
    )  # fmt: skip
