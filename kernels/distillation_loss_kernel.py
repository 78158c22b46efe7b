"""Triton kernels of the distillation loss: one program per row does both heads.

Up to ``SINGLE_CLASSES`` classes a row stays in registers: every logit is read once. Beyond, a
first pass finds maximum and sum of the row and a second reads it again (binary cross-entropy
needs no first pass). Gradients are written once; with a top-k teacher the K entries of its ids,
whose logits are gathered again, are then overwritten with their own values.

Rows that start on 16 bytes and may be read up to a multiple of 16 bytes take wide accesses. The
compiler must be able to prove both: offsets are declared multiples (``tl.multiple_of`` on the
product, on an argument it is lost), widths are rounded in the kernel. Other rows go by element.

The last program to arrive adds the row losses up, in an order that does not depend on who that is.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.0e38)  # finite: -inf minus -inf is NaN

# Of the base loss, its target, the teacher, and a top-k teacher's tail.
CE, BCE = tl.constexpr(1), tl.constexpr(2)
LABEL, PAIR, DENSE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SOFT, SOFT_TOPK, HARD_LABEL, HARD_DENSE, HARD_TOPK = (tl.constexpr(i) for i in range(1, 6))
DROP, RENORM, UNIFORM, BUCKET = (tl.constexpr(i) for i in range(4))

IDS_AT_ONCE = tl.constexpr(64)


# ---------------------------------------------------------------------------------------------
# Rows: VEC elements make 16 bytes, 1 where they do not; PADDED rows may be read past their end
# ---------------------------------------------------------------------------------------------


@triton.jit
def _row(row, stride, VEC: tl.constexpr):
    return tl.multiple_of(row.to(tl.int64) * stride, VEC)


@triton.jit
def _load(pointer, start, cols, classes, fill, VEC: tl.constexpr, PADDED: tl.constexpr):
    if VEC == 1:
        return tl.load(pointer + start + cols, mask=cols < classes, other=fill).to(tl.float32)
    if PADDED:
        width = (classes + VEC - 1) // VEC * VEC
        x = tl.load(pointer + start + cols, mask=cols < width, other=fill).to(tl.float32)
        return tl.where(cols < classes, x, fill)
    width = classes // VEC * VEC
    return tl.load(pointer + start + cols, mask=cols < width, other=fill).to(tl.float32)


@triton.jit
def _store(pointer, start, cols, classes, value, VEC: tl.constexpr):
    if VEC == 1:
        tl.store(pointer + start + cols, value, mask=cols < classes)
    else:
        # The padding of a gradient is our own: it is written too, with zeros.
        width = (classes + VEC - 1) // VEC * VEC
        tl.store(pointer + start + cols, tl.where(cols < classes, value, 0.0), mask=cols < width)


# ---------------------------------------------------------------------------------------------
# Log-sum-exp, in base 2: log2 softmax = (z - maximum) * scale - log2(total)
# ---------------------------------------------------------------------------------------------


@triton.jit
def _maximum_and_total(z, scale):
    maximum = tl.max(z, 0)
    safe = tl.where(maximum == NEG_INF, LOWEST, maximum)
    return safe, tl.sum(tl.exp2((z - safe) * scale), 0)


@triton.jit
def _gather_in(maximum, total, z, scale):
    """One more z per lane: one exponential, whichever of the two is larger."""
    step = tl.exp2(-tl.abs(z - maximum) * scale)
    total = tl.where(z > maximum, total * step + 1.0, total + step)
    return tl.where(z > maximum, z, maximum), total


@triton.jit
def _over_lanes(maximum, total, scale):
    highest = tl.max(maximum, 0)
    return highest, tl.sum(total * tl.exp2((maximum - highest) * scale), 0)


@triton.jit
def _row_maximum_and_total(
    pointer, start, classes, scale, BLOCK: tl.constexpr, VEC: tl.constexpr, PADDED: tl.constexpr
):
    maximum = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(0, classes, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        z = _load(pointer, start, cols, classes, NEG_INF, VEC, PADDED)
        maximum, total = _gather_in(maximum, total, z, scale)
    return _over_lanes(maximum, total, scale)


@triton.jit
def _inverse(total):
    return tl.where(total > 0, 1.0 / total, 0.0)


# ---------------------------------------------------------------------------------------------
# Cross-entropy
# ---------------------------------------------------------------------------------------------


@triton.jit
def _target(
    cols, classes, first, second, weight_first, weight_second, soft, soft_start, keep, spread,
    TARGET: tl.constexpr, SMOOTH: tl.constexpr, VEC: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Target probabilities of a block of classes, smoothed; 0 past the last class."""
    if TARGET == DENSE:
        t = _load(soft, soft_start, cols, classes, 0.0, VEC, PADDED) * keep
    else:
        t = tl.where(cols == first, weight_first, 0.0)
        if TARGET == PAIR:
            t += tl.where(cols == second, weight_second, 0.0)
    if SMOOTH:
        t = tl.where(cols < classes, t + spread, 0.0)
    return t


