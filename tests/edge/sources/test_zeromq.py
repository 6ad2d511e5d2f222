"""ZeroMqSource over real sockets: who is admitted, what is a duplicate, and how credits heal."""

from __future__ import annotations

import json
import socket as posix
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from edge import sockets, wire
from edge.clock import ManualClock, SystemClock
from edge.errors import ConfigError, SourceBroken, SourceTimeout
from edge.payloads import FrameLimits
from edge.sources.zeromq import MAX_CAMERAS, ZeroMqSource
from edge.types import Frame, Unreadable
from edge.wire import CreditState

PIXELS = bytes(range(12))


class Bench:
    """A source under test with everything that it counts; the clock stands still unless it is advanced."""

    def __init__(self, address: str = "tcp://127.0.0.1:*", **options: Any) -> None:
        self.clock = ManualClock()
        self.refused: Counter[str] = Counter()
        self.duplicates: Counter[str] = Counter()
        self.reconnects: Counter[str] = Counter()
        self.cameras: list[RawCamera] = []
        options = {"cameras": ["cam1", "cam10"], "window": 4} | options
        self.source = ZeroMqSource(
            address,
            self.clock,
            on_refused=lambda reason: self.refused.update([reason]),
            on_duplicate=lambda camera: self.duplicates.update([camera]),
            on_reconnect=lambda camera: self.reconnects.update([camera]),
            **options,
        )

    def read(self, what: str = "a frame") -> Frame | Unreadable:
        found: list[Frame | Unreadable] = []
        self.until(lambda: bool(found), what, found)
        return found[0]

    def until(self, done: Callable[[], bool], what: str, found: list[Frame | Unreadable] | None = None) -> None:
        """Let the source work until `done`; anything it returns goes to `found`, which must be wanted."""
        clock = SystemClock()
        deadline_ns = clock.monotonic_ns() + 5_000_000_000
        while not done():
            assert clock.monotonic_ns() < deadline_ns, f"no {what}; refused {dict(self.refused)}"
            try:
                frame = self.source.read(0)
            except SourceTimeout:
                self.source._poller.poll(5)
                continue
            assert found is not None, f"unexpected {frame.id}"
            found.append(frame)

    def camera(self, name: str = "cam1", epoch: int = 7, hello: bool = True) -> RawCamera:
        made = RawCamera(self, name, epoch)
        self.cameras.append(made)
        if hello:
            made.hello()
        return made

    def close(self) -> None:
        for camera in self.cameras:
            camera.socket.close(linger=0)
        self.source.close()


class RawCamera:
    """A DEALER that sends exactly what it is told."""

    def __init__(self, bench: Bench, name: str, epoch: int) -> None:
        self.bench, self.name, self.epoch = bench, name, epoch
        self.socket = sockets.dealer(bench.source.address, hwm=10_000)

    def send(self, *parts: wire.Buffer) -> None:
        assert self.socket.poll(5000, zmq.POLLOUT)
        self.socket.send_multipart(parts)

    def frame(self, sequence: int, payload: bytes = PIXELS, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "type": "frame",
            "version": 1,
            "camera": self.name,
            "epoch": self.epoch,
            "sequence": sequence,
            "captured_ns": 1,
            "encoding": "mono8",
            "width": 4,
            "height": 3,
        }
        self.send(json.dumps(fields | changes).encode(), payload)

    def hello(self) -> CreditState:
        self.send(*wire.pack_hello(self.name, self.epoch))
        return self.credit()

    def credit(self) -> CreditState:
        """The next credit, while the source works."""
        self.bench.until(lambda: bool(self.socket.poll(0)), "credit")
        return wire.parse_credit(self.socket.recv_multipart())

    def credits(self) -> list[CreditState]:
        """Every credit that is there by now."""
        found = []
        while self.socket.poll(50):
            found.append(wire.parse_credit(self.socket.recv_multipart()))
        return found


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def build(*args: Any, **options: Any) -> Bench:
        benches.append(Bench(*args, **options))
        return benches[-1]

    yield build
    for bench in benches:
        bench.close()


@pytest.fixture
def bench(make: Callable[..., Bench]) -> Bench:
    return make()


