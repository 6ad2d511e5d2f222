"""Subscriber: what other programs import to follow a line: events in order, their masks, a count of what was missed.

Owns topics, decoding, gap detection and, given the log's replay address, healing: every event once and in order, across
restarts of either side and a log that was replaced. Asking the log is `replay_client`'s.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from types import TracebackType
from typing import Final, Literal, Self

import numpy as np
import zmq
from numpy.typing import NDArray

from edge import images, sockets, wire
from edge.clock import SystemClock
from edge.errors import ConfigError, ImageRefused, SourceBroken, SourceTimeout, WireError
from edge.events import DefectEvent
from edge.keys import ClientKeys
from edge.protocols import Clock
from edge.replay_client import ReplayClient
from edge.wire import Gap, Head, LoggedEvent, ReplayHeader

Received = tuple[DefectEvent, NDArray[np.bool_] | None]

# Messages held while the caller is busy: at 64 KiB of mask each, 16 MiB at most.
_HWM: Final = 256
# Logs followed at once; one more makes the one heard of longest ago forgotten.
_MAX_LOGS: Final = 16
_MAX_PARTS: Final = 3
# The longest wait for one answer of the log; a daemon that is away is asked again until the caller's time is up.
_ASK_S: Final = 1.0

Start = tuple[int, int] | Literal["beginning", "now"]


class Subscriber:
    """Follows what a daemon publishes; one thread.

    `line` None takes every line, `cameras` None every camera. Gaps are known only without `cameras`, because the log's
    sequence counts all cameras together; with `cameras`, `lost` stays 0 and `latest_head` is all there is. An event
    published again (its frame came twice) is given once. `keys` (from `edge.keys.load_client`) encrypt the connection
    and admit this subscriber where the daemon asks for keys.

    With `replay`, the log's replay address, nothing is missed within the log's retention: what did not arrive is
    fetched, also for `cameras`, and large masks come along. `since` says where to begin: a place (log epoch, log
    sequence) that the caller kept, the log's beginning, or now. With `name` the daemon keeps the place: `commit` moves
    it, the next subscriber of that name goes on behind it, and `since` is for the first time only. `lost` then counts
    what retention removed unseen (`gaps` says which), `new_logs` how often another log replaced the one followed.

    Raises:
        ConfigError: the address cannot be used, or `name` is given without `replay`.
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
        replay: str | None = None,
        name: str | None = None,
        since: Start = "now",
    ) -> None:
        if name is not None and replay is None:
            raise ConfigError(f"subscriber {name!r}: a registered one asks the log; give its replay address as well")
        self.gaps: deque[tuple[int, Gap]] = deque(maxlen=64)
        """The newest stretches that retention removed before they were read, each with its log epoch."""
        self.new_logs = 0
        self.replayed = 0
        self._name = None if name is None else wire.check_name(name, "subscriber")
        self._since: Start = since
        self._position: tuple[int, int] | None = None  # the newest event taken, with replay
        self._delivered: tuple[int, int] | None = None
        self._behind = replay is not None
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
        self._held: deque[LoggedEvent] = deque()
        # With replay every camera is heard, because only the whole sequence shows what is missing.
        topics = _topics(line, self._cameras if replay is None else None)
        self._socket = sockets.sub(address, topics, hwm=_HWM, plain_off_host=plain_off_host, context=context, keys=keys)
        self._replay: ReplayClient | None = None
        if replay is not None:
            try:
                self._replay = ReplayClient(
                    replay, self._clock, plain_off_host=plain_off_host, context=context, keys=keys
                )
            except BaseException:
                self._socket.close(linger=0)
                raise

    def wait_until_connected(self, timeout_s: float) -> None:
        """Wait for a head or an event: from then on nothing is missed for having come too early.

        Raises:
            SourceTimeout: neither came within `timeout_s`.
        """
        deadline_ns = self._clock.monotonic_ns() + round(timeout_s * 1e9)
        if self._replay is not None:
            self._locate(self._replay, timeout_s)
        while self.latest_head is None and not self._held:
            got = self._next(deadline_ns, f"nobody publishes at {self._address}: neither head nor event", timeout_s)
            if got is not None:
                self._held.append(got)

    def receive(self, timeout_s: float) -> Received:
        """Return the next event with its mask, bool (frame_height, frame_width) or None.

        Raises:
            SourceTimeout: none came within `timeout_s`.
            SourceBroken: the subscriber is closed, or the log refuses to answer.
        """
        deadline_ns = self._clock.monotonic_ns() + round(timeout_s * 1e9)
        while not self._held:
            if self._replay is not None and self._behind:
                self._heal(self._replay, deadline_ns, timeout_s)
            else:
                got = self._next(deadline_ns, f"no event from {self._address}", timeout_s)
                if got is not None:
                    self._held.append(got)
        event, mask_png = self._held.popleft()
        self._delivered = (event.log_epoch, event.log_sequence)
        # The event stands even if its mask does not: the verdict must not vanish with a picture.
        return event, self._mask(event, mask_png)

    @property
    def registered(self) -> bool:
        """Whether the daemon keeps this subscriber's place."""
        return self._name is not None

    @property
    def position(self) -> tuple[int, int] | None:
        """(log epoch, log sequence) of the last event that `receive` returned; the place to keep for `since`."""
        return self._delivered

    @property
    def lag(self) -> int | None:
        """Events published that `receive` has not returned yet, as of the last head; None while nothing is known."""
        if self.latest_head is None or self._delivered is None:
            return None
        epoch, sequence = self._delivered
        same = epoch == self.latest_head.log_epoch
        return max(0, self.latest_head.log_sequence - sequence) if same else self.latest_head.log_sequence

    def commit(self, timeout_s: float) -> None:
        """Tell the daemon that everything `receive` returned has been dealt with; returns when that is durable.

        Raises:
            SourceTimeout: no answer within `timeout_s`; commit again.
            SourceBroken: the log refused.
            ConfigError: the subscriber has no `name`.
        """
        if self._replay is None or self._name is None:
            raise ConfigError("only a registered subscriber commits; give it a name and the replay address")
        if self._delivered is not None:
            self._replay.cursor(self._name, timeout_s, at=self._delivered)

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
        if self._replay is not None:
            self._replay.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self, deadline_ns: int, what: str, timeout_s: float) -> LoggedEvent | None:
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
            if self._replay is not None:
                return (event, mask_png) if self._follow(event) and self._wants(event) else None
            return (event, mask_png) if self._wants(event) and self._note_event(event) else None
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

    # --- with replay --------------------------------------------------------------------------------------------------

    def _wants(self, event: DefectEvent) -> bool:
        return self._cameras is None or event.camera in self._cameras

    def _follow(self, event: DefectEvent) -> bool:
        """Whether the event is the very next one; if it is not, the log will be asked."""
        if self._position is not None and event.log_epoch == self._position[0]:
            if event.log_sequence <= self._position[1]:
                self.repeated += 1
                return False
            if event.log_sequence == self._position[1] + 1 and event.mask != "replay":
                self._position = (event.log_epoch, event.log_sequence)
                return True
        self._behind = True
        return False

    def _locate(self, replay: ReplayClient, timeout_s: float) -> tuple[int, int]:
        """Where to begin, asked once."""
        if self._position is not None:
            return self._position
        if self._name is not None:
            start: Literal["beginning", "now"] = "now" if self._since == "now" else "beginning"
            state = replay.cursor(self._name, timeout_s, start=start)
            self._position = (state.log_epoch, state.log_sequence)
        elif isinstance(self._since, tuple):
            self._position = self._since
        elif self._since == "now":
            header, _ = replay.events_after(0, 0, timeout_s, limit=1)
            self._position = (header.log_epoch, header.head)
        else:
            self._position = (0, 0)
        return self._position

    def _heal(self, replay: ReplayClient, deadline_ns: int, timeout_s: float) -> None:
        """Ask the log for what follows; without an answer the caller comes again, until its time is up."""
        left_s = (deadline_ns - self._clock.monotonic_ns()) / 1e9
        if left_s <= 0:
            raise SourceTimeout(f"no event from {self._address} within {timeout_s} s: its log does not answer")
        try:
            wait_s = min(left_s, _ASK_S)
            self._take(*replay.events_after(*self._locate(replay, wait_s), wait_s))
        except SourceTimeout:
            return

    def _take(self, header: ReplayHeader, events: list[LoggedEvent]) -> None:
        epoch, sequence = self._position or (0, 0)
        if header.log_epoch != epoch:
            self.new_logs += epoch != 0
            epoch, sequence = header.log_epoch, 0
        if header.gap is not None:
            self.lost += header.gap.last - sequence
            self.gaps.append((epoch, Gap(sequence + 1, header.gap.last)))
            sequence = header.gap.last
        for event, mask_png in events:
            sequence = event.log_sequence
            self.replayed += 1
            if self._wants(event):
                self._held.append((event, mask_png))
        self._position = (epoch, sequence)
        self._behind = sequence < header.head

    # --- without ------------------------------------------------------------------------------------------------------

    def _note_head(self, head: Head) -> None:
        self.latest_head = head
        if self._replay is not None:
            known = self._position is not None and self._position[0] == head.log_epoch
            self._behind |= not known or (self._position or (0, 0))[1] < head.log_sequence
            return
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
