"""The event log's file: its schema, how it is opened or refused, and the checksum of a row.

Leaves reading and writing of rows to `event_log`.

    meta    log epoch (random, made with the file), creation time
    events  contiguous log_sequence from 1; unique (camera, camera_epoch, frame_sequence); JSON, mask, checksum
    marks   per (camera, camera_epoch): every frame up to `acked_through` is logged; kept in the same transaction
    ahead   frames above their camera's mark whose events retention removed: still judged, never to be judged again
    subscribers  who is registered, and through which log sequence each has everything
    failures     what the log could still say when it stopped keeping its promise

`meta` also holds the tombstone: every event through `removed_through` was removed by retention.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import sqlite3
from pathlib import Path
from typing import Final

from edge.errors import ConfigError, KizuError, LogError
from edge.protocols import Clock

APPLICATION_ID: Final = 0x4B495A55  # "KIZU"
SCHEMA_VERSION: Final = 2
BUSY_TIMEOUT_S: Final = 5.0
# JavaScript reads integers exactly up to 2**53; a wider epoch would be rounded in the console's hands.
_EPOCH_BITS: Final = 53

_SCHEMA: Final = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
    """CREATE TABLE events (
        log_sequence INTEGER PRIMARY KEY,
        camera TEXT NOT NULL, camera_epoch INTEGER NOT NULL, frame_sequence INTEGER NOT NULL,
        event BLOB NOT NULL, mask BLOB, checksum BLOB NOT NULL,
        UNIQUE (camera, camera_epoch, frame_sequence))""",
    """CREATE TABLE marks (
        camera TEXT NOT NULL, camera_epoch INTEGER NOT NULL, acked_through INTEGER NOT NULL,
        PRIMARY KEY (camera, camera_epoch)) WITHOUT ROWID""",
)
# What schema 1 lacked; a log of that age is brought up to date when it is opened.
_SINCE_2: Final = (
    "ALTER TABLE marks ADD COLUMN checksum BLOB",
    """CREATE TABLE ahead (
        camera TEXT NOT NULL, camera_epoch INTEGER NOT NULL, frame_sequence INTEGER NOT NULL,
        PRIMARY KEY (camera, camera_epoch, frame_sequence)) WITHOUT ROWID""",
    """CREATE TABLE subscribers (
        name TEXT PRIMARY KEY, cursor INTEGER NOT NULL, seen_ns INTEGER NOT NULL, checksum BLOB NOT NULL
        ) WITHOUT ROWID""",
    "CREATE TABLE failures (at_ns INTEGER NOT NULL, head INTEGER NOT NULL, why TEXT NOT NULL)",
    "INSERT INTO meta VALUES ('removed_through', 0), ('removed_ns', 0)",
)


def checksum_of_row(*values: str | int) -> bytes:
    """BLAKE2b, 8 bytes, over the values of a small row: marks and subscribers."""
    return hashlib.blake2b(repr(values).encode(), digest_size=8).digest()


def checksum_of(log_sequence: int, event: bytes, mask_png: bytes | None) -> bytes:
    """BLAKE2b, 8 bytes, over the number, the event's length, the event and the mask."""
    digest = hashlib.blake2b(log_sequence.to_bytes(8) + len(event).to_bytes(8) + event, digest_size=8)
    digest.update(b"\0" if mask_png is None else b"\1" + mask_png)
    return digest.digest()


# What a disk says that may work again by itself or after a repair: the same start is worth another try then, so these
# are no fault of the configuration (exit status 2, which systemd takes for final).
_DISK: Final = frozenset((errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO))
_SQLITE_DISK: Final = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN)


def _refusal(error: OSError, text: str, next_step: str) -> KizuError:
    """What to raise for a file that cannot be opened or filled."""
    if error.errno in _DISK:
        return LogError(f"{text}: {error.strerror}; free or repair the disk, then start again")
    return ConfigError(f"{text}: {error.strerror}; {next_step}")


