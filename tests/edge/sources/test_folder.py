"""A folder as a camera: name order, a stated rate, and no file passed over in silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge.clock import ManualClock
from edge.errors import DataError, EndOfStream, SourceBroken, SourceTimeout
from edge.images import encode_png
from edge.sources.folder import FolderSource
from edge.types import Frame, Unreadable


def image(value: int) -> bytes:
    return encode_png(np.full((8, 9, 1), value, np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for value, name in enumerate(("b.png", "a.png", "c.PNG")):
        (tmp_path / name).write_bytes(image(value))
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def source(folder: Path, clock: ManualClock | None = None, **options: object) -> FolderSource:
    clock = clock or ManualClock()
    return FolderSource(folder, "cam", clock=clock, sleep=clock.advance, **options)  # type: ignore[arg-type]


def values(frames: list[Frame | Unreadable]) -> list[int]:
    return [int(frame.image[0, 0, 0]) for frame in frames if isinstance(frame, Frame)]


def test_images_come_in_the_order_of_their_names_and_then_the_end(folder: Path) -> None:
    """Other files are no frames; the end is said again each time it is asked for."""
    with source(folder) as camera:
        assert values([camera.read(1.0) for _ in range(3)]) == [1, 0, 2]
        for _ in range(2):
            with pytest.raises(EndOfStream, match="all 3"):
                camera.read(1.0)


def test_a_loop_starts_over_with_new_frame_numbers(folder: Path) -> None:
    """The same picture again is another frame."""
    camera = source(folder, loop=True)
    frames = [camera.read(1.0) for _ in range(7)]

    assert values(frames) == [1, 0, 2, 1, 0, 2, 1]
    assert [frame.id.sequence for frame in frames] == list(range(7))


def test_frames_come_at_the_stated_rate(folder: Path) -> None:
    """10 fps: the first at once, then one every 100 ms of the clock that was given; nobody really sleeps."""
    clock = ManualClock()
    camera = source(folder, clock, fps=10, loop=True)
    times = [camera.read(1.0).received_ns / 1e6 for _ in range(4)]

    assert times == [0, 100, 200, 300]


def test_a_frame_that_is_not_due_in_time_is_a_timeout_and_comes_later(folder: Path) -> None:
    """The reader waits no longer than it said, and loses nothing by it."""
    clock = ManualClock()
    camera = source(folder, clock, fps=1)
    camera.read(0.0)
    with pytest.raises(SourceTimeout):
        camera.read(0.4)
    assert clock.monotonic_ns() == 0.4e9

    frame = camera.read(0.7)
    assert (frame.id.sequence, frame.received_ns) == (1, 10**9)


def test_a_slow_reader_is_not_flooded_with_what_it_missed(folder: Path) -> None:
    """A camera does not send the last minute again at once."""
    clock = ManualClock()
    camera = source(folder, clock, fps=10, loop=True)
    camera.read(0.0)
    clock.advance(60.0)
    camera.read(0.0)

    with pytest.raises(SourceTimeout):
        camera.read(0.05)


def test_an_unreadable_file_is_a_frame_that_can_be_named(folder: Path) -> None:
    """It gets its number and its reason; the images around it are not affected."""
    (folder / "b.png").write_bytes(image(5)[:-20])
    (folder / "c.PNG").unlink()
    (folder / "c.PNG").mkdir()
    (folder / "d.jpg").write_bytes(b"not a JPEG")
    camera = source(folder)
    frames = [camera.read(1.0) for _ in range(3)]

    assert [frame.id.sequence for frame in frames] == [0, 1, 2]
    assert [frame.reason for frame in frames if isinstance(frame, Unreadable)] == ["truncated", "format"]
    assert isinstance(frames[1], Unreadable) and "b.png" in frames[1].detail


def test_a_file_that_vanishes_after_listing_is_unreadable_too(folder: Path) -> None:
    """Someone tidied up in between."""
    camera = source(folder)
    (folder / "a.png").unlink()

    assert isinstance(camera.read(1.0), Unreadable)
    assert isinstance(camera.read(1.0), Frame)


def test_two_starts_have_different_epochs(folder: Path) -> None:
    """Or the second run's frames would be taken for duplicates of the first."""
    assert source(folder).read(1.0).id.epoch != source(folder).read(1.0).id.epoch
    assert source(folder, epoch=5).read(1.0).id.epoch == 5


def test_folders_below_are_read_when_asked(folder: Path) -> None:
    """MVTec's layout has a folder for each kind."""
    (folder / "kind").mkdir()
    (folder / "kind" / "x.png").write_bytes(image(9))

    assert len(source(folder).files) == 3 and len(source(folder, recursive=True).files) == 4


def test_a_folder_without_images_is_refused_at_once(tmp_path: Path) -> None:
    """With the path and what was expected."""
    with pytest.raises(DataError, match="no image in it"):
        source(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        source(tmp_path / "missing")
    with pytest.raises(ValueError, match="fps"):
        source(tmp_path, fps=0)


def test_a_closed_source_says_so(folder: Path) -> None:
    """Not the end of the stream: there would have been more."""
    with source(folder) as camera:
        camera.read(1.0)

    with pytest.raises(SourceBroken, match="closed"):
        camera.read(1.0)
