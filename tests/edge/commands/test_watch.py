"""`kizu watch`: events as a table for people and as JSON lines for programs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from edge.clock import SystemClock
from edge.commands.watch import watch
from edge.errors import CommandError
from edge.images import encode_mask_png, read_image
from edge.sinks.publisher import Publisher
from sample_events import published_event

MASK = np.zeros((6, 8), bool)
MASK[2:4, 3:7] = True


@pytest.fixture
def address() -> Iterator[str]:
    """A line that publishes an event of cam1 and one of cam2 every few milliseconds."""
    stop = threading.Event()
    png = encode_mask_png(MASK)
    with Publisher("tcp://127.0.0.1:*", "line-a", SystemClock()) as publisher:

        def run() -> None:
            sequence = 0
            while not stop.wait(0.01):
                for camera in ("cam1", "cam2"):
                    sequence += 1
                    publisher.publish(published_event(sequence, camera, latency_ns=3_000_000), png)

        thread = threading.Thread(target=run)
        thread.start()
        yield publisher.address
        stop.set()
        thread.join(10)


def test_json_is_one_line_per_event(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The published JSON as it is, and nothing else on stdout."""
    watch(address, as_json=True, count=4)

    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(events) == 4
    assert [b["log_sequence"] - a["log_sequence"] for a, b in pairwise(events)] == [1, 1, 1]


def test_one_camera_can_be_chosen(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Others do not count."""
    watch(address, as_json=True, camera=["cam2"], count=3)

    assert {json.loads(line)["camera"] for line in capsys.readouterr().out.splitlines()} == {"cam2"}


def test_masks_are_written_as_pictures(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CAMERA-EPOCH-SEQUENCE.png at frame size."""
    watch(address, as_json=True, count=1, masks=tmp_path / "masks")

    shown = json.loads(capsys.readouterr().out)
    picture = read_image(tmp_path / "masks" / f"{shown['camera']}-7-{shown['frame_sequence']}.png")
    assert np.array_equal(picture[:, :, 0] > 0, MASK)


def test_the_table_shows_decision_and_latency(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """For people."""
    watch(address, count=3)

    shown = capsys.readouterr().out
    assert "reject" in shown and "3.0" in shown and "cam1" in shown


def test_a_masks_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """A file is in its place."""
    (tmp_path / "masks").write_text("")

    with pytest.raises(CommandError, match="--masks"):
        watch("tcp://127.0.0.1:9", masks=tmp_path / "masks")
