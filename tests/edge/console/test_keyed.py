"""The console on a line with keys: it is a subscriber like any other, and has to be on the list."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from edge import daemon
from edge.bundle import ModelBundle
from edge.clock import SystemClock
from edge.config import load_config
from edge.console.board import Board
from edge.console.feed import Feed, Sources
from edge.console.shown import Health
from edge.daemon import Ready, StopRequest
from edge.demo.line import write_config
from edge.keys import ClientKeys
from edge.sender import CameraSender
from peers import KeyRing

PATIENCE_S = 30.0


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path)


@pytest.fixture
def line(tmp_path: Path, ring: KeyRing, tiny_bundle: ModelBundle) -> Iterator[Ready]:
    """A daemon with keys, in a thread."""
    security = {"secret_key": str(ring.secret), "peers": str(ring.peers)}
    path = write_config(
        tmp_path / "line.toml",
        tiny_bundle.path,
        ["cam"],
        engine={"backend": "fake"},
        security=security,
        replay_address="tcp://127.0.0.1:*",
    )
    stop, started, found = StopRequest(), threading.Event(), []

    def on_ready(ready: Ready) -> None:
        found.append(ready)
        started.set()

    thread = threading.Thread(target=lambda: daemon.serve(load_config(path), path, stop, on_ready=on_ready))
    thread.start()
    assert started.wait(60)
    yield found[0]
    stop.set()
    thread.join(30)


def until(condition: Callable[[], bool]) -> None:
    """Bounded; what is waited for comes, or the test fails."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def health(board: Board) -> Health:
    found = board.delta(-1, -1, health=True).health
    assert found is not None
    return found


def judge(line: Ready, keys: ClientKeys, count: int) -> None:
    with CameraSender(line.frames_address, "cam", keys=keys) as sender:
        for _ in range(count):
            sender.send(np.full((64, 64), 99, np.uint8), timeout_s=PATIENCE_S)
        assert sender.drain(PATIENCE_S) == 0


def refusals(line: Ready, reason: str) -> float:
    page = httpx.get(line.metrics_url).text
    return float(page.split(f'kizu_connections_refused_total{{reason="{reason}"}} ')[1].split()[0])


def test_a_console_on_the_list_gets_past_and_present(line: Ready, ring: KeyRing) -> None:
    """Replay and events, both encrypted: what was judged before it came is on its board, and what comes after."""
    camera, console = ring.admit("cam", "camera"), ring.admit("console", "subscribe", "replay")
    judge(line, camera, 3)
    board = Board(SystemClock())

    with Feed(Sources(line.events_address, line.replay_address, console), board):
        until(lambda: board.delta(-1, -1).number >= 3)
        until(lambda: health(board).heard and health(board).away_s is None)
        judge(line, camera, 2)
        until(lambda: board.delta(-1, -1).number >= 5)

    assert health(board).lost == 0


@pytest.mark.parametrize("who", ["nobody", "a stranger"])
def test_a_console_that_is_not_on_the_list_sees_nothing_and_is_counted(line: Ready, ring: KeyRing, who: str) -> None:
    """Control: without a key, or with one that nobody admitted, the page says that the line is away."""
    camera = ring.admit("cam", "camera")
    # libzmq tells a plain greeting from one that broke off only if it came whole before the other side gave up.
    keys, reasons = (None, ("no_key", "abandoned")) if who == "nobody" else (ring.stranger("console"), ("key_unknown",))
    board = Board(SystemClock())

    with Feed(Sources(line.events_address, line.replay_address, keys), board):
        until(lambda: sum(refusals(line, reason) for reason in reasons) > 0)
        judge(line, camera, 3)
        until(lambda: health(board).away_s is not None)

    assert not health(board).heard and board.delta(-1, -1).number == 0
