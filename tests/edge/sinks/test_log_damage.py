"""Damage to the log's file: a flipped bit or a cut end is always told, or has changed nothing that anyone reads."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.clock import SystemClock
from edge.errors import KizuError, LogError
from edge.sinks.event_log import EventLog
from edge.sinks.log_check import check_log
from sample_events import sample_event

Content = list[Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed log of 60 events, masks and a cursor: one file, no write-ahead log beside it."""
    path = tmp_path_factory.mktemp("sound") / "events.db"
    with EventLog(path, SystemClock()) as log:
        for number in range(60):
            log.append(sample_event(number), b"mask" * 40 if number % 3 == 0 else None)
        log.move_cursor("press", 20, 0, lambda cursor: None)
        log.flush(10)
    assert not path.with_name("events.db-wal").exists()
    return path


def content(path: Path) -> Content:
    """Everything anyone reads of the log, checked first.

    Raises:
        LogError: damage is told.
    """
    connection = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        check_log(connection, path)
        tables = ("meta WHERE key = 'epoch'", "events", "marks", "ahead", "subscribers")
        return [connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
    except sqlite3.Error as error:
        raise LogError(str(error)) from None
    finally:
        connection.close()


def without_seen(found: Content) -> Content:
    """When a subscriber was last seen is a note, and not under the checksum."""
    return [*found[:-1], [(name, cursor, checksum) for name, cursor, _, checksum in found[-1]]]


@settings(max_examples=400, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_told_or_harmless(sound: Path, place: float, bit: int) -> None:
    """Anywhere in the file; harmless are unused bytes of a page and SQLite's own notes."""
    data = bytearray(sound.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    damaged = sound.with_name("flipped.db")
    damaged.write_bytes(data)

    try:
        found = content(damaged)
    except KizuError:
        return
    assert without_seen(found) == without_seen(content(sound))


@settings(max_examples=100, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_always_told(sound: Path, share: float) -> None:
    """At any length shorter than its own."""
    data = sound.read_bytes()
    cut = sound.with_name("cut.db")
    cut.write_bytes(data[: int(share * len(data))])

    with pytest.raises(KizuError):
        content(cut)


def test_without_checksums_a_changed_event_would_pass(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: SQLite itself does not mind a verdict that became another one."""
    data = sound.read_bytes()
    changed = sound.with_name("changed.db")
    changed.write_bytes(data.replace(b'"score":0.5', b'"score":9.5', 1))
    with pytest.raises(LogError, match="changed after it was written"):
        content(changed)

    class Anything:
        def __ne__(self, other: object) -> bool:
            return False

    monkeypatch.setattr("edge.sinks.log_check.checksum_of", lambda *values: Anything())

    assert content(changed) != content(sound)
