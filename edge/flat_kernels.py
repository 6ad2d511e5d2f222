"""The compiled inner loop of `stages.flatfield`; see `run_kernels` for why it is a file of its own."""

from __future__ import annotations

import numpy as np
from numba import types
from numpy.typing import NDArray

from edge.run_kernels import compiled

_PIXELS = types.Array(types.uint8, 2, "C", readonly=True)
_FLOATS = types.Array(types.float32, 2, "C", readonly=True)
_RANGE = types.Tuple((types.int64, types.int64))  # type: ignore[no-untyped-call]


@compiled(types.void(_PIXELS, _FLOATS, _FLOATS, types.uint8[:, ::1], _RANGE, _RANGE))
def correct(
    image: NDArray[np.uint8],
    gain: NDArray[np.float32],
    dark: NDArray[np.float32],
    out: NDArray[np.uint8],
    rows: tuple[int, int],
    values: tuple[int, int],
) -> None:
    """Write round((image - dark) * gain), clipped to 0..255, into that part of `out`; all (H, W * C), halves to even.

    Every operation is one of single precision in this order, so NumPy's answer is the same to the last bit.
    """
    for y in range(rows[0], rows[1]):
        # Rows of their own, counted from 0: only then does the compiler see that no index is negative, and vectorizes.
        seen, by, off = image[y, values[0] : values[1]], gain[y, values[0] : values[1]], dark[y, values[0] : values[1]]
        to = out[y, values[0] : values[1]]
        for x in range(seen.shape[0]):
            value = np.rint((np.float32(seen[x]) - off[x]) * by[x])
            to[x] = np.uint8(min(max(value, np.float32(0)), np.float32(255)))
