"""The inference thread's work: frames into batches, batches through the engine, and what happens when the engine fails.

Owns the engine while the line runs. Threads, the log and the order of stopping are `pipeline`'s.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import Empty
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.bundle import InputSpec, MapGeometry
from edge.errors import BundleError, DeviceError, EngineError, ImageRefused, KizuError
from edge.metrics import Metrics
from edge.protocols import Clock, Engine, Ticket
from edge.stages.decide import Decide
from edge.stages.infer import Batch, MicroBatcher, submit, to_map
from edge.stages.measure import Measure
from edge.stages.preprocess import Preprocess
from edge.stages.segment import Segment
from edge.stages.tile import Stitch, TileInput, Tiling
from edge.stages.zones import Zones
from edge.types import FlatMaps, Frame, ModelInput, Reason, Unreadable, Verdict

FrameKey = tuple[str, int, int]

ENGINE_TIMEOUT_S: Final = 10.0
FAILURES_BEFORE_REOPEN: Final = 3
MAX_DETAIL: Final = 500
"""Characters of a verdict's detail: a backend's message may be pages long, but the event must stay a message."""
GOOD_BEFORE_FORGIVEN: Final = 100
"""Batches that a reopened engine must answer before its next failure counts as the first again."""
_BACKOFF_S: Final = 1.0
_LONGEST_BACKOFF_S: Final = 60.0
_IDLE_TIMEOUT_S: Final = 0.25
_AS_IT_IS: Final = Measure()
_LOST: Final = "the engine failed and could not be opened again yet; the daemon's log says why"


@dataclass(frozen=True, slots=True, eq=False)
class Stages:
    """What is done to a frame: preprocessing by camera, geometry, segmentation, decision, and the line's name.

    `tiling` is `tile.tiling_of` the bundle: None if and only if its frames are resized. `zones` and `segments` are
    those of cameras that have their own, `measures` scale and rules by camera. `stamp` sees each verdict before it is
    logged, in the verdict thread, and may take its certificate away.
    """

    line: str
    input: InputSpec
    geometry: MapGeometry
    preprocess: Mapping[str, Preprocess]
    segment: Segment
    decide: Decide
    tiling: Tiling | None = None
    zones: Mapping[str, Zones] = field(default_factory=dict)
    segments: Mapping[str, Segment] = field(default_factory=dict)
    stamp: Callable[[Verdict], Verdict] = lambda verdict: verdict
    measures: Mapping[str, Measure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.tiling is None) == (self.input.fit == "tile"):
            raise ValueError(f"fit is {self.input.fit!r} but tiling is {self.tiling}; take it from tiling_of")

    @property
    def fields(self) -> tuple[FlatMaps, ...]:
        """The flat fields that are left to the engine, each once."""
        maps = (one.later for one in self.preprocess.values() if one.later is not None)
        return tuple(dict.fromkeys(maps))


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """One collected batch, or one frame put together from its tiles: each frame with its model input, map and score.

    `geometry` is that of these maps, `stages` those of the model that gave them.
    """

    stages: Stages
    frames: tuple[Frame, ...]
    inputs: tuple[ModelInput, ...]
    maps: NDArray[np.float32]
    scores: NDArray[np.float32]
    geometry: MapGeometry


@dataclass(frozen=True, slots=True, eq=False)
class Unjudged:
    """A frame that goes past the engine, and why."""

    frame: Frame | Unreadable
    reason: Reason
    detail: str


def judged(
    stages: Stages,
    frame: Frame,
    model_input: ModelInput,
    scores: NDArray[np.float32],
    score: float,
    geometry: MapGeometry,
) -> Verdict:
    """The verdict that follows from the graph's answer; INCONCLUSIVE(engine) where that cannot be trusted."""
    try:
        anomaly_map = to_map(model_input, scores, score, geometry)
    except EngineError as error:
        return stages.decide.inconclusive(frame, Reason.ENGINE, str(error)[:MAX_DETAIL])
    camera = frame.id.camera
    if camera in stages.zones:
        try:
            anomaly_map = stages.zones[camera](anomaly_map, (frame.image.shape[0], frame.image.shape[1]))
        except (
            BundleError,
            ImageRefused,
        ) as error:  # zones drawn for another picture: nothing of this one was inspected
            return stages.decide.inconclusive(frame, Reason.SHAPE, str(error)[:MAX_DETAIL])
    height, width = frame.image.shape[:2]
    segment = stages.segments.get(camera, stages.segment)
    measure = stages.measures.get(camera, _AS_IT_IS)
    regions = measure.segment(segment)(anomaly_map, (height, width))
    return measure(stages.decide.verdict(frame, anomaly_map, regions), segment.min_area_px)


