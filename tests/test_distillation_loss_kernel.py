"""The kernels of the distillation loss: against float64, against its own laws, byte by byte.

On a machine without a GPU they run in Triton's interpreter, which has to be chosen before triton is
imported: `test_in_the_interpreter` runs this file again in a process of its own. On a GPU machine
the tests marked gpu run the compiled kernels.

Accuracy: the error against the float64 reference is at most twice that of plain PyTorch code in the
same dtype, plus two units of the result's last place and one rounding of the terms that a soft loss
is the difference of; on a GPU five units and four roundings, as its exponentials and quotients have
errors of two units each. Grid: every teacher form x every dtype x every
shape of SHAPES; temperatures, memory layouts, target forms, base losses and reductions take turns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.cache.sampled import ViewKeys
from deit_fast.cache.sparse_codecs import SampledCodec
from deit_fast.kernels import TopK, distillation_loss
from deit_fast.kernels.distillation_loss_reference import (
    reference,
    soft_factor,
)
from helpers.distillation import (
    TAILS,
    TEMPERATURES,
    base_loss,
    dense_pair,
    exact_top_k,
    hard_distillation,
    laid_out,
    soft_distillation,
)
from helpers.kernels import (
    APPROXIMATE,
    DEVICE,
    INTERPRETED,
    assert_250_repeats_are_equal,
    assert_replays,
    assert_waits_for_nothing,
    interpreted,
    outer_run,
    recorded,
    run_in_the_interpreter,
)

RUNS = INTERPRETED or DEVICE == "cuda"
# Allowed beside twice PyTorch's error: units of the result, roundings of the terms.
RESULT_ROUNDINGS, SUM_ROUNDINGS = (5, 4) if DEVICE == "cuda" or APPROXIMATE else (2, 1)

SHAPES = ((0, 7), (1, 1), (3, 2), (17, 7), (1, 10), (3, 100), (2, 1000), (1, 1001), (1, 1024))
LONG_SHAPES = ((1, 4097), (1, 21841))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("none", "dense", *TAILS, "hard dense", "hard labels", "hard topk")
LAYOUTS = ("plain", "columns", "transposed", "padded rows", "aligned rows", "misaligned")
TARGETS = ("labels", "pair", "dense")
K = 5


@outer_run
def test_in_the_interpreter() -> None:
    """All tests below, on the CPU."""
    run_in_the_interpreter(__file__)


# ---------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------


def normal(
    rows: int, classes: int, scale: float = 3.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    return (torch.randn(rows, classes, dtype=torch.float64) * scale).to(DEVICE, dtype)


def top_k(logits: Tensor, k: int, tau: float, tail: str = "bucket") -> TopK:
    ids, log_probs, log_tail, _ = exact_top_k(logits, k, tau)
    return TopK(ids.int(), log_probs.float(), log_tail.float(), tail)


def teacher_of(form: str, logits: Tensor, tau: float) -> Any:
    k = min(K, logits.shape[1])
    if form == "hard labels":
        return logits.argmax(1).int()
    if form == "hard topk":
        return top_k(logits, k, 1.0)
    if form in TAILS:
        return top_k(logits, k, tau, form)
    return logits if "dense" in form else None


def dense_target(target: Any, classes: int) -> Tensor:
    if isinstance(target, tuple):
        return dense_pair(target, classes)
    return target if target.dim() == 2 else F.one_hot(target.long(), classes).double()


def target_of(form: str, rows: int, classes: int) -> Any:
    first, second = torch.randint(classes, (2, rows), device=DEVICE)
    lam = torch.rand(rows, device=DEVICE)
    if form == "labels":
        return first
    return (first, second, lam) if form == "pair" else dense_target((first, second, lam), classes)


def to_double(value: Any) -> Any:
    if isinstance(value, TopK):
        return value._replace(log_probs=value.log_probs.double(), log_tail=value.log_tail.double())
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


# ---------------------------------------------------------------------------------------------
# Accuracy
# ---------------------------------------------------------------------------------------------


def naive(
    zc: Tensor, zd: Tensor, target: Any, teacher: Any, *, kind: str, alpha: float, tau: float,
    smoothing: float, base: str, reduction: str, return_parts: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The formulas of DeiT and timm in plain PyTorch, in the dtype of the logits."""
    rows, classes = zc.shape
    if base == "bce":
        base_term = reference(zc, None, target, None, kind="none", base=base, smoothing=smoothing)[
            0
        ]
    else:
        t = dense_target(target, classes) * (1 - smoothing) + smoothing / classes
        base_term = torch.sum(-t.to(zc.dtype) * F.log_softmax(zc, -1), -1).mean()
    if kind == "none":
        return base_term, base_term, base_term * 0
    if kind == "hard":
        distill = reference(None, zd, None, teacher, kind="hard", base="")[0]
    elif isinstance(teacher, TopK):
        distill = reference(
            None, zd, None, teacher, kind="soft", base="", tau=tau, reduction=reduction
        )[0]
    else:
        log_p = F.log_softmax(zd / tau, -1)
        log_q = F.log_softmax(teacher / tau, -1)
        distill = F.kl_div(log_p, log_q, reduction="sum", log_target=True).float()
        distill = distill * tau**2 / rows * (1 / classes if reduction == "numel" else 1)
    return (1 - alpha) * base_term + alpha * distill, base_term, distill


