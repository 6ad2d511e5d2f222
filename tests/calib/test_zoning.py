"""Several thresholds under one promise: what they cost, and that the line adds up as the sample did."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.scoring import Scored
from calib.threshold import allowed_exceedances
from calib.zoning import cut_blocks, fit_zones, offset_to, parts_for_zones, require_zone_parts
from edge.bundle import Zone
from edge.errors import CalibrationError
from edge.stages.watch import Watch, WatchSettings

ASKED = {"false_rejects": 0.01, "confidence": 0.95}
CORNERS = (((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)),)
ZONES = (Zone("busy", CORNERS), Zone("quiet", CORNERS))


def sample_of(peaks: np.ndarray) -> Scored:
    scored = Scored()
    for part, row in enumerate(peaks):
        scored.zones[str(part)] = row.astype(np.float32).astype(np.float64)
    return scored


def peaks_of(rng: np.random.Generator, parts: int) -> np.ndarray:
    """A busy zone and a quiet one that share what is random."""
    common = rng.normal(size=parts)
    return np.stack([10 + common + rng.gumbel(size=parts), 0.1 * common + 0.1 * rng.normal(size=parts)], axis=1)


@pytest.mark.parametrize(("zones", "parts"), [(1, 299), (2, 473), (3, 628)])
def test_each_threshold_costs_one_exceedance(zones: int, parts: int) -> None:
    """With so many parts they are admitted, with one fewer not."""
    assert parts_for_zones(zones, **ASKED) == parts
    assert allowed_exceedances(parts, **ASKED) == zones - 1
    require_zone_parts(parts, zones, **ASKED)
    with pytest.raises(CalibrationError, match=f"{parts:,}|299"):
        require_zone_parts(parts - 1, zones, **ASKED)


def test_blocks_are_cut_in_turns() -> None:
    """The part that is highest in the first zone, then the highest of the others in the second, and again."""
    peaks = np.array([[9.0, 9.0], [8.0, 1.0], [7.0, 8.0], [1.0, 7.0]])

    assert cut_blocks(peaks, 2).tolist() == [9.0, 8.0]
    assert cut_blocks(peaks, 3).tolist() == [8.0, 8.0]


def test_no_more_of_the_sample_lie_above_than_are_allowed() -> None:
    """And one threshold serves both zones once their offsets are added."""
    fitted, zones, scores = fit_zones(sample_of(peaks_of(np.random.default_rng(0), 700)), ZONES, **ASKED)

    assert fitted.exceedances <= fitted.allowed_exceedances == allowed_exceedances(700, **ASKED)
    assert sum(score > fitted.threshold for score in scores) == fitted.exceedances
    assert zones[0].offset == 0.0 and zones[1].offset > 5


@given(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32))
def test_the_part_that_sets_a_zones_threshold_is_not_rejected(common: float, own: float) -> None:
    """The line adds in float32, which may round up: the offset gives way."""
    common, own = max(common, own), min(common, own)

    assert np.float32(own) + np.float32(offset_to(common, own)) <= common


def test_the_watch_keeps_its_promise_though_offsets_were_fitted_on_its_sample() -> None:
    """Two hundred parts between false alarms are promised; forty lines of clean parts alarm after more on average."""
    times = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        fitted, zones, scores = fit_zones(sample_of(peaks_of(rng, 473)), ZONES, **ASKED)
        live = (peaks_of(rng, 3000) + [zone.offset for zone in zones]).max(axis=1)
        watch = Watch(scores, fitted.threshold, WatchSettings(200, 0.05))
        times.append(next((n for n, score in enumerate(live.tolist(), 1) if watch.observe(score)), 3000))

    assert np.mean(times) >= 200
