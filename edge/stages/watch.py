"""Watch: does a certificate still hold? A sequential test on the scores of live parts, part by part.

Owns the test and what it may be wrong about; what follows from an alarm is the daemon's, and where its parameters come
from is `benchmarks/drift.py`. NumPy only.

Two things are bet against, with e-values, so that a look after every part costs nothing (Shin, Ramdas and Rinaldo 2023,
"E-detectors"):

* accepted parts score like the sample's accepted parts: the rank of each among all before it, sample and live together,
  is uniform and independent if so (online conformal p-values, Vovk et al. 2005, ch. 2), whatever the scores' law. A
  fixed sample would not do: its p-values deviate from uniform by 1 / sqrt(n), which a test that never ends finds.
* no more than `reject_share` of all parts are rejected, good and bad together. A drift that rejects every part leaves
  no accepted one to look at.

A bet's factor f(p) averages 1 over uniform p, so R <- (R + 1) f(p) (Shiryaev-Roberts) grows by 1 a part at most on
average, and the mean number of parts until R reaches A is at least A, for any mixture of bets.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

EXPONENTS: Final = (0.2, 0.4, 0.6, 0.8)
"""Power bets e p^(e - 1) on small p, and as many on large p: the smaller, the more is bet on the ends."""

REJECT_FACTORS: Final = (1.5, 2.0, 4.0, 8.0)
"""Bets that rejects are this much more frequent than allowed."""

MAX_SCORES: Final = 200_000
"""Scores kept of one camera; after that the ranks are taken among these, whose deviation is below 1 / 400."""

_LARGEST: Final = 1e300


class Alarm(StrEnum):
    """What no longer holds."""

    SCORES = "scores"
    REJECTS = "rejects"


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """`parts_between_false_alarms`: on average at least this many while everything holds. `reject_share`: parts that
    may be rejected, good and bad together, before the certificate is doubted.

    Raises:
        ValueError: a number is out of range.
    """

    parts_between_false_alarms: float = 1e7
    reject_share: float = 0.05

    def __post_init__(self) -> None:
        if not self.parts_between_false_alarms >= 100:
            raise ValueError(f"parts_between_false_alarms is {self.parts_between_false_alarms}, expected at least 100")
        if not 0 < self.reject_share < 1 / max(REJECT_FACTORS):
            raise ValueError(f"reject_share is {self.reject_share}, expected between 0 and {1 / max(REJECT_FACTORS)}")


class Watch:
    """One camera's test against the scores of the good parts that its certificate stands on.

    `scores` (n,) raw, any order; `threshold` is the certified one. Deterministic: ties are broken by a generator of
    `seed`.

    Raises:
        ValueError: no score is at or below the threshold.
    """

    def __init__(
        self, scores: Sequence[float], threshold: float, settings: WatchSettings | None = None, *, seed: int = 0
    ) -> None:
        self.settings = settings or WatchSettings()
        self.parts = 0
        """Parts observed."""
        self.alarm: Alarm | None = None
        """Set once, at the first alarm; an alarm is not taken back."""
        self._threshold = threshold
        # Doubles in one block: insertion moves memory, and 200,000 of them take 0.02 ms.
        self._seen = array("d", sorted(score for score in scores if score <= threshold))
        if not self._seen:
            raise ValueError("the watch needs scores of accepted good parts; the sample has none")
        self._random = np.random.default_rng(seed)
        self._score_bets = np.zeros(2 * len(EXPONENTS))
        self._reject_bets = np.zeros(len(REJECT_FACTORS))
        # Two tests share the false alarms that are allowed.
        self._limit = 2 * self.settings.parts_between_false_alarms

    @property
    def evidence(self) -> float:
        """How far the stronger of both tests is: 0 at the start, 1 at the alarm, on a logarithmic scale."""
        strongest = max(float(self._score_bets.mean()), float(self._reject_bets.mean()))
        return min(1.0, max(0.0, math.log1p(strongest) / math.log1p(self._limit)))

    def observe(self, score: float) -> Alarm | None:
        """Look at one more part's raw `score`; the alarm that it raised, None almost always."""
        if self.alarm is not None or not math.isfinite(score):
            return None
        self.parts += 1
        rejected = score > self._threshold
        self._bet_on_rejects(rejected)
        if not rejected:
            self._bet_on_scores(self._p_value(score))
        if self._reject_bets.mean() >= self._limit:
            self.alarm = Alarm.REJECTS
        elif self._score_bets.mean() >= self._limit:
            self.alarm = Alarm.SCORES
        return self.alarm

    def _p_value(self, score: float) -> float:
        """Smoothed, in (0, 1): uniform under exchangeability, ties included."""
        above = len(self._seen) - bisect_right(self._seen, score)
        equal = len(self._seen) - above - bisect_left(self._seen, score)
        p = (above + self._random.uniform() * (equal + 1)) / (len(self._seen) + 1)
        if len(self._seen) < MAX_SCORES:
            insort(self._seen, score)
        return float(min(max(p, 1e-12), 1 - 1e-12))

    def _bet_on_scores(self, p: float) -> None:
        exponents = np.array(EXPONENTS)
        factors = np.concatenate([exponents * p ** (exponents - 1), exponents * (1 - p) ** (exponents - 1)])
        self._score_bets = _grown(self._score_bets, factors)

    def _bet_on_rejects(self, rejected: bool) -> None:
        allowed = self.settings.reject_share
        claimed = allowed * np.array(REJECT_FACTORS)
        self._reject_bets = _grown(self._reject_bets, claimed / allowed if rejected else (1 - claimed) / (1 - allowed))


def _grown(bets: NDArray[np.float64], factors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.minimum((bets + 1) * factors, _LARGEST)
