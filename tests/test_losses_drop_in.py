"""DistillationLoss against DeiT's formula in PyTorch's own operations, over random cases.

LOSS_CASES=N makes N cases. LOSS_ORACLE=FILE takes the class of facebookresearch/deit's `losses.py`
as the oracle.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from deit_fast.errors import InputError
from deit_fast.kernels import TopK, distillation_loss
from deit_fast.losses import DistillationLoss

CASES = int(os.environ.get("LOSS_CASES", "150"))
ORACLE = os.environ.get("LOSS_ORACLE")

CRITERIA = {
    "soft target": SoftTargetCrossEntropy,
    "smoothing": lambda: LabelSmoothingCrossEntropy(0.2),
    "torch": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "bce": nn.BCEWithLogitsLoss,
    "function": lambda: F.cross_entropy,
}
LABELS = ("ids", "int32 ids", "one-hot", "soft", "soft with gradient", "one row", "column")
CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "criterion": {"base_criterion": lambda: nn.CrossEntropyLoss()},
    "other of timm's": {"base_criterion": lambda: LabelSmoothingCrossEntropy(0.4)},
    "alpha": {"alpha": lambda: 0.85},
    "tau": {"tau": lambda: 4.0},
    "type": {"distillation_type": lambda: "hard"},
    "no distillation": {"distillation_type": lambda: "none"},
    "teacher": {"teacher_model": lambda: Teacher()},
    "smoothing": {"base_criterion.smoothing": lambda: 0.3},
    "smoothing and confidence": {
        "base_criterion.smoothing": lambda: 0.3, "base_criterion.confidence": lambda: 0.7,
    },
    "hook": {},
    "forward": {"base_criterion.forward": lambda: lambda z, t: z.square().mean()},
}  # fmt: skip
TIMM_ONLY = ("smoothing", "smoothing and confidence", "hook", "forward")


class Teacher(nn.Linear):
    """Logits in float32: of others PyTorch takes the softmax in their own dtype."""

    def __init__(self) -> None:
        super().__init__(5, 9)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Formula(nn.Module):
    """Touvron et al. 2021, equations 2 and 3, with the soft term divided by B * C."""

    def __init__(self, criterion: Any, teacher: Any, kind: str, alpha: float, tau: float) -> None:
        super().__init__()
        self.base_criterion, self.teacher_model = criterion, teacher
        self.distillation_type, self.alpha, self.tau = kind, alpha, tau

    def forward(self, inputs: Tensor, outputs: Any, labels: Tensor) -> Tensor:
        z_c, z_d = (outputs, None) if isinstance(outputs, Tensor) else outputs
        base = self.base_criterion(z_c, labels)
        if self.distillation_type == "none":
            return base
        if z_d is None:
            raise ValueError("two heads")
        with torch.no_grad():
            teacher = self.teacher_model(inputs)
        if self.distillation_type == "hard":
            second = F.cross_entropy(z_d, teacher.argmax(1))
        else:
            log_p, log_q = ((z / self.tau).log_softmax(1) for z in (z_d, teacher))
            kl = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
            second = kl * self.tau**2 / z_d.numel()
        return (1 - self.alpha) * base + self.alpha * second


def oracle() -> type[nn.Module]:
    if ORACLE is None:
        return Formula
    spec = importlib.util.spec_from_file_location("oracle", ORACLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DistillationLoss


def labels_of(kind: str, rows: int, classes: int) -> Tensor:
    ids = torch.randint(classes, (rows,))
    soft = torch.rand(rows, classes).softmax(1)
    return {
        "ids": ids, "int32 ids": ids.int(), "one-hot": F.one_hot(ids, classes),
        "soft": soft, "soft with gradient": soft.clone().requires_grad_(),
        "one row": soft[:1], "column": ids[:, None],
    }[kind]  # fmt: skip


def change(loss: nn.Module, name: str) -> None:
    """Apply one of CHANGES to a loss that has been called once."""
    if name == "hook":
        loss.base_criterion.register_forward_hook(lambda _, __, value: 2 * value)
    for path, make in CHANGES[name].items():
        owner, _, attribute = path.rpartition(".")
        setattr(loss.base_criterion if owner else loss, attribute, make())


def outcome(loss: nn.Module, case: dict[str, Any], z: tuple[Tensor, Tensor], labels: Tensor) -> Any:
    """Value and gradients of both heads and the labels, or the type of the error."""
    leaves = [value.detach().clone().requires_grad_() for value in z]
    labels = labels.detach().clone().requires_grad_(labels.requires_grad)
    autocast = nullcontext()
    if case["autocast"]:
        autocast = torch.autocast("cpu", case["autocast"])
    outputs = leaves[0] if case["one head"] else tuple(leaves)
    try:
        with autocast:
            value = loss(case["inputs"], outputs, labels)
        value.backward()
    except Exception as error:
        return error
    return [value.detach(), *(leaf.grad for leaf in leaves), labels.grad]


def cases(count: int) -> list[dict[str, Any]]:
    draw = random.Random(7)
    options = {
        "criterion": [*CRITERIA, "soft target", "smoothing"], "labels": LABELS,
        "kind": ("none", "soft", "hard"),
        "change": list(CHANGES), "dtype": (torch.float32, torch.float64, torch.bfloat16),
        "autocast": (None, torch.bfloat16, torch.float16),
        "one head": (False, False, False, True), "rows": (1, 4, 9),
    }  # fmt: skip
    drawn = [{name: draw.choice(values) for name, values in options.items()} for _ in range(count)]
    for case in drawn:
        if case["change"] in TIMM_ONLY and case["criterion"] not in ("soft target", "smoothing"):
            case["change"] = "nothing"
    return drawn


def both(number: int, case: dict[str, Any]) -> tuple[Any, Any]:
    """Outcomes of the oracle, in float32 or float64, and of this package's class."""
    torch.manual_seed(number)
    rows, classes = case["rows"], 9
    wide = torch.float64 if case["dtype"] == torch.float64 else torch.float32
    case["inputs"] = torch.randn(rows, 5)
    narrow = tuple(3 * torch.randn(rows, classes).to(case["dtype"]) for _ in range(2))
    labels = labels_of(case["labels"], rows, classes)
    results = []
    for kind, heads in ((oracle(), tuple(x.to(wide) for x in narrow)), (DistillationLoss, narrow)):
        torch.manual_seed(number)
        teacher = Teacher()
        loss = kind(CRITERIA[case["criterion"]](), teacher, case["kind"], 0.3, 2.0)
        outcome(loss, case, heads, labels)  # what a first call might keep
        change(loss, case["change"])
        results.append(outcome(loss, case, heads, labels))
    return results[0], results[1]


