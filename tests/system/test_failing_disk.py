"""A disk that fails or is full: the log says so, acknowledges nothing more, and everything acknowledged is there."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.clock import SystemClock
from edge.sinks.event_log import EventLog

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preloaded library that makes calls fail."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (apt-get install gcc)")
    library = tmp_path_factory.mktemp("shim") / "failing.so"
    source = str(HERE / "failing_disk.c")
    done = subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", str(library), source, "-ldl"], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"the C compiler cannot build a library here: {done.stderr[-300:]}")
    return library


def append(log: Path, *options: str, **environment: str) -> tuple[int, list[int], str]:
    """Run the appender; exit status, acknowledged frames, last line."""
    done = subprocess.run(
        [sys.executable, str(HERE / "appender.py"), str(log), *options],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    return done.returncode, [int(line) for line in lines if line.isdecimal()], lines[-1]


def logged(path: Path) -> list[int]:
    """What a healthy disk finds in the log, which must be sound."""
    with EventLog(path, SystemClock()) as log:
        log.verify()
        return [event.frame_sequence for event, _ in log.read_since(0, 10**6)]


@pytest.mark.parametrize("call", ["sync", "write"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failing_call_ends_acknowledging(shim: Path, tmp_path: Path, call: str, number: int) -> None:
    """The n-th sync or write of the write-ahead log fails: nothing after it is acknowledged, nothing before it lost."""
    path = tmp_path / "events.db"
    status, acknowledged, last = append(
        path,
        LD_PRELOAD=str(shim),
        FAIL_CALL=call,
        FAIL_FILE="events.db-wal",
        FAIL_AFTER="40",
        FAIL_ERRNO=str(number),
    )

    assert status == 1 and last.startswith("failed: event log") and "nothing after log sequence" in last
    assert 0 < len(acknowledged) < 400
    assert set(acknowledged) <= set(logged(path))


def test_a_log_that_goes_on_after_a_failed_sync_is_caught(shim: Path, tmp_path: Path) -> None:
    """Control: acknowledged frames are missing afterwards."""
    path = tmp_path / "events.db"
    fail = {"FAIL_CALL": "sync", "FAIL_FILE": "events.db-wal", "FAIL_AFTER": "40", "FAIL_ERRNO": str(errno.EIO)}
    _, acknowledged, _ = append(path, "--lying", LD_PRELOAD=str(shim), **fail)

    assert not set(acknowledged) <= set(logged(path))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no permission to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_in_the_log_itself(small_disk: Path) -> None:
    """The reserve makes room for the last word; the log stays readable and complete."""
    path = small_disk / "events.db"
    status, acknowledged, last = append(path)

    assert status == 1 and "full" in last
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as other:
        ((head, why),) = other.execute("SELECT head, why FROM failures").fetchall()
        found = [row[0] for row in other.execute("SELECT frame_sequence FROM events ORDER BY 1")]
    assert "full" in why and head == len(acknowledged)
    assert set(acknowledged) <= set(found) and len(acknowledged) > 10


def test_a_disk_without_room_for_the_reserve_is_refused_at_the_start(small_disk: Path) -> None:
    """Better before the first part than after the thousandth; status 1, so systemd tries again until there is room."""
    with (small_disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 3_500_000)

    status, acknowledged, last = append(small_disk / "events.db")

    assert (status, acknowledged) == (1, []) and "no room for its reserve" in last
