"""A coarse look before the dense one: at which stride, how much it may miss, and the margin that keeps that promise.

Owns the request, the fit on held-out good tiles, and what the coarse pass costs and saves.  Leaves the statistics to
``calib.threshold``, what is done with the margin to ``edge.bundle.Refine`` and ``edge.engines.refine``, and both
graphs to the method.

The coarse cells are some of the dense ones, so a tile's largest coarse value c is at most its largest dense value m.
With the gate at threshold - margin, a tile with m above the threshold is left out only if its gap m - c exceeds the
margin; the margin is an order statistic of the gaps of good tiles (Wilks, 1941), so with the stated confidence at most
``rate`` of tiles like those are left out wrongly, whatever the threshold is and wherever it is moved.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.threshold import fit_threshold, parse_rate, percent, percent_up, required_parts, supported_rate
from edge.bundle import InputSpec, MapGeometry, ModelBundle, Refine, ScoreCalibration, coarse_bundle
from edge.engines.registry import Backend, open_engine
from edge.errors import CalibrationError, CommandError, TrainingError
from trainer.method import Frames, Method

CONFIDENCE = 0.95
DEFAULT_RATE = 0.001

_COLLECT_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class RefineRequest:
    """What `--refine STRIDE[:RATE]` asks for: a coarse cell every ``stride_px``, and the share that may be missed."""

    stride_px: int
    rate: float = DEFAULT_RATE

    @classmethod
    def parse(cls, text: str) -> RefineRequest:
        """Read ``8``, ``8:0.001`` or ``8:0.1%``.

        Raises:
            CommandError: the stride is no whole number of pixels, or the rate is not strictly between 0 and 1.
        """
        stride, colon, rate = text.partition(":")
        if not stride.strip().isdecimal() or int(stride) < 1:
            raise CommandError(f"--refine {text!r}: expected STRIDE in px, or STRIDE:RATE, such as 4 or 4:0.1%")
        return cls(int(stride), parse_rate(rate, "--refine") if colon else DEFAULT_RATE)


@dataclass(frozen=True, slots=True, eq=False)
class FittedRefine:
    """What goes into the bundle, and what it was fitted on: each good tile's largest coarse cell (n,).

    ``coarse_time_share`` is the time of a coarse pass over that of a dense one, on these tiles.
    """

    refine: Refine
    peaks: NDArray[np.float64]
    coarse_time_share: float

    def refined_share(self, calibration: ScoreCalibration) -> float:
        """The share of these good tiles that is computed densely under the thresholds of ``calibration``."""
        return float(np.mean(~(self.peaks <= self.refine.gate(calibration))))

    def facts(self, calibration: ScoreCalibration) -> dict[str, float]:
        """For the provenance: cost of the coarse pass, share refined, and the speed that follows for good parts."""
        share = self.refined_share(calibration)
        return {
            "coarse_time_share": round(self.coarse_time_share, 4),
            "good_tiles_refined_share": round(share, 4),
            "times_faster_on_good_tiles": round(1 / (self.coarse_time_share + share), 3),
        }


def coarse_geometry(method: Method, spec: InputSpec, request: RefineRequest) -> MapGeometry:
    """The coarse map of ``method``.

    Raises:
        CommandError: the stride is no coarser multiple of the dense one, or the method has no coarse form.
    """
    dense = method.map_geometry(spec.height, spec.width)
    every = request.stride_px / dense.stride
    if every < 2 or every != int(every):
        raise CommandError(
            f"--refine {request.stride_px}: the dense map has a cell every {dense.stride:g} px; expected a multiple of "
            f"that, such as {2 * dense.stride:g}"
        )
    if dense.reduction != "max":
        raise CommandError(
            f"--refine needs an image score that is the map's maximum, and {method.name} has {dense.reduction!r}: "
            "leave the option out"
        )
    return method.map_geometry(spec.height, spec.width, stride=request.stride_px)


def unfitted(geometry: MapGeometry, request: RefineRequest) -> Refine:
    """What a draft says before the margin is known."""
    return Refine(map=geometry, margin=0.0, rate=request.rate, confidence=CONFIDENCE, tiles=1, rank=1)


def require_tiles(tiles: int, request: RefineRequest) -> None:
    """Refuse a sample of held-out good tiles too small for the promise.

    Raises:
        CalibrationError: says how many are needed, and which rate these support.
    """
    needed = required_parts(false_rejects=request.rate, confidence=CONFIDENCE)
    if tiles < needed:
        supported = percent_up(supported_rate(tiles, confidence=CONFIDENCE)) if tiles else "nothing"
        raise CalibrationError(
            f"--refine: that at most {percent(request.rate)} of tiles are missed, with {percent(CONFIDENCE)} "
            f"confidence, needs at least {needed:,} good tiles set aside, but there are {tiles:,}, which support "
            f"{supported}: add good images, set more aside (--holdout), or say "
            f"`--refine {request.stride_px}:{supported}`"
        )


def fit_refine(draft: ModelBundle, frames: Frames, request: RefineRequest, *, backend: Backend) -> FittedRefine:
    """Fit the margin on ``frames`` (n, h, w, C) uint8, good tiles that nothing was learned from.

    Raises:
        CalibrationError: there are too few.
        TrainingError: a score is not finite.
    """
    assert draft.manifest.refine is not None
    require_tiles(len(frames), request)
    dense, dense_s = largest_cells(draft, frames, backend)
    coarse, coarse_s = largest_cells(coarse_bundle(draft), frames, backend)
    gaps = dense - coarse
    if not np.isfinite(gaps).all():
        raise TrainingError("a held-out good image scores NaN or infinite; train again at a lower learning rate")
    fitted = fit_threshold(gaps, false_rejects=request.rate, confidence=CONFIDENCE)
    refine = Refine(
        map=draft.manifest.refine.map,
        margin=max(0.0, fitted.threshold),  # two graphs of the same numbers: a gap of nothing may round to below it
        rate=request.rate,
        confidence=CONFIDENCE,
        tiles=fitted.n,
        rank=fitted.rank,
    )
    return FittedRefine(refine, coarse, coarse_s / dense_s)


def describe(refine: Refine, facts: Mapping[str, Any]) -> str:
    """What the coarse look costs and saves, in one line; ``facts`` are ``FittedRefine.facts``."""
    faster = facts["times_faster_on_good_tiles"]
    worth = f"{faster:.2g} x faster on good parts" if faster > 1 else "SLOWER than without: leave --refine out"
    return (
        f"looks every {refine.map.stride:g} px first, at {percent(facts['coarse_time_share'])} of a dense pass's time, "
        f"then computes {percent(facts['good_tiles_refined_share'])} of good tiles densely: {worth}"
    )


def largest_cells(bundle: ModelBundle, frames: Frames, backend: Backend) -> tuple[NDArray[np.float64], float]:
    """The largest cell of each frame's map by the bundle's own graph (n,), and the seconds that all took."""
    peaks: list[float] = []
    with open_engine(bundle, backend=backend, max_batch=1, refine=False) as engine:
        engine.warmup()
        started = time.perf_counter()
        for place, frame in enumerate(frames):
            if place - len(peaks) == engine.spec.depth:
                peaks.append(float(engine.collect(_COLLECT_TIMEOUT_S)[1].max()))
            engine.submit(np.ascontiguousarray(frame[None]))
        while len(peaks) < len(frames):
            peaks.append(float(engine.collect(_COLLECT_TIMEOUT_S)[1].max()))
        return np.array(peaks), time.perf_counter() - started
