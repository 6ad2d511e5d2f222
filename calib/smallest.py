"""The smallest defect that is found with 90 % probability, at 95 % confidence; nothing assumed about the curve.

Owns the statistics: from hits and trials at each size to one size. Planting and looking is `sizes`'.

At one size, h of n planted defects were found. The probability p of finding one is at least Clopper and Pearson's lower
bound b, where P(Binomial(n, b) >= h) = 1 - confidence (Clopper and Pearson, 1934): 29 of 29, 45 of 46, 59 of 61 show
90 % at 95 % (the "29 of 29" of MIL-HDBK-1823A, Nondestructive evaluation system reliability assessment, 2009).

Over several sizes, each tested at 95 %, some size would pass by luck more often than in 5 %. They are therefore tested
in one order fixed beforehand, from the largest down, and the first that fails ends it: the size reported is the last
that passed. Then whatever the true curve, monotone or not, the probability that a size is reported whose p is below
90 % is at most 5 % (fixed-sequence testing: Maurer, Hothorn and Lehmacher, 1995; it is wrong only if the first size
that is truly below 90 % passes, and that is one test). MIL-HDBK-1823A fits a logistic curve instead, which needs fewer
trials and is right if the curve is logistic; a network's need not be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

from edge.errors import CommandError


@dataclass(frozen=True, slots=True)
class Tried:
    """`hits` of `trials` defects of one `size` were found."""

    size: float
    hits: int
    trials: int


def lower_bound(hits: int, trials: int, *, confidence: float) -> float:
    """The probability that `hits` of `trials` show at least, one-sided; 0 without a hit.

    Raises:
        ValueError: `trials` is not positive or `hits` is not within it.
    """
    if trials < 1 or not 0 <= hits <= trials:
        raise ValueError(f"{hits} of {trials} is no share")
    return 0.0 if hits == 0 else float(special.betaincinv(hits, trials - hits + 1, 1 - confidence))


def shows(tried: Tried, *, probability: float, confidence: float) -> bool:
    """Whether defects of this size are shown to be found with at least `probability`."""
    return lower_bound(tried.hits, tried.trials, confidence=confidence) >= probability


def smallest_found(tried: Sequence[Tried], *, probability: float = 0.9, confidence: float = 0.95) -> float | None:
    """The size reported: going down from the largest, the last one before the first that fails; None if that fails."""
    found = None
    for one in sorted(tried, key=lambda one: -one.size):
        if not shows(one, probability=probability, confidence=confidence):
            break
        found = one.size
    return found


def require_trials(trials: int, *, probability: float, confidence: float) -> None:
    """Refuse a number of trials that could show nothing even if each were a hit.

    Raises:
        CommandError: says how many are needed.
    """
    if not (0 < probability < 1 and 0 < confidence < 1):
        raise CommandError(f"probability {probability} and confidence {confidence}: both lie between 0 and 1")
    needed = 1
    while probability**needed > 1 - confidence:
        needed += 1
    if trials < needed:
        raise CommandError(
            f"--trials {trials}: even if all were found, that shows {probability:.0%} with less than {confidence:.0%} "
            f"confidence; {needed} are needed at least, and each miss allowed costs about {needed // 2} more"
        )
