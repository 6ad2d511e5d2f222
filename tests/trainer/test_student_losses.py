"""Losses against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from trainer.student_losses import hard_distance, jittered, mean_distance, mean_square


def test_the_papers_loss_is_the_mean_over_positions_of_the_squared_distance() -> None:
    """Two positions at distances 5 and 0."""
    answer = torch.tensor([3.0, 0.0, 4.0, 0.0]).view(1, 2, 1, 2)

    assert float(mean_distance(answer, torch.zeros(1, 2, 1, 2))) == 12.5
    assert float(mean_square(answer)) == 6.25


def test_the_hard_loss_is_the_mean_of_the_largest_thousandth() -> None:
    """Squares 0, 1, 4, ... 1999^2: the 0.999 quantile leaves the last two."""
    answer = torch.arange(2000.0).view(1, 20, 10, 10)

    loss = hard_distance(answer, torch.zeros_like(answer))

    assert float(loss) == pytest.approx((1998.0**2 + 1999.0**2) / 2)


def test_the_hard_loss_moves_only_the_hardest_values() -> None:
    """Control for the selection: all other gradients are zero."""
    answer = torch.arange(2000.0).view(1, 20, 10, 10).requires_grad_()

    hard_distance(answer, torch.zeros_like(answer)).backward()  # type: ignore[no-untyped-call]

    assert answer.grad is not None
    assert torch.count_nonzero(answer.grad) == 2


def test_jitter_changes_one_thing_by_at_most_a_fifth_and_repeats_itself() -> None:
    """Brightness, contrast or saturation; the same draw gives the same picture."""
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 100 + 50
    first, again = (jittered(picture, torch.Generator().manual_seed(3)) for _ in range(2))
    others = [jittered(picture, torch.Generator().manual_seed(seed)) for seed in range(12)]

    assert torch.equal(first, again)
    assert all(float((other - picture).abs().max()) <= 0.2 * 150 + 1e-3 for other in others)
    assert len({round(float(other.sum()), 2) for other in others}) > 6
