"""The wire: what is carried, what is refused and by which word."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge import images, payloads, wire
from edge.errors import ImageRefused, WireError
from edge.events import DefectEvent
from edge.payloads import FrameLimits, encode_image
from edge.types import Frame, Unreadable
from sample_events import published_event

HEADER: dict[str, Any] = {
    "type": "frame",
    "version": 1,
    "camera": "cam1",
    "epoch": 7,
    "sequence": 3,
    "captured_ns": 1_700_000_000_000_000_000,
    "encoding": "mono8",
    "width": 4,
    "height": 3,
}


def header(**changes: Any) -> bytes:
    return json.dumps(HEADER | changes).encode()


def picture(channels: int, height: int = 24, width: int = 32) -> NDArray[np.uint8]:
    """A smooth picture, so that JPEG keeps it."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [(x * 4 + y * k * 2) % 200 for k in range(1, channels + 1)]
    return np.stack(planes, axis=2).astype(np.uint8)


def bomb_png(side: int) -> bytes:
    """A few hundred bytes that claim `side` x `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


def bomb_jpeg(side: int) -> bytes:
    """A real small JPEG whose frame header is changed to claim `side` x `side` pixels."""
    _, data = encode_image(picture(1), "jpeg")
    data = bytearray(data)
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def event(**changes: Any) -> DefectEvent:
    return published_event(9, frame_sequence=3, frame_height=24, frame_width=32, **changes)


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_lossless_encoding_brings_back_the_very_pixels(encoding: Any, channels: int) -> None:
    """Gray stays gray and RGB stays RGB, in the same order."""
    sent = picture(channels)
    name, payload = encode_image(sent, encoding)

    frame = wire.parse_frame([header(encoding=name, width=32, height=24, part_id="p-1"), payload], received_ns=5)

    assert isinstance(frame, Frame)
    assert np.array_equal(frame.image, sent)
    assert (frame.id.key, frame.received_ns, frame.part_id) == (("cam1", 7, 3), 5, "p-1")


def test_a_jpeg_comes_back_nearly_the_same() -> None:
    """The colors are in the right order, within what JPEG loses."""
    sent = picture(3)
    name, payload = encode_image(sent, "jpeg")

    frame = wire.parse_frame([header(encoding=name, width=32, height=24), payload])

    assert isinstance(frame, Frame)
    assert np.abs(frame.image.astype(int) - sent.astype(int)).mean() < 6


def test_bgr_arrives_as_rgb() -> None:
    """Color order is fixed at the source: everything inside is RGB."""
    sent = picture(3)
    payload = np.ascontiguousarray(sent[:, :, ::-1]).tobytes()

    frame = wire.parse_frame([header(encoding="bgr8", width=32, height=24), payload])

    assert isinstance(frame, Frame) and np.array_equal(frame.image, sent)


@pytest.mark.parametrize(
    ("encoding", "red_at"),
    [("bayer_rggb8", (0, 0)), ("bayer_bggr8", (1, 1)), ("bayer_grbg8", (0, 1)), ("bayer_gbrg8", (1, 0))],
)
def test_a_red_scene_through_each_bayer_pattern_is_red(encoding: str, red_at: tuple[int, int]) -> None:
    """Only the red sites of the mosaic see light; the demosaiced picture must be red and nothing else."""
    mosaic = np.zeros((16, 16), np.uint8)
    mosaic[red_at[0] :: 2, red_at[1] :: 2] = 200

    frame = wire.parse_frame([header(encoding=encoding, width=16, height=16), mosaic.tobytes()])

    assert isinstance(frame, Frame)
    assert frame.image[4:-4, 4:-4].reshape(-1, 3).max(axis=0).tolist() == [200, 0, 0]


def test_raw_pixels_are_not_copied() -> None:
    """A mono8 frame is a view of the message's own memory, and read-only."""
    payload = bytearray(range(12))

    frame = wire.parse_frame([header(), payload])

    assert isinstance(frame, Frame)
    assert np.shares_memory(frame.image, np.frombuffer(payload, np.uint8))
    assert not frame.image.flags.writeable


def test_unknown_header_fields_are_skipped() -> None:
    """A newer camera may say more than this daemon understands."""
    frame = wire.parse_frame([header(lens="f/2.8", encoder_count=-12), bytes(12)])

    assert isinstance(frame, Frame)


