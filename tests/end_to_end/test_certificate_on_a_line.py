"""A certificate from its sample to the line that outgrows it: calibrate, run, and 10 % more light."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from numpy.typing import NDArray

from calib.certificate import certify
from edge import daemon
from edge.bundle import ModelBundle
from edge.config import load_config
from edge.daemon import Ready, StopRequest
from edge.demo.line import write_config
from edge.events import DefectEvent
from edge.images import encode_png
from edge.sender import CameraSender
from edge.sinks.event_log import EventLog

CLEAN, MORE, STATED_DELAY = 100, 300, 300


def parts(number: int, seed: int, gain: float = 1.0) -> list[NDArray[np.uint8]]:
    """Gray parts with noise of their own, lit `gain` times as brightly."""
    rng = np.random.default_rng(seed)
    return [
        np.rint(rng.integers(108, 149, (32, 32)) * rng.uniform(0.98, 1.02) * gain).astype(np.uint8)
        for _ in range(number)
    ]


@pytest.fixture(scope="module")
def certified(tiny_bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a certificate from 299 good parts, through OpenVINO."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "good").mkdir()
    for index, part in enumerate(parts(299, seed=1)):
        (folder / "good" / f"{index:04}.png").write_bytes(encode_png(part[:, :, None]))
    certify(tiny_bundle, folder / "good", folder / "bundle", false_rejects=0.01, confidence=0.95)
    return folder / "bundle"


@pytest.fixture
def judge(certified: Path, tmp_path: Path) -> Callable[[float], tuple[list[DefectEvent], str]]:
    """Run a line over CLEAN parts and MORE of another light; its events, and its metrics in the end."""

    def run(gain: float) -> tuple[list[DefectEvent], str]:
        config = load_config(write_config(tmp_path / "line.toml", certified, ["cam"]))
        stop, pages = StopRequest(), []

        def on_ready(ready: Ready) -> None:
            assert ready.certified
            with CameraSender(ready.frames_address, "cam") as sender:
                for frame in [*parts(CLEAN, seed=2), *parts(MORE, seed=3, gain=gain)]:
                    sender.send(frame, encoding="raw", timeout_s=20)
                assert sender.drain(30) == 0
            with urlopen(ready.metrics_url, timeout=10) as page:
                pages.append(page.read().decode())
            stop.set()

        daemon.serve(config, tmp_path / "line.toml", stop, on_ready=on_ready)
        log = EventLog(Path(config.log.path), daemon.SystemClock())
        events = [event for event, _ in log.read_since(0, CLEAN + MORE + 1)]
        log.close()
        return events, pages[0]

    return run


def test_ten_percent_more_light_voids_the_certificate_in_events_metrics_and_log(
    judge: Callable[[float], tuple[list[DefectEvent], str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every clean part is certified; within the stated number of brighter ones no verdict is any more."""
    events, page = judge(1.10)
    said = [event.certified for event in events]

    assert len(said) == CLEAN + MORE and all(said[:CLEAN])
    voided = said.index(False)
    assert CLEAN < voided < CLEAN + STATED_DELAY and not any(said[voided:])
    assert "kizu_certificate_valid 0.0" in page and "kizu_certificate_void 1.0" in page
    assert "certificate void" in capsys.readouterr().out


def test_control_the_same_light_voids_nothing(
    judge: Callable[[float], tuple[list[DefectEvent], str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """As many parts without the drift."""
    events, page = judge(1.0)

    assert len(events) == CLEAN + MORE and all(event.certified for event in events)
    assert "kizu_certificate_valid 1.0" in page and "kizu_certificate_void 0.0" in page
    assert "certificate void" not in capsys.readouterr().out
