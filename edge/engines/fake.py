"""A deterministic engine without a model: the map is computed from the pixels. For tests and dry runs of a whole line.

Passes the same contract suite as the real ones, and can fail or be slow on cue.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from edge.bundle import Manifest
from edge.engines.contract import InOrder, busy, closed, nothing_out, require_batch
from edge.errors import EngineError
from edge.protocols import EngineSpec, Ticket


def spec_of(manifest: Manifest, *, max_batch: int | None = None, depth: int = 2) -> EngineSpec:
    """The fake's specification with the sizes of a bundle."""
    spec, cells = manifest.input, manifest.map
    return EngineSpec(
        name="fake",
        version="1",
        device="cpu",
        height=spec.height,
        width=spec.width,
        channels=spec.channels,
        map_height=cells.height,
        map_width=cells.width,
        max_batch=spec.max_batch if max_batch is None else max_batch,
        depth=depth,
    )


class FakeEngine(InOrder):
    """Each cell is the mean distance of its block of pixels from mid gray, 0 to 1; the image score is the largest cell.

    The blocks divide the model's pixels evenly, whatever the map's size. A flat gray picture scores 0, a black or white
    one 1. `fail_tickets` are the tickets whose `collect` raises; a batch is ready `latency_s` seconds after `submit`.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        fail_tickets: Collection[int] = (),
        latency_s: float = 0.0,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._spec = spec
        self._fail_tickets = frozenset(fail_tickets)
        self._latency_s = latency_s
        self._monotonic = monotonic
        self._sleep = sleep
        self._out: deque[tuple[Ticket, NDArray[np.uint8], float]] = deque()
        self._next = 0
        self._closed = False
        self._rows, row_sizes = _blocks(spec.height, spec.map_height)
        self._columns, column_sizes = _blocks(spec.width, spec.map_width)
        # Mid gray is 128 and distances are whole, so sums are exact in any order.
        self._distance = np.abs(np.arange(256, dtype=np.int64) - 128).astype(np.int32)
        self._scale = (row_sizes[:, None] * column_sizes[None, :] * (128.0 * spec.channels)).astype(np.float64)

    def warmup(self) -> None:
        """Nothing to warm; refuses when closed."""
        if self._closed:
            raise closed(self._spec)

    def submit(self, batch: NDArray[np.uint8]) -> Ticket:
        """Note `batch`; its pixels are read at `collect`."""
        if self._closed:
            raise closed(self._spec)
        require_batch(batch, self._spec)
        if len(self._out) >= self._spec.depth:
            raise busy(self._spec)
        ticket = Ticket(self._next)
        self._next += 1
        self._out.append((ticket, batch, self._monotonic() + self._latency_s))
        return ticket

    def collect(self, timeout_s: float) -> tuple[Ticket, NDArray[np.float32], NDArray[np.float32]]:
        """Compute the oldest batch, once its latency is over."""
        if self._closed:
            raise closed(self._spec)
        if not self._out:
            raise nothing_out(self._spec)
        ticket, batch, ready_at = self._out.popleft()
        wait_s = ready_at - self._monotonic()
        if wait_s > timeout_s:
            self._sleep(max(0.0, timeout_s))
            raise EngineError(f"fake: batch {ticket} was not ready within {timeout_s} s")
        if wait_s > 0:
            self._sleep(wait_s)
        if ticket in self._fail_tickets:
            raise EngineError(f"fake: batch {ticket} fails, as it was told to")
        maps = self._maps(batch)
        return ticket, maps, maps.max(axis=(1, 2))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.clear()
        self._closed = True

    def _maps(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        distance = np.take(self._distance, batch).sum(axis=3, dtype=np.int32)  # (N, h, w)
        sums = np.add.reduceat(np.add.reduceat(distance, self._rows, axis=1), self._columns, axis=2, dtype=np.int64)
        return (sums / self._scale).astype(np.float32)


def _blocks(pixels: int, cells: int) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Where each of `cells` blocks starts among `pixels`, and its size: at least 1, pixels are repeated if need be."""
    starts = (np.arange(cells, dtype=np.intp) * pixels) // cells
    ends = np.append(starts[1:], pixels)
    return starts, np.maximum(ends - starts, 1).astype(np.int64)
