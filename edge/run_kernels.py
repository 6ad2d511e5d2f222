"""The compiled inner loops of `masks` and of map rendering.

Importing this module compiles them, or loads them from numba's cache. It owns nothing but speed: what the numbers mean
is said in `masks` and `stages.segment`. Every kernel releases the GIL. Kept apart because numba takes half a second to
import, so nothing imports this module at its top level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Read-only in the signature also admits writable arrays; the other way round numba refuses.
_SCORES = types.Array(types.float32, 2, "C", readonly=True)
_VECTOR32 = types.Array(types.float32, 1, "C", readonly=True)
_INDICES = types.Array(types.int64, 1, "C", readonly=True)
_RUNS, _LABELS = types.int32[:, ::1], types.int32[::1]

_CHUNK = 64


def compiled(signature: Any) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Compile now for one signature, through numba's cache where one can be kept.

    A service whose file system is sealed has nowhere to write it: numba then raises at decoration (no locator) or
    while saving. Compiling afresh costs a second at start and nothing later.
    """

    def compile_now(function: Callable[_P, _R]) -> Callable[_P, _R]:
        try:
            return cast(Callable[_P, _R], numba.njit(signature, nogil=True, cache=True)(function))
        except (RuntimeError, OSError):
            return cast(Callable[_P, _R], numba.njit(signature, nogil=True)(function))

    return compile_now


@compiled(types.int64(_SCORES, types.float32, _RUNS, _LABELS))
def find_runs(
    scores: NDArray[np.float32], bound: np.float32, runs: NDArray[np.int32], parents: NDArray[np.int32]
) -> int:
    """Write the runs of `scores > bound` and, for each, the union-find parent that joins 8-connected ones.

    A parent is never greater than its run's own index, so a root is its region's first run in raster order. Returns
    the number of runs, or -1 when they do not fit.
    """
    height, width = scores.shape
    limit = len(runs)
    count = 0
    above = 0  # first run of the row above
    for y in range(height):
        row = scores[y]
        first = count
        start = -1
        x = 0
        while x < width:
            # Counting hits vectorizes, and most chunks are empty, some are full; only mixed ones are walked. It must be
            # a slice walked from 0: numba's negative-index check in `row[x + k]` makes the loop ten times slower.
            part = row[x : x + _CHUNK]
            stop = x + len(part)
            hits = 0
            for k in range(len(part)):
                hits += int(part[k] > bound)
            if hits == 0:
                if start >= 0:
                    if count == limit:
                        return -1
                    runs[count, 0], runs[count, 1], runs[count, 2] = y, start, x
                    count += 1
                    start = -1
            elif hits == len(part):
                if start < 0:
                    start = x
            else:
                for k in range(x, stop):
                    if row[k] > bound:
                        if start < 0:
                            start = k
                    elif start >= 0:
                        if count == limit:
                            return -1
                        runs[count, 0], runs[count, 1], runs[count, 2] = y, start, k
                        count += 1
                        start = -1
            x = stop
        if start >= 0:
            if count == limit:
                return -1
            runs[count, 0], runs[count, 1], runs[count, 2] = y, start, width
            count += 1

        upper = above
        for run in range(first, count):
            parents[run] = run
            # Runs touch, corners included, when neither ends before the other begins.
            while upper < first and runs[upper, 2] < runs[run, 1]:
                upper += 1
            other = upper
            while other < first and runs[other, 1] <= runs[run, 2]:
                a, b = run, other
                while parents[a] != a:
                    parents[a] = parents[parents[a]]
                    a = parents[a]
                while parents[b] != b:
                    parents[b] = parents[parents[b]]
                    b = parents[b]
                if a < b:
                    parents[b] = a
                else:
                    parents[a] = b
                other += 1
        above = first
    return count


