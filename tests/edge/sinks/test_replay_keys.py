"""Replay with keys: who may ask the log, and whose cursor a key may move."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge import sockets
from edge.clock import SystemClock
from edge.doorkeeper import Doorkeeper
from edge.errors import SourceBroken, SourceTimeout
from edge.replay_client import ReplayClient
from edge.sinks.event_log import EventLog
from edge.sinks.replay import ReplayServer
from peers import KeyRing


class Log:
    """A log's replay socket with keys, and what it refuses."""

    def __init__(self, folder: Path) -> None:
        self.ring = KeyRing(folder)
        self.refused: Counter[str] = Counter()
        self.context = sockets.new_context()
        self.door = Doorkeeper(self.context, self.ring.peers, on_refused=lambda reason: self.refused.update([reason]))
        self.log = EventLog(folder / "events.sqlite", SystemClock())
        self.server = ReplayServer(
            "tcp://127.0.0.1:*",
            self.log,
            on_refused=lambda reason: self.refused.update([reason]),
            context=self.context,
            keys=self.ring.server,
            stands=lambda owner: self.door.stands(owner, "replay"),
        )

    def client(self, name: str, *rights: str) -> ReplayClient:
        keys = self.ring.admit(name, *rights)  # type: ignore[arg-type]
        return ReplayClient(self.server.address, SystemClock(), keys=keys)

    def close(self) -> None:
        self.server.close()
        self.log.close()
        self.door.close()
        self.context.term()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path)
    yield made
    made.close()


def test_a_key_keeps_the_cursor_of_its_own_name_only(log: Log) -> None:
    """Another's cursor moved on would let retention take what its owner has not read."""
    client = log.client("dash", "replay")

    assert client.cursor("dash", 20).name == "dash"
    with pytest.raises(SourceBroken, match="name_not_of_key"):
        client.cursor("other", 20)
    assert log.refused == {"name_not_of_key": 1}
    client.close()


def test_without_the_comparison_it_could_move_any(log: Log) -> None:
    """Control: a server that does not ask whose key it is."""
    log.server._keyed = False
    client = log.client("dash", "replay")

    assert client.cursor("other", 20).name == "other"
    client.close()


def test_a_key_taken_off_the_list_gets_no_more_answers(log: Log) -> None:
    """On the connection that stands; counted, and the client is told why."""
    client = log.client("dash", "replay")
    assert client.cursor("dash", 20).name == "dash"

    log.ring.take_off("dash")
    deadline = time.monotonic() + 15
    while log.door.names("replay"):
        assert time.monotonic() < deadline
        time.sleep(0.01)

    with pytest.raises(SourceBroken, match="key_removed"):
        client.cursor("dash", 20)
    assert log.refused == {"key_removed": 1}
    client.close()


def test_the_right_to_listen_is_not_the_right_to_ask(log: Log) -> None:
    """Replay hands out the whole log, so it is a right of its own."""
    client = log.client("dash", "subscribe")

    with pytest.raises(SourceTimeout):
        client.events_after(0, 0, 0.5)
    assert log.refused["not_allowed"] >= 1
    client.close()
