"""The wire: ZeroMQ multipart messages of frames, credits, events and heads, as bytes <-> types.

Owns layouts, sizes and every reason for which a message is refused; `docs/wire.md` describes the same for other
languages. Opens no socket (`sockets`), keeps no state (`sources.zeromq`, `sender`), looks into no picture (`payloads`).

    camera -> daemon    [hello JSON]                       [frame JSON][payload, empty with a ring]
    daemon -> camera    [credit JSON]
    daemon -> all       [event/LINE/CAMERA/][event JSON][mask PNG or empty]       [head/LINE/][head JSON]
    subscriber -> log   [replay JSON]                      [cursor JSON]
    log -> subscriber   [events JSON][event JSON][mask]... [cursor_at JSON]       [refused JSON]

Unknown header fields are skipped, so that a newer camera can talk to an older daemon.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from edge.errors import ImageRefused, WireError
from edge.events import DefectEvent, MaskState
from edge.payloads import RAW_CHANNELS, Buffer, FrameLimits, decode_payload
from edge.ring import MAX_RING_BYTES, RingNote, RingView
from edge.types import Frame, FrameId, Unreadable

WIRE_VERSION: Final = 1
MAX_HEADER_BYTES: Final = 4096
MAX_EVENT_BYTES: Final = 256 * 1024
MASK_INLINE_BYTES: Final = 64 * 1024
MAX_REPLAY_EVENTS: Final = 1024
MAX_REPLAY_BYTES: Final = 4 * 1024 * 1024
# A 1-bit PNG of 2**26 pixels cannot be longer; larger than any part of a replay.
MAX_MASK_BYTES: Final = 16 * 1024 * 1024
NAME: Final = re.compile(r"[a-z0-9_-]{1,64}")

# Integers fit SQLite's signed 64 bits. JavaScript reads them exactly up to 2**53 only; our own epochs stay below that.
Unsigned = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_T = TypeVar("_T")


class Refusal(StrEnum):
    """Why a message is refused without a verdict; the closed set behind `kizu_messages_refused_total{reason}`."""

    PARTS = "parts"
    HEADER_TOO_LONG = "header_too_long"
    HEADER_NOT_JSON = "header_not_json"
    HEADER_INVALID = "header_invalid"
    MESSAGE_TYPE = "message_type"
    VERSION = "version"
    CAMERA_NAME = "camera_name"
    CAMERA_UNKNOWN = "camera_unknown"
    NAME_NOT_OF_KEY = "name_not_of_key"
    KEY_REMOVED = "key_removed"
    NO_HELLO = "no_hello"
    SUPERSEDED = "superseded"
    OVER_WINDOW = "over_window"


REFUSALS: Final = tuple(reason.value for reason in Refusal)
"""Every reason a source may report, for metrics that create their children at start."""

UNREADABLE_REASONS: Final = ("format", "size", "length", "truncated", "bomb", "ring")
"""Every `Unreadable.reason`: such a frame can be named, so it gets INCONCLUSIVE(unreadable) instead of a refusal."""


class Hello(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="hello"):
    """A camera opens, or returns after silence; `epoch` is random per camera start, `ring` where its pixels may lie."""

    version: int
    camera: str
    epoch: Unsigned
    ring: RingNote | None = None


class FrameHeader(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="frame"):
    """First part of a frame message; `width` and `height` in pixels, `captured_ns` Unix nanoseconds at exposure.

    With `ring_offset` the pixels lie there in the camera's ring, and the payload is empty.
    """

    version: int
    camera: str
    epoch: Unsigned
    sequence: Unsigned
    captured_ns: Unsigned
    encoding: str
    width: int
    height: int
    part_id: Annotated[str, Meta(max_length=256)] | None = None
    encoder_count: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    ring_offset: Annotated[int, Meta(ge=0, lt=MAX_RING_BYTES)] | None = None

    @property
    def id(self) -> FrameId:
        """The frame's name."""
        return FrameId(self.camera, self.epoch, self.sequence, self.captured_ns)


