"""DistillationLoss as a drop-in: DeiT's formula, timm's tasks, and what it does to the teacher."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from deit_fast.errors import InputError
from deit_fast.kernels import TopK
from deit_fast.losses import DistillationLoss
from helpers.students import CLASSES, ROWS, OneHead, TwoHeads, inputs


def log_probabilities(row: list[float], tau: float) -> list[float]:
    total = math.fsum(math.exp(value / tau) for value in row)
    return [value / tau - math.log(total) for value in row]


@pytest.mark.parametrize("tau", (1.0, 3.0))
@pytest.mark.parametrize("kind", ("soft", "hard"))
def test_value_is_the_formula(kind: str, tau: float) -> None:
    student, teacher, x = TwoHeads(), OneHead(), inputs()
    labels = torch.randint(CLASSES, (ROWS,))
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, kind, 0.3, tau)
    value = loss(x, student(x), labels).item()

    base, distillation = [], []
    heads = (*student(x), teacher(x))
    for z_c, z_d, z_t, label in zip(*(z.tolist() for z in heads), labels.tolist(), strict=True):
        base.append(-log_probabilities(z_c, 1.0)[label])
        if kind == "hard":
            distillation.append(-log_probabilities(z_d, 1.0)[z_t.index(max(z_t))] / ROWS)
            continue
        pairs = zip(log_probabilities(z_t, tau), log_probabilities(z_d, tau), strict=True)
        kl = math.fsum(math.exp(q) * (q - p) for q, p in pairs)
        distillation.append(tau**2 * kl / (ROWS * CLASSES))
    expected = 0.7 * math.fsum(base) / ROWS + 0.3 * math.fsum(distillation)
    assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tau", (1.0, 3.0))
@pytest.mark.parametrize("kind", ("soft", "hard"))
def test_equals_timm_token_distillation(kind: str, tau: float) -> None:
    from timm.task import TokenDistillationTask

    student, teacher, x = TwoHeads(), OneHead(), inputs()
    labels, criterion = torch.randint(CLASSES, (ROWS,)), nn.CrossEntropyLoss()
    task = TokenDistillationTask(
        student, teacher, criterion, distill_type=kind, task_loss_weight=0.6, temperature=tau
    )
    theirs = task(x, labels)
    numel, batchmean = (
        DistillationLoss(criterion, teacher, kind, 0.4, tau, reduction)(x, student(x), labels)
        for reduction in ("numel", "batchmean")
    )
    torch.testing.assert_close(batchmean, theirs["loss"], rtol=1e-14, atol=0)
    grads = [
        torch.autograd.grad(z, list(student.parameters())) for z in (batchmean, theirs["loss"])
    ]
    torch.testing.assert_close(grads[0], grads[1])
    if kind == "hard":
        assert torch.equal(numel, batchmean)
    else:
        soft = numel - 0.6 * theirs["task_loss"]
        torch.testing.assert_close(soft * CLASSES, 0.4 * theirs["distill_loss"])


def test_equals_timm_logit_distillation() -> None:
    from timm.task import LogitDistillationTask

    student, teacher, x = OneHead(), OneHead(), inputs()
    labels, criterion = torch.randint(CLASSES, (ROWS,)), nn.CrossEntropyLoss()
    task = LogitDistillationTask(student, teacher, criterion, task_loss_weight=0.6, temperature=2.0)
    logits = student(x)
    ours = DistillationLoss(criterion, teacher, "soft", 0.4, 2.0, "batchmean")
    torch.testing.assert_close(ours(x, (logits, logits), labels), task(x, labels)["loss"])


def test_kind_none_is_the_base_criterion_and_asks_no_teacher() -> None:
    teacher, x, labels = OneHead(), inputs(), torch.randint(CLASSES, (ROWS,))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    loss = DistillationLoss(criterion, teacher, "none", 0.5, 1.0)
    one, two = OneHead()(x), TwoHeads()(x)
    assert torch.equal(loss(x, one, labels), criterion(one, labels))
    assert torch.equal(loss(x, two, labels), criterion(two[0], labels))
    assert teacher.calls == []
    assert DistillationLoss(criterion, None, "none", 0.5, 1.0)(x, one, labels).isfinite()


def test_teacher_runs_in_eval_mode_without_gradients_and_once() -> None:
    teacher, x = OneHead().train(), inputs()
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft", 0.5, 1.0).train()
    assert loss.training and not teacher.training
    value = loss(x, TwoHeads()(x), torch.zeros(ROWS, dtype=torch.long))
    value.backward()
    assert teacher.calls == [(False, False)]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_cached_answers_may_stand_for_a_teacher() -> None:
    student, teacher, x = TwoHeads(), OneHead(), inputs()
    labels, logits = torch.randint(CLASSES, (ROWS,)), teacher(x)
    values, ids = torch.log_softmax(logits.detach(), 1).topk(CLASSES, 1)
    everything = TopK(ids, values, torch.full((ROWS,), -math.inf))
    options = (nn.CrossEntropyLoss(), teacher)
    for kind, stored in (("soft", everything), ("hard", everything), ("hard", logits.argmax(1))):
        online = DistillationLoss(*options, kind, 0.5, 1.0)(x, student(x), labels)
        cached = DistillationLoss(options[0], lambda _, a=stored: a, kind, 0.5, 1.0)
        torch.testing.assert_close(cached(x, student(x), labels), online)


def test_one_tensor_with_distillation_says_why() -> None:
    loss = DistillationLoss(nn.CrossEntropyLoss(), OneHead(), "hard", 0.5, 1.0)
    with pytest.raises(ValueError, match=r"'hard' needs the outputs of two heads.* one tensor"):
        loss(inputs(), torch.zeros(ROWS, CLASSES), torch.zeros(ROWS, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("softly", 0.5, 1.0), "distillation_type must be one of none, soft, hard, not 'softly'"),
        (("soft", 1.5, 1.0), "alpha must lie in [0, 1], not 1.5"),
        (("soft", 0.5, 0.0), "tau must be positive, not 0.0"),
        (
            ("soft", 0.5, 1.0, "mean"),
            "reduction must be one of numel, batchmean, not 'mean'",
        ),
    ],
)
def test_wrong_option_is_named_at_construction(options: tuple, message: str) -> None:
    with pytest.raises(InputError) as caught:
        DistillationLoss(nn.CrossEntropyLoss(), OneHead(), *options)
    assert message in str(caught.value)


def test_distillation_without_a_teacher_is_refused() -> None:
    with pytest.raises(InputError, match="distillation_type 'soft' needs a teacher_model"):
        DistillationLoss(nn.CrossEntropyLoss(), None, "soft", 0.5, 1.0)
