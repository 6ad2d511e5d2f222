"""A method whose image score is no maximum, through every command: `edge` and `calib` know nothing of ConAD."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge.bundle import open_bundle
from edge.client import Subscriber
from edge.demo.line import PHOTOS, DaemonProcess, write_config

pytest.importorskip("torch", reason="training needs torch: make setup")

SMALL = ["--size", "64", "--steps", "60", "--threads", "1"]
SMALL += [f"--set={one}" for one in ("widths=8,16,16", "critic_widths=8,8,8", "latent=16", "learning_rate=1e-3")]


def kizu(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "edge.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_conad_is_trained_certified_evaluated_and_run_like_any_other_method(tmp_path: Path) -> None:
    """Four good photographs certify that no more than every second good part is rejected; then a camera sends flaws."""
    trained, certified = tmp_path / "trained", tmp_path / "certified"
    kizu("train", "conad", "--data", PHOTOS, "--out", trained, *SMALL)
    good = PHOTOS / "test" / "good"
    kizu("calibrate", trained, "--good", good, "--false-rejects", "50%", "--confidence", "0.9", "--out", certified)
    evaluation = json.loads(kizu("evaluate", certified, "--data", PHOTOS, "--json", "-"))
    config = write_config(tmp_path / "line.toml", certified, ["camera"])
    with DaemonProcess(config) as daemon:
        ready = daemon.wait_until_ready(120)
        with Subscriber(str(ready["events_address"])) as subscriber:
            subscriber.wait_until_connected(60)
            flawed = PHOTOS / "test" / "color"
            kizu("send", flawed, "--camera", "camera", "--to", str(ready["frames_address"]), "--fps", "50")
            events = [subscriber.receive(60.0)[0] for _ in range(11)]
        assert daemon.stop() == 0, daemon.output

    bundle = open_bundle(certified)
    scores = [image["score"] for image in evaluation["images"] if Path(image["path"]).parent.name == "color"]
    assert (bundle.manifest.method, bundle.manifest.map.reduction) == ("conad", "top-q")
    assert bundle.calibration.certified and bundle.calibration.pixel_threshold > bundle.calibration.threshold
    assert [event.score for event in events] == pytest.approx(scores, rel=1e-5)
    assert {event.decision for event in events} <= {"accept", "reject"}
    assert evaluation["image_auroc"] > 0.5 and evaluation["pixel_auroc"] > 0.5
