"""CameraSender against a real source and a real log: credits, lost answers, restarts, a full window."""

from __future__ import annotations

import socket as posix
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge import sockets, wire
from edge.clock import ManualClock, SystemClock
from edge.errors import SinkFull, SourceTimeout, WireError
from edge.events import DefectEvent
from edge.sender import CameraSender
from edge.sinks.event_log import EventLog
from edge.sources.zeromq import ZeroMqSource
from edge.types import FrameId
from sample_events import sample_event

IMAGE = np.arange(12, dtype=np.uint8).reshape(3, 4)


def verdict(frame: FrameId) -> DefectEvent:
    return sample_event(frame.sequence, frame.camera, camera_epoch=frame.epoch, captured_ns=frame.captured_ns)


class MiniDaemon:
    """Source and log in one thread: every frame gets a verdict, and its acknowledgement once that is durable."""

    def __init__(self, log_path: Path, address: str = "tcp://127.0.0.1:*", window: int = 4) -> None:
        clock = SystemClock()
        self.log = EventLog(log_path, clock)
        self.refused: Counter[str] = Counter()
        self.judged: Counter[tuple[str, int, int]] = Counter()
        self.source = ZeroMqSource(
            address,
            clock,
            cameras=["cam1", "cam2"],
            window=window,
            known=self.log.contains,
            acked_through=self.log.acked_through,
            on_refused=lambda reason: self.refused.update([reason]),
        )
        self.address = self.source.address
        self.paused = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                frame = self.source.read(0.02)
            except SourceTimeout:
                continue
            self.judged[frame.id.key] += 1
            if not self.paused.is_set():
                self.log.append(verdict(frame.id), None, self._acknowledge)

    def _acknowledge(self, committed: DefectEvent) -> None:
        self.source.acknowledge([(committed.camera, committed.camera_epoch, committed.frame_sequence)])

    def logged(self) -> list[tuple[str, int]]:
        return [(event.camera, event.frame_sequence) for event, _ in self.log.read_since(0, 100_000)]

    def stop(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join(10)
            self.log.close()
            self.source.close()


StartDaemon = Callable[..., MiniDaemon]


def wait_until_free(address: str) -> None:
    """libzmq gives a port back in a thread of its own, a moment after `close`."""
    host, port = address.removeprefix("tcp://").split(":")
    for _ in range(500):
        try:
            posix.create_server((host, int(port))).close()
            return
        except OSError:
            time.sleep(0.01)
    raise AssertionError(f"{address} is still in use")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartDaemon]:
    running: list[MiniDaemon] = []

    def build(log: str = "events.db", **options: Any) -> MiniDaemon:
        if "address" in options:
            wait_until_free(options["address"])
        running.append(MiniDaemon(tmp_path / log, **options))
        return running[-1]

    yield build
    for daemon in running:
        daemon.stop()


def test_every_frame_is_judged_once_and_acknowledged(start: StartDaemon) -> None:
    """Two cameras, more frames than the window, nothing lost and nothing sent twice."""
    daemon = start()
    with CameraSender(daemon.address, "cam1") as one, CameraSender(daemon.address, "cam2") as two:
        for _ in range(100):
            one.send(IMAGE, encoding="raw")
            two.send(IMAGE)

        assert (one.drain(10), two.drain(10)) == (0, 0)
        assert (one.sent, one.resent, one.acknowledged) == (100, 0, 100)
    assert sorted(daemon.logged()) == [(name, number) for name in ("cam1", "cam2") for number in range(100)]
    assert not daemon.refused


def test_ids_count_from_zero_within_a_random_epoch(start: StartDaemon) -> None:
    """`captured_ns` is what the caller measured."""
    daemon = start()
    with CameraSender(daemon.address, "cam1") as camera, CameraSender(daemon.address, "cam2") as other:
        ids = [camera.send(IMAGE, captured_ns=100 + number) for number in range(3)]

        assert [(i.epoch, i.sequence, i.captured_ns) for i in ids] == [(camera.epoch, n, 100 + n) for n in range(3)]
        assert 0 <= camera.epoch < 2**53 and camera.epoch != other.epoch


