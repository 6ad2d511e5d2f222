"""Doorkeeper: the thread that decides who may connect to the daemon's sockets, and counts who may not.

Owns answering libzmq's question about every key (ZAP, https://rfc.zeromq.org/spec/27/) and reading what the sockets'
monitors tell of handshakes that failed before any key was known. Who may do what is `admission`'s list. It is read
again whenever its file changes, so a camera is admitted or a key replaced without stopping the line; a list that became
unreadable admits nobody new. A key that was taken off the list is refused at its next handshake, and what it sends on a
connection that stands at its next message (`stands`); who only listens is cut (`when_removed`).

pyzmq's own authenticator is not used: its `configure_curve(domain="*")` covers only an empty domain, and it gives every
admitted peer every domain's rights.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Self

import zmq
from zmq.utils import z85

from edge import sockets
from edge.admission import AllowList, Denied, Peer
from edge.errors import ConfigError
from edge.sockets import Context, Owner, Socket

REASONS: Final = ("key_unknown", "not_allowed", "no_key", "wrong_key", "list_unreadable", "malformed", "abandoned")
"""Why a connection did not come about, the labels of `kizu_connections_refused_total`.

`key_unknown`, `not_allowed`: the list of peers says no. `list_unreadable`: nobody could say. `no_key`: the peer speaks
another mechanism than the socket, so it has no keys (it may notice first and leave: `abandoned`). `wrong_key`: it
cannot prove its key, or addresses another daemon's key, or repeats somebody's recorded handshake. `malformed`: what it
sends is no handshake. `abandoned`: it went away or said nothing within the time given.
"""

STEPS: Final = ("accepted", "admitted", "accept_failed")
"""How far a connection came: taken by the system, through its handshake; or not taken at all, for want of descriptors.

