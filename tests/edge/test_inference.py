"""Frames larger than the model through the inference thread's work: one answer each, in memory that a tile bounds."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Callable, Collection
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from edge.bundle import InputSpec, MapGeometry, ScoreCalibration
from edge.clock import ManualClock, SystemClock
from edge.engines.fake import FakeEngine
from edge.errors import EngineError
from edge.inference import EngineRunner, Replacement, Scored, Stages, Unjudged
from edge.metrics import Metrics
from edge.protocols import Clock, Engine, EngineSpec, Ticket
from edge.stages.decide import Decide
from edge.stages.preprocess import Preprocess
from edge.stages.segment import Segment
from edge.stages.tile import tiling_of
from edge.types import Frame, FrameId, Reason

SIDE, CELLS = 32, 16
INPUT = InputSpec(SIDE, SIDE, 1, max_batch=4, fit="tile", min_side_px=8)
GEOMETRY = MapGeometry(CELLS, CELLS, stride=2.0, offset_y=0.5, offset_x=0.5)  # the fake's blocks: 2 x 2 px, no padding
CALIBRATION = ScoreCalibration("provisional", False, 0.5, 0.5, 1, (0.1, 0.2), "fake", "0" * 64)
CLOCK = SystemClock()

Answers = list[Scored | Unjudged]


def fake(
    height: int = SIDE, width: int = SIDE, fail_tickets: Collection[int] = (), kind: type[FakeEngine] = FakeEngine
) -> FakeEngine:
    """The fake for pictures of any even size: it sees 2 x 2 px, so it is the same network on a tile and on a frame."""
    spec = EngineSpec("fake", "1", "cpu", height, width, 1, height // 2, width // 2, max_batch=4, depth=2)
    return kind(spec, fail_tickets=fail_tickets)


def frame(sequence: int, height: int = 96, width: int = 96) -> Frame:
    pixels = np.random.default_rng(sequence).integers(0, 256, (height, width, 1), dtype=np.uint8)
    return Frame(FrameId("cam", 1, sequence, 0), pixels, CLOCK.monotonic_ns())


def runner_for(
    engine: Engine, answers: Answers, open_engine: Callable[[], Engine] = fake, clock: Clock = CLOCK
) -> EngineRunner:
    stages = Stages(
        line="line",
        input=INPUT,
        geometry=GEOMETRY,
        preprocess={"cam": Preprocess(INPUT)},
        segment=Segment(0.5, 1),
        decide=Decide(CALIBRATION, "model"),
        tiling=tiling_of(INPUT, GEOMETRY),
    )
    metrics = Metrics(CollectorRegistry(), ["cam"], CLOCK)
    return EngineRunner(engine, open_engine, stages, metrics, clock, 4, 0, answers.append, lambda text, fields: None)


def run(frames: list[Frame], engine: Engine, **options: Any) -> tuple[Answers, EngineRunner]:
    """All `frames` through an engine, until the end."""
    answers: Answers = []
    runner = runner_for(engine, answers, **options)
    queue: SimpleQueue[Frame | None] = SimpleQueue()
    for one in [*frames, None]:
        queue.put(one)
    runner.run(queue)
    return answers, runner


def sequences(answers: Answers, kind: type[Scored] | type[Unjudged]) -> list[int]:
    frames = [one.frame if isinstance(one, Unjudged) else one.frames[0] for one in answers if isinstance(one, kind)]
    return [one.id.sequence for one in frames]


def test_frames_of_any_size_are_scored_as_a_whole_and_once() -> None:
    """Three times the tile, a strip, the tile itself, less than it: in order, each with the whole frame's map."""
    frames = [frame(index, *size) for index, size in enumerate([(96, 96), (32, 300), (32, 32), (20, 26), (100, 34)])]

    answers, runner = run(frames, fake())

    assert sequences(answers, Scored) == [0, 1, 2, 3, 4] and len(answers) == 5
    for one, found in zip(frames, answers, strict=True):
        assert isinstance(found, Scored)
        maps, scores = fake(*one.image.shape[:2]).infer(one.image[None])
        np.testing.assert_array_equal(found.maps, maps)
        assert found.scores == scores and (found.geometry.height, found.geometry.width) == maps.shape[1:]
    assert runner.moved_ns > 0


def test_a_frame_with_one_failed_tile_is_inconclusive_once_and_its_other_tiles_are_ignored() -> None:
    """The second of a frame's batches fails: one answer, no more of its tiles to the engine, the next frame judged."""
    engine = fake(fail_tickets={1})

    answers, _ = run([frame(0, 320, 320), frame(1)], engine)

    assert sequences(answers, Unjudged) == [0] and sequences(answers, Scored) == [1] and len(answers) == 2
    assert isinstance(answers[0], Unjudged) and answers[0].reason is Reason.ENGINE
    assert engine._next <= 10, "121 tiles, in batches of 4, should not have been run for a frame that is given up"


