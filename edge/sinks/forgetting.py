"""Forgetting a registered subscriber whose program is gone for good, in a running line or in a log that rests.

Owns the question to the daemon's control socket and its answer. The name itself goes by the log's one writer. A
subscriber that still runs registers again with its next question; nothing that it could have got is lost by that.

    request   {"ask": "forget", "name": NAME}
    answer    {"was_at": CURSOR or null, "registered": [NAME, ...], "error": TEXT}
"""

from __future__ import annotations

import threading
from typing import Final

import msgspec
import zmq

from edge import sockets
from edge.errors import CommandError, LogError, SinkError
from edge.sinks.event_log import EventLog

FORGET: Final = "forget"
_LISTENS_S: Final = 3.0
_DURABLE_S: Final = 20.0


class ForgetRequest(msgspec.Struct, frozen=True):
    """What `kizu log forget` asks the daemon."""

    name: str
    ask: str = FORGET


class Forgotten(msgspec.Struct, frozen=True):
    """`was_at` is the cursor that is gone, None where nobody had that name; `registered` are those that stay."""

    was_at: int | None = None
    registered: tuple[str, ...] = ()
    error: str = ""


def forget(log: EventLog, name: str) -> Forgotten:
    """Take `name` off the list; returns when that is durable.

    Raises:
        SinkFull, LogError: it could not be written.
    """
    done = threading.Event()
    found: list[int] = []

    def durable(cursor: int) -> None:
        found.append(cursor)
        done.set()

    log.forget(name, durable)
    if not done.wait(_DURABLE_S):
        raise LogError(log.failed or f"the log did not write it within {_DURABLE_S:g} s")
    return Forgotten(None if found[0] < 0 else found[0], tuple(sorted(log.cursors())))


def answer(log: EventLog, request: bytes) -> bytes:
    """The daemon's answer to a ForgetRequest, whatever it is."""
    try:
        told = forget(log, msgspec.json.decode(request, type=ForgetRequest).name)
    except (msgspec.DecodeError, UnicodeDecodeError, SinkError) as error:
        told = Forgotten(error=str(error))
    return msgspec.json.encode(told)


def ask_daemon(address: str, name: str) -> Forgotten | None:
    """Let the daemon at the control `address` do it; None if nobody listens there.

    Raises:
        LogError: it could not.
        CommandError: it does not answer.
    """
    socket = sockets.dealer(address, hwm=8)
    try:
        if not socket.poll(round(_LISTENS_S * 1e3), zmq.POLLOUT):
            return None
        socket.send(msgspec.json.encode(ForgetRequest(name)), zmq.NOBLOCK)
        if not socket.poll(round(2 * _DURABLE_S * 1e3)):
            raise CommandError(f"the daemon at {address} does not answer; it may be at a swap: try again after that")
        told = msgspec.json.decode(socket.recv(zmq.NOBLOCK), type=Forgotten)
    except msgspec.DecodeError:
        raise CommandError(f"the daemon at {address} does not understand; is it of an older version?") from None
    finally:
        socket.close()
    if told.error:
        raise LogError(told.error)
    return told
