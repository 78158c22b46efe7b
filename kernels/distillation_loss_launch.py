"""Launcher and operators of the distillation loss, and the cases of the ahead-of-time gate.

``deit_fast::distillation_loss`` is the differentiable operator. Its forward is one call of
``distillation_loss_and_gradients``, its backward one of ``scale_gradients_``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import distillation_loss_kernels as kernels
from .distillation_loss_reference import TAILS, factors
from .launching import (
    DTYPES,
    TYPE_NAMES,
    Launch,
    first_derivative_only,
    launch,
    operator,
    planned,
    recording,
    scratch,
)
from .rows import contiguous

MAX_TOPK = 2048  # ids of a row, which the kernel keeps in registers
FP16_UNIT = 1024.0  # a power of two; room for gradients up to 63, probabilities need 1

_TARGETS = {"label": kernels.LABEL.value, "pair": kernels.PAIR.value, "dense": kernels.DENSE.value}
_BASES = {"": 0, "ce": kernels.CE.value, "bce": kernels.BCE.value}
_TAILS = {name: getattr(kernels, name.upper()).value for name in TAILS}


# ---------------------------------------------------------------------------------------------
# Memory layout
# ---------------------------------------------------------------------------------------------


def _vector(dtype: torch.dtype) -> int:
    """Elements in 16 bytes."""
    return 16 // dtype.itemsize


def _rounded(classes: int, vector: int) -> int:
    return -(-classes // vector) * vector


def _readable(x: Tensor | None) -> Tensor | None:
    """x as the kernel reads it: in a dtype of `DTYPES`, with adjacent classes."""
    if x is None:
        return None
    x = x if x.dtype in DTYPES else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


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


def _empty_gradient(logits: Tensor | None, requested: bool, like: Tensor) -> Tensor:
    """Gradient with its padding, if the rows of the logits are padded to 16 bytes."""
    if logits is None or not requested:
        return like.new_empty((0,))
    (rows, classes), stride, vector = logits.shape, logits.stride(0), _vector(logits.dtype)
    padded = _rounded(classes, vector)
    is_padded = logits.stride(1) == 1 and stride >= padded and stride % vector == 0
    return logits.new_empty((rows, padded if is_padded else classes))


def _gradient_vector(gradient: Tensor | None) -> int:
    """VEC of a gradient. The allocator starts it on 16 bytes; its stride says whether rows do."""
    if gradient is None:
        return 1
    vector = _vector(gradient.dtype)
    return vector if gradient.stride(0) % vector == 0 else 1


# ---------------------------------------------------------------------------------------------
# Launchers and operators
# ---------------------------------------------------------------------------------------------


class _Arguments(NamedTuple):
    """Arguments of ``deit_fast::distillation_loss``, in the order of its schema."""

    class_logits: Tensor | None
    distill_logits: Tensor | None
    target: Tensor | None  # labels [B], the first label of a mixed pair, or a soft target [B, C]
    partner: Tensor | None  # the second label of a mixed pair
    lam: Tensor | None
    teacher: Tensor | None  # logits [B, C] or labels [B]
    ids: Tensor | None
    log_probs: Tensor | None
    log_tail: Tensor | None
    tail: str
    kind: str
    base: str  # "": no base loss
    reduction: str
    alpha: float
    tau: float
    smoothing: float


def _head(arguments: Sequence[Any]) -> Tensor:
    """The logits, of the class head if there are any, which determine sizes, dtype and device."""
    return arguments[1] if arguments[0] is None else arguments[0]


def _gradient_factors(
    head: Tensor, kind: str, base: str, reduction: str, alpha: float, tau: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """What the forward and the backward multiply p - q by, for each head."""
    rows, classes = head.shape
    means, weights = factors(rows, classes, kind, base, reduction, alpha, tau)
    scales = weights[0] * means[0], weights[1] * means[1] / (tau if kind == "soft" else 1.0)
    if head.dtype == torch.float16:
        return (FP16_UNIT, FP16_UNIT), (scales[0] / FP16_UNIT, scales[1] / FP16_UNIT)
    return scales, (1.0, 1.0)


def _teacher_form(call: _Arguments) -> int:
    """The kernel's code of the teacher; 0: none."""
    if call.kind == "none":
        return 0
    if call.ids is not None:
        form = kernels.SOFT_TOPK if call.kind == "soft" else kernels.HARD_TOPK
    elif call.kind == "soft":
        form = kernels.SOFT
    else:
        assert call.teacher is not None
        is_dense = call.teacher.is_floating_point()
        form = kernels.HARD_DENSE if is_dense else kernels.HARD_LABEL
    return form.value


