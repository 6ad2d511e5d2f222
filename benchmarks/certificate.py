"""Does the certificate keep its promise? Simulated calibrations whose true false-reject rate is known.

Each case draws good parts, fits the threshold as `kizu calibrate` does, and asks whether the true rate is above the
certified one. That may happen in at most 1 - CONFIDENCE of all calibrations; `p_value` is the exact binomial test of
that (a small one means that it happens more often). The controls count frames as parts, which they are not, and fail.

    parts       independent parts, one frame each
    frames      five frames a part that share most of what is random; grouped by part
    blocks      a web: every frame depends on its neighbors; spaced blocks
    zones       two zones with thresholds of their own, one promise over both
    *_ungrouped the same frames, each taken for a part

Prints one JSON object; run with `python benchmarks/certificate.py [--calibrations N]`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from calib.threshold import fit_threshold, required_parts
from calib.zoning import cut_blocks, parts_for_zones

RATE, CONFIDENCE = 0.01, 0.95
FRAMES = 5
"""Of one part."""
SHARED = 0.9
"""Standard deviation of what a part's frames share; the rest up to a variance of 1 is each frame's own."""
WINDOW = 20
"""Frames of a web over which neighbors are alike."""
BLOCK = 10
REFERENCE = 400_000
"""Parts from which a true rate is read where no formula gives it: its standard error is 0.00016 at a rate of 1 %."""

Scores = NDArray[np.float64]
Calibration = Callable[[np.random.Generator], bool]
"""One simulated calibration: whether the true rate is above the certified one."""


def parts(rng: np.random.Generator) -> bool:
    """A skewed law, whose tail is known."""
    fitted = fit_threshold(rng.gumbel(size=needed()), false_rejects=RATE, confidence=CONFIDENCE)
    return float(stats.gumbel_r.sf(fitted.threshold)) > RATE


def frames_of(rng: np.random.Generator, number: int) -> Scores:
    """(parts, FRAMES) scores of `number` parts."""
    own = np.sqrt(1 - SHARED**2)
    return SHARED * rng.normal(size=(number, 1)) + own * rng.normal(size=(number, FRAMES))


def frames(rng: np.random.Generator) -> bool:
    """The rate at which a part has a frame above the threshold, by quadrature over what its frames share."""
    fitted = fit_threshold(frames_of(rng, needed()).max(axis=1), false_rejects=RATE, confidence=CONFIDENCE)
    return part_rate(fitted.threshold) > RATE


def frames_ungrouped(rng: np.random.Generator) -> bool:
    """As many frames as parts are needed; the promise would be about frames, and even that one is broken."""
    scores = frames_of(rng, -(-needed() // FRAMES)).ravel()[: needed()]
    fitted = fit_threshold(scores, false_rejects=RATE, confidence=CONFIDENCE)
    return float(stats.norm.sf(fitted.threshold)) > RATE


def part_rate(threshold: float) -> float:
    """P(a part's highest frame is above `threshold`)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    below = stats.norm.cdf((threshold - SHARED * nodes) / np.sqrt(1 - SHARED**2)) ** FRAMES
    return float(1 - (weights * below).sum() / weights.sum())


def web(rng: np.random.Generator, length: int) -> Scores:
    """A moving average: frames WINDOW or more apart are independent."""
    noise = np.cumsum(np.append(0.0, rng.normal(size=length + WINDOW - 1)))
    return (noise[WINDOW:] - noise[:-WINDOW]) / np.sqrt(WINDOW)


def block_maxima(scores: Scores, block: int, gap: int) -> Scores:
    """As `calib.parts` cuts them: the last one only if it is whole."""
    period = block + gap
    whole = (len(scores) - block) // period + 1
    padded = np.append(scores, np.zeros(period))[: whole * period].reshape(whole, period)
    return padded[:, :block].max(axis=1)


class Blocks:
    """Spaced blocks of a web, whose true rate is read from a long one."""

    def __init__(self, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        self._blocks = np.sort(block_maxima(web(rng, REFERENCE * BLOCK), BLOCK, 0))

    def spaced(self, rng: np.random.Generator) -> bool:
        """The promise is about blocks, and kept."""
        scores = web(rng, needed() * (BLOCK + WINDOW))
        fitted = fit_threshold(block_maxima(scores, BLOCK, WINDOW), false_rejects=RATE, confidence=CONFIDENCE)
        return above(self._blocks, fitted.threshold) > RATE

    def ungrouped(self, rng: np.random.Generator) -> bool:
        """Frames in a row, each taken for a part; even the promise about frames is broken."""
        fitted = fit_threshold(web(rng, needed()), false_rejects=RATE, confidence=CONFIDENCE)
        return float(stats.norm.sf(fitted.threshold)) > RATE


class TwoZones:
    """A busy zone and a quiet one that go up and down together."""

    def __init__(self, seed: int = 2) -> None:
        self._reference = self._peaks(np.random.default_rng(seed), REFERENCE)

    @staticmethod
    def _peaks(rng: np.random.Generator, number: int) -> Scores:
        common = rng.normal(size=number)
        return np.stack([10 + common + rng.gumbel(size=number), 0.1 * common + 0.1 * rng.normal(size=number)], axis=1)

    def __call__(self, rng: np.random.Generator) -> bool:
        """As many parts as two thresholds need."""
        number = parts_for_zones(2, false_rejects=RATE, confidence=CONFIDENCE)
        thresholds = cut_blocks(self._peaks(rng, number), 2)
        return float((self._reference > thresholds).any(axis=1).mean()) > RATE

    def each_alone(self, rng: np.random.Generator) -> bool:
        """The control: each zone's own maximum of the parts that one threshold needs."""
        thresholds = self._peaks(rng, needed()).max(axis=0)
        return float((self._reference > thresholds).any(axis=1).mean()) > RATE


def needed() -> int:
    """Parts for one threshold."""
    return required_parts(false_rejects=RATE, confidence=CONFIDENCE)


def above(ascending: Scores, threshold: float) -> float:
    """The share that exceeds it."""
    return 1 - float(np.searchsorted(ascending, threshold, side="right")) / len(ascending)


def simulate(case: Calibration, calibrations: int, seed: int = 0) -> dict[str, float]:
    """How often the true rate is above the certified one, and the exact test of that being allowed."""
    rng = np.random.default_rng(seed)
    broken = sum(case(rng) for _ in range(calibrations))
    test = stats.binomtest(broken, calibrations, 1 - CONFIDENCE, alternative="greater")
    return {"calibrations": calibrations, "broken": broken, "share": broken / calibrations, "p_value": test.pvalue}


def cases() -> tuple[dict[str, Calibration], dict[str, Calibration]]:
    """Those that must hold, and the controls that must not."""
    blocks, zones = Blocks(), TwoZones()
    kept: dict[str, Calibration] = {"parts": parts, "frames": frames, "blocks": blocks.spaced, "zones": zones}
    controls: dict[str, Calibration] = {
        "frames_ungrouped": frames_ungrouped,
        "blocks_ungrouped": blocks.ungrouped,
        "zones_each_alone": zones.each_alone,
    }
    return kept, controls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibrations", type=int, default=1000)
    given = parser.parse_args()
    kept, controls = cases()
    found: dict[str, Any] = {"rate": RATE, "confidence": CONFIDENCE, "parts_needed": needed()}
    for name, case in {**kept, **controls}.items():
        found[name] = simulate(case, given.calibrations)
    found["ok"] = all(found[name]["p_value"] > 0.01 for name in kept) and all(
        found[name]["p_value"] < 1e-6 for name in controls
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
