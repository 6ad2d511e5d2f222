"""Binary masks as runs, and the regions they form. Owns run-length masks and run-based labelling; thresholds belong to `stages.segment`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class RunLength:
    """A binary mask as horizontal runs.

    `runs` is (K, 3) int32, rows of (row, start, stop) with half-open columns, sorted by row then start, never touching
    within a row; read-only. `height` and `width` are the mask's size in pixels.
    """

    runs: NDArray[np.int32]
    height: int
    width: int
