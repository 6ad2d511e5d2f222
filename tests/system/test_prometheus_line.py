"""A real daemon under load, a real Prometheus and Alertmanager with the shipped files, and a webhook that listens.

Grafana itself is not here: what is tried is that every query of its dashboard finds what it should.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge.client import Subscriber
from edge.demo.line import BUNDLE, DaemonProcess, SimulatedCamera, load_photos, write_config
from edge.errors import SourceTimeout
from fake_nvml import build_fake_nvml
from monitoring import Prometheus, Webhook, missing, until, watched

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "kizu.json"
CAMERAS = {"left", "right"}
FPS = 4.0

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@dataclass
class Line:
    """Everything that runs, for all tests of this file."""

    ready: dict[str, Any]
    prometheus: Prometheus
    webhook: Webhook
    has_gpu: bool
    cameras: dict[str, SimulatedCamera] = field(default_factory=dict)

    def start(self, camera: str) -> None:
        self.cameras[camera] = SimulatedCamera(self.ready["frames_address"], camera, load_photos(), FPS)
        self.cameras[camera].start()

    def stop(self, camera: str) -> None:
        self.cameras[camera].stop()
        self.cameras[camera].join(30)


def follow(ready: dict[str, Any], over: threading.Event) -> None:
    """A registered subscriber, which takes everything and says so."""
    with Subscriber(ready["events_address"], replay=ready["replay_address"], name="press", since="beginning") as events:
        while not over.is_set():
            try:
                events.receive(0.5)
                events.commit(5.0)
            except SourceTimeout:
                continue


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    folder = tmp_path_factory.mktemp("line")
    library = build_fake_nvml(folder)
    environment = dict(os.environ) if library is None else {**os.environ, "LD_LIBRARY_PATH": str(library)}
    cameras = [{"name": name, "deadline_ms": 4000.0} for name in sorted(CAMERAS)]
    config = write_config(
        folder / "line.toml", BUNDLE, sorted(CAMERAS), cameras=cameras, replay_address="tcp://127.0.0.1:*"
    )
    over = threading.Event()
    with DaemonProcess(config, environment=environment) as daemon:
        ready = daemon.wait_until_ready(60)
        target = ready["metrics_url"].removeprefix("http://").removesuffix("/metrics")
        subscriber = threading.Thread(target=follow, args=(ready, over))
        with watched(folder, target) as (prometheus, webhook):
            made = Line(ready, prometheus, webhook, library is not None)
            subscriber.start()
            try:
                for camera in CAMERAS:
                    made.start(camera)
                rejects = 'sum by (camera) (kizu_verdicts_total{decision="reject"}) > 3'
                until(lambda: len(prometheus.query(rejects)) == len(CAMERAS), 60, "rejects of both cameras")
                until(lambda: prometheus.query("count_over_time(up[30s]) >= 8"), 60, "history")
                yield made
            finally:
                over.set()
                for camera in CAMERAS:
                    made.stop(camera)
                subscriber.join(20)


def panels() -> list[tuple[str, str, str]]:
    """(panel, query, legend) of the whole dashboard."""
    content = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [
        (panel["title"], target["expr"], target["legendFormat"])
        for panel in content["panels"]
        for target in panel.get("targets", [])
    ]


def filled_in(query: str) -> str:
    """As Grafana fills in its variables when everything is chosen."""
    return query.replace("$__rate_interval", "8s").replace("$instance", ".+").replace("$camera", ".+")


def problems(prometheus: Prometheus, query: str, legend: str) -> list[str]:
    """What is wrong with what a panel would show."""
    found = prometheus.query(filled_in(query))
    wrong = [] if found else ["no series"]
    for labels, value in found:
        wrong += [f"{labels} is {value}"] if math.isnan(value) or math.isinf(value) else []
        wrong += [f"{labels} lacks {name}" for name in re.findall(r"{{(\w+)}}", legend) if not labels.get(name)]
        wrong += [f"{labels} is nobody's"] if labels.get("camera", "left") not in CAMERAS else []
    by_camera = "by (camera" in query or "{{camera}}" in legend
    wrong += ["a camera is not there"] if by_camera and {one.get("camera") for one, _ in found} != CAMERAS else []
    return wrong


def test_every_panel_of_the_dashboard_finds_its_series(line: Line) -> None:
    """At least one series, with the labels that the legend names, for both cameras, and no NaN."""
    tried = [one for one in panels() if line.has_gpu or "kizu_gpu" not in one[1]]

    wrong = {
        (title, query): found for title, query, legend in tried if (found := problems(line.prometheus, query, legend))
    }

    assert wrong == {} and len(tried) > 30


def test_control_a_panel_that_finds_nothing_or_no_number_is_noticed(line: Line) -> None:
    """Planted: a series that was renamed, a label that is not there, a division by nothing."""
    found = [
        problems(line.prometheus, "kizu_frames_total", ""),
        problems(line.prometheus, "sum(kizu_frames_received_total)", "{{camera}}"),
        problems(line.prometheus, "kizu_engine_failures_total / kizu_engine_failures_total", ""),
    ]

    assert found[0] == ["no series"]
    assert found[1] == ["{} lacks camera", "a camera is not there"]
    assert [one.split(" is ")[1] for one in found[2]] == ["nan"]


def test_received_is_judged_plus_in_flight_in_every_scrape(line: Line) -> None:
    """The promise of the runtime as Prometheus saw it, second by second, under load."""
    judged = "sum by (camera, instance) (kizu_verdicts_total)"
    flight = "sum by (camera, instance) (kizu_frames_in_flight)"
    received = "sum by (camera, instance) (kizu_frames_received_total)"

    assert set(line.prometheus.history(f"{received} - {judged} - {flight}", 8)) == {0.0}
    assert min(value for _, value in line.prometheus.query(received)) > 10


def test_promtool_has_nothing_to_say_about_the_live_page(line: Line) -> None:
    """The page as it is scraped, with everything that a running line shows."""
    with urllib.request.urlopen(line.ready["metrics_url"], timeout=10) as page:
        text = page.read()

    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60)

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (b'kizu_gpu_utilization_ratio{gpu="0"} 0.25' in text) == line.has_gpu


def test_a_silent_camera_is_told_to_the_operators_and_told_again_when_it_is_back(line: Line) -> None:
    """From the real rule through Prometheus and Alertmanager to a webhook; the other camera is in nobody's way."""
    silent = {"alertname": "KizuCameraDown", "camera": "right", "severity": "critical"}
    before = line.webhook.told("firing", alertname="KizuCameraDown")
    line.stop("right")
    until(lambda: line.webhook.told("firing", **silent), 60, f"alert; told {line.webhook.alerts}")
    still = line.webhook.told("resolved", **silent)
    line.start("right")
    until(lambda: line.webhook.told("resolved", **silent), 60, f"end of the alert; told {line.webhook.alerts}")

    assert (before, still) == (False, False)
    assert {labels["camera"] for _, labels in line.webhook.alerts if labels["alertname"] == "KizuCameraDown"} == {
        "right"
    }
    assert not line.webhook.told("firing", alertname="KizuNoFrames")
    assert "KizuCameraDown" not in line.prometheus.firing()


def test_the_dashboard_is_what_its_script_builds() -> None:
    """`make pages` gives no difference."""
    script = ROOT / "deploy" / "grafana" / "build_dashboard.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)

    assert done.stdout == DASHBOARD.read_text(encoding="utf-8"), done.stderr or "run `make pages`"
