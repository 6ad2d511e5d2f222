"""From good photographs to defect events: every command as a user types it, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.client import Subscriber
from edge.demo.line import PHOTOS, DaemonProcess, write_config
from edge.errors import SourceTimeout
from edge.events import DefectEvent

pytest.importorskip("torch", reason="training needs torch: make setup")

SIZE_PX, STEPS = "128", "120"
"""Small enough for half a minute, large enough to see paint on a hazelnut."""


def kizu(*arguments: str | Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle trained on the shipped good photographs."""
    out = tmp_path_factory.mktemp("photographs") / "nuts"
    kizu(
        "train", "student-teacher", "--preset", "line", "--data", PHOTOS, "--out", out, "--size", SIZE_PX,
        "--steps", STEPS,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def evaluation(trained: Path) -> dict[str, object]:
    """What `kizu evaluate` says of it."""
    figures: dict[str, object] = json.loads(kizu("evaluate", trained, "--data", PHOTOS, "--json", "-").stdout)
    return figures


@pytest.fixture
def ready(trained: Path, tmp_path: Path) -> Iterator[dict[str, object]]:
    config = write_config(tmp_path / "line.toml", trained, ["left", "right"])
    with DaemonProcess(config) as daemon:
        yield daemon.wait_until_ready(60)
        assert daemon.stop() == 0, daemon.output


def receive(subscriber: Subscriber, count: int) -> list[DefectEvent]:
    events = []
    while len(events) < count:
        try:
            events.append(subscriber.receive(30.0)[0])
        except SourceTimeout:
            break
    return events


def test_a_line_trained_on_good_photographs_finds_the_flawed_ones(
    ready: dict[str, object], evaluation: dict[str, object]
) -> None:
    """Two `kizu send` cameras, one good and one flawed; one verdict a frame, the very scores of `kizu evaluate`."""
    good, flawed = PHOTOS / "test" / "good", PHOTOS / "test" / "color"
    with Subscriber(str(ready["events_address"])) as subscriber:
        subscriber.wait_until_connected(20)
        for camera, folder in (("left", good), ("right", flawed)):
            kizu("send", folder, "--camera", camera, "--to", str(ready["frames_address"]), "--fps", "50")
        events = receive(subscriber, 15)

    images = {Path(image["path"]): image for image in evaluation["images"]}  # type: ignore[attr-defined]
    scores = {
        "left": [image["score"] for path, image in sorted(images.items()) if path.parent.name == "good"],
        "right": [image["score"] for path, image in sorted(images.items()) if path.parent.name == "color"],
    }
    sent = Counter(
        {("left", sequence): 1 for sequence in range(4)} | {("right", sequence): 1 for sequence in range(11)}
    )
    assert Counter((event.camera, event.frame_sequence) for event in events) == sent
    assert subscriber.lost == 0
    for event in events:
        assert event.score == pytest.approx(scores[event.camera][event.frame_sequence], rel=1e-5)
    rejected = sum(event.decision == "reject" and len(event.regions) > 0 for event in events if event.camera == "right")
    assert rejected >= 8, [(event.camera, event.decision, event.score) for event in events]


def test_the_evaluation_tells_flawed_from_good(evaluation: dict[str, object]) -> None:
    """Half a minute of training is enough for paint on hazelnuts; a broken chain is near one half."""
    assert float(str(evaluation["image_auroc"])) > 0.95


def test_too_few_good_parts_to_certify_are_refused_with_the_number_needed(trained: Path, tmp_path: Path) -> None:
    """Four good photographs cannot promise 1 % with 95 % confidence: that takes 299."""
    out = tmp_path / "certified"
    done = kizu(
        "calibrate", trained, "--good", PHOTOS / "test" / "good", "--false-rejects", "1%", "--confidence", "0.95",
        "--out", out, ok=False,
    )  # fmt: skip

    assert done.returncode != 0 and "299" in done.stdout + done.stderr
    assert not out.exists()


def test_the_images_a_model_learned_from_cannot_certify_it(trained: Path, tmp_path: Path) -> None:
    """A certificate from training images would be worth nothing; they are recognized by content."""
    done = kizu(
        "calibrate", trained, "--good", PHOTOS / "train" / "good", "--false-rejects", "20%", "--confidence", "0.9",
        "--out", tmp_path / "certified", ok=False,
    )  # fmt: skip

    assert done.returncode == 2, done.stdout + done.stderr
    assert "train" in done.stderr
