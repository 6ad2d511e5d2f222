"""An anomaly map as a picture to lay over its frame: transparent where nothing is, then yellow, then red.

Owns colors and scale. The numbers are the map's; this is for eyes only.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from edge.images import cv2
from edge.stages.segment import render_map
from edge.types import AnomalyMap, Roi

MAX_SIDE: Final = 1024
"""Pixels on the longer side: a map is smooth, and a frame of 64 Mpx would be 256 MB of colors."""

# At 0 (the map's own background), 1/2 (the threshold) and 1 (its peak).
_STOPS: Final = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
_BLUE: Final = np.array([40, 30, 20, 30, 60])
_GREEN: Final = np.array([200, 200, 150, 60, 0])
_RED: Final = np.array([250, 250, 255, 235, 170])
_ALPHA: Final = np.array([0, 40, 130, 190, 225])


def heatmap_png(anomaly_map: AnomalyMap, frame_size: tuple[int, int], threshold: float | None) -> bytes:
    """RGBA PNG of the map over a frame of `frame_size` (height, width), at most MAX_SIDE px on a side.

    The color turns to orange at `threshold`: linear from the map's median up to there, logarithmic from there to its
    peak, which may be many thresholds away. Without a threshold, or with one below that median, the middle of the
    map's own range stands for it.
    """
    step = max(1.0, max(frame_size) / MAX_SIDE)
    size = (max(1, round(frame_size[0] / step)), max(1, round(frame_size[1] / step)))
    levels = _levels(render_map(_scaled(anomaly_map, step), size), anomaly_map.scores, threshold)
    colors = np.stack([np.interp(levels, _STOPS, stops) for stops in (_BLUE, _GREEN, _RED, _ALPHA)], axis=-1)
    return bytes(cv2.imencode(".png", np.rint(colors).astype(np.uint8))[1].tobytes())


def _levels(
    values: np.typing.NDArray[np.float32], scores: np.typing.NDArray[np.float32], threshold: float | None
) -> np.typing.NDArray[np.float64]:
    """0 to 1, the threshold at 1/2."""
    low, peak = float(np.median(scores)), float(scores.max())
    middle = (low + peak) / 2 if threshold is None or threshold <= low else threshold
    scale = max(middle - low, 1e-12)
    above = np.maximum((values.astype(np.float64) - low) / scale, 0.0)
    highest = max((peak - low) / scale, 2.0)
    return np.where(above <= 1.0, above / 2, 0.5 + 0.5 * np.log(np.maximum(above, 1.0)) / np.log(highest))


def _scaled(anomaly_map: AnomalyMap, step: float) -> AnomalyMap:
    """The map laid over a frame that is `step` times smaller."""
    if step == 1.0:
        return anomaly_map
    roi, extent = (
        Roi(one.x / step, one.y / step, one.width / step, one.height / step)
        for one in (anomaly_map.roi, anomaly_map.extent)
    )
    return AnomalyMap(anomaly_map.frame_id, anomaly_map.scores, anomaly_map.score, roi, extent)