@compiled(types.int64(_LABELS))
def number_regions(parents: NDArray[np.int32]) -> int:
    """Turn parents into region numbers 0, 1, ... in raster order of the first run; returns how many there are."""
    number = 0
    for run in range(len(parents)):
        parent = parents[run]
        if parent == run:
            parents[run] = number
            number += 1
        else:
            parents[run] = parents[parent]  # an earlier run, numbered already
    return number


@compiled(
    types.void(
        _SCORES, _RUNS, _LABELS, types.int32[:, ::1], types.int64[::1], types.float32[::1], _RUNS, types.int64[::1]
    )
)
def measure_regions(
    scores: NDArray[np.float32],
    runs: NDArray[np.int32],
    labels: NDArray[np.int32],
    boxes: NDArray[np.int32],
    areas: NDArray[np.int64],
    peaks: NDArray[np.float32],
    grouped: NDArray[np.int32],
    firsts: NDArray[np.int64],
) -> None:
    """Fill boxes (half-open x0, y0, x1, y1), areas and peaks, and sort the runs by region.

    `areas` and `firsts` come in as zeros and `peaks` as -inf; region k's runs end up in
    `grouped[firsts[k] : firsts[k + 1]]`.
    """
    height, width = scores.shape
    for region in range(len(areas)):
        boxes[region, 0], boxes[region, 1], boxes[region, 2], boxes[region, 3] = width, height, 0, 0
    for run in range(len(runs)):
        y, start, stop = runs[run, 0], runs[run, 1], runs[run, 2]
        region = labels[run]
        firsts[region + 1] += 1
        areas[region] += stop - start
        boxes[region, 0] = min(boxes[region, 0], start)
        boxes[region, 1] = min(boxes[region, 1], y)
        boxes[region, 2] = max(boxes[region, 2], stop)
        boxes[region, 3] = max(boxes[region, 3], y + 1)
        peak = peaks[region]
        for score in scores[y, start:stop]:
            peak = max(peak, score)
        peaks[region] = peak
    for region in range(len(areas)):
        firsts[region + 1] += firsts[region]
    cursor = firsts[:-1].copy()
    for run in range(len(runs)):
        place = cursor[labels[run]]
        cursor[labels[run]] += 1
        grouped[place, 0], grouped[place, 1], grouped[place, 2] = runs[run, 0], runs[run, 1], runs[run, 2]


@compiled(types.void(_SCORES, _INDICES, _VECTOR32, _INDICES, _VECTOR32, types.float32[:, ::1], types.float32[:, ::1]))
def interpolate(
    scores: NDArray[np.float32],
    cells_y: NDArray[np.int64],
    parts_y: NDArray[np.float32],
    cells_x: NDArray[np.int64],
    parts_x: NDArray[np.float32],
    widened: NDArray[np.float32],
    rendered: NDArray[np.float32],
) -> None:
    """Bilinear: rendered[y, x] lies `parts_y[y]` of the way from cell `cells_y[y]` to the next, likewise in x.

    Columns first, into `widened` (h', W), so that the pass over all pixels is a vectorized blend of two rows. Each
    result is clamped between its neighbors: rounding must not lift a pixel over a threshold that no cell exceeds.
    """
    height, width = rendered.shape
    rows = scores.shape[0]
    last = scores.shape[1] - 1
    for i in range(cells_y[0], min(cells_y[height - 1] + 2, rows)):
        for x in range(width):
            a = scores[i, cells_x[x]]
            b = scores[i, min(cells_x[x] + 1, last)]
            part = parts_x[x]
            value = a * (np.float32(1.0) - part) + b * part
            widened[i, x] = min(max(value, min(a, b)), max(a, b))
    for y in range(height):
        upper = widened[cells_y[y]]
        lower = widened[min(cells_y[y] + 1, rows - 1)]
        part = parts_y[y]
        rest = np.float32(1.0) - part
        target = rendered[y]
        for x in range(width):
            a = upper[x]
            b = lower[x]
            value = a * rest + b * part
            target[x] = min(max(value, min(a, b)), max(a, b))
