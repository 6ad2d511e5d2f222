"""A subscriber that stands still (SIGSTOP): the others lose nothing, the daemon does not grow, and it catches up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from edge.client import Subscriber
from edge.clock import SystemClock
from edge.errors import SourceTimeout
from edge.sinks.event_log import EventLog
from edge.sinks.publisher import Publisher
from edge.sinks.replay import ReplayServer
from sample_events import sample_event

HERE = Path(__file__).parent
MIB = 1024 * 1024
EVENTS = 4000
# 48 KB of mask that nobody can compress: were it kept for the one who stands still, 4,000 of them are 190 MB.
MASK = os.urandom(48_000)


def wait_until(what: str, done: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)


def next_sequence(healthy: Subscriber, publisher: Publisher) -> int:
    """The healthy one's next event; heads go out meanwhile, as in a daemon, so that a last event lost is noticed."""
    for _ in range(120):
        publisher.tick()
        with contextlib.suppress(SourceTimeout):
            return healthy.receive(0.5)[0].log_sequence
    raise AssertionError("no event within a minute")


@pytest.mark.parametrize("hwm", [32, 100_000])
def test_a_stopped_subscriber_costs_nobody_anything(tmp_path: Path, hwm: int) -> None:
    """At most 32 MiB in the daemon; all of it after SIGCONT. Control: with an unbounded queue the growth is seen."""
    addresses = [f"ipc://{tmp_path}/{name}" for name in ("events", "replay")]
    got = tmp_path / "got"
    with (
        EventLog(tmp_path / "log.db", SystemClock()) as log,
        Publisher(addresses[0], "line-a", SystemClock(), head=(log.epoch, 0), hwm=hwm) as publisher,
        ReplayServer(addresses[1], log),
        Subscriber(addresses[0], replay=addresses[1], since="beginning") as healthy,
        (tmp_path / "stderr").open("w") as errors,
    ):
        stopped = subprocess.Popen(
            [sys.executable, str(HERE / "consumer.py"), *addresses, "stopped", str(got)],
            stderr=errors,
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        )
        try:
            log.append(sample_event(0), None, publisher.publish)
            wait_until("the first event is there", lambda: got.exists() and got.read_text() != "", 30)
            stopped.send_signal(signal.SIGSTOP)
            before, most, seen = psutil.Process().memory_info().rss, 0, [healthy.receive(10)[0].log_sequence]
            for number in range(1, EVENTS):
                event = sample_event(number, mask="inline")
                # The log is not what is measured here: its rows hold no mask, its file no page cache of ours.
                log.append(event, None, lambda logged: publisher.publish(logged, MASK))
                if number % 16 == 0:
                    log.flush(10)
                    while len(seen) <= number:
                        seen.append(next_sequence(healthy, publisher))
                    most = max(most, psutil.Process().memory_info().rss)
            log.flush(10)
            while len(seen) < EVENTS:
                seen.append(next_sequence(healthy, publisher))
            stopped.send_signal(signal.SIGCONT)
            if hwm == 32:
                complete = [str(at) for at in range(1, EVENTS + 1)]

                def caught_up() -> bool:
                    publisher.tick()
                    return [line.split()[1] for line in got.read_text().splitlines()] == complete

                wait_until("the stopped one has everything", caught_up, 60)
        finally:
            stopped.kill()
            stopped.wait(10)

    assert seen == list(range(1, EVENTS + 1)) and healthy.lost == 0
    assert (most - before <= 32 * MIB) == (hwm == 32), f"grew by {(most - before) / MIB:.0f} MiB"
