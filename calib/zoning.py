"""Thresholds of zones: one promise over all of them, from one sample.

Owns the statistics of several thresholds at once; reading zones is `zone_files`, applying them `edge.stages.zones`.

A good part must not exceed any zone's threshold. Take the part that scores highest in the first zone out of the sample
and let its score be that zone's threshold, then the highest of the rest in the second zone, and so on in turns: each
step cuts off one block, and m + 1 cut-off blocks hold a new part with a probability that follows Beta(m + 1, n - m),
whatever the scores' joint distribution (Wald 1943; Tukey 1947, "statistically equivalent blocks"). So k zones need as
many parts as k - 1 allowed exceedances do of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from calib.scoring import Scored
from calib.threshold import FittedThreshold, allowed_exceedances, certified_rate, percent, require_parts, required_parts
from edge.bundle import Zone
from edge.errors import CalibrationError


def parts_for_zones(zones: int, *, false_rejects: float, confidence: float) -> int:
    """Return how many good parts `zones` thresholds need: 299, 473, 628 for one, two, three at 1 % and 95 %."""
    low = required_parts(false_rejects=false_rejects, confidence=confidence)
    high = low * (zones + 1)
    while _blocks(high, false_rejects, confidence) < zones:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        if _blocks(middle, false_rejects, confidence) >= zones:
            high = middle
        else:
            low = middle + 1
    return low


def require_zone_parts(parts: int, zones: int, *, false_rejects: float, confidence: float) -> None:
    """Refuse a sample too small for thresholds of that many zones.

    Raises:
        CommandError: a value is not strictly between 0 and 1.
        CalibrationError: there are too few; says how many are needed.
    """
    require_parts(parts, false_rejects=false_rejects, confidence=confidence)
    needed = parts_for_zones(zones, false_rejects=false_rejects, confidence=confidence)
    if parts < needed:
        raise CalibrationError(
            f"at most {percent(false_rejects)} false rejects with {percent(confidence)} confidence over {zones} zones "
            f"needs at least {needed:,} good parts, but {parts:,} were given; this sample supports "
            f"{_blocks(parts, false_rejects, confidence)} zones: add {needed - parts:,} good parts, or draw fewer zones"
        )


def fit_zones(
    scored: Scored, zones: Sequence[Zone], *, false_rejects: float, confidence: float
) -> tuple[FittedThreshold, tuple[Zone, ...], list[float]]:
    """Return the common threshold, the zones with their offsets to it, and the parts' scores under them.

    Raises:
        CalibrationError: too few parts, or a zone holds no cell of the map.
    """
    peaks = np.array(list(scored.zones.values()))  # (parts, zones)
    for place, zone in enumerate(zones):
        if not np.isfinite(peaks[:, place]).all():
            raise CalibrationError(
                f"zone {zone.name!r} holds no cell of the map that no zone before it has; make it larger, or take it "
                "out"
            )
    parts = len(peaks)
    require_zone_parts(parts, len(zones), false_rejects=false_rejects, confidence=confidence)
    allowed = allowed_exceedances(parts, false_rejects=false_rejects, confidence=confidence)
    thresholds = cut_blocks(peaks, allowed + 1)
    common = float(thresholds.max())
    placed = tuple(
        msgspec.structs.replace(zone, offset=offset_to(common, float(own)))
        for zone, own in zip(zones, thresholds, strict=True)
    )
    offsets = np.array([zone.offset for zone in placed], np.float32)
    scores = (peaks.astype(np.float32) + offsets).max(axis=1).astype(np.float64)  # as the line adds them
    fitted = FittedThreshold(
        threshold=common,
        rank=parts - allowed,
        n=parts,
        allowed_exceedances=allowed,
        exceedances=int(np.count_nonzero((peaks > thresholds).any(axis=1))),
        false_rejects=false_rejects,
        confidence=confidence,
        certified_rate=min(false_rejects, certified_rate(allowed, parts, confidence=confidence)),
    )
    return fitted, placed, scores.tolist()


def cut_blocks(peaks: NDArray[np.float64], blocks: int) -> NDArray[np.float64]:
    """Return the thresholds (zones,) that are left after cutting `blocks` blocks off `peaks` (parts, zones) in turns.

    The turns are fixed before a score is seen; that is what the promise needs.
    """
    left = np.ones(len(peaks), bool)
    thresholds = np.full(peaks.shape[1], np.inf)
    for turn in range(blocks):
        zone = turn % peaks.shape[1]
        part = int(np.argmax(np.where(left, peaks[:, zone], -np.inf)))
        thresholds[zone] = peaks[part, zone]
        left[part] = False
    return thresholds


def offset_to(common: float, own: float) -> float:
    """What brings a zone's `own` threshold to the `common` one, rounded so that the line's float32 sum stays below."""
    offset = np.float32(common - own)
    while np.float32(own) + offset > common:
        offset = np.nextafter(offset, np.float32(-np.inf))
    return float(offset)


def _blocks(parts: int, false_rejects: float, confidence: float) -> int:
    return allowed_exceedances(parts, false_rejects=false_rejects, confidence=confidence) + 1
