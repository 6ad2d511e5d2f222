"""Who may connect: every wrong key is refused and counted, and nobody is let in because somebody forgot to ask."""

from __future__ import annotations

import contextlib
import socket as posix
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from edge import series, sockets, wire
from edge.clock import SystemClock
from edge.doorkeeper import REASONS, Doorkeeper
from edge.errors import ConfigError, SourceTimeout
from edge.keys import ClientKeys
from edge.sinks.publisher import Publisher
from edge.sources.zeromq import ZeroMqSource
from edge.types import Frame, Unreadable
from peers import KeyRing

GREETING_AND_HELLO, GREETING_AND_WELCOME = 64 + 202, 64 + 170
"""Bytes of CURVE's first two exchanges, each command with its two bytes of flags and length."""

LOOPBACK = "tcp://127.0.0.1:*"


class Gate:
    """A daemon's two sockets with keys, and a doorkeeper whose counts are kept."""

    def __init__(self, ring: KeyRing) -> None:
        self.ring = ring
        self.refused: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.steps: Counter[tuple[str, str]] = Counter()
        self.told: list[str] = []
        self.context = sockets.new_context()
        self.door = Doorkeeper(
            self.context,
            ring.peers,
            on_refused=lambda reason: self.refused.update([reason]),
            on_step=lambda name, step: self.steps.update([(name, step)]),
            tell=lambda text, fields: self.told.append(f"{text} {dict(fields)}"),
        )
        self.source = ZeroMqSource(
            LOOPBACK,
            SystemClock(),
            cameras=["left", "right"],
            on_refused=lambda reason: self.messages.update([reason]),
            context=self.context,
            keys=ring.server,
            on_bound=lambda made: self.door.watch(made, "frames"),
            stands=lambda owner: self.door.stands(owner, "camera"),
        )
        self.publisher = Publisher(
            LOOPBACK,
            "line-1",
            SystemClock(),
            context=self.context,
            keys=ring.server,
            on_bound=lambda made: self.door.watch(made, "events"),
        )
        self.door.when_removed("subscribe", self.publisher.renew)
        self.clients: list[sockets.Socket] = []

    def knock(self, keys: ClientKeys | None, address: str | None = None) -> sockets.Socket:
        """A camera that connects and says nothing."""
        made = sockets.dealer(address or self.source.address, hwm=8, keys=keys)
        self.clients.append(made)
        return made

    def camera(self, keys: ClientKeys | None, name: str = "left", address: str | None = None) -> None:
        """A camera that comes in, says hello as `name` and sends a frame."""
        speak(self.knock(keys, address), name)

    def read(self, timeout_s: float = 10.0) -> Frame | Unreadable:
        return self.source.read(timeout_s)

    def until(self, done: Callable[[], bool]) -> None:
        """Let the source work until `done`; nobody may send a frame meanwhile."""
        deadline = time.monotonic() + 15
        while not done():
            assert time.monotonic() < deadline, (self.refused, self.messages, self.told)
            with contextlib.suppress(SourceTimeout):
                raise AssertionError(f"a frame came in: {self.source.read(0.02)}")

    def close(self) -> None:
        for one in self.clients:
            one.close(linger=0)
        self.source.close()
        self.publisher.close()
        self.door.close()
        self.context.term()


def speak(camera: sockets.Socket, name: str = "left") -> None:
    assert camera.poll(10_000, zmq.POLLOUT), "not admitted"
    header = wire.FrameHeader(1, name, 7, 0, 0, "mono8", 4, 3)
    for message in (wire.pack_hello(name, 7), wire.pack_frame(header, bytes(12))):
        camera.send_multipart(message, zmq.NOBLOCK)


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path)


@pytest.fixture
def gate(ring: KeyRing) -> Iterator[Gate]:
    made = Gate(ring)
    yield made
    made.close()


def test_a_camera_on_the_list_sends_in_its_own_name(gate: Gate) -> None:
    """The name that the list gives its key is the name in its headers."""
    gate.camera(gate.ring.admit("left", "camera"))

    assert gate.read().id.key == ("left", 7, 0)
    gate.until(lambda: gate.steps == {("frames", "accepted"): 1, ("frames", "admitted"): 1})
    assert not gate.refused and not gate.messages


