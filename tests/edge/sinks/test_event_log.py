"""EventLog on real SQLite files: numbering, durability before report, and what it refuses."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.clock import SystemClock
from edge.errors import ConfigError, LogError, SinkFull
from edge.events import DefectEvent
from edge.sinks.event_log import EventLog
from sample_events import sample_event

ROOT = Path(__file__).parents[3]
OpenLog = Callable[..., EventLog]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log" / "events.db"


@pytest.fixture
def open_log(path: Path) -> Iterator[OpenLog]:
    logs: list[EventLog] = []

    def build(**options: Any) -> EventLog:
        logs.append(EventLog(path, SystemClock(), **options))
        return logs[-1]

    yield build
    for log in logs:
        log.close()


class Gate:
    """An `on_commit` that holds the writer thread until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, committed: DefectEvent) -> None:
        self.reached.set()
        assert self.open.wait(10)


def test_events_are_numbered_without_gaps_in_the_order_given(open_log: OpenLog) -> None:
    """From 1, within one random epoch, and reported in the same order."""
    log = open_log()
    reported: list[DefectEvent] = []
    for sequence in range(300):
        log.append(sample_event(sequence), b"png" if sequence % 2 else None, reported.append)
    log.flush(10)

    assert [e.log_sequence for e in reported] == list(range(1, 301)) == [e.frame_sequence + 1 for e in reported]
    assert {e.log_epoch for e in reported} == {log.epoch} and 0 < log.epoch < 2**53
    assert log.read_since(0, 1000) == [(e, b"png" if e.frame_sequence % 2 else None) for e in reported]
    assert (log.head, log.verify(), log.waiting) == (300, 300, 0)


def test_read_since_pages_through_the_log(open_log: OpenLog) -> None:
    """What a subscriber that fell behind will ask for."""
    log = open_log()
    for sequence in range(5):
        log.emit(sample_event(sequence))
    log.flush(10)

    assert [e.log_sequence for e, _ in log.read_since(2, 2)] == [3, 4]
    assert log.read_since(5, 10) == []


def test_an_event_is_in_the_file_before_it_is_reported(open_log: OpenLog, path: Path) -> None:
    """`on_commit` publishes and acknowledges: another connection must find the row at that moment."""
    seen: list[int] = []

    def look(committed: DefectEvent) -> None:
        with sqlite3.connect(path) as other:
            seen.append(other.execute("SELECT COUNT(*) FROM events").fetchone()[0])

    log = open_log()
    log.append(sample_event(0), None, look)
    log.flush(10)

    assert seen == [1]


def test_the_commit_is_synced_and_the_log_is_a_wal(open_log: OpenLog) -> None:
    """synchronous=FULL (2): a power cut must not take what was acknowledged."""
    connection = open_log()._connection

    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_duplicate_is_not_logged_again_and_reports_the_first_verdict(open_log: OpenLog) -> None:
    """Also within one group; the sequence stays without a gap."""
    log = open_log()
    reported: list[DefectEvent] = []
    for number, detail in ((0, "first"), (0, "again"), (1, "other")):
        log.append(sample_event(number, detail=detail), None, reported.append)
    log.flush(10)
    log.append(sample_event(0, detail="later"), None, reported.append)
    log.flush(10)

    assert [(e.log_sequence, e.detail) for e in reported] == [(1, "first"), (1, "first"), (2, "other"), (1, "first")]
    assert (log.duplicates, log.verify()) == (2, 2)


def test_what_waits_while_the_disk_is_busy_shares_one_commit(open_log: OpenLog) -> None:
    """The first event holds the writer; the next hundred are committed in groups of at most `group_events`."""
    log, gate = open_log(group_events=64), Gate()
    sizes: list[int] = []
    commit = log._commit

    def counted(entries: list[Any]) -> list[DefectEvent]:
        sizes.append(len(entries))
        return commit(entries)

    log._commit = counted
    log.append(sample_event(0), None, gate)
    assert gate.reached.wait(10)
    for sequence in range(1, 101):
        log.append(sample_event(sequence))
    gate.open.set()
    log.flush(10)

    assert sizes == [1, 64, 36]


def test_a_full_queue_refuses_and_drops_nothing(open_log: OpenLog) -> None:
    """The bound is stated; what was taken before is committed."""
    log, gate = open_log(capacity=3), Gate()
    log.append(sample_event(0), None, gate)
    assert gate.reached.wait(10)
    for sequence in range(1, 4):
        log.append(sample_event(sequence))

    with pytest.raises(SinkFull, match="3 events wait"):
        log.append(sample_event(4))
    gate.open.set()
    log.flush(10)
    assert log.verify() == 4


