"""Retention: which events leave the log, and what stays of them. Runs in the log's writer thread, on its connection.

Owns the two limits (bytes, age), the choice whether a registered subscriber holds events back, and the tombstone; the
log decides when to ask. Oldest events go first. Without that choice they go whoever has or has not read them: a
subscriber that is behind gets the tombstone as a gap, never silence, and is named (`passed_by`). That a frame was
judged outlives its event: in its camera's mark, or in `ahead` where the mark has not come that far.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Final

from edge import wire
from edge.errors import WireError
from edge.sinks.log_file import removed_through

_CHUNK: Final = 256
_OLDEST: Final = """SELECT log_sequence, camera, camera_epoch, frame_sequence, event FROM events
    ORDER BY log_sequence LIMIT ?"""


@dataclass(frozen=True, slots=True)
class Retention:
    """What the log keeps: `max_bytes` of used pages, `max_age_s` since the verdict; None is no limit of that kind.

    What a registered subscriber that was heard of within `keep_for_s` has not got yet is kept beyond both limits; None
    keeps nothing for anybody.
    """

    max_bytes: int | None = None
    max_age_s: float | None = None
    keep_for_s: float | None = None


def used_bytes(connection: sqlite3.Connection) -> int:
    """Bytes of pages in use; a file never shrinks, its free pages are used again."""
    pages, free, size = (
        int(connection.execute(f"PRAGMA {name}").fetchone()[0])
        for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def apply_retention(connection: sqlite3.Connection, retention: Retention, now_ns: int) -> int:
    """Remove the oldest events beyond the limits, at most 256, in one transaction; return how many."""
    over = retention.max_bytes is not None and used_bytes(connection) > retention.max_bytes
    oldest_ns = None if retention.max_age_s is None else now_ns - round(retention.max_age_s * 1e9)
    if not over and oldest_ns is None:
        return 0
    held_after = _held_after(connection, retention, now_ns)
    rows = []
    for row in connection.execute(_OLDEST, (_CHUNK,)).fetchall():
        if held_after is not None and row[0] > held_after:
            break
        if not over and oldest_ns is not None and _decided_ns(row[4]) >= oldest_ns:
            break
        rows.append(row)
    if rows:
        _remove(connection, rows, now_ns)
    return len(rows)


def passed_by(connection: sqlite3.Connection, before: int, through: int) -> dict[str, int]:
    """Registered subscribers that will never get events of (`before`, `through`], and how many of them."""
    behind = connection.execute("SELECT name, cursor FROM subscribers WHERE cursor < ?", (through,))
    return {name: through - max(before, cursor) for name, cursor in behind}


def _held_after(connection: sqlite3.Connection, retention: Retention, now_ns: int) -> int | None:
    """The log sequence after which events are held back for somebody; None if nobody holds any."""
    if retention.keep_for_s is None:
        return None
    since_ns = now_ns - round(retention.keep_for_s * 1e9)
    found = connection.execute("SELECT MIN(cursor) FROM subscribers WHERE seen_ns >= ?", (since_ns,)).fetchone()[0]
    return None if found is None else int(found)


def _decided_ns(event: bytes) -> int:
    try:
        return wire.decode_event(event).decided_ns
    except WireError:  # a damaged row is `verify`'s matter; it must not go before somebody saw it
        return 2**63 - 1


def _remove(connection: sqlite3.Connection, rows: list[tuple[int, str, int, int, bytes]], now_ns: int) -> None:
    last = max(rows[-1][0], removed_through(connection))
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.executemany(
            """INSERT OR IGNORE INTO ahead SELECT ?1, ?2, ?3 WHERE ?3 > COALESCE(
                (SELECT acked_through FROM marks WHERE camera = ?1 AND camera_epoch = ?2), -1)""",
            [row[1:4] for row in rows],
        )
        connection.execute("DELETE FROM events WHERE log_sequence <= ?", (last,))
        connection.execute("UPDATE meta SET value = ? WHERE key = 'removed_through'", (last,))
        connection.execute("UPDATE meta SET value = ? WHERE key = 'removed_ns'", (now_ns,))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
