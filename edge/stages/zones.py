"""Anomaly map -> anomaly map of what is inspected, so that one threshold serves zones with thresholds of their own.

Owns which cell lies in which zone; the zones come with the bundle's calibration. A cell belongs to the first zone that
holds its center; a cell in no zone is not inspected: it takes the lowest value that the inspected ones have, so
no region starts there and no score comes from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge.bundle import MapGeometry, Ring, Zone
from edge.errors import BundleError, ImageRefused
from edge.types import AnomalyMap, Roi


class Zones:
    """The zones of one camera; without any, maps pass as they are. For one thread: it remembers the last grid.

    Raises:
        BundleError: the image score is not the map's maximum, which is the only one that a part of the map has too.
    """

    def __init__(self, zones: Sequence[Zone], geometry: MapGeometry) -> None:
        if zones and geometry.reduction != "max":
            raise BundleError(
                f"zones need a map whose image score is its maximum, this bundle's is {geometry.reduction!r}; leave "
                "them out, or train a bundle with the reduction max"
            )
        self._zones = tuple(zones)
        self._grid: tuple[Roi, tuple[int, ...]] | None = None
        self._labels = np.empty((0, 0), np.intp)
        self._offsets = np.array([zone.offset for zone in zones], np.float32)

    def __call__(self, anomaly_map: AnomalyMap, frame_size: tuple[int, int]) -> AnomalyMap:
        """The map with each zone's offset added and the rest low; its score is the maximum of what is inspected.

        Raises:
            ImageRefused: `size`, the zones were drawn for frames of another one than (height, width).
            BundleError: no cell lies in any zone.
        """
        if not self._zones:
            return anomaly_map
        self.require_size(frame_size)
        labels = self.labels(anomaly_map)
        inside = labels >= 0
        if not inside.any():
            raise BundleError(
                f"no cell of the map lies in zone {', '.join(zone.name for zone in self._zones)}; the picture is not "
                "the one that they were drawn for: calibrate again with zones for it"
            )
        moved = anomaly_map.scores + self._offsets[labels]
        scores = np.where(inside, moved, moved[inside].min())
        return AnomalyMap(anomaly_map.frame_id, scores, float(moved[inside].max()), anomaly_map.roi, anomaly_map.extent)

    def require_size(self, frame_size: tuple[int, int]) -> None:
        """Raises ImageRefused (`size`) for a frame (height, width) that the zones were not drawn for."""
        for zone in self._zones:
            if zone.frame_size is not None and zone.frame_size != frame_size:
                raise ImageRefused(
                    "size",
                    f"frame of {frame_size[1]} x {frame_size[0]} px, zone {zone.name} was drawn for "
                    f"{zone.frame_size[1]} x {zone.frame_size[0]}",
                )

    def labels(self, anomaly_map: AnomalyMap) -> NDArray[np.intp]:
        """(h', w'): the place of each cell's zone, -1 for none."""
        grid = (anomaly_map.roi, anomaly_map.scores.shape)
        if grid != self._grid:
            self._labels, self._grid = _labels(self._zones, *grid), grid
        return self._labels

    def peaks(self, anomaly_map: AnomalyMap) -> NDArray[np.float64]:
        """(zones,): the largest raw value in each, -inf where a zone has no cell."""
        labels = self.labels(anomaly_map)
        found = np.full(len(self._zones), -np.inf)
        np.maximum.at(found, labels[labels >= 0], anomaly_map.scores[labels >= 0].astype(np.float64))
        return found


def _labels(zones: Sequence[Zone], roi: Roi, shape: tuple[int, ...]) -> NDArray[np.intp]:
    y = np.asarray(roi.y + (np.arange(shape[0]) + 0.5) * (roi.height / shape[0]), np.float64)
    x = np.asarray(roi.x + (np.arange(shape[1]) + 0.5) * (roi.width / shape[1]), np.float64)
    labels = np.full(shape, -1, np.intp)
    for place in reversed(range(len(zones))):  # the first zone is written last
        labels[_holds(zones[place].rings_xy, x, y)] = place
    return labels


def _holds(rings: Sequence[Ring], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(rows, columns): whether a ray to the right crosses the rings an odd number of times."""
    starts = np.concatenate([np.array(ring) for ring in rings])
    ends = np.concatenate([np.roll(np.array(ring), -1, axis=0) for ring in rings])
    inside = np.zeros((len(y), len(x)), bool)
    # Row by row: a painted mask has thousands of corners, and a frame in tiles a million cells.
    for row, at in enumerate(y):
        met = (starts[:, 1] > at) != (ends[:, 1] > at)
        (x0, y0), (x1, y1) = starts[met].T, ends[met].T
        crossed = np.sort(x0 + (at - y0) * (x1 - x0) / (y1 - y0))
        inside[row] = (len(crossed) - np.searchsorted(crossed, x, side="right")) % 2 == 1
    return inside
