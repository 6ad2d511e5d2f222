"""AnomalyMap -> regions: cells lie where the geometry says, and nothing is reported where nothing was looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge import masks
from edge.stages import segment
from edge.stages.segment import MAX_REGIONS, Segment, render_map
from edge.types import AnomalyMap, FrameId, Roi

WHOLE = Roi(0.0, 0.0, 80.0, 60.0)
SIZE = (60, 80)


def anomaly_map(scores: Any, roi: Roi = WHOLE, extent: Roi | None = None) -> AnomalyMap:
    scores = np.array(scores, np.float32)
    return AnomalyMap(FrameId("cam", 1, 0, 0), scores, float(scores.max()), roi, extent or roi)


def slow_render(given: AnomalyMap, size: tuple[int, int]) -> NDArray[np.float64]:
    """From the definition, by np.interp along one axis and then the other; it clamps outside by itself."""
    rows, columns = given.scores.shape
    centers_y = given.roi.y + (np.arange(rows) + 0.5) * given.roi.height / rows
    centers_x = given.roi.x + (np.arange(columns) + 0.5) * given.roi.width / columns
    y, x = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    wide = np.array([np.interp(x, centers_x, row) for row in given.scores.astype(float)])
    return np.array([np.interp(y, centers_y, column) for column in wide.T]).T


@st.composite
def maps(draw: st.DrawFn) -> AnomalyMap:
    """Maps of any shape whose rectangle lies anywhere, beyond the frame too, with an extent of its own."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scores = rng.random((rows, columns)) ** draw(st.sampled_from([1, 8]))

    def rectangle() -> Roi:
        place, side = st.floats(-40, 60), st.floats(5, 120)
        return Roi(draw(place), draw(place), draw(side), draw(side))

    return anomaly_map(scores, rectangle(), rectangle())


@settings(max_examples=200, deadline=None)
@given(maps())
def test_a_rendered_map_is_bilinear_between_cell_centers(given: AnomalyMap) -> None:
    """Against the definition, to 1e-4; outside the centers the nearest cell's value goes on."""
    assert np.abs(render_map(given, SIZE) - slow_render(given, SIZE)).max() < 1e-4


def test_cells_taken_for_corners_instead_of_centers_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: half a cell off, the usual mistake in resizing maps."""
    given = anomaly_map(np.random.default_rng(1).random((6, 8)))
    honest = segment._between_cells
    monkeypatch.setattr(
        segment, "_between_cells",
        lambda first, stop, origin, length, cells: honest(first, stop, origin - length / cells / 2, length, cells),
    )  # fmt: skip

    assert np.abs(render_map(given, SIZE) - slow_render(given, SIZE)).max() > 0.05


@settings(max_examples=200, deadline=None)
@given(maps())
def test_rendering_never_exceeds_the_cells(given: AnomalyMap) -> None:
    """Rounding must not lift a pixel over a threshold that no cell exceeds."""
    rendered = render_map(given, SIZE)

    assert rendered.max() <= given.scores.max() and rendered.min() >= given.scores.min()


@settings(max_examples=300, deadline=None)
@given(maps(), st.floats(0.0, 1.0), st.integers(1, 60))
def test_segmenting_only_near_hot_cells_changes_nothing(given: AnomalyMap, threshold: float, min_area_px: int) -> None:
    """The stage renders a small rectangle; rendering it all and masking what was not inspected says the same."""
    rendered = render_map(given, SIZE)
    y, x = np.arange(SIZE[0]) + 0.5, np.arange(SIZE[1]) + 0.5
    extent = given.extent
    seen_x, seen_y = ((axis >= at) & (axis < at + side) for axis, at, side in (
        (x, extent.x, extent.width), (y, extent.y, extent.height)
    ))  # fmt: skip
    seen = seen_y[:, None] & seen_x
    expected = masks.regions(np.where(seen, rendered, np.float32(-1)), threshold, min_area_px=min_area_px)
    found = Segment(threshold, min_area_px)(given, SIZE)

    assert [(r.box_xyxy, r.area_px, r.peak) for r in found] == [(r.box_xyxy, r.area_px, r.peak) for r in expected]
    assert all(np.array_equal(a.mask.runs, b.mask.runs) for a, b in zip(found, expected, strict=True))


def test_the_usual_frame_is_neither_rendered_nor_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Almost every part is good; a look at the map is all it may cost."""
    given = anomaly_map(np.full((57, 57), 0.5))
    assert Segment(0.4, 1)(given, SIZE)  # the control: it would be rendered
    monkeypatch.setattr(segment, "_render", None)

    assert Segment(0.5, 1)(given, SIZE) == ()


def test_a_hot_cell_becomes_a_region_around_its_center() -> None:
    """One cell of 10 x 10 px over half its height: a diamond-like spot on the cell, in frame coordinates."""
    scores = np.zeros((6, 8))
    scores[2, 5] = 1.0
    (region,) = Segment(0.5, 1)(anomaly_map(scores), SIZE)
    x0, y0, x1, y1 = region.box_xyxy

    assert (x0 + x1, y0 + y1) == (110, 50) and 20 < region.area_px < 100 and 0.85 < region.peak <= 1.0
    assert region.mask.to_mask().shape == SIZE and region.mask.box_xyxy == region.box_xyxy


def test_a_hot_rim_reaches_the_frames_edge_but_not_beyond_what_was_inspected() -> None:
    """Cells begin inside the model's rectangle: a hot rim cell stands for the rim, as far as was inspected."""
    scores = np.zeros((4, 4))
    scores[0, 0] = 1.0
    cells = Roi(15.0, 15.0, 40.0, 40.0)
    (whole,) = Segment(0.5, 1)(anomaly_map(scores, cells, WHOLE), SIZE)
    (part,) = Segment(0.5, 1)(anomaly_map(scores, cells, Roi(10.0, 12.0, 50.0, 45.0)), SIZE)

    assert whole.box_xyxy[:2] == (0, 0) and part.box_xyxy[:2] == (10, 12)
    assert whole.box_xyxy[2:] == part.box_xyxy[2:]


def test_a_flaw_outside_what_was_inspected_is_not_reported() -> None:
    """What a kept aspect mirrors into the model is not on the part."""
    scores = np.zeros((6, 8))
    scores[0, 4] = 1.0

    assert Segment(0.5, 1)(anomaly_map(scores, WHOLE, Roi(0.0, 30.0, 80.0, 30.0)), SIZE) == ()


def test_of_many_regions_the_biggest_are_kept() -> None:
    """Noise everywhere must not make a verdict of a megabyte."""
    scores = np.zeros((120, 120))
    scores[::4, ::4] = 1.0
    scores[40:44, 40:44] = 1.0
    found = Segment(0.5, 1)(anomaly_map(scores, Roi(0, 0, 480, 480)), (480, 480))

    assert len(found) == MAX_REGIONS
    assert [r.area_px for r in found] == sorted((r.area_px for r in found), reverse=True)


@pytest.mark.parametrize(("threshold", "area"), [(float("nan"), 1), (0.5, 0)])
def test_settings_under_which_nothing_could_be_found_are_refused(threshold: float, area: int) -> None:
    """Nothing is greater than NaN."""
    with pytest.raises(ValueError, match=r"NaN|at least 1"):
        Segment(threshold, area)