def results(loss: Callable[..., Any], zc: Tensor, zd: Tensor, *rest: Any, **options: Any) -> list:
    """Total, base and distillation loss, the gradients of both heads."""
    leaves = [zc.detach().requires_grad_(), zd.detach().requires_grad_()]
    losses = loss(*leaves, *rest, **options, return_parts=True)
    gradients = torch.autograd.grad(losses[0], leaves, allow_unused=True)
    return [x.detach() for x in losses] + [g for g in gradients if g is not None]


def error(got: Tensor, true: Tensor) -> float:
    return ((got.double() - true).norm() / true.norm()).item()


def one_rounding(zd: Tensor, teacher: Any, tau: float, reduction: str) -> tuple[float, float]:
    """What one float32 rounding of each log p and each p is worth in the soft loss and gradient.

    Near its 0 the loss is a difference of larger terms, and which of two codes has luck is chance.
    """
    log_p = torch.log_softmax(zd.double() / tau, 1)
    if isinstance(teacher, TopK):
        ids, r = teacher.ids.long(), teacher.log_tail.double()
        log_q, outside = teacher.log_probs.double(), log_p.scatter(1, ids, -1e9)
        if teacher.tail == "uniform":
            log_s = log_p.scatter(1, ids, 0.0).sum(1) / max(zd.shape[1] - ids.shape[1], 1)
        else:
            log_s = outside.logsumexp(1)
        log_p = torch.cat((log_p.gather(1, ids), log_s[:, None]), 1)
        log_q = torch.cat((log_q, r[:, None]), 1)
    else:
        log_q = torch.log_softmax(teacher.double() / tau, 1)
    q = log_q.exp()
    unit = torch.finfo(torch.float32).eps * soft_factor(reduction, tau, *zd.shape)
    terms = (q * (log_q.abs() + log_p.abs())).nan_to_num(0, 0, 0).sum()
    return unit * terms.item(), unit / tau * q.norm().item()


def assert_no_worse(zc: Tensor, zd: Tensor, target: Any, teacher: Any, **options: Any) -> None:
    ours = results(distillation_loss, zc, zd, target, teacher, **options)
    true = results(distillation_loss, *map(to_double, (zc, zd, target, teacher)), **options)
    assert [x.dtype for x in ours[:3]] == [torch.float32] * 3 and len(ours) == len(true)
    if len(zc) == 0:
        assert all(x.sum() == 0 for x in ours) and ours[-1].shape == zc.shape
        return
    other = results(naive, zc, zd, target, teacher, **options)
    floor = dict.fromkeys(("total", "base", "distill", "class gradient", "distill gradient"), 1e-12)
    if options["kind"] == "soft":
        terms, pull = one_rounding(zd, teacher, options["tau"], options["reduction"])
        floor |= {"distill": terms, "total": options["alpha"] * terms}
        floor["distill gradient"] = options["alpha"] * pull
    for (name, least), mine, theirs, truth in zip(floor.items(), ours, other, true, strict=False):
        allowed = 2 * (theirs.double() - truth).norm() + SUM_ROUNDINGS * least
        allowed += RESULT_ROUNDINGS * torch.finfo(mine.dtype).eps * truth.norm()
        if mine.dtype == torch.float16:  # a gradient below its range is lost in any code
            allowed += 6e-8 * mine.numel() ** 0.5
        mistake = (mine.double() - truth).norm()
        assert mistake <= allowed, (
            f"{name} {tuple(zc.shape)} {options}: {mistake:.1e} of {truth.norm():.1e}, "
            f"PyTorch's own {(theirs.double() - truth).norm():.1e}"
        )


def check_accuracy(form: str, dtype: torch.dtype, shapes: tuple[tuple[int, int], ...]) -> None:
    turns = [
        itertools.cycle(values)
        for values in (
            TEMPERATURES, LAYOUTS, TARGETS, ("ce", "bce", "ce"), ("numel", "batchmean"),
            (0.0, 0.1), DTYPES, (3.0, 0.01),
        )
    ]  # fmt: skip
    for turn in turns[:2]:  # other combinations for other forms
        for _ in range(FORMS.index(form)):
            next(turn)
    for shape in shapes:
        tau, layout, target, base, reduction, smoothing, other, distance = map(next, turns)
        zc, zd = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
        dense = (zd + normal(*shape, scale=distance)).to(other)
        zc, zd, dense = (laid_out(layout, x) for x in (zc, zd + 100, dense))
        assert_no_worse(
            zc, zd, target_of(target, *shape), teacher_of(form, dense, tau),
            kind=form.split()[0] if form.split()[0] in ("none", "hard") else "soft",
            alpha=0.3, tau=tau, smoothing=smoothing, base=base, reduction=reduction,
        )  # fmt: skip


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_accuracy(form: str, dtype: torch.dtype) -> None:
    check_accuracy(form, dtype, SHAPES)


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_accuracy_of_long_rows(form: str) -> None:
    check_accuracy(form, DTYPES[FORMS.index(form) % 3], LONG_SHAPES)


