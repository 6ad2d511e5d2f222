"""The line itself: threads, hand-over, failures and the order in which it stops; with a real log and a fake engine."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, generate_latest

from edge import inference
from edge.bundle import InputSpec, MapGeometry, ScoreCalibration
from edge.clock import SystemClock
from edge.docket import Docket, Terms
from edge.engines.fake import FakeEngine
from edge.errors import EndOfStream, EngineError, LogError, SinkError, SourceBroken, SourceTimeout
from edge.events import DefectEvent
from edge.images import decode_image
from edge.inference import Stages
from edge.metrics import Metrics
from edge.pipeline import FrameKey, Pipeline
from edge.protocols import Engine, EngineSpec, Ticket
from edge.sinks.event_log import EventLog
from edge.stages.decide import Decide
from edge.stages.preprocess import Preprocess
from edge.stages.segment import Segment
from edge.types import Frame, FrameId, Unreadable

SIDE, CELLS = 16, 4
INPUT = InputSpec(SIDE, SIDE, 1, max_batch=4)
GEOMETRY = MapGeometry(CELLS, CELLS, stride=4.0, offset_y=1.5, offset_x=1.5)
SPEC = EngineSpec("fake", "1", "cpu", SIDE, SIDE, 1, CELLS, CELLS, max_batch=4, depth=2)
CALIBRATION = ScoreCalibration("provisional", False, 0.5, 0.5, 1, (0.1, 0.2), "fake", "0" * 64)
CLOCK = SystemClock()


def picture(value: int, channels: int = 1, side: int = 32) -> NDArray[np.uint8]:
    return np.full((side, side, channels), value, np.uint8)


def frame(sequence: int, value: int = 128, camera: str = "cam", **shape: int) -> Frame:
    return Frame(FrameId(camera, 1, sequence, 0), picture(value, **shape), CLOCK.monotonic_ns())


class ListSource:
    """Hands out what it was given, then waits; notes acknowledgements and how often it was serviced."""

    def __init__(self, items: Iterable[Frame | Unreadable | Exception]) -> None:
        self.items = deque(items)
        self.acknowledged: list[FrameKey] = []
        self.services = 0
        self.closed = threading.Event()
        self.acknowledged_when_closed = -1

    def read(self, timeout_s: float) -> Frame | Unreadable:
        if not self.items:
            time.sleep(0.001)
            raise SourceTimeout("nothing more")
        item = self.items.popleft()
        if isinstance(item, Exception):
            raise item
        return item

    def service(self) -> None:
        self.services += 1

    def acknowledge(self, keys: Iterable[FrameKey]) -> None:
        self.acknowledged += keys

    def close(self) -> None:
        self.acknowledged_when_closed = len(self.acknowledged)
        self.closed.set()


class ListPublisher:
    def __init__(self) -> None:
        self.published: list[tuple[DefectEvent, bytes | None]] = []

    def publish(self, event: DefectEvent, mask_png: bytes | None = None) -> None:
        self.published.append((event, mask_png))


@dataclass
class Line:
    """A pipeline with everything around it within reach."""

    pipeline: Pipeline
    source: ListSource
    publisher: ListPublisher
    log: EventLog
    registry: CollectorRegistry
    metrics: Metrics
    warnings: list[tuple[str, Mapping[str, object]]] = field(default_factory=list)

    def run_until(self, judged: int, timeout_s: float = 20.0) -> None:
        """Start, wait for that many verdicts (or the line's own end), stop."""
        self.pipeline.start()
        deadline = time.monotonic() + timeout_s
        while self.metrics.frames.judged < judged and not self.pipeline.ended and time.monotonic() < deadline:
            time.sleep(0.002)
        self.pipeline.stop(10.0)

    @property
    def events(self) -> list[DefectEvent]:
        return [event for event, _ in self.log.read_since(0, 10_000)]

    def sample(self, name: str) -> float:
        lines = generate_latest(self.registry).decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


MakeLine = Callable[..., Line]


@pytest.fixture
def make_line(tmp_path: Path) -> Iterator[MakeLine]:
    made: list[Line] = []

    def make(
        items: Iterable[Frame | Unreadable | Exception],
        *,
        engine: Engine | None = None,
        open_engine: Callable[[], Engine] | None = None,
        capacity: int = 64,
        publisher: Any = None,
        max_wait_ms: float = 1.0,
        terms: Mapping[str, Terms] | None = None,
    ) -> Line:
        registry = CollectorRegistry()
        metrics = Metrics(registry, ["cam", "other"], CLOCK)
        source, sink = ListSource(items), publisher or ListPublisher()
        log = EventLog(tmp_path / f"log{len(made)}.sqlite", CLOCK)
        warnings: list[tuple[str, Mapping[str, object]]] = []
        pipeline = Pipeline(
            source=source,
            engine=engine or FakeEngine(SPEC),
            open_engine=open_engine or (lambda: FakeEngine(SPEC)),
            stages=Stages(
                line="line",
                input=INPUT,
                geometry=GEOMETRY,
                preprocess={"cam": Preprocess(INPUT), "other": Preprocess(INPUT, (0, 0, 16, 16))},
                segment=Segment(0.5, 1),
                decide=Decide(CALIBRATION, "model"),
            ),
            log=log,
            publisher=sink,
            metrics=metrics,
            clock=CLOCK,
            capacity=capacity,
            max_batch=4,
            max_wait_ms=max_wait_ms,
            warn=lambda text, fields: warnings.append((text, fields)),
            terms=terms or {},
        )
        made.append(Line(pipeline, source, sink, log, registry, metrics, warnings))
        return made[-1]

    yield make
    for one in made:
        one.log.close()


def test_every_frame_gets_one_verdict_logged_published_and_acknowledged(make_line: MakeLine) -> None:
    """Gray passes, white is a flaw, each once, in all three places."""
    line = make_line(frame(index, 255 if index % 3 == 0 else 128) for index in range(30))

    line.run_until(30)

    assert line.pipeline.failure is None
    assert sorted(event.frame_sequence for event in line.events) == list(range(30))
    assert all((event.decision == "reject") == (event.frame_sequence % 3 == 0) for event in line.events)
    assert sorted(line.source.acknowledged) == [("cam", 1, index) for index in range(30)]
    assert [event for event, _ in line.publisher.published] == line.events


def test_the_mask_is_published_beside_its_event(make_line: MakeLine) -> None:
    """A flawed quarter of the frame comes out as that quarter."""
    image = picture(128)
    image[:16, :16] = 255
    line = make_line([Frame(FrameId("cam", 1, 0, 0), image, CLOCK.monotonic_ns()), frame(1)])

    line.run_until(2)

    (flawed, mask_png), (good, nothing) = line.publisher.published
    assert (flawed.mask, good.mask, nothing) == ("inline", "none", None)
    assert mask_png is not None
    mask = decode_image(mask_png)[:, :, 0] > 0
    assert mask.shape == (32, 32)
    assert mask[:12, :12].all() and not mask[20:].any() and not mask[:, 20:].any()


def test_what_cannot_be_judged_is_inconclusive_with_its_reason(make_line: MakeLine) -> None:
    """Unreadable, of another shape, outside the region of interest: an answer each, and the part is held."""
    line = make_line(
        [
            Unreadable(FrameId("cam", 1, 0, 0), "truncated", "JPEG without an end", CLOCK.monotonic_ns()),
            frame(1, channels=3),
            frame(0, camera="other", side=8),
            frame(2),
        ]
    )

    line.run_until(4)

    found = {(event.camera, event.frame_sequence): (event.decision, event.reason) for event in line.events}
    assert found == {
        ("cam", 0): ("inconclusive", "unreadable"),
        ("cam", 1): ("inconclusive", "shape"),
        ("other", 0): ("inconclusive", "shape"),
        ("cam", 2): ("accept", "score"),
    }


def test_a_failed_batch_is_inconclusive_and_the_line_goes_on(make_line: MakeLine) -> None:
    """One hiccup of the backend costs the frames of one batch."""
    line = make_line((frame(index) for index in range(40)), engine=FakeEngine(SPEC, fail_tickets={1}))

    line.run_until(40)

    reasons = [event.reason for event in line.events]
    assert 1 <= reasons.count("engine") <= 4
    assert reasons.count("score") == 40 - reasons.count("engine")
    assert not line.pipeline.progress().engine_lost


def test_after_three_failures_the_engine_is_opened_again_once(make_line: MakeLine) -> None:
    """A wedged backend is replaced; the frames after that are judged."""
    opened: list[FakeEngine] = []

    def open_engine() -> Engine:
        opened.append(FakeEngine(SPEC))
        return opened[-1]

    line = make_line(
        (frame(index) for index in range(60)), engine=FakeEngine(SPEC, fail_tickets=range(100)), open_engine=open_engine
    )

    line.run_until(60)

    assert len(opened) == 1
    assert len(line.events) == 60
    assert line.events[-1].reason == "score"
    assert line.sample("kizu_engine_reopens_total") == 1
    assert line.sample("kizu_engine_failures_total") == 3


@pytest.mark.parametrize("reopening", ["fails", "does not help"])
def test_an_engine_that_stays_broken_leaves_a_line_that_still_answers(make_line: MakeLine, reopening: str) -> None:
    """Degraded: every frame is INCONCLUSIVE(engine) at once, acknowledged, and the state says so."""

    def open_engine() -> Engine:
        if reopening == "fails":
            raise EngineError("no such device any more")
        return FakeEngine(SPEC, fail_tickets=range(100))

    line = make_line(
        (frame(index) for index in range(80)), engine=FakeEngine(SPEC, fail_tickets=range(100)), open_engine=open_engine
    )

    line.run_until(80)

    assert {event.reason for event in line.events} == {"engine"}
    assert len(line.events) == len(line.source.acknowledged) == 80
    assert line.pipeline.progress().engine_lost
    assert line.pipeline.failure is None


class SwappingEngine(FakeEngine):
    """Answers with the number of another ticket."""

    def collect(self, timeout_s: float) -> tuple[Ticket, NDArray[np.float32], NDArray[np.float32]]:
        ticket, maps, scores = super().collect(timeout_s)
        return Ticket(ticket + 1), maps, scores


class NanEngine(FakeEngine):
    """Scores that are no numbers."""

    def collect(self, timeout_s: float) -> tuple[Ticket, NDArray[np.float32], NDArray[np.float32]]:
        ticket, maps, scores = super().collect(timeout_s)
        return ticket, maps * np.float32(np.nan), scores


@pytest.mark.parametrize("engine", [SwappingEngine, NanEngine])
def test_answers_that_cannot_be_trusted_are_never_accept(make_line: MakeLine, engine: type[FakeEngine]) -> None:
    """Another frame's map, or one that is not finite, is a fault of the engine and not of the part."""
    line = make_line((frame(index) for index in range(4)), engine=engine(SPEC))

    line.run_until(4)

    assert {event.reason for event in line.events} == {"engine"}


def test_frames_in_flight_get_their_verdict_when_the_line_is_stopped(make_line: MakeLine) -> None:
    """A slow engine, a stop in the middle: what was received is answered and acknowledged before the source closes."""
    line = make_line((frame(index) for index in range(500)), engine=FakeEngine(SPEC, latency_s=0.05), capacity=16)
    line.pipeline.start()
    while not line.source.acknowledged:
        time.sleep(0.002)

    line.pipeline.stop(10.0)

    received = line.sample("kizu_frames_received_total")
    assert 0 < received < 500
    assert len(line.events) == len(line.source.acknowledged) == line.source.acknowledged_when_closed == received
    assert line.pipeline.failure is None
    assert line.sample("kizu_frames_in_flight") == 0


def test_a_frame_left_behind_is_a_failure_that_is_told(make_line: MakeLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a pipeline that loses a frame on its way cannot end as if nothing had happened."""
    lose = inference.EngineRunner._add

    def losing(self: Any, one: Frame) -> Any:
        return None if one.id.sequence == 3 else lose(self, one)

    monkeypatch.setattr(inference.EngineRunner, "_add", losing)
    broken = make_line(frame(index) for index in range(8))

    broken.run_until(7)

    assert broken.pipeline.failure is not None and "1 frames got no verdict" in broken.pipeline.failure
    assert ("cam", 1, 3) not in broken.source.acknowledged


def test_no_more_than_capacity_is_ever_in_flight(make_line: MakeLine) -> None:
    """The one bound: at it the source is serviced instead of read, so cameras wait and memory does not grow."""
    line = make_line((frame(index) for index in range(60)), engine=FakeEngine(SPEC, latency_s=0.02), capacity=6)
    highest = 0
    line.pipeline.start()
    while line.metrics.frames.judged < 60:
        highest = max(highest, line.metrics.frames.in_flight)
        time.sleep(0.0005)
    line.pipeline.stop(10.0)

    assert 0 < highest <= 6
    assert line.source.services > 0


def test_the_same_frame_in_flight_is_judged_once(make_line: MakeLine) -> None:
    """A source that hands a frame out twice does not get two verdicts for it."""
    line = make_line([frame(0), frame(0), frame(1)], engine=FakeEngine(SPEC, latency_s=0.1))

    line.run_until(2)

    assert sorted(event.frame_sequence for event in line.events) == [0, 1]
    assert line.sample("kizu_frames_duplicate_total") == 1


def test_a_frame_that_the_log_knows_is_acknowledged_and_not_published_again(make_line: MakeLine) -> None:
    """After a restart: the verdict stands as it is."""
    line = make_line([frame(0)])
    line.run_until(1)
    again = make_line([frame(0, 255)])
    again.log.close()
    again.pipeline._log = line.log

    again.run_until(1)

    assert [event.decision for event in line.events] == ["accept"]
    assert again.source.acknowledged == [("cam", 1, 0)]
    assert again.publisher.published == []


def test_a_log_that_fails_stops_the_line_and_acknowledges_nothing_more(
    make_line: MakeLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a durable verdict there is no acknowledgement; the camera keeps the frame."""
    broken = make_line(frame(index) for index in range(50))

    def full(*given: object, **more: object) -> None:
        raise LogError("disk full")

    monkeypatch.setattr(broken.log, "append", full)
    broken.run_until(50)

    assert broken.pipeline.failure is not None and "disk full" in broken.pipeline.failure
    assert broken.source.acknowledged == [] and broken.publisher.published == []
    assert broken.source.closed.is_set()


def test_a_publisher_that_fails_does_not_keep_the_camera_waiting(make_line: MakeLine) -> None:
    """The log is the truth, the publication a hint."""

    class Broken(ListPublisher):
        def publish(self, event: DefectEvent, mask_png: bytes | None = None) -> None:
            raise SinkError("socket is gone")

    line = make_line([frame(0)], publisher=Broken())

    line.run_until(1)

    assert line.source.acknowledged == [("cam", 1, 0)]
    assert line.sample("kizu_events_unpublished_total") == 1


def test_a_source_that_ends_ends_the_line(make_line: MakeLine) -> None:
    """A folder of pictures is finished: everything was judged, nothing failed."""
    line = make_line([*(frame(index) for index in range(5)), EndOfStream("no more pictures")])

    line.run_until(1000)

    assert len(line.events) == 5
    assert line.pipeline.failure is None


@pytest.mark.parametrize("error", [SourceBroken("cable cut"), ZeroDivisionError("nobody foresaw this")])
def test_a_thread_that_fails_stops_the_line_in_order(make_line: MakeLine, error: Exception) -> None:
    """What came before gets its verdict; the reason is told, an unforeseen one is counted."""
    line = make_line([*(frame(index) for index in range(5)), error])

    line.run_until(1000)

    assert len(line.events) == len(line.source.acknowledged) == 5
    assert line.pipeline.failure is not None and str(error) in line.pipeline.failure
    assert line.source.closed.is_set()
    assert line.sample("kizu_thread_crashes_total") == isinstance(error, ZeroDivisionError)


def test_a_large_frame_that_takes_long_but_moves_is_not_stalled(make_line: MakeLine) -> None:
    """A thousand tiles may take a minute; each batch of them counts as progress, or the watchdog would end the line."""
    line = make_line([])
    before = line.pipeline.progress().moved_ns

    line.pipeline._runner.moved_ns = before + 60_000_000_000

    assert line.pipeline.progress().moved_ns == before + 60_000_000_000


SOON = {"cam": Terms(deadline_ns=20_000_000)}
"""A deadline of 20 ms, for an engine that takes 0.4 s."""


def test_a_frame_without_a_verdict_at_its_deadline_is_late_then_and_its_result_is_discarded(
    make_line: MakeLine,
) -> None:
    """The answer comes before the engine's, the line goes on, and the engine's own answer is counted, not given."""
    line = make_line([frame(0, 255)], engine=FakeEngine(SPEC, latency_s=0.4), terms=SOON)

    line.run_until(1)

    assert [(event.decision, event.reason) for event in line.events] == [("inconclusive", "late")]
    assert 20_000_000 <= line.events[0].latency_ns < 400_000_000
    assert line.sample("kizu_results_discarded_total") == 1
    assert line.source.acknowledged == [("cam", 1, 0)] and line.pipeline.failure is None


def test_control_without_settling_a_late_frame_would_be_judged_twice(
    make_line: MakeLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: every result counts as the first; the log has one row, and the duplicate gives the bug away."""
    monkeypatch.setattr(Docket, "settle", lambda self, key: True)
    monkeypatch.setattr(Docket, "is_open", lambda self, key: True)
    line = make_line([frame(0, 255)], engine=FakeEngine(SPEC, latency_s=0.4), terms=SOON)

    line.run_until(1)

    assert line.sample("kizu_frames_duplicate_total") == 1
    assert line.sample("kizu_results_discarded_total") == 0


def test_a_deadline_holds_while_the_engine_hangs_and_what_waits_does_not_pile_up(make_line: MakeLine) -> None:
    """Sixty frames at an engine that takes 0.4 s a batch: all answered in time, and few of them held."""
    line = make_line((frame(index) for index in range(60)), engine=FakeEngine(SPEC, latency_s=0.4), terms=SOON)

    line.run_until(60, timeout_s=3.0)

    reasons = [event.reason for event in line.events]
    assert len(reasons) == 60 and reasons.count("late") >= 52
    assert max(event.latency_ns for event in line.events) < 400_000_000


def test_an_engine_that_hangs_is_seen_though_deadlines_answer_for_it(make_line: MakeLine) -> None:
    """Or the watchdog would be fed by a line that inspects nothing. Time enough to begin: a cold start takes 20 ms."""
    line = make_line([frame(0)], engine=FakeEngine(SPEC, latency_s=3.0), terms={"cam": Terms(deadline_ns=10**9)})
    line.pipeline.start()
    while not line.events:
        time.sleep(0.002)

    hanging = line.pipeline.progress()
    line.pipeline.stop(10.0)

    assert hanging.in_flight == 1 and hanging.moved_ns < line.metrics.frames.progress_ns


def test_with_latest_the_newest_frame_is_looked_at_and_the_displaced_ones_say_so(make_line: MakeLine) -> None:
    """Forty frames at once: the first and the last are judged, those between got an answer and an acknowledgement."""
    line = make_line(
        (frame(index) for index in range(40)),
        engine=FakeEngine(SPEC, latency_s=0.2),
        terms={"cam": Terms(latest=True)},
    )

    line.run_until(40)

    reasons = {event.frame_sequence: event.reason for event in line.events}
    assert len(reasons) == len(line.source.acknowledged) == 40
    assert reasons[39] == "score" and set(reasons.values()) == {"score", "dropped"}
    received = line.sample("kizu_frames_received_total")
    assert received == 40 == line.sample("kizu_verdicts_total")


@pytest.mark.parametrize(
    ("limit", "reasons"),
    [(3, ["score", "score", "frozen", "frozen", "score"]), (None, ["score"] * 5)],
    ids=["watched", "control"],
)
def test_a_camera_that_repeats_one_picture_is_frozen_and_accepts_nothing(
    make_line: MakeLine, limit: int | None, reasons: list[str]
) -> None:
    """Each frame has its answer, in the log and at the camera. Control: unwatched, a dead camera's parts all pass."""
    line = make_line([*(frame(index) for index in range(4)), frame(4, 120)], terms={"cam": Terms(frozen_after=limit)})

    line.run_until(5)

    told = sorted((event.frame_sequence, event.reason, event.decision) for event in line.events)
    assert [reason for _, reason, _ in told] == reasons
    assert {decision for _, reason, decision in told if reason == "frozen"} <= {"inconclusive"}
    assert len(line.source.acknowledged) == 5 == line.sample("kizu_verdicts_total")


def test_an_idle_line_takes_a_single_frame_without_waiting_for_company(make_line: MakeLine) -> None:
    """A batch leaves when its first frame has waited `max_wait_ms`, not when it is full."""
    line = make_line([frame(0)], max_wait_ms=5.0)

    line.run_until(1)

    assert line.events[0].latency_ns < 2_000_000_000
