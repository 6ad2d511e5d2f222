"""Confetti noise: anomalies made of good images (FCDD, section 4.2), with the mask of what was changed.

Owns the noise.  Two layers of smoothed square blobs are added to an image: colored ones, each of one random offset, and
dark ones.  Figures are those of the authors' code for images of 224 px, scaled to the side at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

REFERENCE_SIDE_PX: Final = 224
CHANGED: Final = 4.0
"""Gray levels of change from which a pixel belongs to the mask."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Blob centers come with ``probability`` a pixel; a blob adds ``lowest`` to ``highest`` to each channel."""

    probability: float
    lowest: float
    highest: float


COLORED: Final = Layer(1.8e-5, -256.0, 0.0)
DARK: Final = Layer(1.2e-5, -255.0, -255.0)
SIDES_PX: Final = (8, 54)
ANGLE_DEG: Final = 45.0
SMOOTHING: Final = (25, 5.0)
"""Taps and deviation of the Gaussian that smooths the blobs' edges."""

INVERT_BELOW: Final = 0.025
"""Mean change in gray levels below which inverted noise is tried: dark blobs do not show on black."""


def with_confetti(image: NDArray[np.uint8], random: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """``image`` (h, w, C) with confetti on it, and the mask (h, w) of what that changed."""
    noise = sum((_layer(image.shape, layer, random) for layer in (COLORED, DARK)), np.zeros(image.shape, np.float32))
    changed = _added(image, noise)
    if abs(float((changed.astype(np.float32) - image).mean())) < INVERT_BELOW:
        inverted = _added(image, -noise)
        more = np.abs(inverted.astype(np.float32) - image).mean() > np.abs(changed.astype(np.float32) - image).mean()
        changed = inverted if more else changed
    difference = np.abs(changed.astype(np.float32) - image).max(2)
    return changed, difference >= CHANGED


def _layer(shape: tuple[int, ...], layer: Layer, random: np.random.Generator) -> NDArray[np.float32]:
    height, width, channels = shape
    scale = min(height, width) / REFERENCE_SIDE_PX
    made = np.zeros(shape, np.float32)
    # At least one: an anomaly without any is a good image under the wrong label.
    count = max(1, int(random.binomial(REFERENCE_SIDE_PX**2, layer.probability)))
    for _ in range(count):
        side = float(random.uniform(*SIDES_PX)) * scale
        center = (float(random.uniform(0, width)), float(random.uniform(0, height)))
        corners = cv2.boxPoints((center, (side, side), float(random.uniform(-ANGLE_DEG, ANGLE_DEG))))
        mask = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mask, [np.round(corners).astype(np.int32)], 1)
        made += mask[:, :, None] * random.uniform(layer.lowest, layer.highest, channels).astype(np.float32)
    taps, sigma = SMOOTHING
    smooth = cv2.GaussianBlur(made, (taps, taps), sigma * scale)
    return np.asarray(smooth, np.float32).reshape(shape)


def _added(image: NDArray[np.uint8], noise: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.asarray(np.clip(image + noise, 0, 255), np.uint8)
