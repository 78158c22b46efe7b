"""Triton kernels of the distillation loss: one program per row computes both heads.

Up to 8192 classes (``SINGLE``) a row is one block and stays in registers: every logit is read once.
A longer row is read in blocks, twice: once for its maximum and sum (not for binary cross-entropy),
once for the losses and gradients. Only its last block is masked. That block comes first, so that
the loop over the others has no mask.

Gradients are written once. Then the entries of a long row's labels, and with a top-k teacher the
entries of its ids, are overwritten: no block has to compare its classes with them.

Rows that start on 16 bytes and may be read up to a multiple of 16 bytes use wide accesses. The
compiler must be able to prove both, so offsets are declared multiples (``tl.multiple_of`` on the
product; on an argument it is lost) and widths are rounded in the kernel. Other rows are read
element by element.

The last program to finish adds the row losses up, in an order that does not depend on which
program that is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.0e38)  # finite: -inf minus -inf is NaN
IDS_AT_ONCE = tl.constexpr(64)

# Codes of the base loss, its target, the teacher, and a top-k teacher's tail.
CE, BCE = tl.constexpr(1), tl.constexpr(2)
LABEL, PAIR, DENSE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SOFT, SOFT_TOPK, HARD_LABEL, HARD_DENSE, HARD_TOPK = (tl.constexpr(i) for i in range(1, 6))
DROP, RENORM, UNIFORM, BUCKET = (tl.constexpr(i) for i in range(4))


# ---------------------------------------------------------------------------------------------
# Arguments of device functions. Build one inside the call that takes it: assigned to a variable,
# its constants would become tensors.
# ---------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of logits, targets, gradients or ids."""

    pointer: Any  # None: not given, or a gradient that is not requested
    start: Any  # offset of the row's first element
    VEC: Any  # elements in 16 bytes; 1: the row does not allow such accesses
    PADDED: Any  # whether the row may be read up to a multiple of VEC


class Target(NamedTuple):
    """Target of the base loss: labels with their weights, or a dense row."""

    first: Any
    second: Any
    first_weight: Any
    second_weight: Any
    soft: Row
    keep: Any  # 1 - smoothing
    spread: Any  # smoothing / classes
    FORM: Any  # LABEL, PAIR or DENSE
    SMOOTH: Any


class Softmax(NamedTuple):
    """Maximum and sum of a student's row, and of its classes outside a top-k teacher's ids."""

    maximum: Any
    total: Any
    out_maximum: Any
    out_inverse: Any  # 1 / sum


class Mass(NamedTuple):
    """A top-k teacher's probability: all of it, outside the ids, and per class there."""

    total: Any
    rest: Any
    even: Any


@triton.jit
def row_start(row, stride, VEC: tl.constexpr):
    return tl.multiple_of(row.to(tl.int64) * stride, VEC)


@triton.jit
def last_block(classes, BLOCK: tl.constexpr):
    """First class of the last block, the only one that may reach past the row's end."""
    return (classes - 1) // BLOCK * BLOCK


