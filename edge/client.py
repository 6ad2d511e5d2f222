"""Subscriber: what other programs import to follow a line: events in order, their masks, a count of what was missed.

Owns topics, decoding and gap detection. Healing a gap by replay comes with a later version; until then `lost` says how
many events the log holds that did not arrive.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Final, Self

import numpy as np
import zmq
from numpy.typing import NDArray

from edge import images, sockets, wire
from edge.clock import SystemClock
from edge.errors import ImageRefused, SourceBroken, SourceTimeout, WireError
from edge.events import DefectEvent
from edge.keys import ClientKeys
from edge.protocols import Clock
from edge.wire import Head

Received = tuple[DefectEvent, NDArray[np.bool_] | None]

# Messages held while the caller is busy: at 64 KiB of mask each, 16 MiB at most.
_HWM: Final = 256
# Logs followed at once; one more makes the one heard of longest ago forgotten.
_MAX_LOGS: Final = 16
_MAX_PARTS: Final = 3


class Subscriber:
    """Follows what a daemon publishes; one thread.

    `line` None takes every line, `cameras` None every camera. Gaps are known only without `cameras`, because the log's
    sequence counts all cameras together; with `cameras`, `lost` stays 0 and `latest_head` is all there is. An event
    published again (its frame came twice) is given once. `keys` (from `edge.keys.load_client`) encrypt the connection
    and admit this subscriber where the daemon asks for keys.

    Raises:
        ConfigError: the address cannot be used.
        WireError: a line's or camera's name is malformed.
    """

    def __init__(
        self,
        address: str,
        *,
        cameras: Collection[str] | None = None,
        line: str | None = None,
        clock: Clock | None = None,
        plain_off_host: bool = False,
        context: sockets.Context | None = None,
        keys: ClientKeys | None = None,
    ) -> None:
        self.lost = 0
        """Events that the log numbered between two that arrived, or up to a head, and that did not arrive."""
        self.refused = 0
        """Messages that are no events or heads, or whose mask is none."""
        self.repeated = 0
        self.latest_head: Head | None = None
        self._address = address
        self._cameras = None if cameras is None else frozenset(wire.check_name(name, "camera") for name in cameras)
        self._clock = clock or SystemClock()
        self._last: OrderedDict[tuple[str, int], int] = (
            OrderedDict()
        )  # (line, log epoch) -> newest sequence accounted for
        self._held: deque[Received] = deque()
        self._socket = sockets.sub(
            address, _topics(line, self._cameras), hwm=_HWM, plain_off_host=plain_off_host, context=context, keys=keys
        )

    def wait_until_connected(self, timeout_s: float) -> None:
        """Wait for a head or an event: from then on nothing is missed for having come too early.

        Raises:
            SourceTimeout: neither came within `timeout_s`.
        """
        deadline_ns = self._clock.monotonic_ns() + round(timeout_s * 1e9)
        while self.latest_head is None and not self._held:
            got = self._next(deadline_ns, f"nobody publishes at {self._address}: neither head nor event", timeout_s)
            if got is not None:
                self._held.append(got)

    def receive(self, timeout_s: float) -> Received:
        """Return the next event with its mask, bool (frame_height, frame_width) or None.

        Raises:
            SourceTimeout: none came within `timeout_s`.
            SourceBroken: the subscriber is closed.
        """
        if self._held:
            return self._held.popleft()
        deadline_ns = self._clock.monotonic_ns() + round(timeout_s * 1e9)
        while True:
            got = self._next(deadline_ns, f"no event from {self._address}", timeout_s)
            if got is not None:
                return got

    def __iter__(self) -> Iterator[Received]:
        """Every event until the subscriber is closed."""
        while not self._socket.closed:
            try:
                yield self.receive(1.0)
            except SourceTimeout:
                continue

    def close(self) -> None:
        """Close the socket."""
        self._socket.close(linger=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self, deadline_ns: int, what: str, timeout_s: float) -> Received | None:
        """Handle one message; None unless it is an event that the caller asked for."""
        try:
            remaining_ms = max(0, (deadline_ns - self._clock.monotonic_ns() + 999_999) // 1_000_000)
            if not self._socket.poll(remaining_ms):
                raise SourceTimeout(f"{what} within {timeout_s} s")
            parts = self._receive_parts()
        except zmq.ZMQError as error:
            raise SourceBroken(f"subscriber of {self._address}: {error.strerror}") from None
        try:
            published = wire.parse_published(parts)
            if isinstance(published, Head):
                self._note_head(published)
                return None
            event, mask_png = published
            if self._cameras is not None and event.camera not in self._cameras:
                return None
            # The event stands even if its mask does not: the verdict must not vanish with a picture.
            return (event, self._mask(event, mask_png)) if self._note_event(event) else None
        except WireError:
            self.refused += 1
            return None

    def _receive_parts(self) -> list[memoryview]:
        part = self._socket.recv(zmq.NOBLOCK, copy=False)
        parts = [part.buffer]
        while part.more:
            part = self._socket.recv(zmq.NOBLOCK, copy=False)
            if len(parts) <= _MAX_PARTS:
                parts.append(part.buffer)
        return parts

    def _note_head(self, head: Head) -> None:
        self.latest_head = head
        if self._cameras is None:
            last = self._account(head.line, head.log_epoch, head.log_sequence)
            self.lost += max(0, head.log_sequence - last)

    def _note_event(self, event: DefectEvent) -> bool:
        """Account for the event; whether it is new."""
        if self._cameras is not None:
            return True
        last = self._account(event.line, event.log_epoch, event.log_sequence, first=event.log_sequence - 1)
        if event.log_sequence <= last:
            self.repeated += 1
            return False
        self.lost += event.log_sequence - last - 1
        return True

    def _account(self, line: str, epoch: int, sequence: int, first: int | None = None) -> int:
        """Move the log's newest accounted sequence to `sequence`; return where it stood, `first` for an unknown log."""
        known = self._last.pop((line, epoch), sequence if first is None else first)
        self._last[line, epoch] = max(known, sequence)
        if len(self._last) > _MAX_LOGS:
            self._last.popitem(last=False)
        return known

    def _mask(self, event: DefectEvent, mask_png: bytes | None) -> NDArray[np.bool_] | None:
        """Decode the mask, which must be as large as the event says its frame is; else None, counted as refused."""
        if mask_png is None:
            return None
        pixels = min(event.frame_height * event.frame_width, images.MAX_IMAGE_PIXELS)
        try:
            mask = images.decode_image(mask_png, channels=1, max_pixels=pixels)
        except ImageRefused:
            self.refused += 1
            return None
        if mask.shape[:2] != (event.frame_height, event.frame_width):
            self.refused += 1
            return None
        return np.asarray(mask[:, :, 0] > 0)


def _topics(line: str | None, cameras: frozenset[str] | None) -> list[bytes]:
    """Event topics first, the head's last: a head that arrives proves that the others stand."""
    if line is None:
        return [b"event/", b"head/"]
    wire.check_name(line, "line")
    if cameras is None:
        return [f"event/{line}/".encode(), wire.head_topic(line)]
    return [*(wire.event_topic(line, camera) for camera in sorted(cameras)), wire.head_topic(line)]
