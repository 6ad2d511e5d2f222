"""Where in a frame something is planted: regions by grid or by masks, and a place in one, drawn evenly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.errors import DataError, ImageRefused
from edge.images import read_image

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Where defects are planted: a box of a frame's pixels, and of those only where `mask` says, if there is one."""

    name: str
    box: Box | None = None
    mask: NDArray[np.bool_] | None = None


def regions_of(
    sizes: set[tuple[int, int]], *, roi_xywh: Box | None, grid: tuple[int, int], masks: Path | None
) -> list[Region]:
    """The regions in frames of `sizes` (height, width): a grid of the region of interest, or one for each mask.

    Raises:
        DataError: the masks are missing, empty or of another size.
    """
    if masks is not None:
        if not masks.is_dir():
            raise DataError(
                f"{masks}: no such folder; expected masks NAME.png of the frame's size, not 0 in the region"
            )
        return [_masked(path, sizes) for path in sorted(masks.iterdir())]
    if grid == (1, 1):
        return [Region("all", roi_xywh)]
    heights, widths = zip(*sizes, strict=True)
    x, y, width, height = roi_xywh or (0, 0, min(widths), min(heights))
    rows, columns = grid
    edges_x = [x + width * i // columns for i in range(columns + 1)]
    edges_y = [y + height * i // rows for i in range(rows + 1)]
    return [
        Region(
            f"row {j + 1} column {i + 1}",
            (edges_x[i], edges_y[j], edges_x[i + 1] - edges_x[i], edges_y[j + 1] - edges_y[j]),
        )
        for j in range(rows)
        for i in range(columns)
    ]


def _masked(path: Path, sizes: set[tuple[int, int]]) -> Region:
    try:
        mask = read_image(path, channels=1)[:, :, 0] > 0
    except ImageRefused as error:
        raise DataError(f"mask {error}") from None
    if sizes != {mask.shape} or not mask.any():
        found = " and ".join(sorted(f"{width} x {height}" for height, width in sizes))
        raise DataError(
            f"{path}: a mask of {mask.shape[1]} x {mask.shape[0]} px with {int(mask.sum())} pixels set, for images of "
            f"{found}; a mask has its frame's size and something in it"
        )
    return Region(path.stem, None, mask)


def place(region: Region, frame_size: tuple[int, int], margin: float, rng: np.random.Generator) -> tuple[float, float]:
    """A center in the region, drawn evenly, such that what is planted there lies within the frame."""
    height, width = frame_size
    x, y, across, down = region.box or (0, 0, width, height)
    left, right = max(x, margin), min(x + across, width - margin)
    top, bottom = max(y, margin), min(y + down, height - margin)
    if left < right and top < bottom:
        if region.mask is None:
            return float(rng.uniform(left, right)), float(rng.uniform(top, bottom))
        rows, columns = np.nonzero(region.mask)
        inside = (columns >= left) & (columns < right) & (rows >= top) & (rows < bottom)
        if inside.any():
            at = rng.integers(int(inside.sum()))
            return float(columns[inside][at]) + 0.5, float(rows[inside][at]) + 0.5
    raise DataError(
        f"region {region.name!r}: a defect of {2 * margin:.0f} px has no place in it within a frame of {width} x "
        f"{height} px; leave that size out (--sizes)"
    )