def test_a_camera_cannot_speak_in_another_cameras_name(gate: Gate) -> None:
    """`right` is admitted, and says that it is `left`: hello and frame are refused and counted."""
    gate.camera(gate.ring.admit("right", "camera"), name="left")

    gate.until(lambda: gate.messages["name_not_of_key"] == 2)


def test_without_the_comparison_of_names_it_could(gate: Gate) -> None:
    """Control: a source that does not ask whose key it is takes the frame."""
    gate.source._keyed = False
    gate.camera(gate.ring.admit("right", "camera"), name="left")

    assert gate.read().id.camera == "left"


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("key_unknown", lambda ring: ring.stranger("left")),
        ("not_allowed", lambda ring: ring.admit("left", "subscribe", "replay")),
        ("no_key", lambda ring: None),
        ("wrong_key", lambda ring: _of_another_daemon(ring, ring.admit("left", "camera"))),
    ],
)
def test_who_may_not_come_in_is_refused_and_counted(
    gate: Gate, reason: str, make: Callable[[KeyRing], ClientKeys | None]
) -> None:
    """A key that nobody knows, one with other rights, none at all, and one for another daemon."""
    gate.knock(make(gate.ring))

    # A plain peer may notice that it is at the wrong door, and leave before we say so.
    expected = {reason, "abandoned"} if reason == "no_key" else {reason}
    gate.until(lambda: gate.refused.total() >= 1)
    assert set(gate.refused) <= expected
    assert any(word in gate.told[0] for word in expected)
    assert gate.steps["frames", "admitted"] == 0


def _of_another_daemon(ring: KeyRing, client: ClientKeys) -> ClientKeys:
    public, _ = zmq.curve_keypair()
    return ClientKeys(client.public, client.secret, public)


def test_a_subscriber_needs_the_right_to_listen(gate: Gate) -> None:
    """A camera's key opens the frames' socket only."""
    keys = {"camera": gate.ring.admit("left", "camera"), "subscribe": gate.ring.admit("dash", "subscribe")}
    gate.clients += [sockets.sub(gate.publisher.address, [b"head/"], hwm=8, keys=key) for key in keys.values()]

    gate.until(lambda: gate.refused["not_allowed"] >= 1)
    deadline = time.monotonic() + 10
    while not gate.clients[1].poll(50):
        gate.publisher.tick()
        assert time.monotonic() < deadline
    assert not gate.clients[0].poll(0)


def test_a_key_that_is_added_later_comes_in_without_any_restart(gate: Gate) -> None:
    """The camera keeps trying, the list is read again."""
    left = gate.ring.stranger("left")
    camera = gate.knock(left)
    gate.until(lambda: gate.refused["key_unknown"] >= 1)

    gate.ring.peers.write_text(f'[[peers]]\nname = "left"\npublic_key = "{left.public.decode()}"\nmay = ["camera"]\n')
    speak(camera)

    assert gate.read().id.camera == "left"


def test_a_list_that_becomes_unreadable_admits_nobody_new(gate: Gate) -> None:
    """Half a list after a slip of the editor must not keep the old rights alive unnoticed."""
    left = gate.ring.admit("left", "camera")
    gate.ring.peers.write_text("[[peers]")
    gate.knock(left)

    gate.until(lambda: gate.refused["list_unreadable"] >= 1)
    assert any("nobody new" in line for line in gate.told)


def again(camera: sockets.Socket, name: str = "left", sequence: int = 1) -> None:
    """Another frame on a connection that stands."""
    header = wire.FrameHeader(1, name, 7, sequence, 0, "mono8", 4, 3)
    camera.send_multipart(wire.pack_frame(header, bytes(12)), zmq.NOBLOCK)


def test_a_key_taken_off_the_list_is_refused_on_the_connection_that_stands(gate: Gate) -> None:
    """No frame of it is judged any more, each is counted, and credits end; put back, it goes on after a HELLO."""
    left = gate.ring.admit("left", "camera")
    list_before = gate.ring.peers.read_text()
    camera = gate.knock(left)
    speak(camera)
    assert gate.read().id.sequence == 0

    gate.ring.take_off("left")
    gate.until(lambda: not gate.door.names("camera"))
    again(camera)
    gate.until(lambda: gate.messages["key_removed"] == 1)
    assert gate.source._cameras["left"].peer is None

    gate.ring.peers.write_text(list_before)
    gate.until(lambda: bool(gate.door.names("camera")))
    camera.send_multipart(wire.pack_hello("left", 7), zmq.NOBLOCK)
    again(camera)
    assert gate.read().id.sequence == 1


