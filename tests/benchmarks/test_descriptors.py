"""The descriptor probe: parts never straddle the split."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from benchmarks.descriptors import CENTERS, split
from trainer.patch_nets import PROFILES


def test_tiles_of_one_strip_are_never_on_both_sides(tmp_path: Path) -> None:
    """The strip (or magnet tile) is the part: judging a neighbor of a bank image would flatter every descriptor."""
    good = tmp_path / "train" / "good"
    good.mkdir(parents=True)
    for strip in range(6):
        for tile in range(4):
            cv2.imwrite(str(good / f"strip{strip}_x{tile}.png"), np.full((40, 40), 30 * strip + tile, np.uint8))

    bank, judged = split(tmp_path, 60, 40)

    strips = [{int(image[0, 0, 0]) // 30 for image in side} for side in (bank, judged)]
    assert len(strips[0]) + len(strips[1]) == 6 and not strips[0] & strips[1]


def test_centers_are_those_of_the_line_profile() -> None:
    """The pixel under each descriptor's footprint, for the mask's resolution."""
    spec = PROFILES["line"]

    assert (
        len(CENTERS) == spec.grid(256)
        and CENTERS[0] == round(spec.center + 0.5)
        and CENTERS[1] - CENTERS[0] == spec.stride
    )
