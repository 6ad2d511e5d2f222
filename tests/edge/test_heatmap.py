"""The heat map: where the model looked, in colors; the numbers stay the map's."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.heatmap import MAX_SIDE, heatmap_png
from edge.images import cv2
from edge.types import AnomalyMap, FrameId, Roi


def drawn(scores: NDArray[np.float32], frame: tuple[int, int], threshold: float | None = 1.0) -> NDArray[np.uint8]:
    """RGBA of the picture."""
    whole = Roi(0.0, 0.0, float(frame[1]), float(frame[0]))
    png = heatmap_png(AnomalyMap(FrameId("cam", 1, 0, 0), scores, float(scores.max()), whole, whole), frame, threshold)
    decoded = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGRA2RGBA))


def spot(peak: float) -> NDArray[np.float32]:
    scores = np.zeros((8, 10), np.float32)
    scores[2, 7] = peak
    return scores


def test_the_flaw_is_red_and_the_rest_is_seen_through() -> None:
    """At the flaw's place in the frame, not in the map."""
    picture = drawn(spot(4.0), (80, 100))

    red, green, _, alpha = (int(value) for value in picture[25, 75])
    assert picture.shape == (80, 100, 4)
    assert red > 150 and green < 60 and alpha > 200
    assert picture[70, 10, 3] == 0


def test_a_peak_of_a_thousand_thresholds_leaves_the_others_visible() -> None:
    """The scale is logarithmic above the threshold: twice the threshold is not the same as a thousand."""
    scores = spot(1000.0)
    scores[6, 2] = 2.0
    picture = drawn(scores, (80, 100))

    assert 130 <= picture[65, 25, 3] < picture[25, 75, 3]


def test_below_the_threshold_nothing_is_as_strong_as_above() -> None:
    """Control."""
    scores = spot(4.0)
    scores[6, 2] = 0.5
    picture = drawn(scores, (80, 100))

    assert 0 < picture[65, 25, 3] < 130


@pytest.mark.parametrize("threshold", [None, -3.0, 0.0])
def test_without_a_usable_threshold_the_maps_own_range_is_shown(threshold: float | None) -> None:
    """An answer that has none, or raw scores below zero."""
    picture = drawn(spot(4.0), (80, 100), threshold)

    assert picture[25, 75, 3] > 200 and picture[70, 10, 3] == 0


def test_a_flat_map_is_no_division_by_zero() -> None:
    """Nothing to see."""
    assert drawn(np.zeros((8, 10), np.float32), (80, 100), None)[:, :, 3].max() == 0


def test_a_large_frame_gives_a_bounded_picture() -> None:
    """A map is smooth; twenty megapixels of colors tell nothing more."""
    picture = drawn(spot(4.0), (4000, 5000))

    assert max(picture.shape[:2]) == MAX_SIDE and picture[int(0.3 * picture.shape[0]), int(0.75 * MAX_SIDE), 3] > 200
