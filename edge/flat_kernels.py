"""The compiled inner loop of `stages.flatfield`; see `run_kernels` for why it is a file of its own."""

from __future__ import annotations

import numpy as np
from numba import types
from numpy.typing import NDArray

from edge.run_kernels import compiled

_PIXELS = types.Array(types.uint8, 2, "C", readonly=True)
_FLOATS = types.Array(types.float32, 2, "C", readonly=True)
_INDEX = types.int64


@compiled(types.void(_PIXELS, _FLOATS, _FLOATS, types.uint8[:, ::1], _INDEX, _INDEX, _INDEX, _INDEX))
def correct(
    image: NDArray[np.uint8],
    gain: NDArray[np.float32],
    dark: NDArray[np.float32],
    out: NDArray[np.uint8],
    top: int,
    bottom: int,
    left: int,
    right: int,
) -> None:
    """Write round((image - dark) * gain), clipped to 0..255, into `out`[top:bottom, left:right]; all (H, W * C).

    Halves go to even. Every operation is one of single precision in this order, so NumPy gives the same bytes.
    """
    for y in range(top, bottom):
        # Rows of their own, counted from 0: only then does the compiler see that no index is negative, and vectorizes.
        seen, by, off = image[y, left:right], gain[y, left:right], dark[y, left:right]
        to = out[y, left:right]
        for x in range(seen.shape[0]):
            value = np.rint((np.float32(seen[x]) - off[x]) * by[x])
            to[x] = np.uint8(min(max(value, np.float32(0)), np.float32(255)))
