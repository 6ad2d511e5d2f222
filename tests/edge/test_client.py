"""Subscriber: events with their masks, and an honest count of what was missed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge import sockets, wire
from edge.client import Subscriber
from edge.errors import SourceBroken, SourceTimeout
from edge.images import encode_mask_png
from edge.wire import Head
from sample_events import published_event

MASK = np.zeros((6, 8), bool)
MASK[2:4, 3:7] = True
PNG = encode_mask_png(MASK)


class Line:
    """A publishing socket that says exactly what a test wants, also nonsense."""

    def __init__(self) -> None:
        self.socket = sockets.xpub("tcp://127.0.0.1:*", hwm=1000)
        self.address = sockets.bound_address(self.socket)
        self.subscribers: list[Subscriber] = []

    def subscriber(self, **options: Any) -> Subscriber:
        """A subscriber whose topics have all arrived here."""
        made = Subscriber(self.address, **options)
        self.subscribers.append(made)
        topics = 0
        while topics < (1 + len(options["cameras"] or ()) if options.get("line") and options.get("cameras") else 2):
            assert self.socket.poll(5000)
            self.socket.recv()
            topics += 1
        return made

    def events(self, *sequences: int, **changes: Any) -> None:
        for sequence in sequences:
            self.socket.send_multipart(wire.pack_event(published_event(sequence, **changes), PNG))

    def head(self, sequence: int, epoch: int = 5) -> None:
        self.socket.send_multipart(wire.pack_head(Head(1, "line-a", epoch, sequence)))


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    for one in made.subscribers:
        one.close()
    made.socket.close(linger=0)


def take(subscriber: Subscriber, wait_s: float = 0.1) -> list[int]:
    """The log sequences of everything that arrives."""
    found = []
    while True:
        try:
            found.append(subscriber.receive(wait_s if found else 5.0)[0].log_sequence)
        except SourceTimeout:
            return found


def test_events_arrive_in_order_with_their_masks(line: Line) -> None:
    """The mask has the frame's size, True where the defect is."""
    subscriber = line.subscriber()
    line.events(1, 2)

    (first, mask), (second, _) = subscriber.receive(5), subscriber.receive(5)

    assert (first, second) == (published_event(1), published_event(2))
    assert mask is not None and mask.dtype == np.bool_ and np.array_equal(mask, MASK)
    assert (subscriber.lost, subscriber.refused) == (0, 0)


def test_an_event_without_a_mask_brings_none(line: Line) -> None:
    """Also one whose mask must be fetched by replay."""
    subscriber = line.subscriber()
    line.events(1, mask="none")
    line.events(2, mask="replay")

    assert [subscriber.receive(5)[1] for _ in range(2)] == [None, None]


def test_a_gap_is_counted(line: Line) -> None:
    """3 and 4 were dropped for a slow subscriber; joining late (at 1) is no loss."""
    subscriber = line.subscriber()
    line.events(1, 2, 5, 6)

    assert take(subscriber) == [1, 2, 5, 6]
    assert subscriber.lost == 2