def test_two_frames_with_tiles_in_a_failed_batch_are_each_given_up_once() -> None:
    """Nine tiles a frame in batches of four: the third batch is the first frame's last tile and three of the second."""
    answers, _ = run([frame(index) for index in range(4)], fake(fail_tickets={2}))

    assert sequences(answers, Unjudged) == [0, 1] and sequences(answers, Scored) == [2, 3]


def test_control_a_frame_that_is_not_forgotten_when_given_up_is_answered_twice() -> None:
    """Planted bug: the line would count a frame more than it received."""

    class Keeping(dict[Any, Any]):
        def pop(self, key: Any, default: Any = None) -> Any:
            return self.get(key, default)

    answers: Answers = []
    runner = runner_for(fake(fail_tickets={1, 2}), answers)
    runner._stitching = Keeping()
    queue: SimpleQueue[Frame | None] = SimpleQueue()
    for one in (frame(0), None):
        queue.put(one)
    runner.run(queue)

    assert sequences(answers, Unjudged) == [0, 0]


def test_the_same_frame_sent_again_gets_nothing_of_the_tiles_that_were_given_up() -> None:
    """A camera repeats a frame whose first try failed while tiles of that try are still in the engine."""
    answers, _ = run([frame(0, 128, 128), frame(0, 128, 128)], fake(fail_tickets={0}))

    assert [type(one) for one in answers] == [Unjudged, Scored]
    assert isinstance(answers[1], Scored)
    np.testing.assert_array_equal(answers[1].maps, fake(128, 128).infer(frame(0, 128, 128).image[None])[0])


@pytest.mark.parametrize("helps", [True, False])
def test_an_engine_that_keeps_failing_is_replaced_once_and_every_frame_answered(helps: bool) -> None:
    """As with whole frames: after three failures a new engine, and if that fails too, INCONCLUSIVE for now."""
    again = fake if helps else lambda: fake(fail_tickets=range(1000))

    answers, runner = run([frame(index) for index in range(20)], fake(fail_tickets=range(1000)), open_engine=again)

    assert sorted(sequences(answers, Scored) + sequences(answers, Unjudged)) == list(range(20))
    assert runner.lost is not helps and bool(sequences(answers, Scored)) is helps


class WrongShape(FakeEngine):
    """Maps that lack a column."""

    def collect(self, timeout_s: float) -> tuple[Ticket, NDArray[np.float32], NDArray[np.float32]]:
        ticket, maps, scores = super().collect(timeout_s)
        return ticket, maps[:, :, :-1], scores


def test_a_map_of_another_shape_gives_the_frame_up_and_not_the_line() -> None:
    """What the manifest does not promise is not put into a frame's map."""
    answers, _ = run([frame(0), frame(1)], fake(kind=WrongShape))

    assert sequences(answers, Unjudged) == [0, 1] and len(answers) == 2
    assert all(isinstance(one, Unjudged) and "expected float32 (16, 16)" in one.detail for one in answers)


def test_a_frame_that_is_too_small_is_of_another_shape() -> None:
    """Fewer pixels than the network looks at."""
    answers, _ = run([frame(0, 7, 96)], fake())

    assert isinstance(answers[0], Unjudged) and answers[0].reason is Reason.SHAPE


def peak_bytes(side: int) -> int:
    """The most that scoring one frame of `side` x `side` px takes, beside the frame itself and its map."""
    one = frame(0, side, side)
    answers: Answers = []
    runner = runner_for(fake(), answers)
    queue: SimpleQueue[Frame | None] = SimpleQueue()
    for item in (one, None):
        queue.put(item)
    tracemalloc.start()
    try:
        runner.run(queue)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(answers[0], Scored)
    return peak - answers[0].maps.nbytes


def test_memory_is_bounded_by_the_tile_and_not_by_the_frame() -> None:
    """Sixteen times the pixels, 983 kB more of them: a few kB more for the plan, beside the map itself."""
    peak_bytes(64)  # what is allocated once for good

    assert peak_bytes(1024) - peak_bytes(256) < 64_000