libzmq tells nothing of a peer whose first bytes are not its protocol, so such a one is only in `accepted`.
"""

_PROTOCOL_REASONS: Final[Mapping[int, str]] = MappingProxyType(
    {zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: "wrong_key", zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: "no_key"}
)
_POLL_MS: Final = 200
_EVENT_STEPS: Final[Mapping[int, str]] = MappingProxyType(
    {
        zmq.EVENT_ACCEPTED: "accepted",
        zmq.EVENT_HANDSHAKE_SUCCEEDED: "admitted",
        zmq.EVENT_ACCEPT_FAILED: "accept_failed",
    }
)
_MAX_TOLD: Final = 256
_CURVE_PARTS: Final = 7
"""version, request id, domain, address, routing id, mechanism, public key"""

OnRefused = Callable[[str], None]
OnStep = Callable[[str, str], None]
Tell = Callable[[str, Mapping[str, object]], None]


class Doorkeeper:
    """Answers for all sockets of `context` that have keys; open it before them and close it after them.

    `peers` is the list's path, None where sockets have no keys and there is only something to count. `on_refused` gets
    one of REASONS for every connection that does not come about, `on_step` a socket's name and one of STEPS, `tell`
    what was refused in words, once for each new text.

    Raises:
        ConfigError: the list cannot be read.
    """

    def __init__(
        self,
        context: Context,
        peers: Path | None = None,
        *,
        on_refused: OnRefused = lambda reason: None,
        on_step: OnStep = lambda name, step: None,
        tell: Tell = lambda text, fields: None,
    ) -> None:
        self._context = context
        self._path = peers
        self._on_refused = on_refused
        self._on_step = on_step
        self._tell = tell
        self._told: OrderedDict[str, None] = OrderedDict()
        self._seen = _version(peers)
        self._list: AllowList | None = AllowList.load(peers) if peers is not None else AllowList({})
        self._last_good = self._list
        self._removals: list[tuple[str, Callable[[], None]]] = []
        self._questions = sockets.zap(context)
        self._sleeper, self._waker = sockets.wake_pair(context)
        self._doors: dict[Socket, str] = {}
        self._lock = threading.Lock()
        self._new: list[tuple[Socket, str]] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="doorkeeper", daemon=True)
        self._thread.start()

    def names(self, right: str) -> frozenset[str]:
        """Who may do `right` at present."""
        return frozenset() if self._list is None else self._list.names(right)

    def stands(self, owner: Owner, right: str) -> bool:
        """Whether a connection that was admitted still would be; from any thread, cheap enough for every message.

        While the list cannot be read, whoever was on the last one stays.
        """
        found = self._last_good.ask(owner.key, right)
        return isinstance(found, Peer) and found.name == owner.name

    def when_removed(self, right: str, cut: Callable[[], None]) -> None:
        """Call `cut`, in the doorkeeper's thread, whenever a key lost `right`; for sockets whose peers only listen."""
        with self._lock:
            self._removals.append((right, cut))

    def watch(self, made: Socket, name: str) -> None:
        """Count failed handshakes at a bound socket; call it in the socket's own thread, before peers can come."""
        with self._lock:
            self._new.append((sockets.watch_door(made, self._context), name))
        self._wake()

    def close(self) -> None:
        """End the thread; the sockets that it answers for must be closed already."""
        self._closing.set()
        self._wake()
        self._thread.join()
        for one in (self._questions, self._sleeper, self._waker, *self._doors):
            one.close(linger=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wake(self) -> None:
        with self._lock, contextlib.suppress(zmq.Again):  # it is being woken already
            self._waker.send(b"", zmq.NOBLOCK)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        for one in (self._questions, self._sleeper):
            poller.register(one, zmq.POLLIN)
        while not self._closing.is_set():
            for ready, _ in poller.poll(_POLL_MS):
                if ready is self._questions:
                    self._answer()
                elif ready is self._sleeper:
                    self._sleeper.recv()
                elif not self._hear(ready):
                    poller.unregister(ready)
                    del self._doors[ready]
                    ready.close(linger=0)
            self._refresh()
            with self._lock:
                new, self._new = self._new, []
            for door, name in new:
                self._doors[door] = name
                poller.register(door, zmq.POLLIN)

    def _answer(self) -> None:
        """One question of libzmq's, one answer: without it that peer would wait until its handshake's time is over."""
        parts = self._questions.recv_multipart()
        request = parts[1] if len(parts) > 1 else b""
        found = self._judge(parts)
        if isinstance(found, Peer):
            key = _property(sockets.KEY_PROPERTY, found.public_key)
            self._questions.send_multipart([b"1.0", request, b"200", b"OK", found.name.encode(), key])
            return
        # 300, "temporary", ends the connection without a word, and the peer tries again. After 400 libzmq's clients
        # never do, so that a key added to the list would help only whoever is started afterwards.
        self._questions.send_multipart([b"1.0", request, b"300", b"not admitted", b"", b""])
        self._refuse(found.reason, found.detail)

    def _judge(self, parts: list[bytes]) -> Peer | Denied | _Unanswerable:
        if len(parts) != _CURVE_PARTS or parts[0] != b"1.0" or parts[5] != b"CURVE" or len(parts[6]) != 32:
            mechanism = parts[5][:20] if len(parts) > 5 else b""
            return _Unanswerable("malformed", f"question of {len(parts)} parts, mechanism {mechanism!r}")
        self._refresh()
        allowed = self._list
        if allowed is None:
            return _Unanswerable("list_unreadable", f"list of peers {self._path} cannot be read")
        domain, address = parts[2].decode("ascii", "replace"), parts[3].decode("ascii", "replace")
        found = allowed.ask(z85.encode(parts[6]).decode(), domain)
        return Denied(found.reason, f"{address} at {domain}: {found.detail}") if isinstance(found, Denied) else found

    def _refresh(self) -> None:
        """Read the list again if its file changed; there is none while that cannot be read."""
        version = _version(self._path)
        if self._path is None or version == self._seen:
            return
        self._seen = version
        try:
            self._list = AllowList.load(self._path)
        except ConfigError as error:
            self._list = None
            self._tell("list of peers refused: nobody new is admitted", {"error": str(error)})
            return
        before, self._last_good = self._last_good, self._list
        with self._lock:
            removals = list(self._removals)
        for right, cut in removals:
            if gone := before.keys(right) - self._list.keys(right):
                self._tell("keys taken off the list: their connections are cut", {"right": right, "keys": len(gone)})
                cut()

    def _hear(self, door: Socket) -> bool:
        """One event of a monitor; False once its socket is closed."""
        parts = door.recv_multipart()
        event, value = struct.unpack("=HI", parts[0][:6])
        name = self._doors[door]
        if event == zmq.EVENT_MONITOR_STOPPED:
            return False
        if event in _EVENT_STEPS:
            self._on_step(name, _EVENT_STEPS[event])
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            reason = _PROTOCOL_REASONS.get(value, "malformed")
            self._refuse(reason, f"{name}: handshake failed ({reason}, {value:#x})")
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._refuse("abandoned", f"{name}: handshake abandoned ({os.strerror(value)})")
        return True

    def _refuse(self, reason: str, detail: str) -> None:
        self._on_refused(reason)
        if detail not in self._told:  # a peer tries again twice a second; once in the log is enough
            self._told[detail] = None
            if len(self._told) > _MAX_TOLD:
                self._told.popitem(last=False)
            self._tell("connection refused", {"reason": reason, "detail": detail})


def _property(name: str, value: str) -> bytes:
    """One property of a connection as ZMTP writes it: https://rfc.zeromq.org/spec/23/"""
    return bytes([len(name)]) + name.encode() + len(value).to_bytes(4) + value.encode()


class _Unanswerable:
    """A question that the list cannot answer."""

    __slots__ = ("detail", "reason")

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail


def _version(path: Path | None) -> tuple[int, int, int] | None:
    """What changes whenever the file does; None while it is missing."""
    try:
        status = path.stat() if path is not None else None
    except OSError:
        return None
    return None if status is None else (status.st_mtime_ns, status.st_size, status.st_ino)
