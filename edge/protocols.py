"""The four seams of the runtime: Source, Engine, Sink, Clock. What each must do, may raise, must never do.

Implementations live in `sources`, `engines`, `sinks`; `daemon` chooses among them. Each has a contract suite in
`tests/contracts` that the fakes pass as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, NewType, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edge.types import Frame, Uneven, Unreadable

if TYPE_CHECKING:
    from edge.events import DefectEvent

Ticket = NewType("Ticket", int)
"""The number of a submitted batch; grows by one each time."""


@runtime_checkable
class Source(Protocol):
    """Delivers frames in the order in which each camera took them."""

    def read(self, timeout_s: float) -> Frame | Unreadable:
        """Return the next frame, waiting at most `timeout_s` seconds.

        Raises:
            SourceTimeout: nothing came in time; call again.
            EndOfStream: there will be no more.
            SourceBroken: the source failed for good.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine takes and gives.

    Input is (N <= max_batch, height, width, channels) uint8, maps are (N, map_height, map_width) float32. `depth` is
    how many batches it keeps in flight; `name`, `device` and `version` say what runs. One that `levels` is a `Leveler`.
    """

    name: str
    version: str
    device: str
    height: int
    width: int
    channels: int
    map_height: int
    map_width: int
    max_batch: int
    depth: int
    levels: bool = False


class Engine(Protocol):
    """Runs one graph. One thread owns it; the same input, device and plan give the same bytes."""

    @property
    def spec(self) -> EngineSpec: ...

    def warmup(self) -> None:
        """Run every batch size that will be used once, so that the first frame is not the slow one.

        Raises:
            EngineError: the backend failed.
        """
        ...

    def submit(self, batch: NDArray[np.uint8]) -> Ticket:
        """Start on `batch` (N, h, w, C) uint8, which must not be written to until it is collected.

        Raises:
            EngineBusy: `spec.depth` tickets are out.
            EngineError: wrong shape or the backend failed.
        """
        ...

    def collect(self, timeout_s: float) -> tuple[Ticket, NDArray[np.float32], NDArray[np.float32]]:
        """Return the oldest ticket with its maps (N, h', w') and image scores (N,), in submission order.

        Raises:
            EngineError: no ticket is out, the time ran out, or the batch failed; a failed ticket is consumed.
        """
        ...

    def infer(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`submit` and `collect` of one batch; only when no ticket is out."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Leveler(Engine, Protocol):
    """An engine that applies flat fields itself, those that it was opened with; its `spec.levels` is true."""

    def submit(self, batch: NDArray[np.uint8], uneven: Sequence[Uneven | None] = ()) -> Ticket:
        """`Engine.submit` of pixels some of which are `uneven`: one for each frame, None for what is as it should be.

        Raises:
            EngineError: also for a flat field that it was not opened with.
        """
        ...


class Sink(Protocol):
    """Takes events in order. Returns within its stated bound or raises; never drops silently."""

    def emit(self, event: DefectEvent) -> None:
        """Take one event.

        Raises:
            SinkFull: the bound is reached; the event was not taken.
            SinkError: the sink failed.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Clock(Protocol):
    """Time as a dependency: durations from the first, records from the second."""

    def monotonic_ns(self) -> int: ...

    def wall_ns(self) -> int: ...
