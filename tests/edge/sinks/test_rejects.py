"""RejectRing: lossless, bounded by count and by bytes, and never waited for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.images import read_image
from edge.sinks.rejects import RejectRing, frame_path
from edge.types import FrameId


def noise(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def kept(folder: Path) -> list[int]:
    return sorted(int(file.stem.rpartition("-")[2]) for file in folder.glob("*.png"))


def fill(folder: Path, numbers: range, **bounds: int) -> RejectRing:
    with RejectRing(folder, **{"max_bytes": 10**6, "max_count": 100} | bounds) as ring:
        for number in numbers:
            ring.put(FrameId("cam", 7, number, 1), noise(number))
            while ring.kept + ring.dropped <= number - numbers.start:
                pass  # its queue is short; this test is about what is on disk
    return ring


def test_a_kept_frame_is_the_frame(tmp_path: Path) -> None:
    """Every pixel, in color."""
    fill(tmp_path, range(1))

    assert np.array_equal(read_image(frame_path(tmp_path, "cam", 7, 0)), noise(0))


def test_the_oldest_make_room_by_count(tmp_path: Path) -> None:
    """Also those of an earlier daemon."""
    fill(tmp_path, range(4), max_count=4)
    fill(tmp_path, range(4, 6), max_count=4)

    assert kept(tmp_path) == [2, 3, 4, 5]


def test_the_oldest_make_room_by_bytes(tmp_path: Path) -> None:
    """The bound holds; a frame that could never fit is counted, not kept."""
    ring = fill(tmp_path, range(6), max_bytes=5000)

    assert 0 < sum(file.stat().st_size for file in tmp_path.glob("*.png")) == ring.size_bytes <= 5000
    assert kept(tmp_path)[-1] == 5
    assert fill(tmp_path / "small", range(2), max_bytes=100).dropped == 2


def test_a_full_queue_is_counted_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict does not wait for a picture."""
    import threading

    gate = threading.Event()
    monkeypatch.setattr(RejectRing, "_write", lambda self, file, data: gate.wait(10))
    ring = RejectRing(tmp_path, max_bytes=10**6, max_count=10)
    for number in range(20):
        ring.put(FrameId("cam", 7, number, 1), noise(0))
    gate.set()
    ring.close()

    assert ring.dropped >= 11