def _tile(classes: int, is_wide: bool, form: int, base: str, target: str) -> dict[str, Any]:
    """Block and options of a launch; ``is_wide``: all rows are read 16 bytes at a time.

    A row of up to 8192 classes fits in the registers of its program. 8 or 16 elements of a tensor
    a thread.
    """
    is_soft = form == kernels.SOFT.value
    if classes <= 8192:
        block = max(128, triton.next_power_of_2(classes))
        tile = {"BLOCK": block, "SINGLE": True, "num_warps": max(1, min(16, block // 256))}
    elif is_wide:
        # Wide accesses leave registers for it; at 8 warps float32 spills on sm_100 (triton 3.6).
        tile = {"BLOCK": 4096, "SINGLE": False, "num_warps": 16}
        if not is_soft:
            tile["maxnreg"] = 64  # 2 programs a processor: ptxas spills to fit a third
    else:
        tile = {"BLOCK": 2048, "SINGLE": False, "num_warps": 8}
        if is_soft and target != "dense" and base != "bce":
            tile["maxnreg"] = 80  # 3 programs; the other forms would spill
    return tile | {"ROWS_AT_ONCE": 1024, "num_stages": 1}


@planned
def _launch_loss(
    _padded: tuple[bool, ...], arrived: Tensor, for_class: bool, for_distill: bool,
    options: tuple[Any, ...], *tensors: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Losses and gradients, these with their padding. ``_padded`` is here for the plan's key."""
    call = _Arguments(*tensors, *options)
    total, base, distill, *gradients = _results(*call, for_class, for_distill)
    head, form = _head(call), _teacher_form(call)
    rows, classes = head.shape
    kept = 0 if call.ids is None else call.ids.shape[1]
    z_c = _readable(call.class_logits) if call.base else None
    z_d = _readable(call.distill_logits) if form else None
    g_c, g_d = (g if g.dim() == 2 else None for g in gradients)

    soft = first = second = lam = None
    if call.base and call.target is not None:
        if call.target.dim() == 2:
            soft = _readable(call.target)
        else:
            first, second = call.target.contiguous(), contiguous(call.partner)
            lam = contiguous(_readable(call.lam))
    target = "dense" if soft is not None else "label" if second is None else "pair"

    logits = labels = None  # of the teacher
    if call.teacher is not None and call.teacher.is_floating_point():
        logits = _readable(call.teacher)
    else:
        labels = contiguous(call.teacher)
    ids, log_probs = contiguous(call.ids), _readable(call.log_probs)
    tail = "drop"
    if form == kernels.SOFT_TOPK.value and (kept < classes or call.tail == "renorm"):
        tail = call.tail
    log_rest = contiguous(_readable(call.log_tail)) if tail in ("uniform", "bucket") else None

    means, weights = factors(rows, classes, *options[1:6])
    scales, _ = _gradient_factors(head, *options[1:6])
    (z_c_vec, z_c_padded), (z_d_vec, z_d_padded) = _access(z_c), _access(z_d)
    (soft_vec, soft_padded), (logits_vec, logits_padded) = _access(soft), _access(logits)
    is_wide = all(x is None or _access(x)[0] > 1 for x in (z_c, z_d, soft, logits))
    launch(
        kernels.loss_kernel, (rows,),
        z_c=z_c, g_c=g_c, z_d=z_d, g_d=g_d, first=first, second=second, lam=lam, soft=soft,
        teacher=labels if logits is None else logits,
        ids=ids, log_probs=log_probs, log_rest=log_rest,
        row_losses=scratch(head, 2, rows), arrived=arrived,
        total=total, base=base, distill=distill, rows=rows, classes=classes, kept=kept,
        z_c_stride=_stride(z_c), g_c_stride=_stride(g_c),
        z_d_stride=_stride(z_d), g_d_stride=_stride(g_d), soft_stride=_stride(soft),
        teacher_stride=_stride(logits), ids_stride=_stride(ids),
        log_probs_stride=_stride(log_probs),
        scale=math.log2(math.e) / call.tau, inverse_tau=1 / call.tau, smoothing=call.smoothing,
        base_mean=means[0], distill_mean=means[1],
        base_weight=weights[0], distill_weight=weights[1],
        g_c_scale=scales[0], g_d_scale=scales[1],
        BASE=_BASES[call.base], TARGET=_TARGETS[target], SMOOTH=call.smoothing > 0,
        TEACHER=form, TAIL=_TAILS[tail], IDS=max(16, triton.next_power_of_2(kept)) if kept else 0,
        Z_C_VEC=z_c_vec, Z_C_PADDED=z_c_padded, G_C_VEC=_gradient_vector(g_c),
        Z_D_VEC=z_d_vec, Z_D_PADDED=z_d_padded, G_D_VEC=_gradient_vector(g_d),
        SOFT_VEC=soft_vec, SOFT_PADDED=soft_padded,
        TEACHER_VEC=logits_vec, TEACHER_PADDED=logits_padded,
        **_tile(classes, is_wide, form, call.base, target),
    )  # fmt: skip
    return total, base, distill, *gradients


def _results(*arguments: Any) -> tuple[Tensor, ...]:
    """Losses and gradients without values, the gradients with their padding."""
    z_c, z_d, *_, for_class, for_distill = arguments
    head = _head(arguments)
    total, base, distill = (head.new_empty((), dtype=torch.float32) for _ in range(3))
    g_c, g_d = _empty_gradient(z_c, for_class, head), _empty_gradient(z_d, for_distill, head)
    return total, base, distill, g_c, g_d


def _without_padding(results: tuple[Tensor, ...], classes: int) -> tuple[Tensor, ...]:
    if all(g.shape[-1] <= classes for g in results[3:]):
        return results
    g_c, g_d = (g if g.shape[-1] <= classes else g[:, :classes] for g in results[3:])
    return *results[:3], g_c, g_d


_arrivals: dict[int, Tensor] = {}  # by device


def _arrival_counter(like: Tensor) -> Tensor:
    """An int32 0, which the kernel resets to 0.

    Calls on a device's default stream share one, as they follow each other: no call needs a launch
    to make it. On other streams every call gets its own. They may be capturing: what is allocated
    then has no value before the first replay. Or they warm up for the graphs of torch.compile
    ("reduce-overhead"), in a pool of memory where no tensor may outlive the call.
    """
    if like.is_cuda and torch.cuda.current_stream(like.device).cuda_stream == 0:
        if like.device.index not in _arrivals:
            _arrivals[like.device.index] = like.new_zeros((1,), dtype=torch.int32)
        return _arrivals[like.device.index]
    return like.new_zeros((1,), dtype=torch.int32)


def _loss_and_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    z_c, z_d, target, _, _, teacher = arguments[:6]
    for_class, for_distill = arguments[16:]
    head = _head(arguments)
    rows, classes = head.shape
    if rows == 0:
        results = _results(*arguments)
        for value in results[:3]:
            value.zero_()
        return _without_padding(results, classes)
    padded: tuple[bool, ...] = ()
    if classes % 8:
        # Whether the last row may be read with its padding depends on the memory behind it, too.
        read = (z_c, z_d, target, teacher)
        padded = tuple(_access(x)[1] for x in read if x is not None and x.dim() == 2)
    results = _launch_loss(
        padded, _arrival_counter(head), for_class, for_distill, arguments[9:16], *arguments[:9]
    )
    return _without_padding(results, classes)


def _loss_and_gradients_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _without_padding(_results(*arguments), _head(arguments).shape[1])


@planned
def _scale_(
    g_c: Tensor, g_d: Tensor, grad_total: Tensor, class_factor: float, distill_factor: float
) -> None:
    """Multiply both gradients by factor * grad_total, in place."""
    count_c, count_d = (g.shape[0] * g.stride(0) if g.dim() == 2 else 0 for g in (g_c, g_d))
    blocks = triton.cdiv(max(count_c, count_d), 4096)
    if blocks == 0:
        return
    programs = min(blocks, 1056)  # 8 for each processor of an H100
    launch(
        kernels.scale_kernel, (programs,),
        g_c=g_c if count_c else None, g_d=g_d if count_d else None, grad_total=grad_total,
        factor_c=class_factor, factor_d=distill_factor, count_c=count_c, count_d=count_d,
        steps=triton.cdiv(blocks, programs), BLOCK=4096, num_warps=8, num_stages=3,
    )  # fmt: skip


_SCHEMA = (
    "Tensor? class_logits, Tensor? distill_logits, Tensor? target, Tensor? partner, Tensor? lam, "
    "Tensor? teacher, Tensor? ids, Tensor? log_probs, Tensor? log_tail, str tail, str kind, "
    "str base, str reduction, float alpha, float tau, float smoothing"
)
_gradients_op = operator(
    f"distillation_loss_and_gradients({_SCHEMA}, bool class_gradient, bool distill_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss_and_gradients, _loss_and_gradients_fake,
)  # fmt: skip
# In place: autograd offers no other way to a backward that moves nothing.
_scale_op = operator(
    "scale_gradients_(Tensor(a!) class_gradient, Tensor(b!) distill_gradient, Tensor grad_total, "
    "float class_factor, float distill_factor) -> ()", _scale_, lambda *_: None,
)  # fmt: skip


class _Loss(torch.autograd.Function):
    """The losses; their gradients, made in the same launch, wait in the context."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *losses, g_c, g_d = _gradients_op(*arguments, *ctx.needs_input_grad[:2])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*losses[1:])
        ctx.save_for_backward(g_c, g_d)
        ctx.factors = _gradient_factors(_head(arguments), *arguments[10:15])[1]
        ctx.used = False
        return tuple(losses)

    @staticmethod
    @first_derivative_only
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
        _scale_op(*gradients, grad_total, *ctx.factors)
        requested = zip(gradients, ctx.needs_input_grad[:2], strict=True)
        return (*(g if needs else None for g, needs in requested), *(None,) * 14)


loss_op = operator(
    f"distillation_loss({_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    lambda *arguments: _gradients_op(*arguments, False, False)[:3],
    lambda *arguments: _results(*arguments, False, False)[:3],
    _Loss,
)


def aot_cases() -> Iterator[tuple[str, Launch, dict[str, Any]]]:
    """(name, launch, expectations) of the kernels to compile ahead of time."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [
        (dtype, 1000, 0, kind, teacher, "pair", "ce")
        for dtype in (bf16, fp16, fp32)
        for kind, teacher in (("soft", "dense"), ("soft", "bucket"), ("hard", "dense"))
    ]
    cases += [(bf16, 1000, 0, "soft", tail, "pair", "ce") for tail in ("drop", "renorm", "uniform")]
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
    for dtype, classes, padding, kind, teacher, target, base in cases:
        wide = _rounded(classes, _vector(dtype)) == classes + padding
        width = f"C={classes}{'' if wide else ' unpadded'}"
        name = " ".join(filter(None, (TYPE_NAMES[dtype], width, kind, teacher, target, base)))
        expect: dict[str, Any] = {"i64_rows": True, "max_regs": 128, "wide_loads": wide}
        if wide and dtype.itemsize == 2:
            # The ids' entries, and a long row's entries of its labels, are written one by one.
            expect["no_scalar_half"] = teacher not in TAILS and classes <= 8192
        case = _aot_launch(dtype, classes, padding, kind, teacher, target, base)
        yield name.replace(" ", "-"), case, expect
    for dtype in (bf16, fp16, fp32):
        g = torch.empty(1024, 1000, dtype=dtype, device="meta")
        with recording() as recorded:
            _scale_(g, g, g.new_empty((), dtype=fp32), 1.0, 1.0)
        expect = {"wide_loads": True, "max_regs": 64}
        yield f"scale-{TYPE_NAMES[dtype]}", recorded.launches[0], expect


def _aot_launch(
    dtype: torch.dtype, classes: int, padding: int, kind: str, teacher: str, target: str, base: str
) -> Launch:
    rows, kept, long, fp32 = 1024, 16, torch.int64, torch.float32

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def padded() -> Tensor:
        return empty(rows, classes + padding, dtype=dtype)[:, :classes]

    z_c, z_d, labels = padded(), padded() if kind != "none" else None, empty(rows, dtype=long)
    pair = (labels, empty(rows, dtype=fp32)) if target == "pair" else (None, None)
    dense = {"dense": padded(), "labels": labels}.get(teacher)
    topk: tuple[Any, ...] = (None, None, None, "drop")
    if teacher in TAILS:
        ids, log_probs = empty(rows, kept, dtype=torch.int32), empty(rows, kept, dtype=fp32)
        topk = ids, log_probs, empty(rows, dtype=fp32), teacher
    arguments = (
        z_c, z_d, padded() if target == "dense" else labels, *pair, dense, *topk,
        kind, base, "numel", 0.5, 3.0, 0.1,
    )  # fmt: skip
    with recording() as recorded:
        arrived = empty(1, dtype=torch.int32)
        _launch_loss((), arrived, True, kind != "none", arguments[9:], *arguments[:9])
    return recorded.launches[0]
