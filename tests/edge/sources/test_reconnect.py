"""A stream that is lost and comes back: waits that grow, are drawn and capped, and a real stream over HTTP."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from edge.clock import ManualClock, SystemClock
from edge.errors import SourceBroken, SourceTimeout
from edge.sources.reconnect import LONGEST_WAIT_S, SILENCE_S, ReconnectingSource
from edge.sources.video import VideoSource
from edge.types import Frame, FrameId, Unreadable


class Scripted:
    """A source that does what it is told: a number is a frame, "lost" breaks off, "" is silence."""

    def __init__(self, script: Iterator[int | str]) -> None:
        self._script = script
        self.open = 0

    def __call__(self) -> Scripted:
        self.open += 1
        return self

    def read(self, timeout_s: float) -> Frame | Unreadable:
        step = next(self._script, "")
        if step == "lost":
            raise SourceBroken("cable cut")
        if step == "":
            raise SourceTimeout("nothing")
        return Frame(FrameId("cam", 1, int(step), 0), np.zeros((2, 2, 1), np.uint8))

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *error: object) -> None:
        self.open -= 1


def source(
    script: list[int | str], clock: ManualClock, **options: float
) -> tuple[ReconnectingSource, Scripted, list[str]]:
    inner, told = Scripted(iter(script)), list[str]()
    made = ReconnectingSource(
        inner,
        clock=clock,
        give_up_after_s=options.get("give_up_after_s", 1e6),
        on_event=told.append,
        draw=lambda: options.get("draw", 1.0),
        sleep=clock.advance,
    )
    return made, inner, told


def read_all(made: ReconnectingSource, count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        try:
            found.append(made.read(1000.0).id.sequence)
        except SourceTimeout:
            continue
    return found


def test_a_lost_source_is_opened_again_and_its_frames_go_on() -> None:
    """What was delivered before and after is one row; the loss and the return are told."""
    made, inner, told = source([0, 1, "lost", 2, 3], ManualClock())

    assert read_all(made, 4) == [0, 1, 2, 3]
    assert made.reconnects == 1 and inner.open == 1
    assert [text.split(":")[0].split(" after")[0] for text in told] == ["lost", "back"]


@pytest.mark.parametrize(("draw", "share"), [(0.0, 0.5), (1.0, 1.0)])
def test_waits_double_up_to_a_cap_and_are_drawn_from_their_upper_half(draw: float, share: float) -> None:
    """0.5, 1, 2, ... 30 s; a picture starts over from the first."""
    clock = ManualClock()
    made, _, _ = source(["lost"] * 10 + [0] + ["lost", 1], clock, draw=draw)
    waits = []
    while True:
        before = clock.monotonic_ns()
        try:
            if made.read(1000.0).id.sequence == 1:
                break
        except SourceTimeout:
            waits.append((clock.monotonic_ns() - before) / 1e9)

    wanted = [min(LONGEST_WAIT_S, 0.5 * 2**n) * share for n in range(10)] + [0.5 * share]
    assert [wait for wait in waits if wait > 0] == pytest.approx(wanted)


def test_a_source_that_is_silent_is_lost_too() -> None:
    """A decoder that hangs says nothing; ten seconds of that are enough."""
    clock = ManualClock()
    made, inner, told = source([0, "", "", 1], clock)
    read_all(made, 1)
    clock.advance(SILENCE_S - 0.1)
    with pytest.raises(SourceTimeout):
        made.read(0.0)
    assert told == []

    clock.advance(0.1)
    with pytest.raises(SourceTimeout):
        made.read(0.0)

    assert "no picture for 10 s" in told[0] and inner.open == 0
    assert read_all(made, 1) == [1]


def test_a_source_that_stays_away_is_given_up_in_the_end() -> None:
    """After the time that was asked for, with the reason."""
    made, _, _ = source(["lost"] * 100, ManualClock(), give_up_after_s=60.0)

    with pytest.raises(SourceBroken, match=r"cable cut; lost for \d+ s, given up"):
        read_all(made, 1)


class Stream:
    """A camera that serves motion JPEG over HTTP and cuts each connection after five pictures."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        picture = cv2.imencode(".jpg", np.full((48, 64, 3), 99, np.uint8))[1].tobytes()
        part = b"--cut\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (len(picture), picture)
        while not self._done.is_set():
            try:
                connection = self._listener.accept()[0]
            except TimeoutError:
                continue
            self.connections += 1
            with connection:
                connection.settimeout(5)
                try:
                    connection.recv(4096)
                    connection.sendall(
                        b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=cut\r\n\r\n"
                    )
                    for _ in range(5):
                        connection.sendall(part)
                except OSError:
                    continue

    def close(self) -> None:
        self._done.set()
        self._thread.join(10)
        self._listener.close()


def test_a_real_stream_that_is_cut_again_and_again_goes_on() -> None:
    """OpenCV over HTTP: three connections' pictures in a row, each loss survived."""
    clock, stream = SystemClock(), Stream()
    try:
        with ReconnectingSource(
            lambda: VideoSource(f"http://127.0.0.1:{stream.port}/cam.mjpeg", "cam", clock=clock),
            clock=clock,
            give_up_after_s=30.0,
            draw=lambda: 0.0,
        ) as made:
            deadline = time.monotonic() + 30
            frames: list[Frame | Unreadable] = []
            while made.reconnects < 2 and time.monotonic() < deadline:
                try:
                    frames.append(made.read(0.2))
                except SourceTimeout:
                    continue
    finally:
        stream.close()

    assert made.reconnects == 2 and stream.connections >= 3
    assert all(isinstance(frame, Frame) and frame.image.shape == (48, 64, 3) for frame in frames)
