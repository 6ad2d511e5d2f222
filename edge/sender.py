"""CameraSender: a camera's side of the wire, for `kizu send`, the simulated line and cameras written in Python.

Owns the camera's half of the protocol: HELLO, the window, keeping every unacknowledged frame and sending it again.
Has no thread: the caller drives it through `send`, `pump` and `drain`, so it is deterministic under a manual clock.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from edge import sockets, wire
from edge.clock import SystemClock
from edge.errors import SinkFull, WireError
from edge.keys import ClientKeys
from edge.payloads import Buffer, encode_image
from edge.protocols import Clock
from edge.ring import Ring
from edge.types import FrameId
from edge.wire import CreditState, FrameHeader, Refusal

# Below 2**53, so that a subscriber in JavaScript reads it exactly.
_EPOCH_BITS: Final = 53
# A HELLO that was not answered may have gone into a connection that was dead already.
_HELLO_AGAIN_S: Final = 0.5
# One poll never lasts longer, so that silence is noticed while waiting.
_POLL_S: Final = 0.1


@dataclass(slots=True)
class _Kept:
    """A frame without a durable verdict; `times` is how often it left, `out` whether it left since the last HELLO.

    `slot` is where in the ring its pixels lie, if they do.
    """

    header: FrameHeader
    payload: Buffer
    times: int = 0
    out: bool = False
    slot: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A free place in the ring: `pixels` is written by the caller, in place, and then sent by `send_slot`."""

    index: int
    pixels: NDArray[np.uint8]


