"""Where activations are clipped before they are rounded: each finder against the same thing done by force."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from calib.int8 import e4m3_bytes
from calib.ranges import (
    PERCENTILE,
    Finder,
    Magnitudes,
    QuantizedPrecision,
    by_entropy,
    candidates,
    divergence,
    find_range,
    rounded,
)
from edge.errors import CalibrationError

PRECISIONS: tuple[QuantizedPrecision, ...] = ("int8", "fp8")


def sample(seed: int = 0) -> NDArray[np.float32]:
    """What activations look like: many small values, few large ones, and an outlier."""
    values = np.random.default_rng(seed).laplace(0, 0.3, 20_000)
    return np.append(values, 9.0).astype(np.float32)


def seen(values: NDArray[np.float32]) -> Magnitudes:
    found = Magnitudes()
    found.add(values, "x")
    return found


def test_the_histogram_grows_and_forgets_nothing() -> None:
    """Frames may come in any order: ever larger values give the same counts as the largest first."""
    values = np.sort(np.abs(sample()))
    rising, falling = Magnitudes(), Magnitudes()
    for part in np.array_split(values, 7):
        rising.add(part, "x")
    for part in np.array_split(values[::-1], 7):
        falling.add(part, "x")

    assert np.array_equal(rising.counts, falling.counts) and rising.counts.sum() == len(values)
    assert (rising.top, rising.peak) == (falling.top, falling.peak) == (16.0, 9.0)


def test_an_activation_that_is_not_finite_is_refused_by_name() -> None:
    """A range from it would silence the layer."""
    with pytest.raises(CalibrationError, match="layer 3 becomes NaN"):
        Magnitudes().add(np.array([1, np.nan], np.float32), "layer 3")


def test_a_tensor_that_is_always_zero_has_a_range_all_the_same() -> None:
    """A scale of zero would divide by it."""
    assert find_range(seen(np.zeros(5, np.float32)), "mse", "int8") == 1.0


def test_percentile_is_that_of_the_values_themselves() -> None:
    """Up to the width of one bin."""
    values = sample()
    found = seen(values)
    exact = np.quantile(np.abs(values), PERCENTILE / 100, method="inverted_cdf")

    assert 0 <= find_range(found, "percentile", "int8") - exact <= found.width


@pytest.mark.parametrize("precision", PRECISIONS)
def test_mse_is_the_least_over_all_values(precision: QuantizedPrecision) -> None:
    """No range tried on the very values is better by more than the histogram's coarseness."""
    values = sample().astype(np.float64)

    def error(limit: float) -> float:
        return float(np.mean((rounded(values, limit, precision) - values) ** 2))

    found = error(find_range(seen(values.astype(np.float32)), "mse", precision))
    forced = min(error(limit) for limit in np.linspace(0.3, 9.0, 400))

    assert found <= 1.02 * forced
    if precision == "int8":  # and it is worth the search; fp8 has large values for little
        assert found < 0.95 * error(9.0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_entropy_is_the_least_of_divergences_computed_bin_by_bin(precision: QuantizedPrecision) -> None:
    """The same sum written as loops over dictionaries."""
    found = seen(sample(3)[:2000])

    def by_force(limit: float) -> float:
        kept = round(limit / found.width)
        p = {place: float(found.counts[place]) if place >= found.used // 254 else 0.0 for place in range(kept)}
        counts = dict(p)
        p[kept - 1] += float(found.counts[kept:].sum())
        levels: dict[float, list[int]] = {}
        for place in range(kept):
            levels.setdefault(float(rounded(found.centers[place], limit, precision)), []).append(place)
        q = dict.fromkeys(range(kept), 0.0)
        for places in levels.values():
            filled = [place for place in places if counts[place]]
            for place in filled:
                q[place] = sum(counts[one] for one in filled) / len(filled)
        sums = sum(p.values()), sum(q.values())
        return sum(
            p[place] / sums[0] * np.log(p[place] / sums[0] / max(q[place] / sums[1], 1e-9)) for place in p if p[place]
        )

    tried = candidates(found)[::16]

    assert [divergence(found, limit, precision) for limit in tried] == pytest.approx(list(map(by_force, tried)))
    best = by_entropy(found, precision)
    assert divergence(found, best, precision) <= min(divergence(found, limit, precision) for limit in tried)


@pytest.mark.parametrize("finder", ["percentile", "entropy", "mse"])
def test_no_range_goes_beyond_the_largest_value(finder: Finder) -> None:
    """Levels for values that never came would be wasted."""
    values = np.linspace(-0.7, 0.7, 5000, dtype=np.float32)

    assert 0.5 < find_range(seen(values), finder, "int8") <= values.max()


def test_fp8_is_rounded_as_the_reference_type_does() -> None:
    """Against ml_dtypes, values and bytes, with zeros, subnormals and ties."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    every = np.sort(every[np.isfinite(every)])
    values = np.concatenate([every, (every[1:] + every[:-1]) / 2, np.random.default_rng(0).normal(0, 30, 1000)])
    expected = values.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    found = rounded(values, 448.0, "fp8")

    assert np.array_equal(found, expected.astype(np.float64))
    assert np.array_equal(e4m3_bytes(found)[found != 0], expected.view(np.uint8)[found != 0])