def test_contains_answers_from_any_thread(open_log: OpenLog) -> None:
    """The source asks in its own thread while the writer writes."""
    log = open_log()
    log.append(sample_event(3))
    log.flush(10)
    answers: list[bool] = []
    asking = threading.Thread(
        target=lambda: answers.extend(log.contains(key) for key in [("cam1", 7, 3), ("cam1", 7, 4), ("cam2", 7, 3)])
    )
    asking.start()
    asking.join(10)

    assert answers == [True, False, False]


def test_the_mark_of_a_camera_follows_out_of_order_frames(open_log: OpenLog) -> None:
    """Acknowledged through 1 while 2 is missing; through 4 once it came. Other epochs and cameras do not matter."""
    log = open_log()
    marks = []
    for sequence in (1, 0, 3, 4, 2):
        log.append(sample_event(sequence))
        log.append(sample_event(0, camera_epoch=sequence + 100))
        log.flush(10)
        marks.append(log.acked_through("cam1", 7))

    assert marks == [-1, 1, 1, 1, 4]
    assert (log.acked_through("cam2", 7), log.acked_through("cam1", 101)) == (-1, 0)


def test_reopening_continues_epoch_sequence_and_marks(open_log: OpenLog) -> None:
    """A restart of the daemon is not a new log."""
    first = open_log()
    for sequence in (0, 1, 3):
        first.append(sample_event(sequence))
    first.close()
    second = open_log()
    second.append(sample_event(2))
    second.flush(10)

    assert (second.epoch, second.head) == (first.epoch, 4)
    assert (second.acked_through("cam1", 7), second.verify()) == (3, 4)


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {helpers!r})
from edge.clock import SystemClock
from edge.sinks.event_log import EventLog
from sample_events import sample_event

def report(committed):
    os.write(1, b"%d\\n" % committed.frame_sequence)
    if committed.frame_sequence == {die_at}:
        os.kill(os.getpid(), signal.SIGKILL)

class ReportsFirst(EventLog):
    def _commit(self, entries):
        for entry in entries:
            entry.on_commit(entry.event)
        return super()._commit(entries)

log = {kind}(Path(sys.argv[1]), SystemClock(), capacity=100_000)
for sequence in range(50_000):
    log.append(sample_event(sequence), b"m" * 200, report)
