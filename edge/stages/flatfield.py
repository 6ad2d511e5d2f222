"""Flat field: a frame as an even sensor under even light would have seen it, still uint8, before anything is scored.

Owns the arithmetic, corrected = round((image - dark) * gain) in single precision, halves to even, clipped to 0..255
(the two-point correction of EMVA 1288); the arrays come from a `CameraCalibration`. A model that is to see corrected
frames must have been trained and certified on corrected ones: `kizu correct` makes them, through this very function.

It is pointwise, so it may come after cutting and reflecting as well as before: where a region reaches the model
unscaled, a GPU's engine may do it (`engine.flat_field`), and `level` where another engine stands in for that one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.camera import CameraCalibration
from edge.errors import ImageRefused
from edge.stages.tile import reflected
from edge.types import FlatMaps, Uneven


@dataclass(frozen=True, slots=True, eq=False)
class FlatField:
    """Corrects frames of one camera: `gain` and `dark` (H, W, C) float32, C-contiguous."""

    gain: NDArray[np.float32]
    dark: NDArray[np.float32]

    def __call__(
        self, image: NDArray[np.uint8], roi_xywh: tuple[int, int, int, int] | None = None
    ) -> NDArray[np.uint8]:
        """The corrected `image` (H, W, C) uint8; with `roi_xywh`, which must lie in it, only that part is defined.

        Raises:
            ImageRefused: `size`, the frame is of another shape than the calibration.
        """
        from edge import flat_kernels  # numba; see `run_kernels`

        self.require(image)
        height, width, channels = image.shape
        x, y, across, down = roi_xywh or (0, 0, width, height)
        flat = (height, width * channels)
        out = np.empty(flat, np.uint8)
        left, right = x * channels, (x + across) * channels
        gain, dark = self.gain.reshape(flat), self.dark.reshape(flat)
        flat_kernels.correct(image.reshape(flat), gain, dark, out, y, y + down, left, right)
        return out.reshape(image.shape)

    def require(self, image: NDArray[np.uint8]) -> None:
        """Raises ImageRefused (`size`) for an `image` of another shape than the calibration."""
        if image.shape != self.gain.shape:
            shapes = (image.shape, self.gain.shape)
            given, wanted = (f"{shape[1]} x {shape[0]} px in {shape[2]} channels" for shape in shapes)
            raise ImageRefused("size", f"frame of {given}, the camera's flat field is for {wanted}")

    def over(self, roi_xywh: tuple[int, int, int, int] | None) -> FlatMaps:
        """The part of it over a region that lies within."""
        x, y, across, down = roi_xywh or (0, 0, self.gain.shape[1], self.gain.shape[0])
        cut = np.s_[y : y + down, x : x + across]
        return FlatMaps(np.ascontiguousarray(self.gain[cut]), np.ascontiguousarray(self.dark[cut]))


def flat_field_of(camera: CameraCalibration | None) -> FlatField | None:
    """The camera's flat field; None if its calibration has none."""
    if camera is None or camera.gain is None or camera.dark is None:
        return None
    return FlatField(np.ascontiguousarray(camera.gain), np.ascontiguousarray(camera.dark))


def level(pixels: NDArray[np.uint8], uneven: Uneven) -> None:
    """Correct model pixels (h, w, C) uint8, C-contiguous, in place: the bytes that a corrected frame would have given.

    Finds the maps' values anew for each frame; a line whose CPU always does this corrects the frame instead.
    """
    from edge import flat_kernels

    height, width, channels = pixels.shape
    maps = uneven.maps
    rows = reflected(uneven.top, uneven.top + height, maps.gain.shape[0])
    columns = reflected(uneven.left, uneven.left + width, maps.gain.shape[1])
    gain, dark = (
        np.ascontiguousarray(np.broadcast_to(values[np.ix_(rows, columns)], pixels.shape)).reshape(height, -1)
        for values in (maps.gain, maps.dark)
    )
    flat = pixels.reshape(height, width * channels)
    flat_kernels.correct(flat, gain, dark, flat, 0, height, 0, width * channels)