@interpreted
@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("base", ("ce", "bce"))
def test_accuracy_in_float32_at_every_temperature(tau: float, base: str) -> None:
    """All target forms and reductions, near and far teachers."""
    for target, distance, reduction in zip(
        TARGETS, (3.0, 0.3, 0.01), ("numel", "batchmean", "numel"), strict=True
    ):
        zd = normal(4, 100)
        assert_no_worse(
            normal(4, 100), zd, target_of(target, 4, 100), zd + normal(4, 100, distance),
            kind="soft", alpha=0.5, tau=tau, smoothing=0.1, base=base, reduction=reduction,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Every access to memory
# ---------------------------------------------------------------------------------------------


def both(
    zc: Tensor | None, zd: Tensor | None, target: Any, teacher: Any, kind: str, base: str = "ce",
    smoothing: float = 0.1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator itself: losses and gradients."""
    partner = lam = None
    if isinstance(target, tuple):
        target, partner, lam = target
    topk = (None, None, None, "drop")
    if isinstance(teacher, TopK):
        topk, teacher = tuple(teacher), None
    return torch.ops.deit_fast.distillation_loss_and_gradients(
        zc, zd, target, partner, lam, teacher, *topk, kind, base, "batchmean", 0.5, 2.0,
        smoothing, zc is not None, zd is not None,
    )  # fmt: skip


CLASSES = {"single": 1000, "odd": 1001, "split": 9003}


@interpreted
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        *itertools.product(CLASSES, ("plain", "misaligned")),
        ("odd", "aligned rows"),
        ("split", "aligned rows"),
    ],
)
@pytest.mark.parametrize(
    ("base", "form"),
    (("ce", "dense"), ("ce", "hard dense"), ("ce", "hard labels"), ("bce", "dense")),
)
def test_each_logit_is_read_and_each_gradient_written_once_in_a_pass(
    size: str, layout: str, form: str, base: str
) -> None:
    rows, classes = 2, CLASSES[size]
    x = [laid_out(layout, normal(rows, classes, dtype=torch.bfloat16)) for _ in range(3)]
    teacher = teacher_of(form, x[2], 2.0)
    target = target_of("pair", rows, classes)
    kind = "soft" if form == "dense" else "hard"
    with recorded() as seen:
        *_, gc, gd = both(x[0], x[1], target, teacher, kind, base)
    passes = 2 if size == "split" else 1
    expected = [1 if base == "bce" else passes, passes, 1 if kind == "hard" else passes]
    labels = [target[:2] if base == "ce" else (), (x[2].argmax(1),) if kind == "hard" else ()]
    if form == "hard labels":
        labels[1] = (teacher,)
    for logits, gradient, ids in zip(x, (gc, gd), labels, strict=False):
        once_more = np.zeros(tuple(gradient.shape), np.int64)
        if size == "split":  # a long row's entries of its labels come after all others
            for label in ids:
                once_more[np.arange(rows), label.numpy()] = 1
        assert (seen.counts(seen.reads, logits) == expected.pop(0) + once_more).all()
        assert (seen.counts(seen.writes, gradient) == 1 + once_more).all()
        assert gradient.stride(0) == (-(-classes // 8) * 8 if layout == "aligned rows" else classes)
    if form == "dense":
        assert (seen.counts(seen.reads, x[2]) == expected.pop()).all()
    if form == "hard dense":
        again = seen.counts(seen.reads, x[2]) - 1
        assert again.min() == 0 and again.max() == (size == "split")
        if size == "split":  # the block that has the maximum, to find its class
            assert again[np.arange(rows), x[2].argmax(1).numpy()].all()
            assert again.sum(1).max() <= 4096
    scratch = 2 * rows + 4  # row losses, three losses, the counter
    assert seen.outside(seen.writes, [gc, gd]) <= scratch
    reads = [*x, *target, *([teacher] if form == "hard labels" else [])]
    assert seen.outside(seen.reads, reads) == 2 * rows  # the row losses, once more


@interpreted
def test_away_from_a_default_stream_every_call_has_its_own_counter() -> None:
    from deit_fast.kernels import distillation_loss_launch as launch

    like = normal(2, 3)
    first, second = launch._arrival_counter(like), launch._arrival_counter(like)
    assert first.dtype == torch.int32 and first.tolist() == second.tolist() == [0]
    assert first.data_ptr() != second.data_ptr() and not launch._arrivals


@interpreted
@pytest.mark.parametrize("classes", (1000, 9003))
@pytest.mark.parametrize("tail", TAILS)
def test_a_topk_teacher_is_never_made_dense(classes: int, tail: str) -> None:
    rows = 2
    zd, topk = normal(rows, classes), top_k(normal(rows, classes), K, 2.0, tail)
    with recorded() as seen:
        *_, gd = both(None, zd, None, topk, "soft", "")
    member = torch.zeros(rows, classes, dtype=torch.bool).scatter(1, topk.ids.long(), True)
    reads, writes = seen.counts(seen.reads, zd), seen.counts(seen.writes, gd)
    passes = 1 if classes == 1000 else 2
    assert (reads == passes + member.numpy()).all() and (writes == 1 + member.numpy()).all()
    assert seen.outside(seen.reads, [zd, *topk[:3]]) == rows
    assert seen.outside(seen.writes, [gd]) <= 2 * rows + 4


@interpreted
def test_a_topk_row_of_nan_reads_nothing_behind_its_ids() -> None:
    zd, topk = normal(2, 50), top_k(normal(2, 50), K, 2.0)
    counts = []
    for value in (topk.log_probs[1, 0].item(), math.nan):
        topk.log_probs[1] = value
        with recorded() as seen:
            both(None, zd, None, topk, "hard", "")
        counts.append(seen.outside(seen.reads, [zd, *topk[:3]]))
    assert counts[0] == counts[1]  # of the row losses, for their sum


@interpreted
def test_without_gradients_none_is_written() -> None:
    zc, zd = normal(3, 50), normal(3, 50)
    with recorded() as seen:
        distillation_loss(
            zc.requires_grad_(), zd, target_of("pair", 3, 50), normal(3, 50),
            kind="soft", alpha=0.5, tau=1.0, reduction="numel",
        )  # fmt: skip
    assert sum(map(len, seen.writes)) == 3 * 50 + 2 * 3 + 4
    with recorded() as seen, torch.no_grad():
        base_loss(zc, torch.tensor([1, 2, 3]))
    assert sum(map(len, seen.writes)) == 3 + 4


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("incoming", (1.0, 8.0))
def test_backward_of_one_moves_nothing(dtype: torch.dtype, incoming: float) -> None:
    zc, zd = normal(3, 50, dtype=dtype).requires_grad_(), normal(3, 50, dtype=dtype)
    options = {"kind": "soft", "alpha": 0.5, "tau": 1.0, "reduction": "numel"}
    loss = distillation_loss(
        zc, zd.requires_grad_(), target_of("pair", 3, 50), normal(3, 50), **options
    )
    with recorded() as seen:
        loss.backward(torch.tensor(incoming))
    scales = incoming != 1 or dtype == torch.float16
    assert sum(map(len, seen.writes)) == (2 * 150 if scales else 0)
    assert sum(map(len, seen.reads)) == 1 + (2 * 150 if scales else 0)


@interpreted
@pytest.mark.parametrize("label", (-100, 50, 2**31 - 1))
def test_a_label_out_of_range_accesses_no_other_memory(label: int) -> None:
    """On a GPU labels are not checked before the launch: that would wait for the GPU."""
    wrong = torch.tensor([label, 3, 7])
    zc, zd, topk = normal(3, 50), normal(3, 50), top_k(normal(3, 50), K, 2.0)
    topk.ids[0, 2] = label
    with recorded() as seen:
        *_, gc, gd = both(zc, zd, (wrong, wrong, torch.rand(3)), topk, "soft")
        *_, hd = both(None, zd, None, wrong, "hard", "")
    assert seen.outside(seen.reads, [zc, zd, wrong, *topk[:3]]) == 9 + 3
    assert seen.outside(seen.writes, [gc, gd, hd]) <= 2 * (2 * 3 + 4)


def test_wide_accesses_only_where_start_rows_and_end_allow_them() -> None:
    """A compiled kernel relies on this; the interpreter cannot see it."""
    from deit_fast.kernels.distillation_loss_launch import _access

    def rows(stride: int, offset: int = 0, spare: int = 0, classes: int = 1001) -> Tensor:
        storage = torch.empty(3 * stride + offset + spare, dtype=torch.bfloat16)
        assert storage.data_ptr() % 16 == 0
        return storage[offset:].as_strided((3, classes), (stride, 1), offset)

    assert _access(rows(1008)) == _access(rows(1008, offset=8)) == (8, True)
    assert _access(rows(1000, classes=1000)) == (8, False)
    assert _access(rows(1001)) == (1, False)  # rows start anywhere
    assert _access(rows(1008, offset=1, spare=7)) == (1, False)  # so does the first
    ends_early = torch.empty(2 * 1008 + 1001, dtype=torch.bfloat16)
    assert _access(ends_early.as_strided((3, 1001), (1008, 1))) == (1, False)
    assert _access(torch.empty(1, 1004).expand(3, 1004)) == (4, False)


# ---------------------------------------------------------------------------------------------
# Laws
# ---------------------------------------------------------------------------------------------


def soft(student: Tensor, teacher: Any, tau: float) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    value = soft_distillation(leaf, teacher, tau=tau, reduction="batchmean")
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@interpreted
@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("classes", (1, 2, 10, 257))
def test_laws_of_soft(tau: float, classes: int) -> None:
    rows = 4
    student, teacher = normal(rows, classes), normal(rows, classes)
    value, gradient = soft(student, teacher, tau)
    close = {"rtol": 2e-5, "atol": 2e-5 * tau}
    assert value >= -1e-7 * tau**2
    torch.testing.assert_close(gradient.sum(1), torch.zeros(rows), **close)
    assert all(
        torch.equal(a, b)
        for a, b in zip(soft(student, teacher, tau), (value, gradient), strict=True)
    )
    torch.testing.assert_close(
        soft(student + 64, teacher - 64, tau)[0], value, rtol=1e-3, atol=close["atol"]
    )
    order = torch.randperm(classes)
    torch.testing.assert_close(soft(student[:, order], teacher[:, order], tau)[0], value, **close)
    torch.testing.assert_close(soft(student * 2, teacher * 2, 2 * tau)[0], 4 * value, **close)
    parts = (
        sum(soft(s[None], t[None], tau)[0] for s, t in zip(student, teacher, strict=True)) / rows
    )
    torch.testing.assert_close(parts, value, **close)
    for tail in TAILS:
        everything = top_k(teacher, classes, tau, tail)
        torch.testing.assert_close(soft(student, everything, tau), (value, gradient), **close)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", (50, 9000))
def test_equal_heads_have_no_loss_and_no_gradient(dtype: torch.dtype, classes: int) -> None:
    logits = normal(2, classes, dtype=dtype)
    for tau in TEMPERATURES[:: 1 if classes == 50 else 4]:
        value, gradient = soft(logits, logits, tau)
        assert value == 0 and torch.equal(gradient, torch.zeros_like(gradient))


@interpreted
def test_one_hot_teacher_is_cross_entropy() -> None:
    student, labels = normal(4, 6), torch.randint(6, (4,))
    teacher = torch.full((4, 6), -math.inf).scatter_(1, labels[:, None], 0.0)
    value, gradient = soft(student, teacher, 1.0)
    leaf = student.clone().requires_grad_()
    expected = F.cross_entropy(leaf, labels)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


@interpreted
def test_bce_is_that_of_timm() -> None:
    from timm.loss import BinaryCrossEntropy

    logits, labels = normal(6, 5), torch.randint(5, (6,))
    for smoothing in (0.0, 0.1):
        expected = BinaryCrossEntropy(smoothing)(logits, labels)
        ours = base_loss(logits, labels, smoothing=smoothing, base="bce")
        torch.testing.assert_close(ours, expected)


@interpreted
@pytest.mark.parametrize("base", ("ce", "bce"))
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_mixed_pair_equals_its_dense_target(base: str, smoothing: float) -> None:
    first, second, lam = target_of("pair", 40, 4)
    lam[:4], lam[4:8] = 0.0, 1.0
    assert (first == second).any()
    logits, results = normal(40, 4), []
    for target in ((first, second, lam), dense_target((first, second, lam), 4).float()):
        leaf = logits.clone().requires_grad_()
        value = base_loss(leaf, target, smoothing=smoothing, base=base)
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    torch.testing.assert_close(*results)


@interpreted
@pytest.mark.parametrize("tau", (1.0, 3.0))
@pytest.mark.parametrize("kind", ("soft", "hard"))
def test_equals_timm_token_distillation(kind: str, tau: float) -> None:
    from timm.task import TokenDistillationTask

    from deit_fast.losses import DistillationLoss
    from helpers.students import CLASSES as classes
    from helpers.students import ROWS, OneHead, TwoHeads, inputs

    student, teacher, x = TwoHeads().float(), OneHead().float(), inputs().float()
    labels, criterion = torch.randint(classes, (ROWS,)), torch.nn.CrossEntropyLoss()
    task = TokenDistillationTask(
        student, teacher, criterion, distill_type=kind, task_loss_weight=0.6, temperature=tau
    )
    theirs = task(x, labels)["loss"]
    ours = DistillationLoss(criterion, teacher, kind, 0.4, tau, "batchmean")(x, student(x), labels)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(z, list(student.parameters())) for z in (ours, theirs)]
    torch.testing.assert_close(grads[0], grads[1])


@interpreted
@pytest.mark.parametrize("soft_target", (True, False))
def test_the_drop_in_makes_one_launch_of_timms_criteria(soft_target: bool) -> None:
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    from deit_fast.losses import DistillationLoss

    zc, zd, teacher = normal(3, 9), normal(3, 9), normal(3, 9)
    criterion = SoftTargetCrossEntropy() if soft_target else LabelSmoothingCrossEntropy(0.2)
    target = target_of("dense", 3, 9).float() if soft_target else target_of("labels", 3, 9)
    fused, apart = (
        DistillationLoss(base, lambda _: teacher, "soft", 0.3, 2.0)
        for base in (criterion, lambda z, t: criterion(z, t))
    )
    with recorded() as seen:
        value = fused(zc, (zc, zd), target)
    assert (seen.counts(seen.reads, zc) == 1).all() and (seen.counts(seen.reads, zd) == 1).all()
    torch.testing.assert_close(value, apart(zc, (zc, zd), target))


# ---------------------------------------------------------------------------------------------
# Edges
# ---------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("extreme", (1e4, -1e4, -math.inf))
@pytest.mark.parametrize("side", ("student", "teacher", "both"))
def test_extreme_logits_as_the_reference_does(extreme: float, side: str) -> None:
    for classes, tau in ((8200, 1.0), *((12, tau) for tau in TEMPERATURES)):
        student, teacher = normal(1, classes), normal(1, classes)
        if side != "teacher":
            student[:, 3] = extreme
        if side != "student":
            teacher[:, 3] = extreme
        for form in ("dense", *(TAILS if classes == 12 else TAILS[:1])):
            given = teacher if form == "dense" else top_k(teacher, 5, tau, form)
            value, gradient = soft(student, given, tau)
            # In float32: there a q of 1e-60 is 0, in float64 it may cost infinity.
            true = reference(
                None, student, None, given, kind="soft", base="", tau=tau, reduction="batchmean"
            )[0]
            torch.testing.assert_close(value, true, rtol=1e-5, atol=1e-6 * tau**2)
            _, pull = soft(student.double(), to_double(given), tau)
            atol = 1e-6 * max(tau, 1)
            torch.testing.assert_close(gradient.double(), pull, rtol=1e-4, atol=atol)


@interpreted
@pytest.mark.parametrize("classes", (30, 9003))
def test_a_sampled_teacher_counts_repeated_draws(classes: int) -> None:
    """The form that the codec gives: a class that was drawn twice stands there once."""
    codec = SampledCodec(classes, 2, 20, (1.0, 2.0))
    teacher, student = normal(4, classes, 5.0), normal(4, classes)
    raw = codec.encode(teacher, ViewKeys(3, np.arange(4), np.arange(4))).to(DEVICE)
    form = codec.decode(raw, 2.0)
    stored = raw.cpu()[:, : 2 * codec.ids_per_record].contiguous().view(torch.int16)
    draws = stored[:, 22:].long().to(DEVICE) & 0xFFFF  # at the second temperature
    assert (draws.diff(dim=1) == 0).any()
    log_q = torch.log_softmax(teacher.double() / 2, 1)
    target = torch.zeros_like(log_q).scatter(1, form.ids[:, :2].long(), 1.0) * log_q.exp()
    tail = (1 - target.sum(1, keepdim=True)) / 20
    target.scatter_add_(1, draws, tail.expand(-1, 20))
    expected = torch.softmax(student.double() / 2, 1) - target
    gradient = soft(student, form, 2.0)[1].double() * 4 / 2
    torch.testing.assert_close(gradient, expected, rtol=0, atol=2e-3)  # float16 log-probabilities
    other = student.double()
    torch.testing.assert_close(
        gradient, soft(other, to_double(form), 2.0)[1] * 2, rtol=0, atol=1e-6
    )


@interpreted
def test_sure_student_keeps_the_digits_of_its_tail() -> None:
    student = torch.tensor([[60.0, 0.0, 1.0, 0.5]])
    topk = TopK(torch.tensor([[0]]), torch.tensor([[0.7]]).log(), torch.tensor([0.3]).log())
    outside = sum(math.exp(z - 60) for z in (0.0, 1.0, 0.5))
    value, gradient = soft(student, topk, 1.0)
    expected = 0.7 * math.log(0.7) + 0.3 * (math.log(0.3) - math.log(outside))
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert gradient[0, 0].item() == pytest.approx(0.3, rel=1e-5)
    true = soft(student.double(), to_double(topk), 0.05)
    torch.testing.assert_close(soft(student, topk, 0.05)[0].double(), true[0], rtol=1e-6, atol=0)


@interpreted
def test_teacher_mass_on_an_impossible_class_costs_infinity() -> None:
    student, teacher = normal(2, 4), normal(2, 4)
    student[:, 1] = -math.inf
    assert soft(student, teacher, 1.0)[0] == math.inf
    topk = TopK(torch.tensor([[1], [1]]), torch.full((2, 1), -0.1), torch.full((2,), -2.35))
    assert soft(student, topk, 1.0)[0] == math.inf


@interpreted
def test_a_nan_logit_is_seen() -> None:
    healthy, ill = normal(2, 4), normal(2, 4)
    ill[0, 2] = math.nan
    for student, teacher in ((ill, healthy), (healthy, ill), (ill, top_k(healthy, 2, 1.0))):
        assert soft(student, teacher, 1.0)[0].isnan()
    for base in ("ce", "bce"):
        assert base_loss(ill, torch.tensor([1, 1]), base=base).isnan()
    assert hard_distillation(ill, healthy).isnan()


@interpreted
def test_expanded_teacher_and_student() -> None:
    row, student = normal(1, 1000), normal(1, 1000).requires_grad_()
    value = soft_distillation(student.expand(3, -1), row.expand(3, -1), tau=1.0, reduction="numel")
    value.backward()
    leaf = student.detach().requires_grad_()
    single = soft_distillation(leaf, row, tau=1.0, reduction="numel")
    single.backward()
    torch.testing.assert_close((value, student.grad), (single, leaf.grad))


@interpreted
def test_one_tensor_as_both_heads() -> None:
    """A student with one head is distilled through it: its gradients add up."""
    z, labels, teacher = normal(3, 9).requires_grad_(), torch.randint(9, (3,)), normal(3, 9)
    options = {"kind": "soft", "alpha": 0.3, "tau": 2.0, "reduction": "batchmean"}
    (ours,) = torch.autograd.grad(distillation_loss(z, z, labels, teacher, **options), z)
    double = z.detach().double().requires_grad_()
    total = distillation_loss(double, double, labels, teacher.double(), **options)
    torch.testing.assert_close(
        ours.double(), torch.autograd.grad(total, double)[0], rtol=1e-5, atol=1e-7
    )


@interpreted
@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.uint16), ids=str)
def test_ids_beyond_int16(dtype: torch.dtype) -> None:
    classes = 40_000
    student, teacher = normal(1, classes), normal(1, classes)
    teacher[:, 39_000], teacher[:, 5] = 30.0, 29.0
    topk = top_k(teacher, 8, 1.0)
    topk = topk._replace(ids=topk.ids.to(dtype))
    true = soft(student.double(), to_double(topk), 1.0)
    torch.testing.assert_close(soft(student, topk, 1.0)[0].double(), true[0], rtol=1e-6, atol=0)
    labels = torch.tensor([39_000]).to(dtype)
    expected = F.cross_entropy(student, torch.tensor([39_000]))
    for form in (topk, labels, teacher):
        torch.testing.assert_close(hard_distillation(student, form), expected)


@interpreted
def test_of_equal_maxima_the_first_counts() -> None:
    for classes in (50, 9000):
        student, teacher = normal(2, classes), torch.zeros(2, classes)
        teacher[0, [7, classes - 1]], teacher[1] = 3.0, -math.inf
        expected = F.cross_entropy(student, torch.tensor([7, 0]))
        torch.testing.assert_close(hard_distillation(student, teacher), expected)


@interpreted
def test_fp16_gradients_do_not_underflow() -> None:
    """(p - q) * factor is below the range of fp16; (p - q) * factor * loss scale is not."""
    zd, teacher = normal(4, 1000, dtype=torch.float16), normal(4, 1000)
    leaf = zd.requires_grad_()
    loss = soft_distillation(leaf, teacher, tau=1.0, reduction="numel") / 256
    (loss * 2.0**16).backward()
    double = zd.detach().double().requires_grad_()
    true = soft_distillation(double, teacher.double(), tau=1.0, reduction="numel") / 256
    (true * 2.0**16).backward()
    assert error(leaf.grad, double.grad) < 2e-3
    small = (double.grad.abs() > 1e-6) & (double.grad.abs() < 1e-5)
    assert small.any() and (leaf.grad[small] != 0).all()


@interpreted
def test_more_ids_than_the_kernel_keeps_use_the_reference() -> None:
    student, topk = normal(1, 5000), top_k(normal(1, 5000), 4000, 1.0)
    true = soft(student.double(), to_double(topk), 1.0)
    torch.testing.assert_close(soft(student, topk, 1.0)[0].double(), true[0], rtol=1e-5, atol=0)


@interpreted
def test_many_ids() -> None:
    student, logits = normal(1, 700), normal(1, 700)
    for tail in TAILS:
        topk = top_k(logits, 300, 1.0, tail)
        mine, true = soft(student, topk, 1.0), soft(student.double(), to_double(topk), 1.0)
        assert error(mine[0], true[0]) < 1e-5 and error(mine[1], true[1]) < 1e-5


@interpreted
def test_float64_uses_the_reference() -> None:
    with recorded() as seen:
        soft(normal(2, 5).double(), normal(2, 5), 1.0)
    assert not seen.reads


# ---------------------------------------------------------------------------------------------
# PyTorch around it
# ---------------------------------------------------------------------------------------------


def arguments(kind: str, form: str, base: str, padded: bool = False) -> tuple[Any, ...]:
    zc, zd = normal(3, 9).requires_grad_(), normal(3, 9).requires_grad_()
    if padded:
        zc = torch.zeros(3, 12)[:, :9].requires_grad_()
    teacher = teacher_of(form, normal(3, 9), 2.0)
    topk = (None, None, None, "drop")
    if isinstance(teacher, TopK):
        topk, teacher = tuple(teacher), None
    return (
        zc, zd if kind != "none" else None, *target_of("pair", 3, 9), teacher, *topk, kind, base,
        "numel", 0.5, 2.0, 0.1,
    )  # fmt: skip


@interpreted
def test_opcheck() -> None:
    operators = torch.ops.deit_fast
    torch.library.opcheck(operators.distillation_loss.default, arguments("soft", "dense", "ce"))
    torch.library.opcheck(operators.distillation_loss.default, arguments("soft", "bucket", "bce"))
    plain = [
        x.detach() if isinstance(x, Tensor) else x for x in arguments("none", "none", "ce", True)
    ]
    torch.library.opcheck(operators.distillation_loss_and_gradients.default, (*plain, True, False))
    gradients = normal(3, 9), normal(3, 9)
    torch.library.opcheck(
        operators.scale_gradients_.default, (*gradients, torch.tensor(2.0), 0.5, 0.7)
    )


@interpreted
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiles_without_a_break(backend: str) -> None:
    target, topk = target_of("pair", 4, 33), top_k(normal(4, 33), K, 2.0)

    def loss(zc: Tensor, zd: Tensor, dense: Tensor) -> tuple[Tensor, ...]:
        options = {"alpha": 0.3, "tau": 2.0, "smoothing": 0.1, "reduction": "batchmean"}
        total, base, distill = distillation_loss(
            zc * 2, zd, target, dense, kind="soft", return_parts=True, **options
        )
        other = distillation_loss(zc, zd * 3, target, topk, kind="soft", **options)
        return 3 * total + other, base, distill

    heads, dense = (normal(4, 33), normal(4, 33)), normal(4, 33)
    outcomes = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        leaves = [x.clone().requires_grad_() for x in heads]
        losses = function(*leaves, dense)
        outcomes.append((*losses, *torch.autograd.grad(losses[0], leaves)))
    torch.testing.assert_close(outcomes[0], outcomes[1])


@interpreted
def test_a_second_backward_is_refused() -> None:
    z = normal(3, 9).requires_grad_()
    loss = soft_distillation(z, normal(3, 9), tau=1.0, reduction="numel")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through the same loss"):
        loss.backward()


@interpreted
def test_parts_carry_no_gradient() -> None:
    z = normal(3, 9).requires_grad_()
    parts = distillation_loss(
        z, z, torch.tensor([1, 2, 3]), normal(3, 9),
        kind="soft", alpha=0.5, tau=1.0, reduction="numel", return_parts=True,
    )  # fmt: skip
    assert [x.requires_grad for x in parts] == [True, False, False]


# ---------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_accuracy_on_a_gpu(form: str, dtype: torch.dtype) -> None:
    check_accuracy(form, dtype, (*SHAPES, *LONG_SHAPES, (300, 1000), (64, 262_144)))


def batch(form: str, rows: int = 256, classes: int = 1000) -> tuple[Callable[[], list], list]:
    """A call with its inputs on the device; returns (loss and gradients, inputs)."""
    zc, zd, dense = (normal(rows, classes, dtype=torch.bfloat16) for _ in range(3))
    target, teacher = target_of("pair", rows, classes), teacher_of(form, dense, 2.0)
    kind = "hard" if form.startswith("hard") else "soft"
    options = {"kind": kind, "alpha": 0.5, "tau": 2.0, "smoothing": 0.1, "reduction": "numel"}
    leaves = [zc.requires_grad_(), zd.requires_grad_()]

    def call() -> list:
        loss = distillation_loss(*leaves, target, teacher, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    return call, leaves


@pytest.mark.gpu
@pytest.mark.parametrize("form", ("dense", "bucket", "hard dense"))
@pytest.mark.parametrize("classes", (1000, 21841))
def test_250_repeats_are_equal(form: str, classes: int) -> None:
    call, _ = batch(form, classes=classes)
    assert_250_repeats_are_equal(call)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ("dense", "bucket", "hard dense"))
def test_no_call_waits_for_the_device(form: str) -> None:
    call, _ = batch(form)
    assert_waits_for_nothing(call)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ("dense", "bucket"))
def test_graph_replay_with_other_inputs(form: str) -> None:
    call, leaves = batch(form)
    assert_replays(call, leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
def test_compiled_calls_give_what_eager_ones_give(mode: str) -> None:
    """reduce-overhead warms up in a pool of memory in which no counter may stay behind."""
    zc, zd, dense = (normal(256, 1000, dtype=torch.bfloat16) for _ in range(3))
    labels = torch.randint(1000, (256,), device=DEVICE)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        options = {"kind": "soft", "alpha": 0.5, "tau": 2.0, "reduction": "numel"}
        return distillation_loss(a, b, labels, dense, **options)

    compiled = torch.compile(loss, mode=mode, fullgraph=True)
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        leaves = [x.clone().requires_grad_() for x in (zc, zd)]
        twins = [x.clone().requires_grad_() for x in (zc, zd)]
        expected, got = loss(*leaves), compiled(*twins)
        expected.backward(), got.backward()
        assert torch.equal(got, expected)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, twins, strict=True))


@pytest.mark.gpu
def test_calls_on_many_streams_at_once_do_not_count_each_other() -> None:
    call, _ = batch("dense", rows=4096)
    expected = [x.clone() for x in call()]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(4)], []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(call())
        found.append(call())
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for got in found for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
def test_one_launch_forward_and_one_backward() -> None:
    call, leaves = batch("dense")
    call()
    kernels = []
    activity = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activity) as profile:
        call()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if "loss_kernel" in e.name or "scale" in e.name]
    assert sorted(kernels) == ["loss_kernel", "scale_kernel"]
    assert all(leaf.grad is None for leaf in leaves)
