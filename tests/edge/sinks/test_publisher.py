"""Publisher over real sockets: topics, heads, and a subscriber that does not keep up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from edge import sockets, wire
from edge.clock import ManualClock
from edge.errors import ConfigError, SinkError, WireError
from edge.sinks.publisher import Publisher
from edge.wire import Head
from sample_events import published_event


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def publisher(clock: ManualClock) -> Iterator[Publisher]:
    with Publisher("tcp://127.0.0.1:*", "line-a", clock, head=(5, 40)) as made:
        yield made


def subscribe(publisher: Publisher, clock: ManualClock, *topics: bytes, hwm: int = 1000) -> sockets.Socket:
    """A SUB socket whose subscription stands: it has seen a head."""
    made = sockets.sub(publisher.address, [*topics, b"head/"], hwm=hwm)
    for _ in range(1000):
        clock.advance(1)
        publisher.tick()
        if made.poll(5):
            break
    drain(made)
    return made


def drain(socket: sockets.Socket, at_least: int = 0) -> list[list[bytes]]:
    """What there is; waits long for `at_least` messages, as a busy machine may, and 50 ms for one more."""
    found: list[list[bytes]] = []
    while socket.poll(10_000 if len(found) < at_least else 50):
        found.append(socket.recv_multipart())
    return found


def test_an_event_goes_out_with_topic_and_mask(publisher: Publisher, clock: ManualClock) -> None:
    """[topic][JSON][mask]."""
    with subscribe(publisher, clock, b"event/") as listener:
        publisher.publish(published_event(41), b"png")

        assert [wire.parse_published(parts) for parts in drain(listener, 1)] == [(published_event(41), b"png")]
    assert (publisher.published, publisher.dropped) == (1, 0)


def test_a_topic_does_not_catch_a_longer_name(publisher: Publisher, clock: ManualClock) -> None:
    """cam1 is not cam10: topics end in a slash."""
    with subscribe(publisher, clock, wire.event_topic("line-a", "cam1")) as listener:
        for camera in ("cam10", "cam1", "cam2"):
            publisher.publish(published_event(41, camera), b"png")

        assert [parts[0] for parts in drain(listener, 1)] == [b"event/line-a/cam1/"]


def test_a_topic_without_its_slash_would_catch_it(publisher: Publisher, clock: ManualClock) -> None:
    """Control: ZeroMQ matches prefixes."""
    with subscribe(publisher, clock, b"event/line-a/cam1") as listener:
        for camera in ("cam10", "cam1"):
            publisher.publish(published_event(41, camera), b"png")

        assert len(drain(listener, 2)) == 2


def test_the_head_is_told_every_second(publisher: Publisher, clock: ManualClock) -> None:
    """It says what was published, from the log's head at start; twice in one second is once."""
    with subscribe(publisher, clock) as listener:
        heads = []
        for sequence in (None, 41, 42):
            if sequence is not None:
                publisher.publish(published_event(sequence), b"png")
            clock.advance(1)
            publisher.tick()
            publisher.tick()
            heads += [wire.parse_published(parts) for parts in drain(listener)]

    assert heads == [Head(1, "line-a", 5, number) for number in (40, 41, 42)]


def test_a_head_tells_how_the_daemon_is(publisher: Publisher, clock: ManualClock) -> None:
    """State, and why the CPU stands in for the GPU; long reasons are cut."""
    with subscribe(publisher, clock) as listener:
        clock.advance(1)
        publisher.tick("degraded", "driver " * 100)

        head = wire.parse_published(drain(listener, 1)[0])
    assert isinstance(head, Head)
    assert (head.state, head.fallback) == ("degraded", ("driver " * 100)[:200])


def test_an_event_published_again_does_not_turn_the_head_back(publisher: Publisher, clock: ManualClock) -> None:
    """A frame that came twice reports its first verdict again."""
    with subscribe(publisher, clock) as listener:
        publisher.publish(published_event(41), b"png")
        publisher.publish(published_event(12), b"png")
        clock.advance(1)
        publisher.tick()

        assert wire.parse_published(drain(listener, 1)[0]) == Head(1, "line-a", 5, 41)


def test_a_slow_subscriber_loses_events_and_nobody_waits(publisher: Publisher, clock: ManualClock) -> None:
    """One listener reads nothing; publishing 20 MB does not block, the other gets its heads, memory stays bounded."""
    with subscribe(publisher, clock, b"event/", hwm=4) as slow, subscribe(publisher, clock, hwm=4) as other:
        done = threading.Event()

        def publish() -> None:
            for sequence in range(41, 441):
                publisher.publish(published_event(sequence), bytes(60_000))
            done.set()

        threading.Thread(target=publish, daemon=True).start()
        assert done.wait(20)
        clock.advance(1)
        publisher.tick()

        assert other.poll(5000)
        got = [wire.parse_published(parts) for parts in drain(slow)]
        assert 4 <= len([one for one in got if not isinstance(one, Head)]) < 400


def test_subscriptions_are_taken_from_the_socket(publisher: Publisher, clock: ManualClock) -> None:
    """Unread they would pile up inside; a topic of more than a kibibyte costs its sender the connection."""
    with subscribe(publisher, clock, b"event/") as listener:
        assert publisher.topics == 2
        for number in range(50):
            listener.setsockopt(zmq.SUBSCRIBE, f"event/{number}/".encode())
        until = time.monotonic() + 20
        while publisher.topics < 52 and time.monotonic() < until:
            publisher.tick()
            publisher._socket.poll(5)

        assert publisher.topics == 52


def test_two_threads_may_publish_and_tick(publisher: Publisher, clock: ManualClock) -> None:
    """The log's writer thread publishes while the main loop tells heads: every message stays whole."""
    with subscribe(publisher, clock, b"event/") as listener:
        threads = [
            threading.Thread(target=lambda: [publisher.publish(published_event(41 + n), b"png") for n in range(20)]),
            threading.Thread(target=lambda: [(clock.advance(1), publisher.tick()) for _ in range(10)]),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)

        got = [wire.parse_published(parts) for parts in drain(listener, 20)]
    assert len([one for one in got if not isinstance(one, Head)]) == 20


def test_a_closed_publisher_says_so(publisher: Publisher) -> None:
    """Never silently nowhere."""
    publisher.close()

    with pytest.raises(SinkError, match="closed"):
        publisher.publish(published_event(41), b"png")


def test_a_wrong_line_or_address_is_refused(publisher: Publisher) -> None:
    """A slash in a line's name would break every topic."""
    with pytest.raises(WireError):
        Publisher("tcp://127.0.0.1:*", "line/a", ManualClock())
    with pytest.raises(ConfigError, match="in use"):
        Publisher(publisher.address, "line-a", ManualClock())
