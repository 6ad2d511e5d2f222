"""The median and the mean of the largest, without a sort against the ones with."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.bisection import median, top_mean


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


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 5, 4), (2, 224, 224), (1, 1, 1)])
@pytest.mark.parametrize("share", [0.1, 0.003, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["heavy tail", "ties"])
def test_the_mean_of_the_largest_is_that_of_a_sort(shape: tuple[int, int, int], share: float, kind: str) -> None:
    """k = ceil(share n); with many equal values at the border as many of them count as are needed."""
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(1)) ** 3 * 50
    maps = maps if kind == "heavy tail" else (maps / 20).round()
    flat = maps.flatten(1).double()
    count = math.ceil(round(share * flat.shape[1], 6))
    expected = flat.sort(1, descending=True).values[:, :count].mean(1)

    found = top_mean(maps, share)

    span = float(flat.max() - flat.min())
    torch.testing.assert_close(found.double(), expected, atol=5e-7 * span + 1e-6, rtol=1e-6)


def test_control_a_few_halvings_less_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: with ten halvings the threshold is off by a thousandth of the range, and the test above fails."""
    maps = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1)) ** 3 * 50
    exact = top_mean(maps, 0.003)
    monkeypatch.setattr("trainer.bisection.STEPS", 10)

    assert abs(float(top_mean(maps, 0.003) - exact)) > 1e-2


def test_equal_values_have_themselves_as_mean_of_the_largest() -> None:
    """Nothing to halve."""
    assert torch.equal(top_mean(torch.full((2, 4, 4), 2.5), 0.1), torch.full((2,), 2.5))
