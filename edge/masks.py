"""Binary masks as runs, and the regions they form.

Owns run-length masks and run-based connected-component labelling of a score map; which threshold and which area count
belongs to `stages.segment`. The compiled inner loops are in `run_kernels`, loaded on first use or by `warm`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

RUN_LIMIT = 262_144
"""Runs beyond which labelling is left to OpenCV, which is then no slower; the run buffers stay below 8 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class RunLength:
    """A binary mask as horizontal runs.

    `runs` is (K, 3) int32, rows of (row, start, stop) with half-open columns, sorted by row then start, never touching
    within a row; read-only. `height` and `width` are the mask's size in pixels.
    """

    runs: NDArray[np.int32]
    height: int
    width: int

    def __post_init__(self) -> None:
        self.runs.setflags(write=False)

    @classmethod
    def from_mask(cls, mask: NDArray[np.bool_]) -> Self:
        """The runs of `mask` (H, W) bool.

        Raises:
            ValueError: not two-dimensional or not bool.
        """
        if mask.ndim != 2 or mask.dtype != np.bool_:
            raise ValueError(f"a mask is (H, W) bool, not {mask.shape} {mask.dtype}")
        return cls(_runs_of(mask), mask.shape[0], mask.shape[1])

    def to_mask(self) -> NDArray[np.bool_]:
        """The mask as (height, width) bool."""
        mask = np.zeros((self.height, self.width), np.bool_)
        rows, starts, stops = (self.runs[:, column].astype(np.int64) for column in range(3))
        lengths = stops - starts
        # Every pixel's flat index: its run's first index, less the pixels of the runs before it, plus its own count.
        before = np.cumsum(lengths) - lengths
        first = rows * self.width + starts - before
        mask.reshape(-1)[np.repeat(first, lengths) + np.arange(int(lengths.sum()))] = True
        return mask

    @property
    def area_px(self) -> int:
        """How many pixels are set."""
        return int((self.runs[:, 2] - self.runs[:, 1]).sum(dtype=np.int64))

    @property
    def box_xyxy(self) -> tuple[int, int, int, int]:
        """The smallest half-open box around the set pixels; (0, 0, 0, 0) for an empty mask."""
        if len(self.runs) == 0:
            return 0, 0, 0, 0
        rows, starts, stops = self.runs[:, 0], self.runs[:, 1], self.runs[:, 2]
        return int(starts.min()), int(rows[0]), int(stops.max()), int(rows[-1]) + 1


@dataclass(frozen=True, slots=True, eq=False)
class MaskRegion:
    """One 8-connected region: half-open `box_xyxy`, `area_px`, `peak` (its largest score) and its `mask`."""

    box_xyxy: tuple[int, int, int, int]
    area_px: int
    peak: float
    mask: RunLength


def warm() -> None:
    """Load (or, without a writable cache, compile) the kernels, so that the first defect does not wait for it."""
    regions(np.zeros((1, 1), np.float32), 0.0)


def regions(
    scores: NDArray[np.float32],
    threshold: float,
    *,
    min_area_px: int = 1,
    limit: int | None = None,
    origin_xy: tuple[int, int] = (0, 0),
    frame_size: tuple[int, int] | None = None,
    run_limit: int = RUN_LIMIT,
) -> list[MaskRegion]:
    """The 8-connected regions of `scores` (H, W) float32 greater than `threshold`, biggest first, ties in raster order.

    Regions under `min_area_px` are left out and at most `limit` are returned. `scores` may be a part of a larger frame:
    `origin_xy` is where it lies there and `frame_size` is that frame's (height, width). NaN belongs to no region.
    Past `run_limit` runs OpenCV labels the mask, with the same answer.

    Raises:
        ValueError: not (H, W) float32, a threshold that is not a number, or a part that is not within the frame.
    """
    if scores.ndim != 2 or scores.dtype != np.float32:
        raise ValueError(f"a score map is (H, W) float32, not {scores.shape} {scores.dtype}")
    height, width = frame_size or scores.shape
    x, y = origin_xy
    if x < 0 or y < 0 or y + scores.shape[0] > height or x + scores.shape[1] > width:
        raise ValueError(f"a {scores.shape} map at {origin_xy} is not within a frame of {(height, width)}")
    if scores.size == 0:
        return []
    scores = np.ascontiguousarray(scores)
    bound = float32_floor(threshold)
    table = _label(scores, bound, run_limit) or _label_by_opencv(scores, bound)
    order = np.lexsort((np.arange(len(table.areas)), -table.areas))
    order = order[table.areas[order] >= min_area_px][:limit]
    shift = np.array((y, x, x), np.int32)
    return [
        MaskRegion(
            box_xyxy=(int(x0) + x, int(y0) + y, int(x1) + x, int(y1) + y),
            area_px=int(table.areas[index]),
            peak=float(table.peaks[index]),
            mask=RunLength(table.runs[table.firsts[index] : table.firsts[index + 1]] + shift, height, width),
        )
        for index, (x0, y0, x1, y1) in zip(order.tolist(), table.boxes[order].tolist(), strict=True)
    ]


