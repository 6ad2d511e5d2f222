"""Publisher: events and heads on an XPUB socket.

Owns what is sent to whom and when a head is due; never waits for a subscriber. The event log is the truth, this is the
hint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Final, Self

import zmq

from edge import sockets, wire
from edge.errors import ConfigError, SinkError
from edge.events import DefectEvent
from edge.keys import ServerKeys
from edge.payloads import Buffer
from edge.protocols import Clock

HEAD_INTERVAL_S: Final = 1.0
_BIND_TRIES: Final = 50
_BIND_PAUSE_S: Final = 0.01


class Publisher:
    """A Sink that sends each event once to whoever listens.

    A lock guards the socket, so `publish` may run in the log's writer thread and `tick` in another. `hwm` messages are
    held per subscriber; a slower one loses the rest, which ZeroMQ does not tell here: the subscriber counts the gap.
    `head` is (log epoch, log sequence) at start. With `keys` a `Doorkeeper` of `context` says who may listen.

    Raises:
        ConfigError: the address cannot be used.
    """

    def __init__(
        self,
        address: str,
        line: str,
        clock: Clock,
        *,
        head: tuple[int, int] = (0, 0),
        hwm: int = 32,
        plain_off_host: bool = False,
        context: sockets.Context | None = None,
        keys: ServerKeys | None = None,
        on_bound: Callable[[sockets.Socket], None] = lambda made: None,
    ) -> None:
        self.published = 0
        self.dropped = 0
        """Messages that the socket itself refused; a slow subscriber's losses are not visible here."""
        self.topics = 0
        """Subscribed topics, each counted once however many listen."""
        self._line = wire.check_name(line, "line")
        self._clock = clock
        self._head = head
        self._head_due_ns = clock.monotonic_ns()
        self._lock = threading.Lock()
        self._closed = False
        self._away = False  # between two sockets
        self._open = partial(sockets.xpub, hwm=hwm, plain_off_host=plain_off_host, context=context, keys=keys)
        self._on_bound = on_bound
        self._socket = self._open(address)
        on_bound(self._socket)
        self._address = sockets.bound_address(self._socket)

    @property
    def address(self) -> str:
        """As bound: the port is known where the system chose it."""
        return self._address

    def publish(self, event: DefectEvent, mask_png: bytes | None = None) -> None:
        """Send one event with its mask; returns at once.

        Raises:
            SinkError: the publisher is closed.
        """
        with self._lock:
            self._send(wire.pack_event(event, mask_png))
            self.published += 1
            # A head tells what was published: the log's own head may be ahead of this socket. An event that comes again
            # (its frame was logged before) does not turn the head back.
            if event.log_epoch != self._head[0] or event.log_sequence > self._head[1]:
                self._head = (event.log_epoch, event.log_sequence)

    def emit(self, event: DefectEvent) -> None:
        """`publish` without a mask."""
        self.publish(event)

    def tick(self, state: str = "", fallback: str = "") -> None:
        """Send the head if a second has passed since the last one; call it a few times per second.

        `state` and `fallback` are what the head tells of the daemon.

        Raises:
            SinkError: the publisher is closed.
        """
        with self._lock:
            if self._away:
                self._bind_again()
            self._take_subscriptions()
            now_ns = self._clock.monotonic_ns()
            if now_ns < self._head_due_ns:
                return
            self._head_due_ns = now_ns + round(HEAD_INTERVAL_S * 1e9)
            epoch, sequence = self._head
            self._send(wire.pack_head(wire.Head(wire.WIRE_VERSION, self._line, epoch, sequence, state, fallback[:200])))

    def renew(self) -> None:
        """Cut every subscriber and let in whom the list of peers admits now; what they miss meanwhile, replay gives.

        ZeroMQ cannot end one connection alone. From any thread.
        """
        with self._lock:
            if self._closed:
                return
            self._socket.close(linger=0)
            self._away = True
            for _ in range(_BIND_TRIES):  # libzmq gives the address back in a thread of its own, a moment later
                if self._bind_again():
                    return
                time.sleep(_BIND_PAUSE_S)

    def _bind_again(self) -> bool:
        try:
            self._socket = self._open(self._address)
        except ConfigError:
            return False
        self._on_bound(self._socket)
        self._away, self.topics = False, 0
        return True

    def close(self) -> None:
        """Close the socket; what is under way is given half a second."""
        with self._lock:
            self._closed = True
            self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, parts: list[Buffer]) -> None:
        if self._closed:
            raise SinkError(f"publisher of line {self._line} is closed")
        if self._away:
            self.dropped += 1
            return
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1
        except zmq.ZMQError as error:
            raise SinkError(f"publisher {self._address}: {error.strerror}") from None

    def _take_subscriptions(self) -> None:
        # Unread subscription messages would pile up inside the socket.
        while not self._closed and not self._away and self._socket.poll(0, zmq.POLLIN):
            message = self._socket.recv(zmq.NOBLOCK)
            if message[:1] == b"\x01":
                self.topics += 1
            elif message[:1] == b"\x00":
                self.topics -= 1
