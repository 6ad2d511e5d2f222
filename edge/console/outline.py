"""A mask's outline for a browser: one SVG path, small whatever the mask is.

Owns the reduction of large masks, which keeps every set pixel, and the bounds on what is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge.images import cv2

MAX_SIDE: Final = 384
"""Cells on the longer side of what is outlined: more than a tile has pixels, and a bound for masks of any size."""
MAX_CONTOURS: Final = 48
MAX_POINTS: Final = 900


def outline(mask: NDArray[np.bool_]) -> str:
    """The path, in frame pixels, of `mask` (H, W) bool; empty where nothing is set. Holes by the even-odd rule.

    Biggest contours first; beyond MAX_CONTOURS and MAX_POINTS the rest is left out.
    """
    step = max(1, -(-max(mask.shape) // MAX_SIDE))
    cells = _reduced(mask, step).astype(np.uint8)
    found, _ = cv2.findContours(cells, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_TC89_L1)
    path: list[str] = []
    left = MAX_POINTS
    for contour in sorted(found, key=len, reverse=True)[:MAX_CONTOURS]:
        points = _simplified(contour, left)
        if not points:
            break
        left -= len(points)
        path.append(_subpath(points, step))
    return "".join(path)


def _reduced(mask: NDArray[np.bool_], step: int) -> NDArray[np.bool_]:
    """Blocks of `step` x `step` pixels by "any": a flaw of one pixel must not vanish."""
    if step == 1:
        return mask
    rows = np.logical_or.reduceat(mask, np.arange(0, mask.shape[0], step), axis=0)
    return np.asarray(np.logical_or.reduceat(rows, np.arange(0, mask.shape[1], step), axis=1))


def _simplified(contour: Any, limit: int) -> list[tuple[int, int]]:
    for tolerance in (0.0, 1.0, 3.0, 9.0):
        shape = cv2.approxPolyDP(contour, tolerance, True) if tolerance else contour
        if len(shape) <= limit:
            return [(int(x), int(y)) for x, y in shape[:, 0]]
    return []


def _subpath(points: Sequence[tuple[int, int]], step: int) -> str:
    """Contours run through the cells' centers; what is too thin for that is drawn as the box of its cells."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if len(points) < 3:
        x0, x1, y0, y1 = min(xs) * step, (max(xs) + 1) * step, min(ys) * step, (max(ys) + 1) * step
        return f"M{x0} {y0}H{x1}V{y1}H{x0}Z"
    half = step // 2
    return "M" + "L".join(f"{x * step + half} {y * step + half}" for x, y in points) + "Z"
