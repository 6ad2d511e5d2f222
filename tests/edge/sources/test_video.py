"""Video through OpenCV: every frame of a file, the newest of a live stream, and reads that end in time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.clock import ManualClock
from edge.errors import EndOfStream, SourceBroken, SourceTimeout
from edge.images import cv2
from edge.sources.video import VideoSource

COUNT = 12


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MJPG film; frame i is red of brightness 20 i."""
    path = tmp_path_factory.mktemp("video") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for index in range(COUNT):
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[:, :, 2] = 20 * index
        writer.write(picture)
    writer.release()
    return path


def source(target: str | int | Path, **options: Any) -> VideoSource:
    return VideoSource(target if isinstance(target, int) else str(target), "cam", clock=ManualClock(), **options)


class FakeCapture:
    """OpenCV's side of a live stream: gives `frames` frames, then waits for `gate` and breaks off."""

    def __init__(self, frames: int) -> None:
        self.given, self.frames, self.gate = 0, frames, threading.Event()
        self.exhausted, self.released = threading.Event(), threading.Event()

    def isOpened(self) -> bool:
        return True

    def get(self, _: int) -> float:
        return 0.0

    def read(self) -> tuple[bool, Any]:
        if self.given < self.frames:
            self.given += 1
            return True, np.full((8, 8, 3), self.given, np.uint8)
        self.exhausted.set()
        self.gate.wait(20)
        return False, None

    def release(self) -> None:
        self.released.set()


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> FakeCapture:
    capture = FakeCapture(10)
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: capture)
    return capture


def test_every_frame_of_a_file_comes_once_in_order_and_in_rgb(clip: Path) -> None:
    """Red stays red; however slowly it is read, a file loses nothing."""
    with source(clip, queue_size=1) as camera:
        frames = [camera.read(10) for _ in range(COUNT)]
        with pytest.raises(EndOfStream, match=f"all {COUNT}"):
            camera.read(10)
        with pytest.raises(EndOfStream):
            camera.read(10)

    assert [frame.id.sequence for frame in frames] == list(range(COUNT))
    red = [int(frame.image[24, 32, 0]) for frame in frames]
    assert np.abs(np.array(red) - 20 * np.arange(COUNT)).max() < 8 and frames[-1].image[24, 32, 2] < 20
    assert camera.dropped == 0


def test_a_gray_model_gets_gray_frames_when_asked(clip: Path) -> None:
    """OpenCV gives color whatever the film holds."""
    with source(clip, channels=1) as camera:
        assert camera.read(10).image.shape == (48, 64, 1)


def test_a_file_cut_in_two_is_broken_and_not_at_its_end(clip: Path, tmp_path: Path) -> None:
    """Half a recording must not pass for all of it."""
    cut = tmp_path / "cut.avi"
    cut.write_bytes(clip.read_bytes()[: clip.stat().st_size // 3])

    with source(cut) as camera, pytest.raises(SourceBroken):
        for _ in range(COUNT):
            camera.read(10)


@pytest.mark.parametrize("content", [None, b"", b"no video"])
def test_what_is_no_video_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    """Missing, empty, or something else."""
    path = tmp_path / "film.avi"
    if content is not None:
        path.write_bytes(content)

    with source(path) as camera, pytest.raises(SourceBroken, match=r"film\.avi"):
        camera.read(10)


def test_a_read_ends_in_time_though_opencv_hangs(live: FakeCapture) -> None:
    """An RTSP camera that stops sending blocks OpenCV for half a minute; the daemon must not notice."""
    live.frames = 0
    with source("rtsp://camera/1") as camera:
        for timeout_s in (0.0, 0.05):
            with pytest.raises(SourceTimeout):
                camera.read(timeout_s)
        live.gate.set()


def test_a_live_stream_keeps_the_newest_frames_and_counts_the_rest(live: FakeCapture) -> None:
    """Of ten, one is read and then nobody reads: the last two are kept, the others counted; the numbers have no gap."""
    with source("rtsp://camera/1", queue_size=2) as camera:
        frames = [camera.read(10)]
        assert live.exhausted.wait(20)
        frames += [camera.read(10) for _ in range(10 - 1 - camera.dropped)]
        live.gate.set()
        with pytest.raises(SourceBroken, match="broke off after 10"):
            camera.read(10)

    assert camera.dropped >= 7
    assert [int(frame.image[0, 0, 0]) for frame in frames[-2:]] == [9, 10]
    assert [frame.id.sequence for frame in frames] == list(range(len(frames)))
    assert live.released.wait(20)


def test_a_queue_without_room_is_refused() -> None:
    """The queue is bounded: 0 would mean without end, and a long film would end up in memory."""
    with pytest.raises(ValueError, match="queue_size"):
        source("film.avi", queue_size=0)


def test_whatever_opencv_throws_ends_the_stream(live: FakeCapture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent thread death would look like a camera that sends nothing."""

    def explode() -> None:
        raise RuntimeError("driver")

    monkeypatch.setattr(live, "read", explode)
    with source(0) as camera, pytest.raises(SourceBroken, match="RuntimeError: driver"):
        camera.read(10)


def test_frames_of_another_depth_break_the_source(live: FakeCapture, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit frames are not squeezed into 8 in silence."""
    monkeypatch.setattr(live, "read", lambda: (True, np.zeros((4, 4), np.uint16)))
    with source(0) as camera, pytest.raises(SourceBroken, match="8-bit"):
        camera.read(10)


@pytest.mark.parametrize(("target", "is_live"), [("0", True), (3, True), ("rtsp://x/1", True), ("film.avi", False)])
def test_devices_and_urls_are_live_and_files_are_not(target: str | int, is_live: bool) -> None:
    """What may drop frames and what must not."""
    assert source(target).live is is_live