def test_a_frame_comes_through_with_its_name_and_pixels(bench: Bench) -> None:
    """HELLO is answered by a credit, and then the window is open."""
    camera = bench.camera()
    camera.frame(0, part_id="p-9")

    frame = bench.read()

    assert isinstance(frame, Frame)
    assert (frame.id.key, frame.part_id, frame.image.tobytes()) == (("cam1", 7, 0), "p-9", PIXELS)


def test_hello_grants_the_window_from_nothing(bench: Bench) -> None:
    """The first state of a fresh epoch."""
    made = RawCamera(bench, "cam1", 7)
    bench.cameras.append(made)

    assert made.hello() == CreditState(1, "cam1", 7, -1, (), 4)


def test_acknowledgements_are_absolute_and_out_of_order_ones_wait(bench: Bench) -> None:
    """`also_acked` holds what came ahead, and is folded into `acked_through` when the gap closes."""
    camera = bench.camera()
    for sequence in range(3):
        camera.frame(sequence)
    keys = [bench.read().id.key for _ in range(3)]

    bench.source.acknowledge([keys[0], keys[2]])
    first = camera.credit()
    bench.source.acknowledge([keys[1]])

    assert first == CreditState(1, "cam1", 7, 0, (2,), 4)
    assert camera.credit() == CreditState(1, "cam1", 7, 2, (), 4)
    assert bench.source.in_flight == 0


def test_an_acknowledgement_from_another_thread_wakes_the_reader(make: Callable[..., Bench]) -> None:
    """The reader sleeps in a long poll; the credit must leave long before that ends."""
    bench = make()
    camera = bench.camera()
    camera.frame(0)
    key = bench.read().id.key

    def sleep() -> None:
        with pytest.raises(SourceTimeout):
            bench.source.read(0.45)

    sleeping = threading.Thread(target=sleep, daemon=True)
    sleeping.start()

    bench.source.acknowledge([key])

    assert camera.socket.poll(5000)
    assert wire.parse_credit(camera.socket.recv_multipart()).acked_through == 0
    bench.clock.advance(1)
    bench.source.acknowledge([])
    sleeping.join(5)
    assert not sleeping.is_alive()