def test_without_asking_again_it_would_send_for_ever(gate: Gate) -> None:
    """Control: a source that trusts the handshake takes the frame of a key that is on no list."""
    gate.source._stands = lambda owner: True
    camera = gate.knock(gate.ring.admit("left", "camera"))
    speak(camera)
    gate.read()

    gate.ring.take_off("left")
    gate.until(lambda: not gate.door.names("camera"))
    again(camera)

    assert gate.read().id.sequence == 1


def test_of_two_keys_of_one_name_only_the_removed_one_is_refused(gate: Gate) -> None:
    """A key is replaced without stopping the line: first the new one is added, then the old one is removed."""
    old = gate.knock(gate.ring.admit("left", "camera"))
    speak(old)
    gate.read()
    (gate.ring.folder / "camera-left.key").rename(gate.ring.folder / "old.key")
    (gate.ring.folder / "camera-left.pub").unlink()
    gate.ring.take_off("left")
    new = gate.knock(gate.ring.admit("left", "camera"))
    speak(new)  # the same frame: it is joined to the one in flight
    gate.until(lambda: gate.source.joined == 1)

    again(old)
    gate.until(lambda: gate.messages["key_removed"] == 1)
    again(new)

    assert gate.read().id.sequence == 1


def test_a_removed_subscriber_is_cut_and_the_others_come_back(gate: Gate) -> None:
    """It only listens, so there is no message to refuse: its connection ends, and its next handshake is refused."""
    sub = {name: gate.ring.admit(name, "subscribe") for name in ("dash", "press")}
    heads = {name: sockets.sub(gate.publisher.address, [b"head/"], hwm=8, keys=keys) for name, keys in sub.items()}
    gate.clients += heads.values()

    def hears(name: str, timeout_s: float = 15.0) -> bool:
        while heads[name].poll(0):
            heads[name].recv_multipart()
        deadline = time.monotonic() + timeout_s
        while not heads[name].poll(20):
            gate.publisher.tick()
            if time.monotonic() > deadline:
                return False
        return True

    assert hears("dash") and hears("press")
    gate.ring.take_off("dash")
    gate.until(lambda: gate.refused["key_unknown"] >= 1)

    assert hears("press")
    assert not hears("dash", 1.5)


def test_a_subscriber_that_is_not_cut_would_go_on_listening(gate: Gate) -> None:
    """Control: without `renew` whoever was admitted once hears everything."""
    gate.door._removals.clear()
    dash = sockets.sub(gate.publisher.address, [b"head/"], hwm=8, keys=gate.ring.admit("dash", "subscribe"))
    gate.clients.append(dash)
    gate.until(lambda: gate.steps["events", "admitted"] == 1)
    gate.ring.take_off("dash")
    gate.until(lambda: not gate.door.names("subscribe"))

    deadline = time.monotonic() + 15
    while not dash.poll(20):
        gate.publisher.tick()
        assert time.monotonic() < deadline


def test_without_a_doorkeeper_nobody_comes_in(ring: KeyRing) -> None:
    """A daemon that forgot to open it, or whose thread died, is closed and not open."""
    left = ring.admit("left", "camera")

    assert not _admitted_without_doorkeeper(ring, left, enforce=True)


def test_a_domain_alone_would_let_everybody_in(ring: KeyRing) -> None:
    """Control: what libzmq does where nobody answers and ZAP_ENFORCE_DOMAIN is not set."""
    assert _admitted_without_doorkeeper(ring, ring.stranger("left"), enforce=False)