def lock_log(path: Path) -> int:
    """Hold `PATH.lock` so that two daemons cannot number one log; SQLite's own locks live in the log itself."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _refusal(error, f"event log {path}", "choose a folder that this user may write") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(
            f"event log {path} is open in another process; stop that daemon or choose another path"
        ) from None
    return handle


def open_log(path: Path, clock: Clock) -> tuple[sqlite3.Connection, int, int]:
    """The writer's connection, the log's epoch and its head."""
    try:
        # Created here so that nobody else may read it; SQLite gives its side files the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise _refusal(error, f"event log {path}", "choose a file that this user may write") from None
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        if _is_new(connection, path):
            _create(connection, clock)
        else:
            _set_durable(connection)
            _upgrade(connection)
        epoch = connection.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0]
        head = connection.execute("SELECT COALESCE(MAX(log_sequence), 0) FROM events").fetchone()[0]
        # Retention may have removed every event; their numbers are never given again.
        return connection, int(epoch), max(int(head), removed_through(connection))
    except (sqlite3.Error, TypeError) as error:
        connection.close()
        if _of_the_disk(error):
            raise LogError(f"event log {path}: {error}; free or repair the disk, then start again") from None
        raise LogError(f"event log {path} is damaged: {error}; move it away, a new one will be made") from None
    except BaseException:
        connection.close()
        raise


def _of_the_disk(error: Exception) -> bool:
    """Whether SQLite complains of the disk and not of what is written there: nobody should move a sound log away."""
    code = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in _SQLITE_DISK and code != sqlite3.SQLITE_IOERR_SHORT_READ


def _is_new(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is empty; refuses whatever is not ours before a byte of it is changed."""
    try:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
    except sqlite3.DatabaseError as error:
        if _of_the_disk(error):
            raise
        raise ConfigError(f"event log {path} is no SQLite file ({error}); choose another path") from None
    if application == 0 and tables == 0:
        return True
    if application != APPLICATION_ID:
        raise ConfigError(f"event log {path} is a SQLite file of another program; choose another path")
    if not 1 <= version <= SCHEMA_VERSION:
        raise ConfigError(
            f"event log {path} has schema {version}, this kizu writes {SCHEMA_VERSION}; choose another path"
        )
    return False


def _create(connection: sqlite3.Connection, clock: Clock) -> None:
    _set_durable(connection)
    connection.execute("BEGIN IMMEDIATE")
    for statement in (*_SCHEMA, *_SINCE_2):
        connection.execute(statement)
    epoch = secrets.randbelow(2**_EPOCH_BITS - 1) + 1
    connection.executemany("INSERT INTO meta VALUES (?, ?)", [("epoch", epoch), ("created_ns", clock.wall_ns())])
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")


def _upgrade(connection: sqlite3.Connection) -> None:
    """Add what a log of schema 1 lacks, in one transaction."""
    if connection.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    for statement in _SINCE_2:
        connection.execute(statement)
    for mark in connection.execute("SELECT camera, camera_epoch, acked_through FROM marks").fetchall():
        connection.execute(
            "UPDATE marks SET checksum = ? WHERE camera = ? AND camera_epoch = ?", (checksum_of_row(*mark), *mark[:2])
        )
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")


def removed_through(connection: sqlite3.Connection) -> int:
    """The tombstone: the last log sequence that retention removed, 0 if none."""
    return int(connection.execute("SELECT value FROM meta WHERE key = 'removed_through'").fetchone()[0])


def make_reserve(path: Path, size: int) -> None:
    """Hold `size` bytes beside the log, so that a full disk leaves room to say that it is full.

    Raises:
        LogError: the disk has no room for them.
        ConfigError: they cannot be made for another reason.
    """
    if size == 0:
        return
    try:
        handle = os.open(reserve_of(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(handle, 0, size)
        finally:
            os.close(handle)
    except OSError as error:
        text = f"event log {path}: no room for its reserve of {size} bytes"
        raise _refusal(error, text, "free space on that disk") from None


def reserve_of(path: Path) -> Path:
    """Where the reserve lies."""
    return Path(f"{path}.reserve")


def _set_durable(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    # FULL syncs the WAL at every commit; NORMAL would lose acknowledged events at a power cut.
    connection.execute("PRAGMA synchronous = FULL")
