"""Regions of any size at native resolution: the tiles that cover one, and their maps put together to one map.

Owns the plan (arithmetic on sides, stride, offset and rim), cutting and stitching. Running tiles is the engine's
matter, feeding them `inference`'s. All cells of a region lie on one grid, since every tile starts at a multiple of the
map's stride; each is taken from a tile that saw its whole receptive field, or the frame's own edge. So the stitched map
is that of the same network run on the whole region, if the network is local (a cell depends on its receptive field, not
on the mean of the picture) and gives the same cells, one further, when the picture is moved by a stride.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.bundle import InputSpec, MapGeometry
from edge.errors import BundleError, EngineError
from edge.types import ModelInput, Roi


@dataclass(frozen=True, slots=True)
class Span:
    """One tile along one axis: it starts at pixel `origin_px` of the region and gives the cells [first, stop).

    Cells are numbered along the whole region; `skip` of the tile's own ones come before `first`.
    """

    origin_px: int
    first: int
    stop: int
    skip: int

    @property
    def own(self) -> slice:
        """Where those cells are in the tile's own map."""
        return slice(self.skip, self.skip + self.stop - self.first)


@dataclass(frozen=True, slots=True)
class Axis:
    """What tiling needs to know of one axis: a tile's `side_px` and `cells`, and where those lie (see MapGeometry)."""

    side_px: int
    cells: int
    stride_px: int
    offset_px: float
    rim_px: int

    def cells_over(self, side_px: int) -> int:
        """How many cells the same network has over `side_px` pixels.

        Without padding a cell is where its whole field, 2 * offset + 1 pixels around its center, lies inside; with
        padding it is where its center does.
        """
        if self.rim_px:
            return math.ceil((side_px - 0.5 - self.offset_px) / self.stride_px)
        return math.floor((side_px - 1 - 2 * self.offset_px) / self.stride_px) + 1

    @property
    def lead(self) -> int:
        """Cells before the first whose center is at least `rim_px` pixels from the tile's start."""
        return max(0, math.ceil((self.rim_px - self.offset_px) / self.stride_px)) if self.rim_px else 0

    @property
    def trail(self) -> int:
        """Cells after the last whose center is at least `rim_px` pixels from the tile's end."""
        clean = math.floor((self.side_px - 1 - self.rim_px - self.offset_px) / self.stride_px) + 1
        return max(0, self.cells - clean) if self.rim_px else 0

    @property
    def step(self) -> int:
        """Cells that a tile gives between two others, and so from one tile to the next; none if below 1."""
        return self.cells - self.lead - self.trail

    def spans(self, side_px: int) -> tuple[Span, ...]:
        """The tiles that cover `side_px` pixels, each cell in exactly one of them; the last ends where the region does.

        The last may reach beyond it: by less than a stride, or in a region smaller than a tile by what that lacks.
        """
        total = self.cells_over(side_px)
        # Padding must lie where the region ends or beyond, never inside of it.
        beyond = math.ceil((side_px - self.side_px) / self.stride_px)
        last = max(0, beyond if self.rim_px else total - self.cells)
        spans, origin, done = [], 0, 0
        while done < total:
            stop = total if origin == last else min(origin + self.cells - self.trail, total)
            spans.append(Span(origin * self.stride_px, done, stop, done - origin))
            done, origin = stop, min(origin + self.step, last)
        return tuple(spans)


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile of a region, by its place along both axes."""

    row: Span
    column: Span


@dataclass(frozen=True, slots=True)
class Plan:
    """How a region is scored: every pair of `rows` and `columns` is a tile, `geometry` is that of the stitched map."""

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    geometry: MapGeometry

    def __len__(self) -> int:
        """How many tiles there are."""
        return len(self.rows) * len(self.columns)

    def __iter__(self) -> Iterator[Tile]:
        """The tiles, row by row."""
        return (Tile(row, column) for row in self.rows for column in self.columns)


@dataclass(frozen=True, slots=True)
class Tiling:
    """Cuts regions into tiles for one bundle.

    Raises:
        BundleError: the map does not fill its tile as the manifest says, its rim leaves no cell, or a region of
            `min_side_px` would have none.
    """

    input: InputSpec
    geometry: MapGeometry

    def __post_init__(self) -> None:
        for name, axis in (("height", self._down), ("width", self._across)):
            expected = axis.cells_over(axis.side_px)
            # Padding may put the first cell's center half a pixel outside; without it the field would start there.
            if axis.cells != expected or axis.offset_px < (-0.5 if axis.rim_px else 0):
                kind = f"padded by up to {axis.rim_px} px" if axis.rim_px else "without padding"
                raise BundleError(
                    f"the bundle's map has a {name} of {axis.cells} cells; stride {axis.stride_px} and offset "
                    f"{axis.offset_px:g} of a graph {kind} make {expected} over {axis.side_px} px, so tiles would not "
                    "join: correct map.rim_px or map.offset where the graph is exported"
                )
            if axis.step < 1:
                raise BundleError(
                    f"a rim of {axis.rim_px} px on each side leaves no cell of a tile's {name} of {axis.side_px} px; "
                    "export the bundle with a larger input"
                )
            if axis.cells_over(self.input.min_side_px) < 1:
                raise BundleError(
                    f"the bundle admits frames of {self.input.min_side_px} px, which is less than one receptive field: "
                    "export it with a larger input.min_side_px"
                )

    def plan(self, height: int, width: int) -> Plan:
        """The tiles of a region of `height` x `width` px, each at least `input.min_side_px`."""
        rows, columns = self._down.spans(height), self._across.spans(width)
        cells = msgspec.structs.replace(self.geometry, height=rows[-1].stop, width=columns[-1].stop)
        return Plan(rows, columns, cells)

    def begin(self, region: ModelInput) -> Stitch:
        """Plan the tiles of `region`, which carries its own pixels (H, W, C) at native resolution."""
        return Stitch(region, self)

    @property
    def _down(self) -> Axis:
        cells = self.geometry
        return Axis(self.input.height, cells.height, round(cells.stride), cells.offset_y, cells.rim_px)

    @property
    def _across(self) -> Axis:
        cells = self.geometry
        return Axis(self.input.width, cells.width, round(cells.stride), cells.offset_x, cells.rim_px)


def tiling_of(input: InputSpec, geometry: MapGeometry) -> Tiling | None:
    """The tiling of a bundle with `fit` "tile", None for any other.

    Raises:
        BundleError: see Tiling.
    """
    return Tiling(input, geometry) if input.fit == "tile" else None


def smallest_side_px(geometry: MapGeometry) -> int:
    """The shortest side in pixels that a network with this map can judge: its receptive field, as far as known."""
    field = math.ceil(2 * max(geometry.offset_y, geometry.offset_x)) + 1
    return max(field, 2 * geometry.rim_px + 1)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TileInput(ModelInput):
    """A tile as the graph takes it, with the stitch that waits for its map.

    `pixels` is a view of the region, and a copy only where the tile reaches beyond it.
    """

    tile: Tile
    stitch: Stitch


class Stitch:
    """The map of one `region` while its tiles are scored: `scores` (h', w') float32, complete when `put` says so.

    Nothing but `scores` is held beside the region itself. Not thread-safe: one thread owns it.
    """

    def __init__(self, region: ModelInput, tiling: Tiling) -> None:
        self.region = region
        self.plan = tiling.plan(*region.pixels.shape[:2])
        # Not a number: a cell that no tile gave could never be taken for a good one.
        self.scores = np.full((self.plan.geometry.height, self.plan.geometry.width), np.nan, np.float32)
        self._tiling = tiling
        self._left = len(self.plan)

    def tiles(self) -> Iterator[TileInput]:
        """Cut the tiles one by one, as they are asked for."""
        height, width = self._tiling.input.height, self._tiling.input.width
        roi, uneven = self.region.roi, self.region.uneven
        for tile in self.plan:
            y, x = tile.row.origin_px, tile.column.origin_px
            yield TileInput(
                frame_id=self.region.frame_id,
                pixels=cut(self.region.pixels, y, x, height, width),
                roi=Roi(roi.x + x, roi.y + y, width, height),
                uneven=uneven and replace(uneven, top=uneven.top + y, left=uneven.left + x),
                tile=tile,
                stitch=self,
            )

    def put(self, tile: Tile, cells: NDArray[np.float32]) -> bool:
        """Take from a tile's map `cells` what it gives to the whole; each tile once. Return whether it was the last.

        Raises:
            EngineError: the map has another shape or type than the manifest's.
        """
        geometry, row, column = self._tiling.geometry, tile.row, tile.column
        if cells.shape != (geometry.height, geometry.width) or cells.dtype != np.float32:
            name = "/".join(map(str, self.region.frame_id.key))
            wanted = f"float32 ({geometry.height}, {geometry.width})"
            raise EngineError(
                f"frame {name}: the engine gave {cells.dtype} {cells.shape} for a tile, expected {wanted}"
            )
        self.scores[row.first : row.stop, column.first : column.stop] = cells[row.own, column.own]
        self._left -= 1
        return self._left == 0

    @property
    def score(self) -> float:
        """The image score by the manifest's reduction of the whole map, in float32 as a graph gives it."""
        if self.plan.geometry.reduction == "mean":
            return float(np.float32(self.scores.mean(dtype=np.float64)))
        return float(self.scores.max())


def cut(pixels: NDArray[np.uint8], y: int, x: int, height: int, width: int) -> NDArray[np.uint8]:
    """The rectangle of `pixels` (H, W, C) from (y, x), a view where it lies within them.

    What lies beyond right and bottom is filled by reflection, the outermost pixel left single as with `aspect` "keep".
    """
    rows, columns = pixels.shape[:2]
    if y + height <= rows and x + width <= columns:
        return pixels[y : y + height, x : x + width]
    return pixels[np.ix_(reflected(y, y + height, rows), reflected(x, x + width, columns))]


def reflected(first: int, stop: int, side: int) -> NDArray[np.intp]:
    """The pixels that stand at [first, stop) when an axis of `side` pixels is continued by reflection for ever."""
    if side == 1:
        return np.zeros(stop - first, np.intp)
    place = np.arange(first, stop, dtype=np.intp) % (2 * side - 2)
    return np.where(place < side, place, 2 * side - 2 - place)
