"""Frame -> model pixels, still uint8: the region of interest, cut out and brought to the model's size.

Owns where model pixels lie in the frame; a camera's flat field is `flatfield`'s. The trainer and calib use `prepare`
too, so all three score the same pixels; casting and normalization are inside the graph. With `fit` "tile" the region
keeps its own size; `tile` cuts it up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.bundle import InputSpec
from edge.errors import ImageRefused
from edge.images import cv2
from edge.stages.flatfield import FlatField
from edge.types import FlatMaps, Frame, ModelInput, Roi, Uneven


@dataclass(frozen=True, slots=True)
class Preprocess:
    """Makes model inputs from frames of one camera; `roi_xywh` in frame pixels, None for the whole frame.

    `frame_size` (height, width) and `flat` are the camera calibration's: frames of another size are refused, and the
    others corrected before anything else; or with `later`, which is `flat.over(roi_xywh)`, not yet: their pixels are
    marked for whoever does it.

    Raises:
        ValueError: a region of interest without area or outside every frame; `later` where a region is scaled.
    """

    input: InputSpec
    roi_xywh: tuple[int, int, int, int] | None = None
    frame_size: tuple[int, int] | None = None
    flat: FlatField | None = None
    later: FlatMaps | None = None

    def __post_init__(self) -> None:
        if self.later is not None and not is_unscaled(self.input, self.later.gain.shape[1], self.later.gain.shape[0]):
            raise ValueError("pixels that were scaled before their flat field would not be those that came after it")
        if self.roi_xywh is not None and (min(self.roi_xywh[:2]) < 0 or min(self.roi_xywh[2:]) < 1):
            raise ValueError(f"roi_xywh {self.roi_xywh}: x and y are at least 0, width and height at least 1")

    def __call__(self, frame: Frame) -> ModelInput:
        """Raises ImageRefused (`size` or `format`) for a frame of another shape than the bundle or the region takes."""
        image = frame.image
        if self.frame_size is not None and image.shape[:2] != self.frame_size:
            given, wanted = (f"{size[1]} x {size[0]} px" for size in (image.shape, self.frame_size))
            raise ImageRefused("size", f"frame of {given}, the camera's calibration is for {wanted}")
        if self.flat is not None:
            _require_within(image, self.roi_xywh)
            if self.later is None:
                image = self.flat(image, self.roi_xywh)
            else:
                self.flat.require(image)
        pixels, roi = prepare(image, self.input, self.roi_xywh)
        x, y, width, height = self.roi_xywh or (0, 0, frame.image.shape[1], frame.image.shape[0])
        # Unscaled, so the rectangle that the pixels tile is in whole frame pixels.
        uneven = None if self.later is None else Uneven(self.later, round(roi.y) - y, round(roi.x) - x)
        return ModelInput(frame.id, pixels, roi, Roi(float(x), float(y), float(width), float(height)), uneven)


def is_unscaled(input: InputSpec, width: int, height: int) -> bool:
    """Whether a region of `width` x `height` px reaches the model pixel by pixel: cut, reflected, but not scaled."""
    return input.fit == "tile" or _inner_size(width, height, input) == (width, height)


def prepare(
    image: NDArray[np.uint8], input: InputSpec, roi_xywh: tuple[int, int, int, int] | None = None
) -> tuple[NDArray[np.uint8], Roi]:
    """`image` (H, W, 1 or 3) uint8 -> pixels (h, w, C) uint8 and the frame rectangle that they tile.

    With `fit` "tile" that is the region itself: a view of its own size, not contiguous. With "resize": gray is
    replicated for an RGB model. An image of the model's size is returned as it is, without a copy. Larger ones are
    halved by 2 x 2 means while they are at least twice too large and then interpolated bilinearly: that guards against
    aliasing as an area average does, at a fraction of its cost, and both steps are exact, so equal on every machine.
    The rectangle may reach beyond the image: by what `aspect = "keep"` fills up by reflection, and by part of a block
    at the right and bottom.

    Raises:
        ImageRefused: `size` (a side outside the bundle's range, or the region not within the image) or `format` (color
            for a gray model).
    """
    height, width, channels = image.shape
    if not all(input.min_side_px <= side <= input.max_side_px for side in (height, width)):
        raise ImageRefused(
            "size",
            f"frame of {width} x {height} px, the bundle takes sides of {input.min_side_px} to {input.max_side_px} px",
        )
    if channels == 3 and input.channels == 1:
        raise ImageRefused("format", "RGB frame, the bundle takes gray ones; let the camera send mono8")
    x, y, roi_width, roi_height = _require_within(image, roi_xywh)

    cut = image[y : y + roi_height, x : x + roi_width]
    if input.fit == "tile":
        return _as_it_is(cut, input), Roi(float(x), float(y), float(roi_width), float(roi_height))
    across, down = _inner_size(roi_width, roi_height, input)
    small, covered_width, covered_height = _scaled(cut, across, down)
    left, top = (input.width - across) // 2, (input.height - down) // 2
    if (across, down) != (input.width, input.height):
        right, bottom = input.width - across - left, input.height - down - top
        small = np.asarray(cv2.copyMakeBorder(small, top, bottom, left, right, cv2.BORDER_REFLECT_101), np.uint8)
    if input.channels == 3 and channels == 1:
        small = np.asarray(cv2.cvtColor(small, cv2.COLOR_GRAY2RGB), np.uint8)
    pixels = np.ascontiguousarray(small, np.uint8).reshape(input.height, input.width, input.channels)
    step_x, step_y = covered_width / across, covered_height / down  # frame pixels per model pixel
    return pixels, Roi(x - left * step_x, y - top * step_y, input.width * step_x, input.height * step_y)


def _require_within(image: NDArray[np.uint8], roi_xywh: tuple[int, int, int, int] | None) -> tuple[int, int, int, int]:
    """The region of interest, all of the image for None; refused where it reaches beyond."""
    height, width = image.shape[:2]
    x, y, across, down = roi_xywh or (0, 0, width, height)
    if x < 0 or y < 0 or min(across, down) < 1 or x + across > width or y + down > height:
        raise ImageRefused("size", f"region of interest xywh {roi_xywh} is not within a frame of {width} x {height} px")
    return x, y, across, down


def _as_it_is(region: NDArray[np.uint8], input: InputSpec) -> NDArray[np.uint8]:
    """The region's own pixels (H, W, C); gray becomes RGB by strides alone, so that no frame is copied as a whole."""
    height, width = region.shape[:2]
    if min(height, width) < input.min_side_px:
        raise ImageRefused(
            "size",
            f"region of interest of {width} x {height} px, the bundle judges sides of at least {input.min_side_px} px",
        )
    return np.broadcast_to(region, (height, width, input.channels))


