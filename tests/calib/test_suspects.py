"""Parts that stick out are named, so that a person looks at them; clean samples are left in peace."""

from __future__ import annotations

import numpy as np
import pytest

from calib.suspects import LEAST_PARTS, find_suspects


def named(values: np.ndarray) -> dict[str, float]:
    return {f"part {place}": float(value) for place, value in enumerate(values)}


@pytest.mark.parametrize("law", ["normal", "gumbel", "exponential", "uniform"])
def test_clean_samples_rarely_hold_a_suspect(law: str) -> None:
    """Two hundred samples of three hundred parts: a handful at most."""
    rng = np.random.default_rng(0)
    found = [bool(find_suspects(named(getattr(rng, law)(size=300)))) for _ in range(200)]

    assert sum(found) <= 8


@pytest.mark.parametrize("bad", [1, 5, 20])
def test_bad_parts_do_not_hide_each_other(bad: int) -> None:
    """Up to a fifteenth of the sample; the highest comes first."""
    values = np.append(np.random.default_rng(1).normal(size=300), 12.0 + np.arange(bad))
    found = find_suspects(named(values))

    assert set(found) == {f"part {300 + place}" for place in range(bad)}
    assert next(iter(found)) == f"part {299 + bad}"


def test_a_sample_that_is_too_small_or_does_not_vary_has_no_tail() -> None:
    """Nothing can be said, so nothing is."""
    assert find_suspects(named(np.array([1.0] * (LEAST_PARTS - 2) + [100.0]))) == {}
    assert find_suspects(named(np.array([1.0] * 100 + [100.0]))) == {}
