"""Retention: the oldest events go, the tombstone stays, and no frame is ever judged again for it."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.clock import SystemClock
from edge.errors import LogError
from edge.sinks.event_log import EventLog
from edge.sinks.retention import Retention, apply_retention
from sample_events import CAMERA_EPOCH, sample_event

NOW_NS = 1_600_000_000_000_000_000
OLD, YOUNG = NOW_NS - 10**12, NOW_NS - 10**9
MINUTE = Retention(max_age_s=60)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    """Its own retention keeps everything; the tests apply theirs."""
    with EventLog(tmp_path / "events.db", SystemClock()) as made:
        yield made


def fill(log: EventLog, *frames: int, decided_ns: int = OLD) -> None:
    for sequence in frames:
        log.append(sample_event(sequence, decided_ns=decided_ns), b"m" * 100)
    log.flush(10)


def retain(log: EventLog, retention: Retention = MINUTE) -> int:
    """What the writer thread does once a second, now."""
    removed = apply_retention(log._connection, retention, NOW_NS)
    log._removed_through = max(log._removed_through, log.page(0, 1, 1).gap_last)
    return removed


def test_events_beyond_the_age_leave_a_tombstone(log: EventLog) -> None:
    """Whoever asks for them is told the gap; the rest is there and sound."""
    fill(log, *range(5))
    fill(log, *range(5, 8), decided_ns=YOUNG)

    assert retain(log) == 5
    page = log.page(2, 100, 10**6)
    assert (page.gap_last, [event.log_sequence for event, _ in page.events]) == (5, [6, 7, 8])
    assert log.page(5, 100, 10**6).gap_last == 0
    assert log.verify() == 3


def test_a_tombstone_that_lies_is_noticed(log: EventLog, tmp_path: Path) -> None:
    """Control: rows taken without it are a hole."""
    fill(log, 0, 1, 2)
    with sqlite3.connect(tmp_path / "events.db") as other:
        other.execute("DELETE FROM events WHERE log_sequence = 1")

    with pytest.raises(LogError, match="log sequence 1 is missing"):
        log.verify()


def test_bytes_are_bounded(log: EventLog) -> None:
    """In chunks, oldest first, until the pages in use fit."""
    fill(log, *range(1000))
    bound = Retention(max_bytes=200_000)

    while retain(log, bound):
        pass

    page = log.page(0, 2000, 10**9)
    assert 0 < len(page.events) < 1000 and page.events[-1][0].log_sequence == 1000
    assert page.gap_last == page.events[0][0].log_sequence - 1


def test_a_removed_frame_is_never_judged_again(log: EventLog) -> None:
    """Below its camera's mark, and ahead of it: frame 3 came while 1 and 2 were missing."""
    fill(log, 0, 3)
    retain(log)
    key = ("cam1", CAMERA_EPOCH)
    assert [log.contains((*key, sequence)) for sequence in range(4)] == [True, False, False, True]

    fill(log, 0, 3, 1, 2)

    assert log.duplicates == 2
    assert log.acked_through(*key) == 3
    assert [event.frame_sequence for event, _ in log.read_since(0, 10)] == [1, 2]


def test_numbers_are_never_given_again_when_everything_was_removed(tmp_path: Path) -> None:
    """Also by the next daemon."""
    for expected in (3, 6):
        with EventLog(tmp_path / "all.db", SystemClock()) as log:
            fill(log, *range(expected - 3, expected))
            assert log.head == expected
            retain(log)


def test_the_writer_applies_retention_by_itself(tmp_path: Path) -> None:
    """With the next group, or within a second of quiet."""
    with EventLog(tmp_path / "own.db", SystemClock(), retention=MINUTE) as log:
        fill(log, 0)  # decided long ago
        log._retention_due_ns = 0
        fill(log, 1)
        fill(log, 2)

        assert log.removed >= 1 and log.removed_through >= 1


def register(log: EventLog, name: str, cursor: int) -> None:
    done = threading.Event()
    log.move_cursor(name, cursor, 0, lambda at: done.set())
    assert done.wait(10)


HOUR_S = 3600.0
KEEPING = Retention(max_age_s=60, keep_for_s=HOUR_S)


@pytest.mark.parametrize(
    ("retention", "silent_s", "left"),
    [(MINUTE, 0, []), (KEEPING, 0, [3, 4, 5, 6]), (KEEPING, 2 * HOUR_S, [])],
    ids=["passed", "held-back", "silent-for-too-long"],
)
def test_a_registered_subscriber_holds_events_back_only_by_choice(
    log: EventLog, retention: Retention, silent_s: float, left: list[int]
) -> None:
    """The slowest one counts; without the choice, or once it was silent for longer, it is passed (the control)."""
    fill(log, *range(6))
    register(log, "press", 2)
    register(log, "archive", 5)
    log._connection.execute("UPDATE subscribers SET seen_ns = ?", (NOW_NS - round(silent_s * 1e9),))

    retain(log, retention)

    assert [event.log_sequence for event, _ in log.read_since(0, 10)] == left
    log.verify()


def test_bytes_too_are_held_back(log: EventLog) -> None:
    """Every limit gives way to the choice."""
    fill(log, *range(1000))
    register(log, "press", 10)
    log._connection.execute("UPDATE subscribers SET seen_ns = ?", (NOW_NS,))

    while retain(log, Retention(max_bytes=200_000, keep_for_s=HOUR_S)):
        pass

    assert log.page(10, 1, 10**6).gap_last == 0 and log.page(9, 1, 10**6).gap_last == 10


def test_who_was_passed_is_told_with_the_number_of_events(tmp_path: Path) -> None:
    """Each event once, however many rounds retention takes; who has read them is not named."""
    passed: Counter[str] = Counter()
    with EventLog(tmp_path / "own.db", SystemClock()) as log:
        fill(log, *range(600))
        register(log, "press", 100)
        register(log, "archive", 600)
        log.on_passed = lambda name, events: passed.update({name: events})
        log._retention = MINUTE
        log._retention_due_ns = 0
        while log.removed_through < 600:
            fill(log, 0)  # the writer looks again after each group
            assert log.failed is None

    assert passed == {"press": 500}


def test_a_log_of_schema_1_is_brought_up_to_date(tmp_path: Path) -> None:
    """Its events and marks stay; nothing has to be exported."""
    path = tmp_path / "old.db"
    with EventLog(path, SystemClock()) as log:
        fill(log, 0, 1)
        epoch = log.epoch
    with sqlite3.connect(path) as old:
        for table in ("ahead", "subscribers", "failures"):
            old.execute(f"DROP TABLE {table}")
        old.execute("DELETE FROM meta WHERE key LIKE 'removed%'")
        old.execute("ALTER TABLE marks DROP COLUMN checksum")
        old.execute("PRAGMA user_version = 1")

    with EventLog(path, SystemClock()) as log:
        assert (log.epoch, log.head, log.verify()) == (epoch, 2, 2)
