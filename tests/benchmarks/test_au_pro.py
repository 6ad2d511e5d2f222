"""The exact AU-PRO is that of straightforward implementations with scikit-image, ties and all."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.au_pro import by_sorting, by_thresholds, rounded, test_set
from calib.metrics import au_pro

test_set.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_it_equals_one_sort_of_all_pixels(limit: float) -> None:
    """Any map, any limit: within 1e-6."""
    maps, masks = test_set(12, seed=4)

    assert au_pro(maps, masks, limit) == pytest.approx(by_sorting(maps, masks, limit), abs=1e-6)


def test_it_equals_the_loop_over_thresholds_where_scores_tie() -> None:
    """Maps of 200 levels, every one of which is a threshold."""
    maps, masks = test_set(9, seed=5)

    assert au_pro(rounded(maps), masks, 0.3) == pytest.approx(by_thresholds(rounded(maps), masks, 0.3), abs=1e-6)


def test_control_a_pixel_that_moves_is_noticed_at_that_tolerance() -> None:
    """Planted: one flaw's pixels lowered by a tenth changes the figure by more than 1e-6."""
    maps, masks = test_set(6, seed=6)
    wrong = [one.copy() for one in maps]
    wrong[1][masks[1]] -= np.float32(0.1)

    assert abs(au_pro(wrong, masks, 0.3) - by_sorting(maps, masks, 0.3)) > 1e-6
