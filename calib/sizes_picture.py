"""The curves of `sizes` as a picture: share found against size, one panel a kind. Drawn with OpenCV, which is there.

Owns the drawing only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from calib.sizes import Curve, SizesReport
from edge.images import cv2, encode_png

_PANEL: Final = (360, 460)
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 34, 44
_COLORS: Final = (
    (31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207), (140, 86, 75),
    (90, 90, 90),
)  # fmt: skip
_INK: Final = (40, 40, 40)
_GRID: Final = (225, 225, 225)

Canvas = NDArray[np.uint8]
Place = Callable[[float, float], tuple[int, int]]


def draw(report: SizesReport) -> bytes:
    """A PNG: the share found, what it shows at least as a whisker, and the size reported as a dashed line."""
    kinds = list(dict.fromkeys(curve.kind for curve in report.curves))
    sizes = [point.size for curve in report.curves for point in curve.points]
    panels = [
        _panel(report, kind, [curve for curve in report.curves if curve.kind == kind], min(sizes), max(sizes))
        for kind in kinds
    ]
    return encode_png(np.ascontiguousarray(np.concatenate(panels, axis=1)))


def _panel(report: SizesReport, kind: str, curves: Sequence[Curve], smallest: float, largest: float) -> Canvas:
    series = [(curve, _COLORS[index % len(_COLORS)]) for index, curve in enumerate(curves)]
    height = _PANEL[0] + 16 * len(series)
    canvas = np.full((height, _PANEL[1], 3), 255, np.uint8)
    low, high = math.log(smallest / 1.15), math.log(largest * 1.15)

    def at(size: float, share: float) -> tuple[int, int]:
        across = (math.log(size) - low) / (high - low)
        x = _LEFT + across * (_PANEL[1] - _LEFT - _RIGHT)
        return round(x), round(_PANEL[0] - _BOTTOM - share * (_PANEL[0] - _TOP - _BOTTOM))

    _axes(canvas, at, report, kind, sorted({point.size for curve, _ in series for point in curve.points}))
    for row, (curve, color) in enumerate(series):
        _curve(canvas, at, curve, color)
        found = "none" if curve.smallest is None else f"{curve.smallest:g} {report.unit}"
        text = f"contrast {curve.contrast:+g}, {curve.region}: {found}"
        _write(canvas, text, (_LEFT, _PANEL[0] + 16 * row), color)
    return canvas


def _axes(canvas: Canvas, at: Place, report: SizesReport, kind: str, sizes: Sequence[float]) -> None:
    left, right = at(sizes[0], 0)[0], at(sizes[-1], 0)[0]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = at(sizes[0], share)[1]
        cv2.line(canvas, (_LEFT, y), (_PANEL[1] - _RIGHT, y), _GRID, 1)
        _write(canvas, f"{share:4.0%}", (16, y + 4), _INK)
    y = at(sizes[0], report.probability)[1]
    _dashed(canvas, (_LEFT, y), (_PANEL[1] - _RIGHT, y), _INK)
    shown = -100
    for size in sizes:
        x = at(size, 0)[0]
        if x - shown >= 34:
            _write(canvas, f"{size:g}", (x - 8, _PANEL[0] - _BOTTOM + 16), _INK)
            shown = x
    _write(canvas, f"size, {report.unit}", ((left + right) // 2 - 24, _PANEL[0] - _BOTTOM + 32), _INK)
    title = f"{kind}: {report.probability:.0%} found at {report.confidence:.0%} confidence"
    _write(canvas, title, (_LEFT, 20), _INK)


def _curve(canvas: Canvas, at: Place, curve: Curve, color: tuple[int, int, int]) -> None:
    places = [at(point.size, point.hits / point.trials) for point in curve.points]
    cv2.polylines(canvas, [np.array(places, np.int32)], False, color, 2, cv2.LINE_AA)
    for place, point in zip(places, curve.points, strict=True):
        cv2.circle(canvas, place, 3, color, -1, cv2.LINE_AA)
        cv2.line(canvas, place, at(point.size, point.lower), color, 1)
    if curve.smallest is not None:
        _dashed(canvas, at(curve.smallest, 0.0), at(curve.smallest, 1.0), color)


def _dashed(canvas: Canvas, start: tuple[int, int], stop: tuple[int, int], color: tuple[int, int, int]) -> None:
    steps = max(1, round(math.dist(start, stop) / 5))
    points = np.linspace(start, stop, steps + 1).round().astype(int).tolist()
    for one, other in zip(points[::2], points[1::2], strict=False):
        cv2.line(canvas, tuple(one), tuple(other), color, 1)


def _write(canvas: Canvas, text: str, place: tuple[int, int], color: tuple[int, int, int]) -> None:
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, color, 1, cv2.LINE_AA)
