"""Launcher and operator of the distillation loss kernels.

``deit_fast::distillation_loss`` is the differentiable operator. Its forward is one call of
``deit_fast::distillation_loss_and_gradients``, its backward one of ``deit_fast::scale_gradients_``,
in place: autograd offers no other way to a backward that moves nothing. Gradients of bf16 and fp32
logits are stored with every factor but the incoming one. Those of fp16 would underflow so:
they are stored as (p - q) * ``FP16_UNIT`` and get their factor in the backward.

A gradient has padded rows where its logits have: a head that emits padded logits takes it back so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import distillation_loss_kernel as kernel
from . import distillation_loss_rows as codes
from .distillation_loss_reference import TopK, soft_factor
from .launching import DTYPES, TYPE_NAMES, Inputs, Launch, Plans, implement, on_gpu, signature

SINGLE_CLASSES = 8192  # a longer row does not fit in the registers of its program
SPLIT_BLOCK = 2048
KEPT_CLASSES = 2048  # of a top-k teacher, whose entries stay in registers
FP16_UNIT = 1024.0  # a power of two; room for gradients up to 63, probabilities need 1
SCALE_BLOCK, SCALE_PROGRAMS = 4096, 1056  # 8 programs for each processor of an H100

INTERPRETED = not isinstance(kernel.loss_kernel, triton.JITFunction)

_TARGETS = {"label": codes.LABEL.value, "pair": codes.PAIR.value, "dense": codes.DENSE.value}
_BASES = {"": 0, "ce": codes.CE.value, "bce": codes.BCE.value}
_TAILS = {"drop": codes.DROP.value, "renorm": codes.RENORM.value}
_TAILS |= {"uniform": codes.UNIFORM.value, "bucket": codes.BUCKET.value}


def takes(logits: Tensor, teacher: Any) -> bool:
    """Whether the kernels do this call: on a GPU, or on the CPU with TRITON_INTERPRET=1."""
    if not (INTERPRETED or on_gpu(logits)) or logits.dtype not in DTYPES:
        return False
    return not isinstance(teacher, TopK) or teacher.ids.shape[1] <= KEPT_CLASSES


# ---------------------------------------------------------------------------------------------
# Memory layout
# ---------------------------------------------------------------------------------------------


def _vector(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


def _readable(x: Tensor | None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Tensor | None:
    """x as the kernel reads it: a dtype it knows, neighbouring classes side by side."""
    if x is None:
        return None
    x = x if x.dtype in dtypes else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rounded(classes: int, vector: int) -> int:
    return -(-classes // vector) * vector


def _access(x: Tensor | None) -> tuple[int, bool]:
    """VEC and PADDED of a tensor to read: 16 bytes at a time where start, rows and end allow it."""
    if x is None:
        return 1, False
    (rows, classes), vector = x.shape, _vector(x.dtype)
    stride = x.stride(0) if rows > 1 else 0
    if x.data_ptr() % 16 or stride % vector:
        return 1, False
    if classes % vector == 0:
        return vector, False
    end = x.storage_offset() + (rows - 1) * stride + _rounded(classes, vector)
    return (vector, True) if end * x.itemsize <= x.untyped_storage().nbytes() else (1, False)


def _gradient_stride(logits: Tensor) -> int:
    """Padded to 16 bytes where the rows of the logits are."""
    classes, stride = logits.shape[1], logits.stride(0)
    padded = _rounded(classes, _vector(logits.dtype))
    is_padded = logits.stride(1) == 1 and stride >= padded and stride % _vector(logits.dtype) == 0
    return padded if is_padded else classes


def _empty_gradient(logits: Tensor | None, wanted: bool, like: Tensor) -> Tensor:
    """With its padding, which is written too: new_empty_strided would end before the last row's."""
    if logits is None or not wanted:
        return like.new_empty((0,))
    return logits.new_empty((logits.shape[0], _gradient_stride(logits)))


def _without_padding(gradient: Tensor, classes: int) -> Tensor:
    if gradient.dim() == 1 or gradient.shape[1] == classes:
        return gradient
    return gradient[:, :classes]