class CameraSender:
    """One camera's connection to a daemon; one thread.

    `keys` (from `edge.keys.load_client`) encrypt the connection and prove the camera's name where the daemon has keys.
    `epoch` is random unless given; `window` bounds the frames kept here, the daemon's own window may be smaller. After
    `resend_after_s` without a word from the daemon it says HELLO again and repeats what is unacknowledged. With a
    `ring` (a daemon on the same host, on an ipc:// address) pixels are grabbed into its slots and never copied.

    Raises:
        ConfigError: the address cannot be used.
        WireError: `camera_name`.
    """

    def __init__(
        self,
        address: str,
        camera: str,
        *,
        epoch: int | None = None,
        window: int = 64,
        resend_after_s: float = 2.0,
        ring: Ring | None = None,
        clock: Clock | None = None,
        plain_off_host: bool = False,
        context: sockets.Context | None = None,
        keys: ClientKeys | None = None,
    ) -> None:
        self.sent = 0
        """Frames that left at least once."""
        self.resent = 0
        """Departures beyond a frame's first."""
        self.acknowledged = 0
        self._camera = wire.check_name(camera, "camera")
        self._epoch = secrets.randbits(_EPOCH_BITS) if epoch is None else epoch
        self._window = window
        self._resend_after_ns = round(resend_after_s * 1e9)
        self._clock = clock or SystemClock()
        self._address = address
        self._ring = ring
        self._free = list(range(ring.slots)) if ring is not None else []
        self._kept: dict[int, _Kept] = {}  # by sequence, ascending
        self._next = 0
        self._acked_through = -1
        self._granted = 0  # 0 until the daemon admits this camera
        self._hello_due = True
        self._heard_ns = self._clock.monotonic_ns()
        self._hint = " Has its list of peers this camera's key, and is --server-key its own?" if keys else ""
        self._socket = sockets.dealer(
            address, hwm=2 * window + 8, plain_off_host=plain_off_host, context=context, keys=keys
        )

    @property
    def camera(self) -> str:
        return self._camera

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def admitted(self) -> bool:
        """Whether the daemon lets this camera send another frame at once."""
        return self._next <= self._limit() and len(self._kept) < self._window

    @property
    def in_touch(self) -> bool:
        """Whether the daemon has admitted this camera and was heard of within `resend_after_s`."""
        return self._granted > 0

    @property
    def left(self) -> int:
        """Frames without a durable verdict."""
        return len(self._kept)

    def send(
        self,
        image: NDArray[np.uint8],
        *,
        encoding: Literal["png", "jpeg", "raw"] = "png",
        captured_ns: int | None = None,
        part_id: str | None = None,
        timeout_s: float = 5.0,
    ) -> FrameId:
        """Encode `image` (H, W), (H, W, 1) gray or (H, W, 3) RGB uint8 and send it.

        Raises:
            SinkFull: no credit within `timeout_s`; the frame was not taken.
            ImageRefused: the image has another shape or type.
        """
        name, payload = encode_image(image, encoding)
        height, width = image.shape[:2]
        return self.send_encoded(
            payload, name, width, height, captured_ns=captured_ns, part_id=part_id, timeout_s=timeout_s
        )

    def send_encoded(
        self,
        payload: Buffer,
        encoding: str,
        width: int,
        height: int,
        *,
        captured_ns: int | None = None,
        part_id: str | None = None,
        timeout_s: float = 5.0,
    ) -> FrameId:
        """Send `payload` as it is; `captured_ns` is Unix time at exposure, now unless given.

        Raises:
            SinkFull: no credit within `timeout_s`; the frame was not taken.
            WireError: the header is too long.
        """
        captured = self._clock.wall_ns() if captured_ns is None else captured_ns
        self._wait_for_credit(timeout_s)
        return self._keep(self._header(encoding, width, height, captured, part_id), payload)

    def slot(self, timeout_s: float = 5.0) -> Slot:
        """A free slot of the ring, once there is one; the same one until `send_slot` takes it.

        Raises:
            SinkFull: every slot holds a frame without a verdict, for longer than `timeout_s`.
            WireError: this sender has no ring.
        """
        if self._ring is None:
            raise WireError(
                Refusal.HEADER_INVALID, "this sender has no ring; give it one: CameraSender(ring=Ring(...))"
            )
        self._wait_until(lambda: bool(self._free), timeout_s)
        return Slot(self._free[0], self._ring.slot(self._free[0]))

    def send_slot(
        self,
        slot: Slot,
        encoding: str,
        width: int,
        height: int,
        *,
        captured_ns: int | None = None,
        part_id: str | None = None,
        timeout_s: float = 5.0,
    ) -> FrameId:
        """Send the picture that was grabbed into `slot`, raw; its place may be written again when `slot` gives it out.

        Raises:
            SinkFull: no credit within `timeout_s`; the frame was not taken, and the slot is free.
            WireError: the slot is not the one given out last, or the header is too long.
        """
        if self._ring is None or not self._free or slot.index != self._free[0]:
            raise WireError(Refusal.HEADER_INVALID, f"slot {slot.index} is not free; take one by slot()")
        captured = self._clock.wall_ns() if captured_ns is None else captured_ns
        self._wait_for_credit(timeout_s)
        header = self._header(encoding, width, height, captured, part_id)
        header = msgspec.structs.replace(header, ring_offset=slot.index * self._ring.slot_bytes)
        self._free.pop(0)
        return self._keep(header, b"", slot.index)

    def _header(self, encoding: str, width: int, height: int, captured_ns: int, part_id: str | None) -> FrameHeader:
        header = FrameHeader(
            wire.WIRE_VERSION, self._camera, self._epoch, self._next, captured_ns, encoding, width, height, part_id
        )
        wire.pack_frame(header, b"")  # refuses a header that could never leave
        return header

    def _keep(self, header: FrameHeader, payload: Buffer, slot: int | None = None) -> FrameId:
        self._kept[self._next] = _Kept(header, payload, slot=slot)
        self._next += 1
        self._depart()
        return header.id

    def pump(self, timeout_s: float = 0.0) -> None:
        """Take the daemon's credits, waiting at most `timeout_s` for the first, and send what may or must leave."""
        deadline_ns = self._clock.monotonic_ns() + round(timeout_s * 1e9)
        heard = self._listen(0.0)
        self._depart()
        while not heard and self._clock.monotonic_ns() < deadline_ns:
            heard = self._listen(min(_POLL_S, (deadline_ns - self._clock.monotonic_ns()) / 1e9))
            self._depart()

    def drain(self, timeout_s: float) -> int:
        """Wait until every frame is acknowledged, at most `timeout_s`; return how many are not."""
        deadline_ns = self._clock.monotonic_ns() + round(timeout_s * 1e9)
        self.pump()
        while self._kept and self._clock.monotonic_ns() < deadline_ns:
            self.pump((deadline_ns - self._clock.monotonic_ns()) / 1e9)
        return len(self._kept)

    def close(self) -> None:
        """Close the connection; frames that are not acknowledged are given up."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the daemon's word --------------------------------------------------------------------------------------------

    def _wait_for_credit(self, timeout_s: float) -> None:
        self._wait_until(lambda: self.admitted, timeout_s)

    def _wait_until(self, done: Callable[[], bool], timeout_s: float) -> None:
        deadline_ns = self._clock.monotonic_ns() + round(timeout_s * 1e9)
        self.pump()
        while not done():
            remaining_ns = deadline_ns - self._clock.monotonic_ns()
            if remaining_ns <= 0:
                raise SinkFull(
                    f"camera {self._camera}: no credit from {self._address} within {timeout_s} s, {self._standing()}; "
                    f"is the daemon running, and is this camera in its configuration?{self._hint}"
                )
            self.pump(remaining_ns / 1e9)

    def _standing(self) -> str:
        """What became of this camera's frames so far, in words."""
        if self._kept:
            return f"{len(self._kept)} frames unacknowledged"
        return f"after {self.acknowledged} frames" if self._next else "it has not admitted this camera"

    def _limit(self) -> int:
        """The highest sequence that may be out."""
        return self._acked_through + min(self._granted, self._window)

    def _listen(self, timeout_s: float) -> bool:
        """Apply every credit that is there; whether there was one."""
        heard = False
        # Round up: a poll of 0 ms in a loop would burn the rest of the time.
        timeout_ms = -int(-timeout_s * 1000 // 1) if timeout_s > 0 else 0
        events = zmq.POLLIN | (zmq.POLLOUT if timeout_ms and self._has_waiting() else 0)
        self._socket.poll(timeout_ms, events)
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return heard
            try:
                state = wire.parse_credit(parts)
            except WireError:
                continue  # not a daemon; silence will be noticed
            if (state.camera, state.epoch) == (self._camera, self._epoch):
                self._apply(state)
                heard = True

    def _apply(self, state: CreditState) -> None:
        self._heard_ns = self._clock.monotonic_ns()
        if state.window == 0:
            # Frames reached a connection that the daemon does not know. Each frame under way brings this answer again,
            # before the one to our HELLO; one HELLO is enough.
            if self._granted > 0:
                self._start_over()
            return
        self._granted = state.window
        if state.acked_through < self._acked_through:
            self._renumber()
            return
        self._acked_through = state.acked_through
        ahead = set(state.also_acked)
        for sequence in [kept for kept in self._kept if kept <= state.acked_through or kept in ahead]:
            slot = self._kept.pop(sequence).slot
            self._free += [] if slot is None else [slot]
            self.acknowledged += 1

    def _renumber(self) -> None:
        """Begin a new epoch: the daemon lost what it had acknowledged, and waits for frames that are no longer kept."""
        self._epoch = secrets.randbits(_EPOCH_BITS)
        kept = list(self._kept.values())
        self._kept = {}
        for sequence, frame in enumerate(kept):
            frame.header = msgspec.structs.replace(frame.header, epoch=self._epoch, sequence=sequence)
            self._kept[sequence] = frame
        self._next = len(kept)
        self._acked_through = -1
        self._start_over()

    def _start_over(self) -> None:
        """Say HELLO and send again whatever is unacknowledged, once the daemon has answered it."""
        self._hello_due = True
        self._granted = 0
        self._heard_ns = self._clock.monotonic_ns()
        for frame in self._kept.values():
            frame.out = False

    # --- leaving ------------------------------------------------------------------------------------------------------

    def _has_waiting(self) -> bool:
        limit = self._limit()
        return self._hello_due or any(not frame.out and sequence <= limit for sequence, frame in self._kept.items())

    def _depart(self) -> None:
        """Send what may leave; after too long a silence, start over first."""
        if self._clock.monotonic_ns() - self._heard_ns >= self._patience_ns():
            self._start_over()
        try:
            if self._hello_due:
                self._socket.send_multipart(self._hello(), zmq.NOBLOCK)
                self._hello_due = False
            limit = self._limit()
            for sequence, frame in self._kept.items():
                if sequence > limit:
                    return
                if not frame.out:
                    self._socket.send_multipart(wire.pack_frame(frame.header, frame.payload), zmq.NOBLOCK, copy=False)
                    self._count(frame)
        except zmq.Again:
            return  # no connection, or it is full; the next pump tries again

    def _patience_ns(self) -> int:
        return self._resend_after_ns if self.in_touch else min(self._resend_after_ns, round(_HELLO_AGAIN_S * 1e9))

    def _hello(self) -> list[Buffer]:
        return wire.pack_hello(self._camera, self._epoch, None if self._ring is None else self._ring.note)

    def _count(self, frame: _Kept) -> None:
        self.sent += frame.times == 0
        self.resent += frame.times > 0
        frame.times += 1
        frame.out = True
