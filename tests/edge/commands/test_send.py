"""`kizu send`: a folder or a video becomes a camera, and the last line says what became of its frames."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge.clock import SystemClock
from edge.commands.send import send
from edge.errors import CommandError, DataError, SinkError, SourceTimeout
from edge.images import encode_png
from edge.payloads import encode_image
from edge.sources.zeromq import ZeroMqSource
from edge.types import Frame


class Receiver:
    """A daemon that acknowledges whatever comes and keeps the pictures."""

    def __init__(self) -> None:
        self.source = ZeroMqSource("tcp://127.0.0.1:*", SystemClock(), cameras=["cam1"])
        self.frames: list[Frame] = []
        self.deaf = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                frame = self.source.read(0.02)
            except SourceTimeout:
                continue
            assert isinstance(frame, Frame)
            self.frames.append(frame)
            if not self.deaf.is_set():
                self.source.acknowledge([frame.id.key])

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)
        self.source.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three gray pictures of 3 x 4 px in a folder and one below it."""
    for number, name in enumerate(("a.png", "b.png", "more/c.png")):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(np.full((3, 4, 1), number, np.uint8)))
    return tmp_path / "pictures"


@pytest.mark.parametrize("encoding", ["png", "raw"])
def test_a_folder_is_sent_in_order(
    receiver: Receiver, folder: Path, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line counts; nothing is left."""
    send(str(folder), camera="cam1", to=receiver.source.address, encoding=encoding, fps=200)

    assert [frame.image[0, 0, 0] for frame in receiver.frames] == [0, 1, 2]
    assert capsys.readouterr().out == "sent 3, resent 0, acknowledged 3, left 0\n"


def test_a_loop_goes_on_until_the_count(receiver: Receiver, folder: Path) -> None:
    """One camera, one epoch, sequences without a gap over all rounds."""
    send(str(folder), camera="cam1", to=receiver.source.address, loop=True, count=8)

    assert [frame.image[0, 0, 0] for frame in receiver.frames] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [frame.id.sequence for frame in receiver.frames] == list(range(8))
    assert len({frame.id.epoch for frame in receiver.frames}) == 1


def test_a_video_file_is_sent(receiver: Receiver, tmp_path: Path) -> None:
    """Every frame of it, as color."""
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (32, 24))
    for number in range(5):
        writer.write(np.full((24, 32, 3), 40 * number, np.uint8))
    writer.release()

    send(str(path), camera="cam1", to=receiver.source.address, encoding="jpeg")

    assert [frame.image.shape for frame in receiver.frames] == [(24, 32, 3)] * 5


def test_a_file_that_is_no_picture_is_named_and_skipped(
    receiver: Receiver, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr; the others are sent."""
    (folder / "aa.png").write_bytes(b"no picture")

    send(str(folder), camera="cam1", to=receiver.source.address)

    assert len(receiver.frames) == 3
    assert "skipped:" in (told := capsys.readouterr().err) and "aa.png" in told


def test_frames_never_acknowledged_are_an_error(
    receiver: Receiver, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 1, and the count is still printed."""
    receiver.deaf.set()

    with pytest.raises(SinkError, match="3 frames were never acknowledged") as failed:
        send(str(folder), camera="cam1", to=receiver.source.address, timeout=0.2)

    assert failed.value.exit_code == 1
    assert capsys.readouterr().out == "sent 3, resent 0, acknowledged 0, left 3\n"


def test_no_daemon_is_an_error_that_says_what_to_check(folder: Path) -> None:
    """Bounded by --timeout."""
    with pytest.raises(SinkError, match="is the daemon running"):
        send(str(folder), camera="cam1", to="tcp://127.0.0.1:9", timeout=0.1)


def test_wrong_options_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    """Exit status 2."""
    with pytest.raises(CommandError, match="encoding"):
        send(str(tmp_path), camera="cam1", to="tcp://127.0.0.1:9", encoding="gif")
    for fps in (0, -1, math.nan, math.inf, 1e-300):
        with pytest.raises(CommandError, match="--fps"):
            send(str(tmp_path), camera="cam1", to="tcp://127.0.0.1:9", fps=fps)
    for timeout in (0, -1, math.nan, math.inf):
        with pytest.raises(CommandError, match="--timeout"):
            send(str(tmp_path), camera="cam1", to="tcp://127.0.0.1:9", timeout=timeout)
    with pytest.raises(CommandError, match="--camera 'Left'"):
        send(str(tmp_path), camera="Left", to="tcp://127.0.0.1:9")
    with pytest.raises(CommandError, match="no such folder or file"):
        send(str(tmp_path / "absent"), camera="cam1", to="tcp://127.0.0.1:9")
    with pytest.raises(DataError):
        send(str(tmp_path), camera="cam1", to="tcp://127.0.0.1:9")


def test_a_single_picture_is_read_as_carefully_as_a_folder(
    receiver: Receiver, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OpenCV would take it for a video of one frame, and send half a JPEG as if it were a whole one."""
    send(str(folder / "b.png"), camera="cam1", to=receiver.source.address)
    whole = encode_image(np.full((64, 64, 3), 90, np.uint8), "jpeg")[1]
    (tmp_path / "half.jpg").write_bytes(bytes(whole)[: len(whole) // 2])

    with pytest.raises(DataError, match=r"half\.jpg: none of its 1 files is a picture"):
        send(str(tmp_path / "half.jpg"), camera="cam1", to=receiver.source.address)

    assert [frame.image[0, 0, 0] for frame in receiver.frames] == [1]
    assert "half.jpg" in capsys.readouterr().err


def test_a_folder_without_one_usable_picture_is_an_error(receiver: Receiver, tmp_path: Path) -> None:
    """Exit status 2: nothing sent is not done, also not with --loop, which would go round without end."""
    (tmp_path / "a.png").write_bytes(b"no picture")

    for loop in (False, True):
        with pytest.raises(DataError, match="none of its 1 files"):
            send(str(tmp_path), camera="cam1", to=receiver.source.address, loop=loop)


def test_a_bad_file_is_told_once_however_often_it_comes_round(
    receiver: Receiver, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loop over days must not fill a log with one line."""
    (folder / "aa.png").write_bytes(b"no picture")

    send(str(folder), camera="cam1", to=receiver.source.address, loop=True, count=9)

    assert capsys.readouterr().err.count("aa.png") == 1


def test_a_daemon_that_goes_silent_leaves_a_count(
    receiver: Receiver, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The frames that were given up are stated, and the camera is not said to be unknown."""
    receiver.deaf.set()

    with pytest.raises(SinkError, match="8 frames unacknowledged"):
        send(str(folder), camera="cam1", to=receiver.source.address, loop=True, timeout=0.3)

    assert capsys.readouterr().out == "sent 8, resent 0, acknowledged 0, left 8\n"
