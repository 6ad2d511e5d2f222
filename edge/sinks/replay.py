"""ReplayServer: the log's answers to subscribers: events again, and where a registered subscriber stands.

Owns one ROUTER socket and the thread that serves it; the log is read on that thread's own connection and cursors are
written by the log's one writer. A request is answered at once or refused with a reason; nothing waits in here.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import zmq

from edge import sockets, wire
from edge.errors import SinkError, WireError
from edge.keys import ServerKeys
from edge.payloads import Buffer
from edge.sinks.event_log import EventLog
from edge.sockets import Owner
from edge.wire import CursorRequest, CursorState, Gap, Refusal, Refused, ReplayHeader, ReplayRequest

_POLL_MS: Final = 250
_HWM: Final = 32
_MAX_PARTS: Final = 2  # one more than a question has, as evidence
_MAX_SUBSCRIBERS: Final = 256


class ReplayServer:
    """Answers at `address` until closed.

    With `keys` a question is refused once `stands` says that its key would not be admitted any more.
    `on_refused` is told the reason of each message that is refused, `on_failure` why the thread ended unasked.

    Raises:
        ConfigError: the address cannot be used.
    """

    def __init__(
        self,
        address: str,
        log: EventLog,
        *,
        on_refused: Callable[[str], None] = lambda reason: None,
        on_failure: Callable[[str], None] = lambda why: None,
        plain_off_host: bool = False,
        context: sockets.Context | None = None,
        keys: ServerKeys | None = None,
        on_bound: Callable[[sockets.Socket], None] = lambda made: None,
        stands: Callable[[Owner], bool] = lambda owner: True,
    ) -> None:
        self.served = 0
        """Events sent again."""
        self.unanswered = 0
        """Answers that the socket refused: the subscriber is gone, or does not read; it asks again."""
        self._log = log
        self._on_refused = on_refused
        self._on_failure = on_failure
        self._closing = False
        self._keyed = keys is not None
        self._stands = stands
        self._socket = sockets.router(
            address,
            hwm=_HWM,
            max_message_bytes=wire.MAX_HEADER_BYTES,
            plain_off_host=plain_off_host,
            context=context,
            keys=keys,
            domain="replay",
        )
        on_bound(self._socket)
        self._address = sockets.bound_address(self._socket)
        # Cursor answers come from the log's writer thread; the socket is this thread's alone.
        self._answers: deque[tuple[bytes, CursorState]] = deque()
        self._sleeper, self._waker = sockets.wake_pair(context)
        self._wake_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="replay", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """As bound."""
        return self._address

    def close(self) -> None:
        """Stop answering."""
        self._closing = True
        self._wake()
        self._thread.join(5.0)
        with self._wake_lock:
            self._waker.close(linger=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wake(self) -> None:
        with self._wake_lock:
            if not self._waker.closed:
                with contextlib.suppress(zmq.Again):  # it is awake already
                    self._waker.send(b"", zmq.NOBLOCK)

    # --- the server's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            poller = zmq.Poller()
            poller.register(self._socket, zmq.POLLIN)
            poller.register(self._sleeper, zmq.POLLIN)
            while not self._closing:
                ready = dict(poller.poll(_POLL_MS))
                if self._sleeper in ready:
                    self._sleeper.recv(zmq.NOBLOCK)
                while self._answers:
                    peer, state = self._answers.popleft()
                    self._send(peer, wire.pack_message(state))
                if self._socket in ready:
                    self._answer_one()
        # A thread's top: subscribers would wait for ever without a word.
        except Exception as error:
            if not self._closing:
                self._on_failure(f"{type(error).__name__}: {error}")
        finally:
            self._socket.close()
            self._sleeper.close(linger=0)

    def _answer_one(self) -> None:
        owner, peer, parts = self._receive()
        try:
            if self._keyed and not self._stands(owner):
                raise WireError(Refusal.KEY_REMOVED, f"the key of {owner.name} is not on the list of peers any more")
            request = wire.parse_request(parts)
            if self._keyed and isinstance(request, CursorRequest) and request.name != owner.name:
                # Another's cursor moved on would let retention take what its owner has not read.
                raise WireError(Refusal.NAME_NOT_OF_KEY, f"cursor {request.name}, but the key is that of {owner.name}")
        except WireError as error:
            self._on_refused(error.reason)
            self._send(peer, wire.pack_message(Refused(wire.WIRE_VERSION, 0, error.reason, str(error)[:200])))
            return
        try:
            if isinstance(request, ReplayRequest):
                self._replay(peer, request)
            else:
                self._cursor(peer, request)
        except SinkError as error:
            answer = Refused(wire.WIRE_VERSION, request.token, "log", str(error)[:500])
            self._send(peer, wire.pack_message(answer))

    def _receive(self) -> tuple[Owner, bytes, list[Buffer]]:
        """Whose key asks (NOBODY without keys), where the answer goes, and the question; no more parts than it has."""
        first = self._socket.recv(zmq.NOBLOCK, copy=False)
        owner = sockets.owner_of_key(first) if self._keyed else sockets.NOBODY
        parts: list[Buffer] = []
        part = first
        while part.more:
            part = self._socket.recv(zmq.NOBLOCK, copy=False)
            if len(parts) < _MAX_PARTS:
                parts.append(part.bytes)
        return owner, first.bytes, parts

    def _replay(self, peer: bytes, request: ReplayRequest) -> None:
        after = request.log_sequence if request.log_epoch == self._log.epoch else 0
        page = self._log.page(after, request.limit, request.max_bytes)
        gap = Gap(after + 1, page.gap_last) if page.gap_last else None
        header = ReplayHeader(wire.WIRE_VERSION, request.token, page.epoch, page.head, len(page.events), gap)
        self.served += len(page.events)
        self._send(peer, wire.pack_replay(header, page.events))

    def _cursor(self, peer: bytes, request: CursorRequest) -> None:
        known = self._log.cursors()
        if request.name not in known and len(known) >= _MAX_SUBSCRIBERS:
            detail = f"{len(known)} subscribers are registered, no more are admitted; use a name that is"
            self._send(peer, wire.pack_message(Refused(wire.WIRE_VERSION, request.token, "too_many", detail)))
            return
        # A cursor in another epoch is one in a log that is gone: it says nothing about this one.
        moved = request.log_sequence if request.log_epoch == self._log.epoch else None
        start = self._log.head if request.start == "now" else 0

        def durable(cursor: int) -> None:
            log = self._log
            passed = max(0, log.removed_through - cursor)
            state = CursorState(wire.WIRE_VERSION, request.token, request.name, log.epoch, cursor, log.head, passed)
            self._answers.append((peer, state))
            self._wake()

        self._log.move_cursor(request.name, moved, start, durable)

    def _send(self, peer: bytes, parts: list[Buffer]) -> None:
        try:
            self._socket.send_multipart([peer, *parts], zmq.NOBLOCK)
        except zmq.ZMQError:  # EHOSTUNREACH or EAGAIN: it asks again
            self.unanswered += 1