log.flush(60)
"""


def reported_by_a_killed_child(path: Path, kind: str, die_at: int, kill_after: int | None = None) -> list[int]:
    """Run a daemon-like child until SIGKILL; the frames it reported as durable."""
    script = CHILD.format(helpers=str(ROOT / "tests" / "helpers"), kind=kind, die_at=die_at)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as child:
        assert child.stdout is not None
        if kill_after is not None:
            for _ in range(kill_after):
                child.stdout.readline()
            child.kill()
        reported = [int(line) for line in child.stdout.read().split()]
        child.wait(60)
    assert child.returncode == -signal.SIGKILL
    return [*range(kill_after or 0), *reported]


def survivors(open_log: OpenLog) -> set[int]:
    log = open_log()
    count = log.verify()
    return {e.frame_sequence for e, _ in log.read_since(0, count)}


@pytest.mark.parametrize("die_at", [0, 1, 700])
def test_every_reported_event_survives_a_kill_at_the_report(open_log: OpenLog, path: Path, die_at: int) -> None:
    """SIGKILL inside `on_commit`: whatever was reported, a camera may have forgotten."""
    reported = reported_by_a_killed_child(path, "EventLog", die_at)

    assert reported == list(range(die_at + 1))
    assert set(reported) <= survivors(open_log)


def test_every_reported_event_survives_a_kill_at_any_moment(open_log: OpenLog, path: Path) -> None:
    """SIGKILL from outside while thousands are being written; the reopened log goes on in the same numbering."""
    reported = reported_by_a_killed_child(path, "EventLog", -1, kill_after=900)

    assert len(reported) >= 900 and set(reported) <= survivors(open_log)


def test_reporting_before_the_commit_would_be_noticed(open_log: OpenLog, path: Path) -> None:
    """Control: a log that reports first loses what it reported."""
    reported = reported_by_a_killed_child(path, "ReportsFirst", 700)

    assert not set(reported) <= survivors(open_log)


def test_a_full_disk_stops_every_promise(open_log: OpenLog) -> None:
    """No report for what did not reach the disk, an error for everything later, and the owner is told once."""
    told: list[str] = []
    reported: list[int] = []
    log = open_log(on_failure=told.append)
    log.append(sample_event(0), None, lambda e: reported.append(e.frame_sequence))
    log.flush(10)
    pages = log._connection.execute("PRAGMA page_count").fetchone()[0]
    log._connection.execute(f"PRAGMA max_page_count = {pages}")
    log.append(sample_event(1), bytes(100_000), lambda e: reported.append(e.frame_sequence))

    with pytest.raises(LogError, match="full"):
        log.flush(10)
    with pytest.raises(LogError, match="free or repair the disk"):
        log.append(sample_event(2))
    assert reported == [0] and log.failed == told[0] and len(told) == 1
    assert (log.head, log.verify()) == (1, 1)


def test_a_report_that_fails_stops_the_log(open_log: OpenLog) -> None:
    """Nobody knows whether that event was published and acknowledged; going on would hide it."""

    def broken(committed: DefectEvent) -> None:
        raise RuntimeError("publisher is gone")

    log = open_log()
    log.append(sample_event(0), None, broken)

    with pytest.raises(LogError, match="publisher is gone"):
        log.flush(10)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE events SET event = replace(event, 'accept', 'reject') WHERE log_sequence = 2",
        "UPDATE events SET mask = x'00' WHERE log_sequence = 2",
        "DELETE FROM events WHERE log_sequence = 2",
        "UPDATE events SET log_sequence = 20 WHERE log_sequence = 2",
    ],
)
def test_a_changed_row_is_found(open_log: OpenLog, path: Path, change: str) -> None:
    """A verdict altered, a mask planted, a row removed or moved."""
    log = open_log()
    for sequence in range(3):
        log.append(sample_event(sequence))
    log.close()
    with sqlite3.connect(path) as foreign:
        assert foreign.execute(change).rowcount == 1

    with pytest.raises(LogError, match=r"log sequence (2|20)"):
        open_log().verify()


def test_the_log_is_readable_by_its_user_only(open_log: OpenLog, path: Path) -> None:
    """Pictures of defects are nobody else's business; SQLite's side files follow the same mode."""
    log = open_log()
    log.append(sample_event(0))
    log.flush(10)

    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert set(modes.values()) == {0o600} and "events.db-wal" in modes
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def foreign_sqlite(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE recipes (name TEXT)")
    other.close()


def newer_schema(path: Path) -> None:
    EventLog(path, SystemClock()).close()
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    other.close()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b"my notes\n" * 1000), "no SQLite file"),
        (foreign_sqlite, "another program"),
        (newer_schema, "schema 99"),
    ],
)
def test_a_foreign_file_is_refused_and_left_alone(path: Path, make: Callable[[Path], None], words: str) -> None:
    """A wrong path in the configuration must not cost somebody's data."""
    path.parent.mkdir()
    make(path)
    before = path.read_bytes()

    with pytest.raises(ConfigError, match=words):
        EventLog(path, SystemClock())

    assert path.read_bytes() == before


def test_a_log_has_one_daemon(open_log: OpenLog, path: Path) -> None:
    """Two would number the same sequence twice."""
    open_log()

    with pytest.raises(ConfigError, match="another process"):
        EventLog(path, SystemClock())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "log").write_text("")

    with pytest.raises(ConfigError, match="choose a folder"):
        EventLog(tmp_path / "log" / "events.db", SystemClock())


def test_close_commits_what_waits_and_is_final(open_log: OpenLog) -> None:
    """An orderly stop loses nothing; afterwards the log takes nothing."""
    log = open_log()
    for sequence in range(200):
        log.append(sample_event(sequence))
    log.close()
    log.close()

    with pytest.raises(LogError, match="closed"):
        log.append(sample_event(201))
    assert open_log().verify() == 200


def test_close_says_so_when_the_disk_does_not_answer(open_log: OpenLog) -> None:
    """Bounded: the owner learns how many events are not on disk."""
    log, gate = open_log(), Gate()
    log.append(sample_event(0), None, gate)
    assert gate.reached.wait(10)

    with pytest.raises(LogError, match=r"1 events not on disk after 0.05 s"):
        log.close(0.05)
    gate.open.set()
    log._writer.join(10)
