"""Health: what follows from progress, and what systemd hears."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from edge.health import STALL_AFTER_S, Notifier, Progress, State, state_of
from edge.inference import ENGINE_TIMEOUT_S, FAILURES_BEFORE_REOPEN

LATE_NS = round((STALL_AFTER_S + 1) * 1e9)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (Progress(in_flight=0, moved_ns=0, source_ns=LATE_NS, engine_lost=False), State.READY),
        (Progress(in_flight=3, moved_ns=LATE_NS - 1, source_ns=LATE_NS, engine_lost=False), State.READY),
        (Progress(in_flight=3, moved_ns=0, source_ns=LATE_NS, engine_lost=False), State.STALLED),
        (Progress(in_flight=0, moved_ns=0, source_ns=0, engine_lost=False), State.STALLED),
        (Progress(in_flight=3, moved_ns=LATE_NS, source_ns=LATE_NS, engine_lost=True), State.DEGRADED),
        (Progress(in_flight=3, moved_ns=0, source_ns=LATE_NS, engine_lost=True), State.STALLED),
        (Progress(in_flight=0, moved_ns=0, source_ns=LATE_NS, engine_lost=True, withheld=True), State.WITHHELD),
        (Progress(in_flight=3, moved_ns=0, source_ns=LATE_NS, engine_lost=False, withheld=True), State.STALLED),
    ],
)
def test_the_state_follows_from_progress(progress: Progress, expected: State) -> None:
    """Idle is ready; frames that wait without an end, or a source that stopped coming round, are a stall."""
    assert state_of(progress, LATE_NS) is expected


def test_a_hanging_engine_is_answered_before_the_line_counts_as_stalled() -> None:
    """INCONCLUSIVE is an answer; a restart by the watchdog is the last resort."""
    assert ENGINE_TIMEOUT_S < STALL_AFTER_S
    assert ENGINE_TIMEOUT_S * FAILURES_BEFORE_REOPEN <= STALL_AFTER_S


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_ready_watchdog_status_and_stopping(tmp_path: Path, abstract: bool) -> None:
    """Over a real socket, by path and in the abstract namespace."""
    name = f"@kizu-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name[1:] if abstract else name)
        systemd.settimeout(5)
        with Notifier({"NOTIFY_SOCKET": name}) as notifier:
            notifier.not_yet(60.0)
            notifier.ready()
            notifier.watchdog()
            notifier.status("two\nlines")
            notifier.stopping()
            heard = [systemd.recv(100).decode() for _ in range(5)]

    assert heard == ["EXTEND_TIMEOUT_USEC=60000000", "READY=1", "WATCHDOG=1", "STATUS=two lines", "STOPPING=1"]


def test_without_systemd_nothing_is_said() -> None:
    """A daemon in a terminal has nobody to notify."""
    with Notifier({}) as notifier:
        notifier.ready()

    assert notifier.watchdog_s is None
    assert notifier.failures == 0


def test_a_supervisor_that_went_away_does_not_stop_the_line(tmp_path: Path) -> None:
    """The message is lost and counted; the inspection goes on."""
    with Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}) as notifier:
        notifier.watchdog()

    assert notifier.failures == 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_interval_is_read_as_systemd_means_it(environment: dict[str, str], expected: float | None) -> None:
    """Meant for this process, in microseconds, or not at all."""
    assert Notifier(environment).watchdog_s == expected


def test_a_line_that_runs_on_the_cpu_in_place_of_its_gpu_is_degraded() -> None:
    """It judges every frame, and still somebody should look; without the fallback it is ready."""
    progress = Progress(in_flight=0, moved_ns=0, source_ns=0, engine_lost=False, engine_fallback=True)

    assert state_of(progress, 0) is State.DEGRADED
    assert state_of(Progress(0, 0, 0, engine_lost=False), 0) is State.READY
