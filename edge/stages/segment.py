"""AnomalyMap -> DefectRegions in frame pixels.

Owns how a map is laid over its frame; labelling is in `masks`, the decision in `decide`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge import masks
from edge.types import AnomalyMap, DefectRegion

MAX_REGIONS = 256
"""Regions in one verdict; a frame with more is a frame full of noise, and its biggest ones say so."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The regions whose map value is greater than `pixel_threshold`, of at least `min_area_px` pixels.

    Raises:
        ValueError: the threshold is not a number or the area is below 1.
    """

    pixel_threshold: float
    min_area_px: int

    def __post_init__(self) -> None:
        masks.float32_floor(self.pixel_threshold)
        if self.min_area_px < 1:
            raise ValueError(f"min_area_px must be at least 1, not {self.min_area_px}")

    def __call__(self, anomaly_map: AnomalyMap, frame_size: tuple[int, int]) -> tuple[DefectRegion, ...]:
        """Regions in a frame of `frame_size` (height, width) px, biggest first, at most MAX_REGIONS.

        Nothing is reported outside the map's extent: it was not inspected.
        """
        hot = anomaly_map.scores > masks.float32_floor(self.pixel_threshold)
        if not hot.any():  # the usual frame: no rendering, no labelling
            return ()
        y0, y1 = _pixels_near(np.any(hot, axis=1), anomaly_map.roi.y, anomaly_map.roi.height)
        x0, x1 = _pixels_near(np.any(hot, axis=0), anomaly_map.roi.x, anomaly_map.roi.width)
        extent = anomaly_map.extent
        top, bottom = _pixels_within(extent.y, extent.height, frame_size[0])
        left, right = _pixels_within(extent.x, extent.width, frame_size[1])
        y0, y1, x0, x1 = max(y0, top), min(y1, bottom), max(x0, left), min(x1, right)
        if y0 >= y1 or x0 >= x1:
            return ()
        found = masks.regions(
            _render(anomaly_map, y0, y1, x0, x1),
            self.pixel_threshold,
            min_area_px=self.min_area_px,
            limit=MAX_REGIONS,
            origin_xy=(x0, y0),
            frame_size=frame_size,
        )
        return tuple(DefectRegion(region.box_xyxy, region.area_px, region.peak, region.mask) for region in found)


def render_map(anomaly_map: AnomalyMap, frame_size: tuple[int, int]) -> NDArray[np.float32]:
    """The map over a whole frame, (H, W) float32: bilinear between cell centers, the nearest cell outside.

    Pixel x has its center at x + 0.5; cell j of w' at roi.x + (j + 0.5) * roi.width / w'.
    """
    return _render(anomaly_map, 0, frame_size[0], 0, frame_size[1])


def _render(anomaly_map: AnomalyMap, y0: int, y1: int, x0: int, x1: int) -> NDArray[np.float32]:
    """The part [y0, y1) x [x0, x1) of the rendered frame; each pixel is the same number whatever the part."""
    from edge import run_kernels  # numba; see `masks`

    scores = np.ascontiguousarray(anomaly_map.scores)
    rows, columns = scores.shape
    cells_y, parts_y = _between_cells(y0, y1, anomaly_map.roi.y, anomaly_map.roi.height, rows)
    cells_x, parts_x = _between_cells(x0, x1, anomaly_map.roi.x, anomaly_map.roi.width, columns)
    widened = np.empty((rows, x1 - x0), np.float32)
    rendered = np.empty((y1 - y0, x1 - x0), np.float32)
    if rendered.size:
        run_kernels.interpolate(scores, cells_y, parts_y, cells_x, parts_x, widened, rendered)
    return rendered


def _between_cells(
    first: int, stop: int, origin: float, length: float, cells: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each pixel in [first, stop): the cell at or before its center, and how far it is to the next in [0, 1)."""
    position = (np.arange(first, stop) + 0.5 - origin) * (cells / length) - 0.5
    position = np.clip(position, 0.0, cells - 1.0)
    cell = position.astype(np.int64)
    return cell, (position - cell).astype(np.float32)


def _pixels_near(hot: NDArray[np.bool_], origin: float, length: float) -> tuple[int, int]:
    """Pixels along one axis that a hot cell can lift: out to the next cell's center, and without end at the rim."""
    where = np.flatnonzero(hot)
    pitch = length / len(hot)
    first, last = int(where[0]), int(where[-1])
    begin = -math.inf if first == 0 else origin + (first - 0.5) * pitch
    end = math.inf if last == len(hot) - 1 else origin + (last + 1.5) * pitch
    low, high = -(2**31), 2**31  # any frame ends before
    return (low if begin == -math.inf else math.floor(begin), high if end == math.inf else math.ceil(end))


def _pixels_within(origin: float, length: float, side: int) -> tuple[int, int]:
    """Pixels along one axis whose center lies in [origin, origin + length), clipped to the frame's side."""
    return max(0, math.ceil(origin - 0.5)), min(side, math.ceil(origin + length - 0.5))
