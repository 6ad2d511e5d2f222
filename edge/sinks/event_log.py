"""EventLog: the truth about every verdict, in one SQLite file.

Owns numbering, durability and the answer to "was this frame judged already?". One writer thread owns every write and
checkpoint; the order is insert, commit, then `on_commit`, where the caller publishes and acknowledges. Leaves retention
and replay to a later schema, and the
file's layout to `log_file`.
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
from edge.errors import LogError, SinkFull, WireError
from edge.events import DefectEvent
from edge.protocols import Clock
from edge.sinks.log_file import BUSY_TIMEOUT_S, checksum_of, lock_log, open_log

OnCommit = Callable[[DefectEvent], None]
FrameKey = tuple[str, int, int]

_INSERT: Final = """INSERT INTO events (log_sequence, camera, camera_epoch, frame_sequence, event, mask, checksum)
    VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (camera, camera_epoch, frame_sequence) DO NOTHING"""
_MARK: Final = "SELECT acked_through FROM marks WHERE camera = ? AND camera_epoch = ?"
_BY_KEY: Final = "FROM events WHERE camera = ? AND camera_epoch = ? AND frame_sequence = ?"


@dataclass(frozen=True, slots=True)
class _Entry:
    event: DefectEvent
    mask_png: bytes | None
    on_commit: OnCommit | None


class EventLog:
    """A Sink that makes events durable; `append` returns at once, `on_commit` follows in the writer thread.

    `group_events` bounds how many events share one commit, `capacity` how many may wait. A commit takes whatever waits
    and never waits for more: while one commit syncs, the next group gathers by itself. `on_failure` is called once, in
    the writer thread, when the log can no longer keep its promise; nothing is reported as committed from then on.

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
    ) -> None:
        self.duplicates = 0
        self._path = Path(path)
        self._group_events = group_events
        self._on_failure = on_failure
        self._lock_file = lock_log(self._path)
        try:
            self._connection, self._epoch, self._head = open_log(self._path, clock)
        except BaseException:
            os.close(self._lock_file)
            raise
        self._marks: dict[tuple[str, int], int] = {}
        self._queue: queue.Queue[_Entry | None] = queue.Queue(capacity)
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
        with self._progress:
            if self._failed is not None:
                raise LogError(f"event log {self._path}: {self._failed}")
            if self._closing:
                raise LogError(f"event log {self._path} is closed")
            try:
                self._queue.put_nowait(_Entry(event, mask_png, on_commit))
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
        """Whether the frame (camera, epoch, sequence) has a durable verdict; from any thread."""
        return bool(self._ask(f"SELECT 1 {_BY_KEY}", key))

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

    def verify(self) -> int:
        """Check that the sequence has no gap and that every row is as it was written; return the number of rows.

        Raises:
            LogError: names the first row that is missing or changed.
        """
        rows = self._reader().execute("SELECT log_sequence, event, mask, checksum FROM events ORDER BY log_sequence")
        count = 0
        try:
            for sequence, event, mask, checksum in rows:
                count += 1
                self._verify_row(count, sequence, event, mask, checksum)
        except sqlite3.DatabaseError as error:
            raise LogError(f"event log {self._path}: damaged after row {count}: {error}") from None
        return count

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
                entries = [entry for entry in group if entry is not None]
                if entries:
                    self._write(entries)
                if len(entries) < len(group):
                    return
        # A thread's top: whatever happened, nobody may believe that later events are durable.
        except BaseException as error:
            self._fail(f"{type(error).__name__}: {error}")

    def _gather(self) -> list[_Entry | None]:
        """Wait for one entry and take what else is there; None ends the group and the thread."""
        group = [self._first()]
        while group[-1] is not None and len(group) < self._group_events:
            try:
                group.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return group

    def _first(self) -> _Entry | None:
        while True:
            try:
                return self._queue.get(timeout=1.0)
            except queue.Empty:
                if self._closing:  # and the end's mark found no room
                    return None

    def _write(self, entries: list[_Entry]) -> None:
        events = self._commit(entries)
        for entry, event in zip(entries, events, strict=True):
            if entry.on_commit is not None:
                entry.on_commit(event)
        with self._progress:
            self._done += len(entries)
            self._progress.notify_all()

    def _commit(self, entries: list[_Entry]) -> list[DefectEvent]:
        """Insert all entries in one transaction and sync it; return the events as they stand in the log."""
        head = self._head
        events = []
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for entry in entries:
                event = self._insert(entry, head + 1)
                head = max(head, event.log_sequence)
                events.append(event)
            self._connection.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back by itself after some errors (disk full), and then there is nothing to roll back.
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise
        self._head = head
        return events

    def _insert(self, entry: _Entry, log_sequence: int) -> DefectEvent:
        event = msgspec.structs.replace(entry.event, log_epoch=self._epoch, log_sequence=log_sequence)
        key = (event.camera, event.camera_epoch, event.frame_sequence)
        data = wire.encode_event(event)
        row = (log_sequence, *key, data, entry.mask_png, checksum_of(log_sequence, data, entry.mask_png))
        if self._connection.execute(_INSERT, row).rowcount == 0:
            self.duplicates += 1
            (existing,) = self._connection.execute(f"SELECT event {_BY_KEY}", key).fetchone()
            return wire.decode_event(existing)
        self._advance(key)
        return event

    def _advance(self, key: FrameKey) -> None:
        """Move the camera's mark over this frame, and over those that were logged ahead of it."""
        camera, epoch, sequence = key
        mark = self._mark(camera, epoch)
        if sequence != mark + 1:
            return
        while True:
            mark += 1
            if self._connection.execute(f"SELECT 1 {_BY_KEY}", (camera, epoch, mark + 1)).fetchone() is None:
                break
        self._marks[camera, epoch] = mark
        self._connection.execute("INSERT OR REPLACE INTO marks VALUES (?, ?, ?)", (camera, epoch, mark))

    def _mark(self, camera: str, epoch: int) -> int:
        if (camera, epoch) not in self._marks:
            if len(self._marks) >= 256:  # a camera that restarts for months must not grow this
                self._marks.clear()
            found = self._connection.execute(_MARK, (camera, epoch)).fetchone()
            self._marks[camera, epoch] = -1 if found is None else int(found[0])
        return self._marks[camera, epoch]

    def _fail(self, why: str) -> None:
        with self._progress:
            self._failed = (
                f"{why}; nothing after log sequence {self._head} is acknowledged; free or repair the disk and restart"
            )
            self._progress.notify_all()
        if self._on_failure is not None:
            self._on_failure(self._failed)

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

    def _verify_row(self, expected: int, sequence: int, event: bytes, mask: bytes | None, checksum: bytes) -> None:
        where = f"event log {self._path}, log sequence {sequence}"
        if sequence != expected:
            raise LogError(f"event log {self._path}: log sequence {expected} is missing, {sequence} follows")
        # SQLite keeps a changed row's own types: text where bytes were written.
        if (
            not isinstance(event, bytes)
            or not isinstance(mask, bytes | None)
            or checksum_of(sequence, event, mask) != checksum
        ):
            raise LogError(f"{where}: the row was changed after it was written")
        try:
            decoded = wire.decode_event(event)
        except WireError as error:
            raise LogError(f"{where}: {error}") from None
        if (decoded.log_epoch, decoded.log_sequence) != (self._epoch, sequence):
            raise LogError(f"{where}: the event belongs to epoch {decoded.log_epoch}, sequence {decoded.log_sequence}")