@dataclass(slots=True, eq=False)
class Replacement:
    """Another model for the same line: its warm `engine`, how to open that again, its stages.

    `done` is set when it judges (`accepted`) or never will; the engine is the runner's to close in either case.
    """

    engine: Engine
    open_engine: Callable[[], Engine]
    stages: Stages
    accepted: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class FrameQueue(Protocol):
    """Frames in the order in which they are to be looked at; None after the last. `Empty` when none is there."""

    def get(self, *, timeout: float) -> Frame | None: ...
    def get_nowait(self) -> Frame | None: ...


class EngineRunner:
    """The inference thread's work: frames into batches, batches through the engine, as many in flight as it keeps.

    The only user of the engine once the thread runs. With a tiling, batches hold tiles, of more than one frame where
    they meet; a frame is handed over when its last tile was collected, and given up with its first that failed. A batch
    has failed if it is not ready within `timeout_s`.
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
        timeout_s: float = ENGINE_TIMEOUT_S,
    ) -> None:
        self.lost = False
        """Whether there is no engine at present; read by other threads."""
        self.moved_ns = 0
        """When a batch of tiles was last collected: a large frame takes long but moves; read by other threads."""
        self.calling_ns = 0
        """When the engine call that has not returned began, 0 between calls; read by other threads."""
        self._engine = engine
        self._open_engine = open_engine
        self._stages = stages
        self._metrics = metrics
        self._clock = clock
        self._hand_over = hand_over
        self._warn = warn
        self._timeout_s = timeout_s
        self._depth = self._most_out = engine.spec.depth
        self._max_batch, self._wait_ns = max_batch, wait_ns
        self._batcher = self._new_batcher()
        self._next: Replacement | None = None
        self._exchanging = threading.Lock()
        self._ended = False
        self._frames: dict[FrameKey, Frame] = {}
        # In place of the above where frames are tiled; no key, for a frame given up may come again under its name.
        self._stitching: dict[Stitch, Frame] = {}
        self._tiles: Iterator[TileInput] = iter(())  # what is left of the frame that was taken last
        self._cutting = False  # whether that may hold some yet
        self._out: deque[tuple[Ticket, Batch, int]] = deque()
        self._failures = 0
        self._good = 0
        self._reopenings = 0
        """Tries in a row to open the engine again; forgiven once it works."""
        self._try_again_ns = 0

    def run(self, frames: FrameQueue) -> None:
        """Work until None comes, then finish everything that was begun."""
        closed: Batch | None = None  # a batch that waits for the engine to have room
        more = True
        try:
            while more or closed or self._out or len(self._batcher):
                if closed is not None and len(self._out) < self._depth:
                    self._submit(closed)
                    closed = None
                elif closed is None and self._next is not None and not self._cutting and not len(self._batcher):
                    self._collect() if self._out else self._exchange()
                elif closed is None and more:
                    closed, more = self._gather(frames)
                elif closed is None and len(self._batcher):
                    closed = self._batcher.flush()
                else:
                    self._collect()
        finally:
            self._engine.__exit__(None, None, None)
            self._ended = True
            self.withdraw()

    def replace(self, replacement: Replacement) -> None:
        """Judge by another model from the next frame boundary on; from any thread.

        Frames taken before are finished by the present one. `replacement.engine` is the runner's to close from here on.
        """
        with self._exchanging:
            self._next = replacement
        if self._ended:
            self.withdraw()

    def withdraw(self) -> None:
        """Forget a replacement that did not take place yet; from any thread."""
        with self._exchanging:
            given, self._next = self._next, None
        if given is not None:
            given.engine.__exit__(None, None, None)
            given.done.set()

    def _exchange(self) -> None:
        """Nothing is in the engine or on its way there: the one moment at which no frame sees two models."""
        with self._exchanging:
            given, self._next = self._next, None
        if given is None:
            return
        if not self.lost:  # one that was given up is closed already
            self._engine.__exit__(None, None, None)
        self._engine, self._open_engine, self._stages = given.engine, given.open_engine, given.stages
        self._depth = self._most_out = given.engine.spec.depth
        self._batcher = self._new_batcher()
        self._failures = self._good = self._reopenings = 0
        self.lost = False
        given.accepted = True
        given.done.set()

    def _new_batcher(self) -> MicroBatcher:
        return MicroBatcher(
            self._stages.input, max_batch=self._max_batch, wait_ns=self._wait_ns, depth=self._depth, clock=self._clock
        )

    def _gather(self, frames: FrameQueue) -> tuple[Batch | None, bool]:
        """Take frames until a batch is full or due; collect one instead where that is what there is to do."""
        while True:
            for tile in self._tiles:
                if batch := self._batcher.add(tile):
                    return batch, True
            self._cutting = False
            if self._next is not None:
                return self._batcher.flush(), True
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
        if self.lost and self._clock.monotonic_ns() >= self._try_again_ns:
            self._try_open("it was closed after failures")
        if self.lost:
            self._give_up((frame,), _LOST)
            return None
        started_ns = self._clock.monotonic_ns()
        try:
            model_input = self._stages.preprocess[frame.id.camera](frame)
        except ImageRefused as refused:
            self._hand_over(Unjudged(frame, Reason.SHAPE, str(refused)))
            return None
        batch = None
        if self._stages.tiling is None:
            self._frames[frame.id.key] = frame
            batch = self._batcher.add(model_input)
        else:
            stitch = self._stages.tiling.begin(model_input)
            self._stitching[stitch] = frame
            self._tiles, self._cutting = self._awaited(stitch), True
        self._metrics.observe("preprocess", self._clock.monotonic_ns() - started_ns)
        return batch

    def _awaited(self, stitch: Stitch) -> Iterator[TileInput]:
        """The tiles of a frame for as long as it can still be judged."""
        for tile in stitch.tiles():
            if stitch not in self._stitching:
                return
            yield tile

    def _submit(self, batch: Batch) -> None:
        if self.lost:  # the batch was closed before the engine was given up
            self._drop(batch, _LOST)
            return
        started_ns = self._clock.monotonic_ns()
        self.calling_ns = started_ns
        try:
            ticket = submit(self._engine, batch)
        except EngineError as error:
            self._fail(batch, str(error), lost=_is_lost(error))
            return
        finally:
            self.calling_ns = 0
        self._out.append((ticket, batch, started_ns))

    def _collect(self) -> None:
        ticket, batch, started_ns = self._out.popleft()
        self.calling_ns = self._clock.monotonic_ns()
        try:
            answered, maps, scores = self._engine.collect(self._timeout_s)
        except EngineError as error:
            self._fail(batch, str(error), lost=_is_lost(error))
            return
        finally:
            self.calling_ns = 0
        if answered != ticket:
            # Its maps belong to other frames; nothing that it says can be trusted.
            self._fail(batch, f"the engine answered ticket {answered} instead of {ticket}")
            return
        self._failures = 0
        self._good += 1
        if self._good >= GOOD_BEFORE_FORGIVEN:
            self._reopenings = 0
        self._metrics.observe("engine", self._clock.monotonic_ns() - started_ns)
        if self._stages.tiling is not None:
            self._batcher.release(batch)
            self._stitch(batch, maps)
            return
        frames = self._take(batch)
        self._batcher.release(batch)
        self._hand_over(Scored(self._stages, frames, batch.inputs, maps, scores, self._stages.geometry))

    def _stitch(self, batch: Batch, maps: NDArray[np.float32]) -> None:
        """Put the tiles of a batch into their frames' maps; what was given up meanwhile is passed over."""
        self.moved_ns = self._clock.monotonic_ns()
        for item, cells in zip(batch.inputs, maps, strict=True):
            assert isinstance(item, TileInput)  # begin makes nothing else
            stitch = item.stitch
            if stitch not in self._stitching:
                continue
            try:
                complete = stitch.put(item.tile, cells)
            except EngineError as error:
                self._give_up((self._stitching.pop(stitch),), str(error))
                continue
            if complete:
                frame, score = self._stitching.pop(stitch), np.array([stitch.score], np.float32)
                geometry = stitch.plan.geometry
                self._hand_over(Scored(self._stages, (frame,), (stitch.region,), stitch.scores[None], score, geometry))

    def _fail(self, batch: Batch, why: str, *, lost: bool = False) -> None:
        """Count and give up a batch; open the engine again after some of them, at once after a device that is lost."""
        self._metrics.engine_failures.inc()
        self._failures += 1
        self._warn("engine failed a batch", {"error": why, "in_a_row": self._failures})
        self._drop(batch, why)
        if lost or self._failures >= FAILURES_BEFORE_REOPEN:
            self._reopen(why)

    def _reopen(self, why: str) -> None:
        """Replace the engine: the first time at once, then after a wait that doubles; until then there is none."""
        while self._out:
            _, batch, _ = self._out.popleft()
            self._drop(batch, f"in the engine when it was closed after {self._failures} failures: {why}")
        self._engine.__exit__(None, None, None)
        self._failures = 0
        if self._reopenings:
            self._wait_before_next_try(why)
        else:
            self._try_open(why)

    def _try_open(self, why: str) -> None:
        self._reopenings += 1
        self._metrics.engine_reopens.inc()
        try:
            self._engine = self._open_engine()
        except KizuError as error:
            self._wait_before_next_try(str(error))
            return
        # The batcher has buffers for the first engine's depth; another backend may keep fewer in flight, not more.
        self._depth = min(self._most_out, self._engine.spec.depth)
        self._good = 0
        self.lost = False
        self._warn("engine opened again", {"error": why, "engine": self._engine.spec.name})

    def _wait_before_next_try(self, why: str) -> None:
        wait_s = min(_LONGEST_BACKOFF_S, _BACKOFF_S * 2.0 ** min(self._reopenings - 1, 16))
        self._try_again_ns = self._clock.monotonic_ns() + round(wait_s * 1e9)
        self.lost = True
        self._warn("no engine: every frame is INCONCLUSIVE until it opens again", {"error": why, "wait_s": wait_s})

    def _drop(self, batch: Batch, why: str) -> None:
        frames = self._take(batch)
        self._batcher.release(batch)
        self._give_up(frames, why)

    def _give_up(self, frames: tuple[Frame, ...], why: str) -> None:
        for frame in frames:
            self._hand_over(Unjudged(frame, Reason.ENGINE, why))

    def _take(self, batch: Batch) -> tuple[Frame, ...]:
        if self._stages.tiling is None:
            return tuple(self._frames.pop(item.frame_id.key) for item in batch.inputs)
        # Several tiles may be of one frame, and that may have been given up with an earlier batch.
        stitches = dict.fromkeys(item.stitch for item in batch.inputs if isinstance(item, TileInput))
        return tuple(self._stitching.pop(stitch) for stitch in stitches if stitch in self._stitching)


def _is_lost(error: EngineError) -> bool:
    """Whether nothing on the engine's device will ever work again."""
    return isinstance(error, DeviceError) and error.reason == "lost"