def test_a_lost_credit_is_healed_by_the_next_periodic_state(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state after the commit never leaves; half a second later the same truth is told again."""
    camera = bench.camera()
    camera.frame(0)
    key = bench.read().id.key
    with monkeypatch.context() as broken:
        broken.setattr(bench.source, "_send", lambda peer, state: True)
        bench.source.acknowledge([key])
        bench.source.service()
    assert camera.credits() == []

    bench.clock.advance(0.5)

    assert camera.credit().acked_through == 0


def test_without_the_periodic_state_the_camera_would_wait_for_ever(bench: Bench) -> None:
    """Control: while the clock stands still, nothing more is said."""
    camera = bench.camera()

    bench.source.service()

    assert camera.credits() == []


def test_a_frame_in_flight_is_joined_not_judged_twice(bench: Bench) -> None:
    """The camera lost patience and sent it again."""
    camera = bench.camera()
    camera.frame(0)
    bench.read()
    camera.frame(0)

    bench.until(lambda: bench.source.joined == 1, "join")

    assert (bench.duplicates["cam1"], bench.source.duplicates, bench.source.in_flight) == (1, 0, 1)


def test_a_judged_frame_is_acknowledged_again(bench: Bench) -> None:
    """Its acknowledgement was lost, so the camera still keeps it."""
    camera = bench.camera()
    camera.frame(0)
    bench.source.acknowledge([bench.read().id.key])
    camera.credit()
    camera.frame(0)

    assert camera.credit().acked_through == 0
    assert (bench.source.duplicates, bench.duplicates["cam1"]) == (1, 1)


def test_after_a_restart_the_log_tells_what_was_judged(make: Callable[..., Bench]) -> None:
    """A new source on the same log: 0 to 2 and 4 have verdicts, 3 came but was never judged."""
    logged = {("cam1", 7, sequence) for sequence in (0, 1, 2, 4)}
    bench = make(known=logged.__contains__, acked_through=lambda camera, epoch: 2)
    made = RawCamera(bench, "cam1", 7)
    bench.cameras.append(made)

    state = made.hello()
    for sequence in (4, 3):
        made.frame(sequence)

    assert state == CreditState(1, "cam1", 7, 2, (4,), 4)
    assert bench.read().id.sequence == 3
    assert bench.source.duplicates == 1


def test_a_source_that_forgot_the_log_would_judge_twice(make: Callable[..., Bench]) -> None:
    """Control: without the log's answer a frame judged before the restart is handed out again."""
    camera = make().camera()
    camera.frame(0)

    assert camera.bench.read().id.sequence == 0


def test_a_lower_sequence_that_was_never_judged_is_late_not_foreign(bench: Bench) -> None:
    """Frame 0 was lost on its way and arrives after 1 and 2."""
    camera = bench.camera()
    for sequence in (1, 2, 0):
        camera.frame(sequence)

    assert [bench.read().id.sequence for _ in range(3)] == [1, 2, 0]


def test_the_log_is_asked_only_at_hello(make: Callable[..., Bench]) -> None:
    """It is a disk, and frames are many."""
    asked: list[Any] = []
    bench = make(known=lambda key: bool(asked.append(key)))
    camera = bench.camera()
    at_hello = len(asked)
    for sequence in range(4):
        camera.frame(sequence)
        bench.read()

    assert at_hello <= 4 and len(asked) == at_hello


def test_frames_beyond_the_window_are_refused_not_queued(bench: Bench) -> None:
    """A camera that ignores its credits costs nothing but a count."""
    camera = bench.camera()
    for sequence in (0, 4, 2**62):
        camera.frame(sequence)
    bench.read()

    bench.until(lambda: bench.refused["over_window"] == 2, "refusals")

    assert bench.source.in_flight == 1


def test_an_unconfigured_camera_is_refused(bench: Bench) -> None:
    """Neither its HELLO nor its frames get an answer; cam1 must not stand for cam10 either."""
    stranger = bench.camera("cam100", hello=False)
    stranger.send(*wire.pack_hello("cam100", 1))
    stranger.frame(0)

    bench.until(lambda: bench.refused["camera_unknown"] == 2, "refusals")

    assert stranger.credits() == []


def test_a_frame_without_hello_is_answered_by_a_closed_window(bench: Bench) -> None:
    """An honest camera whose connection was renewed unnoticed then says HELLO; nothing was judged meanwhile."""
    camera = bench.camera(hello=False)
    camera.frame(0)

    assert camera.credit() == CreditState(1, "cam1", 7, -1, (), 0)
    assert bench.refused["no_hello"] == 1


def test_a_newer_hello_takes_the_name_over(bench: Bench) -> None:
    """The camera restarted: its new connection is served, frames of the old one are refused without an answer."""
    old = bench.camera(epoch=7)
    new = bench.camera(epoch=8)
    old.frame(0)
    new.frame(0)

    assert bench.read().id.epoch == 8
    assert (bench.refused["superseded"], bench.source.superseded) == (1, 1)
    bench.clock.advance(0.5)
    assert new.credit().epoch == 8
    assert [state.epoch for state in old.credits()] == []


def test_a_reconnected_camera_goes_on_where_it_was(bench: Bench) -> None:
    """Same epoch, new connection: what is in flight is joined, and the answer goes to the new one."""
    first = bench.camera()
    first.frame(0)
    key = bench.read().id.key
    first.socket.close(linger=0)
    again = bench.camera()
    again.frame(0)
    bench.until(lambda: bench.source.joined == 1, "join")

    bench.source.acknowledge([key])

    assert again.credit().acked_through == 0
    assert bench.source.superseded == 0


def test_a_camera_that_comes_back_is_counted_and_one_that_only_greets_again_is_not(bench: Bench) -> None:
    """HELLO is repeated after every silence; a reconnect is another connection, or another run of the camera."""
    camera = bench.camera()
    camera.hello()
    before = dict(bench.reconnects)
    bench.camera()  # the same run on a new connection
    bench.camera(epoch=8)  # started again
    bench.camera("cam10")

    assert (before, dict(bench.reconnects)) == ({}, {"cam1": 2})


def test_a_frame_in_flight_stays_joined_across_a_takeover(bench: Bench) -> None:
    """Two cameras fight over one name; no frame of either is judged twice for it."""
    camera = bench.camera(epoch=7)
    camera.frame(0)
    bench.read()
    bench.camera(epoch=8)
    camera.hello()
    camera.frame(0)

    bench.until(lambda: bench.source.joined == 1, "join")

    assert bench.source.superseded == 2


def test_a_camera_that_vanishes_is_counted_never_raised(bench: Bench) -> None:
    """Credits to an absent peer: EHOSTUNREACH once, then silence until it says HELLO again."""
    camera = bench.camera()
    camera.socket.close(linger=0)

    def told() -> bool:
        bench.clock.advance(0.5)
        return bench.source.credits_unreachable > 0

    bench.until(told, "unreachable")
    for _ in range(3):
        told()
        bench.source.service()

    assert bench.source.credits_unreachable == 1


def test_a_camera_that_reads_nothing_is_counted_never_waited_for(bench: Bench) -> None:
    """A full pipe gives EAGAIN; the reader goes on."""
    camera = bench.camera()
    big = CreditState(1, "cam1", 7, -1, tuple(range(40_000)), 4)
    peer = bench.source._cameras["cam1"].peer
    assert peer is not None

    for _ in range(2000):
        assert bench.source._send(peer, big)

    assert bench.source.credits_full > 0
    assert camera.socket.poll(0)


def test_a_camera_that_vanishes_mid_frame_leaves_nothing_behind(bench: Bench) -> None:
    """It greets, announces a megabyte, sends half of it and is gone; the honest camera does not notice."""
    honest = bench.camera()
    host, port = bench.source.address.removeprefix("tcp://").split(":")
    with posix.create_connection((host, int(port)), timeout=5) as raw:
        raw.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
        ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
        raw.sendall(b"\x04" + len(ready).to_bytes(1) + ready)
        assert len(raw.recv(64)) > 0
        raw.sendall(b"\x02" + (1 << 20).to_bytes(8) + bytes(1 << 19))
    honest.frame(0)

    assert bench.read().id.camera == "cam1"
    assert bench.refused.total() == 0


HOSTILE: dict[str, tuple[list[bytes], str]] = {
    "nothing": ([b""], "header_not_json"),
    "not JSON": ([b"\x00" * 100, PIXELS], "header_not_json"),
    "header too long": ([b'{"type":"frame","x":"' + b"a" * 5000 + b'"}', PIXELS], "header_too_long"),
    "other version": ([b'{"type":"frame","version":9}', PIXELS], "version"),
    "other type": ([b'{"type":"credit","version":1}', PIXELS], "message_type"),
    "no frame named": ([b'{"type":"frame","version":1,"camera":"cam1"}', PIXELS], "header_invalid"),
    "bad name": ([b'{"type":"hello","version":1,"camera":"../etc","epoch":1}'], "camera_name"),
    "hello with parts": ([b'{"type":"hello","version":1,"camera":"cam1","epoch":1}', *[b"x"] * 500], "parts"),
}


@pytest.mark.parametrize(("parts", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_message_is_counted_and_an_honest_camera_unaffected(
    bench: Bench, parts: list[bytes], reason: str
) -> None:
    """Fifty of them between two honest frames."""
    honest, hostile = bench.camera(), bench.camera("cam10", hello=False)
    honest.frame(0)
    for _ in range(50):
        hostile.send(*parts)
    bench.read()
    bench.until(lambda: bench.refused.total() == 50, "refusals")
    honest.frame(1)

    assert bench.read().id.key == ("cam1", 7, 1)
    assert bench.refused == {reason: 50}


@pytest.mark.parametrize(
    ("changes", "payload", "reason"),
    [
        ({"encoding": "yuv"}, PIXELS, "format"),
        ({"width": "4"}, PIXELS, "format"),
        ({"width": -4}, PIXELS, "size"),
        ({"height": 10**12}, PIXELS, "size"),
        ({}, PIXELS[:-1], "length"),
        ({"encoding": "png"}, b"\x89PNG\r\n\x1a\n", "truncated"),
    ],
)
def test_a_bad_frame_of_an_admitted_camera_gets_a_name_for_its_verdict(
    bench: Bench, changes: dict[str, Any], payload: bytes, reason: str
) -> None:
    """It counts as received: it is in flight until its INCONCLUSIVE is durable."""
    camera = bench.camera()
    camera.frame(0, payload, **changes)

    found = bench.read()

    assert isinstance(found, Unreadable) and (found.id.key, found.reason) == (("cam1", 7, 0), reason)
    assert bench.source.in_flight == 1 and bench.refused.total() == 0


def test_a_bad_frame_of_a_stranger_is_only_refused(bench: Bench) -> None:
    """Only an admitted camera may cause verdicts."""
    stranger = bench.camera("cam10", hello=False)
    stranger.frame(0, b"", width=-1)

    bench.until(lambda: bench.refused["no_hello"] == 1, "refusal")


def test_a_hostile_camera_cannot_grow_what_is_kept(bench: Bench) -> None:
    """Thousands of epochs, sequences and messages later there is one small state per name."""
    hostile = bench.camera()
    for epoch in range(300):
        hostile.epoch = epoch
        hostile.send(*wire.pack_hello("cam1", epoch))
        for sequence in (5, 6, 7, 2**60 + epoch):
            hostile.frame(sequence)
        if epoch % 20 == 0:
            bench.until(lambda: bench.refused["over_window"] >= 4 * epoch, "refusals")  # noqa: B023

    bench.until(lambda: bench.refused["over_window"] == 1200, "refusals")

    assert len(bench.source._cameras) == 1
    assert (bench.source.in_flight, bench.source._cameras["cam1"].also_acked) == (0, set())


def test_any_name_is_not_any_number_of_names(make: Callable[..., Bench]) -> None:
    """With `cameras=None` a stranger cannot make a state for every name it invents."""
    bench = make(cameras=None)
    camera = bench.camera("cam1")
    for number in range(MAX_CAMERAS + 5):
        camera.send(*wire.pack_hello(f"x{number}", 1))

    bench.until(lambda: bench.refused["camera_unknown"] == 6, "refusals")

    assert len(bench.source._cameras) == MAX_CAMERAS


def test_a_message_over_the_size_limit_costs_its_sender_the_connection(make: Callable[..., Bench]) -> None:
    """MAXMSGSIZE closes it before the bytes are read; others stay."""
    bench = make(limits=FrameLimits(max_payload_bytes=8192))
    honest, hostile = bench.camera(), bench.camera("cam10")
    hostile.frame(0, bytes(100_000))
    honest.frame(0)

    assert bench.read().id.camera == "cam1"
    with pytest.raises(SourceTimeout):
        bench.source.read(0)


def test_a_port_in_use_is_refused_and_leaves_nothing_open(bench: Bench) -> None:
    """The second daemon on one address."""
    with pytest.raises(ConfigError, match="in use"):
        Bench(bench.source.address)


def test_closing_tells_the_last_state(make: Callable[..., Bench]) -> None:
    """An orderly stop: what was judged to the end is acknowledged before the socket goes."""
    bench = make()
    camera = bench.camera()
    camera.frame(0)
    bench.source.acknowledge([bench.read().id.key])
    got: list[list[bytes]] = []
    reading = threading.Thread(target=lambda: camera.socket.poll(5000) and got.append(camera.socket.recv_multipart()))
    reading.start()

    bench.source.close()

    reading.join(10)
    assert [wire.parse_credit(parts).acked_through for parts in got] == [0]
    with pytest.raises(SourceBroken):
        bench.source.read(0)
    bench.source.acknowledge([("cam1", 7, 0)])


@pytest.mark.parametrize("captured_ns", [-1, 1.7e18, "now", None, 2**63], ids=str)
def test_a_frame_without_a_usable_time_still_gets_its_verdict(bench: Bench, captured_ns: object) -> None:
    """The time names nothing. Refused, the frame would be a hole before which the camera waits for ever."""
    camera = bench.camera()
    camera.frame(0, captured_ns=captured_ns)
    camera.frame(1)

    first, second = bench.read(), bench.read()

    assert isinstance(first, Unreadable) and first.reason == "format" and "captured_ns" in first.detail
    assert (first.id.sequence, first.id.captured_ns) == (0, 0)
    assert isinstance(second, Frame)


def test_a_frame_without_any_time_still_gets_its_verdict(bench: Bench) -> None:
    """As above, with the field left out."""
    camera = bench.camera()
    fields = {"type": "frame", "version": 1, "camera": "cam1", "epoch": 7, "sequence": 0}
    camera.send(json.dumps(fields | {"encoding": "mono8", "width": 4, "height": 3}).encode(), PIXELS)

    found = bench.read()

    assert isinstance(found, Unreadable) and found.id.key == ("cam1", 7, 0)
