"""Flat field: a frame as an even sensor under even light would have seen it, still uint8, before anything is scored.

Owns the arithmetic, corrected = round((image - dark) * gain) in single precision, halves to even, clipped to 0..255
(the two-point correction of EMVA 1288); the arrays come from a `CameraCalibration`. A model that is to see corrected
frames must have been trained and certified on corrected ones: `kizu correct` makes them, through this very function.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.camera import CameraCalibration
from edge.errors import ImageRefused


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

        if image.shape != self.gain.shape:
            given, wanted = (f"{shape[1]} x {shape[0]} px in {shape[2]} channels" for shape in self._shapes(image))
            raise ImageRefused("size", f"frame of {given}, the camera's flat field is for {wanted}")
        height, width, channels = image.shape
        x, y, across, down = roi_xywh or (0, 0, width, height)
        flat = (height, width * channels)
        out = np.empty(flat, np.uint8)
        left, right = x * channels, (x + across) * channels
        gain, dark = self.gain.reshape(flat), self.dark.reshape(flat)
        flat_kernels.correct(image.reshape(flat), gain, dark, out, y, y + down, left, right)
        return out.reshape(image.shape)

    def _shapes(self, image: NDArray[np.uint8]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return image.shape, self.gain.shape


def flat_field_of(camera: CameraCalibration | None) -> FlatField | None:
    """The camera's flat field; None if its calibration has none."""
    if camera is None or camera.gain is None or camera.dark is None:
        return None
    return FlatField(np.ascontiguousarray(camera.gain), np.ascontiguousarray(camera.dark))
