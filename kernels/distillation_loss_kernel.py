"""Triton kernels of the distillation loss: one program per row does both heads.

Up to ``SINGLE_CLASSES`` classes every logit is read once, beyond it twice. Gradients are written
once; then a longer row's entries of its labels, and with a top-k teacher the K entries of its ids,
are overwritten with their own values. ``distillation_loss_rows`` has what goes over dense rows.

The last program to arrive adds the row losses up, in an order that does not depend on who that is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .distillation_loss_rows import (
    BUCKET,
    CE,
    DENSE,
    HARD_DENSE,
    HARD_LABEL,
    HARD_TOPK,
    LABEL,
    LOG2E,
    NEG_INF,
    PAIR,
    RENORM,
    SOFT,
    SOFT_TOPK,
    UNIFORM,
    binary_row,
    by_lane,
    cross_entropy_row,
    divergence_row,
    gather_in,
    inverse,
    last_block,
    load,
    maximum_and_total,
    no_lanes,
    over_lanes,
    row_start,
    store,
)

IDS_AT_ONCE = tl.constexpr(64)


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
def _gather_topk_block(
    lanes, totals, out_lanes, out_totals, logits, start, ids, ids_start, at, classes, kept, scale,
    TAIL: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr,
    VEC: tl.constexpr, PADDED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of each lane, over all classes and over those outside the ids."""
    z = load(logits, start, at, classes, NEG_INF, BLOCK, VEC, PADDED, FULL)
    lanes, totals = gather_in(lanes, totals, z, scale, VEC)
    if TAIL == BUCKET:
        member = _members(ids, ids_start, kept, at, BLOCK, IDS)
        out_lanes, out_totals = gather_in(
            out_lanes, out_totals, tl.where(member, NEG_INF, z), scale, VEC
        )
    return lanes, totals, out_lanes, out_totals