def test_equals_deits_formula_or_refuses_where_it_does() -> None:
    """Same acceptance, values and gradients, but for one named refusal.

    With as many rows as classes, or with one row, timm's soft cross-entropy broadcasts: it takes
    class ids as weights of the classes.
    """
    counts = dict.fromkeys(("equal", "refused", "refused here alone"), 0)
    for number, case in enumerate(cases(CASES)):
        theirs, ours = both(number, case)
        if isinstance(ours, Exception):
            if not isinstance(theirs, Exception):
                broadcasts = case["criterion"] == "soft target" and case["rows"] in (1, 9)
                assert broadcasts and isinstance(ours, InputError), (case, ours)
            counts["refused" if isinstance(theirs, Exception) else "refused here alone"] += 1
            continue
        assert not isinstance(theirs, Exception), (case, theirs)
        tolerance = 5e-2 if case["dtype"] == torch.bfloat16 else 1e-5
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine is None) == (other is None), case
            if mine is not None:
                off = (mine.double() - other.double()).abs().max().item()
                assert off <= tolerance * other.abs().max().item(), (case, off)
        counts["equal"] += 1
    print(counts)
    assert counts["equal"] > CASES // 3 and counts["refused"] > 0


# ---------------------------------------------------------------------------------------------
# Single cases
# ---------------------------------------------------------------------------------------------


def tensors(rows: int = 8, classes: int = 9) -> tuple[Tensor, tuple[Tensor, Tensor], nn.Module]:
    z = tuple((3 * torch.randn(rows, classes)).requires_grad_() for _ in range(2))
    return torch.randn(rows, 5), z, nn.Linear(5, classes).requires_grad_(False)