def _block(classes: int) -> tuple[int, bool, int]:
    """BLOCK, SINGLE and the number of warps: 8 or 16 elements of a tensor per thread."""
    if classes > SINGLE_CLASSES:
        return SPLIT_BLOCK, False, 8
    block = max(128, triton.next_power_of_2(classes))
    return block, True, max(1, min(16, block // 256))


# ---------------------------------------------------------------------------------------------
# Arguments: what a launch and an ahead-of-time compilation share
# ---------------------------------------------------------------------------------------------


def _factors(
    rows: int, classes: int, kind: str, base: str, reduction: str, alpha: float, tau: float
) -> dict[str, float]:
    """Sums over rows to losses, losses to the total, and p - q to gradients of the total."""
    both = bool(base) and kind != "none"
    base_mean = 1 / (rows * classes) if base == "bce" else 1 / rows
    distill_mean = soft_factor(reduction, tau, rows, classes) if kind == "soft" else 1 / rows
    base_weight, distill_weight = (1 - alpha, alpha) if both else (1.0, 1.0)
    return {
        "base_mean": base_mean,
        "distill_mean": distill_mean,
        "base_weight": base_weight,
        "distill_weight": distill_weight,
        "g_c_scale": base_weight * base_mean,
        "g_d_scale": distill_weight * distill_mean / (tau if kind == "soft" else 1.0),
    }


def _split(scale: float, logits: Tensor) -> tuple[float, float]:
    """The part of a gradient's factor that the forward applies, and the backward's."""
    return (FP16_UNIT, scale / FP16_UNIT) if logits.dtype == torch.float16 else (scale, 1.0)


def _teacher_form(kind: str, teacher: Tensor | None, ids: Tensor | None) -> int:
    if kind == "none":
        return 0
    if ids is not None:
        form = codes.SOFT_TOPK if kind == "soft" else codes.HARD_TOPK
    elif kind == "soft":
        form = codes.SOFT
    else:
        assert teacher is not None
        form = codes.HARD_DENSE if teacher.is_floating_point() else codes.HARD_LABEL
    return form.value


def _stride(x: Tensor | None) -> int:
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def _arguments(
    z_c: Tensor | None, z_d: Tensor | None, target: Tensor | None, partner: Tensor | None,
    lam: Tensor | None, teacher: Tensor | None, ids: Tensor | None, log_probs: Tensor | None,
    log_tail: Tensor | None, tail: str, kind: str, base: str, reduction: str,
    alpha: float, tau: float, smoothing: float, g_c: Tensor, g_d: Tensor,
) -> tuple[dict[str, Any], dict[str, int]]:  # fmt: skip
    """All arguments of the kernel but its outputs, and its launch options."""
    z_c, z_d = (_readable(z_c) if base else None), (_readable(z_d) if kind != "none" else None)
    head = z_c if z_c is not None else z_d
    assert head is not None
    rows, classes = head.shape
    block, single, warps = _block(classes)
    soft, first = None, None
    if base and target is not None:
        soft, first = (target, None) if target.dim() == 2 else (None, target)
    soft = _readable(soft)
    form = _teacher_form(kind, teacher, ids)
    if form == 0:
        teacher = ids = log_probs = log_tail = None
    if teacher is not None and teacher.is_floating_point():
        teacher = _readable(teacher)
    kept = 0 if ids is None else ids.shape[1]
    tail_form = _TAILS[tail] if form == codes.SOFT_TOPK.value else _TAILS["drop"]
    if kept == classes and tail_form != _TAILS["renorm"]:
        tail_form = _TAILS["drop"]
    dense_teacher = teacher is not None and teacher.dim() == 2
    targets = "dense" if soft is not None else "label" if partner is None else "pair"

    values: dict[str, Any] = {"z_c": z_c, "z_d": z_d, "soft": soft, "teacher": teacher}
    values |= {"g_c": g_c if g_c.dim() == 2 else None, "g_d": g_d if g_d.dim() == 2 else None}
    values |= {"first": first, "second": partner if base else None, "lam": lam if base else None}
    values |= {"ids": ids, "log_probs": _readable(log_probs), "log_rest": _readable(log_tail)}
    if tail_form < _TAILS["uniform"]:
        values["log_rest"] = None
    for name in ("first", "second", "lam", "log_rest", "ids"):
        if values[name] is not None:
            values[name] = values[name].contiguous()
    if values["lam"] is not None and values["lam"].dtype not in DTYPES:
        values["lam"] = values["lam"].float()
    if values["teacher"] is not None and not dense_teacher:
        values["teacher"] = values["teacher"].contiguous()
    values |= {"rows": rows, "classes": classes, "kept": kept}
    for name in ("z_c", "z_d", "g_c", "g_d", "soft", "ids", "log_probs"):
        values[f"{name}_stride"] = _stride(values[name])
    values["teacher_stride"] = _stride(teacher) if dense_teacher else 0
    values |= {"scale": math.log2(math.e) / tau, "inverse_tau": 1 / tau, "smoothing": smoothing}
    values |= _factors(rows, classes, kind, base, reduction, alpha, tau)
    for name, logits in (("g_c_scale", z_c), ("g_d_scale", z_d)):
        if logits is not None:
            values[name] = _split(values[name], logits)[0]

    values |= {"BASE": _BASES[base], "TARGET": _TARGETS[targets], "SMOOTH": smoothing > 0}
    values |= {"TEACHER": form, "TAIL": tail_form}
    values["IDS"] = max(16, triton.next_power_of_2(kept)) if kept else 0
    for name in ("z_c", "z_d", "soft"):
        values[f"{name.upper()}_VEC"], values[f"{name.upper()}_PADDED"] = _access(values[name])
    dense = values["teacher"] if dense_teacher else None
    values["TEACHER_VEC"], values["TEACHER_PADDED"] = _access(dense)
    for name in ("g_c", "g_d"):
        gradient = values[name]
        wide = gradient is not None and _gradient_vector(gradient) > 1
        values[f"{name.upper()}_VEC"] = _vector(gradient.dtype) if wide else 1
    reads = [name for name in ("z_c", "z_d", "soft") if values[name] is not None]
    reads += ["teacher"] if dense_teacher else []
    options: dict[str, int] = {}
    if not single and all(values[f"{name.upper()}_VEC"] > 1 for name in reads):
        # Wide accesses leave registers for it; at 8 warps float32 spills on sm_100 (triton 3.6).
        block, warps = 2 * SPLIT_BLOCK, 16
        if form != codes.SOFT.value:
            options["maxnreg"] = 64  # 2 programs a processor: ptxas spills to fit a third
    elif not single and form == codes.SOFT.value and targets != "dense" and base != "bce":
        options["maxnreg"] = 80  # 3 programs; the other forms would spill
    values |= {"BLOCK": block, "SINGLE": single, "ROWS_AT_ONCE": 1024}
    return values, {"num_warps": warps, "num_stages": 1, **options}


def _gradient_vector(gradient: Tensor) -> int:
    """The allocator starts a gradient on 16 bytes; its stride says whether all rows do."""
    vector = _vector(gradient.dtype)
    return vector if gradient.stride(0) % vector == 0 else 1


# ---------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------

_library = torch.library.Library("deit_fast", "FRAGMENT")
_ARGUMENTS = (
    "Tensor? class_logits, Tensor? distill_logits, Tensor? target, Tensor? partner, Tensor? lam, "
    "Tensor? teacher, Tensor? ids, Tensor? log_probs, Tensor? log_tail, str tail, str kind, "
    "str base, str reduction, float alpha, float tau, float smoothing"
)
_library.define(f"distillation_loss({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"distillation_loss_and_gradients({_ARGUMENTS}, bool class_gradient, bool distill_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "scale_gradients_(Tensor(a!) class_gradient, Tensor(b!) distill_gradient, Tensor grad_total, "
    "float class_factor, float distill_factor) -> ()"
)

_arrivals: dict[int, Tensor] = {}  # by device


def _arrival_counter(like: Tensor) -> Tensor:
    """An int32 0, which the kernel leaves at 0: kept for a device's default stream, whose launches
    follow each other, so that a call needs no launch to make it.

    On other streams every call gets its own. They may be capturing: what is allocated then holds
    nothing before the first replay. Or they warm up for the graphs of torch.compile
    ("reduce-overhead"), in a pool of memory where no tensor may outlive the call.
    """
    if like.is_cuda and torch.cuda.current_stream(like.device).cuda_stream == 0:
        if like.device.index not in _arrivals:
            _arrivals[like.device.index] = like.new_zeros((1,), dtype=torch.int32)
        return _arrivals[like.device.index]
    return like.new_zeros((1,), dtype=torch.int32)


def _results(
    z_c: Tensor | None, z_d: Tensor | None, want_c: bool, want_d: bool
) -> tuple[Tensor, ...]:
    """The operator's results, gradients with their padding, and the losses of the rows."""
    head = z_c if z_c is not None else z_d
    assert head is not None
    total, base, distill = (head.new_empty((), dtype=torch.float32) for _ in range(3))
    g_c, g_d = _empty_gradient(z_c, want_c, head), _empty_gradient(z_d, want_d, head)
    return total, base, distill, g_c, g_d, head.new_empty((2, len(head)), dtype=torch.float32)


def _outputs(results: Sequence[Tensor], classes: int) -> tuple[Tensor, ...]:
    total, base, distill, g_c, g_d, _ = results
    return total, base, distill, _without_padding(g_c, classes), _without_padding(g_d, classes)


def _loss(
    z_c: Tensor | None, z_d: Tensor | None, target: Tensor | None, partner: Tensor | None,
    lam: Tensor | None, teacher: Tensor | None, ids: Tensor | None, log_probs: Tensor | None,
    log_tail: Tensor | None, tail: str, kind: str, base: str, reduction: str,
    alpha: float, tau: float, smoothing: float, want_c: bool, want_d: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    head = z_c if z_c is not None else z_d
    assert head is not None
    rows, classes = head.shape
    if rows == 0:
        results = _results(z_c, z_d, want_c, want_d)
        for value in results[:3]:
            value.zero_()
        return _outputs(results, classes)
    inputs = (
        head, z_d if z_c is not None else None, target, partner, lam, teacher,
        ids, log_probs, log_tail, _arrival_counter(head),
    )  # fmt: skip
    options = (tail, kind, base, reduction, alpha, tau, smoothing)
    # Whether a last row may be read with its padding depends on the memory behind it, too.
    rooms: tuple[bool, ...] = ()
    if classes % _vector(torch.bfloat16):
        rows_read = (z_c, z_d, target, teacher)
        rooms = tuple(_access(x)[1] for x in rows_read if x is not None and x.dim() == 2)
    results = _loss_plans(inputs, z_c is not None, want_c, want_d, options, rooms)
    return _outputs(results, classes)


def _heads(inputs: Inputs, has_class_head: bool) -> tuple[Tensor | None, Tensor | None]:
    return (inputs[0], inputs[1]) if has_class_head else (None, inputs[0])


def _loss_results(
    inputs: Inputs, has_class_head: bool, want_c: bool, want_d: bool, *_: tuple
) -> tuple[Tensor, ...]:
    return _results(*_heads(inputs, has_class_head), want_c, want_d)


def _loss_launches(
    inputs: Any, results: Sequence[Tensor], has_class_head: bool, _c: bool, _d: bool,
    options: tuple[Any, ...], _: tuple[bool, ...],
) -> Iterator[Launch]:  # fmt: skip
    total, base, distill, g_c, g_d = _outputs(results, inputs[0].shape[1])
    heads = _heads(inputs, has_class_head)
    arguments: list[Any] = [*heads, *inputs[2:9], *options, g_c, g_d]
    values, launch = _arguments(*arguments)
    values |= {"total": total, "base": base, "distill": distill}
    values |= {"row_losses": results[5], "arrived": inputs[9]}
    yield Launch(kernel.loss_kernel, (values["rows"],), values | launch)


_loss_plans = Plans(_loss_results, _loss_launches)


def _loss_fake(z_c, z_d, *arguments):  # type: ignore[no-untyped-def]
    head = z_c if z_c is not None else z_d
    return _outputs(_results(z_c, z_d, *arguments[-2:]), head.shape[1])


def _scale_(g_c: Tensor, g_d: Tensor, grad_total: Tensor, factor_c: float, factor_d: float) -> None:
    if g_c.numel() or g_d.numel():
        _scale_plans((grad_total, g_c, g_d), factor_c, factor_d)


def _scale_launches(
    inputs: Any, _: Sequence[Tensor], factor_c: float, factor_d: float
) -> Iterator[Launch]:
    grad_total, *gradients = inputs
    counts = [g.shape[0] * g.stride(0) if g.dim() == 2 else 0 for g in gradients]
    blocks = -(-max(counts) // SCALE_BLOCK)
    programs = min(blocks, SCALE_PROGRAMS)
    g_c, g_d = (g if count else None for g, count in zip(gradients, counts, strict=True))
    values: dict[str, Any] = {"g_c": g_c, "g_d": g_d, "grad_total": grad_total}
    values |= {"factor_c": factor_c, "factor_d": factor_d}
    values |= {"count_c": counts[0], "count_d": counts[1], "steps": -(-blocks // programs)}
    values |= {"BLOCK": SCALE_BLOCK, "num_warps": 8}
    yield Launch(kernel.scale_kernel, (programs,), values)


_scale_plans = Plans(lambda *_: (), _scale_launches)


def _scale_fake(
    g_c: Tensor, g_d: Tensor, grad_total: Tensor, factor_c: float, factor_d: float
) -> None:
    return None


class _Loss(torch.autograd.Function):
    """The losses; their gradients wait in the context, made in the same launch."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:2]
        *losses, g_c, g_d = torch.ops.deit_fast.distillation_loss_and_gradients(*arguments, *wanted)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*losses[1:])
        ctx.save_for_backward(g_c, g_d)
        ctx.factors, ctx.used = _backward_factors(*arguments[:2], *arguments[10:15]), False
        return tuple(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_total is None:
            return (None,) * 16
        if ctx.used:
            raise RuntimeError(
                "distillation_loss: a second backward through the same loss, but the first scaled "
                "its gradients in place. Compute the loss again"
            )
        ctx.used = True
        gradients = ctx.saved_tensors
        torch.ops.deit_fast.scale_gradients_(*gradients, grad_total, *ctx.factors)
        wanted = zip(gradients, ctx.needs_input_grad[:2], strict=True)
        return (*(g if want else None for g, want in wanted), *(None,) * 14)


def _backward_factors(
    z_c: Tensor | None, z_d: Tensor | None, kind: str, base: str, reduction: str,
    alpha: float, tau: float,
) -> tuple[float, float]:  # fmt: skip
    head = z_c if z_c is not None else z_d
    assert head is not None
    rows, classes = head.shape
    factors = _factors(max(rows, 1), classes, kind, base, reduction, alpha, tau)
    g_c, g_d = (
        1.0 if logits is None else _split(factors[name], logits)[1]
        for name, logits in (("g_c_scale", z_c), ("g_d_scale", z_d))
    )
    return g_c, g_d


def _differentiable(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    heads = [x for x in arguments[:2] if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in heads):
        return _Loss.apply(*arguments)
    return _losses(*arguments)


def _losses(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.deit_fast.distillation_loss_and_gradients(*arguments, False, False)[:3]


def _losses_fake(z_c, z_d, *_):  # type: ignore[no-untyped-def]
    return _results(z_c, z_d, False, False)[:3]


for _name, _function, _fake in (
    ("distillation_loss", _losses, _losses_fake),
    ("distillation_loss_and_gradients", _loss, _loss_fake),
    ("scale_gradients_", _scale_, _scale_fake),
):
    implement(_library, _name, _function, _fake)
_library.impl("distillation_loss", _differentiable, "Autograd")


def fused(
    class_logits: Tensor | None, distill_logits: Tensor | None, target: Any, teacher: Any, *,
    kind: str, base: str, reduction: str = "numel", alpha: float = 1.0, tau: float = 1.0,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Total, base and distillation loss of checked arguments; base "" or kind "none" is left out.

    Only the total carries a gradient.
    """
    partner = lam = ids = log_probs = log_tail = None
    tail = "drop"
    if isinstance(target, (tuple, list)):
        target, partner, lam = target
    if isinstance(teacher, TopK):
        ids, log_probs, log_tail, tail = teacher
        teacher = None
    if kind == "none":
        teacher = ids = log_probs = log_tail = distill_logits = None
    constants = [
        x.detach() if isinstance(x, Tensor) and x.requires_grad else x
        for x in (target, partner, lam, teacher, ids, log_probs, log_tail)
    ]
    return torch.ops.deit_fast.distillation_loss(
        class_logits, distill_logits, *constants, tail, kind, base, reduction,
        float(alpha), float(tau), float(smoothing),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Ahead of time
# ---------------------------------------------------------------------------------------------


def _aot_arguments(
    dtype: torch.dtype, classes: int, padding: int, kind: str, answer: str, target: str, base: str
) -> tuple[dict[str, Any], dict[str, int]]:
    rows, kept = 1024, 16

    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    def padded() -> Tensor:
        return empty(rows, classes + padding, of=dtype)[:, :classes]

    z_c, z_d, teacher = padded(), padded(), padded() if answer == "dense" else None
    labels, lam = empty(rows, of=torch.int64), empty(rows)
    ids = log_probs = log_tail = None
    if answer in _TAILS:
        ids, log_probs, log_tail = empty(rows, kept, of=torch.int32), empty(rows, kept), empty(rows)
    if answer == "labels":
        teacher = labels
    first = {"labels": labels, "pair": labels, "dense": padded()}[target]
    partner = labels if target == "pair" else None
    *losses, g_c, g_d = _outputs(_results(z_c, z_d, bool(base), kind != "none"), classes)
    values, options = _arguments(
        z_c, z_d, first, partner, lam if target == "pair" else None, teacher,
        ids, log_probs, log_tail, answer if answer in _TAILS else "drop",
        kind, base, "numel", 0.5, 3.0, 0.1, g_c, g_d,
    )  # fmt: skip
    values |= dict(zip(("total", "base", "distill"), losses, strict=True))
    values |= {"row_losses": empty(2, rows), "arrived": empty(1, of=torch.int32)}
    return values, options


def aot_cases() -> Iterator[tuple[Any, ...]]:
    """(name, function, signature, constants, alignments, options, expectations) to compile."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [
        (dtype, 1000, 0, kind, answer, "pair", "ce")
        for dtype in (bf16, fp16, fp32)
        for kind, answer in (("soft", "dense"), ("soft", "bucket"), ("hard", "dense"))
    ]
    cases += [(bf16, 1000, 0, "soft", tail, "pair", "ce") for tail in _TAILS if tail != "bucket"]
    cases += [
        (bf16, 1000, 0, "none", "", "labels", "ce"),
        (bf16, 1000, 0, "none", "", "dense", "ce"),
        (bf16, 1000, 0, "none", "", "pair", "bce"),
        (bf16, 1000, 0, "hard", "labels", "labels", "bce"),
        (bf16, 8192, 0, "soft", "dense", "dense", "ce"),
        (bf16, 8192, 0, "soft", "bucket", "pair", "ce"),
        (fp32, 8192, 0, "soft", "dense", "dense", "ce"),
        (bf16, 21841, 7, "soft", "dense", "pair", "ce"),
        (bf16, 21841, 7, "soft", "bucket", "pair", "ce"),
        (bf16, 21841, 7, "hard", "dense", "pair", "ce"),
        (bf16, 21841, 7, "hard", "labels", "pair", "ce"),
        (fp32, 21841, 3, "soft", "dense", "pair", "ce"),
        (bf16, 21841, 0, "soft", "dense", "pair", "ce"),
    ]
    for dtype, classes, padding, kind, answer, target, base in cases:
        values, options = _aot_arguments(dtype, classes, padding, kind, answer, target, base)
        wide = _rounded(classes, _vector(dtype)) == classes + padding
        name = " ".join(
            part
            for part in (
                f"{TYPE_NAMES[dtype]} C={classes}{'' if wide else ' unpadded'}",
                kind, answer, target, base,
            )
            if part
        )  # fmt: skip
        expect: dict[str, Any] = {"i64_rows": True, "max_regs": 128, "wide_loads": wide}
        if wide and dtype.itemsize == 2:
            # The ids' entries, and a long row's entries of its labels, are written one by one.
            expect["no_scalar_half"] = answer not in _TAILS and classes <= SINGLE_CLASSES
        yield (
            name.replace(" ", "-"),
            kernel.loss_kernel,
            *signature(kernel.loss_kernel, values),
            options,
            expect,
        )
    for dtype in (bf16, fp16, fp32):
        g = torch.empty(1024, 1000, dtype=dtype, device="meta")
        values = {"g_c": g, "g_d": g, "grad_total": g.new_empty((), dtype=fp32)}
        values |= {"factor_c": 1.0, "factor_d": 1.0, "count_c": 1, "count_d": 1, "steps": 1}
        values["BLOCK"] = SCALE_BLOCK
        yield (
            f"scale-{TYPE_NAMES[dtype]}",
            kernel.scale_kernel,
            *signature(kernel.scale_kernel, values),
            {"num_warps": 8, "num_stages": 3},
            {"wide_loads": True, "max_regs": 64},
        )
