"""ReplayClient: asks the log for events again and tells it how far a registered subscriber has come.

Owns one DEALER socket, tokens and the waiting for an answer; what the events mean to a follower is `client`'s.
"""

from __future__ import annotations

from typing import Final, Literal

import zmq

from edge import sockets, wire
from edge.errors import SourceBroken, SourceTimeout, WireError
from edge.keys import ClientKeys
from edge.protocols import Clock
from edge.wire import CursorRequest, CursorState, LoggedEvent, Refused, ReplayHeader, ReplayRequest

_HWM: Final = 4


class ReplayClient:
    """One thread; one question at a time. An answer that comes too late is recognized by its token and dropped.

    Raises:
        ConfigError: the address cannot be used.
    """

    def __init__(
        self,
        address: str,
        clock: Clock,
        *,
        plain_off_host: bool = False,
        context: sockets.Context | None = None,
        keys: ClientKeys | None = None,
    ) -> None:
        self._address = address
        self._clock = clock
        self._token = 0
        self._socket = sockets.dealer(
            address,
            hwm=_HWM,
            plain_off_host=plain_off_host,
            context=context,
            keys=keys,
            max_message_bytes=wire.MAX_MASK_BYTES,
        )

    def events_after(
        self, log_epoch: int, log_sequence: int, timeout_s: float, limit: int = 256
    ) -> tuple[ReplayHeader, list[LoggedEvent]]:
        """What follows that place in the log, or what the log begins with if it is another log.

        Raises:
            SourceTimeout: no answer within `timeout_s`.
            SourceBroken: the log refused, or the client is closed.
        """
        self._token += 1
        request = ReplayRequest(wire.WIRE_VERSION, self._token, log_epoch, log_sequence, limit)
        answer = self._ask(request, timeout_s)
        if not isinstance(answer, tuple):
            raise SourceBroken(f"replay {self._address}: answered a replay with {type(answer).__name__}")
        return answer

    def cursor(
        self,
        name: str,
        timeout_s: float,
        *,
        at: tuple[int, int] | None = None,
        start: Literal["beginning", "now"] = "beginning",
    ) -> CursorState:
        """Where `name` durably stands; `at` moves it to (log epoch, log sequence) first, `start` is for a new name.

        Raises:
            SourceTimeout, SourceBroken: as `events_after`.
        """
        self._token += 1
        epoch, sequence = at or (0, 0)
        request = CursorRequest(wire.WIRE_VERSION, self._token, name, epoch, sequence, start)
        answer = self._ask(request, timeout_s)
        if not isinstance(answer, CursorState):
            raise SourceBroken(f"replay {self._address}: answered a cursor with something else")
        return answer

    def close(self) -> None:
        """Close the socket."""
        self._socket.close(linger=0)

    def _ask(
        self, request: ReplayRequest | CursorRequest, timeout_s: float
    ) -> tuple[ReplayHeader, list[LoggedEvent]] | CursorState:
        deadline_ns = self._clock.monotonic_ns() + round(timeout_s * 1e9)
        try:
            if not self._socket.poll(self._left_ms(deadline_ns), zmq.POLLOUT):
                raise SourceTimeout(f"replay {self._address}: nobody there within {timeout_s} s")
            self._socket.send_multipart(wire.pack_message(request), zmq.NOBLOCK)
            while self._socket.poll(self._left_ms(deadline_ns)):
                answer = self._matching(self._socket.recv_multipart(zmq.NOBLOCK))
                if answer is not None:
                    return answer
        except zmq.Again:
            pass
        except zmq.ZMQError as error:
            raise SourceBroken(f"replay {self._address}: {error.strerror}") from None
        raise SourceTimeout(f"replay {self._address}: no answer within {timeout_s} s")

    def _matching(self, parts: list[bytes]) -> tuple[ReplayHeader, list[LoggedEvent]] | CursorState | None:
        """The answer to the present question; None for a late one or for what is no answer."""
        try:
            answer = wire.parse_answer(parts)
        except WireError:
            return None
        token = answer[0].token if isinstance(answer, tuple) else answer.token
        # What could not be read at all is refused without a token.
        if token != self._token and not (isinstance(answer, Refused) and token == 0):
            return None
        if isinstance(answer, Refused):
            raise SourceBroken(f"replay {self._address}: refused, {answer.reason}: {answer.detail}")
        return answer

    def _left_ms(self, deadline_ns: int) -> int:
        return max(0, (deadline_ns - self._clock.monotonic_ns() + 999_999) // 1_000_000)
