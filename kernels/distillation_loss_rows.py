"""Rows of the distillation loss's kernels: blocks of classes, log-sum-exp, losses of dense targets.

Up to ``SINGLE_CLASSES`` classes a row is one block and stays in registers. A longer row is read in
blocks, twice: once for its maximum and sum (not for binary cross-entropy), once for the rest. Its
last block alone is masked, and comes first, so that the loop over the others is plain.

Rows that start on 16 bytes and may be read up to a multiple of 16 bytes take wide accesses. The
compiler must be able to prove both: offsets are declared multiples (``tl.multiple_of`` on the
product, on an argument it is lost), widths are rounded in the kernel. Other rows go by element.
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


# ---------------------------------------------------------------------------------------------
# Rows: VEC elements make 16 bytes, 1 where they do not; PADDED rows may be read past their end
# ---------------------------------------------------------------------------------------------


@triton.jit
def row_start(row, stride, VEC: tl.constexpr):
    return tl.multiple_of(row.to(tl.int64) * stride, VEC)


@triton.jit
def last_block(classes, BLOCK: tl.constexpr):
    """First class of the last block, the only one that may reach past the row's end."""
    return (classes - 1) // BLOCK * BLOCK


@triton.jit
def load(
    pointer, start, at, classes, fill,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PADDED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Classes at ... at + BLOCK - 1 of a row in float32; FULL: they all exist."""
    if FULL:
        return tl.load(pointer + (start + at) + tl.arange(0, BLOCK)).to(tl.float32)
    cols = at + tl.arange(0, BLOCK)
    if VEC == 1:
        return tl.load(pointer + start + cols, mask=cols < classes, other=fill).to(tl.float32)
    if PADDED:
        width = (classes + VEC - 1) // VEC * VEC
        x = tl.load(pointer + start + cols, mask=cols < width, other=fill).to(tl.float32)
        return tl.where(cols < classes, x, fill)
    width = classes // VEC * VEC
    return tl.load(pointer + start + cols, mask=cols < width, other=fill).to(tl.float32)


@triton.jit
def store(
    pointer, start, at, classes, value,
    BLOCK: tl.constexpr, VEC: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    cols = at + tl.arange(0, BLOCK)
    if FULL:
        tl.store(pointer + (start + at) + tl.arange(0, BLOCK), value)
    elif VEC == 1:
        tl.store(pointer + start + cols, value, mask=cols < classes)
    else:
        # The padding of a gradient is our own: it is written too, with zeros.
        width = (classes + VEC - 1) // VEC * VEC
        tl.store(pointer + start + cols, tl.where(cols < classes, value, 0.0), mask=cols < width)


# ---------------------------------------------------------------------------------------------
# Log-sum-exp, in base 2: log2 softmax = (z - maximum) * scale - log2(total)
# ---------------------------------------------------------------------------------------------


@triton.jit
def maximum_and_total(z, scale):
    maximum = tl.max(z, 0)
    safe = tl.where(maximum == NEG_INF, LOWEST, maximum)
    return safe, tl.sum(tl.exp2((z - safe) * scale), 0)


@triton.jit
def no_lanes(BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Maximum and sum of a row's lanes before its first block; see ``by_lane``."""
    maximum = tl.full([BLOCK // (VEC if VEC > 1 else 8)], LOWEST, tl.float32)
    return maximum, tl.zeros_like(maximum)


@triton.jit
def by_lane(x, VEC: tl.constexpr):
    """A block with a lane a row: VEC neighbours, or 8 classes of one thread without wide accesses.

    What one thread holds of a block is a lane, so that no reduction over one leaves its thread.
    """
    if VEC > 1:
        lanes = tl.reshape(x, [x.shape[0] // VEC, VEC])
    else:
        lanes = tl.trans(tl.reshape(x, [8, x.shape[0] // 8]))
    return lanes


@triton.jit
def gather_in(maximum, total, z, scale, VEC: tl.constexpr):
    """Adds a block to the maximum and the sum of each lane."""
    z = by_lane(z, VEC)
    higher = tl.maximum(maximum, tl.max(z, 1))
    added = tl.sum(tl.exp2((z - higher[:, None]) * scale), 1)
    return higher, total * tl.exp2((maximum - higher) * scale) + added


@triton.jit
def over_lanes(maximum, total, scale):
    highest = tl.max(maximum, 0)
    return highest, tl.sum(total * tl.exp2((maximum - highest) * scale), 0)


@triton.jit
def _gather_block(
    maximum, total, pointer, start, at, classes, scale,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PADDED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    z = load(pointer, start, at, classes, NEG_INF, BLOCK, VEC, PADDED, FULL)
    return gather_in(maximum, total, z, scale, VEC)


@triton.jit
def _row_maximum_and_total(
    pointer, start, classes, scale, BLOCK: tl.constexpr, VEC: tl.constexpr, PADDED: tl.constexpr
):
    last = last_block(classes, BLOCK)
    maximum, total = no_lanes(BLOCK, VEC)
    for at in range(last, classes, BLOCK):
        maximum, total = _gather_block(
            maximum, total, pointer, start, at, classes, scale, BLOCK, VEC, PADDED, False
        )
    for at in range(0, last, BLOCK):
        maximum, total = _gather_block(
            maximum, total, pointer, start, at, classes, scale, BLOCK, VEC, PADDED, True
        )
    return over_lanes(maximum, total, scale)


@triton.jit
def inverse(total):
    return tl.where(total > 0, 1.0 / total, 0.0)


# ---------------------------------------------------------------------------------------------
# Cross-entropy
# ---------------------------------------------------------------------------------------------


@triton.jit
def _target(
    at, classes, first, second, weight_first, weight_second, soft, soft_start, keep, spread,
    TARGET: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
    VEC: tl.constexpr, PADDED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Target probabilities of a block of classes, smoothed; 0 past the last class."""
    cols = at + tl.arange(0, BLOCK)
    if TARGET == DENSE:
        t = load(soft, soft_start, at, classes, 0.0, BLOCK, VEC, PADDED, FULL) * keep
    else:
        t = tl.where(cols == first, weight_first, 0.0)
        if TARGET == PAIR:
            t += tl.where(cols == second, weight_second, 0.0)
    if SMOOTH:
        t += spread
        if not FULL:
            t = tl.where(cols < classes, t, 0.0)
    return t


@triton.jit
def _cross_entropy_block(z, t, mass, maximum, log2_total, scale):
    """Losses -t log p of a block and the gradient mass * p - t; mass is the sum of t."""
    log2_p = (z - maximum) * scale - log2_total
    loss = tl.where(t != 0, -t * (log2_p * LN2), 0.0)
    return loss, mass * tl.exp2(log2_p) - t


@triton.jit
def cross_entropy_row(
    logits, start, gradient, gradient_start, classes, gradient_scale,
    first, second, weight_first, weight_second, soft, soft_start, keep, spread,
    TARGET: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
    VEC: tl.constexpr, PADDED: tl.constexpr, GRADIENT_VEC: tl.constexpr,
    SOFT_VEC: tl.constexpr, SOFT_PADDED: tl.constexpr,
):  # fmt: skip
    if SINGLE:
        z = load(logits, start, 0, classes, NEG_INF, BLOCK, VEC, PADDED, False)
        t = _target(
            0, classes, first, second, weight_first, weight_second, soft, soft_start,
            keep, spread, TARGET, SMOOTH, BLOCK, SOFT_VEC, SOFT_PADDED, False,
        )  # fmt: skip
        maximum, total = maximum_and_total(z, LOG2E)
        mass = 1.0
        if TARGET == DENSE:
            mass = tl.sum(t, 0)
        loss, g = _cross_entropy_block(z, t, mass, maximum, tl.log2(total), LOG2E)
        if gradient is not None:
            store(
                gradient, gradient_start, 0, classes, g * gradient_scale, BLOCK, GRADIENT_VEC, False
            )
        return tl.sum(loss, 0)
    if TARGET == DENSE:
        return _long_dense_row(
            logits, start, gradient, gradient_start, classes, gradient_scale,
            soft, soft_start, keep, spread,
            SMOOTH, BLOCK, VEC, PADDED, GRADIENT_VEC, SOFT_VEC, SOFT_PADDED,
        )  # fmt: skip
    return _long_label_row(
        logits, start, gradient, gradient_start, classes, gradient_scale,
        first, second, weight_first, weight_second, spread,
        TARGET, SMOOTH, BLOCK, VEC, PADDED, GRADIENT_VEC,
    )  # fmt: skip


@triton.jit
def _long_dense_block(
    losses, logits, start, gradient, gradient_start, at, classes, gradient_scale,
    soft, soft_start, keep, spread, mass, maximum, log2_total,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, PADDED: tl.constexpr,
    GRADIENT_VEC: tl.constexpr, SOFT_VEC: tl.constexpr, SOFT_PADDED: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    z = load(logits, start, at, classes, NEG_INF, BLOCK, VEC, PADDED, FULL)
    t = _target(
        at, classes, 0, 0, 0.0, 0.0, soft, soft_start, keep, spread,
        DENSE, SMOOTH, BLOCK, SOFT_VEC, SOFT_PADDED, FULL,
    )  # fmt: skip
    loss, g = _cross_entropy_block(z, t, mass, maximum, log2_total, LOG2E)
    if gradient is not None:
        store(gradient, gradient_start, at, classes, g * gradient_scale, BLOCK, GRADIENT_VEC, FULL)
    return losses + loss


@triton.jit
def _long_dense_row(
    logits, start, gradient, gradient_start, classes, gradient_scale,
    soft, soft_start, keep, spread,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, PADDED: tl.constexpr,
    GRADIENT_VEC: tl.constexpr, SOFT_VEC: tl.constexpr, SOFT_PADDED: tl.constexpr,
):  # fmt: skip
    maximum, total = _row_maximum_and_total(logits, start, classes, LOG2E, BLOCK, VEC, PADDED)
    log2_total = tl.log2(total)
    last = last_block(classes, BLOCK)
    masses = _target(
        last, classes, 0, 0, 0.0, 0.0, soft, soft_start, keep, spread,
        DENSE, SMOOTH, BLOCK, SOFT_VEC, SOFT_PADDED, False,
    )  # fmt: skip
    for at in range(0, last, BLOCK):
        masses += _target(
            at, classes, 0, 0, 0.0, 0.0, soft, soft_start, keep, spread,
            DENSE, SMOOTH, BLOCK, SOFT_VEC, SOFT_PADDED, True,
        )  # fmt: skip
    mass = tl.sum(masses, 0)
    losses = tl.zeros([BLOCK], tl.float32)
    for at in range(last, classes, BLOCK):
        losses = _long_dense_block(
            losses, logits, start, gradient, gradient_start, at, classes, gradient_scale,
            soft, soft_start, keep, spread, mass, maximum, log2_total,
            SMOOTH, BLOCK, VEC, PADDED, GRADIENT_VEC, SOFT_VEC, SOFT_PADDED, False,
        )  # fmt: skip
    for at in range(0, last, BLOCK):
        losses = _long_dense_block(
            losses, logits, start, gradient, gradient_start, at, classes, gradient_scale,
            soft, soft_start, keep, spread, mass, maximum, log2_total,
            SMOOTH, BLOCK, VEC, PADDED, GRADIENT_VEC, SOFT_VEC, SOFT_PADDED, True,
        )  # fmt: skip
    return tl.sum(losses, 0)


@triton.jit
def _long_label_block(
    sums, logits, start, gradient, gradient_start, at, classes, gradient_scale, spread,
    maximum, log2_total,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, PADDED: tl.constexpr,
    GRADIENT_VEC: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Adds log2 p of a block to ``sums`` and stores the gradient of classes without a label."""
    cols = at + tl.arange(0, BLOCK)
    z = load(logits, start, at, classes, NEG_INF, BLOCK, VEC, PADDED, FULL)
    log2_p = (z - maximum) * LOG2E - log2_total
    g = tl.exp2(log2_p)
    if SMOOTH:
        g -= spread
        sums += log2_p if FULL else tl.where(cols < classes, log2_p, 0.0)
    if gradient is not None:
        store(gradient, gradient_start, at, classes, g * gradient_scale, BLOCK, GRADIENT_VEC, FULL)
    return sums


@triton.jit
def _label(
    z, exists, t, gradient, gradient_start, label, gradient_scale, spread, maximum, log2_total
):
    """Loss -t log p of one label; stores the gradient p - t - spread of its class."""
    log2_p = (z - maximum) * LOG2E - log2_total
    if gradient is not None:
        g = (tl.exp2(log2_p) - (t + spread)) * gradient_scale
        tl.store(gradient + gradient_start + label, g, mask=exists)
    return tl.where(exists & (t != 0), -t * (log2_p * LN2), 0.0)


@triton.jit
def _long_label_row(
    logits, start, gradient, gradient_start, classes, gradient_scale,
    first, second, weight_first, weight_second, spread,
    TARGET: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
    VEC: tl.constexpr, PADDED: tl.constexpr, GRADIENT_VEC: tl.constexpr,
):  # fmt: skip
    """One or two labels: their classes come after all others, which then compare with no label."""
    if not SMOOTH:
        spread = 0.0
    has_first = (first >= 0) & (first < classes)
    z_first = tl.load(logits + start + first, mask=has_first, other=0.0).to(tl.float32)
    if TARGET == PAIR:
        weight_first += tl.where(second == first, weight_second, 0.0)
        has_second = (second >= 0) & (second < classes) & (second != first)
        z_second = tl.load(logits + start + second, mask=has_second, other=0.0).to(tl.float32)
    maximum, total = _row_maximum_and_total(logits, start, classes, LOG2E, BLOCK, VEC, PADDED)
    log2_total = tl.log2(total)
    loss = 0.0
    if SMOOTH or gradient is not None:
        last = last_block(classes, BLOCK)
        sums = tl.zeros([BLOCK], tl.float32)
        for at in range(last, classes, BLOCK):
            sums = _long_label_block(
                sums, logits, start, gradient, gradient_start, at, classes, gradient_scale, spread,
                maximum, log2_total, SMOOTH, BLOCK, VEC, PADDED, GRADIENT_VEC, False,
            )  # fmt: skip
        for at in range(0, last, BLOCK):
            sums = _long_label_block(
                sums, logits, start, gradient, gradient_start, at, classes, gradient_scale, spread,
                maximum, log2_total, SMOOTH, BLOCK, VEC, PADDED, GRADIENT_VEC, True,
            )  # fmt: skip
        loss = tl.sum(sums, 0) * (-spread * LN2)
    if gradient is not None:
        tl.debug_barrier()  # other threads wrote the labels' entries with those of their blocks
    loss += _label(
        z_first, has_first, weight_first, gradient, gradient_start, first, gradient_scale, spread,
        maximum, log2_total,
    )  # fmt: skip
    if TARGET == PAIR:
        loss += _label(
            z_second, has_second, weight_second, gradient, gradient_start, second, gradient_scale,
            spread, maximum, log2_total,
        )  # fmt: skip
    return loss


# ---------------------------------------------------------------------------------------------
# Binary cross-entropy
# ---------------------------------------------------------------------------------------------


@triton.jit
def _binary_block(z, positive, smoothing, inverse_classes, SMOOTH: tl.constexpr):
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
    return loss, g


@triton.jit
def _binary_step(
    losses, logits, start, gradient, gradient_start, at, classes, gradient_scale,
    first, second, weight_first, weight_second, soft, soft_start, smoothing, inverse_classes,
    TARGET: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
    VEC: tl.constexpr, PADDED: tl.constexpr, GRADIENT_VEC: tl.constexpr,
    SOFT_VEC: tl.constexpr, SOFT_PADDED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    cols = at + tl.arange(0, BLOCK)
    z = load(logits, start, at, classes, 0.0, BLOCK, VEC, PADDED, FULL)
    t = _target(
        at, classes, first, second, weight_first, weight_second, soft, soft_start,
        1.0, 0.0, TARGET, False, BLOCK, SOFT_VEC, SOFT_PADDED, FULL,
    )  # fmt: skip
    loss, g = _binary_block(z, t > 0, smoothing, inverse_classes, SMOOTH)
    if gradient is not None:
        store(gradient, gradient_start, at, classes, g * gradient_scale, BLOCK, GRADIENT_VEC, FULL)
    return losses + (loss if FULL else tl.where(cols < classes, loss, 0.0))


@triton.jit
def binary_row(
    logits, start, gradient, gradient_start, classes, gradient_scale,
    first, second, weight_first, weight_second, soft, soft_start, smoothing, inverse_classes,
    TARGET: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
    VEC: tl.constexpr, PADDED: tl.constexpr, GRADIENT_VEC: tl.constexpr,
    SOFT_VEC: tl.constexpr, SOFT_PADDED: tl.constexpr,
):  # fmt: skip
    losses = tl.zeros([BLOCK], tl.float32)
    if SINGLE:
        losses = _binary_step(
            losses, logits, start, gradient, gradient_start, 0, classes, gradient_scale,
            first, second, weight_first, weight_second, soft, soft_start, smoothing,
            inverse_classes, TARGET, SMOOTH, BLOCK, VEC, PADDED, GRADIENT_VEC,
            SOFT_VEC, SOFT_PADDED, False,
        )  # fmt: skip
        return tl.sum(losses, 0)
    last = last_block(classes, BLOCK)
    for at in range(last, classes, BLOCK):
        losses = _binary_step(
            losses, logits, start, gradient, gradient_start, at, classes, gradient_scale,
            first, second, weight_first, weight_second, soft, soft_start, smoothing,
            inverse_classes, TARGET, SMOOTH, BLOCK, VEC, PADDED, GRADIENT_VEC,
            SOFT_VEC, SOFT_PADDED, False,
        )  # fmt: skip
    for at in range(0, last, BLOCK):
        losses = _binary_step(
            losses, logits, start, gradient, gradient_start, at, classes, gradient_scale,
            first, second, weight_first, weight_second, soft, soft_start, smoothing,
            inverse_classes, TARGET, SMOOTH, BLOCK, VEC, PADDED, GRADIENT_VEC,
            SOFT_VEC, SOFT_PADDED, True,
        )  # fmt: skip
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
    return q * (tl.where(q > 0, log2_q - log2_p, 0.0) * LN2) + g, g


@triton.jit
def divergence_row(
    logits, start, gradient, gradient_start, teacher, teacher_start, classes, scale, gradient_scale,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr, VEC: tl.constexpr, PADDED: tl.constexpr,
    GRADIENT_VEC: tl.constexpr, TEACHER_VEC: tl.constexpr, TEACHER_PADDED: tl.constexpr,
):  # fmt: skip
    if SINGLE:
        z = load(logits, start, 0, classes, NEG_INF, BLOCK, VEC, PADDED, False)
        x = load(
            teacher, teacher_start, 0, classes, NEG_INF, BLOCK, TEACHER_VEC, TEACHER_PADDED, False
        )
        maximum, total = maximum_and_total(z, scale)
        t_maximum, t_total = maximum_and_total(x, scale)
        loss, g = _divergence_block(
            z, x, maximum, tl.log2(total), t_maximum, tl.log2(t_total), scale
        )
        if gradient is not None:
            store(
                gradient, gradient_start, 0, classes, g * gradient_scale, BLOCK, GRADIENT_VEC, False
            )
        return tl.sum(loss, 0)
    last = last_block(classes, BLOCK)
    maximum, total = no_lanes(BLOCK, VEC)
    t_maximum, t_total = no_lanes(BLOCK, TEACHER_VEC)
    for at in range(last, classes, BLOCK):
        maximum, total = _gather_block(
            maximum, total, logits, start, at, classes, scale, BLOCK, VEC, PADDED, False
        )
        t_maximum, t_total = _gather_block(
            t_maximum, t_total, teacher, teacher_start, at, classes, scale,
            BLOCK, TEACHER_VEC, TEACHER_PADDED, False,
        )  # fmt: skip
    for at in range(0, last, BLOCK):
        maximum, total = _gather_block(
            maximum, total, logits, start, at, classes, scale, BLOCK, VEC, PADDED, True
        )
        t_maximum, t_total = _gather_block(
            t_maximum, t_total, teacher, teacher_start, at, classes, scale,
            BLOCK, TEACHER_VEC, TEACHER_PADDED, True,
        )  # fmt: skip
    maximum, total = over_lanes(maximum, total, scale)
    t_maximum, t_total = over_lanes(t_maximum, t_total, scale)
    log2_total, t_log2_total = tl.log2(total), tl.log2(t_total)
    losses = tl.zeros([BLOCK], tl.float32)
    for at in range(last, classes, BLOCK):
        losses = _long_divergence_block(
            losses, logits, start, gradient, gradient_start, teacher, teacher_start, at, classes,
            scale, gradient_scale, maximum, log2_total, t_maximum, t_log2_total,
            BLOCK, VEC, PADDED, GRADIENT_VEC, TEACHER_VEC, TEACHER_PADDED, False,
        )  # fmt: skip
    for at in range(0, last, BLOCK):
        losses = _long_divergence_block(
            losses, logits, start, gradient, gradient_start, teacher, teacher_start, at, classes,
            scale, gradient_scale, maximum, log2_total, t_maximum, t_log2_total,
            BLOCK, VEC, PADDED, GRADIENT_VEC, TEACHER_VEC, TEACHER_PADDED, True,
        )  # fmt: skip
    return tl.sum(losses, 0)


@triton.jit
def _long_divergence_block(
    losses, logits, start, gradient, gradient_start, teacher, teacher_start, at, classes,
    scale, gradient_scale, maximum, log2_total, t_maximum, t_log2_total,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PADDED: tl.constexpr, GRADIENT_VEC: tl.constexpr,
    TEACHER_VEC: tl.constexpr, TEACHER_PADDED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    z = load(logits, start, at, classes, NEG_INF, BLOCK, VEC, PADDED, FULL)
    x = load(teacher, teacher_start, at, classes, NEG_INF, BLOCK, TEACHER_VEC, TEACHER_PADDED, FULL)
    loss, g = _divergence_block(z, x, maximum, log2_total, t_maximum, t_log2_total, scale)
    if gradient is not None:
        store(gradient, gradient_start, at, classes, g * gradient_scale, BLOCK, GRADIENT_VEC, FULL)
    return losses + loss
