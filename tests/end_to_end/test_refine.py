"""A line that looks coarsely first, over real sockets: the same verdicts as densely, and counters of what it saved."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge import daemon
from edge.bundle import InputSpec, ModelBundle
from edge.config import load_config
from edge.daemon import Ready, StopRequest
from edge.demo.line import write_config
from edge.events import DefectEvent
from edge.sender import CameraSender
from edge.sinks.event_log import EventLog
from refining import refining_bundle

TILED = InputSpec(32, 32, 1, max_batch=4, fit="tile", min_side_px=8)


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., ModelBundle], tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """For frames of any size; gray scores 0.06, the spot below 1.7, the gate is at 0.3."""
    folder = tmp_path_factory.mktemp("refining")
    return refining_bundle(make_bundle, folder / "bundle", threshold=0.5, margin=0.2, input=TILED)


def judged(folder: Path, bundle: ModelBundle, refine: bool) -> tuple[list[DefectEvent], dict[str, float]]:
    """A good frame and one with a bright spot through a daemon: what its log says, and its series at the end."""
    folder.mkdir()
    config = load_config(write_config(folder / "line.toml", bundle.path, ["cam"], engine={"refine": refine}))
    good = np.random.default_rng(4).integers(120, 137, (96, 96), dtype=np.uint8)
    flawed = good.copy()
    flawed[40:46, 40:46] = 255
    stop, series, helper = StopRequest(), {}, []

    def send(ready: Ready) -> None:
        try:
            with CameraSender(ready.frames_address, "cam") as sender:
                for picture in (good, flawed):
                    sender.send(picture, encoding="raw", timeout_s=20)
                assert sender.drain(20) == 0
            with urllib.request.urlopen(ready.metrics_url, timeout=5) as page:
                lines = [line for line in page.read().decode().splitlines() if line[0] != "#"]
            series.update({line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines})
        finally:
            stop.set()

    def on_ready(ready: Ready) -> None:
        helper.append(threading.Thread(target=send, args=(ready,)))
        helper[0].start()

    daemon.serve(config, Path("line.toml"), stop, on_ready=on_ready)
    helper[0].join(20)
    log = EventLog(Path(config.log.path), daemon.SystemClock())
    try:
        return [event for event, _ in log.read_since(0, 100)], series
    finally:
        log.close()


def test_a_flaw_is_found_while_most_tiles_are_only_looked_at(tmp_path: Path, bundle: ModelBundle) -> None:
    """Same decisions and regions as dense everywhere; golden frames and warm-up are not counted as tiles."""
    events, series = judged(tmp_path / "on", bundle, refine=True)
    dense, dense_series = judged(tmp_path / "off", bundle, refine=False)

    assert [event.decision for event in events] == ["accept", "reject"] == [event.decision for event in dense]
    assert events[1].score == dense[1].score and events[1].regions == dense[1].regions
    assert events[0].score <= dense[0].score
    tiles = 2 * 4 * 4  # the tiny map has a cell for each second pixel of 28: four tiles a side of 96 px
    assert series["kizu_tiles_total"] == tiles
    assert 1 <= series["kizu_tiles_refined_total"] <= 4
    assert dense_series["kizu_tiles_total"] == 0 == dense_series["kizu_tiles_refined_total"]
