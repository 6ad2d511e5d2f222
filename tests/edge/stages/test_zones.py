"""Zones: what lies in none is not inspected, and one threshold serves them all."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundle import MapGeometry, Zone
from edge.errors import BundleError
from edge.stages.segment import Segment
from edge.stages.zones import Zones
from edge.types import AnomalyMap, FrameId, Roi

SIZE = (16, 64)
GEOMETRY = MapGeometry(4, 8, stride=4.0, offset_y=1.5, offset_x=1.5)
LEFT = Zone("left", (((10.0, 0.0), (26.0, 0.0), (26.0, 16.0), (10.0, 16.0)),))
RIGHT = Zone("right", (((26.0, 0.0), (42.0, 0.0), (42.0, 8.0), (26.0, 8.0)),), offset=2.0)


def a_map(scores: NDArray[np.float32]) -> AnomalyMap:
    """Cells of 4 px from frame pixel (10, 0) on."""
    roi = Roi(10.0, 0.0, 4.0 * scores.shape[1], 4.0 * scores.shape[0])
    return AnomalyMap(FrameId("cam", 1, 0, 0), scores, float(scores.max()), roi, roi)


def test_each_zone_has_its_offset_and_the_rest_is_low() -> None:
    """A cell belongs where its center lies; the score is that of what is inspected."""
    scores = np.ones((4, 8), np.float32)
    scores[3, 7] = 9.0  # in no zone

    moved = Zones([LEFT, RIGHT], GEOMETRY)(a_map(scores), SIZE)

    assert moved.score == 3.0 and moved.scores[3, 7] == 1.0
    assert (moved.scores[:, :4] == 1.0).all() and (moved.scores[:2, 4:] == 3.0).all()


def test_no_region_is_reported_where_nothing_is_inspected() -> None:
    """Nor does one grow out of a zone by interpolation."""
    scores = np.zeros((4, 8), np.float32)
    scores[2:, 4:] = 9.0

    assert Segment(2.5, 1)(Zones([LEFT, RIGHT], GEOMETRY)(a_map(scores), SIZE), (16, 64)) == ()
    assert Segment(2.5, 1)(a_map(scores), (16, 64)) != ()  # control: without zones


def test_the_first_zone_that_holds_a_cell_has_it() -> None:
    """The same polygon twice: the second has nothing left."""
    again = Zone("again", LEFT.rings_xy, offset=5.0)
    zones, anomaly_map = Zones([LEFT, again], GEOMETRY), a_map(np.ones((4, 8), np.float32))

    assert zones(anomaly_map, SIZE).score == 1.0
    assert zones.peaks(anomaly_map).tolist() == [1.0, -np.inf]


def test_a_polygon_with_a_notch_is_as_drawn() -> None:
    """Even-odd: the cells in the notch are outside."""
    notched = Zone("u", (((10, 0), (42, 0), (42, 16), (30, 16), (30, 4), (22, 4), (22, 16), (10, 16)),))

    labels = Zones([notched], GEOMETRY).labels(a_map(np.zeros((4, 8), np.float32)))

    assert (labels[0] == 0).all() and (labels[1:, 3:5] == -1).all() and (labels[1:, :3] == 0).all()


def test_the_grid_is_placed_anew_for_another_region() -> None:
    """What is remembered is that of the last picture."""
    zones, scores = Zones([LEFT], GEOMETRY), np.ones((4, 8), np.float32)
    first = zones.labels(a_map(scores)).copy()
    elsewhere = AnomalyMap(FrameId("cam", 1, 1, 0), scores, 1.0, Roi(0, 0, 32, 16), Roi(0, 0, 32, 16))

    assert (zones.labels(elsewhere) != first).any() and (zones.labels(a_map(scores)) == first).all()


def test_zones_elsewhere_than_the_picture_are_an_error_and_no_verdict() -> None:
    """Nothing of it was inspected."""
    far = Zone("far", (((1000, 0), (1010, 0), (1010, 10)),))

    with pytest.raises(BundleError, match="far"):
        Zones([far], GEOMETRY)(a_map(np.ones((4, 8), np.float32)), SIZE)


def test_a_score_that_is_no_maximum_cannot_have_zones() -> None:
    """A mean over part of a map is another figure."""
    mean = MapGeometry(4, 8, stride=4.0, offset_y=1.5, offset_x=1.5, reduction="mean")

    with pytest.raises(BundleError, match="mean"):
        Zones([LEFT], mean)
    assert Zones([], mean)(a_map(np.ones((4, 8), np.float32)), SIZE).score == 1.0
