"""Pixels in shared memory: looked at in place, never written again too early, and never trusted blindly."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge.clock import SystemClock
from edge.errors import ImageRefused, SinkFull, SourceTimeout
from edge.ring import MAX_RING_BYTES, Ring, RingNote, RingView
from edge.sender import CameraSender
from edge.sources.zeromq import ZeroMqSource
from edge.types import Frame, Unreadable

WIDTH, HEIGHT = 8, 4
BYTES = WIDTH * HEIGHT
CLOCK = SystemClock()


@pytest.fixture
def source(tmp_path: Path) -> Iterator[ZeroMqSource]:
    with ZeroMqSource(f"ipc://{tmp_path}/frames", CLOCK, cameras=["cam"], window=4) as made:
        yield made


def read(source: ZeroMqSource, sender: CameraSender) -> Frame | Unreadable:
    for _ in range(500):
        sender.pump()
        try:
            return source.read(0.01)
        except SourceTimeout:
            continue
    raise AssertionError("no frame came")


def admitted(source: ZeroMqSource, sender: CameraSender) -> None:
    """Let the HELLO and its answer pass; the source is driven by this thread as well."""
    while sender._granted == 0:
        sender.pump()
        with pytest.raises(SourceTimeout):
            source.read(0.01)


def grab(sender: CameraSender, value: int) -> int:
    """Grab a picture of one gray into the next slot and send it; the slot's number."""
    slot = sender.slot(1.0)
    slot.pixels[:BYTES] = value
    sender.send_slot(slot, "mono8", WIDTH, HEIGHT, timeout_s=1.0)
    return slot.index


def test_a_frame_is_looked_at_in_place(source: ZeroMqSource) -> None:
    """No copy on the way: what the camera writes into the slot is what the frame shows."""
    with Ring(4, BYTES) as ring, CameraSender(source.address, "cam", ring=ring) as sender:
        admitted(source, sender)
        index = grab(sender, 7)
        frame = read(source, sender)

        assert isinstance(frame, Frame) and frame.image.shape == (HEIGHT, WIDTH, 1)
        assert (frame.image == 7).all()
        ring.slot(index)[:] = 9
        assert (frame.image == 9).all()
        with pytest.raises(ValueError, match="read-only"):
            frame.image[0] = 1


def test_a_slot_is_given_out_again_only_when_its_frame_is_acknowledged(source: ZeroMqSource) -> None:
    """Two slots, two frames out: the third waits for a verdict, and gets the slot of the one that has it."""
    with Ring(2, BYTES) as ring, CameraSender(source.address, "cam", ring=ring) as sender:
        admitted(source, sender)
        used = [grab(sender, 1), grab(sender, 2)]
        frames = [read(source, sender), read(source, sender)]
        with pytest.raises(SinkFull):
            sender.slot(0.0)

        source.acknowledge([frames[1].id.key])
        while sender.left == 2:
            source.service()
            sender.pump(0.01)

        assert sender.slot(0.0).index == used[1]
        assert isinstance(frames[0], Frame) and (frames[0].image == 1).all()


def test_control_a_slot_that_is_free_at_once_shows_another_picture(source: ZeroMqSource) -> None:
    """Planted bug: a camera that writes before the acknowledgement; the frame under judgment changes."""
    with Ring(1, BYTES) as ring, CameraSender(source.address, "cam", ring=ring) as sender:
        admitted(source, sender)
        grab(sender, 1)
        frame = read(source, sender)
        sender._free.append(0)
        grab(sender, 2)

        assert isinstance(frame, Frame) and (frame.image == 2).all()


def test_a_frame_outlives_the_camera_that_grabbed_it(source: ZeroMqSource) -> None:
    """The camera is gone before its frame is judged; its memory is not."""
    with Ring(2, BYTES) as ring, CameraSender(source.address, "cam", ring=ring) as sender:
        admitted(source, sender)
        grab(sender, 5)
        frame = read(source, sender)

    assert isinstance(frame, Frame) and (frame.image == 5).all()


