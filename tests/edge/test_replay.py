"""Replay: a Subscriber with the log's address gets every event once and in order, whatever happened meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge import sockets, wire
from edge.client import Subscriber
from edge.clock import SystemClock
from edge.errors import ConfigError, SourceBroken, SourceTimeout
from edge.replay_client import ReplayClient
from edge.sinks.event_log import EventLog
from edge.sinks.publisher import Publisher
from edge.sinks.replay import ReplayServer
from edge.sinks.retention import Retention, apply_retention
from edge.wire import Gap
from sample_events import sample_event


class Line:
    """Log, publisher and replay of one line, on addresses that stay when it is started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events, self.replay = (f"ipc://{folder}/{name}" for name in ("events", "replay"))
        self.frames = 0
        self.open()

    def open(self, file: str = "log.db") -> None:
        self.log = EventLog(self.folder / file, SystemClock())
        self.publisher = Publisher(self.events, "line-a", SystemClock(), head=(self.log.epoch, self.log.head))
        self.refused: list[str] = []
        self.server = ReplayServer(self.replay, self.log, on_refused=self.refused.append)

    def close(self) -> None:
        self.server.close()
        self.publisher.close()
        self.log.close()

    def judge(self, count: int = 1, *, publish: bool = True, mask: bytes | None = None, camera: str = "cam1") -> None:
        """Commit `count` events; without `publish` they are lost on the way, as for a subscriber that is slow."""
        state = wire.mask_state(mask)
        for _ in range(count):
            told = self.publisher.publish if publish else lambda event, mask: None
            event = sample_event(self.frames, camera, mask=state)
            self.log.append(event, mask, lambda event, told=told: told(event, mask))
            self.frames += 1
        self.log.flush(10)

    def head(self) -> None:
        self.publisher._head = (self.log.epoch, self.log.head)
        self.publisher._head_due_ns = 0
        self.publisher.tick()


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line(tmp_path)
    yield made
    made.close()


@pytest.fixture
def follow(line: Line) -> Iterator[Callable[..., Subscriber]]:
    made: list[Subscriber] = []

    def subscriber(**options: object) -> Subscriber:
        made.append(Subscriber(line.events, replay=line.replay, **options))
        return made[-1]

    yield subscriber
    for one in made:
        one.close()


def take(subscriber: Subscriber, count: int) -> list[int]:
    return [subscriber.receive(10)[0].log_sequence for _ in range(count)]


def connected(line: Line, subscriber: Subscriber) -> Subscriber:
    """Its subscription has arrived: a head comes through."""
    for _ in range(200):
        line.head()
        try:
            subscriber.wait_until_connected(0.05)
            return subscriber
        except SourceTimeout:
            continue
    raise AssertionError("no head within 10 s")


def test_from_the_beginning_and_on(line: Line, follow: Callable[..., Subscriber]) -> None:
    """What was logged before, then what is published, without a seam."""
    line.judge(600)
    subscriber = connected(line, follow(since="beginning"))

    assert take(subscriber, 600) == list(range(1, 601))
    line.judge(3)
    assert take(subscriber, 3) == [601, 602, 603]
    assert (subscriber.lost, subscriber.position) == (0, (line.log.epoch, 603))


def test_a_gap_is_healed_in_order(line: Line, follow: Callable[..., Subscriber]) -> None:
    """Three were lost on the way; the next event shows it."""
    subscriber = connected(line, follow())
    line.judge(2)
    line.judge(3, publish=False)
    line.judge(1)

    assert take(subscriber, 6) == [1, 2, 3, 4, 5, 6]
    assert subscriber.lost == 0 and subscriber.replayed > 0


def test_a_subscriber_that_never_asks_is_found_out(line: Line) -> None:
    """Control: without replay the same three are missing, and counted."""
    with Subscriber(line.events) as subscriber:
        connected(line, subscriber)
        line.judge(2)
        line.judge(3, publish=False)
        line.judge(1)

        assert take(subscriber, 3) == [1, 2, 6]
        assert subscriber.lost == 3


def test_a_head_heals_a_lost_last_event(line: Line, follow: Callable[..., Subscriber]) -> None:
    """Nothing follows it; the lag is known from the head."""
    subscriber = connected(line, follow())
    line.judge(1)
    assert take(subscriber, 1) == [1]
    line.judge(2, publish=False)
    line.head()

    assert take(subscriber, 1) == [2]
    assert subscriber.lag == 1
    assert take(subscriber, 1) == [3]


def test_large_masks_come_by_replay(line: Line, follow: Callable[..., Subscriber]) -> None:
    """Beyond 64 KiB an event is published without its mask, and fetched with it."""
    subscriber = connected(line, follow())
    line.judge(1, mask=b"x" * 70_000)

    event, _ = subscriber.receive(10)

    assert (event.mask, subscriber.replayed) == ("replay", 1)
    assert line.log.read_since(0, 1)[0][1] == b"x" * 70_000


