"""An anomaly map as a picture to lay over its frame: transparent where nothing is, then yellow, then red.

Owns colors, scale and outlines. The numbers are the map's; this is for eyes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge.images import cv2
from edge.stages.segment import render_map
from edge.types import AnomalyMap, DefectRegion, Roi

MAX_SIDE: Final = 1024
"""Pixels on the longer side: a map is smooth, and a frame of 64 Mpx would be 256 MB of colors."""

# At 0 (the map's own background), 1/2 (the threshold) and 1 (its peak).
_STOPS: Final = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
_BLUE: Final = np.array([40, 30, 20, 30, 60])
_GREEN: Final = np.array([200, 200, 150, 60, 0])
_RED: Final = np.array([250, 250, 255, 235, 170])
_ALPHA: Final = np.array([0, 40, 130, 190, 225])

_FOUND_RGB: Final = (225, 30, 30)
_KNOWN_RGB: Final = (0, 170, 60)
_GAP: Final = 4


def heatmap_png(anomaly_map: AnomalyMap, frame_size: tuple[int, int], threshold: float | None) -> bytes:
    """RGBA PNG of the map over a frame of `frame_size` (height, width), at most MAX_SIDE px on a side.

    The color turns to orange at `threshold`: linear from the map's median up to there, logarithmic from there to its
    peak, which may be many thresholds away. Without a threshold, or with one below that median, the middle of the
    map's own range stands for it.
    """
    colors = heatmap_bgra(anomaly_map, frame_size, threshold, max_side_px=MAX_SIDE)
    return bytes(cv2.imencode(".png", colors)[1].tobytes())


def heatmap_bgra(
    anomaly_map: AnomalyMap, frame_size: tuple[int, int], threshold: float | None, *, max_side_px: int
) -> NDArray[np.uint8]:
    """(h, w, 4) blue, green, red, alpha: `heatmap_png` before it is encoded, at most `max_side_px` on a side."""
    height, width, step = _shown(frame_size, max_side_px)
    levels = _levels(render_map(_scaled(anomaly_map, step), (height, width)), anomaly_map.scores, threshold)
    colors = np.stack([np.interp(levels, _STOPS, stops) for stops in (_BLUE, _GREEN, _RED, _ALPHA)], axis=-1)
    return np.asarray(np.rint(colors), np.uint8)


def panels(
    image: NDArray[np.uint8],
    anomaly_map: AnomalyMap | None,
    regions: Sequence[DefectRegion],
    threshold: float | None,
    *,
    truth: NDArray[np.bool_] | None = None,
    max_side_px: int = 320,
) -> NDArray[np.uint8]:
    """Three pictures side by side, (h, 3 w + gaps, 3) RGB: the photograph, the map over it, the regions over it.

    `image` is (H, W, 1 or 3) uint8, gray or RGB; `truth` (H, W), known defects, is outlined in green on the first and
    the last. Without a map the second shows the photograph alone.
    """
    height, width, _ = _shown(image.shape[:2], max_side_px)
    photo = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).reshape(height, width, -1)
    photo = np.ascontiguousarray(np.broadcast_to(photo, (height, width, 3)))
    laid = photo
    if anomaly_map is not None:
        colors = heatmap_bgra(anomaly_map, image.shape[:2], threshold, max_side_px=max_side_px)
        alpha = colors[..., 3:].astype(np.float32) / 255
        laid = np.rint(photo * (1 - alpha) + colors[..., 2::-1] * alpha).astype(np.uint8)
    first, last = (np.array(photo, np.uint8) for _ in range(2))
    for region in regions:
        _outline(last, region.mask.to_mask(), _FOUND_RGB)
    if truth is not None:
        _outline(first, truth, _KNOWN_RGB)
        _outline(last, truth, _KNOWN_RGB)
    gap = np.full((height, _GAP, 3), 255, np.uint8)
    return np.concatenate([first, gap, laid, gap, last], axis=1)


def _outline(picture: NDArray[np.uint8], mask: NDArray[np.bool_], color: tuple[int, int, int]) -> None:
    """Draw the border of `mask`, of the frame's size, into a smaller `picture`."""
    size = (picture.shape[1], picture.shape[0])
    # By area and not by the nearest pixel, which would lose a scratch of one pixel.
    small = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0
    lines, _ = cv2.findContours(small.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, lines, -1, color, 1)


def _shown(frame_size: tuple[int, ...], max_side_px: int) -> tuple[int, int, float]:
    """Height and width of the picture, and how many times smaller it is."""
    step = max(1.0, max(frame_size) / max_side_px)
    return max(1, round(frame_size[0] / step)), max(1, round(frame_size[1] / step)), step


def _levels(values: NDArray[np.float32], scores: NDArray[np.float32], threshold: float | None) -> NDArray[np.float64]:
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