class CreditState(msgspec.Struct, frozen=True, tag_field="type", tag="credit"):
    """The daemon's absolute state for one camera; never an increment, so a lost one is healed by the next.

    Every sequence up to `acked_through` (-1: none) and each of `also_acked` has a durable verdict; the camera may send
    up to `acked_through + window`. `window` 0 means "not admitted: say HELLO, then send again what is unacknowledged".
    """

    version: int
    camera: str
    epoch: Unsigned
    acked_through: Annotated[int, Meta(ge=-1, le=2**63 - 1)]
    also_acked: tuple[Unsigned, ...]
    window: Annotated[int, Meta(ge=0, le=65536)]


class Head(msgspec.Struct, frozen=True, omit_defaults=True):
    """The newest published event of a line, told every second so that a lost last event is noticed.

    `state` is the daemon's (ready, degraded, withheld, stalled; empty where it does not say), `fallback` why the CPU
    stands in for the GPU, empty while it does not.
    """

    version: int
    line: str
    log_epoch: int
    log_sequence: int
    state: str = ""
    fallback: str = ""


class ReplayRequest(msgspec.Struct, frozen=True, tag_field="type", tag="replay"):
    """A subscriber asks for what follows (`log_epoch`, `log_sequence`): at most `limit` events, about `max_bytes`.

    An epoch that is not the log's is answered from the log's beginning: the log is another one.
    """

    version: int
    token: Unsigned
    log_epoch: Unsigned
    log_sequence: Unsigned
    limit: Annotated[int, Meta(ge=1, le=MAX_REPLAY_EVENTS)] = 256
    max_bytes: Annotated[int, Meta(ge=1, le=MAX_REPLAY_BYTES)] = MAX_REPLAY_BYTES


class CursorRequest(msgspec.Struct, frozen=True, tag_field="type", tag="cursor"):
    """A subscriber registers as `name`, asks where it stands, or says that it has everything through `log_sequence`.

    `log_epoch` 0 only asks; a name that is not registered yet is, at `start` (`beginning` or `now`).
    """

    version: int
    token: Unsigned
    name: str
    log_epoch: Unsigned = 0
    log_sequence: Unsigned = 0
    start: Literal["beginning", "now"] = "beginning"


class Gap(msgspec.Struct, frozen=True):
    """Log sequences `first` to `last`, which retention removed."""

    first: int
    last: int


class ReplayHeader(msgspec.Struct, frozen=True, tag_field="type", tag="events"):
    """First part of an answer; `count` pairs of parts follow, event JSON and mask PNG (empty: none)."""

    version: int
    token: int
    log_epoch: int
    head: int
    count: int
    gap: Gap | None = None


class CursorState(msgspec.Struct, frozen=True, tag_field="type", tag="cursor_at"):
    """Where the registered subscriber stands in the log, durably; `head` is the log's newest sequence.

    `passed` events behind that place were removed by retention before it had them; replay gives them as a gap.
    """

    version: int
    token: int
    name: str
    log_epoch: int
    log_sequence: int
    head: int
    passed: int = 0


class Refused(msgspec.Struct, frozen=True, tag_field="type", tag="refused"):
    """A request that was not answered, and why."""

    version: int
    token: int
    reason: str
    detail: str


class _FrameName(msgspec.Struct, frozen=True):
    """The part of a frame header that names the frame, for headers whose rest is wrong."""

    version: int
    camera: str
    epoch: Unsigned
    sequence: Unsigned
    # Names nothing, so a wrong one must not cost the frame its verdict; 0 stands for "not known".
    captured_ns: object = 0


class _Envelope(msgspec.Struct, frozen=True):
    type: str
    version: int


_envelope = msgspec.json.Decoder(_Envelope)
_hello = msgspec.json.Decoder(Hello)
_frame = msgspec.json.Decoder(FrameHeader)
_frame_name = msgspec.json.Decoder(_FrameName)
_credit = msgspec.json.Decoder(CreditState)
_head = msgspec.json.Decoder(Head)
_event = msgspec.json.Decoder(DefectEvent)
_request: msgspec.json.Decoder[ReplayRequest | CursorRequest] = msgspec.json.Decoder(ReplayRequest | CursorRequest)
_answer: msgspec.json.Decoder[ReplayHeader | CursorState | Refused] = msgspec.json.Decoder(
    ReplayHeader | CursorState | Refused
)
_encode = msgspec.json.Encoder().encode