def unsealed(size: int) -> RingNote:
    fd = os.memfd_create("planted", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return RingNote(os.getpid(), fd, size)


def plain_file(path: Path) -> RingNote:
    path.write_bytes(b"x" * BYTES)
    return RingNote(os.getpid(), os.open(path, os.O_RDWR), BYTES)


def pipe() -> RingNote:
    return RingNote(os.getpid(), os.pipe()[0], BYTES)


@pytest.mark.parametrize("kind", ["unsealed", "file", "pipe", "missing", "longer"])
def test_memory_that_could_be_cut_short_or_is_no_ring_is_refused(tmp_path: Path, kind: str) -> None:
    """A mapping of an unsealed memory would end the daemon the moment a camera shrinks it."""
    with Ring(1, BYTES) as ring:
        notes = {
            "unsealed": unsealed(BYTES),
            "file": plain_file(tmp_path / "file"),
            "pipe": pipe(),
            "missing": RingNote(os.getpid(), 9999, BYTES),
            "longer": RingNote(os.getpid(), ring.note.fd, 2 * BYTES),
        }
        with pytest.raises(ImageRefused, match="ring") as refused:
            RingView(notes[kind])

    assert refused.value.reason == "ring"


def test_a_ring_cannot_be_cut_short_by_its_own_maker() -> None:
    """The seal holds for everybody, so no later check is needed."""
    with Ring(1, BYTES) as ring, pytest.raises(PermissionError):
        os.ftruncate(ring.note.fd, 1)


@pytest.mark.parametrize(
    ("offset", "encoding", "width", "reason"),
    [
        (BYTES, "mono8", WIDTH, "length"),
        (0, "rgb8", WIDTH, "length"),
        (0, "png", WIDTH, "format"),
        (0, "mono8", -1, "size"),
    ],
)
def test_a_frame_that_does_not_lie_in_its_ring_is_unreadable(
    source: ZeroMqSource, offset: int, encoding: str, width: int, reason: str
) -> None:
    """Beyond the end, longer than it, not raw: an answer, and the line goes on."""
    with Ring(1, BYTES) as ring, CameraSender(source.address, "cam", ring=ring) as sender:
        admitted(source, sender)
        sender._ring.slot_bytes = 1  # type: ignore[union-attr]
        slot = sender.slot()
        wrong = type(slot)(slot.index, slot.pixels)
        sender._free[0] = offset
        sender.send_slot(type(slot)(offset, wrong.pixels), encoding, width, HEIGHT)

        found = read(source, sender)

    assert isinstance(found, Unreadable) and found.reason == reason


def test_a_ring_is_not_looked_at_over_tcp() -> None:
    """Who may be on another host must not name memory of this one; such frames are unreadable, others are not."""
    with (
        ZeroMqSource("tcp://127.0.0.1:*", CLOCK, cameras=["cam"], window=4) as source,
        Ring(2, BYTES) as ring,
        CameraSender(source.address, "cam", ring=ring) as sender,
    ):
        admitted(source, sender)
        grab(sender, 1)
        in_ring = read(source, sender)
        sender.send(np.zeros((HEIGHT, WIDTH), np.uint8), encoding="raw")
        sent = read(source, sender)

    assert isinstance(in_ring, Unreadable) and in_ring.reason == "ring"
    assert isinstance(sent, Frame)


def test_rings_of_many_cameras_starts_are_given_back(source: ZeroMqSource) -> None:
    """A camera that restarts all day does not fill the daemon with mappings."""
    before = threading.active_count(), maps()
    for _ in range(20):
        with Ring(2, BYTES) as ring, CameraSender(source.address, "cam", ring=ring) as sender:
            admitted(source, sender)
            grab(sender, 1)
            source.acknowledge([read(source, sender).id.key])
            source.service()

    assert (threading.active_count(), maps() <= before[1] + 1) == (before[0], True)


def maps() -> int:
    return Path("/proc/self/maps").read_text().count("kizu-ring")


@pytest.mark.parametrize(("slots", "size"), [(0, 1), (1, 0), (2, MAX_RING_BYTES)])
def test_a_ring_of_no_size_or_too_large_a_one_is_refused(slots: int, size: int) -> None:
    """1 GiB in all."""
    with pytest.raises(ValueError, match="expected 1 to"):
        Ring(slots, size)
