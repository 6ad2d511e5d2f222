"""Plants synthetic defects of known kind, size and contrast into pictures of good parts.

Owns how each kind looks. Whether a line finds them is `smallest`'s question; augmentation for training is another
matter, where defects need not be known to the pixel.

    spot      a disk of `size_px` across, `contrast` gray levels brighter (or darker) than what it covers
    scratch   a line of `size_px` long and SCRATCH_WIDTH_PX wide, likewise
    dent      a bump of `size_px` across lit from one side: brighter there by up to `contrast`, as much darker opposite

Edges cover pixels by their area, to first order, as a sharp lens would show them; blur is what the caller adds. Values
are clipped to 0..255, so on a ground near black or white less than the whole contrast is there to be seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Kind = Literal["spot", "scratch", "dent"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

SCRATCH_WIDTH_PX: Final = 2.0
_DENT_SIGMAS: Final = 6.0
"""Standard deviations across a dent: at its rim 5 % of the contrast are left."""


@dataclass(frozen=True, slots=True)
class Defect:
    """One defect: `size_px` is its diameter or length, `contrast` in gray levels and signed, `angle` in radians."""

    kind: Kind
    size_px: float
    contrast: float
    angle: float = 0.0

    @property
    def reach_px(self) -> float:
        """How far from its center it may change a pixel."""
        return self.size_px / 2 + SCRATCH_WIDTH_PX + 1


def plant(
    image: NDArray[np.uint8], defect: Defect, center_xy: tuple[float, float]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A copy of `image` (H, W, C) with the defect at `center_xy` (pixel i covers [i, i + 1)), and the mask (H, W) of
    the pixels that it covers by at least a half, that of its center always among them.

    Raises:
        ValueError: the defect lies outside the picture.
    """
    height, width = image.shape[:2]
    x, y = center_xy
    x0, x1 = _span(x, defect.reach_px, width)
    y0, y1 = _span(y, defect.reach_px, height)
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"a defect at ({x:.1f}, {y:.1f}) is not within {width} x {height} px")
    right, down = np.meshgrid(np.arange(x0, x1) + 0.5 - x, np.arange(y0, y1) + 0.5 - y)
    along = right * math.cos(defect.angle) + down * math.sin(defect.angle)
    aside = down * math.cos(defect.angle) - right * math.sin(defect.angle)
    change, covered = _SHAPES[defect.kind](along, aside, defect.size_px)
    planted = image.copy()
    part = planted[y0:y1, x0:x1].astype(np.float64) + (defect.contrast * change)[:, :, None]
    planted[y0:y1, x0:x1] = np.clip(np.rint(part), 0, 255).astype(np.uint8)
    mask = np.zeros((height, width), np.bool_)
    mask[y0:y1, x0:x1] = covered
    if 0 <= x < width and 0 <= y < height:
        mask[int(y), int(x)] = True  # also where the defect is smaller than half a pixel
    return planted, mask


_Plane = NDArray[np.float64]


def _spot(along: _Plane, aside: _Plane, size_px: float) -> tuple[_Plane, NDArray[np.bool_]]:
    cover = _covered(np.hypot(along, aside) - size_px / 2)
    return cover, cover >= 0.5


def _scratch(along: _Plane, aside: _Plane, size_px: float) -> tuple[_Plane, NDArray[np.bool_]]:
    cover = _covered(np.abs(along) - size_px / 2) * _covered(np.abs(aside) - SCRATCH_WIDTH_PX / 2)
    return cover, cover >= 0.5


def _dent(along: _Plane, aside: _Plane, size_px: float) -> tuple[_Plane, NDArray[np.bool_]]:
    """The slope of a Gaussian bump along the light, largest (1) one standard deviation from its middle."""
    sigma = size_px / _DENT_SIGMAS
    radius2 = (along**2 + aside**2) / sigma**2
    return along / sigma * np.exp((1 - radius2) / 2), radius2 <= (_DENT_SIGMAS / 2) ** 2


_SHAPES = {"spot": _spot, "scratch": _scratch, "dent": _dent}


def _covered(beyond_edge: _Plane) -> _Plane:
    """How much of a pixel lies inside an edge whose distance from its center is given."""
    return np.clip(0.5 - beyond_edge, 0.0, 1.0)


def _span(center: float, reach: float, side: int) -> tuple[int, int]:
    return max(0, math.floor(center - reach)), min(side, math.ceil(center + reach))
