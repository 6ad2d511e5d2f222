"""What every Sink promises: takes events in order, returns at once or raises, never drops silently."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge.client import Subscriber
from edge.clock import ManualClock, SystemClock
from edge.errors import SinkError, SinkFull, SourceTimeout
from edge.events import DefectEvent
from edge.protocols import Sink
from edge.sinks.event_log import EventLog
from edge.sinks.publisher import Publisher
from sample_events import sample_event


def event(sequence: int) -> DefectEvent:
    return sample_event(sequence, log_epoch=1, log_sequence=sequence + 1)


@dataclass
class Case:
    """A sink, how to see what it took, and what fills it (None: it never waits, so it is never full)."""

    sink: Sink
    arrived: Callable[[], list[int]]
    fill: Callable[[], int] | None = None


def log_case(tmp_path: Path) -> Iterator[Case]:
    with EventLog(tmp_path / "events.db", SystemClock(), capacity=50) as log:

        def arrived() -> list[int]:
            log.flush(10)
            return [e.frame_sequence for e, _ in log.read_since(0, 1000)]

        def fill() -> int:
            """Hold the writer thread and append until it refuses; how many were taken."""
            held, go = threading.Event(), threading.Event()
            log.append(event(1000), None, lambda e: (held.set(), go.wait(10), None)[2])
            assert held.wait(10)
            taken = 1
            try:
                while taken < 1000:
                    log.emit(event(1000 + taken))
                    taken += 1
            except SinkFull:
                return taken
            finally:
                go.set()
            raise AssertionError("the log took a thousand events without a word")

        yield Case(log, arrived, fill)


def publisher_case(tmp_path: Path) -> Iterator[Case]:
    clock = ManualClock()
    with contextlib.ExitStack() as stack:
        publisher = stack.enter_context(Publisher("tcp://127.0.0.1:*", "line-a", clock))
        subscriber = stack.enter_context(Subscriber(publisher.address))
        while True:
            clock.advance(1)
            publisher.tick()
            try:
                subscriber.wait_until_connected(0.05)
                break
            except SourceTimeout:
                continue

        def arrived() -> list[int]:
            found: list[int] = []
            while True:
                try:
                    found.append(subscriber.receive(0.2)[0].frame_sequence)
                except SourceTimeout:
                    return found

        yield Case(publisher, arrived)


CASES = {"event_log": log_case, "publisher": publisher_case}


@pytest.fixture(params=CASES.keys())
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    yield from CASES[request.param](tmp_path)


def test_a_sink_takes_events_in_order(case: Case) -> None:
    """Whatever goes in comes out in the same order, once."""
    for sequence in range(20):
        case.sink.emit(event(sequence))

    assert case.arrived() == list(range(20))


def test_emit_returns_at_once(case: Case) -> None:
    """The pipeline's thread is never held by a disk or a subscriber: thirty events in well under a second each."""
    clock = SystemClock()
    slowest_ns = 0
    for sequence in range(30):
        before = clock.monotonic_ns()
        case.sink.emit(event(sequence))
        slowest_ns = max(slowest_ns, clock.monotonic_ns() - before)

    assert slowest_ns < 1_000_000_000


def test_a_full_sink_says_so_and_keeps_what_it_took(case: Case) -> None:
    """SinkFull means "not taken"; everything taken before arrives."""
    if case.fill is None:
        pytest.skip("this sink never waits; its subscribers count what they miss")
    taken = case.fill()

    assert case.arrived() == [1000 + number for number in range(taken)]


def test_a_closed_sink_raises_instead_of_losing(case: Case) -> None:
    """After the context manager nothing may seem to be taken."""
    case.sink.__exit__(None, None, None)

    with pytest.raises(SinkError):
        case.sink.emit(event(0))


def test_a_sink_is_its_own_context_manager(case: Case) -> None:
    """`with make_sink() as sink`."""
    assert case.sink.__enter__() is case.sink


def test_a_sink_that_drops_silently_would_be_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: every second event vanishes, and the order test finds it."""
    emit = case.sink.emit
    monkeypatch.setattr(case.sink, "emit", lambda e: emit(e) if e.frame_sequence % 2 else None)

    with pytest.raises(AssertionError):
        test_a_sink_takes_events_in_order(case)
