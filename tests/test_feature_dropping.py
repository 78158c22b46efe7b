"""Teachers that are left out: what the draws depend on, and how often each is kept."""

from __future__ import annotations

import pytest
import torch

from deit_fast.features.dropping import MAX_TEACHERS, draw_kept, keep_highest

COUNT = 20_000
SAMPLES = torch.arange(COUNT)
VIEWS = (torch.arange(COUNT) % 7).int()


def test_draws_are_a_function_of_seed_sample_view_and_step() -> None:
    whole = draw_kept(3, SAMPLES, VIEWS, 11, 2)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    parts = [draw_kept(3, SAMPLES[part], VIEWS[part], 11, 2) for part in order.split(999)]
    assert torch.equal(torch.cat(parts), whole[order])
    assert whole.dtype == torch.float32 and whole.shape == (COUNT, 2)
    for other in (
        draw_kept(4, SAMPLES, VIEWS, 11, 2), draw_kept(3, SAMPLES, VIEWS, 12, 2),
        draw_kept(3, SAMPLES + 1, VIEWS, 11, 2), draw_kept(3, SAMPLES, VIEWS + 1, 11, 2),
    ):  # fmt: skip
        assert (other == whole).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_draws_stay_what_they_were() -> None:
    """A resumed run must draw the same with another version of this code."""
    kept = draw_kept(2**40 + 1, torch.arange(6), torch.arange(6).int(), 9, 3, at_least_one=True)
    assert kept.int().tolist() == [
        [1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 1, 0], [1, 0, 1], [1, 0, 1]
    ]  # fmt: skip


@pytest.mark.parametrize("teachers", [1, 2, 3, MAX_TEACHERS])
def test_each_teacher_is_kept_by_half_of_the_images(teachers: int) -> None:
    kept = draw_kept(0, SAMPLES, VIEWS, 5, teachers)
    assert (kept.mean(0) - 0.5).abs().max() < 0.02
    if teachers > 1:  # independently
        pairs = torch.corrcoef(kept.T) - torch.eye(teachers)
        assert pairs.abs().max() < 0.035


@pytest.mark.parametrize("teachers", [1, 2, 3])
def test_no_image_without_a_teacher(teachers: int) -> None:
    free = draw_kept(0, SAMPLES, VIEWS, 5, teachers)
    kept = draw_kept(0, SAMPLES, VIEWS, 5, teachers, at_least_one=True)
    empty = free.sum(1) == 0
    assert empty.any() and torch.equal(kept[~empty], free[~empty])
    assert (kept[empty].sum(1) == 1).all()
    expected = 0.5 + 0.5**teachers / teachers
    assert (kept.mean(0) - expected).abs().max() < 0.02


def test_the_teacher_of_highest_loss_stays() -> None:
    kept = torch.tensor([[0.0, 0, 0], [1, 0, 1], [0, 1, 0], [0, 0, 0]])
    losses = torch.tensor([[1.0, 3, 2], [1, 3, 2], [1, 3, 2], [2, 2, 1]], requires_grad=True)
    found = keep_highest(kept, losses)
    assert found.tolist() == [[0, 1, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0]]
    assert not found.requires_grad and kept[0].tolist() == [0, 0, 0]