@triton.jit
def load(row, at, classes, fill, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Classes at ... at + BLOCK - 1 of a row in float32; FULL: all of them exist."""
    if FULL:
        return tl.load(row.pointer + (row.start + at) + tl.arange(0, BLOCK)).to(tl.float32)
    cols = at + tl.arange(0, BLOCK)
    if row.VEC == 1:
        return tl.load(row.pointer + row.start + cols, mask=cols < classes, other=fill).to(
            tl.float32
        )
    if row.PADDED:
        width = (classes + row.VEC - 1) // row.VEC * row.VEC
        x = tl.load(row.pointer + row.start + cols, mask=cols < width, other=fill).to(tl.float32)
        return tl.where(cols < classes, x, fill)
    width = classes // row.VEC * row.VEC
    return tl.load(row.pointer + row.start + cols, mask=cols < width, other=fill).to(tl.float32)


@triton.jit
def store(row, at, classes, value, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Write a block of a gradient, if one is requested."""
    cols = at + tl.arange(0, BLOCK)
    if row.pointer is None:
        pass
    elif FULL:
        tl.store(row.pointer + (row.start + at) + tl.arange(0, BLOCK), value)
    elif row.VEC == 1:
        tl.store(row.pointer + row.start + cols, value, mask=cols < classes)
    else:
        # We allocated the padding of a gradient ourselves: it is written too, with zeros.
        width = (classes + row.VEC - 1) // row.VEC * row.VEC
        tl.store(
            row.pointer + row.start + cols, tl.where(cols < classes, value, 0.0), mask=cols < width
        )


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
    """A block as [lanes, n], a lane being the n elements that one thread holds.

    They are VEC neighbours, or 8 classes without wide accesses. A reduction over a lane then stays
    within its thread.
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
def long_maximum_and_total(row, classes, scale, BLOCK: tl.constexpr):
    last = last_block(classes, BLOCK)
    maximum, total = no_lanes(BLOCK, row.VEC)
    for FULL in tl.static_range(2):
        for at in range(0 if FULL else last, last if FULL else classes, BLOCK):
            z = load(row, at, classes, NEG_INF, BLOCK, FULL == 1)
            maximum, total = gather_in(maximum, total, z, scale, row.VEC)
    return over_lanes(maximum, total, scale)


@triton.jit
def inverse(total):
    return tl.where(total > 0, 1.0 / total, 0.0)


# ---------------------------------------------------------------------------------------------
# Cross-entropy
# ---------------------------------------------------------------------------------------------


@triton.jit
def target_block(at, classes, target, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Target probabilities of a block of classes, smoothed; 0 past the last class."""
    cols = at + tl.arange(0, BLOCK)
    if target.FORM == DENSE:
        t = load(target.soft, at, classes, 0.0, BLOCK, FULL) * target.keep
    else:
        t = tl.where(cols == target.first, target.first_weight, 0.0)
        if target.FORM == PAIR:
            t += tl.where(cols == target.second, target.second_weight, 0.0)
    if target.SMOOTH:
        t += target.spread
        if not FULL:
            t = tl.where(cols < classes, t, 0.0)
    return t


@triton.jit
def cross_entropy_block(z, t, mass, maximum, log2_total, scale):
    """Losses -t log p of a block and the gradient mass * p - t; mass is the sum of t."""
    log2_p = (z - maximum) * scale - log2_total
    loss = tl.where(t != 0, -t * (log2_p * LN2), 0.0)
    return loss, mass * tl.exp2(log2_p) - t


@triton.jit
def cross_entropy_row(
    logits, gradient, classes, gradient_scale, target, BLOCK: tl.constexpr, SINGLE: tl.constexpr
):
    if SINGLE:
        z = load(logits, 0, classes, NEG_INF, BLOCK, False)
        t = target_block(0, classes, target, BLOCK, False)
        maximum, total = maximum_and_total(z, LOG2E)
        mass = 1.0
        if target.FORM == DENSE:
            mass = tl.sum(t, 0)
        loss, g = cross_entropy_block(z, t, mass, maximum, tl.log2(total), LOG2E)
        store(gradient, 0, classes, g * gradient_scale, BLOCK, False)
        return tl.sum(loss, 0)
    if target.FORM == DENSE:
        return long_dense_row(logits, gradient, classes, gradient_scale, target, BLOCK)
    return long_label_row(logits, gradient, classes, gradient_scale, target, BLOCK)


@triton.jit
def long_dense_row(logits, gradient, classes, gradient_scale, target, BLOCK: tl.constexpr):
    maximum, total = long_maximum_and_total(logits, classes, LOG2E, BLOCK)
    log2_total = tl.log2(total)
    last = last_block(classes, BLOCK)
    masses = target_block(last, classes, target, BLOCK, False)
    for at in range(0, last, BLOCK):
        masses += target_block(at, classes, target, BLOCK, True)
    mass = tl.sum(masses, 0)
    losses = tl.zeros([BLOCK], tl.float32)
    for FULL in tl.static_range(2):
        for at in range(0 if FULL else last, last if FULL else classes, BLOCK):
            z = load(logits, at, classes, NEG_INF, BLOCK, FULL == 1)
            t = target_block(at, classes, target, BLOCK, FULL == 1)
            loss, g = cross_entropy_block(z, t, mass, maximum, log2_total, LOG2E)
            store(gradient, at, classes, g * gradient_scale, BLOCK, FULL == 1)
            losses += loss
    return tl.sum(losses, 0)


@triton.jit
def label_entry(z, exists, t, gradient, label, gradient_scale, spread, maximum, log2_total):
    """Loss -t log p of one label; stores the gradient p - t - spread of its class."""
    log2_p = (z - maximum) * LOG2E - log2_total
    if gradient.pointer is not None:
        g = (tl.exp2(log2_p) - (t + spread)) * gradient_scale
        tl.store(gradient.pointer + gradient.start + label, g, mask=exists)
    return tl.where(exists & (t != 0), -t * (log2_p * LN2), 0.0)


@triton.jit
def long_label_row(logits, gradient, classes, gradient_scale, target, BLOCK: tl.constexpr):
    """One or two labels; their classes come last, so that no block is compared with the labels."""
    first, second, first_weight = target.first, target.second, target.first_weight
    spread = target.spread if target.SMOOTH else 0.0
    has_first = (first >= 0) & (first < classes)
    p = logits.pointer + logits.start + first
    z_first = tl.load(p, mask=has_first, other=0.0).to(tl.float32)
    if target.FORM == PAIR:
        first_weight += tl.where(second == first, target.second_weight, 0.0)
        has_second = (second >= 0) & (second < classes) & (second != first)
        p = logits.pointer + logits.start + second
        z_second = tl.load(p, mask=has_second, other=0.0).to(tl.float32)
    maximum, total = long_maximum_and_total(logits, classes, LOG2E, BLOCK)
    log2_total = tl.log2(total)
    loss = 0.0
    if target.SMOOTH or gradient.pointer is not None:
        last = last_block(classes, BLOCK)
        sums = tl.zeros([BLOCK], tl.float32)  # of log2 p
        for FULL in tl.static_range(2):
            for at in range(0 if FULL else last, last if FULL else classes, BLOCK):
                cols = at + tl.arange(0, BLOCK)
                z = load(logits, at, classes, NEG_INF, BLOCK, FULL == 1)
                log2_p = (z - maximum) * LOG2E - log2_total
                g = tl.exp2(log2_p)
                if target.SMOOTH:
                    g -= spread
                    sums += log2_p if FULL else tl.where(cols < classes, log2_p, 0.0)
                store(gradient, at, classes, g * gradient_scale, BLOCK, FULL == 1)
        loss = tl.sum(sums, 0) * (-spread * LN2)
    if gradient.pointer is not None:
        tl.debug_barrier()  # other threads wrote the labels' entries with those of their blocks
    loss += label_entry(
        z_first, has_first, first_weight, gradient, first, gradient_scale, spread,
        maximum, log2_total,
    )  # fmt: skip
    if target.FORM == PAIR:
        loss += label_entry(
            z_second, has_second, target.second_weight, gradient, second, gradient_scale, spread,
            maximum, log2_total,
        )  # fmt: skip
    return loss


# ---------------------------------------------------------------------------------------------
# Binary cross-entropy
# ---------------------------------------------------------------------------------------------


@triton.jit
def add_binary_block(
    losses, logits, gradient, at, classes, gradient_scale, target, smoothing, inverse_classes,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Adds losses softplus(-z or z) of a block; smoothing adds a term linear in z."""
    cols = at + tl.arange(0, BLOCK)
    z = load(logits, at, classes, 0.0, BLOCK, FULL)
    positive = target_block(at, classes, target, BLOCK, FULL) > 0
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
    store(gradient, at, classes, g * gradient_scale, BLOCK, FULL)
    return losses + (loss if FULL else tl.where(cols < classes, loss, 0.0))


@triton.jit
def binary_row(
    logits, gradient, classes, gradient_scale, target, smoothing, inverse_classes,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """``target`` is not smoothed: a class is positive where it is above 0."""
    losses = tl.zeros([BLOCK], tl.float32)
    if SINGLE:
        losses = add_binary_block(
            losses, logits, gradient, 0, classes, gradient_scale, target,
            smoothing, inverse_classes, SMOOTH, BLOCK, False,
        )  # fmt: skip
        return tl.sum(losses, 0)
    last = last_block(classes, BLOCK)
    for FULL in tl.static_range(2):
        for at in range(0 if FULL else last, last if FULL else classes, BLOCK):
            losses = add_binary_block(
                losses, logits, gradient, at, classes, gradient_scale, target,
                smoothing, inverse_classes, SMOOTH, BLOCK, FULL == 1,
            )  # fmt: skip
    return tl.sum(losses, 0)


# ---------------------------------------------------------------------------------------------
# Soft distillation, dense teacher
# ---------------------------------------------------------------------------------------------


@triton.jit
def divergence_block(z, x, maximum, log2_total, t_maximum, t_log2_total, scale):
    """Terms q log(q / p) - q + p of KL, none below 0, and the gradient p - q.

    The last two sum to 0 over a row. They are computed from the same rounded logarithms as the
    first, so they cancel the effect of rounding log p, up to its square.
    """
    log2_p = (z - maximum) * scale - log2_total
    log2_q = (x - t_maximum) * scale - t_log2_total
    q = tl.exp2(log2_q)
    g = tl.exp2(log2_p) - q
    return q * (tl.where(q > 0, log2_q - log2_p, 0.0) * LN2) + g, g


@triton.jit
def divergence_row(
    logits, gradient, teacher, classes, scale, gradient_scale,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    if SINGLE:
        z = load(logits, 0, classes, NEG_INF, BLOCK, False)
        x = load(teacher, 0, classes, NEG_INF, BLOCK, False)
        maximum, total = maximum_and_total(z, scale)
        t_maximum, t_total = maximum_and_total(x, scale)
        loss, g = divergence_block(
            z, x, maximum, tl.log2(total), t_maximum, tl.log2(t_total), scale
        )
        store(gradient, 0, classes, g * gradient_scale, BLOCK, False)
        return tl.sum(loss, 0)
    last = last_block(classes, BLOCK)
    maximum, total = no_lanes(BLOCK, logits.VEC)
    t_maximum, t_total = no_lanes(BLOCK, teacher.VEC)
    for FULL in tl.static_range(2):
        for at in range(0 if FULL else last, last if FULL else classes, BLOCK):
            z = load(logits, at, classes, NEG_INF, BLOCK, FULL == 1)
            maximum, total = gather_in(maximum, total, z, scale, logits.VEC)
            x = load(teacher, at, classes, NEG_INF, BLOCK, FULL == 1)
            t_maximum, t_total = gather_in(t_maximum, t_total, x, scale, teacher.VEC)
    maximum, total = over_lanes(maximum, total, scale)
    t_maximum, t_total = over_lanes(t_maximum, t_total, scale)
    log2_total, t_log2_total = tl.log2(total), tl.log2(t_total)
    losses = tl.zeros([BLOCK], tl.float32)
    for FULL in tl.static_range(2):
        for at in range(0 if FULL else last, last if FULL else classes, BLOCK):
            z = load(logits, at, classes, NEG_INF, BLOCK, FULL == 1)
            x = load(teacher, at, classes, NEG_INF, BLOCK, FULL == 1)
            loss, g = divergence_block(z, x, maximum, log2_total, t_maximum, t_log2_total, scale)
            store(gradient, at, classes, g * gradient_scale, BLOCK, FULL == 1)
            losses += loss
    return tl.sum(losses, 0)


# ---------------------------------------------------------------------------------------------
# Soft distillation, top-k teacher
# ---------------------------------------------------------------------------------------------


@triton.jit
def members(ids, kept, at, BLOCK: tl.constexpr, IDS: tl.constexpr):
    """Which of the classes at ... at + BLOCK - 1 are among a row's ids: a bit map, spread out.

    Comparing every class with every id would cost BLOCK * K; this costs BLOCK * K / 32.
    """
    STEP: tl.constexpr = IDS if IDS < IDS_AT_ONCE else IDS_AT_ONCE
    word = at // 32 + tl.arange(0, BLOCK // 32)
    bits = tl.zeros([BLOCK // 32], tl.int32)
    for first in range(0, kept, STEP):
        k = first + tl.arange(0, STEP)
        i = tl.load(ids.pointer + ids.start + k, mask=k < kept, other=0).to(tl.int32)
        here = (word[:, None] == (i >> 5)[None, :]) & (k < kept)[None, :]
        bit = tl.full([STEP], 1, tl.int32) << (i & 31)
        bits |= tl.sum(tl.where(here, bit[None, :], 0), 1)  # distinct ids: a sum is an or
    spread = (bits[:, None] >> tl.arange(0, 32)[None, :]) & 1
    return tl.reshape(spread, [BLOCK]) != 0


@triton.jit
def topk_block(z, member, valid, student, scale, inverse_tau, teacher, TAIL: tl.constexpr):
    """log p of the classes outside the ids (for "uniform"), and the gradient as if all were."""
    g = teacher.total * tl.exp2((z - student.maximum) * scale) * (1.0 / student.total)
    outside = tl.zeros_like(z)
    if TAIL == UNIFORM:
        log_p = (z - student.maximum) * inverse_tau - tl.log(student.total)
        outside = tl.where(valid & (member == 0), log_p, 0.0)
        g -= teacher.even
    if TAIL == BUCKET:
        # Without its members a row has a lower maximum, and a member may lie above it.
        z = tl.where(member, NEG_INF, z)
        g -= teacher.rest * (tl.exp2((z - student.out_maximum) * scale) * student.out_inverse)
    return outside, g


@triton.jit
def topk_row(
    logits, gradient, ids, log_probs, log_rest, classes, kept, scale, inverse_tau, gradient_scale,
    TAIL: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, IDS)
    i = tl.load(ids.pointer + ids.start + k, mask=k < kept, other=-1).to(tl.int32)
    if ids.pointer.dtype.element_ty == tl.uint16:
        i = i & 0xFFFF
    known = (k < kept) & (i >= 0) & (i < classes)
    log_q = tl.load(log_probs.pointer + log_probs.start + k, mask=known, other=NEG_INF)
    log_q = log_q.to(tl.float32)
    if TAIL == RENORM:
        q_maximum, q_total = maximum_and_total(log_q, LOG2E)
        log_q = log_q - q_maximum - tl.log(q_total)
    q = tl.exp2(log_q * LOG2E)
    picked = tl.load(logits.pointer + logits.start + i, mask=known, other=NEG_INF).to(tl.float32)
    rest, log_r, even = 0.0, 0.0, 0.0
    if TAIL >= UNIFORM:
        log_r = log_rest
        rest = tl.exp2(log_r * LOG2E)
        if TAIL == UNIFORM:
            even = rest / (classes - kept).to(tl.float32)
    teacher = Mass(tl.sum(q, 0) + rest, rest, even)

    out_maximum, out_total = 0.0, 1.0
    if SINGLE:
        cols = tl.arange(0, BLOCK)
        z = load(logits, 0, classes, NEG_INF, BLOCK, False)
        member = cols < 0
        if TAIL >= UNIFORM:
            member = members(ids, kept, 0, BLOCK, IDS)
        maximum, total = maximum_and_total(z, scale)
        if TAIL == BUCKET:
            out_maximum, out_total = maximum_and_total(tl.where(member, NEG_INF, z), scale)
        outside, g = topk_block(
            z, member, cols < classes, Softmax(maximum, total, out_maximum, inverse(out_total)),
            scale, inverse_tau, teacher, TAIL,
        )  # fmt: skip
        store(gradient, 0, classes, g * gradient_scale, BLOCK, False)
        log_p_outside = tl.sum(outside, 0)
    else:
        lanes, totals = no_lanes(BLOCK, logits.VEC)
        out_lanes, out_totals = no_lanes(BLOCK, logits.VEC)
        last = last_block(classes, BLOCK)
        for FULL in tl.static_range(2):
            for at in range(0 if FULL else last, last if FULL else classes, BLOCK):
                z = load(logits, at, classes, NEG_INF, BLOCK, FULL == 1)
                lanes, totals = gather_in(lanes, totals, z, scale, logits.VEC)
                if TAIL == BUCKET:
                    z = tl.where(members(ids, kept, at, BLOCK, IDS), NEG_INF, z)
                    out_lanes, out_totals = gather_in(out_lanes, out_totals, z, scale, logits.VEC)
        maximum, total = over_lanes(lanes, totals, scale)
        if TAIL == BUCKET:
            out_maximum, out_total = over_lanes(out_lanes, out_totals, scale)
        student = Softmax(maximum, total, out_maximum, inverse(out_total))
        outsides = tl.zeros([BLOCK], tl.float32)
        for FULL in tl.static_range(2):
            for at in range(0 if FULL else last, last if FULL else classes, BLOCK):
                cols = at + tl.arange(0, BLOCK)
                z = load(logits, at, classes, NEG_INF, BLOCK, FULL == 1)
                member = cols < 0
                if TAIL >= UNIFORM:
                    member = members(ids, kept, at, BLOCK, IDS)
                outside, g = topk_block(
                    z, member, cols < classes, student, scale, inverse_tau, teacher, TAIL
                )
                store(gradient, at, classes, g * gradient_scale, BLOCK, FULL == 1)
                outsides += outside
        log_p_outside = tl.sum(outsides, 0)

    # Natural logarithms, as the teacher's: two roundings fewer than through base 2.
    log_total = tl.log(total)
    log_p = (picked - maximum) * inverse_tau - log_total
    loss = tl.sum(tl.where(q > 0, q * (log_q - log_p), 0.0), 0)
    if gradient.pointer is not None:
        tl.debug_barrier()  # other threads wrote the ids' entries with those of their blocks
        g = teacher.total * tl.exp2((picked - maximum) * scale) * (1.0 / total) - q
        g = g * gradient_scale
        tl.store(gradient.pointer + gradient.start + i, g, mask=known)
    if TAIL == UNIFORM:
        count = (classes - kept).to(tl.float32)
        gap = log_r - tl.log(count) - log_p_outside / count
        loss += tl.where(rest > 0, rest * gap, 0.0)
    if TAIL == BUCKET:
        # Of the quotient: where s is nearly 1, a difference of two logarithms is all rounding.
        log_s = (out_maximum - maximum) * inverse_tau + tl.log(out_total / total)
        loss += tl.where(rest > 0, rest * (log_r - log_s), 0.0)
    return loss


# ---------------------------------------------------------------------------------------------
# Hard distillation: the teacher's decision, the first of equal maxima
# ---------------------------------------------------------------------------------------------


@triton.jit
def dense_decision(teacher, classes, BLOCK: tl.constexpr, SINGLE: tl.constexpr):
    if SINGLE:
        highest = NEG_INF
        decision = 0
        for at in range(0, classes, BLOCK):  # once; without the loop ptxas takes more registers
            cols = at + tl.arange(0, BLOCK)
            x = load(teacher, at, classes, NEG_INF, BLOCK, False)
            top = tl.max(x, 0)
            first = tl.min(tl.where((x == top) & (cols < classes), cols, 2147483647), 0)
            decision = tl.where(top > highest, first, decision)
            highest = tl.maximum(highest, top)
        return decision
    last = last_block(classes, BLOCK)
    best, _ = no_lanes(BLOCK, teacher.VEC)  # the highest logit of each lane
    best += NEG_INF
    where = tl.zeros_like(best).to(tl.int32)  # and the first block that has it
    for PARTIAL in tl.static_range(2):  # in order: of equal logits the first counts
        for at in range(last if PARTIAL else 0, classes if PARTIAL else last, BLOCK):
            x = load(teacher, at, classes, NEG_INF, BLOCK, PARTIAL == 0)
            tops = tl.max(by_lane(x, teacher.VEC), 1)
            best, where = tl.maximum(best, tops), tl.where(tops > best, at, where)
    top = tl.max(best, 0)
    at = tl.min(tl.where(best == top, where, classes), 0)  # the first block that has it
    x = load(teacher, at, classes, NEG_INF, BLOCK, False)
    cols = at + tl.arange(0, BLOCK)
    return tl.min(tl.where((x == top) & (cols < classes), cols, 2147483647), 0)


@triton.jit
def topk_decision(ids, log_probs, kept, IDS: tl.constexpr):
    k = tl.arange(0, IDS)
    log_q = tl.load(log_probs.pointer + log_probs.start + k, mask=k < kept, other=NEG_INF)
    log_q = log_q.to(tl.float32)
    # A row of NaN equals no maximum: its last id, and no place behind the row.
    first = tl.min(tl.where((log_q == tl.max(log_q, 0)) & (k < kept), k, kept - 1), 0)
    return tl.load(ids.pointer + ids.start + first).to(tl.int32)


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
            soft_start = row_start(row, soft_stride, SOFT_VEC)
        else:
            a = tl.load(first + row).to(tl.int32)
            if TARGET == PAIR:
                b = tl.load(second + row).to(tl.int32)
                weight_a = tl.load(lam + row).to(tl.float32)
                weight_b = 1.0 - weight_a
        z_start, g_start = row_start(row, z_c_stride, Z_C_VEC), row_start(row, g_c_stride, G_C_VEC)
        if BASE == CE:
            row_loss = cross_entropy_row(
                Row(z_c, z_start, Z_C_VEC, Z_C_PADDED), Row(g_c, g_start, G_C_VEC, False),
                classes, g_c_scale,
                Target(
                    a, b, weight_a * keep, weight_b * keep,
                    Row(soft, soft_start, SOFT_VEC, SOFT_PADDED),
                    keep, smoothing * inverse_classes, TARGET, SMOOTH,
                ),
                BLOCK, SINGLE,
            )  # fmt: skip
        else:
            row_loss = binary_row(
                Row(z_c, z_start, Z_C_VEC, Z_C_PADDED), Row(g_c, g_start, G_C_VEC, False),
                classes, g_c_scale,
                Target(
                    a, b, weight_a, weight_b, Row(soft, soft_start, SOFT_VEC, SOFT_PADDED),
                    1.0, 0.0, TARGET, False,
                ),
                smoothing, inverse_classes, SMOOTH, BLOCK, SINGLE,
            )  # fmt: skip
        tl.store(row_losses + row, row_loss)
    if TEACHER != 0:
        z_start, g_start = row_start(row, z_d_stride, Z_D_VEC), row_start(row, g_d_stride, G_D_VEC)
        teacher_start, ids_start, log_probs_start = 0, 0, 0
        if TEACHER == SOFT or TEACHER == HARD_DENSE:  # noqa: SIM109
            teacher_start = row_start(row, teacher_stride, TEACHER_VEC)
        if TEACHER == SOFT_TOPK or TEACHER == HARD_TOPK:  # noqa: SIM109
            ids_start = row.to(tl.int64) * ids_stride
            log_probs_start = row.to(tl.int64) * log_probs_stride
        if TEACHER == SOFT:
            row_loss = divergence_row(
                Row(z_d, z_start, Z_D_VEC, Z_D_PADDED), Row(g_d, g_start, G_D_VEC, False),
                Row(teacher, teacher_start, TEACHER_VEC, TEACHER_PADDED),
                classes, scale, g_d_scale, BLOCK, SINGLE,
            )  # fmt: skip
        elif TEACHER == SOFT_TOPK:
            log_r = 0.0
            if TAIL >= UNIFORM:
                log_r = tl.load(log_rest + row).to(tl.float32)
            row_loss = topk_row(
                Row(z_d, z_start, Z_D_VEC, Z_D_PADDED), Row(g_d, g_start, G_D_VEC, False),
                Row(ids, ids_start, 1, False), Row(log_probs, log_probs_start, 1, False), log_r,
                classes, kept, scale, inverse_tau, g_d_scale, TAIL, IDS, BLOCK, SINGLE,
            )  # fmt: skip
        else:
            if TEACHER == HARD_LABEL:
                a = tl.load(teacher + row).to(tl.int32)
            elif TEACHER == HARD_DENSE:
                a = dense_decision(
                    Row(teacher, teacher_start, TEACHER_VEC, TEACHER_PADDED), classes, BLOCK, SINGLE
                )
            else:
                a = topk_decision(
                    Row(ids, ids_start, 1, False), Row(log_probs, log_probs_start, 1, False),
                    kept, IDS,
                )  # fmt: skip
            row_loss = cross_entropy_row(
                Row(z_d, z_start, Z_D_VEC, Z_D_PADDED), Row(g_d, g_start, G_D_VEC, False),
                classes, g_d_scale,
                Target(a, 0, 1.0, 0.0, Row(None, 0, 1, False), 1.0, 0.0, LABEL, False),
                BLOCK, SINGLE,
            )  # fmt: skip
        tl.store(row_losses + rows + row, row_loss)

    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == rows - 1:
        base_loss, distill_loss = 0.0, 0.0
        if BASE != 0:
            base_loss = sum_of(row_losses, rows, ROWS_AT_ONCE) * base_mean
        if TEACHER != 0:
            distill_loss = sum_of(row_losses + rows, rows, ROWS_AT_ONCE) * distill_mean
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
def sum_of(values, count, BLOCK: tl.constexpr):
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
        scale_in_place(g_c, grad * factor_c, count_c, steps, BLOCK)
    if g_d is not None:
        scale_in_place(g_d, grad * factor_d, count_d, steps, BLOCK)


@triton.jit
def scale_in_place(values, factor, count, steps, BLOCK: tl.constexpr):
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