def test_cameras_are_chosen_without_losing_sight_of_gaps(line: Line, follow: Callable[..., Subscriber]) -> None:
    """The sequence counts all cameras; only one's events are given."""
    subscriber = connected(line, follow(cameras=["cam2"]))
    line.judge(2)
    line.judge(1, camera="cam2", publish=False)
    line.judge(1)
    line.judge(1, camera="cam2")

    assert take(subscriber, 2) == [3, 5]


def test_a_daemon_that_restarts_is_followed_on(line: Line, follow: Callable[..., Subscriber]) -> None:
    """Same log, new process: what came in between is fetched."""
    subscriber = connected(line, follow())
    line.judge(1)
    assert take(subscriber, 1) == [1]
    line.close()
    line.open()
    line.judge(2, publish=False)
    line.head()

    with pytest.raises(SourceTimeout):
        subscriber.receive(0.0)
    subscriber.latest_head = None
    connected(line, subscriber)
    assert take(subscriber, 2) == [2, 3]


def test_a_log_that_was_wiped_is_followed_from_its_beginning(line: Line, follow: Callable[..., Subscriber]) -> None:
    """A new epoch: nothing of it was seen, so all of it comes, and the change is counted."""
    subscriber = connected(line, follow())
    line.judge(5)
    take(subscriber, 5)
    line.close()
    line.open("another.db")
    line.judge(2, publish=False)
    subscriber.latest_head = None
    connected(line, subscriber)

    assert take(subscriber, 2) == [1, 2]
    assert subscriber.new_logs == 1 and subscriber.position == (line.log.epoch, 2)


def test_what_retention_took_is_told_as_a_gap(line: Line, follow: Callable[..., Subscriber]) -> None:
    """Never silence: the place, and how many."""
    line.judge(4)
    apply_retention(line.log._connection, Retention(max_age_s=1), 10**18)
    line.judge(2)
    subscriber = follow(since="beginning")

    assert take(subscriber, 2) == [5, 6]
    assert subscriber.lost == 4 and list(subscriber.gaps) == [(line.log.epoch, Gap(1, 4))]


def test_a_registered_subscriber_that_retention_passed_is_told(line: Line, follow: Callable[..., Subscriber]) -> None:
    """Which events and how many, by the cursor's answer and as a gap; what follows comes in order."""
    line.judge(2)
    first = follow(name="press", since="beginning")
    assert take(first, 2) == [1, 2]
    first.commit(10)
    line.judge(4)
    apply_retention(line.log._connection, Retention(max_age_s=1), 10**18)
    line.log._removed_through = 6
    line.judge(2)
    client = ReplayClient(line.replay, SystemClock())
    asked = client.cursor("press", 10)
    client.close()
    again = follow(name="press")

    assert (asked.log_sequence, asked.passed) == (2, 4)
    assert take(again, 2) == [7, 8]
    assert again.lost == 4 and list(again.gaps) == [(line.log.epoch, Gap(3, 6))]
    again.commit(10)
    client = ReplayClient(line.replay, SystemClock())
    assert client.cursor("press", 10).passed == 0
    client.close()


def test_a_registered_subscriber_goes_on_where_it_committed(line: Line, follow: Callable[..., Subscriber]) -> None:
    """The daemon keeps the place, across its own restart too; what was not committed comes again."""
    line.judge(6)
    first = follow(name="press", since="beginning")
    assert take(first, 3) == [1, 2, 3]
    first.commit(10)
    assert take(first, 1) == [4]
    first.close()
    line.close()
    line.open()

    assert line.log.cursors() == {"press": 3}
    assert take(follow(name="press"), 3) == [4, 5, 6]


def test_a_new_name_from_now_on_gets_nothing_old(line: Line, follow: Callable[..., Subscriber]) -> None:
    """`since` is for the first time only."""
    line.judge(3)
    subscriber = connected(line, follow(name="late"))
    line.judge(1)

    assert take(subscriber, 1) == [4]


def test_a_cursor_never_moves_back_nor_beyond_the_head(line: Line) -> None:
    """A late or wrong commit cannot make events come twice or be skipped."""
    line.judge(3)
    client = ReplayClient(line.replay, SystemClock())
    epoch = line.log.epoch

    at = [client.cursor("a", 10, at=(epoch, sequence)).log_sequence for sequence in (2, 1, 99)]
    other = client.cursor("b", 10, at=(epoch + 1, 3)).log_sequence
    client.close()

    assert (at, other) == ([2, 2, 3], 0)


def test_nonsense_is_refused_counted_and_told(line: Line) -> None:
    """And the server goes on."""
    socket = sockets.dealer(line.replay, hwm=4)
    socket.send(b"{")
    assert socket.poll(10_000)
    answer = wire.parse_answer(socket.recv_multipart())
    socket.close(linger=0)

    assert isinstance(answer, wire.Refused) and line.refused == ["header_not_json"]
    client = ReplayClient(line.replay, SystemClock())
    assert client.events_after(0, 0, 10)[0].head == 0
    with pytest.raises(SourceBroken, match="camera_name"):
        client.cursor("No Name", 10)
    client.close()


def test_a_name_without_the_logs_address_is_refused() -> None:
    """Nobody could keep the place."""
    with pytest.raises(ConfigError, match="replay address"):
        Subscriber("tcp://127.0.0.1:1", name="press")
