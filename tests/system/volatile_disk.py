"""A disk with a volatile write cache, an NBD server: what was not flushed when the power goes is lost, or some of it.

Owns the cache and the cut; speaks the fixed newstyle handshake and simple replies on a Unix socket, for one client at a
time (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md). Writes stay in memory until a FLUSH. At the
cut each of their 512-byte sectors reaches the image or not, by chance: real disks keep no order without a FLUSH, and
tear writes at sectors. Neither the host's page cache nor qemu's keeps anything alive that a disk would have lost.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import Final, Self

SECTOR: Final = 512
_GREETING: Final = b"NBDMAGIC" + struct.pack(">QH", 0x49484156454F5054, 3)  # fixed newstyle, no zeroes
_OPTION_REPLY: Final = 0x3E889045565A9
_ACK, _INFO, _UNSUPPORTED = 1, 3, 0x80000001
_EXPORT_NAME, _GO, _ABORT = 1, 7, 2
_READ, _WRITE, _DISCONNECT, _FLUSH = 0, 1, 2, 3
_FLAGS: Final = 1 | 4  # has flags, sends FLUSH; no FUA: the client makes one of a FLUSH
_EINVAL: Final = 22


class VolatileDisk:
    """Serves the image at `path` on the Unix socket `address` until closed or cut."""

    def __init__(self, path: Path, address: Path) -> None:
        self.flushes = 0
        self.gone = threading.Event()
        self.cached = self.survived = 0
        """Sectors that were in the cache when the power went, and those of them that reached the disk."""
        self._armed: tuple[int, random.Random, float] | None = None
        self._path = path
        self._size = path.stat().st_size
        self._seen = bytearray(path.read_bytes())  # what the machine reads: durable and cached together
        self._unflushed: dict[int, bytes] = {}  # sector -> its newest bytes, never more than was written since a flush
        self._lock = threading.Lock()
        self._image = path.open("r+b", buffering=0)
        self._dead = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(address))
        self._listener.listen(1)
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def cut_after(self, requests: int, rng: random.Random, survives: float) -> None:
        """Let the power go at that many writes and flushes from now on, in the midst of the last one.

        From then on no request is answered, `gone` is set, and each cached sector survives with that probability.
        """
        with self._lock:
            self._armed = (requests, rng, survives)

    def _count_down(self) -> None:
        if self._armed is None:
            return
        left, rng, survives = self._armed
        self._armed = (left - 1, rng, survives)
        if left <= 1:
            self._dead = True
            kept = [sector for sector in self._unflushed if rng.random() < survives]
            for sector in kept:
                self._persist(sector)
            self.cached, self.survived = len(self._unflushed), len(kept)
            self.gone.set()

    def close(self) -> None:
        """End serving; what is in the cache is lost altogether."""
        with self._lock:
            self._dead = True
        for one in (self._client, self._listener):
            if one is not None:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
        self._thread.join(10)
        self._image.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _persist(self, sector: int) -> None:
        self._image.seek(sector * SECTOR)
        self._image.write(self._unflushed[sector])

    # --- the protocol -------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._client, _ = self._listener.accept()
            if self._negotiate(self._client):
                while self._answer(self._client):
                    pass
        except OSError:  # the machine is gone, or we are
            return

    def _negotiate(self, client: socket.socket) -> bool:
        client.sendall(_GREETING)
        _exactly(client, 4)
        while True:
            _, option, length = struct.unpack(">QII", _exactly(client, 16))
            _exactly(client, length)
            if option == _EXPORT_NAME:
                client.sendall(struct.pack(">QH", self._size, _FLAGS))
                return True
            if option == _GO:
                export = struct.pack(">HQH", 0, self._size, _FLAGS)
                client.sendall(_option_reply(option, _INFO, export) + _option_reply(option, _ACK))
                return True
            client.sendall(_option_reply(option, _ACK if option == _ABORT else _UNSUPPORTED))
            if option == _ABORT:
                return False

    def _answer(self, client: socket.socket) -> bool:
        """One request, one reply; False at the end."""
        _, _, kind, handle, offset, length = struct.unpack(">IHHQQI", _exactly(client, 28))
        given = _exactly(client, length) if kind == _WRITE else b""
        with self._lock:
            if self._dead or kind == _DISCONNECT:
                return False
            if kind == _FLUSH:  # the power goes before it does anything, but after a write reached the cache
                self._count_down()
            if not self._dead:
                error, answer = self._do(kind, offset, length, given)
            if kind == _WRITE:
                self._count_down()
            if self._dead:  # no answer and no error: a machine without power does not notice
                return False
        client.sendall(struct.pack(">IIQ", 0x67446698, error, handle) + answer)
        return True

    def _do(self, kind: int, offset: int, length: int, given: bytes) -> tuple[int, bytes]:
        if kind == _FLUSH:
            self.flushes += 1
            for sector in self._unflushed:
                self._persist(sector)
            self._unflushed.clear()
            return 0, b""
        if offset + length > self._size or offset % SECTOR or length % SECTOR or kind not in (_READ, _WRITE):
            return _EINVAL, b""
        if kind == _READ:
            return 0, bytes(self._seen[offset : offset + length])
        self._seen[offset : offset + length] = given
        for at in range(0, length, SECTOR):
            self._unflushed[(offset + at) // SECTOR] = given[at : at + SECTOR]
        return 0, b""


def _option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", _OPTION_REPLY, option, kind, len(data)) + data


def _exactly(client: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = client.recv(count - len(parts))
        if not part:
            raise ConnectionError("the client is gone")
        parts += part
    return bytes(parts)
