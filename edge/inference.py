"""The inference thread's work: frames into batches, batches through the engine, and what happens when the engine fails.

Owns the engine while the line runs. Threads, the log and the order of stopping are `pipeline`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge.bundle import InputSpec, MapGeometry
from edge.errors import EngineError, ImageRefused, KizuError
from edge.metrics import Metrics
from edge.protocols import Clock, Engine, Ticket
from edge.stages.decide import Decide
from edge.stages.infer import Batch, MicroBatcher
from edge.stages.preprocess import Preprocess
from edge.stages.segment import Segment
from edge.types import Frame, ModelInput, Reason, Unreadable

FrameKey = tuple[str, int, int]

ENGINE_TIMEOUT_S: Final = 10.0
FAILURES_BEFORE_REOPEN: Final = 3
_IDLE_TIMEOUT_S: Final = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class Stages:
    """What is done to a frame: preprocessing by camera, geometry, segmentation, decision, and the line's name."""

    line: str
    input: InputSpec
    geometry: MapGeometry
    preprocess: Mapping[str, Preprocess]
    segment: Segment
    decide: Decide


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """One collected batch: each frame with its model input, map and score."""

    frames: tuple[Frame, ...]
    inputs: tuple[ModelInput, ...]
    maps: NDArray[np.float32]
    scores: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Unjudged:
    """A frame that goes past the engine, and why."""

    frame: Frame | Unreadable
    reason: Reason
    detail: str


class EngineRunner:
    """The inference thread's work: frames into batches, batches through the engine, as many in flight as it keeps.

    The only user of the engine once the thread runs.
    """

    def __init__(
        self,
        engine: Engine,
        open_engine: Callable[[], Engine],
        stages: Stages,
        metrics: Metrics,
        clock: Clock,
        max_batch: int,
        wait_ns: int,
        hand_over: Callable[[Scored | Unjudged], None],
        warn: Callable[[str, Mapping[str, object]], None],
    ) -> None:
        self.lost = False
        """Whether the engine is given up; read by other threads."""
        self._engine = engine
        self._open_engine = open_engine
        self._stages = stages
        self._metrics = metrics
        self._clock = clock
        self._hand_over = hand_over
        self._warn = warn
        self._depth = engine.spec.depth
        self._batcher = MicroBatcher(stages.input, max_batch=max_batch, wait_ns=wait_ns, depth=self._depth, clock=clock)
        self._frames: dict[FrameKey, Frame] = {}
        self._out: deque[tuple[Ticket, Batch, int]] = deque()
        self._failures = 0
        self._reopened = False

    def run(self, frames: SimpleQueue[Frame | None]) -> None:
        """Work until None comes, then finish everything that was begun."""
        closed: Batch | None = None  # a batch that waits for the engine to have room
        more = True
        try:
            while more or closed or self._out or len(self._batcher):
                if closed is not None and len(self._out) < self._depth:
                    self._submit(closed)
                    closed = None
                elif closed is None and more:
                    closed, more = self._gather(frames)
                elif closed is None and len(self._batcher):
                    closed = self._batcher.flush()
                else:
                    self._collect()
        finally:
            self._engine.__exit__(None, None, None)

    def _gather(self, frames: SimpleQueue[Frame | None]) -> tuple[Batch | None, bool]:
        """Take frames until a batch is full or due; collect one instead where that is what there is to do."""
        while True:
            wait_s = self._patience_s()
            try:
                frame = frames.get(timeout=wait_s) if wait_s > 0 else frames.get_nowait()
            except Empty:
                if len(self._out) < self._depth and (batch := self._batcher.due()):
                    return batch, True
                if self._out:
                    self._collect()
                continue
            if frame is None:
                return self._batcher.flush(), False
            if batch := self._add(frame):
                return batch, True

    def _patience_s(self) -> float:
        """How long to wait for another frame before the engine's answers are looked at."""
        if len(self._out) >= self._depth:
            return 0.0
        due_ns = self._batcher.due_ns
        if due_ns is not None:
            return max(0.0, (due_ns - self._clock.monotonic_ns()) / 1e9)
        return 0.0 if self._out else _IDLE_TIMEOUT_S

    def _add(self, frame: Frame) -> Batch | None:
        if self.lost:
            self._give_up((frame,), "the engine failed and is not used any more; restart the daemon")
            return None
        started_ns = self._clock.monotonic_ns()
        try:
            model_input = self._stages.preprocess[frame.id.camera](frame)
        except ImageRefused as refused:
            self._hand_over(Unjudged(frame, Reason.SHAPE, str(refused)))
            return None
        self._frames[frame.id.key] = frame
        batch = self._batcher.add(model_input)
        self._metrics.observe("preprocess", self._clock.monotonic_ns() - started_ns)
        return batch

    def _submit(self, batch: Batch) -> None:
        if self.lost:  # the batch was closed before the engine was given up
            self._drop(batch, "the engine failed and is not used any more; restart the daemon")
            return
        started_ns = self._clock.monotonic_ns()
        try:
            ticket = self._engine.submit(batch.pixels)
        except EngineError as error:
            self._fail(batch, str(error))
            return
        self._out.append((ticket, batch, started_ns))

    def _collect(self) -> None:
        ticket, batch, started_ns = self._out.popleft()
        try:
            answered, maps, scores = self._engine.collect(ENGINE_TIMEOUT_S)
        except EngineError as error:
            self._fail(batch, str(error))
            return
        if answered != ticket:
            # Its maps belong to other frames; nothing that it says can be trusted.
            self._fail(batch, f"the engine answered ticket {answered} instead of {ticket}")
            return
        self._failures = 0
        self._metrics.observe("engine", self._clock.monotonic_ns() - started_ns)
        frames = self._take(batch)
        self._batcher.release(batch)
        self._hand_over(Scored(frames, batch.inputs, maps, scores))

    def _fail(self, batch: Batch, why: str) -> None:
        self._metrics.engine_failures.inc()
        self._failures += 1
        self._warn("engine failed a batch", {"error": why, "in_a_row": self._failures})
        self._drop(batch, why)
        if self._failures >= FAILURES_BEFORE_REOPEN:
            self._reopen(why)

    def _reopen(self, why: str) -> None:
        """Replace the engine once; a second time it is given up."""
        while self._out:
            _, batch, _ = self._out.popleft()
            self._drop(batch, f"in the engine when it was closed after {self._failures} failures: {why}")
        self._engine.__exit__(None, None, None)
        self._failures = 0
        if not self._reopened:
            self._reopened = True
            self._metrics.engine_reopens.inc()
            try:
                self._engine = self._open_engine()
                self._warn("engine opened again", {"error": why})
                return
            except KizuError as error:
                why = str(error)
        self.lost = True
        self._warn("engine given up: every frame is INCONCLUSIVE until a restart", {"error": why})

    def _drop(self, batch: Batch, why: str) -> None:
        frames = self._take(batch)
        self._batcher.release(batch)
        self._give_up(frames, why)

    def _give_up(self, frames: tuple[Frame, ...], why: str) -> None:
        for frame in frames:
            self._hand_over(Unjudged(frame, Reason.ENGINE, why))

    def _take(self, batch: Batch) -> tuple[Frame, ...]:
        return tuple(self._frames.pop(item.frame_id.key) for item in batch.inputs)
