"""A real daemon under load, a real Prometheus and Alertmanager with the shipped files, and a webhook that listens.

The page is scraped by TLS and with a login, as prometheus.yaml shows it. Grafana itself is not here: what is tried is
that every query of its dashboard finds what it should.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge.client import Subscriber
from edge.demo.line import BUNDLE, DaemonProcess, SimulatedCamera, load_photos, write_config
from edge.errors import SourceTimeout
from edge.login import make_login
from fake_nvml import build_fake_nvml
from monitoring import Alertmanager, Prometheus, Webhook, missing, until, watched
from self_signed import self_signed

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "kizu.json"
CAMERAS = {"left", "right"}
FPS = 3.0

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    # The first test's time is that of everything that has to start.
    pytest.mark.timeout(300),
]


@dataclass
class Line:
    """Everything that runs, for all tests of this file."""

    ready: dict[str, Any]
    page: Callable[[], bytes]
    prometheus: Prometheus
    alertmanager: Alertmanager
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
    cameras = [{"name": name, "deadline_ms": 30_000.0} for name in sorted(CAMERAS)]
    certificate, private_key = self_signed(folder)
    shutil.copy(certificate, folder / "kizu-metrics.crt")
    login, password = make_login("prometheus", folder / "keys")
    shutil.copy(password, folder)
    secured = {"port": 0, "certificate": str(certificate), "private_key": str(private_key), "login": str(login)}
    config = write_config(
        folder / "line.toml",
        BUNDLE,
        sorted(CAMERAS),
        cameras=cameras,
        metrics=secured,
        replay_address="tcp://127.0.0.1:*",
    )
    over = threading.Event()
    with DaemonProcess(config, environment=environment) as daemon:
        ready = daemon.wait_until_ready(60)
        target = ready["metrics_url"].removeprefix("https://").removesuffix("/metrics")
        trust = ssl.create_default_context(cafile=str(certificate))
        auth = ("prometheus", password.read_text())
        subscriber = threading.Thread(target=follow, args=(ready, over))
        with watched(folder, target) as (prometheus, alertmanager, webhook):
            page = partial(_page, ready["metrics_url"], trust, auth)
            made = Line(ready, page, prometheus, alertmanager, webhook, library is not None)
            subscriber.start()
            try:
                for camera in CAMERAS:
                    made.start(camera)
                rejects = 'sum by (camera) (kizu_verdicts_total{decision="reject"}) > 3'
                until(lambda: len(prometheus.query(rejects)) == len(CAMERAS), 150, "rejects of both cameras")
                until(lambda: prometheus.query("count_over_time(up[30s]) >= 8"), 60, "history")
                yield made
            finally:
                over.set()
                for camera in CAMERAS:
                    made.stop(camera)
                subscriber.join(20)


def _page(url: str, trust: ssl.SSLContext, auth: tuple[str, str]) -> bytes:
    with httpx.Client(verify=trust, auth=auth) as client:
        return client.get(url).raise_for_status().content


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
    return query.replace("$__rate_interval", "30s").replace("$instance", ".+").replace("$camera", ".+")


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
    text = line.page()
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


@pytest.mark.parametrize(
    ("loud", "quiet"),
    [("KizuNoFrames", {"KizuCameraDown"}), ("KizuExporterDown", {"KizuCameraDown", "KizuLogDiskLow"})],
)
def test_one_alert_keeps_those_quiet_that_follow_from_it(line: Line, loud: str, quiet: set[str]) -> None:
    """By the shipped inhibitions, and on the same daemon only: another one's camera is told all the same."""
    here, there = {"job": "kizu", "instance": f"{loud}:9464"}, {"job": "kizu", "instance": f"not-{loud}:9464"}
    line.alertmanager.tell(*({"alertname": name, **here} for name in (loud, *quiet)))
    line.alertmanager.tell({"alertname": "KizuCameraDown", **there})
    expected = {loud: "active"} | dict.fromkeys(quiet, "suppressed")

    until(lambda: line.alertmanager.states(here["instance"]) == expected, 30, f"{expected}")
    until(lambda: line.webhook.told("firing", alertname="KizuCameraDown", **there), 30, "word of the other's camera")
    assert not any(line.webhook.told("firing", alertname=name, **here) for name in quiet)
