"""The watch: silent on clean parts for as long as it promises, quick on drift, and what a wrong one would do."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.stages import watch as watching
from edge.stages.watch import Alarm, Watch, WatchSettings

THRESHOLD = 6.0
SETTINGS = WatchSettings(parts_between_false_alarms=1e6, reject_share=0.05)


def scores(seed: int, count: int, shift: float = 0.0) -> NDArray[np.float64]:
    """A skewed law, as maxima of maps have; the threshold is its 99.8 % point."""
    return np.random.default_rng(seed).gumbel(shift, 1.0, count)


def parts_until_alarm(watch: Watch, live: NDArray[np.float64]) -> int | None:
    for index, score in enumerate(live.tolist()):
        if watch.observe(score) is not None:
            return index + 1
    return None


def test_clean_parts_raise_no_alarm() -> None:
    """20,000 of them, at one false alarm in a million: 2 % of such runs may alarm, and this seed does not."""
    watch = Watch(scores(1, 300).tolist(), THRESHOLD, SETTINGS)

    assert parts_until_alarm(watch, scores(2, 20_000)) is None
    assert watch.parts == 20_000 and 0 <= watch.evidence < 1


@pytest.mark.parametrize("shift", [0.7, -0.7])
def test_a_shift_of_scores_is_noticed_soon(shift: float) -> None:
    """Half a standard deviation up or down, after a long clean time: some hundreds of parts."""
    watch = Watch(scores(1, 1000).tolist(), THRESHOLD, SETTINGS)
    assert parts_until_alarm(watch, scores(2, 5000)) is None

    delay = parts_until_alarm(watch, scores(3, 2000, shift))

    assert watch.alarm is Alarm.SCORES
    assert delay is not None and delay < 300


def test_parts_that_are_all_rejected_are_noticed_though_no_accepted_one_is_left() -> None:
    """A lamp that failed: the scores of accepted parts say nothing, the rejects do."""
    watch = Watch(scores(1, 300).tolist(), THRESHOLD, SETTINGS)

    delay = parts_until_alarm(watch, scores(3, 100, 20.0))

    assert watch.alarm is Alarm.REJECTS and delay is not None and delay < 20


def test_real_defects_within_the_allowed_rate_void_nothing() -> None:
    """Three parts in a hundred are bad; the certificate is about the good ones."""
    live = scores(2, 20_000)
    live[::33] += 20
    watch = Watch(scores(1, 300).tolist(), THRESHOLD, SETTINGS)

    assert parts_until_alarm(watch, live) is None


def test_an_alarm_is_raised_once_and_stays() -> None:
    """Good parts afterwards do not take it back; only a new certificate does."""
    watch = Watch(scores(1, 300).tolist(), THRESHOLD, SETTINGS)
    parts_until_alarm(watch, scores(3, 100, 20.0))

    assert watch.observe(0.0) is None and watch.alarm is Alarm.REJECTS and watch.evidence == 1.0


def test_constant_scores_are_no_drift() -> None:
    """Ties are broken at random, so that a score that always repeats looks like what it is."""
    watch = Watch([1.0] * 300, THRESHOLD, SETTINGS)

    assert parts_until_alarm(watch, np.ones(5000)) is None


def test_the_mean_time_to_a_false_alarm_is_at_least_as_stated() -> None:
    """Two hundred parts are promised; sixty runs of clean parts alarm after more on average."""
    often = WatchSettings(parts_between_false_alarms=200, reject_share=0.05)
    times = []
    for seed in range(60):
        found = parts_until_alarm(Watch(scores(seed, 300).tolist(), THRESHOLD, often), scores(1000 + seed, 3000))
        times.append(found or 3000)

    assert np.mean(times) >= 200


def test_control_ranks_in_a_fixed_sample_alarm_without_a_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: live scores are not added to the sample, so its own deviation is taken for a drift."""
    monkeypatch.setattr(watching, "MAX_SCORES", 0)

    found = [
        parts_until_alarm(Watch(scores(seed, 100).tolist(), THRESHOLD, SETTINGS), scores(50 + seed, 20_000))
        for seed in range(4)
    ]

    assert any(found)


def test_the_same_parts_give_the_same_evidence() -> None:
    """Also the ties: the generator is seeded."""
    one, other = (Watch([1.0, 2.0, 2.0], THRESHOLD, SETTINGS, seed=4) for _ in range(2))
    for score in (2.0, 1.0, 2.0, 1.5):
        one.observe(score)
        other.observe(score)

    assert one.evidence == other.evidence


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_no_part(score: float) -> None:
    """Such a frame is INCONCLUSIVE, not evidence."""
    watch = Watch([1.0], THRESHOLD, SETTINGS)
    watch.observe(score)

    assert watch.parts == 0


@pytest.mark.parametrize("wrong", [{"parts_between_false_alarms": 1.0}, {"reject_share": 0.0}, {"reject_share": 0.2}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    """A rate at which a bet would claim more than all parts, or an alarm every other part."""
    with pytest.raises(ValueError, match="expected"):
        WatchSettings(**wrong)


def test_a_sample_without_accepted_parts_is_refused() -> None:
    """There is nothing to compare with."""
    with pytest.raises(ValueError, match="accepted"):
        Watch([10.0], THRESHOLD)
