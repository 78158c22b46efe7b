"""The reference of the distillation loss: against float64, against its own laws, at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from deit_fast.kernels import TopK, distillation_loss
from helpers.distillation import (
    TAILS,
    TEMPERATURES,
    base_loss,
    dense_pair,
    hard_distillation,
    laid_out,
    soft_distillation,
)
from helpers.distillation import exact_top_k as top_k


def normal(
    rows: int, classes: int, scale: float = 3.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    return (torch.randn(rows, classes, dtype=torch.float64) * scale).to(dtype)


def pair(rows: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    first, second = torch.randint(classes, (2, rows))
    return first, second, torch.rand(rows)


def value_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def kl_by_hand(student: Tensor, teacher: Tensor, tau: float) -> float:
    """KL(q || p) of one row, from Python floats and the definition."""

    def log_probabilities(row: Tensor) -> list[float]:
        scaled = [value / tau for value in row.tolist()]
        shift = max(scaled)
        total = math.fsum(math.exp(value - shift) for value in scaled)
        return [value - shift - math.log(total) for value in scaled]

    log_p, log_q = log_probabilities(student), log_probabilities(teacher)
    terms = zip(log_p, log_q, strict=True)
    return math.fsum(math.exp(q) * (q - p) for p, q in terms if q > -math.inf)


# ---------------------------------------------------------------------------------------------
# The definition
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", TEMPERATURES)
def test_soft_equals_the_definition(tau: float) -> None:
    student, teacher = normal(3, 7), normal(3, 7)
    total = sum(kl_by_hand(s, t, tau) for s, t in zip(student, teacher, strict=True))
    for reduction, factor in (("numel", 1 / 21), ("batchmean", 1 / 3)):
        ours = soft_distillation(student, teacher, tau=tau, reduction=reduction)
        assert ours.item() == pytest.approx(total * factor * tau**2, rel=1e-12)


def tail_by_hand(student: Tensor, ids: list[int], q: list[float], r: float, tail: str) -> float:
    p = torch.softmax(student, 0).tolist()
    outside = [p[i] for i in range(len(p)) if i not in ids]
    if tail == "renorm":
        q = [value / math.fsum(q) for value in q]
    head = math.fsum(a * math.log(a / p[i]) for a, i in zip(q, ids, strict=True))
    if tail == "bucket":
        return head + r * math.log(r / math.fsum(outside))
    if tail == "uniform":
        mean = math.fsum(map(math.log, outside)) / len(outside)
        return head + r * (math.log(r / len(outside)) - mean)
    return head


@pytest.mark.parametrize("tail", TAILS)
def test_tail_modes_equal_the_definition(tail: str) -> None:
    student, ids, q, r = normal(1, 9), [4, 0, 7], [0.4, 0.25, 0.05], 0.3
    teacher = TopK(
        torch.tensor([ids], dtype=torch.int32),
        torch.tensor([q], dtype=torch.float64).log(),
        torch.tensor([r], dtype=torch.float64).log(),
        tail,
    )
    ours = soft_distillation(student * 2, teacher, tau=2.0, reduction="batchmean")
    assert ours.item() == pytest.approx(4 * tail_by_hand(student[0], ids, q, r, tail), rel=1e-12)
    numel = soft_distillation(student * 2, teacher, tau=2.0, reduction="numel")
    assert numel.item() == pytest.approx(ours.item() / 9, rel=1e-12)


def test_hard_is_cross_entropy_with_the_first_maximum() -> None:
    student, teacher = normal(5, 6), normal(5, 6)
    teacher[0, 2:5] = 40.0
    expected = F.cross_entropy(student, teacher.argmax(1))
    assert teacher.argmax(1)[0] == 2
    for form in (teacher, teacher.argmax(1), teacher.argmax(1).int(), top_k(teacher, 3, 4.0)):
        assert hard_distillation(student, form).item() == expected.item()


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_base_is_cross_entropy_with_smoothed_targets(smoothing: float) -> None:
    logits, labels = normal(6, 5), torch.randint(5, (6,))
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(base_loss(logits, labels, smoothing=smoothing), expected)


@pytest.mark.parametrize("base", ("ce", "bce"))
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_mixed_pair_equals_its_dense_target(base: str, smoothing: float) -> None:
    first, second, lam = pair(40, 4)
    lam[:4], lam[4:8] = 0.0, 1.0
    target = (first, second, lam)
    assert (first == second).any() and (first[:8] != second[:8]).any()
    logits = normal(40, 4)
    results = [
        value_and_gradient(lambda z, t=t: base_loss(z, t, smoothing=smoothing, base=base), logits)
        for t in (target, dense_pair(target, 4))
    ]
    torch.testing.assert_close(results[0], results[1])


def test_bce_labels_are_those_of_timm() -> None:
    from timm.loss import BinaryCrossEntropy

    logits, labels = normal(6, 5), torch.randint(5, (6,))
    for smoothing in (0.0, 0.1):
        expected = BinaryCrossEntropy(smoothing)(logits, labels)
        ours = base_loss(logits, labels, smoothing=smoothing, base="bce")
        torch.testing.assert_close(ours, expected)


def test_bce_positives_are_every_class_of_the_mix() -> None:
    logits, target = (
        normal(6, 5),
        (torch.arange(5).repeat(2)[:6], torch.arange(6) % 3, torch.rand(6)),
    )
    expected = F.binary_cross_entropy_with_logits(logits, (dense_pair(target, 5) > 0).double())
    torch.testing.assert_close(base_loss(logits, target, base="bce"), expected)


@pytest.mark.parametrize("kind", ("none", "soft", "hard"))
def test_total_is_the_weighted_sum(kind: str) -> None:
    zc, zd, teacher, labels = normal(4, 6), normal(4, 6), normal(4, 6), torch.randint(6, (4,))
    options = {"kind": kind, "alpha": 0.3, "tau": 2.0, "smoothing": 0.1, "reduction": "batchmean"}
    total = distillation_loss(zc, zd, labels, teacher, **options)
    base = base_loss(zc, labels, smoothing=0.1)
    term = {
        "none": base,
        "soft": soft_distillation(zd, teacher, tau=2.0, reduction="batchmean"),
        "hard": hard_distillation(zd, teacher),
    }[kind]
    torch.testing.assert_close(total, 0.7 * base + 0.3 * term, rtol=1e-14, atol=0)


# ---------------------------------------------------------------------------------------------
# Laws
# ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    classes=st.integers(1, 40),
    tau=st.sampled_from(TEMPERATURES),
    shift=st.floats(-1e3, 1e3),
    seed=st.integers(0, 2**31),
)
def test_laws_of_soft(rows: int, classes: int, tau: float, shift: float, seed: int) -> None:
    torch.manual_seed(seed)
    student, teacher = normal(rows, classes), normal(rows, classes)

    def soft(s: Tensor, t: Tensor | TopK, at: float = tau) -> Tensor:
        return soft_distillation(s, t, tau=at, reduction="batchmean")

    value, gradient = value_and_gradient(lambda z: soft(z, teacher), student)
    close = {"rtol": 1e-9, "atol": 1e-9 * tau**2}
    assert value >= -1e-12 * tau**2
    torch.testing.assert_close(gradient.sum(1), torch.zeros(rows, dtype=torch.float64), **close)
    torch.testing.assert_close(soft(student + shift, teacher - shift), value, **close)
    order = torch.randperm(classes)
    torch.testing.assert_close(soft(student[:, order], teacher[:, order]), value, **close)
    torch.testing.assert_close(soft(student * 2, teacher * 2, 2 * tau), 4 * value, **close)
    split = sum(soft(s[None], t[None]) for s, t in zip(student, teacher, strict=True)) / rows
    torch.testing.assert_close(split, value, **close)
    for tail in TAILS:
        everything = top_k(teacher, classes, tau, tail)
        torch.testing.assert_close(
            value_and_gradient(lambda z, t=everything: soft(z, t), student),
            (value, gradient),
            **close,
        )


@pytest.mark.parametrize(
    "dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str
)
@pytest.mark.parametrize("tau", TEMPERATURES)
def test_equal_heads_have_no_loss_and_no_gradient(dtype: torch.dtype, tau: float) -> None:
    logits = normal(4, 50, dtype=dtype)
    value, gradient = value_and_gradient(
        lambda z: soft_distillation(z, logits, tau=tau, reduction="batchmean"), logits
    )
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_one_hot_teacher_is_cross_entropy() -> None:
    student, labels = normal(4, 6), torch.randint(6, (4,))
    teacher = torch.full((4, 6), -math.inf, dtype=torch.float64)
    teacher.scatter_(1, labels[:, None], 0.0)
    ours = value_and_gradient(
        lambda z: soft_distillation(z, teacher, tau=1.0, reduction="batchmean"), student
    )
    theirs = value_and_gradient(lambda z: F.cross_entropy(z, labels), student)
    torch.testing.assert_close(ours, theirs)


def test_bucket_is_a_lower_bound_and_sees_the_tail() -> None:
    student, teacher = normal(8, 30), normal(8, 30)
    full = soft_distillation(student, teacher, tau=1.0, reduction="batchmean")
    bucket = soft_distillation(student, top_k(teacher, 4, 1.0), tau=1.0, reduction="batchmean")
    assert 0 < bucket < full  # the data-processing inequality: merging classes loses information


# ---------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", (None, *TAILS))
def test_gradcheck_of_soft(tail: str | None) -> None:
    student, teacher = normal(3, 8, 1.0).requires_grad_(), normal(3, 8, 1.0)
    given = teacher if tail is None else top_k(teacher, 3, 2.0, tail)
    assert torch.autograd.gradcheck(
        lambda z: soft_distillation(z, given, tau=2.0, reduction="numel") * 0.7, student
    )


@pytest.mark.parametrize("base", ("ce", "bce"))
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("form", ("labels", "pair", "dense"))
def test_gradcheck_of_base(base: str, smoothing: float, form: str) -> None:
    logits, mixed = normal(5, 4, 1.0).requires_grad_(), pair(5, 4)
    target = {"labels": mixed[0], "pair": mixed, "dense": dense_pair(mixed, 4)}[form]
    assert torch.autograd.gradcheck(
        lambda z: base_loss(z, target, smoothing=smoothing, base=base) * 0.7, logits
    )


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = normal(3, 5).requires_grad_(), normal(3, 5).requires_grad_()
    soft_distillation(student, teacher, tau=1.0, reduction="numel").backward()
    assert student.grad is not None and teacher.grad is None


# ---------------------------------------------------------------------------------------------
# Rounding: at most twice the error of PyTorch's own code in the same dtype
# ---------------------------------------------------------------------------------------------


def naive_soft(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """timm's lines, in the dtype of the logits."""
    log_p, log_q = F.log_softmax(student / tau, -1), F.log_softmax(teacher / tau, -1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * tau**2


def naive_base(logits: Tensor, target: Tensor) -> Tensor:
    return torch.sum(-target * F.log_softmax(logits, -1), -1).mean()


def assert_no_worse(ours: Callable, naive: Callable, exact: Callable, logits: Tensor) -> None:
    truth = value_and_gradient(exact, logits.double())
    unit = torch.finfo(logits.dtype).eps
    for mine, other, true in zip(
        value_and_gradient(ours, logits), value_and_gradient(naive, logits), truth, strict=True
    ):
        error = (mine.double() - true).norm() / true.norm()
        allowed = (other.double() - true).norm() / true.norm()
        assert error <= 2 * allowed + unit, f"error {error:.1e}, PyTorch's own {allowed:.1e}"


@pytest.mark.parametrize("classes", (2, 10, 1000, 1001))
@pytest.mark.parametrize("tau", (0.5, 1.0, 4.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("distance", (3.0, 0.01))
def test_soft_rounds_no_worse_than_torch(
    classes: int, tau: float, dtype: torch.dtype, distance: float
) -> None:
    teacher = normal(16, classes, dtype=dtype)
    student = (teacher + normal(16, classes, distance)).to(dtype) + 100
    assert_no_worse(
        lambda z: soft_distillation(z, teacher, tau=tau, reduction="batchmean"),
        lambda z: naive_soft(z, teacher, tau),
        lambda z: naive_soft(z, teacher.double(), tau),
        student,
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("tail", ("bucket", "uniform"))
def test_topk_in_low_precision_is_near_float64(dtype: torch.dtype, tail: str) -> None:
    student, topk = normal(16, 1000, dtype=dtype) + 100, top_k(normal(16, 1000), 16, 1.0, tail)
    rounded = TopK(topk.ids.int(), topk.log_probs.float(), topk.log_tail.float(), tail)
    mine = value_and_gradient(
        lambda z: soft_distillation(z, rounded, tau=1.0, reduction="batchmean"), student
    )
    true = value_and_gradient(
        lambda z: soft_distillation(z, topk, tau=1.0, reduction="batchmean"), student.double()
    )
    assert mine[0].dtype == torch.float32 and mine[1].dtype == dtype
    assert (mine[0].double() - true[0]).abs() <= 1e-6 * true[0]
    bound = 1e-6 + torch.finfo(dtype).eps
    if dtype == torch.float16:
        bound += 1e-3  # subnormal gradients
    assert (mine[1].double() - true[1]).norm() <= bound * true[1].norm()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_base_rounds_no_worse_than_torch(dtype: torch.dtype) -> None:
    target = pair(16, 1000)
    soft = dense_pair(target, 1000) * 0.9 + 0.1 / 1000
    assert_no_worse(
        lambda z: base_loss(z, target, smoothing=0.1),
        lambda z: naive_base(z, soft.to(dtype)),
        lambda z: naive_base(z, soft),
        normal(16, 1000, dtype=dtype) + 100,
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_sure_student_keeps_the_digits_of_its_tail(dtype: torch.dtype) -> None:
    """1 - sum of p inside rounds to 0 here; the true mass outside is 3e-26 / (1 + 3e-26)."""
    student = torch.tensor([[60.0, 0.0, 1.0, 0.5]], dtype=dtype)
    q, r = 0.7, 0.3
    topk = TopK(torch.tensor([[0]]), torch.tensor([[q]]).log(), torch.tensor([r]).log())
    value, gradient = value_and_gradient(
        lambda z: soft_distillation(z, topk, tau=1.0, reduction="batchmean"), student
    )
    outside = sum(math.exp(z - 60) for z in (0.0, 1.0, 0.5))
    expected = q * math.log(q) + r * (math.log(r) - math.log(outside))
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert gradient[0, 0].item() == pytest.approx(r, rel=1e-5)


# ---------------------------------------------------------------------------------------------
# Edges
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("extreme", (1e4, -1e4, -math.inf))
@pytest.mark.parametrize("side", ("student", "teacher", "both"))
@pytest.mark.parametrize("form", ("dense", *TAILS))
def test_extreme_logits(tau: float, extreme: float, side: str, form: str) -> None:
    student, teacher = normal(4, 12, dtype=torch.float32), normal(4, 12, dtype=torch.float32)
    if side != "teacher":
        student[:, 3] = extreme
    if side != "student":
        teacher[:, 3] = extreme
    given = teacher if form == "dense" else top_k(teacher, 5, tau, form)
    value, gradient = value_and_gradient(
        lambda z: soft_distillation(z, given, tau=tau, reduction="batchmean"), student
    )
    assert not value.isnan() and gradient.isfinite().all()
    expects_impossible_class = side == "student" or form == "uniform"
    if not (student.isinf().any() and expects_impossible_class):
        assert value.isfinite()


def test_teacher_mass_on_an_impossible_class_costs_infinity() -> None:
    student, teacher = normal(2, 4), normal(2, 4)
    student[:, 1] = -math.inf
    assert soft_distillation(student, teacher, tau=1.0, reduction="numel") == math.inf
    topk = TopK(torch.tensor([[1], [1]]), torch.full((2, 1), -0.1), torch.full((2,), -2.35))
    assert soft_distillation(student, topk, tau=1.0, reduction="numel") == math.inf


def test_student_without_mass_outside_a_complete_top_k() -> None:
    student = torch.tensor([[1.0, 2.0, -math.inf, -math.inf]])
    teacher = torch.tensor([[2.0, 1.0, -math.inf, -math.inf]])
    for tail in TAILS:
        value, gradient = value_and_gradient(
            lambda z, t=tail: soft_distillation(
                z, top_k(teacher, 2, 1.0, t), tau=1.0, reduction="batchmean"
            ),
            student,
        )
        assert value.item() == pytest.approx(kl_by_hand(student[0], teacher[0], 1.0), rel=1e-6)
        assert gradient.isfinite().all() and gradient[0, 2:].eq(0).all()


def test_zero_targets_of_impossible_classes_count_nothing() -> None:
    logits = normal(2, 4)
    logits[:, 1] = -math.inf
    target = (torch.tensor([0, 2]), torch.tensor([1, 1]), torch.ones(2))
    expected = F.cross_entropy(logits, target[0])
    for form in (target, dense_pair(target, 4)):
        value, gradient = value_and_gradient(lambda z, t=form: base_loss(z, t), logits)
        torch.testing.assert_close(value, expected)
        assert gradient.isfinite().all()


def test_a_nan_logit_is_seen() -> None:
    """The mask for 0 * inf must not hide a diverged student or teacher."""
    healthy, ill = normal(2, 4), normal(2, 4)
    ill[0, 2] = math.nan
    for student, teacher in ((ill, healthy), (healthy, ill)):
        assert soft_distillation(student, teacher, tau=1.0, reduction="numel").isnan()


@pytest.mark.parametrize("kind", ("none", "soft", "hard"))
@pytest.mark.parametrize("topk", (False, True))
def test_empty_batch_costs_nothing(kind: str, topk: bool) -> None:
    zc, zd = (torch.zeros(0, 7, requires_grad=True) for _ in range(2))
    teacher = top_k(torch.zeros(0, 7), 3, 1.0) if topk else torch.zeros(0, 7)
    empty = torch.zeros(0, dtype=torch.long)
    for target in (empty, (empty, empty, torch.zeros(0)), torch.zeros(0, 7)):
        loss = distillation_loss(
            zc, zd, target, teacher, kind=kind, alpha=0.5, tau=2.0, reduction="batchmean"
        )
        loss.backward()
        assert loss == 0 and zc.grad is not None and zc.grad.shape == (0, 7)
        assert kind == "none" or (zd.grad is not None and zd.grad.shape == (0, 7))


@pytest.mark.parametrize("form", ("columns", "transposed", "padded rows", "misaligned"))
@pytest.mark.parametrize("kind", ("soft", "hard"))
def test_memory_layout_does_not_matter(form: str, kind: str) -> None:
    plain = [normal(4, 9, dtype=torch.float32) for _ in range(3)]
    labels = torch.randint(9, (4,))
    options = {"kind": kind, "alpha": 0.4, "tau": 3.0, "smoothing": 0.1, "reduction": "numel"}
    results = []
    for zc, zd, teacher in (plain, [laid_out(form, x) for x in plain]):
        leaves = [zc.detach().requires_grad_(), zd.detach().requires_grad_()]
        loss = distillation_loss(*leaves, labels, teacher, **options)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(results[0], results[1])


def test_expanded_teacher_and_student() -> None:
    row, student = normal(1, 6), normal(1, 6).requires_grad_()
    value = soft_distillation(
        student.expand(5, 6), row.expand(5, 6), tau=1.0, reduction="batchmean"
    )
    value.backward()
    single = value_and_gradient(
        lambda z: soft_distillation(z, row, tau=1.0, reduction="batchmean"), student
    )
    torch.testing.assert_close((value.detach(), student.grad), single)


def test_more_classes_than_int16_holds() -> None:
    classes = 40_000
    student, teacher = normal(2, classes), normal(2, classes)
    teacher[:, 39_000] = 30.0
    topk = top_k(teacher, 8, 1.0)
    assert topk.ids.max() > 32_767
    narrow = topk._replace(ids=topk.ids.int())
    values = [soft_distillation(student, a, tau=1.0, reduction="batchmean") for a in (topk, narrow)]
    assert values[0] == values[1]
    full = soft_distillation(student, teacher, tau=1.0, reduction="batchmean")
    torch.testing.assert_close(values[0], full, rtol=1e-3, atol=0)
    assert hard_distillation(student, narrow) == F.cross_entropy(
        student, torch.tensor([39_000] * 2)
    )


# ---------------------------------------------------------------------------------------------
# Wrong input
# ---------------------------------------------------------------------------------------------

LOGITS = torch.zeros(2, 5)
LABELS = torch.tensor([0, 4])
TEACHER = top_k(LOGITS, 3, 1.0)

WRONG = {
    "kind": ("softly", "kind must be one of none, soft, hard, not 'softly'"),
    "alpha": (1.5, "alpha must lie in [0, 1], not 1.5"),
    "tau": (0.0, "tau must be positive, not 0.0"),
    "tau nan": (math.nan, "tau must be positive, not nan"),
    "smoothing": (1.0, "smoothing must lie in [0, 1), not 1.0"),
    "base": ("mse", "base must be one of ce, bce, not 'mse'"),
    "reduction": ("mean", "reduction must be one of numel, batchmean, not 'mean'"),
    "class_logits int": (LOGITS.int(), "class_logits must hold floats, not torch.int32"),
    "class_logits flat": (torch.zeros(5), "class_logits must have shape [B, C]"),
    "distill_logits classes": (torch.zeros(2, 6), "distill_logits must have shape [2, 5] beside"),
    "distill_logits missing": (None, "distill_logits must not be None for kind 'soft'"),
    "teacher missing": (None, "teacher must not be None for kind 'soft'"),
    "teacher classes": (
        torch.zeros(2, 4),
        "teacher must have shape [2, 5] beside logits (2, 5), not (2, 4)",
    ),
    "teacher rows": (torch.zeros(3, 5), "teacher must have shape [2, 5]"),
    "teacher labels": (LABELS, "teacher must hold floats, not torch.int64"),
    "teacher device": (torch.zeros(2, 5, device="meta"), "teacher is on meta but logits is on cpu"),
    "teacher tail": (TEACHER._replace(tail="ghost"), "bucket, uniform, renorm, drop, not 'ghost'"),
    "teacher ids": (TEACHER._replace(ids=TEACHER.ids + 3), "teacher ids must lie in [0, 4]"),
    "teacher ids float": (TEACHER._replace(ids=torch.zeros(2, 3)), "ids must hold integers"),
    "teacher too wide": (top_k(torch.zeros(2, 6), 6, 1.0), "1 to 5 classes per row, not 6"),
    "teacher log_probs": (
        TEACHER._replace(log_probs=torch.zeros(2, 2)),
        "teacher log_probs must have shape [2, 3]",
    ),
    "teacher log_tail": (
        TEACHER._replace(log_tail=torch.zeros(2, 1)),
        "teacher log_tail must have shape [2]",
    ),
    "target range": (torch.tensor([0, 5]), "target must lie in [0, 4], found 5 in row 1"),
    "target ignored": (torch.tensor([0, -100]), "found -100 in row 1"),
    "target shape": (torch.zeros(2, 4), "target must have shape [2, 5]"),
    "target length": (torch.tensor([0]), "target must have shape [2]"),
    "target pair": ((LABELS, LABELS), "or (y_a, y_b, lam), not tuple"),
    "target lam": ((LABELS, LABELS, torch.tensor([0.5, 1.5])), "target lam must lie in [0, 1]"),
    "target lam int": ((LABELS, LABELS, LABELS), "target lam must hold floats"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_named(what: str) -> None:
    value, message = WRONG[what]
    options = {
        "class_logits": LOGITS,
        "distill_logits": LOGITS,
        "target": LABELS,
        "teacher": TEACHER,
        "kind": "soft",
        "alpha": 0.5,
        "tau": 1.0,
        "reduction": "numel",
    }
    distillation_loss(**options)
    with pytest.raises(ValueError) as caught:
        distillation_loss(**(options | {what.split()[0]: value}))
    assert message in str(caught.value)


def test_neither_loss_is_named() -> None:
    with pytest.raises(ValueError, match="class_logits must not be None for kind 'none'"):
        distillation_loss(
            None, LOGITS, None, TEACHER, kind="none", alpha=0.5, tau=1.0, reduction="numel"
        )
