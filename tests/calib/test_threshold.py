"""A threshold keeps its promise whatever the scores look like, and says what it needs when it cannot."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from calib import threshold
from calib.threshold import (
    certified_rate,
    fit_threshold,
    parse_rate,
    percent_up,
    require_parts,
    required_parts,
    supported_rate,
)
from edge.errors import CalibrationError, CommandError


@pytest.mark.parametrize(
    ("rate", "confidence", "parts"),
    [(0.01, 0.95, 299), (0.001, 0.95, 2995), (0.0001, 0.95, 29956), (0.05, 0.9, 45), (0.5, 0.75, 2)],
)
def test_the_number_of_good_parts_needed_is_the_exact_one(rate: float, confidence: float, parts: int) -> None:
    """299 for 1 % at 95 %: with that many the maximum serves, with one fewer it does not."""
    scores = np.arange(parts, dtype=float)

    assert required_parts(false_rejects=rate, confidence=confidence) == parts
    assert fit_threshold(scores, false_rejects=rate, confidence=confidence).threshold == scores.max()
    with pytest.raises(CalibrationError, match=f"{parts:,} good parts"):
        fit_threshold(scores[1:], false_rejects=rate, confidence=confidence)


def coverage(parts: int, rate: float, confidence: float, draws: int = 4000) -> float:
    """How often the true reject rate stays within `rate`; for uniform scores the rate above t is 1 - t."""
    rng = np.random.default_rng(parts)
    fitted = [
        fit_threshold(rng.random(parts), false_rejects=rate, confidence=confidence).threshold for _ in range(draws)
    ]
    return float(np.mean(1 - np.array(fitted) <= rate))


CASES = [(299, 0.01, 0.95), (700, 0.01, 0.95), (77, 0.05, 0.90), (473, 0.01, 0.95)]


@pytest.mark.parametrize(("parts", "rate", "confidence"), CASES)
def test_the_promise_holds_as_often_as_stated_over_many_samples(parts: int, rate: float, confidence: float) -> None:
    """Four thousand fresh samples: the share of kept promises is not below the confidence (4 standard errors)."""
    error = np.sqrt(confidence * (1 - confidence) / 4000)

    assert coverage(parts, rate, confidence) >= confidence - 4 * error


@pytest.mark.parametrize(("parts", "rate", "confidence"), CASES)
def test_a_rank_off_by_one_breaks_the_promise_and_is_seen(
    parts: int, rate: float, confidence: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted error: one exceedance more than allowed; coverage falls clearly below."""
    honest = threshold.allowed_exceedances
    monkeypatch.setattr(threshold, "allowed_exceedances", lambda n, **asked: honest(n, **asked) + 1)
    error = np.sqrt(confidence * (1 - confidence) / 4000)

    assert coverage(parts, rate, confidence) < confidence - 4 * error


def test_the_lowest_threshold_that_keeps_the_promise_is_taken() -> None:
    """At 1 % and 95 %, 473 parts allow one to lie above the threshold and 472 do not."""
    scores = np.random.default_rng(0).permutation(473).astype(float)
    one, none = (
        fit_threshold(scores, false_rejects=0.01, confidence=0.95),
        fit_threshold(scores[:472], false_rejects=0.01, confidence=0.95),
    )

    assert (one.allowed_exceedances, one.rank, one.n, one.threshold) == (1, 472, 473, 471.0)
    assert (none.allowed_exceedances, none.threshold) == (0, scores[:472].max())


@given(st.integers(1, 2000), st.floats(0.002, 0.5), st.floats(0.5, 0.99))
def test_rank_and_bound_agree_with_the_binomial(parts: int, rate: float, confidence: float) -> None:
    """The definition spelled out with SciPy's binomial, and Clopper and Pearson's bound within the rate asked for."""
    allowed = threshold.allowed_exceedances(parts, false_rejects=rate, confidence=confidence)

    if allowed >= 0:
        assert stats.binom.sf(allowed, parts, rate) >= confidence - 1e-9
        assert certified_rate(allowed, parts, confidence=confidence) <= rate + 1e-9
    assert stats.binom.sf(allowed + 1, parts, rate) < confidence + 1e-9


def test_the_certified_rate_is_clopper_and_pearsons_upper_bound() -> None:
    """One-sided, as SciPy has it."""
    expected = stats.binomtest(2, 800, alternative="less").proportion_ci(0.95, method="exact").high

    assert certified_rate(2, 800, confidence=0.95) == pytest.approx(expected, abs=1e-9)
    assert certified_rate(5, 5, confidence=0.95) == 1.0


def test_scores_that_tie_at_the_threshold_are_accepted() -> None:
    """Reject means greater than the threshold: four hundred equal scores reject nobody."""
    fitted = fit_threshold(np.full(1000, 2.5), false_rejects=0.01, confidence=0.95)

    assert (fitted.threshold, fitted.exceedances) == (2.5, 0)
    assert fitted.allowed_exceedances > 0


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_refused(broken: float) -> None:
    """A NaN sorts last and would become the threshold that rejects nothing."""
    scores = np.append(np.zeros(400), broken)

    with pytest.raises(CalibrationError, match="1 of 401"):
        fit_threshold(scores, false_rejects=0.01, confidence=0.95)


@given(st.integers(1, 3000), st.sampled_from([0.8, 0.95, 0.999]))
def test_the_rate_named_in_the_refusal_is_one_the_sample_supports(parts: int, confidence: float) -> None:
    """Whoever follows the message is not refused again."""
    with pytest.raises(CalibrationError, match="--false-rejects") as refused:
        require_parts(parts, false_rejects=1e-6, confidence=confidence)
    named = re.search(r"--false-rejects (\S+)`", str(refused.value))

    assert named is not None
    require_parts(parts, false_rejects=parse_rate(named[1], "--false-rejects"), confidence=confidence)
    assert parse_rate(percent_up(supported_rate(parts, confidence=confidence)), "") <= 1.1 * supported_rate(
        parts, confidence=confidence
    )


def test_an_empty_sample_says_how_many_are_needed() -> None:
    """There is no rate to offer instead."""
    with pytest.raises(CalibrationError, match="299"):
        fit_threshold([], false_rejects=0.01, confidence=0.95)


@pytest.mark.parametrize(("text", "rate"), [("0.01", 0.01), ("1%", 0.01), (" 0.1 % ".strip(), 0.001), ("5e-3", 0.005)])
def test_a_rate_is_a_share_or_a_percentage(text: str, rate: float) -> None:
    """Both spellings of the same promise."""
    assert parse_rate(text, "--false-rejects") == pytest.approx(rate)


@pytest.mark.parametrize("text", ["1", "0", "-0.1", "100%", "nan", "one", "", "%"])
def test_what_is_no_rate_is_refused_and_named(text: str) -> None:
    """`--false-rejects 1` almost surely means 1 %; it is refused, not corrected."""
    with pytest.raises(CommandError, match="--false-rejects"):
        parse_rate(text, "--false-rejects")
