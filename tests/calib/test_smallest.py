"""The smallest size shown, by simulation with known truth: one that is found too rarely is reported in at most 5 %."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats

from calib.smallest import Tried, lower_bound, require_trials, shows, smallest_found
from edge.errors import CommandError

SIZES = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
EXPERIMENTS = 2000

TRUTHS: dict[str, Callable[[float], float]] = {
    "logistic": lambda size: 1 / (1 + (size / 6.0) ** -3),
    "steep": lambda size: 1 / (1 + (size / 7.0) ** -12),
    "just below 90 % for long": lambda size: 0.8999 if size < 30 else 0.99,
    "just below everywhere": lambda size: 0.8999,
    "not monotone": lambda size: 0.8999 if size in (6.0, 16.0) else 0.97,
    "never quite 1": lambda size: min(0.95, size / 8),
}


def wrong_in(truth: Callable[[float], float], choose: Callable[[Sequence[Tried]], float | None], trials: int) -> int:
    """In how many simulated experiments a size is reported that is truly found in fewer than 90 %."""
    rng = np.random.default_rng(7)
    true = np.array([truth(size) for size in SIZES])
    hits = rng.binomial(trials, true, (EXPERIMENTS, len(SIZES)))
    wrong = 0
    for row in hits.tolist():
        found = choose([Tried(size, count, trials) for size, count in zip(SIZES, row, strict=True)])
        wrong += found is not None and truth(found) < 0.9
    return wrong


@pytest.mark.parametrize("name", TRUTHS)
@pytest.mark.parametrize("trials", [29, 61])
def test_a_size_that_is_found_too_rarely_is_reported_in_at_most_five_percent(name: str, trials: int) -> None:
    """Whatever the true curve: the exact binomial test does not refute 5 %."""
    wrong = wrong_in(TRUTHS[name], smallest_found, trials)

    assert stats.binomtest(wrong, EXPERIMENTS, 0.05, alternative="greater").pvalue > 0.001, wrong / EXPERIMENTS


def test_taking_any_size_that_passes_would_be_noticed() -> None:
    """Control: the smallest of all sizes that pass by themselves, each tested at 95 %, is wrong far too often."""

    def any_that_passes(tried: Sequence[Tried]) -> float | None:
        return min((one.size for one in tried if shows(one, probability=0.9, confidence=0.95)), default=None)

    wrong = wrong_in(TRUTHS["just below everywhere"], any_that_passes, 61)

    assert stats.binomtest(wrong, EXPERIMENTS, 0.05, alternative="greater").pvalue < 1e-6


def test_a_large_enough_size_is_reported() -> None:
    """Not only careful but useful: with a steep curve the size is at most one step above the true one."""
    rng = np.random.default_rng(1)
    truth = TRUTHS["steep"]
    found = []
    for _ in range(200):
        tried = [Tried(size, int(rng.binomial(61, truth(size))), 61) for size in SIZES]
        found.append(smallest_found(tried))

    assert np.mean([size == 12.0 for size in found]) > 0.8  # 90 % is truly reached at 8.4


@pytest.mark.parametrize(("hits", "trials"), [(29, 29), (45, 46), (59, 61)])
def test_the_numbers_of_the_handbook_show_ninety_percent(hits: int, trials: int) -> None:
    """29 of 29, 45 of 46, 59 of 61; one trial fewer, or one more miss, does not."""
    assert lower_bound(hits, trials, confidence=0.95) >= 0.9
    assert lower_bound(hits - 1, trials - 1, confidence=0.95) < 0.9
    assert lower_bound(hits - 1, trials, confidence=0.95) < 0.9


def test_the_bound_is_clopper_and_pearsons() -> None:
    """At the bound, so many hits or more come in exactly 5 % of experiments."""
    for hits, trials in ((1, 10), (17, 40), (40, 40), (58, 61)):
        bound = lower_bound(hits, trials, confidence=0.95)

        assert stats.binom.sf(hits - 1, trials, bound) == pytest.approx(0.05)
    assert lower_bound(0, 10, confidence=0.95) == 0


def test_the_first_size_that_fails_ends_it() -> None:
    """What passes below it is luck, or a reason to look."""
    tried = [Tried(8, 61, 61), Tried(4, 50, 61), Tried(2, 61, 61)]

    assert smallest_found(tried) == 8
    assert smallest_found([Tried(8, 50, 61), *tried[1:]]) is None


def test_too_few_trials_are_refused_before_anything_runs() -> None:
    """28 of 28 show nothing; the message says 29."""
    with pytest.raises(CommandError, match="29 are needed"):
        require_trials(28, probability=0.9, confidence=0.95)
    require_trials(29, probability=0.9, confidence=0.95)
    with pytest.raises(CommandError, match="between 0 and 1"):
        require_trials(100, probability=1.0, confidence=0.95)