def float32_floor(threshold: float) -> np.float32:
    """The largest float32 not above `threshold`: `score > floor` then says exactly what `score > threshold` says.

    Raises:
        ValueError: the threshold is NaN.
    """
    if math.isnan(threshold):
        raise ValueError("a threshold must be a number, not NaN")
    with np.errstate(over="ignore"):
        nearest = np.float32(threshold)
    return nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-np.inf))


@dataclass(frozen=True, slots=True, eq=False)
class _RegionTable:
    """Regions in raster order of their first run: boxes (n, 4), areas (n,), peaks (n,), and runs, region by region.

    Region k's runs are `runs[firsts[k] : firsts[k + 1]]`.
    """

    boxes: NDArray[np.int32]
    areas: NDArray[np.int64]
    peaks: NDArray[np.float32]
    runs: NDArray[np.int32]
    firsts: NDArray[np.int64]


def _label(scores: NDArray[np.float32], bound: np.float32, run_limit: int) -> _RegionTable | None:
    """Label by runs; None when there are more than `run_limit` of them."""
    from edge import run_kernels  # numba costs half a second to import; most programs that touch masks never label

    # Uninitialized pages cost nothing until they are written, so the buffers are sized for the worst case.
    runs = np.empty((run_limit, 3), np.int32)
    labels = np.empty(run_limit, np.int32)
    count = run_kernels.find_runs(scores, bound, runs, labels)
    if count < 0:
        return None
    runs, labels = runs[:count], labels[:count]
    number = run_kernels.number_regions(labels)
    boxes = np.empty((number, 4), np.int32)
    areas = np.zeros(number, np.int64)
    peaks = np.full(number, -np.inf, np.float32)
    grouped = np.empty((count, 3), np.int32)
    firsts = np.zeros(number + 1, np.int64)
    run_kernels.measure_regions(scores, runs, labels, boxes, areas, peaks, grouped, firsts)
    return _RegionTable(boxes, areas, peaks, grouped, firsts)


def _label_by_opencv(scores: NDArray[np.float32], bound: np.float32) -> _RegionTable:
    """The same table from cv2.connectedComponentsWithStats, at a cost that hardly depends on the number of runs."""
    from edge.images import cv2

    mask = scores > bound
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8, ltype=cv2.CV_32S)
    number = count - 1  # label 0 is the background
    runs = _runs_of(mask)
    run_labels = labels[runs[:, 0], runs[:, 1]] - 1
    first_run = np.empty(number, np.int64)
    first_run[run_labels[::-1]] = np.arange(len(runs))[::-1]  # of equal labels the last write stays: the first run
    by_raster = np.argsort(first_run)
    rank = np.empty(number, np.int64)
    rank[by_raster] = np.arange(number)
    order = np.argsort(rank[run_labels], kind="stable")
    firsts = np.zeros(number + 1, np.int64)
    firsts[1:] = np.cumsum(np.bincount(rank[run_labels], minlength=number))
    left, top, width, height, area = stats[1:, :5].astype(np.int32)[by_raster].T
    peaks = np.empty(0, np.float32)
    if number:
        lengths = runs[:, 2] - runs[:, 1]
        run_peaks = np.maximum.reduceat(scores[mask], np.cumsum(lengths) - lengths)
        peaks = np.maximum.reduceat(run_peaks[order], firsts[:-1])
    boxes = np.stack((left, top, left + width, top + height), axis=1)
    return _RegionTable(boxes, area.astype(np.int64), peaks, runs[order], firsts)


def _runs_of(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Rows of (row, start, stop), sorted by row then start."""
    height, width = mask.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask
    edges = np.diff(padded, axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    return np.stack((rows, starts, stops), axis=1).astype(np.int32)


def coco_counts(mask: NDArray[np.bool_]) -> str:
    """`mask` (H, W) as the `counts` of a COCO run-length encoding: runs down the columns, beginning with False.

    Numbers are written as pycocotools does: each from the third on as the difference to the one two before, 5 bits a
    letter (cocodataset/cocoapi: common/maskApi.c, rleToString).
    """
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    if flat.size and flat[0]:
        counts = [0, *counts]
    letters: list[str] = []
    for at, count in enumerate(counts):
        rest = count - counts[at - 2] if at > 2 else count
        more = True
        while more:
            bits = rest & 31
            rest >>= 5
            more = rest != (-1 if bits & 16 else 0)
            letters.append(chr(48 + (bits | 32 if more else bits)))
    return "".join(letters)
