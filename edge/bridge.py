"""Bridge: cameras that speak imagezmq (REQ/REP), let in unmodified.

Owns the translation of imagezmq's messages and its lock step: a camera gets its reply when its frame has a durable
verdict, so it can send no faster than it is inspected. Keeping, credits and sending again are `sender`'s.

    camera -> bridge    [{"msg": CAMERA, "dtype": "uint8", "shape": [h, w(, 3)]}][pixels, BGR]
                        [{"msg": CAMERA}][JPEG]
    bridge -> camera    [OK]   or   [refused: why]

imagezmq numbers nothing. A camera that gives up waiting and sends a picture again makes a new frame of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Annotated, Final, Self

import msgspec
import zmq
from msgspec import Meta

from edge import sockets, wire
from edge.errors import ImageRefused, KizuError, WireError
from edge.image_headers import read_header
from edge.payloads import Buffer, FrameLimits
from edge.sender import CameraSender

MAX_WAITING: Final = 8
"""Frames of one camera's name that may wait; a camera in lock step has one."""

_SLICE_S: Final = 0.005


class _Note(msgspec.Struct, frozen=True):
    """imagezmq's first part; without `shape` the second is a JPEG."""

    msg: str
    dtype: str = "uint8"
    shape: Annotated[tuple[int, ...], Meta(max_length=3)] | None = None


@dataclass(frozen=True, slots=True)
class _Picture:
    peer: bytes
    payload: Buffer
    encoding: str
    width: int
    height: int


@dataclass(slots=True)
class _Camera:
    """One name: its connection to the daemon, who waits for a reply, and what waits to be sent."""

    sender: CameraSender
    waiting: deque[_Picture] = field(default_factory=deque)
    out: bytes | None = None


class ImagezmqBridge:
    """Listens at `address` as an imagezmq hub does and is each camera of `senders` to a daemon; one thread.

    `on_refused` is told why a message was answered "refused".

    Raises:
        ConfigError: the address cannot be used.
    """

    def __init__(
        self,
        address: str,
        senders: Sequence[CameraSender],
        *,
        on_refused: Callable[[str], None] = lambda why: None,
        limits: FrameLimits | None = None,
        plain_off_host: bool = False,
    ) -> None:
        self.forwarded = self.refused = 0
        self._limits = limits or FrameLimits()
        self._on_refused = on_refused
        self._cameras = {sender.camera: _Camera(sender) for sender in senders}
        self._socket = sockets.router(
            address,
            hwm=2 * MAX_WAITING,
            max_message_bytes=self._limits.max_payload_bytes,
            plain_off_host=plain_off_host,
        )

    @property
    def address(self) -> str:
        """As bound."""
        return sockets.bound_address(self._socket)

    def step(self, timeout_s: float) -> None:
        """Take what came, send on what may leave, and reply to whom has a verdict; waits at most `timeout_s`."""
        # Acknowledgements come on other sockets, so with a frame out the wait is short.
        busy = any(camera.out is not None for camera in self._cameras.values())
        if self._socket.poll(round(1000 * (min(timeout_s, _SLICE_S) if busy else timeout_s))):
            self._receive()
        for camera in self._cameras.values():
            self._serve(camera)

    def close(self) -> None:
        """Close the listening side; frames without a verdict get no reply."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self) -> None:
        parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        if len(parts) < 2 or len(parts[1].buffer):  # no empty delimiter: not a REQ, so nobody waits for a reply
            self._count("no REQ/REP message")
            return
        peer = bytes(parts[0].buffer)
        try:
            camera, picture = self._read(peer, [part.buffer for part in parts[2:]])
        except KizuError as error:
            self._count(str(error))
            self._reply(peer, f"refused: {error}".encode())
            return
        camera.waiting.append(picture)

    def _read(self, peer: bytes, parts: list[memoryview]) -> tuple[_Camera, _Picture]:
        if len(parts) != 2:
            raise WireError(wire.Refusal.PARTS, f"an imagezmq message has 2 parts, not {len(parts)}")
        if parts[0].nbytes > wire.MAX_HEADER_BYTES:
            raise WireError(wire.Refusal.HEADER_TOO_LONG, f"its first part has {parts[0].nbytes} bytes")
        try:
            note = msgspec.json.decode(parts[0], type=_Note)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise WireError(wire.Refusal.HEADER_INVALID, f"its first part is not imagezmq's: {error}") from None
        camera = self._cameras.get(note.msg)
        if camera is None:
            known = ", ".join(self._cameras)
            raise WireError(wire.Refusal.CAMERA_UNKNOWN, f"the text {note.msg[:80]!r} names no camera; known: {known}")
        if len(camera.waiting) >= MAX_WAITING:
            raise WireError(wire.Refusal.OVER_WINDOW, f"{MAX_WAITING} frames of {note.msg} wait already")
        return camera, _picture(peer, note, parts[1])

    def _serve(self, camera: _Camera) -> None:
        camera.sender.pump()
        if camera.out is not None and camera.sender.left == 0:
            self.forwarded += 1
            self._reply(camera.out, b"OK")
            camera.out = None
        if camera.out is None and camera.waiting and camera.sender.admitted:
            picture = camera.waiting.popleft()
            camera.sender.send_encoded(picture.payload, picture.encoding, picture.width, picture.height)
            camera.out = picture.peer

    def _reply(self, peer: bytes, text: bytes) -> None:
        try:
            self._socket.send_multipart([peer, b"", text], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # the camera is gone; its frame has its verdict all the same
            self._on_refused(f"a camera did not wait for its reply: {error.strerror}")

    def _count(self, why: str) -> None:
        self.refused += 1
        self._on_refused(why)


def _picture(peer: bytes, note: _Note, data: memoryview) -> _Picture:
    """The picture in the wire's terms; what is wrong with its pixels is the daemon's to judge, and to log.

    Raises:
        ImageRefused: its size cannot be told.
    """
    if note.shape is None:
        header = read_header(data)
        if header.kind != "JPEG":
            raise ImageRefused("format", f"send_jpg sent a {header.kind}")
        return _Picture(peer, data, "jpeg", header.width, header.height)
    if note.dtype != "uint8" or len(note.shape) < 2 or note.shape[2:] not in ((), (1,), (3,)):
        shape = " x ".join(map(str, note.shape))
        raise ImageRefused("format", f"{note.dtype} image of {shape}: expected uint8, h x w gray or h x w x 3 BGR")
    height, width = note.shape[:2]
    return _Picture(peer, data, "bgr8" if note.shape[2:] == (3,) else "mono8", width, height)
