"""A mask's outline: small for any mask, and no flaw is lost on the way."""

from __future__ import annotations

import re

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.console.outline import MAX_POINTS, outline
from edge.images import cv2


def drawn(path: str, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The path filled by the even-odd rule, as a browser fills it."""
    canvas = np.zeros(shape, np.uint8)
    for part in path.split("M")[1:]:
        if "H" in part:
            x0, y0, x1, y1 = (int(found) for found in re.match(r"(\d+) (\d+)H(\d+)V(\d+)", part).groups())  # type: ignore[union-attr]
            points = np.array([[x0, y0], [x1 - 1, y0], [x1 - 1, y1 - 1], [x0, y1 - 1]])
        else:
            points = np.array([[int(value) for value in pair.split()] for pair in part.rstrip("Z").split("L")])
        filled = np.zeros(shape, np.uint8)
        cv2.fillPoly(filled, [points.astype(np.int32)], 1)
        canvas ^= filled
    return canvas > 0


def disk(shape: tuple[int, int], x: int, y: int, radius: int) -> NDArray[np.bool_]:
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return np.asarray((rows - y) ** 2 + (columns - x) ** 2 <= radius**2)


def overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_an_outline_covers_what_the_mask_covers() -> None:
    """Filled again it is the mask."""
    mask = disk((200, 300), 150, 90, 40)

    assert overlap(drawn(outline(mask), mask.shape), mask) > 0.97


def test_a_hole_stays_a_hole() -> None:
    """A ring around a good middle."""
    mask = disk((200, 200), 100, 100, 60) & ~disk((200, 200), 100, 100, 30)

    again = drawn(outline(mask), mask.shape)

    assert not again[100, 100] and overlap(again, mask) > 0.9


@pytest.mark.parametrize(("x", "y"), [(0, 0), (4095, 4095), (2000, 17)])
def test_a_flaw_of_one_pixel_survives_the_reduction(x: int, y: int) -> None:
    """In a frame of sixteen megapixels; it is drawn as the cell that it lies in."""
    mask = np.zeros((4096, 4096), np.bool_)
    mask[y, x] = True

    assert drawn(outline(mask), mask.shape)[y, x]


def test_a_mask_of_noise_gives_a_bounded_path() -> None:
    """Half of all pixels, at random: thousands of contours, of which the biggest are told."""
    noise = np.random.default_rng(1).random((2000, 3000)) > 0.5

    assert 0 < outline(noise).count("L") <= MAX_POINTS and len(outline(noise)) < 20_000


def test_nothing_set_is_nothing_drawn() -> None:
    """Control."""
    assert outline(np.zeros((50, 60), np.bool_)) == ""


def test_a_mask_that_is_set_everywhere_is_its_frame() -> None:
    """The whole frame."""
    full = np.ones((1000, 1500), np.bool_)

    assert overlap(drawn(outline(full), full.shape), full) > 0.98