@pytest.mark.parametrize(
    ("criterion", "labels", "message"),
    [
        (
            SoftTargetCrossEntropy(), torch.zeros(9, dtype=torch.long),
            "SoftTargetCrossEntropy takes soft labels, float [B, C], not torch.int64 [9]: "
            "LabelSmoothingCrossEntropy takes class ids",
        ),
        (
            LabelSmoothingCrossEntropy(), torch.full((9, 9), 1 / 9),
            "LabelSmoothingCrossEntropy takes class ids, int64 [B], not torch.float32 [9, 9]: "
            "SoftTargetCrossEntropy takes soft labels",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ("none", "soft"))
def test_labels_of_the_other_kind_are_refused(
    criterion: nn.Module, labels: Tensor, message: str, kind: str
) -> None:
    x, z, teacher = tensors(9)
    with pytest.raises(InputError) as caught:
        DistillationLoss(criterion, teacher, kind, 0.5, 1.0)(x, z, labels)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("distillation_type", "softly", "distillation_type must be one of none, soft, hard, not"),
        ("reduction", "mean", "reduction must be one of numel, batchmean, not 'mean'"),
        ("alpha", 1.5, "alpha must lie in [0, 1], not 1.5"),
        ("alpha", math.nan, "alpha must lie in [0, 1], not nan"),
        ("alpha", nn.Parameter(torch.tensor(0.5)), "alpha must be a number, not a tensor that"),
        ("tau", 0.0, "tau must be positive, not 0.0"),
        ("teacher_model", None, "distillation_type 'soft' needs a teacher_model"),
    ],
)
def test_a_wrong_attribute_is_refused_at_the_call(name: str, value: Any, message: str) -> None:
    x, z, teacher = tensors()
    loss = DistillationLoss(SoftTargetCrossEntropy(), teacher, "soft", 0.5, 1.0)
    if isinstance(value, nn.Parameter):
        delattr(loss, name)
    setattr(loss, name, value)
    with pytest.raises(InputError) as caught:
        loss(x, z, torch.full((8, 9), 1 / 9))
    assert str(caught.value).startswith(message)


def test_a_teacher_set_later_computes_in_eval_mode() -> None:
    x, z, teacher = tensors()
    loss = DistillationLoss(SoftTargetCrossEntropy(), teacher, "soft", 0.5, 1.0).train()
    loss.teacher_model = nn.Sequential(teacher, nn.Dropout(0.5)).train()
    labels = torch.full((8, 9), 1 / 9)
    expected = DistillationLoss(SoftTargetCrossEntropy(), teacher, "soft", 0.5, 1.0)(x, z, labels)
    assert torch.equal(loss(x, z, labels), expected)


def teachers(dtype: torch.dtype) -> list[Any]:
    logits = (3 * torch.randn(16, 37)).to(dtype)
    log_q, ids = logits.double().log_softmax(1).topk(5, 1)
    rest = torch.log1p(-log_q.exp().sum(1)).float()
    tails = ("bucket", "uniform", "renorm", "drop")
    return [logits, *(TopK(ids, log_q.float(), rest, tail) for tail in tails)]


@pytest.mark.parametrize("autocast", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_autocast_changes_no_bit(dtype: torch.dtype, autocast: torch.dtype) -> None:
    """Autocast's products in half precision would be wrong by 0.3 %."""
    torch.manual_seed(0)
    ids, others = torch.randint(37, (2, 16))
    targets = (ids, torch.rand(16, 37).softmax(1), (ids, others, torch.rand(16)))
    options = itertools.product(targets, ("ce", "bce"), ("soft", "hard"), teachers(dtype))
    for target, base, kind, teacher in options:
        results = []
        for context in (nullcontext(), torch.autocast("cpu", autocast)):
            heads = [(3 * torch.randn(16, 37, generator=torch.Generator().manual_seed(n))).to(dtype)
                     .requires_grad_() for n in range(2)]  # fmt: skip
            with context:
                loss = distillation_loss(
                    *heads, target, teacher, kind=kind, alpha=0.4, tau=2.0, smoothing=0.1,
                    base=base, reduction="batchmean",
                )  # fmt: skip
                (2.5 * loss).backward()
            results.append([loss.detach(), *(head.grad for head in heads)])
        assert all(map(torch.equal, *results)), (base, kind, getattr(teacher, "tail", "dense"))