NAMELESS = {
    "no parts": ([], "parts"),
    "hello with a payload": (
        [json.dumps({"type": "hello", "version": 1, "camera": "a", "epoch": 1}).encode(), b""],
        "parts",
    ),
    "header too long": ([header(padding="x" * 4096), bytes(12)], "header_too_long"),
    "not JSON": ([b"\x00\x01 frame", bytes(12)], "header_not_json"),
    "cut JSON": ([header()[:-1], bytes(12)], "header_not_json"),
    "not UTF-8": ([b'{"type":"\xff"}', bytes(12)], "header_not_json"),
    "nested without end": ([b'{"type":"frame","version":1,"x":' + b"[" * 4000, bytes(12)], "header_not_json"),
    "a list": ([b"[]", bytes(12)], "header_invalid"),
    "no type": ([b'{"version":1}', bytes(12)], "header_invalid"),
    "version of text": ([header(version="1"), bytes(12)], "header_invalid"),
    "another version": ([header(version=2), bytes(12)], "version"),
    "another type": ([header(type="credit"), bytes(12)], "message_type"),
    "negative epoch": ([header(epoch=-1), bytes(12)], "header_invalid"),
    "epoch beyond 63 bits": ([header(epoch=2**63), bytes(12)], "header_invalid"),
    "sequence of text": ([header(sequence="3"), bytes(12)], "header_invalid"),
    "slash in the name": ([header(camera="cam/1"), bytes(12)], "camera_name"),
    "capital in the name": ([header(camera="Cam1"), bytes(12)], "camera_name"),
    "line feed after the name": ([header(camera="cam1\n"), bytes(12)], "camera_name"),
    "empty name": ([header(camera=""), bytes(12)], "camera_name"),
    "name too long": ([header(camera="a" * 65), bytes(12)], "camera_name"),
}


@pytest.mark.parametrize(("parts", "reason"), NAMELESS.values(), ids=NAMELESS.keys())
def test_a_message_that_names_no_frame_is_refused_by_one_word(parts: list[bytes], reason: str) -> None:
    """The words are a closed set, so that every counter exists from the start."""
    with pytest.raises(WireError) as refused:
        wire.parse_frame(parts)

    assert refused.value.reason == reason
    assert reason in wire.REFUSALS


_, PNG = encode_image(picture(1), "png")
_, JPEG = encode_image(picture(1), "jpeg")
UNREADABLE: dict[str, tuple[list[Any], str]] = {
    "unknown encoding": ([header(encoding="yuv422"), bytes(12)], "format"),
    "encoding of another type": ([header(encoding=8), bytes(12)], "format"),
    "no width": ([json.dumps({k: v for k, v in HEADER.items() if k != "width"}).encode(), bytes(12)], "format"),
    "fractional width": ([header(width=4.5), bytes(12)], "format"),
    "negative width": ([header(width=-4), bytes(12)], "size"),
    "zero height": ([header(height=0), b""], "size"),
    "huge side": ([header(width=10**9), bytes(12)], "size"),
    "huge area": ([header(width=16384, height=16384), bytes(12)], "size"),
    "product beyond 64 bits": ([header(width=2**40, height=2**40), bytes(12)], "size"),
    "payload too short": ([header(), bytes(11)], "length"),
    "payload too long": ([header(), bytes(13)], "length"),
    "no payload": ([header()], "length"),
    "a part too many": ([header(), bytes(12), b""], "length"),
    "PNG called JPEG": ([header(encoding="jpeg", width=32, height=24), PNG], "format"),
    "text called PNG": ([header(encoding="png", width=32, height=24), b"hello"], "format"),
    "empty PNG": ([header(encoding="png", width=32, height=24), b""], "format"),
    "truncated PNG": ([header(encoding="png", width=32, height=24), PNG[:-20]], "truncated"),
    "truncated JPEG": ([header(encoding="jpeg", width=32, height=24), JPEG[:-20]], "truncated"),
    "PNG of another size": ([header(encoding="png", width=24, height=32), PNG], "size"),
    "PNG larger than stated": ([header(encoding="png", width=8, height=8), PNG], "bomb"),
    "PNG bomb": ([header(encoding="png", width=32, height=24), bomb_png(30000)], "bomb"),
    "PNG bomb that owns up": ([header(encoding="png", width=16000, height=16000), bomb_png(16000)], "size"),
    "JPEG bomb": ([header(encoding="jpeg", width=32, height=24), bomb_jpeg(30000)], "bomb"),
    "one-pixel mosaic": ([header(encoding="bayer_rggb8", width=1, height=1), b"a"], "size"),
}


