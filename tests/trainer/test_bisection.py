"""The median without a sort against the one with."""

from __future__ import annotations

import pytest
import torch

from trainer.bisection import median


@pytest.mark.parametrize("shape", [(3, 57, 57), (2, 5, 4), (1, 256, 256), (1, 1, 1)])
def test_it_is_the_median_of_each_map(shape: tuple[int, int, int]) -> None:
    """Odd and even counts: for an even one anything between the two middle values, the lower here."""
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(1)) ** 3 * 50
    flat = maps.flatten(1)

    found = median(maps).flatten()

    torch.testing.assert_close(found, flat.median(1).values, atol=1e-4 * float(flat.abs().max() / 50 + 1), rtol=1e-5)


def test_a_flaw_over_a_third_of_the_map_moves_the_median_little_and_the_mean_much() -> None:
    """Why the median: what is subtracted must not be the flaw."""
    maps = torch.randn(1, 60, 60, generator=torch.Generator().manual_seed(1))
    flawed = maps.clone()
    flawed[:, :20] += 40.0

    assert abs(float(median(flawed) - median(maps))) < 1.0
    assert float(flawed.mean() - maps.mean()) > 13.0


def test_equal_values_have_themselves_as_median() -> None:
    """Nothing to halve."""
    assert torch.equal(median(torch.full((2, 4, 4), 2.5)), torch.full((2, 1, 1), 2.5))