def check_name(name: str, what: str) -> str:
    """Return `name` if it is `[a-z0-9_-]{1,64}`.

    Raises:
        WireError: `camera_name`; topics end in a slash, so a name must not hold one.
    """
    if not NAME.fullmatch(name):
        raise WireError(Refusal.CAMERA_NAME, f"{what} {name[:80]!r}: expected 1 to 64 of a-z, 0-9, _ and -")
    return name


# --- camera -> daemon -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BadFrame:
    """A frame message whose header names the frame but is otherwise wrong; it becomes `Unreadable` once admitted."""

    id: FrameId
    reason: str
    detail: str


def parse_camera_message(parts: Sequence[Buffer]) -> Hello | FrameHeader | BadFrame:
    """Decode the header of what a camera sent: `[hello]` or `[frame][payload]`.

    Raises:
        WireError: with one of the `Refusal` reasons that concern a header alone; no frame can be named.
    """
    kind = _open(parts)
    if kind == "hello":
        _count_parts(parts, 1, kind)
        hello = _decode(_hello, parts[0])
        check_name(hello.camera, "camera")
        return hello
    if kind != "frame":
        raise WireError(Refusal.MESSAGE_TYPE, f"message type {kind[:40]!r}: a camera sends hello or frame")
    try:
        header: FrameHeader = _frame.decode(parts[0])
    except msgspec.ValidationError as error:
        named = _decode(_frame_name, parts[0])
        check_name(named.camera, "camera")
        captured_ns = named.captured_ns if isinstance(named.captured_ns, int) else 0
        frame_id = FrameId(named.camera, named.epoch, named.sequence, captured_ns if 0 <= captured_ns < 2**63 else 0)
        return BadFrame(frame_id, "format", f"frame header: {error}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # A field that the envelope has skipped, so nobody looked at its text yet.
        raise WireError(Refusal.HEADER_NOT_JSON, f"header is not JSON: {error}") from None
    check_name(header.camera, "camera")
    if len(parts) != 2:
        return BadFrame(header.id, "length", f"a frame message has 2 parts, header and payload, not {len(parts)}")
    return header


def parse_frame(parts: Sequence[Buffer], limits: FrameLimits | None = None, received_ns: int = 0) -> Frame | Unreadable:
    """Decode a whole frame message; raw mono8 and rgb8 pixels are a view of the payload, nothing is copied.

    Raises:
        WireError: no frame can be named.
    """
    header = parse_camera_message(parts)
    if isinstance(header, Hello):
        raise WireError(Refusal.MESSAGE_TYPE, "expected a frame, got hello")
    if isinstance(header, BadFrame):
        return Unreadable(header.id, header.reason, header.detail, received_ns)
    return read_frame(header, parts[1], limits or FrameLimits(), received_ns)


def read_frame(
    header: FrameHeader, payload: Buffer, limits: FrameLimits, received_ns: int, ring: RingView | None = None
) -> Frame | Unreadable:
    """Turn an admitted header and its payload into a frame, or into what says why it cannot be looked at.

    `ring` is the camera's; pixels there are looked at in place, until the frame is acknowledged.
    """
    try:
        if header.ring_offset is not None:
            payload = _ring_payload(header, payload, ring)
        image = decode_payload(header.encoding, header.width, header.height, payload, limits)
    except ImageRefused as refused:
        return Unreadable(header.id, refused.reason, str(refused), received_ns, header.part_id)
    return Frame(header.id, image, received_ns, header.part_id)


def _ring_payload(header: FrameHeader, payload: Buffer, ring: RingView | None) -> Buffer:
    if memoryview(payload).nbytes:
        raise ImageRefused("length", "a frame with ring_offset has an empty payload: its pixels lie in the ring")
    if ring is None:
        raise ImageRefused("ring", "the camera's HELLO named no ring that this daemon could open")
    if header.encoding not in RAW_CHANNELS:
        # What changes under a decoder's hands is not for decoders.
        raise ImageRefused("format", f"encoding {header.encoding[:40]!r} in a ring: expected raw pixels")
    # The product is bounded by the limits on sides once more, in `decode_payload`; here it only names a range.
    return ring.part(header.ring_offset or 0, max(0, header.width * header.height * RAW_CHANNELS[header.encoding]))


def pack_hello(camera: str, epoch: int, ring: RingNote | None = None) -> list[Buffer]:
    """Build `[hello]`."""
    return [_encode(Hello(WIRE_VERSION, check_name(camera, "camera"), epoch, ring))]


def pack_frame(header: FrameHeader, payload: Buffer) -> list[Buffer]:
    """Build `[frame][payload]`.

    Raises:
        WireError: the header is longer than 4096 bytes, or names no camera.
    """
    check_name(header.camera, "camera")
    encoded = _encode(header)
    if len(encoded) > MAX_HEADER_BYTES:
        raise WireError(Refusal.HEADER_TOO_LONG, f"header of {len(encoded)} bytes; at most {MAX_HEADER_BYTES}")
    return [encoded, payload]


# --- daemon -> camera -------------------------------------------------------------------------------------------------


def pack_credit(state: CreditState) -> list[Buffer]:
    """Build `[credit]`."""
    return [_encode(state)]


def parse_credit(parts: Sequence[Buffer]) -> CreditState:
    """Decode what a daemon sent to a camera.

    Raises:
        WireError: anything else.
    """
    # `also_acked` may be as long as the window, so a credit may be longer than a camera's header.
    kind = _open(parts, MAX_EVENT_BYTES)
    if kind != "credit":
        raise WireError(Refusal.MESSAGE_TYPE, f"message type {kind[:40]!r}: a daemon sends credit")
    _count_parts(parts, 1, kind)
    return _decode(_credit, parts[0])


# --- daemon -> everybody ----------------------------------------------------------------------------------------------


def event_topic(line: str, camera: str) -> bytes:
    """`event/LINE/CAMERA/`; the closing slash keeps cam1 from catching cam10."""
    return f"event/{line}/{camera}/".encode()


def head_topic(line: str) -> bytes:
    """`head/LINE/`."""
    return f"head/{line}/".encode()


def mask_state(mask_png: bytes | None) -> MaskState:
    """Where a subscriber finds the mask: `inline` up to 64 KiB, else `replay`; `none` when there is none."""
    if mask_png is None:
        return "none"
    return "inline" if len(mask_png) <= MASK_INLINE_BYTES else "replay"


def pack_event(event: DefectEvent, mask_png: bytes | None) -> list[Buffer]:
    """Build `[topic][event JSON][mask]`; the mask part is empty unless the event says `inline`."""
    mask = mask_png if event.mask == "inline" and mask_png is not None else b""
    return [event_topic(event.line, event.camera), encode_event(event), mask]


def pack_head(head: Head) -> list[Buffer]:
    """Build `[topic][head JSON]`."""
    return [head_topic(head.line), _encode(head)]


def parse_published(parts: Sequence[Buffer]) -> tuple[DefectEvent, bytes | None] | Head:
    """Decode what a daemon published: an event with its inline mask PNG, or a head.

    Raises:
        WireError: anything else; the event's own fields must agree with its topic.
    """
    topic = bytes(parts[0][:256]) if parts else b""
    if topic.startswith(b"head/"):
        _count_parts(parts, 2, "head")
        return _decode(_head, _bounded(parts[1], MAX_HEADER_BYTES))
    if not topic.startswith(b"event/"):
        raise WireError(Refusal.MESSAGE_TYPE, f"topic {topic[:80]!r}: expected event/LINE/CAMERA/ or head/LINE/")
    _count_parts(parts, 3, "event")
    event = decode_event(_bounded(parts[1], MAX_EVENT_BYTES))
    if topic != event_topic(event.line, event.camera):
        raise WireError(Refusal.HEADER_INVALID, f"topic {topic[:80]!r} is not that of the event {event.id[:200]}")
    mask = _bounded(parts[2], MASK_INLINE_BYTES)
    if (event.mask == "inline") != (len(mask) > 0):
        raise WireError(Refusal.PARTS, f"event {event.id[:200]} says mask {event.mask}, its part has {len(mask)} bytes")
    return event, bytes(mask) if event.mask == "inline" else None


def encode_event(event: DefectEvent) -> bytes:
    """The event's JSON, as published and logged."""
    return _encode(event)


def decode_event(data: Buffer) -> DefectEvent:
    """The event in `data`; unknown fields are skipped.

    Raises:
        WireError: not JSON, or not an event.
    """
    return _decode(_event, data)


# --- replay -----------------------------------------------------------------------------------------------------------

LoggedEvent = tuple[DefectEvent, bytes | None]


def pack_message(message: ReplayRequest | CursorRequest | CursorState | Refused) -> list[Buffer]:
    """Build a message of one part."""
    return [_encode(message)]


def parse_request(parts: Sequence[Buffer]) -> ReplayRequest | CursorRequest:
    """Decode what a subscriber asks of the log.

    Raises:
        WireError: anything else.
    """
    kind = _open(parts)
    if kind not in ("replay", "cursor"):
        raise WireError(Refusal.MESSAGE_TYPE, f"message type {kind[:40]!r}: a subscriber sends replay or cursor")
    _count_parts(parts, 1, kind)
    request = _decode(_request, parts[0])
    if isinstance(request, CursorRequest):
        check_name(request.name, "subscriber")
    return request


def pack_replay(header: ReplayHeader, events: Sequence[LoggedEvent]) -> list[Buffer]:
    """Build `[events][event][mask]...`."""
    parts: list[Buffer] = [_encode(header)]
    for event, mask_png in events:
        parts += [encode_event(event), mask_png or b""]
    return parts


def parse_answer(parts: Sequence[Buffer]) -> tuple[ReplayHeader, list[LoggedEvent]] | CursorState | Refused:
    """Decode what the log answered; the events follow each other without a hole, after the header's gap.

    Raises:
        WireError: anything else.
    """
    _open(parts)
    answer = _decode(_answer, parts[0])
    if not isinstance(answer, ReplayHeader):
        _count_parts(parts, 1, "cursor_at or refused")
        return answer
    if len(parts) != 1 + 2 * answer.count:
        raise WireError(Refusal.PARTS, f"answer of {len(parts)} parts: it says {answer.count} events")
    events = []
    for at in range(1, len(parts), 2):
        mask = _bounded(parts[at + 1], MAX_MASK_BYTES)
        events.append((decode_event(_bounded(parts[at], MAX_EVENT_BYTES)), bytes(mask) if len(mask) else None))
    for (before, _), (after, _) in itertools.pairwise(events):
        if after.log_sequence != before.log_sequence + 1:
            raise WireError(Refusal.HEADER_INVALID, f"{after.log_sequence} follows {before.log_sequence} in an answer")
    return answer, events


# --- headers ----------------------------------------------------------------------------------------------------------


def _open(parts: Sequence[Buffer], limit: int = MAX_HEADER_BYTES) -> str:
    """Check size and version of the first part and return its type."""
    if not parts:
        raise WireError(Refusal.PARTS, "message without parts")
    envelope = _decode(_envelope, _bounded(parts[0], limit))
    if envelope.version != WIRE_VERSION:
        raise WireError(Refusal.VERSION, f"wire version {envelope.version}: this side speaks {WIRE_VERSION}")
    return envelope.type


def _bounded(part: Buffer, limit: int) -> Buffer:
    size = memoryview(part).nbytes
    if size > limit:
        raise WireError(Refusal.HEADER_TOO_LONG, f"part of {size} bytes: at most {limit}")
    return part


def _count_parts(parts: Sequence[Buffer], count: int, kind: str) -> None:
    if len(parts) != count:
        raise WireError(Refusal.PARTS, f"{kind} message of {len(parts)} parts: expected {count}")


def _decode(decoder: msgspec.json.Decoder[_T], data: Buffer) -> _T:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise WireError(Refusal.HEADER_INVALID, f"header: {error}") from None
    # msgspec recurses through nested arrays, and reports text that is no UTF-8 by Python's own error.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(Refusal.HEADER_NOT_JSON, f"header is not JSON: {error}") from None
