"""docs/wire.md against the code: its examples run, and it names every word that the code uses."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import msgspec
import pytest

from edge import payloads, wire
from edge.clock import SystemClock
from edge.errors import SourceTimeout
from edge.events import DefectEvent
from edge.ring import RingNote
from edge.sinks.publisher import Publisher
from edge.sources.zeromq import ZeroMqSource
from edge.types import Frame, FrameId

PAGE = (Path(__file__).parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")
CAMERA, SUBSCRIBER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
JSON = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)


def test_the_camera_example_sends_every_frame_once() -> None:
    """As printed, but for the address: twenty frames through a window of eight."""
    seen: list[FrameId] = []
    stop = threading.Event()
    with ZeroMqSource("tcp://127.0.0.1:*", SystemClock(), cameras=["cam1"]) as source:

        def receive() -> None:
            while not stop.is_set():
                try:
                    frame = source.read(0.02)
                except SourceTimeout:
                    continue
                assert isinstance(frame, Frame) and frame.image.shape == (480, 640, 1)
                seen.append(frame.id)
                source.acknowledge([frame.id.key])

        thread = threading.Thread(target=receive)
        thread.start()
        exec(CAMERA.replace("tcp://127.0.0.1:5550", source.address), {})
        stop.set()
        thread.join(10)

    assert [frame.sequence for frame in seen] == list(range(20))


def test_the_subscriber_example_prints_three_events(capsys: pytest.CaptureFixture[str]) -> None:
    """As printed, but for the address."""
    event = msgspec.structs.replace(wire.decode_event(JSON[4].encode()), mask="inline")
    stop = threading.Event()
    with Publisher("tcp://127.0.0.1:*", "line-a", SystemClock()) as publisher:

        def publish() -> None:
            while not stop.wait(0.01):
                publisher.publish(event, b"12345")

        thread = threading.Thread(target=publish)
        thread.start()
        exec(SUBSCRIBER.replace("tcp://127.0.0.1:5551", publisher.address), {})
        stop.set()
        thread.join(10)

    assert capsys.readouterr().out == "cam1 42 reject 5 bytes of mask\n" * 3


def test_the_json_examples_are_what_the_code_reads() -> None:
    """Hello, frame, hello with a ring, credit, event, head, then what is asked of the log and answered; in full."""
    hello, frame, ring, credit, event, head, replay, events, cursor, at, refused = (text.encode() for text in JSON)

    assert isinstance(wire.parse_camera_message([hello]), wire.Hello)
    assert isinstance(wire.parse_camera_message([frame, b""]), wire.FrameHeader)
    assert wire.parse_camera_message([ring]).ring == RingNote(4711, 9, 10_485_760)
    assert wire.parse_credit([credit]).also_acked == (42, 43)
    assert wire.decode_event(event).log_sequence == 1043
    assert set(msgspec.json.decode(event)) == set(DefectEvent.__struct_fields__)
    assert wire.parse_request([replay]) == wire.ReplayRequest(1, 1, 1187262430196011, 1040)
    assert wire.parse_request([cursor]) == wire.CursorRequest(1, 2, "press", 1187262430196011, 1043)
    assert msgspec.json.decode(events, type=wire.ReplayHeader).count == 3
    assert wire.parse_answer([at]) == wire.CursorState(1, 2, "press", 1187262430196011, 1043, 1043)
    assert isinstance(wire.parse_answer([refused]), wire.Refused)
    assert wire.parse_published([b"head/line-a/", head]) == wire.Head(1, "line-a", 1187262430196011, 1043)


@pytest.mark.parametrize("word", [*wire.REFUSALS, *wire.UNREADABLE_REASONS, *payloads.ENCODINGS])
def test_the_page_names_every_word(word: str) -> None:
    """A reason or encoding that is added to the code must be explained."""
    assert f"`{word}`" in PAGE


def test_a_word_that_is_missing_would_be_noticed() -> None:
    """Control."""
    with pytest.raises(AssertionError):
        test_the_page_names_every_word("yuv422")
