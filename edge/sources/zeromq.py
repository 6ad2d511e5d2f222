"""ZeroMqSource: cameras' frames through one ROUTER, with credits and acknowledgements.

Owns who may send, what counts as received, duplicates, and the absolute credit state told to each camera. Leaves
message layout to `wire`, socket limits to `sockets`, and what was judged already to the event log.

A camera is bound to the connection of its newest HELLO. Its frames pass these checks in turn: known name, bound
connection and epoch, not in flight, not acknowledged, within the window; only then are pixels looked at. What is kept
per camera is bounded by the window, and there is one state per name, so a hostile peer cannot grow memory here.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

import zmq

from edge import sockets, wire
from edge.errors import ImageRefused, SourceBroken, SourceTimeout, WireError
from edge.keys import ServerKeys
from edge.payloads import FrameLimits
from edge.protocols import Clock
from edge.ring import RingView
from edge.sockets import Owner
from edge.types import Frame, FrameId, Unreadable
from edge.wire import BadFrame, CreditState, Hello, Refusal

FrameKey = tuple[str, int, int]

CREDIT_INTERVAL_S: Final = 0.5
# With `cameras=None` any name is admitted, but not any number of names.
MAX_CAMERAS: Final = 64
_CLOSE_GRACE_S: Final = 0.05
_MAX_PARTS: Final = 3  # routing id, header, payload


@dataclass(slots=True)
class _Camera:
    """What is known of one name: its newest epoch, its connection (None once it is gone) and its verdicts."""

    name: str
    epoch: int
    peer: bytes | None
    acked_through: int
    also_acked: set[int] = field(default_factory=set)
    ring: RingView | None = None

    def acked(self, sequence: int) -> bool:
        return sequence <= self.acked_through or sequence in self.also_acked

    def acknowledge(self, sequence: int) -> None:
        if sequence > self.acked_through:
            self.also_acked.add(sequence)
        while self.acked_through + 1 in self.also_acked:
            self.acked_through += 1
            self.also_acked.remove(self.acked_through)


class ZeroMqSource:
    """A Source. One thread calls `read`, `service` and `close`; `acknowledge` may be called from any thread.

    `cameras` are the admitted names (None: any, at most 64); `window` is how many frames a camera may have
    unacknowledged. `known` and `acked_through` ask the event log, and are called only at a HELLO of an epoch that this
    source does not hold. `on_refused` gets one word of `wire.REFUSALS`, `on_duplicate` and `on_reconnect` the camera's
    name, `on_link` that and whether it is connected, whenever that changed. With `keys` every connection is encrypted,
    a `Doorkeeper` of `context` admits it, a camera speaks only in its key's name, and each message is refused once
    `stands` says that its key would not be admitted any more.

    Raises:
        ConfigError: the address cannot be used.
    """

    def __init__(
        self,
        address: str,
        clock: Clock,
        *,
        cameras: Collection[str] | None,
        window: int = 8,
        known: Callable[[FrameKey], bool] | None = None,
        acked_through: Callable[[str, int], int] | None = None,
        on_refused: Callable[[str], None] | None = None,
        on_duplicate: Callable[[str], None] | None = None,
        on_link: Callable[[str, bool], None] | None = None,
        on_reconnect: Callable[[str], None] = lambda camera: None,
        limits: FrameLimits | None = None,
        plain_off_host: bool = False,
        context: sockets.Context | None = None,
        keys: ServerKeys | None = None,
        on_bound: Callable[[sockets.Socket], None] = lambda made: None,
        stands: Callable[[Owner], bool] = lambda owner: True,
    ) -> None:
        self.duplicates = 0
        """Frames that had a verdict already and were acknowledged again."""
        self.joined = 0
        """Frames that came again while still in flight."""
        self.superseded = 0
        """HELLOs that took a name over from another epoch."""
        self.credits_sent = 0
        self.credits_unreachable = 0
        self.credits_full = 0
        self._clock = clock
        self._names = None if cameras is None else frozenset(wire.check_name(name, "camera") for name in cameras)
        self._window = window
        self._known = known or (lambda key: False)
        self._log_mark = acked_through or (lambda camera, epoch: -1)
        self._on_refused = on_refused or (lambda reason: None)
        self._on_duplicate = on_duplicate or (lambda camera: None)
        self._on_link = on_link or (lambda camera, connected: None)
        self._on_reconnect = on_reconnect
        self._limits = limits or FrameLimits()
        self._keyed = keys is not None
        self._stands = stands
        self._cameras: dict[str, _Camera] = {}
        # Every frame handed out and not yet acknowledged, over all epochs: bounded by the pipeline behind this source.
        self._in_flight: set[FrameKey] = set()
        self._acknowledged: deque[FrameKey] = deque()
        self._credit_due_ns = clock.monotonic_ns()
        self._closed = False
        self._sleeper, self._waker = sockets.wake_pair(context)
        self._waker_lock = threading.Lock()
        try:
            self._socket = sockets.router(
                address,
                # Room for a full window, sent again after a pause, and the greetings around it.
                hwm=2 * window + 8,
                max_message_bytes=max(self._limits.max_payload_bytes, wire.MAX_HEADER_BYTES),
                plain_off_host=plain_off_host,
                context=context,
                keys=keys,
            )
            on_bound(self._socket)
        except BaseException:
            self._sleeper.close(linger=0)
            self._waker.close(linger=0)
            raise
        self._address = sockets.bound_address(self._socket)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._sleeper, zmq.POLLIN)

    @property
    def address(self) -> str:
        """As bound: the port is known where the system chose it."""
        return self._address

    @property
    def in_flight(self) -> int:
        """Frames handed out and not yet acknowledged."""
        return len(self._in_flight)

    def read(self, timeout_s: float) -> Frame | Unreadable:
        """Return the next frame that needs a verdict; meanwhile acknowledge and grant credits.

        Raises:
            SourceTimeout: none came within `timeout_s`.
            SourceBroken: the source is closed or its socket failed.
        """
        deadline_ns = self._clock.monotonic_ns() + round(timeout_s * 1e9)
        while True:
            self.service()
            try:
                found = self._receive()
            except zmq.ZMQError as error:
                raise SourceBroken(f"source {self._address}: {error.strerror}") from None
            if found is not None:
                return found
            now_ns = self._clock.monotonic_ns()
            if now_ns >= deadline_ns:
                raise SourceTimeout(f"source {self._address}: no frame within {timeout_s} s")
            self._sleep((min(deadline_ns, self._credit_due_ns) - now_ns) / 1e6)

    def service(self) -> None:
        """Acknowledge and grant credits without reading; call it while there is no room for another frame.

        Raises:
            SourceBroken: the source is closed.
        """
        if self._closed:
            raise SourceBroken(f"source {self._address} is closed")
        for camera in self._take_acknowledgements():
            self._send_credit(camera)
        now_ns = self._clock.monotonic_ns()
        if now_ns >= self._credit_due_ns:
            self._credit_due_ns = now_ns + round(CREDIT_INTERVAL_S * 1e9)
            for camera in self._cameras.values():
                self._send_credit(camera)

    def acknowledge(self, keys: Iterable[FrameKey]) -> None:
        """Tell that these frames have a durable verdict; from any thread, returns at once."""
        self._acknowledged.extend(keys)
        with self._waker_lock:
            if not self._closed:
                # EAGAIN: a wake-up is under way already, and it will see these keys.
                with contextlib.suppress(zmq.Again):
                    self._waker.send(b"", zmq.NOBLOCK)

    def close(self) -> None:
        """Send the last credit states and close; a camera that misses them repeats its frames to the next daemon."""
        if self._closed:
            return
        self._take_acknowledgements()
        for camera in self._cameras.values():
            self._send_credit(camera)
        if any(camera.peer is not None for camera in self._cameras.values()):
            # A DEALER with IMMEDIATE drops what it has not read when the connection ends; let it read first.
            time.sleep(_CLOSE_GRACE_S)
        with self._waker_lock:
            self._closed = True
            self._waker.close(linger=0)
        self._sleeper.close(linger=0)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- receiving ----------------------------------------------------------------------------------------------------

    def _sleep(self, timeout_ms: float) -> None:
        ready = dict(self._poller.poll(max(1, round(timeout_ms))))
        if self._sleeper in ready:
            while self._sleeper.poll(0):
                self._sleeper.recv(zmq.NOBLOCK)

    def _receive(self) -> Frame | Unreadable | None:
        """Handle messages until one is a frame that needs a verdict, or none is left."""
        # Bounded, so that a peer that floods with refusable messages cannot keep acknowledgements from leaving.
        for _ in range(256):
            received = self._receive_parts()
            if received is None:
                return None
            owner, parts = received
            peer, message = bytes(parts[0]), parts[1:]
            try:
                found = self._handle(peer, message, owner)
            except WireError as refused:
                self._on_refused(refused.reason)
                continue
            if found is not None:
                return found
        return None

    def _receive_parts(self) -> tuple[Owner, list[memoryview]] | None:
        """Whose key sent the next message (NOBODY without keys), and its parts.

        One part more than any message has is kept as evidence, the rest is dropped at once.
        """
        try:
            part = self._socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        owner = sockets.owner_of_key(part) if self._keyed else sockets.NOBODY
        parts = [part.buffer]
        while part.more:
            part = self._socket.recv(zmq.NOBLOCK, copy=False)
            if len(parts) <= _MAX_PARTS:
                parts.append(part.buffer)
        return owner, parts

    def _handle(self, peer: bytes, message: list[memoryview], owner: Owner) -> Frame | Unreadable | None:
        if self._keyed and not self._stands(owner):
            self._cut(peer)
            raise WireError(Refusal.KEY_REMOVED, f"the key of {owner.name} is not on the list of peers any more")
        header = wire.parse_camera_message(message)
        name = header.camera if isinstance(header, Hello) else header.id.camera
        if self._keyed and name != owner.name:
            raise WireError(Refusal.NAME_NOT_OF_KEY, f"camera {name}, but its key is that of {owner.name}")
        if isinstance(header, Hello):
            self._admit(peer, header)
            return None
        if not self._is_new(peer, header.id):
            return None
        self._in_flight.add(header.id.key)
        received_ns = self._clock.monotonic_ns()
        if isinstance(header, BadFrame):
            return Unreadable(header.id, header.reason, header.detail, received_ns)
        ring = self._cameras[header.camera].ring
        return wire.read_frame(header, message[1], self._limits, received_ns, ring)

    def _admit(self, peer: bytes, hello: Hello) -> None:
        self._check_camera(hello.camera)
        camera = self._cameras.get(hello.camera)
        # HELLO is repeated after a silence; on the same connection that is no other camera.
        if camera is not None and (camera.epoch, camera.peer) != (hello.epoch, peer):
            self._on_reconnect(hello.camera)
        if camera is None or camera.epoch != hello.epoch:
            self.superseded += camera is not None
            peer_before = None if camera is None else camera.peer
            camera = self._remember(hello, peer_before)
            self._cameras[hello.camera] = camera
        if camera.peer is None:
            self._on_link(camera.name, True)
        camera.peer = peer
        camera.ring = self._open_ring(hello)
        self._send_credit(camera)

    def _cut(self, peer: bytes) -> None:
        """Tell this connection nothing more."""
        for camera in self._cameras.values():
            if camera.peer == peer:
                camera.peer = None
                self._on_link(camera.name, False)

    def _open_ring(self, hello: Hello) -> RingView | None:
        """The camera's ring; without one that can be trusted, its frames there are INCONCLUSIVE(unreadable)."""
        # Whoever is on another host, or may be, must not name memory of this one.
        if hello.ring is None or not self._address.startswith("ipc://"):
            return None
        try:
            return RingView(hello.ring)
        except ImageRefused:
            return None

    def _remember(self, hello: Hello, peer: bytes | None) -> _Camera:
        """Start from what the log knows, which after a restart of the daemon is more than nothing."""
        mark = self._log_mark(hello.camera, hello.epoch)
        ahead = range(mark + 2, mark + 1 + self._window)
        also = {sequence for sequence in ahead if self._known((hello.camera, hello.epoch, sequence))}
        return _Camera(hello.camera, hello.epoch, peer, mark, also)

    def _check_camera(self, name: str) -> None:
        known_name = (
            name in self._cameras or len(self._cameras) < MAX_CAMERAS if self._names is None else name in self._names
        )
        if not known_name:
            raise WireError(Refusal.CAMERA_UNKNOWN, f"camera {name!r} is not configured")

    def _is_new(self, peer: bytes, frame: FrameId) -> bool:
        """Whether the frame needs a verdict; a duplicate is acknowledged again or joined to the one in flight.

        Raises:
            WireError: its camera or connection is not admitted, or it is beyond the window.
        """
        self._check_camera(frame.camera)
        camera = self._cameras.get(frame.camera)
        if camera is None or (camera.epoch == frame.epoch and camera.peer != peer):
            # An honest camera whose connection was renewed without its noticing: window 0 makes it say HELLO again.
            self._send(peer, CreditState(wire.WIRE_VERSION, frame.camera, frame.epoch, -1, (), 0))
            raise WireError(Refusal.NO_HELLO, f"frame of camera {frame.camera} on a connection that did not say hello")
        if camera.epoch != frame.epoch:
            # Not answered, or two cameras of one name would drive each other out without a pause.
            raise WireError(
                Refusal.SUPERSEDED, f"camera {frame.camera} epoch {frame.epoch}: a newer hello took its name"
            )
        if frame.key in self._in_flight:
            self.joined += 1
            self._on_duplicate(frame.camera)
            return False
        if camera.acked(frame.sequence):
            self.duplicates += 1
            self._on_duplicate(frame.camera)
            self._send_credit(camera)
            return False
        if frame.sequence > camera.acked_through + self._window:
            raise WireError(Refusal.OVER_WINDOW, f"camera {frame.camera} sent {frame.sequence} beyond its window")
        return True

    # --- credits ------------------------------------------------------------------------------------------------------

    def _take_acknowledgements(self) -> list[_Camera]:
        """Move what other threads acknowledged into the cameras' states; return those that changed."""
        changed: dict[str, _Camera] = {}
        while self._acknowledged:
            key = self._acknowledged.popleft()
            if key not in self._in_flight:
                continue
            self._in_flight.remove(key)
            name, epoch, sequence = key
            camera = self._cameras.get(name)
            if camera is not None and camera.epoch == epoch:
                camera.acknowledge(sequence)
                changed[name] = camera
        return list(changed.values())

    def _send_credit(self, camera: _Camera) -> None:
        if camera.peer is None:
            return
        also = tuple(sorted(camera.also_acked))
        state = CreditState(wire.WIRE_VERSION, camera.name, camera.epoch, camera.acked_through, also, self._window)
        if not self._send(camera.peer, state):
            camera.peer = None
            self._on_link(camera.name, False)

    def _send(self, peer: bytes, state: CreditState) -> bool:
        """Send one state; False if the peer is gone. A full peer misses this one and is healed by the next."""
        try:
            self._socket.send_multipart([peer, *wire.pack_credit(state)], zmq.NOBLOCK)
            self.credits_sent += 1
        except zmq.Again:
            self.credits_full += 1
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise SourceBroken(f"source {self._address}: {error.strerror}") from None
            self.credits_unreachable += 1
            return False
        return True
