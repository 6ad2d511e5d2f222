"""Defects planted into pictures of good parts: what options, and the choice of receptive fields, are judged by.

Owns the drawing of one small or one large flaw and its mask.  They are no real flaws, and no method learns from them
here; they tell without a test image which of two ways of scoring sees more (docs/benchmarks.md, "Options").
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from trainer.method import Frames

Floats = NDArray[np.floating]

SIDE_PX = 256
MARGIN_PX = 40
"""Small flaws keep this far from the rim of a picture of ``SIDE_PX``."""


def small_flaw(image: Frames, donor: Frames, random: np.random.Generator) -> tuple[Frames, Frames]:
    """A scratch, blob, foreign texture or dent of a few px: (h, w, C) uint8, and its mask (h, w) of 0 and 255.

    ``donor`` is another good picture of the same shape, whose texture is the foreign one.
    """
    mask = np.zeros(image.shape[:2], np.uint8)
    side = image.shape[0]
    margin = MARGIN_PX * side // SIDE_PX
    center = random.integers(margin, side - margin, 2)
    x, y = int(center[0]), int(center[1])
    kind = random.integers(4)
    if kind == 0:  # scratch: a line 1 to 3 px wide
        angle, length = random.uniform(0, np.pi), random.integers(10, 40)
        dx, dy = int(np.cos(angle) * length / 2), int(np.sin(angle) * length / 2)
        cv2.line(mask, (x - dx, y - dy), (x + dx, y + dy), 255, int(random.integers(1, 4)), cv2.LINE_AA)
    else:
        axes = (int(random.integers(2, 13)), int(random.integers(2, 13)))
        cv2.ellipse(mask, (x, y), axes, float(random.uniform(0, 180)), 0, 360, 255, -1, cv2.LINE_AA)
    weight = _softened(mask)
    contrast = float(np.std(image[max(y - 32, 0) : y + 32, max(x - 32, 0) : x + 32])) + 4.0
    strength = float(random.choice((-1, 1)) * random.uniform(0.6, 2.0)) * contrast
    pixels = image.astype(np.float32)
    if kind == 2:  # foreign texture: from another image, turned
        other = _turned(donor)
        changed = other - other.mean() + pixels[mask > 0].mean() if mask.any() else other
    elif kind == 3:  # dent: shaded light and dark across the spot
        ramp = np.clip((np.arange(side) - x) / 8.0, -1, 1)[None, :, None]
        changed = pixels + 0.8 * strength * ramp
    else:  # scratch and blob: brighter or darker
        changed = pixels + strength
    return _blended(pixels, changed, weight), mask


def large_flaw(image: Frames, donor: Frames, random: np.random.Generator) -> tuple[Frames, Frames]:
    """An ellipse over a tenth to a third of the image, half of it ``donor``'s texture, lighter or darker; its mask."""
    side = image.shape[0]
    mask = np.zeros(image.shape[:2], np.uint8)
    center = random.integers(round(0.27 * side), round(0.73 * side), 2)
    axes = random.uniform((0.2, 0.16), (0.35, 0.31)) * side
    cv2.ellipse(mask, center.tolist(), axes.astype(int).tolist(), float(random.uniform(0, 180)), 0, 360, 255, -1)
    pixels = image.astype(np.float32)
    strength = float(random.choice((-1, 1)) * random.uniform(0.4, 1.2)) * (float(pixels.std()) + 4)
    changed = np.clip(0.5 * pixels + 0.5 * _turned(donor) + strength, 0, 255)
    return _blended(pixels, changed, _softened(mask)), mask


def _softened(mask: Frames) -> Floats:
    return (cv2.GaussianBlur(mask, (3, 3), 0).astype(np.float32) / 255)[..., None]


def _turned(donor: Frames) -> Floats:
    """Another picture's texture out of its place, so that parts that lie alike do not hide it."""
    return np.rot90(np.roll(donor, (31, 57), axis=(0, 1))).astype(np.float32)


def _blended(pixels: Floats, changed: Floats, weight: Floats) -> Frames:
    mixed = pixels * (1 - weight) + changed * weight
    return np.clip(mixed, 0, 255).astype(np.uint8)
