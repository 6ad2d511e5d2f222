"""Planted flaws: visible where the mask says, nowhere else, the same for the same seed."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from trainer.planted import large_flaw, small_flaw


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("planted", [small_flaw, large_flaw])
def test_a_flaw_changes_the_picture_near_its_mask_and_nowhere_else(planted: Any, channels: int) -> None:
    """Twenty draws cover all four kinds of small ones: each is visible, and untouched two pixels from the mask."""
    random = np.random.default_rng(0)
    image = random.integers(80, 170, (256, 256, channels), dtype=np.uint8)
    donor = random.integers(0, 256, (256, 256, channels), dtype=np.uint8)

    for _ in range(20):
        picture, mask = planted(image, donor, random)
        far = cv2.dilate(mask, np.ones((5, 5), np.uint8)) == 0
        assert picture.shape == image.shape
        assert mask.any()
        assert (picture[mask > 0] != image[mask > 0]).any()
        assert np.array_equal(picture[far], image[far])


def test_large_flaws_cover_a_tenth_to_a_third_of_the_picture() -> None:
    """Small ones stay below a fiftieth, so that the two sizes ask different things."""
    image = np.full((256, 256, 1), 120, np.uint8)
    shares = {
        planted: [planted(image, image, np.random.default_rng(seed))[1].mean() / 255 for seed in range(20)]
        for planted in (small_flaw, large_flaw)
    }

    assert max(shares[small_flaw]) < 0.02
    assert 0.09 < min(shares[large_flaw]) < max(shares[large_flaw]) < 0.35
