"""Coarse, then dense: an engine of two, the dense one for those elements of a batch whose coarse score could matter.

Owns the gate's use, the cells of what is not refined, and the order of both passes. What the gate stands on is the
bundle's `Refine`; running a graph is each backend's matter. In a bundle that tiles every element is a tile, so a large
frame is refined where it is suspicious and nowhere else.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edge.engines.contract import InOrder, busy, closed, nothing_out, require_batch
from edge.errors import DeviceError, EngineError
from edge.protocols import Engine, Leveler, Ticket
from edge.types import Uneven

OnTiles = Callable[[int, int], None]
"""Told how many tiles were looked at, and how many of them go on to the dense engine."""


@dataclass(slots=True, eq=False)
class _Flight:
    """One batch (N, h, w, C) on its way; `coarse` (N, h", w") and `chosen` (n,), its places to refine, once looked at.

    `error` is what ended it early.
    """

    ticket: Ticket
    batch: NDArray[np.uint8]
    uneven: Sequence[Uneven | None]
    coarse: NDArray[np.float32] | None = None
    chosen: NDArray[np.intp] = field(default_factory=lambda: np.zeros(0, np.intp))
    error: EngineError | None = None

    @property
    def looked_at(self) -> bool:
        """Whether the coarse pass is over."""
        return self.coarse is not None or self.error is not None


class RefineEngine(InOrder):
    """Runs `coarse` on every element and `dense` on those whose largest coarse cell is above `gate`, or no number.

    What is refined is the dense engine's own answer, bit for bit. Elsewhere each dense cell takes the nearest coarse
    one, which is exact at every `every`-th cell along both axes and nowhere above the gate; the image score is the
    maximum of that. `tiles` and `tiles_refined` count elements since the engine was opened.

    Owns both engines. Depth is the smaller of theirs: while one batch waits for its dense pass, the others are looked
    at and theirs begin. With ONNX Runtime, which is done when `submit` returns, the dense pass runs within `collect`.
    """

    def __init__(
        self,
        dense: Engine,
        coarse: Engine,
        *,
        gate: float,
        every: int,
        on_tiles: OnTiles = lambda seen, refined: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.dense = dense
        self.coarse = coarse
        self.gate = gate
        self.every = every
        self.tiles = 0
        self.tiles_refined = 0
        self._on_tiles = on_tiles
        self._monotonic = monotonic
        self._spec = replace(
            dense.spec,
            depth=min(dense.spec.depth, coarse.spec.depth),
            levels=dense.spec.levels and coarse.spec.levels,
        )
        self._rows = _nearest(self._spec.map_height, coarse.spec.map_height, every)[:, None]
        self._columns = _nearest(self._spec.map_width, coarse.spec.map_width, every)
        self._out: deque[_Flight] = deque()
        self._next = 0
        self._closed = False

    def warmup(self) -> None:
        """Warm both engines; any part of a batch may need the dense one."""
        if self._closed:
            raise closed(self._spec)
        self.coarse.warmup()
        self.dense.warmup()

    def submit(self, batch: NDArray[np.uint8], uneven: Sequence[Uneven | None] = ()) -> Ticket:
        """Start the coarse pass on `batch`; each engine corrects what is uneven of the pixels that it gets."""
        if self._closed:
            raise closed(self._spec)
        require_batch(batch, self._spec)
        if len(self._out) >= self._spec.depth:
            raise busy(self._spec)
        _submit(self.coarse, batch, uneven)
        ticket = Ticket(self._next)
        self._next += 1
        self._out.append(_Flight(ticket, batch, uneven))
        return ticket

    def collect(self, timeout_s: float) -> tuple[Ticket, NDArray[np.float32], NDArray[np.float32]]:
        """Wait for the oldest batch: its coarse pass, and the dense pass on what of it is above the gate."""
        if self._closed:
            raise closed(self._spec)
        if not self._out:
            raise nothing_out(self._spec)
        deadline = self._monotonic() + timeout_s
        flight = self._out.popleft()
        self._look(flight, deadline)
        if flight.error is None and len(flight.chosen):
            # The dense engine should have its next batches before this one is waited for: streams would idle. The time
            # is this batch's: when it is over for a later one, it is for this one too.
            for later in self._out:
                self._look(later, deadline)
        if flight.error is not None:
            raise _during_coarse_pass(flight) from flight.error
        return flight.ticket, *self._answer(flight, deadline)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        with ExitStack() as both:
            both.push(self.dense.__exit__)
            both.push(self.coarse.__exit__)
        # Only now: until an engine is closed it may read the pixels of a batch.
        self._out.clear()

    def _look(self, flight: _Flight, deadline: float) -> None:
        """End the coarse pass of the oldest batch that is in it, and start its dense one; a failure stays with it."""
        if flight.looked_at:
            return
        try:
            _, maps, _ = self.coarse.collect(self._left(deadline))
            # Of the map and not the graph's own score: a backend's maximum may pass over what is no number. In double,
            # or the comparison would round the gate.
            peaks = maps.max(axis=(1, 2)).astype(np.float64)
            chosen = np.flatnonzero(~(peaks <= self.gate))
            if len(chosen):
                whole = len(chosen) == len(flight.batch)
                uneven = [flight.uneven[index] for index in chosen.tolist()] if flight.uneven else ()
                _submit(self.dense, flight.batch if whole else flight.batch[chosen], uneven)
        except EngineError as error:
            flight.error = error
            return
        flight.coarse, flight.chosen = maps, chosen
        self.tiles += len(maps)
        self.tiles_refined += len(chosen)
        self._on_tiles(len(maps), len(chosen))

    def _answer(self, flight: _Flight, deadline: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Maps (N, h', w') and scores (N,) of a batch that was looked at."""
        assert flight.coarse is not None
        if len(flight.chosen) == len(flight.batch):
            _, maps, scores = self.dense.collect(self._left(deadline))
            return maps, scores
        maps = flight.coarse[:, self._rows, self._columns]
        scores = flight.coarse.max(axis=(1, 2))
        if len(flight.chosen):
            _, maps[flight.chosen], scores[flight.chosen] = self.dense.collect(self._left(deadline))
        return maps, scores

    def _left(self, deadline: float) -> float:
        return max(0.0, deadline - self._monotonic())


def _submit(engine: Engine, batch: NDArray[np.uint8], uneven: Sequence[Uneven | None]) -> None:
    """Nothing is uneven where an engine does not level: `spec.levels` says it of both or of none."""
    if uneven:
        cast(Leveler, engine).submit(batch, uneven)
    else:
        engine.submit(batch)


def _during_coarse_pass(flight: _Flight) -> EngineError:
    """What ended a batch early; a device that is lost stays one, for the engine must then be opened again."""
    text = f"batch {flight.ticket}, coarse pass: {flight.error}"
    return DeviceError(flight.error.reason, text) if isinstance(flight.error, DeviceError) else EngineError(text)


def _nearest(dense: int, coarse: int, every: int) -> NDArray[np.intp]:
    """For each of `dense` cells along an axis the nearest of `coarse` ones, which lie `every` cells apart."""
    return np.minimum((np.arange(dense, dtype=np.intp) + every // 2) // every, coarse - 1)