def test_without_a_daemon_send_gives_up_in_time_and_says_what_to_check() -> None:
    """Bounded waiting; the frame was not taken."""
    with CameraSender("tcp://127.0.0.1:9", "cam1") as camera:
        with pytest.raises(SinkFull, match="is the daemon running"):
            camera.send(IMAGE, timeout_s=0.05)
        assert camera.left == 0


def test_an_unconfigured_camera_is_never_admitted(start: StartDaemon) -> None:
    """The daemon does not answer its HELLO."""
    daemon = start()
    with CameraSender(daemon.address, "cam9") as camera, pytest.raises(SinkFull, match="not admitted this camera"):
        camera.send(IMAGE, timeout_s=0.2)


def test_a_malformed_name_is_refused_at_once() -> None:
    """Before anything is sent."""
    with pytest.raises(WireError):
        CameraSender("tcp://127.0.0.1:9", "Cam 1")


def test_the_window_holds_a_camera_back(start: StartDaemon) -> None:
    """The daemon does not acknowledge: after four frames the fifth waits, and goes once the verdicts come."""
    daemon = start()
    daemon.paused.set()
    with CameraSender(daemon.address, "cam1") as camera:
        for _ in range(4):
            camera.send(IMAGE)

        with pytest.raises(SinkFull, match="4 frames unacknowledged"):
            camera.send(IMAGE, timeout_s=0.1)
        assert (camera.left, daemon.refused) == (4, {})


def test_after_a_restart_what_was_not_acknowledged_comes_again(start: StartDaemon) -> None:
    """The first daemon took frames and died before their verdicts; the second, on its log, judges exactly those."""
    first = start()
    with CameraSender(first.address, "cam1", resend_after_s=0.5) as camera:
        for _ in range(10):
            camera.send(IMAGE)
        assert camera.drain(10) == 0
        first.paused.set()
        for _ in range(4):
            camera.send(IMAGE)
        first.stop()
        second = start(address=first.address)

        assert camera.drain(10) == 0
        assert camera.resent >= 1 and camera.acknowledged == 14
    assert second.logged() == [("cam1", number) for number in range(14)]
    assert all(sequence >= 10 for _, _, sequence in second.judged)


def test_a_frame_sent_while_the_daemon_was_away_arrives_later(start: StartDaemon) -> None:
    """Lost with the old connection or refused on the new one for want of a HELLO, it is repeated either way."""
    first = start()
    with CameraSender(first.address, "cam1", resend_after_s=0.5) as camera:
        camera.send(IMAGE)
        assert camera.drain(10) == 0
        first.stop()
        camera.send(IMAGE, timeout_s=10)
        second = start(address=first.address)

        assert camera.drain(10) == 0
    assert second.logged() == [("cam1", 0), ("cam1", 1)]


def test_a_daemon_that_lost_its_log_gets_a_new_epoch(start: StartDaemon) -> None:
    """It waits for frame 0 of an epoch whose first frames nobody keeps; the camera begins anew instead of waiting."""
    first = start()
    with CameraSender(first.address, "cam1", resend_after_s=0.5) as camera:
        before = camera.epoch
        for _ in range(6):
            camera.send(IMAGE)
        assert camera.drain(10) == 0
        first.stop()
        second = start(log="other.db", address=first.address)
        camera.send(IMAGE, timeout_s=10)

        assert camera.drain(10) == 0
        assert camera.epoch != before
    assert second.logged() == [("cam1", 0)]


class Silent:
    """A daemon's socket that says only what the test tells it to say."""

    def __init__(self) -> None:
        self.socket = sockets.router("tcp://127.0.0.1:*", hwm=64, max_message_bytes=1 << 20)
        self.address = sockets.bound_address(self.socket)
        self.peer = b""

    def heard(self, camera: CameraSender) -> str:
        """The next message as `hello` or the frame's sequence, while the camera is pumped."""
        for _ in range(1000):
            camera.pump()
            if self.socket.poll(5):
                self.peer, *parts = self.socket.recv_multipart()
                message = wire.parse_camera_message(parts)
                return "hello" if isinstance(message, wire.Hello) else str(message.id.sequence)
        raise AssertionError("nothing was heard")

    def credit(self, camera: CameraSender, acked_through: int, *also: int, window: int = 4) -> None:
        state = wire.CreditState(1, camera.camera, camera.epoch, acked_through, also, window)
        self.socket.send_multipart([self.peer, *wire.pack_credit(state)])
        assert camera._socket.poll(5000)
        camera.pump()