@triton.jit
def _cross_entropy_block(z, t, mass, maximum, log2_total, scale):
    """Losses -t log p of a block and the gradient mass * p - t; mass is the sum of t."""
    log2_p = (z - maximum) * scale - log2_total
    loss = tl.where(t != 0, -t * (log2_p * LN2), 0.0)
    return loss, mass * tl.exp2(log2_p) - t


@triton.jit
def _cross_entropy_row(
    logits, start, gradient, gradient_start, classes, gradient_scale,
    first, second, weight_first, weight_second, soft, soft_start, keep, spread,
    TARGET: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
    VEC: tl.constexpr, PADDED: tl.constexpr, GRADIENT_VEC: tl.constexpr,
    SOFT_VEC: tl.constexpr, SOFT_PADDED: tl.constexpr,
):  # fmt: skip
    if SINGLE:
        cols = tl.arange(0, BLOCK)
        z = _load(logits, start, cols, classes, NEG_INF, VEC, PADDED)
        t = _target(
            cols, classes, first, second, weight_first, weight_second, soft, soft_start,
            keep, spread, TARGET, SMOOTH, SOFT_VEC, SOFT_PADDED,
        )  # fmt: skip
        maximum, total = _maximum_and_total(z, LOG2E)
        mass = 1.0
        if TARGET == DENSE:
            mass = tl.sum(t, 0)
        loss, g = _cross_entropy_block(z, t, mass, maximum, tl.log2(total), LOG2E)
        if gradient is not None:
            _store(gradient, gradient_start, cols, classes, g * gradient_scale, GRADIENT_VEC)
        return tl.sum(loss, 0)
    maximum, total = _row_maximum_and_total(logits, start, classes, LOG2E, BLOCK, VEC, PADDED)
    log2_total = tl.log2(total)
    mass = 1.0
    if TARGET == DENSE:
        masses = tl.zeros([BLOCK], tl.float32)
        for at in range(0, classes, BLOCK):
            cols = at + tl.arange(0, BLOCK)
            masses += _target(
                cols, classes, first, second, weight_first, weight_second, soft, soft_start,
                keep, spread, TARGET, SMOOTH, SOFT_VEC, SOFT_PADDED,
            )  # fmt: skip
        mass = tl.sum(masses, 0)
    losses = tl.zeros([BLOCK], tl.float32)
    for at in range(0, classes, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        z = _load(logits, start, cols, classes, NEG_INF, VEC, PADDED)
        t = _target(
            cols, classes, first, second, weight_first, weight_second, soft, soft_start,
            keep, spread, TARGET, SMOOTH, SOFT_VEC, SOFT_PADDED,
        )  # fmt: skip
        loss, g = _cross_entropy_block(z, t, mass, maximum, log2_total, LOG2E)
        losses += loss
        if gradient is not None:
            _store(gradient, gradient_start, cols, classes, g * gradient_scale, GRADIENT_VEC)
    return tl.sum(losses, 0)


# ---------------------------------------------------------------------------------------------
# Binary cross-entropy
# ---------------------------------------------------------------------------------------------


@triton.jit
def _binary_block(z, positive, valid, smoothing, inverse_classes, SMOOTH: tl.constexpr):
    """Losses softplus(-z or z) of a block and their gradients; smoothing adds a linear term."""
    y = tl.where(positive, -z, z)
    small = tl.exp2(-tl.abs(y) * LOG2E)
    one = 1.0 + small
    # log1p: the quotient undoes the rounding of 1 + small, which loses its digits.
    log1p = tl.where(
        one == 1.0, small, tl.log(one) * (small / tl.where(one == 1.0, 1.0, one - 1.0))
    )
    loss = tl.maximum(y, 0.0) + log1p
    sigmoid = tl.where(y >= 0, 1.0, small) / one
    g = tl.where(positive, -sigmoid, sigmoid)
    if SMOOTH:
        shift = smoothing * (tl.where(positive, 1.0, 0.0) - inverse_classes)
        loss += shift * z
        g += shift
    return tl.where(valid, loss, 0.0), g


@triton.jit
def _binary_row(
    logits, start, gradient, gradient_start, classes, gradient_scale,
    first, second, weight_first, weight_second, soft, soft_start, smoothing, inverse_classes,
    TARGET: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
    VEC: tl.constexpr, PADDED: tl.constexpr, GRADIENT_VEC: tl.constexpr,
    SOFT_VEC: tl.constexpr, SOFT_PADDED: tl.constexpr,
):  # fmt: skip
    losses = tl.zeros([BLOCK], tl.float32)
    for at in range(0, classes, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        z = _load(logits, start, cols, classes, 0.0, VEC, PADDED)
        t = _target(
            cols, classes, first, second, weight_first, weight_second, soft, soft_start,
            1.0, 0.0, TARGET, False, SOFT_VEC, SOFT_PADDED,
        )  # fmt: skip
        loss, g = _binary_block(z, t > 0, cols < classes, smoothing, inverse_classes, SMOOTH)
        losses += loss
        if gradient is not None:
            _store(gradient, gradient_start, cols, classes, g * gradient_scale, GRADIENT_VEC)
    return tl.sum(losses, 0)


# ---------------------------------------------------------------------------------------------
# Soft distillation, dense teacher
# ---------------------------------------------------------------------------------------------


@triton.jit
def _divergence_block(z, x, maximum, log2_total, t_maximum, t_log2_total, scale):
    """Terms q log(q / p) - q + p of KL, none below 0, and the gradient p - q.

    The last two sum to 0 over a row. Made of the same rounded logarithms as the first, they cancel
    what the rounding of log p does to it, up to its square.
    """
    log2_p = (z - maximum) * scale - log2_total
    log2_q = (x - t_maximum) * scale - t_log2_total
    q = tl.exp2(log2_q)
    g = tl.exp2(log2_p) - q
    return tl.where(q > 0, q * ((log2_q - log2_p) * LN2), 0.0) + g, g


@triton.jit
def _divergence_row(
    logits, start, gradient, gradient_start, teacher, teacher_start, classes, scale, gradient_scale,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr, VEC: tl.constexpr, PADDED: tl.constexpr,
    GRADIENT_VEC: tl.constexpr, TEACHER_VEC: tl.constexpr, TEACHER_PADDED: tl.constexpr,
):  # fmt: skip
    if SINGLE:
        cols = tl.arange(0, BLOCK)
        z = _load(logits, start, cols, classes, NEG_INF, VEC, PADDED)
        x = _load(teacher, teacher_start, cols, classes, NEG_INF, TEACHER_VEC, TEACHER_PADDED)
        maximum, total = _maximum_and_total(z, scale)
        t_maximum, t_total = _maximum_and_total(x, scale)
        loss, g = _divergence_block(
            z, x, maximum, tl.log2(total), t_maximum, tl.log2(t_total), scale
        )
        if gradient is not None:
            _store(gradient, gradient_start, cols, classes, g * gradient_scale, GRADIENT_VEC)
        return tl.sum(loss, 0)
    maximum = tl.full([BLOCK], LOWEST, tl.float32)
    t_maximum = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    t_total = tl.zeros([BLOCK], tl.float32)
    for at in range(0, classes, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        z = _load(logits, start, cols, classes, NEG_INF, VEC, PADDED)
        x = _load(teacher, teacher_start, cols, classes, NEG_INF, TEACHER_VEC, TEACHER_PADDED)
        maximum, total = _gather_in(maximum, total, z, scale)
        t_maximum, t_total = _gather_in(t_maximum, t_total, x, scale)
    top, total = _over_lanes(maximum, total, scale)
    t_top, t_total = _over_lanes(t_maximum, t_total, scale)
    log2_total, t_log2_total = tl.log2(total), tl.log2(t_total)
    losses = tl.zeros([BLOCK], tl.float32)
    for at in range(0, classes, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        z = _load(logits, start, cols, classes, NEG_INF, VEC, PADDED)
        x = _load(teacher, teacher_start, cols, classes, NEG_INF, TEACHER_VEC, TEACHER_PADDED)
        loss, g = _divergence_block(z, x, top, log2_total, t_top, t_log2_total, scale)
        losses += loss
        if gradient is not None:
            _store(gradient, gradient_start, cols, classes, g * gradient_scale, GRADIENT_VEC)
    return tl.sum(losses, 0)


# ---------------------------------------------------------------------------------------------
# Soft distillation, top-k teacher
# ---------------------------------------------------------------------------------------------


@triton.jit
def _members(ids, ids_start, kept, at, BLOCK: tl.constexpr, IDS: tl.constexpr):
    """Which of the classes at ... at + BLOCK - 1 are among a row's ids: a bit map, spread out.

    Comparing every class with every id would cost BLOCK * K; this costs BLOCK * K / 32.
    """
    STEP: tl.constexpr = IDS if IDS < IDS_AT_ONCE else IDS_AT_ONCE
    word = at // 32 + tl.arange(0, BLOCK // 32)
    bits = tl.zeros([BLOCK // 32], tl.int32)
    for first in range(0, kept, STEP):
        k = first + tl.arange(0, STEP)
        i = tl.load(ids + ids_start + k, mask=k < kept, other=0).to(tl.int32)
        here = (word[:, None] == (i >> 5)[None, :]) & (k < kept)[None, :]
        bit = tl.full([STEP], 1, tl.int32) << (i & 31)
        bits |= tl.sum(tl.where(here, bit[None, :], 0), 1)  # distinct ids: a sum is an or
    spread = (bits[:, None] >> tl.arange(0, 32)[None, :]) & 1
    return tl.reshape(spread, [BLOCK]) != 0


@triton.jit
def _topk_block(
    z, member, valid, maximum, total, out_maximum, out_inverse, scale, inverse_tau,
    mass, rest, even, TAIL: tl.constexpr,
):  # fmt: skip
    """log p of the classes outside the ids (for "uniform") and the gradient as if all were."""
    g = mass * tl.exp2((z - maximum) * scale) * (1.0 / total)
    outside = tl.zeros_like(z)
    if TAIL == UNIFORM:
        log_p = (z - maximum) * inverse_tau - tl.log(total)
        outside = tl.where(valid & (member == 0), log_p, 0.0)
        g -= even
    if TAIL == BUCKET:
        # Without its members a row has a lower maximum, and a member may lie above it.
        share = tl.exp2((tl.where(member, NEG_INF, z) - out_maximum) * scale) * out_inverse
        g -= rest * share
    return outside, g


@triton.jit
def _topk_row(
    logits, start, gradient, gradient_start, ids, ids_start, log_probs, log_probs_start, log_rest,
    classes, kept, scale, inverse_tau, gradient_scale,
    TAIL: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
    VEC: tl.constexpr, PADDED: tl.constexpr, GRADIENT_VEC: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, IDS)
    i = tl.load(ids + ids_start + k, mask=k < kept, other=-1).to(tl.int32)
    if ids.dtype.element_ty == tl.uint16:
        i = i & 0xFFFF
    known = (k < kept) & (i >= 0) & (i < classes)
    log_q = tl.load(log_probs + log_probs_start + k, mask=known, other=NEG_INF).to(tl.float32)
    if TAIL == RENORM:
        q_maximum, q_total = _maximum_and_total(log_q, LOG2E)
        log_q = log_q - q_maximum - tl.log(q_total)
    q = tl.exp2(log_q * LOG2E)
    picked = tl.load(logits + start + i, mask=known, other=NEG_INF).to(tl.float32)
    rest, log_r, even = 0.0, 0.0, 0.0
    if TAIL >= UNIFORM:
        log_r = log_rest
        rest = tl.exp2(log_r * LOG2E)
        if TAIL == UNIFORM:
            even = rest / (classes - kept).to(tl.float32)
    mass = tl.sum(q, 0) + rest

    out_maximum, out_total = 0.0, 1.0
    if SINGLE:
        cols = tl.arange(0, BLOCK)
        z = _load(logits, start, cols, classes, NEG_INF, VEC, PADDED)
        member = cols < 0
        if TAIL >= UNIFORM:
            member = _members(ids, ids_start, kept, 0, BLOCK, IDS)
        maximum, total = _maximum_and_total(z, scale)
        if TAIL == BUCKET:
            out_maximum, out_total = _maximum_and_total(tl.where(member, NEG_INF, z), scale)
        outside, g = _topk_block(
            z, member, cols < classes, maximum, total, out_maximum, _inverse(out_total),
            scale, inverse_tau, mass, rest, even, TAIL,
        )  # fmt: skip
        if gradient is not None:
            _store(gradient, gradient_start, cols, classes, g * gradient_scale, GRADIENT_VEC)
        log_p_outside = tl.sum(outside, 0)
    else:
        lanes = tl.full([BLOCK], LOWEST, tl.float32)
        out_lanes = tl.full([BLOCK], LOWEST, tl.float32)
        totals = tl.zeros([BLOCK], tl.float32)
        out_totals = tl.zeros([BLOCK], tl.float32)
        for at in range(0, classes, BLOCK):
            cols = at + tl.arange(0, BLOCK)
            z = _load(logits, start, cols, classes, NEG_INF, VEC, PADDED)
            lanes, totals = _gather_in(lanes, totals, z, scale)
            if TAIL == BUCKET:
                member = _members(ids, ids_start, kept, at, BLOCK, IDS)
                out_lanes, out_totals = _gather_in(
                    out_lanes, out_totals, tl.where(member, NEG_INF, z), scale
                )
        maximum, total = _over_lanes(lanes, totals, scale)
        if TAIL == BUCKET:
            out_maximum, out_total = _over_lanes(out_lanes, out_totals, scale)
        out_inverse = _inverse(out_total)
        outsides = tl.zeros([BLOCK], tl.float32)
        for at in range(0, classes, BLOCK):
            cols = at + tl.arange(0, BLOCK)
            z = _load(logits, start, cols, classes, NEG_INF, VEC, PADDED)
            member = cols < 0
            if TAIL >= UNIFORM:
                member = _members(ids, ids_start, kept, at, BLOCK, IDS)
            outside, g = _topk_block(
                z, member, cols < classes, maximum, total, out_maximum, out_inverse,
                scale, inverse_tau, mass, rest, even, TAIL,
            )  # fmt: skip
            outsides += outside
            if gradient is not None:
                _store(gradient, gradient_start, cols, classes, g * gradient_scale, GRADIENT_VEC)
        log_p_outside = tl.sum(outsides, 0)

    # Natural logarithms, as the teacher's: two roundings less than by way of base 2.
    log_total = tl.log(total)
    log_p = (picked - maximum) * inverse_tau - log_total
    loss = tl.sum(tl.where(q > 0, q * (log_q - log_p), 0.0), 0)
    if gradient is not None:
        tl.debug_barrier()  # the ids' entries were written with the others, by other threads
        g = (mass * tl.exp2((picked - maximum) * scale) * (1.0 / total) - q) * gradient_scale
        tl.store(gradient + gradient_start + i, g, mask=known)
    if TAIL == UNIFORM:
        count = (classes - kept).to(tl.float32)
        gap = log_r - tl.log(count) - log_p_outside / count
        loss += tl.where(rest > 0, rest * gap, 0.0)
    if TAIL == BUCKET:
        # Of the quotient: where s is nearly 1 the difference of two logarithms is all rounding.
        log_s = (out_maximum - maximum) * inverse_tau + tl.log(out_total / total)
        loss += tl.where(rest > 0, rest * (log_r - log_s), 0.0)
    return loss


# ---------------------------------------------------------------------------------------------
# Hard distillation: the teacher's decision, the first of equal maxima
# ---------------------------------------------------------------------------------------------


@triton.jit
def _decision(
    teacher, start, classes, BLOCK: tl.constexpr, VEC: tl.constexpr, PADDED: tl.constexpr
):
    best = NEG_INF
    decision = 0
    for at in range(0, classes, BLOCK):
        cols = at + tl.arange(0, BLOCK)
        x = _load(teacher, start, cols, classes, NEG_INF, VEC, PADDED)
        highest = tl.max(x, 0)
        where = tl.min(tl.where((x == highest) & (cols < classes), cols, 2147483647), 0)
        decision = tl.where(highest > best, where, decision)
        best = tl.maximum(best, highest)
    return decision


@triton.jit
def _topk_decision(ids, ids_start, log_probs, log_probs_start, kept, IDS: tl.constexpr):
    k = tl.arange(0, IDS)
    log_q = tl.load(log_probs + log_probs_start + k, mask=k < kept, other=NEG_INF).to(tl.float32)
    first = tl.min(tl.where((log_q == tl.max(log_q, 0)) & (k < kept), k, IDS - 1), 0)
    return tl.load(ids + ids_start + first).to(tl.int32)


# ---------------------------------------------------------------------------------------------
# Entry points
# ---------------------------------------------------------------------------------------------

_RUN_TIME = (
    "rows", "classes", "kept", "z_c_stride", "g_c_stride", "z_d_stride", "g_d_stride",
    "soft_stride", "teacher_stride", "ids_stride", "log_probs_stride",
    "scale", "inverse_tau", "smoothing", "base_mean", "distill_mean", "base_weight",
    "distill_weight", "g_c_scale", "g_d_scale",
)  # fmt: skip


@triton.jit(do_not_specialize=_RUN_TIME)
def loss_kernel(
    z_c, g_c, z_d, g_d,  # [B, C]: logits and gradients of the class and the distillation head
    first, second, lam,  # [B]: labels, or a mixed pair and the weight of the first
    soft,  # [B, C]: dense target
    teacher,  # [B, C] logits or [B] labels
    ids, log_probs, log_rest,  # [B, K], [B, K], [B]
    row_losses, arrived,  # float32 [2, B]; int32 [1], 0 before and after
    total, base, distill,  # float32 []
    rows, classes, kept,
    z_c_stride, g_c_stride, z_d_stride, g_d_stride,
    soft_stride, teacher_stride, ids_stride, log_probs_stride,
    scale, inverse_tau,  # log2(e) / temperature, 1 / temperature
    smoothing,
    base_mean, distill_mean,  # sum over rows -> base and distillation loss
    base_weight, distill_weight,  # these -> total
    g_c_scale, g_d_scale,  # p - q -> what is stored as gradient
    BASE: tl.constexpr, TARGET: tl.constexpr, SMOOTH: tl.constexpr,
    TEACHER: tl.constexpr, TAIL: tl.constexpr, IDS: tl.constexpr,
    Z_C_VEC: tl.constexpr, Z_C_PADDED: tl.constexpr, G_C_VEC: tl.constexpr,
    Z_D_VEC: tl.constexpr, Z_D_PADDED: tl.constexpr, G_D_VEC: tl.constexpr,
    SOFT_VEC: tl.constexpr, SOFT_PADDED: tl.constexpr,
    TEACHER_VEC: tl.constexpr, TEACHER_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr, ROWS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if BASE != 0:
        a, b, weight_a, weight_b = 0, 0, 1.0, 0.0
        keep = 1.0 - smoothing
        inverse_classes = 1.0 / classes.to(tl.float32)
        soft_start = 0
        if TARGET == DENSE:
            soft_start = _row(row, soft_stride, SOFT_VEC)
        else:
            a = tl.load(first + row).to(tl.int32)
            if TARGET == PAIR:
                b = tl.load(second + row).to(tl.int32)
                weight_a = tl.load(lam + row).to(tl.float32)
                weight_b = 1.0 - weight_a
        z_start, g_start = _row(row, z_c_stride, Z_C_VEC), _row(row, g_c_stride, G_C_VEC)
        if BASE == CE:
            row_loss = _cross_entropy_row(
                z_c, z_start, g_c, g_start, classes, g_c_scale,
                a, b, weight_a * keep, weight_b * keep, soft, soft_start,
                keep, smoothing * inverse_classes,
                TARGET, SMOOTH, BLOCK, SINGLE, Z_C_VEC, Z_C_PADDED, G_C_VEC, SOFT_VEC, SOFT_PADDED,
            )  # fmt: skip
        else:
            row_loss = _binary_row(
                z_c, z_start, g_c, g_start, classes, g_c_scale,
                a, b, weight_a, weight_b, soft, soft_start, smoothing, inverse_classes,
                TARGET, SMOOTH, BLOCK, Z_C_VEC, Z_C_PADDED, G_C_VEC, SOFT_VEC, SOFT_PADDED,
            )  # fmt: skip
        tl.store(row_losses + row, row_loss)
    if TEACHER != 0:
        z_start, g_start = _row(row, z_d_stride, Z_D_VEC), _row(row, g_d_stride, G_D_VEC)
        teacher_start, ids_start, log_probs_start = 0, 0, 0
        if TEACHER == SOFT or TEACHER == HARD_DENSE:  # noqa: SIM109
            teacher_start = _row(row, teacher_stride, TEACHER_VEC)
        if TEACHER == SOFT_TOPK or TEACHER == HARD_TOPK:  # noqa: SIM109
            ids_start = row.to(tl.int64) * ids_stride
            log_probs_start = row.to(tl.int64) * log_probs_stride
        if TEACHER == SOFT:
            row_loss = _divergence_row(
                z_d, z_start, g_d, g_start, teacher, teacher_start, classes, scale, g_d_scale,
                BLOCK, SINGLE, Z_D_VEC, Z_D_PADDED, G_D_VEC, TEACHER_VEC, TEACHER_PADDED,
            )  # fmt: skip
        elif TEACHER == SOFT_TOPK:
            log_r = 0.0
            if TAIL >= UNIFORM:
                log_r = tl.load(log_rest + row).to(tl.float32)
            row_loss = _topk_row(
                z_d, z_start, g_d, g_start, ids, ids_start, log_probs, log_probs_start, log_r,
                classes, kept, scale, inverse_tau, g_d_scale,
                TAIL, IDS, BLOCK, SINGLE, Z_D_VEC, Z_D_PADDED, G_D_VEC,
            )  # fmt: skip
        else:
            if TEACHER == HARD_LABEL:
                a = tl.load(teacher + row).to(tl.int32)
            elif TEACHER == HARD_DENSE:
                a = _decision(teacher, teacher_start, classes, BLOCK, TEACHER_VEC, TEACHER_PADDED)
            else:
                a = _topk_decision(ids, ids_start, log_probs, log_probs_start, kept, IDS)
            row_loss = _cross_entropy_row(
                z_d, z_start, g_d, g_start, classes, g_d_scale,
                a, 0, 1.0, 0.0, None, 0, 1.0, 0.0,
                LABEL, False, BLOCK, SINGLE, Z_D_VEC, Z_D_PADDED, G_D_VEC, 1, False,
            )  # fmt: skip
        tl.store(row_losses + rows + row, row_loss)

    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == rows - 1:
        base_loss, distill_loss = 0.0, 0.0
        if BASE != 0:
            base_loss = _sum_of(row_losses, rows, ROWS_AT_ONCE) * base_mean
        if TEACHER != 0:
            distill_loss = _sum_of(row_losses + rows, rows, ROWS_AT_ONCE) * distill_mean
        if TEACHER == 0:
            tl.store(total, base_loss)
        elif BASE == 0:
            tl.store(total, distill_loss)
        else:
            tl.store(total, base_weight * base_loss + distill_weight * distill_loss)
        tl.store(base, base_loss)
        tl.store(distill, distill_loss)
        tl.store(arrived, 0)


@triton.jit
def _sum_of(values, count, BLOCK: tl.constexpr):
    partial = tl.zeros([BLOCK], tl.float32)
    for at in range(0, count, BLOCK):
        i = at + tl.arange(0, BLOCK)
        # Written by other programs a moment ago: past this processor's own cache.
        partial += tl.load(values + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return tl.sum(partial, 0)


@triton.jit(do_not_specialize=("factor_c", "factor_d", "count_c", "count_d", "steps"))
def scale_kernel(
    g_c, g_d, grad_total, factor_c, factor_d, count_c, count_d, steps, BLOCK: tl.constexpr
):
    """Scale both gradients in place by factor * grad_total; touch nothing where that is 1."""
    grad = tl.load(grad_total).to(tl.float32)
    if g_c is not None:
        _scale(g_c, grad * factor_c, count_c, steps, BLOCK)
    if g_d is not None:
        _scale(g_d, grad * factor_d, count_d, steps, BLOCK)


@triton.jit
def _scale(values, factor, count, steps, BLOCK: tl.constexpr):
    if factor != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        for _ in range(steps):
            i = start + tl.arange(0, BLOCK)
            if start + BLOCK <= count:
                tl.store(values + i, tl.load(values + i).to(tl.float32) * factor)
            else:
                x = tl.load(values + i, mask=i < count, other=0.0).to(tl.float32)
                tl.store(values + i, x * factor, mask=i < count)
            start += tl.num_programs(0).to(tl.int64) * BLOCK
