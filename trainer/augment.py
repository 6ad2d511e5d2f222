"""Photometric and geometric changes that leave a good part good.

Owns the changes only; which frames get them, and with which draws, is the method's choice.  Anomalies made of good
images are in ``confetti``.
"""

from __future__ import annotations

from typing import Final, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Augment = Literal["none", "light", "views"]
"""``light``: brightness, contrast and noise.  ``views``: brightness, contrast, mirror images, shifts."""

STRENGTHS: Final = ((0.04, 0.04), (0.005, 0.0005))
"""Brightness and contrast within these shares, one pair or the other (FCDD, authors' code)."""

NOISE: Final = 0.1
"""Deviation of the noise that half the images get, in deviations of the image (the same)."""

SHIFT: Final = 1 / 8
"""Largest shift as a share of the side: 4 of 32 px, as is usual for CIFAR-10."""


def augmented(image: Image, kind: Augment, random: np.random.Generator) -> Image:
    """``image`` (h, w, C) changed as ``kind`` says; itself for ``none``."""
    if kind == "none":
        return image
    if kind == "light":
        return jittered(image, random, noise=NOISE)
    return jittered(moved(image, random), random, noise=0.0)


def jittered(image: Image, random: np.random.Generator, *, noise: float) -> Image:
    """``image`` with brightness and contrast within 4 % (or 0.5 and 0.05 %) and, half the time, noise.

    The authors' changes for MVTec AD without saturation and hue, which gray images do not have; ``noise`` is its
    deviation in deviations of the image.
    """
    brightness, contrast = STRENGTHS[int(random.integers(len(STRENGTHS)))]
    pixels = image.astype(np.float32) * np.float32(random.uniform(1 - brightness, 1 + brightness))
    mean = pixels.mean()
    pixels = (pixels - mean) * np.float32(random.uniform(1 - contrast, 1 + contrast)) + mean
    if noise > 0 and random.random() < 0.5:
        pixels += random.standard_normal(image.shape, np.float32) * np.float32(noise * float(image.std()))
    return np.asarray(np.clip(np.rint(pixels), 0, 255), np.uint8)


def moved(image: Image, random: np.random.Generator) -> Image:
    """``image`` shifted by up to ``SHIFT`` of its side, its rim mirrored, and mirrored as a whole half the time."""
    height, width = image.shape[:2]
    y, x = (int(side * SHIFT) for side in (height, width))
    wide = cv2.copyMakeBorder(image, y, y, x, x, cv2.BORDER_REFLECT).reshape(height + 2 * y, width + 2 * x, -1)
    top, left = int(random.integers(2 * y + 1)), int(random.integers(2 * x + 1))
    cut = wide[top : top + height, left : left + width]
    return np.ascontiguousarray(cut[:, ::-1] if random.random() < 0.5 else cut)
