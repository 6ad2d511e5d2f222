"""LRDAN from photographs to events: two auto-encoders trained against each other, then the commands of any method."""

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

SMALL = ["--size", "64", "--steps", "60", "--threads", "1", "--set", "latent=32", "--set", "warmup_steps=20"]


def kizu(*arguments: str | Path, code: int = 0) -> str:
    command = [sys.executable, "-m", "edge.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr if code else done.stdout


def test_lrdan_is_trained_certified_evaluated_and_run_like_any_other_method(tmp_path: Path) -> None:
    """Four good photographs certify that at most every second good part is rejected; then a camera sends flaws."""
    trained, certified = tmp_path / "trained", tmp_path / "certified"
    kizu("train", "lrdan", "--data", PHOTOS, "--out", trained, *SMALL)
    good = PHOTOS / "test" / "good"
    kizu("calibrate", trained, "--good", good, "--false-rejects", "50%", "--confidence", "0.9", "--out", certified)
    evaluation = json.loads(kizu("evaluate", certified, "--data", PHOTOS, "--json", "-"))
    with DaemonProcess(write_config(tmp_path / "line.toml", certified, ["camera"])) as daemon:
        ready = daemon.wait_until_ready(120)
        with Subscriber(str(ready["events_address"])) as subscriber:
            subscriber.wait_until_connected(60)
            flawed = PHOTOS / "test" / "color"
            kizu("send", flawed, "--camera", "camera", "--to", str(ready["frames_address"]), "--fps", "50")
            events = [subscriber.receive(60.0)[0] for _ in range(11)]
        assert daemon.stop() == 0, daemon.output

    bundle = open_bundle(certified)
    scores = [image["score"] for image in evaluation["images"] if Path(image["path"]).parent.name == "color"]
    assert (bundle.manifest.method, bundle.manifest.map.reduction) == ("lrdan", "mean")
    assert bundle.calibration.certified and bundle.calibration.pixel_threshold > bundle.calibration.threshold
    assert [event.score for event in events] == pytest.approx(scores, rel=1e-5, abs=1e-5)
    assert evaluation["pixel_auroc"] > 0.6, "red paint is not in what was learned"
    terms = bundle.provenance["training"]["terms"][-1]
    assert {"discriminator.adversarial", "auxiliary.dual", "generator.center"} <= terms.keys()


def test_frames_larger_than_the_model_are_not_put_together_from_tiles(tmp_path: Path) -> None:
    """Each tile would be reconstructed by itself: refused before an image is learned from, with what to do instead."""
    told = kizu("train", "lrdan", "--data", PHOTOS, "--out", tmp_path / "tiles", *SMALL, "--fit", "tile", code=2)

    assert "--fit tile needs a map whose cells do not depend on the whole picture" in told
    assert not (tmp_path / "tiles").exists()