@triton.jit
def _long_topk_block(
    outsides, logits, start, gradient, gradient_start, ids, ids_start, at, classes, kept,
    maximum, total, out_maximum, out_inverse, scale, inverse_tau, gradient_scale, mass, rest, even,
    TAIL: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr,
    VEC: tl.constexpr, PADDED: tl.constexpr, GRADIENT_VEC: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    cols = at + tl.arange(0, BLOCK)
    z = load(logits, start, at, classes, NEG_INF, BLOCK, VEC, PADDED, FULL)
    member = cols < 0
    if TAIL >= UNIFORM:
        member = _members(ids, ids_start, kept, at, BLOCK, IDS)
    outside, g = _topk_block(
        z, member, cols < classes, maximum, total, out_maximum, out_inverse, scale, inverse_tau,
        mass, rest, even, TAIL,
    )  # fmt: skip
    if gradient is not None:
        store(gradient, gradient_start, at, classes, g * gradient_scale, BLOCK, GRADIENT_VEC, FULL)
    return outsides + outside


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
        q_maximum, q_total = maximum_and_total(log_q, LOG2E)
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
        z = load(logits, start, 0, classes, NEG_INF, BLOCK, VEC, PADDED, False)
        member = cols < 0
        if TAIL >= UNIFORM:
            member = _members(ids, ids_start, kept, 0, BLOCK, IDS)
        maximum, total = maximum_and_total(z, scale)
        if TAIL == BUCKET:
            out_maximum, out_total = maximum_and_total(tl.where(member, NEG_INF, z), scale)
        outside, g = _topk_block(
            z, member, cols < classes, maximum, total, out_maximum, inverse(out_total),
            scale, inverse_tau, mass, rest, even, TAIL,
        )  # fmt: skip
        if gradient is not None:
            store(
                gradient, gradient_start, 0, classes, g * gradient_scale, BLOCK, GRADIENT_VEC, False
            )
        log_p_outside = tl.sum(outside, 0)
    else:
        lanes, totals = no_lanes(BLOCK, VEC)
        out_lanes, out_totals = no_lanes(BLOCK, VEC)
        last = last_block(classes, BLOCK)
        for at in range(last, classes, BLOCK):
            lanes, totals, out_lanes, out_totals = _gather_topk_block(
                lanes, totals, out_lanes, out_totals, logits, start, ids, ids_start, at,
                classes, kept, scale, TAIL, IDS, BLOCK, VEC, PADDED, False,
            )  # fmt: skip
        for at in range(0, last, BLOCK):
            lanes, totals, out_lanes, out_totals = _gather_topk_block(
                lanes, totals, out_lanes, out_totals, logits, start, ids, ids_start, at,
                classes, kept, scale, TAIL, IDS, BLOCK, VEC, PADDED, True,
            )  # fmt: skip
        maximum, total = over_lanes(lanes, totals, scale)
        if TAIL == BUCKET:
            out_maximum, out_total = over_lanes(out_lanes, out_totals, scale)
        out_inverse = inverse(out_total)
        outsides = tl.zeros([BLOCK], tl.float32)
        for at in range(last, classes, BLOCK):
            outsides = _long_topk_block(
                outsides, logits, start, gradient, gradient_start, ids, ids_start, at,
                classes, kept, maximum, total, out_maximum, out_inverse, scale, inverse_tau,
                gradient_scale, mass, rest, even,
                TAIL, IDS, BLOCK, VEC, PADDED, GRADIENT_VEC, False,
            )  # fmt: skip
        for at in range(0, last, BLOCK):
            outsides = _long_topk_block(
                outsides, logits, start, gradient, gradient_start, ids, ids_start, at,
                classes, kept, maximum, total, out_maximum, out_inverse, scale, inverse_tau,
                gradient_scale, mass, rest, even,
                TAIL, IDS, BLOCK, VEC, PADDED, GRADIENT_VEC, True,
            )  # fmt: skip
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
def _decision_block(
    best, where, teacher, start, at, classes,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PADDED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The highest logit of each lane so far, and the block where it first came."""
    x = load(teacher, start, at, classes, NEG_INF, BLOCK, VEC, PADDED, FULL)
    highest = tl.max(by_lane(x, VEC), 1)
    return tl.maximum(best, highest), tl.where(highest > best, at, where)


@triton.jit
def _decision(
    teacher, start, classes,
    BLOCK: tl.constexpr, SINGLE: tl.constexpr, VEC: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    if SINGLE:
        highest = NEG_INF
        decision = 0
        for at in range(0, classes, BLOCK):  # once; without the loop ptxas takes more registers
            cols = at + tl.arange(0, BLOCK)
            x = load(teacher, start, at, classes, NEG_INF, BLOCK, VEC, PADDED, False)
            top = tl.max(x, 0)
            first = tl.min(tl.where((x == top) & (cols < classes), cols, 2147483647), 0)
            decision = tl.where(top > highest, first, decision)
            highest = tl.maximum(highest, top)
        return decision
    last = last_block(classes, BLOCK)
    best, _ = no_lanes(BLOCK, VEC)
    best += NEG_INF
    where = tl.zeros_like(best).to(tl.int32)
    for at in range(0, last, BLOCK):  # in order: of equal logits the first counts
        best, where = _decision_block(
            best, where, teacher, start, at, classes, BLOCK, VEC, PADDED, True
        )
    for at in range(last, classes, BLOCK):
        best, where = _decision_block(
            best, where, teacher, start, at, classes, BLOCK, VEC, PADDED, False
        )
    top = tl.max(best, 0)
    at = tl.min(tl.where(best == top, where, classes), 0)  # the first block that has it
    x = load(teacher, start, at, classes, NEG_INF, BLOCK, VEC, PADDED, False)
    cols = at + tl.arange(0, BLOCK)
    return tl.min(tl.where((x == top) & (cols < classes), cols, 2147483647), 0)


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
                z_c, z_start, g_c, g_start, classes, g_c_scale,
                a, b, weight_a * keep, weight_b * keep, soft, soft_start,
                keep, smoothing * inverse_classes,
                TARGET, SMOOTH, BLOCK, SINGLE, Z_C_VEC, Z_C_PADDED, G_C_VEC, SOFT_VEC, SOFT_PADDED,
            )  # fmt: skip
        else:
            row_loss = binary_row(
                z_c, z_start, g_c, g_start, classes, g_c_scale,
                a, b, weight_a, weight_b, soft, soft_start, smoothing, inverse_classes,
                TARGET, SMOOTH, BLOCK, SINGLE, Z_C_VEC, Z_C_PADDED, G_C_VEC, SOFT_VEC, SOFT_PADDED,
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
                a = _decision(
                    teacher, teacher_start, classes, BLOCK, SINGLE, TEACHER_VEC, TEACHER_PADDED
                )
            else:
                a = _topk_decision(ids, ids_start, log_probs, log_probs_start, kept, IDS)
            row_loss = cross_entropy_row(
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
