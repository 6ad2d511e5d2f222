"""Planted defects are what they say: size, contrast, place, to a fraction of a pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest

from calib.planting import SCRATCH_WIDTH_PX, Defect, plant

GRAY = np.full((80, 100, 3), 120, np.uint8)


def change(defect: Defect, center: tuple[float, float] = (50.0, 40.0)) -> tuple[np.ndarray, np.ndarray]:
    planted, mask = plant(GRAY, defect, center)
    assert (GRAY == 120).all()
    return planted[:, :, 0].astype(int) - 120, mask


@pytest.mark.parametrize("size", [3.0, 7.5, 20.0, 41.3])
@pytest.mark.parametrize("center", [(50.0, 40.0), (50.37, 40.81)])
def test_a_spot_covers_its_disk(size: float, center: tuple[float, float]) -> None:
    """Area by summed change and by mask; the middle has the whole contrast."""
    changed, mask = change(Defect("spot", size, -50), center)

    assert changed.min() == -50 and changed.max() == 0
    assert -changed.sum() / 50 == pytest.approx(math.pi * size**2 / 4, rel=0.02, abs=0.35)
    assert mask.sum() == pytest.approx(math.pi * size**2 / 4, rel=0.08, abs=3.5)


@pytest.mark.parametrize("angle", [0.0, 0.4, math.pi / 2, 2.5])
def test_a_scratch_is_as_long_as_it_says(angle: float) -> None:
    """Length times width in summed change, and its ends where they belong, whatever its direction."""
    changed, mask = change(Defect("scratch", 30.0, 40, angle))
    rows, columns = np.nonzero(mask)
    along = (columns + 0.5 - 50) * math.cos(angle) + (rows + 0.5 - 40) * math.sin(angle)

    assert changed.sum() / 40 == pytest.approx(30 * SCRATCH_WIDTH_PX, rel=0.06)
    assert np.ptp(along) == pytest.approx(29, abs=1.2) and abs(along.mean()) < 0.3


def test_a_dent_is_bright_on_one_side_and_dark_on_the_other() -> None:
    """Its mean is the ground's, its extremes are the contrast."""
    changed, mask = change(Defect("dent", 24.0, 35, 0.0))

    assert changed.max() == pytest.approx(35, abs=1) and changed.min() == pytest.approx(-35, abs=1)
    assert changed[:, 50:].sum() > 1000 and abs(changed.sum()) < 30
    assert mask.sum() == pytest.approx(math.pi * 144, rel=0.03)


def test_values_are_clipped_and_nothing_else_is_touched() -> None:
    """Outside its reach the picture is the same, at the frame's rim as well."""
    defect = Defect("spot", 9.0, -200)
    changed, _ = change(defect, (2.0, 78.0))
    far = np.hypot(*np.meshgrid(np.arange(100) + 0.5 - 2, np.arange(80) + 0.5 - 78)) > defect.reach_px

    assert changed.min() == -120 and (changed[far] == 0).all()
    with pytest.raises(ValueError, match="not within 100 x 80 px"):
        plant(GRAY, defect, (-50.0, 40.0))
