"""The line itself: one thread per stage from source to acknowledgement, and the order in which they stop.

    source ──► inference ──► verdict ──► event log (its own thread) ──► publish, acknowledge, count

Owns threads, hand-over and what happens when something fails; stages, engine, log and publisher are given.

One bound holds everywhere: at most `capacity` frames are between reception and durable verdict. At the bound the source
is not read, cameras run out of credits and wait, so no queue between threads needs a policy of its own. What a camera's
policy and deadline give up is said by `docket` and answered here at once, INCONCLUSIVE(dropped) or INCONCLUSIVE(late).
Every frame that entered gets one verdict, also those in flight when the line is told to stop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from queue import SimpleQueue
from types import MappingProxyType
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from edge import images, wire
from edge.docket import Docket, Terms
from edge.errors import EndOfStream, KizuError, SinkError, SourceTimeout
from edge.events import DefectEvent, event_of
from edge.health import Progress
from edge.inference import MAX_DETAIL, EngineRunner, Replacement, Scored, Stages, Unjudged, judged
from edge.metrics import Metrics
from edge.protocols import Clock, Engine
from edge.standstill import Standstill
from edge.types import Decision, DefectRegion, Frame, FrameId, Reason, Unreadable, Verdict

FrameKey = tuple[str, int, int]

_READ_TIMEOUT_S: Final = 0.25
_ROOM_TIMEOUT_S: Final = 0.05
_DEADLINE_TIMEOUT_S: Final = 0.1


class LineSource(Protocol):
    """A Source that is told what became durable; `service` does that while nothing is read."""

    def read(self, timeout_s: float) -> Frame | Unreadable: ...
    def service(self) -> None: ...
    def acknowledge(self, keys: Iterable[FrameKey]) -> None: ...
    def close(self) -> None: ...


class VerdictLog(Protocol):
    """Makes events durable; `on_commit` follows in its own thread."""

    def append(
        self, event: DefectEvent, mask_png: bytes | None = None, on_commit: Callable[[DefectEvent], None] | None = None
    ) -> None: ...
    def flush(self, timeout_s: float) -> None: ...


class EventPublisher(Protocol):
    """Sends events to whoever listens; never blocks."""

    def publish(self, event: DefectEvent, mask_png: bytes | None = None) -> None: ...


def ignore(frame: Frame, verdict: Verdict) -> None:
    """Nobody looks on."""


class Pipeline:
    """Runs from `start` until `stop`, the source's end or a failure; then `failure` says what, None if nothing failed.

    `open_engine` makes a fresh, warm engine after the given one failed `FAILURES_BEFORE_REOPEN` batches in a row; when
    that does not help, frames are answered INCONCLUSIVE(engine) until the daemon is restarted. `terms` are the policies
    and deadlines by camera. `on_judged` sees every frame that was scored, with its verdict, in the verdict thread; it
    must be quick and must not raise; so must `on_reject`, which is shown each rejected frame's picture, a copy.
    """

    def __init__(
        self,
        *,
        source: LineSource,
        engine: Engine,
        open_engine: Callable[[], Engine],
        stages: Stages,
        log: VerdictLog,
        publisher: EventPublisher,
        metrics: Metrics,
        clock: Clock,
        capacity: int,
        max_batch: int,
        max_wait_ms: float,
        warn: Callable[[str, Mapping[str, object]], None],
        terms: Mapping[str, Terms] = MappingProxyType({}),
        on_reject: Callable[[FrameId, NDArray[np.uint8]], None] = lambda frame_id, image: None,
    ) -> None:
        self.on_judged: Callable[[Frame, Verdict], None] = ignore
        self._on_reject = on_reject
        self._source = source
        self._stages = stages
        self._log = log
        self._publisher = publisher
        self._metrics = metrics
        self._account = metrics.frames
        self._clock = clock
        self._capacity = capacity
        self._warn = warn
        self._runner = EngineRunner(
            engine, open_engine, stages, metrics, clock, max_batch, round(max_wait_ms * 1e6), self._hand_over, warn
        )
        # Neither has a bound of its own: admission at `capacity` is the bound of both.
        self._docket = Docket(terms, clock)
        self._standstill = Standstill(
            {name: one.frozen_after for name, one in terms.items() if one.frozen_after is not None}
        )
        self._to_verdict: SimpleQueue[Scored | Unjudged | None] = SimpleQueue()
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._last_call = threading.Event()
        self._all_answered = threading.Event()
        self._room = threading.Condition()
        self._failure: str | None = None
        self._withheld: str | None = None
        self._reading = threading.Event()
        self._probes: dict[FrameKey, Callable[[Verdict], None]] = {}
        self._source_ns = clock.monotonic_ns()
        self._threads = {
            name: threading.Thread(target=self._top, args=(name, work), name=name, daemon=True)
            for name, work in (
                ("source", self._run_source),
                ("inference", self._run_inference),
                ("verdict", self._run_verdict),
                *((("deadlines", self._run_deadlines),) if self._docket.has_deadlines else ()),
            )
        }
        for queue in ("inference", "verdict"):
            metrics.set_capacity(queue, capacity)

    @property
    def failure(self) -> str | None:
        """Why the line stopped by itself; None if it did not."""
        return self._failure

    @property
    def ended(self) -> bool:
        """Whether the line stops or stopped: told to, at the source's end, or by a failure."""
        return self._ended.is_set()

    def progress(self) -> Progress:
        """A reading for `health.state_of`."""
        moved_ns, in_flight = max(self._account.progress_ns, self._runner.moved_ns), self._account.in_flight
        if calling_ns := self._runner.calling_ns:
            # Deadlines answer for an engine that hangs; that is no progress of the engine's.
            moved_ns, in_flight = min(moved_ns, calling_ns), max(1, in_flight)
        return Progress(in_flight, moved_ns, self._source_ns, self._runner.lost, withheld=self._withheld is not None)

    def start(self, *, reading: bool = True) -> None:
        """Start all threads; without `reading` no frame is taken before `begin_reading`."""
        if reading:
            self._reading.set()
        for thread in self._threads.values():
            thread.start()

    def begin_reading(self) -> None:
        """Take frames from now on."""
        self._reading.set()

    def withhold(self, why: str | None) -> None:
        """Answer frames that come from now on INCONCLUSIVE(challenge), unseen; None lifts it. From any thread."""
        self._withheld = why

    def probe(self, frame: Frame, answer: Callable[[Verdict], None]) -> None:
        """Judge a frame that no camera sent: as any other, but uncounted, unlogged; `answer` gets what would be said.

        The stages must know its camera's name. `answer` is called in the verdict thread, must be quick and not raise;
        it is not called if the line ends first. From any thread.
        """
        self._probes[frame.id.key] = answer
        self._docket.enter(frame)

    def sample_queues(self) -> None:
        """Put the depths of all hand-overs into the metrics; call it now and then."""
        self._metrics.set_depth("inference", self._docket.qsize())
        self._metrics.set_depth("verdict", self._to_verdict.qsize())

    def replace(self, engine: Engine, open_engine: Callable[[], Engine], stages: Stages, timeout_s: float) -> bool:
        """Judge by another model from the next frame boundary on; False if that did not come within `timeout_s`.

        Frames taken up before are finished by the present model; none is lost and none sees both. `engine`, which must
        be warm, is the line's to close from here on.
        """
        replacement = Replacement(engine, open_engine, stages)
        self._runner.replace(replacement)
        if not replacement.done.wait(timeout_s):
            self._runner.withdraw()
        if replacement.accepted:
            self._stages = stages
        return replacement.accepted

    def fail(self, why: str) -> None:
        """Stop the line as failed; from any thread. The first reason stays."""
        if self._failure is None:
            self._failure = why
        self._stopping.set()
        self._ended.set()

    def stop(self, timeout_s: float) -> None:
        """Stop reading, give every frame in flight its verdict, flush the log, acknowledge, close source and engine.

        Takes at most about `timeout_s`; what did not make it stays unacknowledged and `failure` says so.
        """
        deadline_ns = self._clock.monotonic_ns() + round(timeout_s * 1e9)
        self._stopping.set()
        self._ended.set()
        for name in ("inference", "verdict"):
            self._join(name, deadline_ns)
        self._all_answered.set()
        if "deadlines" in self._threads:
            self._join("deadlines", deadline_ns)
        try:
            self._log.flush(self._left_s(deadline_ns))
        except SinkError as error:
            self.fail(str(error))
        self._last_call.set()
        self._join("source", deadline_ns)
        if self._account.in_flight and self._failure is None:
            self._failure = (
                f"{self._account.in_flight} frames got no verdict before the line stopped; they will be sent again"
            )

    def _left_s(self, deadline_ns: int) -> float:
        # Never nothing: a thread that is just finishing deserves a moment even when another used up the time.
        return max(0.1, (deadline_ns - self._clock.monotonic_ns()) / 1e9)

    def _join(self, name: str, deadline_ns: int) -> None:
        thread = self._threads[name]
        if thread.ident is None:
            return
        thread.join(self._left_s(deadline_ns))
        if thread.is_alive():
            self.fail(f"thread {name} did not stop in time")

    def _top(self, name: str, work: Callable[[], None]) -> None:
        """Every thread's top: an error nobody foresaw is logged and counted, and stops the line in order."""
        try:
            work()
        except KizuError as error:
            self._warn("thread failed", {"thread": name, "error": str(error)})
            self.fail(f"{name}: {error}")
        except Exception as error:
            self._warn("thread crashed", {"thread": name, "error": repr(error), "exc_info": True})
            self._metrics.crash(name)
            self.fail(f"{name}: {error!r}; this is a fault of kizu")

    # --- source -------------------------------------------------------------------------------------------------------

    def _run_source(self) -> None:
        try:
            try:
                self._read_until_stopped()
            finally:
                # Whatever ended the reading, those behind finish what they were given.
                self._ended.set()
                self._docket.close()
            while not self._last_call.wait(_ROOM_TIMEOUT_S):
                self._beat()
                self._source.service()
        finally:
            self._source.close()

    def _read_until_stopped(self) -> None:
        while not self._stopping.is_set():
            self._beat()
            if self._account.in_flight >= self._capacity:
                self._wait_for_room()
                continue
            if not self._reading.wait(_ROOM_TIMEOUT_S):
                continue
            try:
                frame = self._source.read(_READ_TIMEOUT_S)
            except SourceTimeout:
                continue
            except EndOfStream:
                return
            if not self._account.receive(frame.id.key):
                self._metrics.duplicate(frame.id.camera)
            elif not isinstance(frame, Frame):
                self._answer(frame, Reason.UNREADABLE, f"{frame.reason}: {frame.detail}")
            elif (why := self._withheld) is not None:
                self._answer(frame, Reason.CHALLENGE, why)
            elif times := self._standstill(frame):
                self._answer(frame, Reason.FROZEN, f"the same picture, byte for byte, {times} times in a row")
            elif older := self._docket.enter(frame):
                self._answer(older, Reason.DROPPED, "a newer frame of its camera came before it was looked at")

    def _wait_for_room(self) -> None:
        self._source.service()
        with self._room:
            self._room.wait_for(lambda: self._account.in_flight < self._capacity, _ROOM_TIMEOUT_S)

    def _beat(self) -> None:
        self._source_ns = self._clock.monotonic_ns()

    # --- inference ----------------------------------------------------------------------------------------------------

    def _run_inference(self) -> None:
        try:
            self._runner.run(self._docket)
        finally:
            self._to_verdict.put(None)

    def _hand_over(self, item: Scored | Unjudged) -> None:
        self._to_verdict.put(item)

    # --- verdict ------------------------------------------------------------------------------------------------------

    def _run_verdict(self) -> None:
        while (item := self._to_verdict.get()) is not None:
            if isinstance(item, Unjudged):
                if not self._settles(item.frame):
                    continue
                if (probed := self._probes.pop(item.frame.id.key, None)) is not None:
                    probed(self._stages.decide.inconclusive(item.frame, item.reason, item.detail))
                else:
                    self._answer(item.frame, item.reason, item.detail)
                continue
            for frame, model_input, scores, score in zip(item.frames, item.inputs, item.maps, item.scores, strict=True):
                if not self._docket.is_open(frame.id.key):  # before the work of segmentation
                    self._metrics.discard(frame.id.camera)
                    continue
                started_ns = self._clock.monotonic_ns()
                verdict = judged(item.stages, frame, model_input, scores, float(score), item.geometry)
                self._metrics.observe("segment", self._clock.monotonic_ns() - started_ns)
                if not self._settles(frame):
                    continue
                if (probed := self._probes.pop(frame.id.key, None)) is not None:
                    probed(verdict)
                else:
                    verdict = item.stages.stamp(verdict)
                    if verdict.decision is Decision.REJECT:
                        # A copy: pixels in a camera's ring change once the frame is acknowledged.
                        self._on_reject(frame.id, frame.image.copy())
                    self._conclude(verdict)
                    self.on_judged(frame, verdict)

    def _settles(self, frame: Frame | Unreadable) -> bool:
        """Whether this result is the frame's verdict; if its deadline or a newer frame was first, count it instead."""
        if self._docket.settle(frame.id.key):
            return True
        self._metrics.discard(frame.id.camera)
        return False

    def _run_deadlines(self) -> None:
        while not self._all_answered.is_set():
            self._docket.wait_for_due(_DEADLINE_TIMEOUT_S)
            for frame in self._docket.overdue():
                waited_ms = (self._clock.monotonic_ns() - frame.received_ns) / 1e6
                self._answer(frame, Reason.LATE, f"no verdict {waited_ms:.1f} ms after reception")

    def _answer(self, frame: Frame | Unreadable, reason: Reason, detail: str) -> None:
        self._conclude(self._stages.decide.inconclusive(frame, reason, detail[:MAX_DETAIL]))

    def _conclude(self, verdict: Verdict) -> None:
        decided_ns = self._clock.monotonic_ns()
        mask_png = _mask_png(verdict.regions, verdict.frame_size)
        event = event_of(
            verdict,
            self._stages.line,
            self._clock.wall_ns(),
            decided_ns - verdict.received_ns,
            wire.mask_state(mask_png),
        )
        self._log.append(event, mask_png, partial(self._on_commit, event, mask_png, decided_ns, verdict.received_ns))

    def _on_commit(
        self, given: DefectEvent, mask_png: bytes | None, decided_ns: int, received_ns: int, logged: DefectEvent
    ) -> None:
        """In the log's thread, once the event is durable: publish, count, acknowledge."""
        if logged.decided_ns == given.decided_ns:
            try:
                self._publisher.publish(logged, mask_png)
            except SinkError as error:  # subscribers heal from the log; the camera must not wait for them
                self._metrics.publish_drops.inc()
                self._warn("event not published", {"frame": logged.id, "error": str(error)})
        else:  # logged by an earlier daemon: the camera hears about it, subscribers did already
            self._metrics.duplicate(logged.camera)
        now_ns = self._clock.monotonic_ns()
        self._metrics.observe("commit", now_ns - decided_ns)
        was_full = self._account.in_flight >= self._capacity
        self._metrics.judge(logged, now_ns - received_ns)
        self._source.acknowledge(((logged.camera, logged.camera_epoch, logged.frame_sequence),))
        if was_full:
            with self._room:
                self._room.notify()


def _mask_png(regions: tuple[DefectRegion, ...], frame_size: tuple[int, int]) -> bytes | None:
    """All regions as one 1-bit PNG of the frame's size; None without regions."""
    if not regions:
        return None
    mask = np.zeros(frame_size, np.bool_)
    for region in regions:
        for row, start, stop in region.mask.runs.tolist():
            mask[row, start:stop] = True
    return images.encode_mask_png(mask)