def test_control_cutting_all_tiles_at_once_takes_the_frames_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: tiles are copied and collected before the first is run."""
    from edge.stages import tile

    lazily = tile.Stitch.tiles
    monkeypatch.setattr(tile, "cut", lambda pixels, y, x, h, w: pixels[y : y + h, x : x + w].copy())
    monkeypatch.setattr(tile.Stitch, "tiles", lambda self: iter(list(lazily(self))))

    assert peak_bytes(1024) - peak_bytes(256) > 500_000


def test_stages_without_the_tiling_that_their_bundle_needs_cannot_be_made() -> None:
    """A tile bundle whose frames went in whole would fail on every frame."""
    with pytest.raises(ValueError, match="tiling_of"):
        Stages("line", INPUT, GEOMETRY, {}, Segment(0.5, 1), Decide(CALIBRATION, "model"))


def test_what_the_engine_said_about_a_tile_is_the_frames_detail() -> None:
    """It reaches the event, and so whoever looks into why a part was held."""
    answers, _ = run([frame(0)], fake(fail_tickets={0}))

    assert isinstance(answers[0], Unjudged) and "as it was told to" in answers[0].detail


class OnSubmit(FakeEngine):
    """Calls `then` when the third batch goes in: in the middle of the first frame, the second one waiting."""

    then: Callable[[], None]

    def submit(self, batch: NDArray[np.uint8]) -> Ticket:
        if self._next == 2:
            self.then()
        return super().submit(batch)


def replaced_midway(exchange_at_once: bool) -> tuple[Answers, Replacement]:
    """Two frames of 121 tiles through a runner whose model is replaced while the first one's are under way."""
    answers: Answers = []
    engine = fake(kind=OnSubmit)
    assert isinstance(engine, OnSubmit)
    runner = runner_for(engine, answers)
    new = Replacement(fake(), fake, dataclasses.replace(runner._stages, decide=Decide(CALIBRATION, "new")))

    def then() -> None:
        runner.replace(new)
        if exchange_at_once:
            runner._exchange()

    engine.then = then
    queue: SimpleQueue[Frame | None] = SimpleQueue()
    for one in [frame(0, 320, 320), frame(1, 320, 320), None]:
        queue.put(one)
    runner.run(queue)
    return answers, new


def test_a_replacement_waits_for_the_frame_that_is_under_way() -> None:
    """All 121 tiles of the first frame by the old model, all of the second by the new one."""
    answers, new = replaced_midway(exchange_at_once=False)

    assert new.accepted and new.done.is_set()
    assert sequences(answers, Scored) == [0, 1] and len(answers) == 2
    assert [one.stages.decide.model_id for one in answers if isinstance(one, Scored)] == ["model", "new"]


def test_control_an_exchange_in_the_middle_of_a_frame_is_noticed() -> None:
    """Planted bug: what is in the old engine is asked of the new one."""
    with pytest.raises((EngineError, ValueError)):
        answers, _ = replaced_midway(exchange_at_once=True)
        if sequences(answers, Scored) != [0, 1]:
            raise EngineError("a frame was lost")


def test_a_replacement_that_comes_after_the_end_is_closed_and_said_not_to_judge() -> None:
    """The line stopped meanwhile: whoever asked must not wait for ever."""
    answers: Answers = []
    runner = runner_for(fake(), answers)
    queue: SimpleQueue[Frame | None] = SimpleQueue()
    queue.put(None)
    runner.run(queue)
    new = Replacement(fake(), fake, runner._stages)

    runner.replace(new)

    assert new.done.is_set() and not new.accepted
    with pytest.raises(EngineError):
        new.engine.submit(np.zeros((1, SIDE, SIDE, 1), np.uint8))


class OneFrameASecond(SimpleQueue[Frame | None]):
    """Frames that come a second after each other, on a clock that only this moves."""

    def __init__(self, clock: ManualClock, count: int) -> None:
        super().__init__()
        self._clock = clock
        for index in range(count):
            self.put(frame(index))
        self.put(None)

    def get(self, block: bool = True, timeout: float | None = None) -> Frame | None:
        self._clock.advance(1.0)
        return super().get(block, timeout)


def test_tries_to_open_the_engine_again_wait_longer_each_time_but_not_without_bound() -> None:
    """At once, then after 1, 2, 4 ... 60 s; every frame between is answered; an engine that opens ends it."""
    clock, tries, answers = ManualClock(), list[float](), Answers()

    def open_engine() -> Engine:
        tries.append(clock.monotonic_ns() / 1e9)
        if len(tries) > 10:
            return fake()
        raise EngineError("no such device")

    runner = runner_for(fake(fail_tickets=range(1000)), answers, open_engine, clock)
    runner.run(OneFrameASecond(clock, 330))

    waits = [round(later - sooner) for sooner, later in pairwise(tries)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert len(answers) == 330 and not runner.lost and isinstance(answers[-1], Scored)
