"""The docket: order, policies and deadlines, and that a frame is settled once; on a clock that stands still."""

from __future__ import annotations

import threading
from queue import Empty

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.clock import ManualClock
from edge.config import CameraConfig
from edge.docket import Docket, Terms, terms_of
from edge.types import Frame, FrameId

MS = 1_000_000


def frame(sequence: int, camera: str = "cam", *, received_ms: int = 0, captured_ns: int = 0) -> Frame:
    return Frame(FrameId(camera, 1, sequence, captured_ns), np.zeros((2, 2, 1), np.uint8), received_ns=received_ms * MS)


def taken(docket: Docket) -> list[int]:
    found = []
    try:
        while (one := docket.get_nowait()) is not None:
            found.append(one.id.sequence)
    except Empty:
        pass
    return found


def test_frames_are_taken_in_the_order_in_which_they_came() -> None:
    """Over all cameras, first in, first out."""
    docket = Docket({}, ManualClock())

    for index in range(4):
        assert docket.enter(frame(index, f"cam{index % 2}")) is None

    assert taken(docket) == [0, 1, 2, 3] and docket.qsize() == 0


def test_latest_gives_up_a_frame_that_waits_but_not_one_that_is_looked_at() -> None:
    """Frame 0 is with the engine when 1 comes, and 1 still waits when 2 does; the other camera keeps all of its own."""
    docket = Docket({"cam": Terms(latest=True)}, ManualClock())
    docket.enter(frame(0))
    assert docket.get_nowait() is not None

    displaced = [docket.enter(frame(1)), docket.enter(frame(7, "other")), docket.enter(frame(8, "other"))]
    displaced.append(docket.enter(frame(2)))

    assert [one and one.id.sequence for one in displaced] == [None, None, None, 1]
    assert taken(docket) == [7, 8, 2]
    assert docket.settle(frame(0).id.key) and not docket.settle(frame(1).id.key)


def test_a_frame_is_overdue_at_its_deadline_and_not_before() -> None:
    """100 ms after reception, to the nanosecond; a frame with its verdict in time never is."""
    clock = ManualClock()
    docket = Docket({"cam": Terms(deadline_ns=100 * MS)}, clock)
    for index in range(3):
        docket.enter(frame(index, received_ms=10 * index))
    docket.settle(frame(1).id.key)

    clock.advance(0.1 - 1e-9)
    early = docket.overdue()
    clock.advance(1e-9)
    first = docket.overdue()
    clock.advance(0.02)

    assert (early, [one.id.sequence for one in first]) == ([], [0])
    assert [one.id.sequence for one in docket.overdue()] == [2]
    assert taken(docket) == [], "what is settled is not looked at any more"


def test_a_result_after_the_deadline_has_no_verdict_to_give() -> None:
    """The engine had it, the deadline came, then the answer: settled once."""
    clock = ManualClock()
    docket = Docket({"cam": Terms(deadline_ns=MS)}, clock)
    docket.enter(frame(0))
    docket.get_nowait()
    clock.advance(0.002)

    assert len(docket.overdue()) == 1
    assert not docket.settle(frame(0).id.key) and not docket.is_open(frame(0).id.key)


@pytest.mark.parametrize(("clock_ahead_s", "due_after_s"), [(-0.06, 0.04), (0.0, 0.1), (5.0, 0.1)])
def test_a_synchronized_camera_is_judged_by_its_exposure(clock_ahead_s: float, due_after_s: float) -> None:
    """60 ms on the way leave 40 of 100; a clock ahead of ours buys no time."""
    clock = ManualClock()
    docket = Docket({"cam": Terms(deadline_ns=100 * MS, synchronized=True)}, clock)
    docket.enter(frame(0, captured_ns=clock.wall_ns() + round(clock_ahead_s * 1e9)))

    clock.advance(due_after_s - 1e-6)
    assert docket.overdue() == []
    clock.advance(2e-6)
    assert len(docket.overdue()) == 1


def test_a_camera_whose_clock_is_free_is_judged_by_its_reception_alone() -> None:
    """1970 on the camera is no reason to call its frames late."""
    clock = ManualClock()
    docket = Docket({"cam": Terms(deadline_ns=100 * MS)}, clock)
    docket.enter(frame(0, captured_ns=0))

    assert docket.overdue() == []


def test_the_sleeper_is_woken_by_a_frame_with_an_earlier_deadline() -> None:
    """It sleeps for a deadline in a minute when one in no time comes in."""
    clock = ManualClock()
    docket = Docket({"slow": Terms(deadline_ns=60_000 * MS), "fast": Terms(deadline_ns=1)}, clock)
    docket.enter(frame(0, "slow"))
    sleeper = threading.Thread(target=docket.wait_for_due, args=(60.0,))
    sleeper.start()

    docket.enter(frame(0, "fast"))

    sleeper.join(20.0)
    assert not sleeper.is_alive()


def test_a_closed_docket_ends_after_its_last_frame() -> None:
    """None is the end, and it comes after everything that waited."""
    docket = Docket({}, ManualClock())
    docket.enter(frame(0))
    docket.close()

    assert taken(docket) == [0]
    assert docket.get(1.0) is None


def test_terms_follow_from_the_configuration() -> None:
    """Milliseconds there, nanoseconds here."""
    camera = CameraConfig(name="cam", policy="latest", deadline_ms=2.5, clock="synchronized")

    assert terms_of(camera) == Terms(latest=True, deadline_ns=2_500_000, synchronized=True)
    assert terms_of(CameraConfig(name="cam")) == Terms()


STEPS = st.lists(st.sampled_from(["enter", "take", "answer", "tick", "late"]), max_size=60)


def settlements(docket: Docket, clock: ManualClock, steps: list[str]) -> tuple[int, list[tuple[str, int, int]]]:
    """Play `steps`, then let everything come to its end; how many frames came in, and every settlement in order."""
    entered, with_engine, settled = 0, [], []

    def take() -> None:
        try:
            if one := docket.get_nowait():
                with_engine.append(one.id.key)
        except Empty:
            pass

    for step in [*steps, *["take", "answer"] * len(steps)]:
        if step == "enter":
            older = docket.enter(frame(entered, received_ms=round(clock.monotonic_ns() / MS)))
            settled += [older.id.key] if older else []
            entered += 1
        elif step == "take":
            take()
        elif step == "answer" and with_engine:
            key = with_engine.pop(0)
            settled += [key] if docket.settle(key) else []
        elif step == "tick":
            clock.advance(0.003)
        elif step == "late":
            settled += [one.id.key for one in docket.overdue()]
    return entered, settled


@given(steps=STEPS, latest=st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_frame_is_settled_exactly_once_whatever_happens(steps: list[str], latest: bool) -> None:
    """By result, deadline or a newer frame: one of them, and one only."""
    clock = ManualClock()
    docket = Docket({"cam": Terms(latest=latest, deadline_ns=10 * MS)}, clock)

    entered, settled = settlements(docket, clock, steps)

    assert sorted(settled) == [("cam", 1, index) for index in range(entered)]


def test_control_a_docket_that_forgets_to_settle_at_the_deadline_is_found() -> None:
    """Planted bug: the overdue frame stays open, so its result is a second verdict."""

    class Forgetful(Docket):
        def overdue(self) -> list[Frame]:
            found = super().overdue()
            self._open |= {one.id.key: one for one in found}
            return found

    clock = ManualClock()
    docket = Forgetful({"cam": Terms(deadline_ns=MS)}, clock)

    _, settled = settlements(docket, clock, ["enter", "take", "tick", "late", "answer"])

    assert settled == [("cam", 1, 0)] * 2