def _admitted_without_doorkeeper(ring: KeyRing, client: ClientKeys, enforce: bool) -> bool:
    with sockets.new_context() as context:
        router = sockets.router(LOOPBACK, hwm=8, max_message_bytes=1000, context=context, keys=ring.server)
        assert router.getsockopt(zmq.ZAP_ENFORCE_DOMAIN) == 1
        if not enforce:
            router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 0)
            router.bind(LOOPBACK)  # another port, with the options as they are now
        monitor = sockets.watch_door(router, context)
        dealer = sockets.dealer(sockets.bound_address(router), hwm=8, keys=client)
        event = zmq.EVENT_ACCEPTED
        while event == zmq.EVENT_ACCEPTED:
            assert monitor.poll(10_000)
            (event,) = struct.unpack("=H", monitor.recv_multipart()[0][:2])
        for one in (dealer, router, monitor):
            one.close(linger=0)
        return event == zmq.EVENT_HANDSHAKE_SUCCEEDED


class Recorder(threading.Thread):
    """Sits between a camera and the daemon and writes down every byte the camera sends."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.heard = bytearray()
        self._listener = posix.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._daemon_port = port
        self.start()

    def run(self) -> None:
        camera, _ = self._listener.accept()
        daemon = posix.create_connection(("127.0.0.1", self._daemon_port))
        threading.Thread(target=self._pass_on, args=(daemon, camera, None), daemon=True).start()
        self._pass_on(camera, daemon, self.heard)

    @staticmethod
    def _pass_on(source: posix.socket, target: posix.socket, record: bytearray | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if record is not None:
                    record += data
                target.sendall(data)


def test_a_handshake_played_back_is_refused_and_counted(gate: Gate) -> None:
    """Whoever recorded an admitted camera's connection cannot repeat it: the daemon's part is new each time."""
    port = int(gate.source.address.rpartition(":")[2])
    recorder = Recorder(port)
    gate.camera(gate.ring.admit("left", "camera"), address=f"tcp://127.0.0.1:{recorder.port}")
    assert gate.read().id.camera == "left"
    assert not gate.refused

    with posix.create_connection(("127.0.0.1", port)) as thief:
        thief.sendall(bytes(recorder.heard[:GREETING_AND_HELLO]))
        answer = b""
        while len(answer) < GREETING_AND_WELCOME:
            answer += thief.recv(4096)
        thief.sendall(bytes(recorder.heard[GREETING_AND_HELLO:]))
        gate.until(lambda: gate.refused["wrong_key"] >= 1)


def test_what_is_no_handshake_is_refused_and_counted(gate: Gate) -> None:
    """A browser, a scanner and somebody who says nothing; the last one within the handshake's time."""
    port = int(gate.source.address.rpartition(":")[2])
    with contextlib.ExitStack() as peers:
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(200), b""):
            peer = peers.enter_context(posix.create_connection(("127.0.0.1", port)))
            peer.sendall(words)
        gate.until(lambda: gate.steps["frames", "accepted"] == 3 and gate.refused.total() >= 1)

    assert set(gate.refused) <= {"abandoned", "malformed"}
    assert gate.steps["frames", "admitted"] == 0


def test_only_one_can_answer_in_a_context(ring: KeyRing) -> None:
    """Two would each know half of the sockets."""
    with sockets.new_context() as context, Doorkeeper(context, ring.peers), pytest.raises(ConfigError):
        Doorkeeper(context, ring.peers)


def test_a_list_that_cannot_be_read_at_the_start_is_an_error(tmp_path: Path) -> None:
    """Not a line that admits nobody."""
    with sockets.new_context() as context, pytest.raises(ConfigError, match="list of peers"):
        Doorkeeper(context, tmp_path / "none.toml")


def test_metrics_know_every_reason() -> None:
    """An alert sees a zero before the first refusal; metrics may not import the doorkeeper."""
    assert series.CONNECTION_REFUSALS == REASONS


def test_questions_that_are_none_are_answered_all_the_same(ring: KeyRing) -> None:
    """libzmq asks in one form; any other gets a no, so that nothing waits for an answer."""
    refused: Counter[str] = Counter()
    context = sockets.new_context()
    with Doorkeeper(context, ring.peers, on_refused=lambda reason: refused.update([reason])):
        asker: Any = context.socket(zmq.REQ)
        asker.connect(sockets.ZAP_ADDRESS)
        for parts in ([b""], [b"1.0", b"7", b"camera", b"127.0.0.1", b"", b"PLAIN", b"user", b"word"]):
            asker.send_multipart(parts)
            assert asker.poll(10_000)
            assert asker.recv_multipart()[2] == b"300"
        asker.close(linger=0)
    context.term()

    assert refused == {"malformed": 2}
