"""Regions in pixels -> regions in millimeters, and the verdict that the camera's written rules make of them.

Owns how a region is measured; the way from pixels to the plane is the `CameraCalibration`'s, the judgment `rules`'.

A region is its pixels, each a square: its length is the longest distance between two points of their outline, its area
the sum of theirs, both in the inspected plane. How large the flaw is that made the map exceed its threshold there is
another question, which `kizu sizes` answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge.camera import CameraCalibration
from edge.images import cv2
from edge.rules import Measured, Rules
from edge.stages.segment import MAX_REGIONS, Segment
from edge.types import Decision, DefectRegion, Reason, Verdict

MAX_DETAIL: Final = 500
_NO_POINTS: Final = np.zeros((0, 2))


@dataclass(frozen=True, slots=True, eq=False)
class Measure:
    """What is known of one camera's picture beyond its pixels: its scale and its rules, each or None.

    Raises:
        ValueError: the rules speak of millimeters, and there is no scale.
    """

    camera: CameraCalibration | None = None
    rules: Rules | None = None

    def __post_init__(self) -> None:
        if self.rules is not None and self.rules.in_mm and not self._has_scale:
            raise ValueError(f"{self.rules.in_mm} is in millimeters, and the camera has no scale")

    def segment(self, given: Segment) -> Segment:
        """How regions are found: with rules even the smallest, for what is too small to report is not to reject."""
        return given if self.rules is None else replace(given, min_area_px=1)

    def __call__(self, verdict: Verdict, min_area_px: int) -> Verdict:
        """The verdict with its regions measured, those under `min_area_px` left out, and decided by the rules.

        Rules are asked about rejected parts only. One without any region stays rejected: they have nothing to go by.
        """
        if self.camera is None and self.rules is None:
            return verdict
        zones = self.rules is not None and self.rules.has_zones
        measured = [self.measured(region, with_pixels=zones) for region in verdict.regions]
        verdict = replace(
            verdict,
            regions=_reported([one.region for one in measured], min_area_px),
            calibration_id=None if self.camera is None else self.camera.id,
            rules_id=None if self.rules is None else self.rules.id,
        )
        if self.rules is None or verdict.decision is not Decision.REJECT:
            return verdict
        return _ruled(verdict, self.rules, measured, min_area_px)

    def measured(self, region: DefectRegion, *, with_pixels: bool = False) -> Measured:
        """Measure one region; `with_pixels` where zones are asked about."""
        runs = region.mask.runs.astype(np.float64)
        outline = _outline(runs)
        center = _center(runs)
        pixels = _pixels(region.mask.runs) if with_pixels else _NO_POINTS
        pixels_mm = None
        if self._has_scale and self.camera is not None:
            parts = (np.array([center]), outline, _squares(runs).reshape(-1, 2), pixels)
            # In one go: for a few points the way through the lens costs the same as for one.
            every = self.camera.to_mm(np.concatenate(parts))
            middle, around, squares, pixels_mm = np.split(every, np.cumsum([len(part) for part in parts])[:-1])
            x, y = middle[0].tolist()
            region = replace(
                region,
                area_mm2=_area(squares.reshape(-1, 4, 2)),
                length_mm=longest(around),
                center_mm_xy=(x, y),
            )
        return Measured(region, longest(outline), center, pixels, pixels_mm)

    @property
    def _has_scale(self) -> bool:
        return self.camera is not None and self.camera.has_scale


def longest(points: NDArray[np.float64]) -> float:
    """The longest distance between two of `points` (n, 2): the maximum Feret diameter of their hull."""
    apart = points[:, None, :] - points[None, :, :]
    return float(np.sqrt((apart**2).sum(axis=2).max()))


def _ruled(verdict: Verdict, rules: Rules, measured: Sequence[Measured], min_area_px: int) -> Verdict:
    if not measured:
        return replace(verdict, detail="no region above the pixel threshold: the rules have nothing to go by")
    if len(measured) >= MAX_REGIONS:
        return replace(verdict, reason=Reason.RULE, detail=f"{MAX_REGIONS} regions or more: no rule lets that pass")
    ruling = rules.judge(measured)
    regions = [replace(one.region, ignored_by=zone) for one, zone in zip(measured, ruling.ignored_by, strict=True)]
    return replace(
        verdict,
        decision=Decision.REJECT if ruling.reject else Decision.ACCEPT,
        reason=Reason.RULE,
        detail=ruling.detail[:MAX_DETAIL],
        regions=_reported(regions, min_area_px),
    )


def _reported(regions: Sequence[DefectRegion], min_area_px: int) -> tuple[DefectRegion, ...]:
    return tuple(region for region in regions if region.area_px >= min_area_px)


def _squares(runs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each run as the rectangle that its pixels cover, (K, 4, 2), corners in order."""
    row, start, stop = runs.T
    return np.stack(
        [np.stack(corner, axis=1) for corner in ((start, row), (stop, row), (stop, row + 1), (start, row + 1))], axis=1
    )


def _outline(runs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The corners of the region's convex hull (k, 2), in frame pixels."""
    corners = _squares(runs).reshape(-1, 1, 2).astype(np.float32)  # whole numbers up to 2**24: exact
    return np.asarray(cv2.convexHull(corners), np.float64).reshape(-1, 2)


def _center(runs: NDArray[np.float64]) -> tuple[float, float]:
    row, start, stop = runs.T
    length = stop - start
    total = float(length.sum())
    return float((length * (start + stop) / 2).sum()) / total, float((length * (row + 0.5)).sum()) / total


def _area(squares: NDArray[np.float64]) -> float:
    """The summed area of quadrilaterals (K, 4, 2)."""
    x, y = squares[:, :, 0], squares[:, :, 1]
    crossed = x * np.roll(y, -1, axis=1) - np.roll(x, -1, axis=1) * y
    return float(np.abs(crossed.sum(axis=1)).sum() / 2)


def _pixels(runs: NDArray[np.int32]) -> NDArray[np.float64]:
    """The center of every pixel (n, 2)."""
    rows, starts, stops = (runs[:, column].astype(np.int64) for column in range(3))
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    columns = np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
    return np.stack((columns, np.repeat(rows, lengths)), axis=1) + 0.5
