"""What every Source promises, whatever is behind it.

To add a source, write a function that opens one holding FRAMES frames of one camera, and put it into FACTORIES.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.clock import SystemClock
from edge.errors import EndOfStream, SinkFull, SourceBroken, SourceTimeout
from edge.images import cv2, encode_png
from edge.protocols import Source
from edge.types import Frame, FrameId, Unreadable

FRAMES = 6
PATIENCE_S = 10.0
"""How long a frame that is there may take; far above what any source needs."""


@dataclass(frozen=True)
class Case:
    """An open source; `finite` if it ends after FRAMES frames, else it falls silent then."""

    source: Source
    finite: bool


def picture(index: int) -> NDArray[np.uint8]:
    return np.full((16, 24, 1), 10 * index, np.uint8)


@contextmanager
def folder(tmp_path: Path) -> Iterator[Case]:
    from edge.sources.folder import FolderSource

    for index in range(FRAMES):
        (tmp_path / f"{index}.png").write_bytes(encode_png(picture(index)))
    with FolderSource(tmp_path, "cam", clock=SystemClock()) as source:
        yield Case(source, finite=True)


@contextmanager
def video(tmp_path: Path) -> Iterator[Case]:
    from edge.sources.video import VideoSource

    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (24, 16))
    for index in range(FRAMES):
        writer.write(np.repeat(picture(index), 3, axis=2))
    writer.release()
    with VideoSource(str(path), "cam", clock=SystemClock()) as source:
        yield Case(source, finite=True)


@contextmanager
def zeromq(tmp_path: Path) -> Iterator[Case]:
    from edge.sender import CameraSender
    from edge.sources.zeromq import ZeroMqSource

    stop = threading.Event()

    def send(address: str) -> None:
        with CameraSender(address, "cam") as sender:
            index = 0
            while index < FRAMES and not stop.is_set():
                try:
                    sender.send(picture(index), encoding="raw", timeout_s=0.1)
                    index += 1
                except SinkFull:  # no credit yet: the source grants it while it is read
                    continue
            stop.wait(PATIENCE_S)

    with ZeroMqSource("tcp://127.0.0.1:*", SystemClock(), cameras=["cam"], window=FRAMES) as source:
        camera = threading.Thread(target=send, args=(source.address,), daemon=True)
        camera.start()
        try:
            yield Case(source, finite=False)
        finally:
            stop.set()
            camera.join(PATIENCE_S)


FACTORIES: dict[str, Callable[[Path], AbstractContextManager[Case]]] = {
    "folder": folder,
    "video": video,
    "zeromq": zeromq,
}


@pytest.fixture(params=FACTORIES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    with FACTORIES[request.param](tmp_path) as opened:
        yield opened


def check_frames(frames: list[Frame | Unreadable]) -> None:
    """Every frame of one camera start: named, in order, without a gap, uint8 and read-only."""
    assert len({frame.id.key for frame in frames}) == len(frames)
    assert len({(frame.id.camera, frame.id.epoch) for frame in frames}) == 1
    assert [frame.id.sequence for frame in frames] == list(range(len(frames)))
    for frame in frames:
        assert frame.id.captured_ns > 1_600_000_000_000_000_000  # Unix nanoseconds, not seconds and not monotonic
        assert frame.received_ns > 0
        assert isinstance(frame, Frame) and frame.image.dtype == np.uint8 and frame.image.shape[2] in (1, 3)
        assert frame.image.flags.c_contiguous and not frame.image.flags.writeable


def check_timeout(source: Source, timeout_s: float) -> None:
    """Nothing to come: SourceTimeout, and not much later than asked."""
    begun = time.monotonic()
    with pytest.raises(SourceTimeout):
        source.read(timeout_s)
    assert time.monotonic() - begun < timeout_s + 2.0


def test_it_is_a_source(case: Case) -> None:
    """It has what the protocol names."""
    assert isinstance(case.source, Source)


def test_it_delivers_each_frame_once_in_order(case: Case) -> None:
    """Never reordered, never repeated, never skipped; the pictures are those that were sent."""
    frames = [case.source.read(PATIENCE_S) for _ in range(FRAMES)]

    check_frames(frames)
    levels = [float(frame.image.mean()) for frame in frames if isinstance(frame, Frame)]
    assert np.abs(np.array(levels) - 10 * np.arange(FRAMES)).max() < 4


def test_after_the_last_frame_it_says_so(case: Case) -> None:
    """A finite source is at its end, and stays there; a network source falls silent, in time."""
    for _ in range(FRAMES):
        case.source.read(PATIENCE_S)

    if not case.finite:
        check_timeout(case.source, 0.05)
        return
    for _ in range(2):
        with pytest.raises(EndOfStream):
            case.source.read(PATIENCE_S)


def test_after_closing_it_is_broken_and_closing_again_is_harmless(case: Case) -> None:
    """Nobody waits for a source that is gone."""
    case.source.read(PATIENCE_S)
    case.source.__exit__(None, None, None)
    case.source.__exit__(None, None, None)

    with pytest.raises(SourceBroken):
        case.source.read(0.1)


class Planted:
    """A source with one bug: `swap` reorders, `repeat` delivers twice, `silent` returns instead of raising."""

    def __init__(self, bug: str) -> None:
        order = {"swap": [0, 2, 1], "repeat": [0, 1, 1], "none": [0, 1, 2]}
        self._sequences = iter(order.get(bug, []))
        self._bug = bug

    def read(self, timeout_s: float) -> Frame | Unreadable:
        try:
            return Frame(FrameId("cam", 1, next(self._sequences), time.time_ns()), picture(1), time.monotonic_ns())
        except StopIteration:
            if self._bug == "silent":
                return None  # type: ignore[return-value]
            raise SourceTimeout("nothing") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def test_the_checks_pass_a_source_without_bugs() -> None:
    """The control of the controls."""
    source = Planted("none")

    check_frames([source.read(0.0) for _ in range(3)])
    check_timeout(source, 0.0)


@pytest.mark.parametrize("bug", ["swap", "repeat"])
def test_the_checks_catch_a_source_that_reorders_or_repeats(bug: str) -> None:
    """Planted bugs."""
    source = Planted(bug)

    with pytest.raises(AssertionError):
        check_frames([source.read(0.0) for _ in range(3)])


def test_the_checks_catch_a_source_that_returns_nothing() -> None:
    """Planted bug: None instead of SourceTimeout would end in the pipeline as a frame."""
    with pytest.raises(pytest.fail.Exception):
        check_timeout(Planted("silent"), 0.0)
