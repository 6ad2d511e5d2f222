"""What is said about drift holds on the shipped graph: silence for 100,000 clean parts, and a lamp that is brighter."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.drift import BRIGHTER, DETECTORS, Scores, Watched, delays, false_alarms, real_scores, until_alarm

STATED_DELAY = 300
"""Parts, as docs/calibration.md says."""


@pytest.fixture(scope="module")
def scores() -> tuple[Scores, Scores]:
    """By the demo's own graph, as they are and 10 % brighter."""
    return real_scores(2), real_scores(2, gain=BRIGHTER)


def test_no_certificate_is_voided_in_a_hundred_thousand_clean_parts(scores: tuple[Scores, Scores]) -> None:
    """At the default of one false alarm in ten million parts."""
    assert false_alarms(Watched, scores[0], 1, length=100_000) == 0


def test_ten_percent_more_light_voids_it_within_the_stated_number_of_parts(scores: tuple[Scores, Scores]) -> None:
    """In each of twenty lines, after a thousand clean parts."""
    found = delays(Watched, *scores, before=1_000, runs=20)

    assert (found["early"], found["missed"]) == (0, 0) and found["max"] <= STATED_DELAY


def test_control_the_same_light_voids_nothing(scores: tuple[Scores, Scores]) -> None:
    """Planted: the drift left out."""
    found = delays(Watched, scores[0], scores[0], before=1_000, runs=3)

    assert found["missed"] == 3


def test_control_a_watch_that_allows_more_false_alarms_has_them(scores: tuple[Scores, Scores]) -> None:
    """At one in a hundred parts, twenty lines of two thousand clean parts each alarm again and again."""
    early = false_alarms(lambda sample: Watched(sample, 100), scores[0], 20, length=2_000)

    assert early > 10


@pytest.mark.parametrize("name", ["adwin", "adwin_rare", "martingale"])
def test_the_peers_see_the_drift_too(scores: tuple[Scores, Scores], name: str) -> None:
    """They are run as they are meant to be: what is compared is how soon."""
    rng = np.random.default_rng(3)
    detector = DETECTORS[name](rng.choice(scores[0], 299))

    assert until_alarm(detector, rng.choice(scores[0], 500)) is None
    assert until_alarm(detector, rng.choice(scores[1], 2_000)) is not None