def test_a_subscriber_without_the_gap_check_would_be_noticed(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: were every event taken as the next one, the gap above would count nothing."""
    subscriber = line.subscriber()
    monkeypatch.setattr(subscriber, "_note_event", lambda event: True)
    line.events(1, 2, 5, 6)

    assert take(subscriber) == [1, 2, 5, 6]
    assert subscriber.lost == 0


def test_a_head_shows_that_the_last_event_was_lost(line: Line) -> None:
    """Nothing follows it, so only the head can tell; a second head does not count it again."""
    subscriber = line.subscriber()
    line.events(1)
    for _ in range(2):
        line.head(3)
    line.events(4)

    assert take(subscriber) == [1, 4]
    assert subscriber.lost == 2
    assert subscriber.latest_head == Head(1, "line-a", 5, 3)


def test_a_first_head_is_where_counting_starts(line: Line) -> None:
    """Events before the connection are not lost; the one after the head is."""
    subscriber = line.subscriber()
    line.head(100)
    line.events(102)

    assert take(subscriber) == [102]
    assert subscriber.lost == 1


def test_a_new_log_epoch_starts_a_new_count(line: Line) -> None:
    """The log was replaced; its sequences cannot be compared with the old ones."""
    subscriber = line.subscriber()
    line.events(50)
    line.events(1, 2, log_epoch=6)

    assert take(subscriber) == [50, 1, 2]
    assert subscriber.lost == 0


def test_an_event_published_again_is_given_once(line: Line) -> None:
    """Its frame came twice."""
    subscriber = line.subscriber()
    line.events(1, 2, 1, 3)

    assert take(subscriber) == [1, 2, 3]
    assert (subscriber.repeated, subscriber.lost) == (1, 0)


@pytest.mark.parametrize("line_name", [None, "line-a"])
def test_a_filter_by_camera_gives_only_that_camera(line: Line, line_name: str | None) -> None:
    """Gaps are unknowable then (the sequence counts all cameras), so none are claimed."""
    subscriber = line.subscriber(cameras=["cam1"], line=line_name)
    line.events(1)
    line.events(2, 3, camera="cam10")
    line.events(4)

    assert take(subscriber) == [1, 4]
    assert subscriber.lost == 0


def test_another_line_is_not_heard(line: Line) -> None:
    """`line-a` is not `line-ab`."""
    subscriber = line.subscriber(line="line-a")
    line.events(1, line="line-ab")
    line.events(2)

    assert take(subscriber) == [2]


def broken_png() -> bytes:
    return PNG[:-8]


def other_size() -> bytes:
    return encode_mask_png(np.ones((60, 80), bool))


def transposed() -> bytes:
    return encode_mask_png(MASK.T.copy())


@pytest.mark.parametrize("make", [broken_png, other_size, transposed, lambda: b"hello"])
def test_a_hostile_mask_costs_the_mask_not_the_verdict(line: Line, make: Callable[[], bytes]) -> None:
    """Truncated, larger than its frame, of another shape, or none at all: refused before it is decoded."""
    subscriber = line.subscriber()
    line.socket.send_multipart(wire.pack_event(published_event(1), make()))

    got, mask = subscriber.receive(5)

    assert (got.log_sequence, mask, subscriber.refused) == (1, None, 1)


def test_nonsense_is_counted_and_skipped(line: Line) -> None:
    """Wrong topic, no JSON, too many parts; the next event arrives."""
    subscriber = line.subscriber()
    good: list[Any] = wire.pack_event(published_event(1), PNG)
    for parts in ([b"event/x"], [b"event/line-a/cam1/", b"{", b""], [b"event/line-a/cam2/", *good[1:]], [*good, *good]):
        line.socket.send_multipart(parts)
    line.events(2)

    assert take(subscriber) == [2]
    assert subscriber.refused == 4


def test_waiting_for_the_connection_ends_with_a_head(line: Line) -> None:
    """From then on nothing is missed for having come too early."""
    subscriber = line.subscriber()
    line.head(7)

    subscriber.wait_until_connected(5)

    assert subscriber.latest_head == Head(1, "line-a", 5, 7)


def test_an_event_that_ends_the_waiting_is_not_swallowed(line: Line) -> None:
    """It is given by the next `receive`."""
    subscriber = line.subscriber()
    line.events(1)

    subscriber.wait_until_connected(5)

    assert subscriber.receive(0)[0].log_sequence == 1


def test_nobody_there_is_a_timeout() -> None:
    """Bounded, and named."""
    with Subscriber("tcp://127.0.0.1:9") as subscriber:
        with pytest.raises(SourceTimeout, match="nobody publishes"):
            subscriber.wait_until_connected(0.05)
        with pytest.raises(SourceTimeout, match="no event"):
            subscriber.receive(0.05)


def test_iterating_gives_events_until_closed(line: Line) -> None:
    """`for event, mask in subscriber`."""
    subscriber = line.subscriber()
    line.events(1, 2, 3)
    got: list[NDArray[np.bool_] | None] = []

    for _, mask in subscriber:
        got.append(mask)
        if len(got) == 3:
            subscriber.close()

    assert len(got) == 3
    with pytest.raises(SourceBroken):
        subscriber.receive(0)


def test_many_invented_logs_are_not_all_remembered(line: Line) -> None:
    """A hostile publisher cannot grow memory by epochs."""
    subscriber = line.subscriber()
    sending = threading.Thread(target=lambda: [line.events(1, log_epoch=n) for n in range(1, 100)])
    sending.start()
    sending.join()

    assert len(take(subscriber)) == 99
    assert len(subscriber._last) <= 16
