"""A camera that is known exactly: pictures of a plane through a pinhole with Brown's distortion, by ray casting.

What is rendered is a function of millimeters in the plane, so the truth about every length is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.camera import Lens, undistorted

Scene = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""Gray levels at (x, y) mm."""

LENS = Lens((520.0, 515.0, 325.0, 236.0), (-0.21, 0.06, 0.0012, -0.0008, 0.0), 0.0, 0)
"""A wide lens with a barrel distortion of almost sixty pixels in the corners of 640 x 480."""


@dataclass(frozen=True)
class Pose:
    """Where the camera stands: the plane's axes turned by (x, y, z) degrees, its origin at (x, y, z) mm."""

    turn_deg: tuple[float, float, float]
    origin_mm: tuple[float, float, float]

    @property
    def homography(self) -> NDArray[np.float64]:
        """From the plane (x, y, 1) mm to normalized pixels."""
        x, y, z = np.deg2rad(self.turn_deg)
        about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
        about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
        about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
        turned = about_z @ about_y @ about_x
        return np.stack((turned[:, 0], turned[:, 1], np.array(self.origin_mm)), axis=1)


class Renderer:
    """Renders scenes for one lens and frame size; each pixel is the mean of `finer` x `finer` rays."""

    def __init__(self, lens: Lens = LENS, size: tuple[int, int] = (480, 640), finer: int = 2) -> None:
        self._size, self._finer = size, finer
        height, width = size
        rows = (np.arange(height * finer) + 0.5) / finer
        columns = (np.arange(width * finer) + 0.5) / finer
        pixels = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
        fx, fy, cx, cy = lens.matrix
        self._rays = (undistorted(pixels, lens) - 0.5 - (cx, cy)) / (fx, fy)

    def __call__(self, scene: Scene, pose: Pose) -> NDArray[np.uint8]:
        """The picture (H, W, 1) uint8."""
        back = np.linalg.inv(pose.homography)
        plane = self._rays @ back[:, :2].T + back[:, 2]
        gray = scene(plane[:, 0] / plane[:, 2], plane[:, 1] / plane[:, 2])
        height, width = self._size
        fine = gray.reshape(height, self._finer, width, self._finer)
        return np.rint(fine.mean(axis=(1, 3))).astype(np.uint8)[:, :, None]


def chessboard(columns: int, rows: int, square_mm: float) -> Scene:
    """A board of `columns` x `rows` inner corners; the first of them is at (0, 0)."""

    def scene(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        i, j = np.floor(x / square_mm), np.floor(y / square_mm)
        inside = (i >= -1) & (i < columns) & (j >= -1) & (j < rows)
        dark = (i + j) % 2 == 0
        return np.where(inside & dark, 30.0, 215.0)

    return scene


def line(start_mm: tuple[float, float], stop_mm: tuple[float, float], width_mm: float) -> Scene:
    """A dark line with flat ends on a light ground."""
    (x0, y0), (x1, y1) = start_mm, stop_mm
    length = float(np.hypot(x1 - x0, y1 - y0))
    along_x, along_y = (x1 - x0) / length, (y1 - y0) / length

    def scene(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        along = (x - x0) * along_x + (y - y0) * along_y
        aside = (y - y0) * along_x - (x - x0) * along_y
        return np.where((along >= 0) & (along <= length) & (np.abs(aside) <= width_mm / 2), 30.0, 215.0)

    return scene


def dark_regions(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels more than half covered by what is dark."""
    return np.asarray(image[:, :, 0] < (30 + 215) / 2)
