"""Is an event log sound? Every row as it was written, no number missing, marks and cursors unchanged.

Reads only; what to do about damage is for people.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from edge import wire
from edge.errors import LogError, WireError
from edge.sinks.log_file import checksum_of, checksum_of_row, removed_through


def check_log(connection: sqlite3.Connection, path: Path) -> int:
    """Check the whole log through `connection`; return the number of events.

    Raises:
        LogError: names the first row that is missing or changed.
    """
    count = 0
    try:
        epoch = int(connection.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0])
        expected = removed_through(connection)
        rows = connection.execute(
            """SELECT log_sequence, camera, camera_epoch, frame_sequence, event, mask, checksum
            FROM events ORDER BY log_sequence"""
        )
        for sequence, *row in rows:
            expected += 1
            if sequence != expected:
                raise LogError(f"event log {path}: log sequence {expected} is missing, {sequence} follows")
            _check_event(f"event log {path}, log sequence {sequence}", epoch, sequence, row)
            count += 1
        _check_small(connection, path)
        found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    except (sqlite3.Error, TypeError, ValueError, UnicodeDecodeError) as error:
        raise LogError(f"event log {path}: damaged after {count} rows: {error}") from None
    if found != "ok":
        raise LogError(f"event log {path}: damaged: {found}")
    return count


def _check_event(where: str, epoch: int, sequence: int, row: list[object]) -> None:
    camera, camera_epoch, frame_sequence, event, mask, checksum = row
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
    if (decoded.log_epoch, decoded.log_sequence) != (epoch, sequence):
        raise LogError(f"{where}: the event belongs to epoch {decoded.log_epoch}, sequence {decoded.log_sequence}")
    if (decoded.camera, decoded.camera_epoch, decoded.frame_sequence) != (camera, camera_epoch, frame_sequence):
        raise LogError(f"{where}: the row's key was changed after it was written")


def _check_small(connection: sqlite3.Connection, path: Path) -> None:
    for table, columns in (("marks", "camera, camera_epoch, acked_through"), ("subscribers", "name, cursor")):
        for *values, checksum in connection.execute(f"SELECT {columns}, checksum FROM {table}"):
            if checksum_of_row(*values) != checksum:
                raise LogError(f"event log {path}: the row {tuple(values)} of {table} was changed after it was written")
