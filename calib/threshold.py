"""Thresholds with a promise: an order statistic of good scores bounds the false-reject rate, with a stated confidence.

Owns the statistics; which parts count and what is written is `certificate`. Nothing is assumed about the scores'
distribution, only that the sample's good parts and tomorrow's are drawn alike and independently.

A part is rejected when its score is greater than the threshold. If the threshold is the (m + 1)-th largest of n good
scores, the rate R at which good parts exceed it follows Beta(m + 1, n - m) when scores never tie, and is lower when
they do, so

    P(R <= rate) >= I_rate(m + 1, n - m) = P(Binomial(n, rate) > m)

whatever the distribution (Wilks, 1941; the bound is Clopper and Pearson's, 1934). `fit_threshold` takes the largest m
for which this is at least the confidence: the lowest threshold that keeps the promise, hence the fewest escapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from edge.errors import CalibrationError, CommandError

SLACK = 1e-12
"""Rounding allowed in a probability, so that a sample of exactly the required size is not refused."""


@dataclass(frozen=True, slots=True)
class FittedThreshold:
    """A threshold and what it stands on.

    `threshold` is the `rank`-th smallest (from 1) of `n` good scores, raw. `allowed_exceedances` = n - rank sample
    scores may lie above it; `exceedances` do (fewer when scores tie). With probability `confidence` at most
    `certified_rate` <= `false_rejects` of good parts will be rejected.
    """

    threshold: float
    rank: int
    n: int
    allowed_exceedances: int
    exceedances: int
    false_rejects: float
    confidence: float
    certified_rate: float


def fit_threshold(scores: ArrayLike, *, false_rejects: float, confidence: float) -> FittedThreshold:
    """Return the lowest of `scores` (n,) that keeps the reject rate of good parts <= `false_rejects` with `confidence`.

    Raises:
        CommandError: `false_rejects` or `confidence` is not strictly between 0 and 1.
        CalibrationError: a score is not finite, or there are too few; the message says how many are needed, and which
            rate this sample supports.
    """
    good = np.asarray(scores, dtype=np.float64)
    if good.ndim != 1:
        raise ValueError(f"good scores are one-dimensional, not {good.shape}")
    broken = int(np.count_nonzero(~np.isfinite(good)))
    if broken:
        raise CalibrationError(
            f"{broken} of {good.size} good scores are NaN or infinite; a threshold needs finite ones: "
            "run `kizu verify` on the bundle"
        )
    require_parts(good.size, false_rejects=false_rejects, confidence=confidence)
    allowed = allowed_exceedances(good.size, false_rejects=false_rejects, confidence=confidence)
    rank = good.size - allowed
    threshold = float(np.partition(good, rank - 1)[rank - 1])
    return FittedThreshold(
        threshold=threshold,
        rank=rank,
        n=good.size,
        allowed_exceedances=allowed,
        exceedances=int(np.count_nonzero(good > threshold)),
        false_rejects=false_rejects,
        confidence=confidence,
        certified_rate=min(false_rejects, certified_rate(allowed, good.size, confidence=confidence)),
    )


def required_parts(*, false_rejects: float, confidence: float) -> int:
    """Return how many good parts are needed at least: 299, 2,995, 29,956 for 1, 0.1, 0.01 % at 95 %.

    The smallest n with 1 - (1 - rate)^n >= confidence.

    Raises:
        CommandError: a value is not strictly between 0 and 1.
    """
    _check(false_rejects, confidence)
    exact = math.log1p(-confidence) / math.log1p(-false_rejects)
    return max(1, math.ceil(exact - SLACK * exact))


def supported_rate(parts: int, *, confidence: float) -> float:
    """Return the lowest false-reject rate that `parts` good parts can certify: 1 - (1 - confidence)^(1 / parts)."""
    return -math.expm1(math.log1p(-confidence) / parts)


def allowed_exceedances(parts: int, *, false_rejects: float, confidence: float) -> int:
    """Return the largest m with P(Binomial(parts, false_rejects) > m) >= confidence, or -1 if there is none."""
    above = np.arange(parts, dtype=np.float64)
    kept = special.betainc(above + 1, parts - above, false_rejects) >= confidence - SLACK
    return int(np.count_nonzero(kept)) - 1  # the probability falls with m, so the kept ones come first


def certified_rate(exceedances: int, parts: int, *, confidence: float) -> float:
    """Return Clopper and Pearson's upper bound of a rate seen `exceedances` times in `parts`, one-sided."""
    if exceedances >= parts:
        return 1.0
    return float(special.betaincinv(exceedances + 1, parts - exceedances, confidence))


def require_parts(parts: int, *, false_rejects: float, confidence: float) -> None:
    """Refuse a sample too small for the promise, before any work is spent on it.

    Raises:
        CommandError: a value is not strictly between 0 and 1.
        CalibrationError: there are fewer than `required_parts`.
    """
    needed = required_parts(false_rejects=false_rejects, confidence=confidence)
    if parts >= needed:
        return
    asked = f"at most {percent(false_rejects)} false rejects with {percent(confidence)} confidence"
    if parts == 0:
        raise CalibrationError(
            f"no good parts were given; {asked} needs at least {needed:,}: take pictures of {needed:,} good parts"
        )
    supported = percent_up(supported_rate(parts, confidence=confidence))
    raise CalibrationError(
        f"{asked} needs at least {needed:,} good parts, but {parts:,} were given; "
        f"this sample supports {supported} or more: "
        f"add {needed - parts:,} good {'part' if needed - parts == 1 else 'parts'}, or run the command with "
        f"`--false-rejects {supported}`"
    )


def parse_rate(text: str, option: str) -> float:
    """Return the rate written as a share (`0.01`) or in percent (`1%`).

    Raises:
        CommandError: it is neither, or not strictly between 0 and 1.
    """
    stripped = text.strip()
    number, scale = (stripped[:-1], 100.0) if stripped.endswith("%") else (stripped, 1.0)
    try:
        rate = float(number) / scale
    except ValueError:
        rate = math.nan
    if not 0.0 < rate < 1.0:
        raise CommandError(f"{option} {text!r}: expected a share strictly between 0 and 1, such as 0.01 or 1%")
    return rate


def percent(rate: float) -> str:
    """Return a rate in percent with up to four significant digits, such as `0.01%`."""
    return f"{100 * rate:.4g}%"


def percent_up(rate: float) -> str:
    """Return `rate` in percent, rounded up to two digits (more only near 100 %), so that a sample still supports it."""
    scaled = 100 * rate
    for digits in range(2, 16):
        unit = 10.0 ** (math.floor(math.log10(scaled)) + 1 - digits)
        rounded = math.ceil(scaled / unit) * unit
        if rounded < 100:
            return f"{rounded:.{digits}g}%"
    raise CommandError(
        f"no rate below 100% is supported with that confidence (the sample's is {scaled!r}%); lower the confidence"
    )


def _check(false_rejects: float, confidence: float) -> None:
    for name, value in (("false-reject rate", false_rejects), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise CommandError(
                f"the {name} is {value}; expected a share strictly between 0 and 1, such as 0.01 or 0.95"
            )