def _inner_size(width: int, height: int, input: InputSpec) -> tuple[int, int]:
    """How many model pixels the region itself takes, (across, down); the rest is filled up."""
    if input.aspect == "stretch":
        return input.width, input.height
    scale = min(input.width / width, input.height / height)
    across, down = round(width * scale), round(height * scale)
    return min(max(across, 1), input.width), min(max(down, 1), input.height)


def _scaled(image: NDArray[np.uint8], across: int, down: int) -> tuple[NDArray[np.uint8], int, int]:
    """`image` at (down, across) and the width and height in its own pixels that the result covers."""
    height, width = image.shape[:2]
    block_x = block_y = 1
    while width >= 2 * across or height >= 2 * down:
        by_x, by_y = 1 + (width >= 2 * across), 1 + (height >= 2 * down)
        # An odd side keeps its last line: as a block of its own, with the line repeated.
        over_x, over_y = -width % by_x, -height % by_y
        if over_x or over_y:
            image = np.asarray(cv2.copyMakeBorder(image, 0, over_y, 0, over_x, cv2.BORDER_REPLICATE), np.uint8)
        width, height = (width + over_x) // by_x, (height + over_y) // by_y
        # Both are the mean of a block; INTER_AREA is the faster one for 2 x 2 and by far the slower for 2 x 1.
        mean = cv2.INTER_AREA if by_x == by_y else cv2.INTER_LINEAR_EXACT
        image = np.asarray(cv2.resize(image, (width, height), interpolation=mean), np.uint8)
        block_x, block_y = block_x * by_x, block_y * by_y
    covered = width * block_x, height * block_y
    if (width, height) != (across, down):
        # INTER_LINEAR's fixed point differs between instruction sets; _EXACT gives the same bytes everywhere.
        image = np.asarray(cv2.resize(image, (across, down), interpolation=cv2.INTER_LINEAR_EXACT), np.uint8)
    return image, *covered