@pytest.fixture
def silent() -> Iterator[Silent]:
    made = Silent()
    yield made
    made.socket.close(linger=0)


def test_two_seconds_of_silence_repeat_hello_and_what_is_unacknowledged(silent: Silent) -> None:
    """Acknowledged frames, also those out of order, are not repeated; nothing happens a moment before."""
    clock = ManualClock()
    with CameraSender(silent.address, "cam1", clock=clock) as camera:
        assert silent.heard(camera) == "hello"
        silent.credit(camera, -1)
        for _ in range(4):
            camera.send(IMAGE)
        assert [silent.heard(camera) for _ in range(4)] == ["0", "1", "2", "3"]
        silent.credit(camera, 0, 2)
        clock.advance(1.999)
        camera.pump()
        assert not silent.socket.poll(50)
        clock.advance(0.001)

        assert silent.heard(camera) == "hello"
        silent.credit(camera, 0, 2)
        assert [silent.heard(camera) for _ in range(2)] == ["1", "3"]
        assert (camera.acknowledged, camera.left, camera.resent) == (2, 2, 2)


def test_a_hello_that_nobody_answers_is_repeated_sooner(silent: Silent) -> None:
    """It may have gone into a connection that was dead already; half a second, not two."""
    clock = ManualClock()
    with CameraSender(silent.address, "cam1", clock=clock) as camera:
        assert silent.heard(camera) == "hello" and not camera.in_touch
        clock.advance(0.5)

        assert silent.heard(camera) == "hello"
        silent.credit(camera, -1)
        assert camera.in_touch


def test_a_camera_that_never_repeats_would_be_noticed(silent: Silent) -> None:
    """Control: with the patience of an hour, the silence above ends in nothing."""
    clock = ManualClock()
    with CameraSender(silent.address, "cam1", clock=clock, resend_after_s=3600) as camera:
        assert silent.heard(camera) == "hello"
        silent.credit(camera, -1)
        clock.advance(2)
        camera.pump()

        assert not silent.socket.poll(50)


def test_a_closed_window_brings_one_hello_however_often_it_is_told(silent: Silent) -> None:
    """Each frame under way to a restarted daemon brings the same answer; four answers, one HELLO."""
    with CameraSender(silent.address, "cam1", clock=ManualClock()) as camera:
        assert silent.heard(camera) == "hello"
        silent.credit(camera, -1)
        for _ in range(2):
            camera.send(IMAGE)
        assert [silent.heard(camera) for _ in range(2)] == ["0", "1"]
        for _ in range(2):
            silent.credit(camera, -1, window=0)
        silent.credit(camera, -1)

        assert [silent.heard(camera) for _ in range(3)] == ["hello", "0", "1"]
        assert not silent.socket.poll(50)


def test_credits_of_another_epoch_and_noise_are_ignored(silent: Silent) -> None:
    """A stale answer to the camera's former life must not acknowledge anything."""
    with CameraSender(silent.address, "cam1", clock=ManualClock()) as camera:
        assert silent.heard(camera) == "hello"
        silent.credit(camera, -1)
        camera.send(IMAGE)
        stale = wire.CreditState(1, "cam1", camera.epoch + 1, 10, (), 4)
        for parts in (wire.pack_credit(stale), [b"noise"], [b"{}", b"{}"]):
            silent.heard(camera) if not silent.peer else None
            silent.socket.send_multipart([silent.peer, *parts])
        for _ in range(20):
            camera.pump()
            camera._socket.poll(5)

        assert (camera.left, camera.acknowledged) == (1, 0)


def test_drain_says_how_many_are_left(silent: Silent) -> None:
    """`kizu send` exits with 1 when it is not zero."""
    with CameraSender(silent.address, "cam1") as camera:
        assert silent.heard(camera) == "hello"
        silent.credit(camera, -1)
        for _ in range(3):
            camera.send(IMAGE)

        assert camera.drain(0.05) == 3