@pytest.mark.parametrize(("parts", "reason"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_frame_that_can_be_named_is_unreadable_not_refused(parts: list[Any], reason: str) -> None:
    """Such a part is held: it gets INCONCLUSIVE(unreadable), so it must come through with its name."""
    frame = wire.parse_frame(parts)

    assert isinstance(frame, Unreadable), frame
    assert (frame.id.key, frame.reason) == (("cam1", 7, 3), reason)
    assert reason in wire.UNREADABLE_REASONS and frame.detail


def test_a_payload_over_the_sources_limit_is_unreadable() -> None:
    """A line may admit less than the library does."""
    frame = wire.parse_frame([header(), bytes(12)], FrameLimits(max_payload_bytes=11))

    assert isinstance(frame, Unreadable) and frame.reason == "length"


def test_a_decoder_that_ignores_the_length_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with the length check gone, the table above would find a frame made of half a payload."""

    def careless(encoding: str, width: int, height: int, payload: Any, limits: FrameLimits) -> NDArray[np.uint8]:
        return np.resize(np.frombuffer(payload, np.uint8), (height, width, 1))

    monkeypatch.setattr(wire, "decode_payload", careless)

    with pytest.raises(AssertionError):
        test_a_frame_that_can_be_named_is_unreadable_not_refused([header(), bytes(11)], "length")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=64) | st.just(header()), max_size=4))
def test_no_bytes_make_the_parser_fail_in_another_way(parts: list[bytes]) -> None:
    """Whatever arrives becomes a frame, an unreadable frame or a WireError."""
    for parse in (wire.parse_frame, wire.parse_credit, wire.parse_published):
        try:
            parse(parts)
        except WireError as refused:
            assert refused.reason in wire.REFUSALS


def test_hello_and_credit_survive_the_wire() -> None:
    """What one side packs, the other reads."""
    state = wire.CreditState(1, "cam1", 7, 40, (42, 44), 8)

    assert wire.parse_camera_message(wire.pack_hello("cam1", 7)) == wire.Hello(1, "cam1", 7)
    assert wire.parse_credit(wire.pack_credit(state)) == state


def test_a_frame_header_survives_the_wire() -> None:
    """Optional fields that are not set do not travel."""
    sent = wire.FrameHeader(1, "cam1", 7, 3, 5, "mono8", 4, 3)
    parts = wire.pack_frame(sent, bytes(12))

    assert wire.parse_camera_message(parts) == sent
    assert b"part_id" not in bytes(parts[0])


def test_an_event_travels_with_its_mask() -> None:
    """Topic, JSON, mask PNG."""
    mask = np.zeros((24, 32), bool)
    mask[3:5, 6:9] = True
    png = images.encode_mask_png(mask)

    parts = wire.pack_event(event(), png)

    assert parts[0] == b"event/line-a/cam1/"
    assert wire.parse_published(parts) == (event(), png)


@pytest.mark.parametrize(
    ("size", "state"), [(None, "none"), (1, "inline"), (64 * 1024, "inline"), (64 * 1024 + 1, "replay")]
)
def test_a_mask_travels_inline_up_to_64_kib(size: int | None, state: str) -> None:
    """A larger one must be fetched, and the message's third part is empty."""
    png = None if size is None else bytes(size)
    sent = event(mask=wire.mask_state(png))

    parts = wire.pack_event(sent, png)

    assert sent.mask == state
    assert len(parts[2]) == (size if state == "inline" else 0)
    assert wire.parse_published(parts) == (sent, png if state == "inline" else None)


def test_a_head_travels() -> None:
    """The newest sequence of a line."""
    head = wire.Head(1, "line-a", 5, 9)
    parts = wire.pack_head(head)

    assert parts[0] == b"head/line-a/"
    assert wire.parse_published(parts) == head


def test_unknown_event_fields_are_skipped() -> None:
    """New fields come at the end; an old reader must not care."""
    data = json.loads(wire.encode_event(event())) | {"humidity": 0.4}

    assert wire.decode_event(json.dumps(data).encode()) == event()


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([b"event/line-a/cam2/", wire.encode_event(event()), b"x"], "header_invalid"),
        ([b"event/line-a/cam1/", wire.encode_event(event()), b""], "parts"),
        ([b"event/line-a/cam1/", wire.encode_event(event(mask="none")), b"x"], "parts"),
        ([b"event/line-a/cam1/", wire.encode_event(event())], "parts"),
        ([b"event/line-a/cam1/", b"{}", b"x"], "header_invalid"),
        ([b"news/", b"{}"], "message_type"),
        ([b"head/line-a/", b"{}", b""], "parts"),
    ],
)
def test_a_published_message_that_contradicts_itself_is_refused(parts: list[bytes], reason: str) -> None:
    """A subscriber counts these and goes on."""
    with pytest.raises(WireError) as refused:
        wire.parse_published(parts)

    assert refused.value.reason == reason


def test_a_header_that_could_not_be_read_is_not_sent() -> None:
    """The camera learns it at once instead of being refused in silence."""
    with pytest.raises(WireError, match="4096"):
        wire.pack_frame(wire.FrameHeader(1, "cam1", 7, 3, 5, "m" * 5000, 4, 3), b"")


@pytest.mark.parametrize("shape", [(3,), (4, 4, 2), (4, 4, 3, 1)])
def test_only_pictures_are_encoded(shape: tuple[int, ...]) -> None:
    """Gray or RGB, bytes."""
    with pytest.raises(ImageRefused):
        payloads.encode_image(np.zeros(shape, np.uint8), "raw")
