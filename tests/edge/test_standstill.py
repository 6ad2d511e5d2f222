"""A camera that repeats one picture is told from one that looks."""

from __future__ import annotations

import numpy as np

from edge.standstill import Standstill
from edge.types import Frame, FrameId


def frame(value: int, camera: str = "cam", shape: tuple[int, ...] = (4, 6, 1)) -> Frame:
    return Frame(FrameId(camera, 1, 0, 0), np.full(shape, value, np.uint8), 0)


def test_the_same_picture_too_often_in_a_row_is_counted() -> None:
    """From the third on; another picture begins anew."""
    told = Standstill({"cam": 3})

    assert [told(frame(value)) for value in (1, 1, 1, 1, 2, 1, 1, 1)] == [0, 0, 3, 4, 0, 0, 0, 3]


def test_one_pixel_is_enough_to_be_another_picture() -> None:
    """The last one of all: nothing of the picture is left out of the comparison."""
    told, moved = Standstill({"cam": 2}), frame(1)
    other = np.array(moved.image)
    other[-1, -1, -1] = 2

    assert told(moved) == 0 and told(Frame(moved.id, other, 0)) == 0
    assert told(frame(1)) == 0 and told(frame(1)) == 2


def test_the_same_bytes_in_another_shape_are_another_picture() -> None:
    """A camera that was turned."""
    told = Standstill({"cam": 2})

    assert [told(frame(1, shape=shape)) for shape in ((4, 6, 1), (6, 4, 1), (8, 1, 3))] == [0, 0, 0]


def test_cameras_are_told_apart_and_only_those_that_are_listed_count() -> None:
    """One that repeats does not speak for another; without a limit a camera may show what it likes."""
    told = Standstill({"left": 2, "right": 2})

    assert [told(frame(1, camera)) for camera in ("left", "right", "left", "other", "other")] == [0, 0, 2, 0, 0]


def test_a_picture_that_is_overwritten_in_place_is_another_one() -> None:
    """Frames of the shared ring lie in memory that the camera writes again."""
    told = Standstill({"cam": 2})
    memory = np.full((4, 6, 1), 1, np.uint8)

    assert told(Frame(FrameId("cam", 1, 0, 0), memory.view(), 0)) == 0
    memory[:] = 9
    assert told(Frame(FrameId("cam", 1, 1, 0), memory.view(), 0)) == 0
