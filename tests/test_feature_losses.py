"""Feature losses against loops over plain Python numbers, and their gradients."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from deit_fast.errors import InputError
from deit_fast.features.losses import LOSSES, feature_loss

KINDS = pytest.mark.parametrize("kind", LOSSES)
IMAGES, TOKENS, CHANNELS = 3, 9, 5


def features(seed: int = 0, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, IMAGES, tokens, CHANNELS)
    student, teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
    return student, 2 * teacher + 0.3  # some differences lie beyond each bend of smooth L1


# ---------------------------------------------------------------------------------------------
# The formulas, for one image given as lists of tokens
# ---------------------------------------------------------------------------------------------

Image = list[list[float]]


def cosine(s: list[float], t: list[float]) -> float:
    lengths = math.sqrt(sum(a * a for a in s)) * math.sqrt(sum(b * b for b in t))
    return sum(a * b for a, b in zip(s, t, strict=True)) / lengths


def mean_cosine_loss(s: Image, t: Image) -> float:
    return sum(1 - cosine(a, b) for a, b in zip(s, t, strict=True)) / len(s)


def smooth_l1(s: Image, t: Image, beta: float) -> float:
    total = 0.0
    for x, y in zip(s, t, strict=True):
        for a, b in zip(x, y, strict=True):
            d = abs(a - b)
            total += d * d / (2 * beta) if d < beta else d - beta / 2
    return total / (len(s) * len(s[0]))


def mse(s: Image, t: Image) -> float:
    pairs = [(a, b) for x, y in zip(s, t, strict=True) for a, b in zip(x, y, strict=True)]
    return sum((a - b) ** 2 for a, b in pairs) / len(pairs)


def divergences(s: Image, t: Image) -> list[float]:
    def rows(tokens: Image) -> list[list[float]]:
        weights = [[math.exp(cosine(a, b) / 0.07) for b in tokens] for a in tokens]
        return [[w / sum(row) for w in row] for row in weights]

    return [
        sum(p * math.log(p / q) for p, q in zip(of_t, of_s, strict=True))
        for of_s, of_t in zip(rows(s), rows(t), strict=True)
    ]


def spectral(s: Image, t: Image) -> float:
    side, squares = math.isqrt(len(s)), []
    for channel in range(len(s[0])):
        for u in range(side):
            for v in range(side // 2 + 1):  # the other half is conjugate
                sum_ = 0j
                for y in range(side):
                    for x in range(side):
                        d = s[y * side + x][channel] - t[y * side + x][channel]
                        sum_ += d * cmath.exp(-2j * cmath.pi * (u * y + v * x) / side)
                sum_ /= side
                squares += [sum_.real**2, sum_.imag**2]
    return sum(squares) / len(squares)


FORMULAS = {
    "cosine": mean_cosine_loss,
    "mse": mse,
    "smooth_l1": lambda s, t: smooth_l1(s, t, 1),
    "balanced": lambda s, t: 0.9 * mean_cosine_loss(s, t) + 0.1 * smooth_l1(s, t, 2),
    "dune": lambda s, t: 0.5 * mean_cosine_loss(s, t) + 0.5 * smooth_l1(s, t, 1),
    "similarity": lambda s, t: sum(divergences(s, t)) / len(s),
    "spectral": spectral,
}


def test_each_loss_has_a_formula_here() -> None:
    assert FORMULAS.keys() == LOSSES.keys()


@KINDS
def test_value_is_the_formula_for_each_image(kind: str) -> None:
    student, teacher = features()
    expected = [FORMULAS[kind](s, t) for s, t in zip(student.tolist(), teacher.tolist(),
                                                     strict=True)]  # fmt: skip
    loss = feature_loss(student, teacher, kind)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_similarity_of_one_token_compares_the_images_of_the_batch() -> None:
    student, teacher = features(tokens=1)
    expected = divergences(student[:, 0].tolist(), teacher[:, 0].tolist())
    loss = feature_loss(student, teacher, "similarity")
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(InputError, match="which is one image: raise batch_size, or lower accumu"):
        feature_loss(student[:1], teacher[:1], "similarity")


@KINDS
def test_an_image_does_not_depend_on_the_others(kind: str) -> None:
    student, teacher = features()
    alone = feature_loss(student[1:2], teacher[1:2], kind)
    torch.testing.assert_close(feature_loss(student, teacher, kind)[1:2], alone)


@KINDS
def test_gradient(kind: str) -> None:
    student, teacher = features(seed=1)
    student = student[:2, :4].requires_grad_()
    assert torch.autograd.gradcheck(lambda s: feature_loss(s, teacher[:2, :4], kind), student)


@KINDS
def test_teacher_gets_no_gradient_and_equal_features_no_loss(kind: str) -> None:
    student, _ = features()
    teacher = student.clone().requires_grad_()
    loss = feature_loss(student.requires_grad_(), teacher, kind)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-12, rtol=0)
    loss.sum().backward()
    assert teacher.grad is None
    torch.testing.assert_close(
        student.grad, torch.zeros_like(student), atol=1e-12, rtol=0
    )  # a minimum


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_computed_in_float32_also_under_autocast(
    kind: str, dtype: torch.dtype
) -> None:
    student, teacher = (x.to(dtype) for x in features())
    with torch.autocast("cpu", torch.bfloat16):
        loss = feature_loss(student, teacher, kind)
    exact = feature_loss(student.double(), teacher.double(), kind)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


@KINDS
def test_zero_tokens_have_a_finite_loss_and_no_exploding_gradient(kind: str) -> None:
    student, teacher = features()
    student[0, 0], teacher[0, 1], student[1], teacher[2] = 1e-8, 0, 0, 0
    student = student.float().requires_grad_()
    loss = feature_loss(student, teacher.float(), kind)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.abs().max() < 50  # 1 / length would be 1e6 and more


def test_a_zero_token_is_orthogonal_to_all() -> None:
    student, teacher = features()
    torch.testing.assert_close(feature_loss(student * 0, teacher, "cosine"), torch.ones(3).double())


@KINDS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_reach_the_loss_of_their_image(kind: str, value: float) -> None:
    student, teacher = features()
    teacher[1, 0, 0] = value
    finite = feature_loss(student, teacher, kind).isfinite().tolist()
    assert finite == [True, False, True]


@pytest.mark.parametrize(
    "student, teacher, kind, message",
    [
        ([2, 4, 3], [2, 4, 3], "l2", "must be of cosine, .*not 'l2'"),
        ([2, 4, 3], [2, 4, 5], "mse", r"\[2, 4, 3\], the teacher's \[2, 4, 5\]"),
        ([4, 3], [4, 3], "mse", r"must be \[images, tokens, channels\]"),
        ([2, 8, 3], [2, 8, 3], "spectral", "8 tokens form no square grid"),
    ],
)
def test_what_does_not_fit_is_refused(
    student: list, teacher: list, kind: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        feature_loss(torch.zeros(student), torch.zeros(teacher), kind)
