"""EventLog: the truth about every verdict, in one SQLite file.

Owns numbering, durability and the answer to "was this frame judged already?". One writer thread owns every write and
checkpoint; the order is insert, commit, then `on_commit`, where the caller publishes and acknowledges. Leaves the
file's layout to `log_file`, what is removed to `retention`, whether the file is sound to `log_check`, and answering
subscribers to `replay`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import msgspec

from edge import wire
from edge.errors import LogError, SinkFull
from edge.events import DefectEvent
from edge.protocols import Clock
from edge.sinks.log_check import check_log
from edge.sinks.log_file import (
    BUSY_TIMEOUT_S,
    checksum_of,
    checksum_of_row,
    lock_log,
    make_reserve,
    open_log,
    removed_through,
    reserve_of,
)
from edge.sinks.retention import Retention, apply_retention, passed_by, used_bytes

OnCommit = Callable[[DefectEvent], None]
FrameKey = tuple[str, int, int]

_INSERT: Final = """INSERT INTO events (log_sequence, camera, camera_epoch, frame_sequence, event, mask, checksum)
    VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (camera, camera_epoch, frame_sequence) DO NOTHING"""
_MARK: Final = "SELECT acked_through FROM marks WHERE camera = ? AND camera_epoch = ?"
_BY_KEY: Final = "FROM events WHERE camera = ? AND camera_epoch = ? AND frame_sequence = ?"
_AHEAD: Final = "FROM ahead WHERE camera = ? AND camera_epoch = ? AND frame_sequence = ?"
RESERVE_BYTES: Final = 1024 * 1024
_RETENTION_EVERY_S: Final = 1.0
_PROBE_EVERY_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Entry:
    event: DefectEvent
    mask_png: bytes | None
    on_commit: OnCommit | None


@dataclass(frozen=True, slots=True)
class _CursorMove:
    """A registered subscriber has everything through `cursor`; None only registers it, at `start`."""

    name: str
    cursor: int | None
    start: int
    on_commit: Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Forget:
    """Nobody is registered as `name` any more."""

    name: str
    on_commit: Callable[[int], None]


_Item = _Entry | _CursorMove | _Forget


@dataclass(frozen=True, slots=True)
class Page:
    """A stretch of the log: `events` with their masks, after a gap through `gap_last` (0: none) where retention cut."""

    epoch: int
    head: int
    gap_last: int
    events: list[tuple[DefectEvent, bytes | None]]


class EventLog:
    """A Sink that makes events durable; `append` returns at once, `on_commit` follows in the writer thread.

    `group_events` bounds how many events share one commit, `capacity` how many may wait. A commit takes whatever waits
    and never waits for more: while one commit syncs, the next group gathers by itself. `on_failure` is called once, in
    the writer thread, when the log can no longer keep its promise; nothing is reported as committed from then on.
    `on_group` is told the events and nanoseconds of each commit. `retention` bounds what is kept (default: everything),
    `reserve_bytes` are held beside the log for its last word on a full disk.

    Raises:
        ConfigError: the path cannot be used, holds something else, or another process has the log open.
        LogError: the file is damaged.
    """

    def __init__(
        self,
        path: Path,
        clock: Clock,
        *,
        group_events: int = 128,
        capacity: int = 1024,
        on_failure: Callable[[str], None] | None = None,
        on_group: Callable[[int, int], None] | None = None,
        retention: Retention | None = None,
        reserve_bytes: int = RESERVE_BYTES,
    ) -> None:
        self.duplicates = 0
        self.removed = 0
        """Events that retention removed since the log was opened."""
        self.on_passed: Callable[[str, int], None] = lambda name, events: None
        """Told, in the writer thread, which registered subscriber will never get how many events that were removed."""
        self._clock = clock
        self._on_group = on_group
        self._retention = retention or Retention()
        self._retention_due_ns = 0
        self._probe_due_ns = clock.monotonic_ns()
        self._path = Path(path)
        self._group_events = group_events
        self._on_failure = on_failure
        self._lock_file = lock_log(self._path)
        try:
            self._connection, self._epoch, self._head = open_log(self._path, clock)
            make_reserve(self._path, reserve_bytes)
            self._bytes = used_bytes(self._connection)
            self._removed_through = removed_through(self._connection)
        except BaseException:
            os.close(self._lock_file)
            raise
        self._marks: dict[tuple[str, int], int] = {}
        self._queue: queue.Queue[_Item | None] = queue.Queue(capacity)
        # Guards the counters below; notified whenever a group is done or the log failed.
        self._progress = threading.Condition()
        self._appended = 0
        self._done = 0
        self._closing = False
        self._closed = False
        self._failed: str | None = None
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._writer = threading.Thread(target=self._run, name="event-log", daemon=True)
        self._writer.start()

    @property
    def epoch(self) -> int:
        """Random number of this log, below 2**53; sequences of two epochs cannot be compared."""
        return self._epoch

    @property
    def head(self) -> int:
        """The last committed log sequence; 0 while the log is empty."""
        return self._head

    @property
    def size_bytes(self) -> int:
        """Bytes in use, as of the last look of the writer."""
        return self._bytes

    @property
    def removed_through(self) -> int:
        """The tombstone: the last log sequence that retention removed, 0 if none."""
        return self._removed_through

    @property
    def failed(self) -> str | None:
        """Why the log stopped keeping its promise; None while it does."""
        return self._failed

    @property
    def waiting(self) -> int:
        """Events appended whose commit is not yet reported."""
        return self._appended - self._done

    def append(self, event: DefectEvent, mask_png: bytes | None = None, on_commit: OnCommit | None = None) -> None:
        """Hand one event to the writer thread and return at once.

        `on_commit` gets the event with its log numbers once it is durable; for a frame that was logged already it gets
        the existing event, so that the camera is acknowledged again. It must be quick and must not raise.

        Raises:
            SinkFull: `capacity` events wait.
            LogError: the log failed or is closed.
        """
        self._put(_Entry(event, mask_png, on_commit))

    def move_cursor(self, name: str, cursor: int | None, start: int, on_commit: Callable[[int], None]) -> None:
        """Note durably that the registered subscriber `name` has everything through `cursor`; it never moves back.

        None only asks. A name that is new is registered, at `start` if `cursor` is None. `on_commit` gets the cursor as
        it then stands, in the writer thread.

        Raises:
            SinkFull, LogError: as `append`.
        """
        self._put(_CursorMove(name, cursor, start, on_commit))

    def forget(self, name: str, on_commit: Callable[[int], None]) -> None:
        """Take the registered subscriber `name` off the list, durably; it holds nothing back any more.

        `on_commit` gets the cursor that it had, -1 if there was none of that name, in the writer thread.

        Raises:
            SinkFull, LogError: as `append`.
        """
        self._put(_Forget(name, on_commit))

    def cursors(self) -> dict[str, int]:
        """Every registered subscriber's cursor; from any thread."""
        return dict(self._ask("SELECT name, cursor FROM subscribers", ()))

    def _put(self, item: _Item) -> None:
        with self._progress:
            if self._failed is not None:
                raise LogError(f"event log {self._path}: {self._failed}")
            if self._closing:
                raise LogError(f"event log {self._path} is closed")
            try:
                self._queue.put_nowait(item)
            except queue.Full:
                raise SinkFull(f"event log {self._path}: {self._queue.maxsize} events wait for the disk") from None
            self._appended += 1

    def emit(self, event: DefectEvent) -> None:
        """`append` without mask and without a report."""
        self.append(event)

    def flush(self, timeout_s: float) -> None:
        """Wait until everything appended so far is committed and reported.

        Raises:
            LogError: the log failed, or `timeout_s` passed.
        """
        with self._progress:
            target = self._appended
            done = self._progress.wait_for(lambda: self._done >= target or self._failed is not None, timeout_s)
            if self._failed is not None:
                raise LogError(f"event log {self._path}: {self._failed}")
            if not done:
                raise LogError(f"event log {self._path}: {target - self._done} events not on disk after {timeout_s} s")

    def contains(self, key: FrameKey) -> bool:
        """Whether the frame (camera, epoch, sequence) has a durable verdict, also a removed one; from any thread."""
        if self._ask(f"SELECT 1 {_BY_KEY} UNION ALL SELECT 1 {_AHEAD}", (*key, *key)):
            return True
        return key[2] <= self.acked_through(key[0], key[1])

    def acked_through(self, camera: str, camera_epoch: int) -> int:
        """The sequence up to which every frame of that camera epoch is logged, -1 if none; from any thread."""
        found = self._ask(_MARK, (camera, camera_epoch))
        return int(found[0][0]) if found else -1

    def read_since(self, log_sequence: int, limit: int) -> list[tuple[DefectEvent, bytes | None]]:
        """At most `limit` events after `log_sequence`, in order, with their mask PNGs; from any thread.

        Raises:
            LogError: the log is closed or cannot be read.
        """
        query = "SELECT event, mask FROM events WHERE log_sequence > ? ORDER BY log_sequence LIMIT ?"
        return [(wire.decode_event(event), mask) for event, mask in self._ask(query, (log_sequence, limit))]

    def page(self, log_sequence: int, limit: int, max_bytes: int) -> Page:
        """What follows `log_sequence`: at most `limit` events and about `max_bytes`, but one at least; from any thread.

        Raises:
            LogError: the log is closed or cannot be read.
        """
        reader = self._reader()
        try:
            reader.execute("BEGIN")  # one view of tombstone and rows, whatever retention does meanwhile
            try:
                removed = removed_through(reader)
                head = self._head
                found = reader.execute(
                    "SELECT event, mask FROM events WHERE log_sequence > ? ORDER BY log_sequence LIMIT ?",
                    (log_sequence, limit),
                )
                events, size = [], 0
                for event, mask in found:
                    events.append((wire.decode_event(event), mask))
                    size += len(event) + len(mask or b"")
                    if size >= max_bytes:
                        break
                found.close()
            finally:
                reader.execute("COMMIT")
        except sqlite3.Error as error:
            raise LogError(f"event log {self._path}: cannot be read: {error}") from None
        return Page(self._epoch, head, removed if removed > log_sequence else 0, events)

    def verify(self) -> int:
        """Check that the sequence has no gap and that every row is as it was written; return the number of rows.

        Raises:
            LogError: names the first row that is missing or changed.
        """
        return check_log(self._reader(), self._path)

    def close(self, timeout_s: float = 10.0) -> None:
        """Commit and report what waits, then close the file.

        Raises:
            LogError: the writer did not finish within `timeout_s`; what it had not reported stays unacknowledged.
        """
        with self._progress:
            already, self._closing = self._closing, True
        if already:
            return
        deadline = time.monotonic() + timeout_s
        # The queue may be full; the writer makes room or is stuck, and then `join` says so.
        if self._failed is None:
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=timeout_s)
        self._writer.join(max(0.0, deadline - time.monotonic()))
        if self._writer.is_alive():
            raise LogError(f"event log {self._path}: {self.waiting} events not on disk after {timeout_s} s")
        self._closed = True
        for reader in self._readers:
            reader.close()
        self._connection.close()
        os.close(self._lock_file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the writer thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while group := self._gather():
                items = [item for item in group if item is not None]
                if items:
                    self._write(items)
                self._retain()
                if len(items) < len(group):
                    return
        # A thread's top: whatever happened, nobody may believe that later events are durable.
        except BaseException as error:
            self._fail(error)

    def _gather(self) -> list[_Item | None]:
        """Wait for one entry and take what else is there; None ends the group and the thread."""
        group = [self._first()]
        while group[-1] is not None and len(group) < self._group_events:
            try:
                group.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return group

    def _first(self) -> _Item | None:
        while True:
            try:
                return self._queue.get(timeout=1.0)
            except queue.Empty:
                if self._closing:  # and the end's mark found no room
                    return None
                self._retain()
                self._probe()

    def _probe(self) -> None:
        """An idle line learns that its disk became read-only before the next part does.

        By a change of times, not by statvfs: since Linux 6.15 that goes on to call an ext4 writable which gave up.
        """
        now_ns = self._clock.monotonic_ns()
        if now_ns >= self._probe_due_ns:
            self._probe_due_ns = now_ns + round(_PROBE_EVERY_S * 1e9)
            os.utime(self._lock_file)

    def _write(self, items: list[_Item]) -> None:
        started_ns = time.monotonic_ns()
        answers = self._commit(items)
        if self._on_group is not None:
            self._on_group(len(items), time.monotonic_ns() - started_ns)
        self._report(items, answers)
        with self._progress:
            self._done += len(items)
            self._progress.notify_all()

    def _report(self, items: list[_Item], answers: list[DefectEvent | int]) -> None:
        for item, answer in zip(items, answers, strict=True):
            if item.on_commit is not None:
                item.on_commit(answer)  # type: ignore[arg-type]  # an event for an entry, a cursor for a move

    def _commit(self, items: list[_Item]) -> list[DefectEvent | int]:
        """Insert all items in one transaction and sync it; return events and cursors as they stand in the log."""
        head = self._head
        answers: list[DefectEvent | int] = []
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for item in items:
                if isinstance(item, _CursorMove):
                    answers.append(self._move(item, head))
                    continue
                if isinstance(item, _Forget):
                    answers.append(self._strike(item.name))
                    continue
                event = self._insert(item, head + 1)
                head = max(head, event.log_sequence)
                answers.append(event)
            self._connection.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back by itself after some errors (disk full), and then there is nothing to roll back.
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise
        self._head = head
        return answers

    def _insert(self, entry: _Entry, log_sequence: int) -> DefectEvent:
        event = msgspec.structs.replace(entry.event, log_epoch=self._epoch, log_sequence=log_sequence)
        key = (event.camera, event.camera_epoch, event.frame_sequence)
        if self._was_removed(key):
            self.duplicates += 1
            # Judged, and its event is gone: no number, and a time that is nobody's, so that it is not published.
            return msgspec.structs.replace(event, log_sequence=0, decided_ns=0)
        data = wire.encode_event(event)
        row = (log_sequence, *key, data, entry.mask_png, checksum_of(log_sequence, data, entry.mask_png))
        if self._connection.execute(_INSERT, row).rowcount == 0:
            self.duplicates += 1
            (existing,) = self._connection.execute(f"SELECT event {_BY_KEY}", key).fetchone()
            return wire.decode_event(existing)
        self._advance(key)
        return event

    def _was_removed(self, key: FrameKey) -> bool:
        if self._removed_through == 0:
            return False
        judged = key[2] <= self._mark(key[0], key[1]) or self._has(_AHEAD, key)
        return judged and not self._has(_BY_KEY, key)

    def _has(self, where: str, key: FrameKey) -> bool:
        return self._connection.execute(f"SELECT 1 {where}", key).fetchone() is not None

    def _move(self, move: _CursorMove, head: int) -> int:
        found = self._connection.execute("SELECT cursor FROM subscribers WHERE name = ?", (move.name,)).fetchone()
        before = None if found is None else int(found[0])
        asked = move.start if move.cursor is None and before is None else move.cursor
        cursor = max(before or 0, min(asked or 0, head))
        self._connection.execute(
            "INSERT OR REPLACE INTO subscribers VALUES (?, ?, ?, ?)",
            (move.name, cursor, self._clock.wall_ns(), checksum_of_row(move.name, cursor)),
        )
        return cursor

    def _strike(self, name: str) -> int:
        found = self._connection.execute("DELETE FROM subscribers WHERE name = ? RETURNING cursor", (name,)).fetchone()
        return -1 if found is None else int(found[0])

    def _retain(self) -> None:
        now_ns = self._clock.monotonic_ns()
        if now_ns < self._retention_due_ns:
            return
        removed = apply_retention(self._connection, self._retention, self._clock.wall_ns())
        # A full chunk went: there is more, and new events come between the chunks.
        self._retention_due_ns = now_ns if removed else now_ns + round(_RETENTION_EVERY_S * 1e9)
        self._bytes = used_bytes(self._connection)
        if removed:
            self.removed += removed
            before, self._removed_through = self._removed_through, removed_through(self._connection)
            for name, events in passed_by(self._connection, before, self._removed_through).items():
                self.on_passed(name, events)

    def _advance(self, key: FrameKey) -> None:
        """Move the camera's mark over this frame, and over those that were logged ahead of it."""
        camera, epoch, sequence = key
        mark = self._mark(camera, epoch)
        if sequence != mark + 1:
            return
        while True:
            mark += 1
            following = (camera, epoch, mark + 1)
            if not self._has(_BY_KEY, following) and not self._has(_AHEAD, following):
                break
        self._marks[camera, epoch] = mark
        if self._removed_through:
            self._connection.execute(
                "DELETE FROM ahead WHERE camera = ? AND camera_epoch = ? AND frame_sequence <= ?", (camera, epoch, mark)
            )
        checksum = checksum_of_row(camera, epoch, mark)
        self._connection.execute("INSERT OR REPLACE INTO marks VALUES (?, ?, ?, ?)", (camera, epoch, mark, checksum))

    def _mark(self, camera: str, epoch: int) -> int:
        if (camera, epoch) not in self._marks:
            if len(self._marks) >= 256:  # a camera that restarts for months must not grow this
                self._marks.clear()
            found = self._connection.execute(_MARK, (camera, epoch)).fetchone()
            self._marks[camera, epoch] = -1 if found is None else int(found[0])
        return self._marks[camera, epoch]

    def _fail(self, error: BaseException) -> None:
        why = f"{type(error).__name__}: {error}"
        # After a failed sync the kernel may have dropped what it did not write: only a full disk is written to again.
        if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
            self._say_full(why)
        with self._progress:
            self._failed = (
                f"{why}; nothing after log sequence {self._head} is acknowledged; free or repair the disk and restart"
            )
            self._progress.notify_all()
        if self._on_failure is not None:
            self._on_failure(self._failed)

    def _say_full(self, why: str) -> None:
        """Give the reserve back to the disk and write with it what happened."""
        with contextlib.suppress(OSError):
            reserve_of(self._path).unlink(missing_ok=True)
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("INSERT INTO failures VALUES (?, ?, ?)", (self._clock.wall_ns(), self._head, why))

    # --- other threads ------------------------------------------------------------------------------------------------

    def _reader(self) -> sqlite3.Connection:
        """This thread's own read-only connection."""
        if self._closed:
            raise LogError(f"event log {self._path} is closed")
        found: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if found is None:
            uri = f"file:{quote(str(self._path))}?mode=ro"
            # check_same_thread is off only so that close() may close it.
            found = sqlite3.connect(
                uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._local.connection = found
            self._readers.append(found)
        return found

    def _ask(self, query: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        try:
            return self._reader().execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise LogError(f"event log {self._path}: cannot be read: {error}") from None
