"""imagezmq's own sender, unmodified, to a real source: its reply is the verdict's, and nothing it sends hurts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cv2
import imagezmq
import numpy as np
import pytest
import zmq

from edge.bridge import ImagezmqBridge
from edge.clock import SystemClock
from edge.errors import SourceTimeout
from edge.sender import CameraSender
from edge.sources.zeromq import ZeroMqSource
from edge.types import Frame, Unreadable

PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


@dataclass
class Hub:
    """A daemon's source, and the bridge before it, in threads; `seen` is what the daemon would judge."""

    address: str
    refused: list[str]
    seen: list[Frame | Unreadable] = field(default_factory=list)
    verdicts: threading.Event = field(default_factory=threading.Event)


@contextmanager
def hub(*cameras: str) -> Iterator[Hub]:
    done, refused = threading.Event(), list[str]()
    with (
        ZeroMqSource("tcp://127.0.0.1:*", SystemClock(), cameras=cameras) as source,
        CameraSender(source.address, cameras[0]) as sender,
        ImagezmqBridge("tcp://127.0.0.1:*", [sender], on_refused=refused.append) as bridge,
    ):
        made = Hub(bridge.address, refused)
        made.verdicts.set()

        def daemon() -> None:
            waiting: list[Any] = []
            while not done.is_set():
                try:
                    found = source.read(0.01)
                    made.seen.append(found)
                    waiting.append(found.id.key)
                except SourceTimeout:
                    pass
                if made.verdicts.is_set():
                    source.acknowledge(waiting)
                    waiting = []

        def work() -> None:
            while not done.is_set():
                bridge.step(0.01)

        threads = [threading.Thread(target=one) for one in (daemon, work)]
        for thread in threads:
            thread.start()
        try:
            yield made
        finally:
            done.set()
            for thread in threads:
                thread.join(10)


@contextmanager
def camera(address: str) -> Iterator[imagezmq.ImageSender]:
    sender = imagezmq.ImageSender(connect_to=address)
    sender.zmq_socket.setsockopt(zmq.RCVTIMEO, 20_000)
    sender.zmq_socket.setsockopt(zmq.LINGER, 0)
    yield sender
    sender.close()


def test_its_images_arrive_with_their_colors_and_are_answered_ok() -> None:
    """Color, gray and JPEG; OpenCV's BGR becomes the runtime's RGB."""
    with hub("cam") as made, camera(made.address) as sender:
        replies = [sender.send_image("cam", PICTURE), sender.send_image("cam", PICTURE[:, :, 0])]
        replies.append(sender.send_jpg("cam", cv2.imencode(".jpg", PICTURE)[1]))

    assert replies == [b"OK"] * 3
    color, gray, jpeg = made.seen
    assert isinstance(color, Frame) and (color.image == PICTURE[:, :, ::-1]).all()
    assert isinstance(gray, Frame) and (gray.image[:, :, 0] == PICTURE[:, :, 0]).all()
    assert isinstance(jpeg, Frame) and jpeg.image.shape == (24, 32, 3)
    assert [frame.id.sequence for frame in made.seen] == [0, 1, 2]


def test_a_camera_is_answered_when_its_frame_has_its_verdict_and_not_before() -> None:
    """Its lock step is the credit: no reply while the daemon has not acknowledged."""
    with hub("cam") as made, camera(made.address) as sender:
        made.verdicts.clear()
        replies: list[bytes] = []
        sending = threading.Thread(target=lambda: replies.append(sender.send_image("cam", PICTURE)))
        sending.start()
        deadline = time.monotonic() + 20
        while not made.seen and time.monotonic() < deadline:
            time.sleep(0.005)
        before = list(replies)
        made.verdicts.set()
        sending.join(20)

    assert (before, replies) == ([], [b"OK"])


def ask(address: str, parts: list[bytes]) -> bytes:
    """What a REQ that is no imagezmq gets."""
    with zmq.Context.instance().socket(zmq.REQ) as raw:
        raw.setsockopt(zmq.LINGER, 0)
        raw.connect(address)
        raw.send_multipart(parts)
        assert raw.poll(20_000)
        return bytes(raw.recv())


NOTE = {"msg": "cam", "dtype": "uint8", "shape": [2, 2]}


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([b"{}", b""], "not imagezmq's"),
        ([b"\xff" * 8, b""], "not imagezmq's"),
        ([b"[" * 4000, b""], "not imagezmq's"),
        ([json.dumps(NOTE).encode()], "2 parts"),
        ([b"x" * 5000, b""], "5000 bytes"),
        ([json.dumps(NOTE | {"msg": "other"}).encode(), b"1234"], "names no camera"),
        ([json.dumps(NOTE | {"dtype": "float32"}).encode(), b"1234"], "expected uint8"),
        ([json.dumps(NOTE | {"shape": [4]}).encode(), b"1234"], "expected uint8"),
        ([json.dumps({"msg": "cam"}).encode(), b"no jpeg"], "refused"),
    ],
)
def test_what_is_no_image_of_a_known_camera_is_refused_with_an_answer(parts: list[bytes], why: str) -> None:
    """A REQ without a reply would hang for ever; the next good image is taken."""
    with hub("cam") as made:
        answer = ask(made.address, parts)
        with camera(made.address) as sender:
            after = sender.send_image("cam", PICTURE)

    assert answer.startswith(b"refused: ") and why in answer.decode()
    assert after == b"OK" and len(made.seen) == 1 and len(made.refused) == 1


def test_pixels_that_are_not_as_their_shape_says_get_a_verdict() -> None:
    """The frame can be named, so the daemon answers for it: unreadable, and acknowledged."""
    with hub("cam") as made:
        answer = ask(made.address, [json.dumps(NOTE).encode(), b"123"])

    assert answer == b"OK"
    assert isinstance(made.seen[0], Unreadable) and made.seen[0].reason == "length"
