"""A real daemon with a camera calibration and a rule file: millimeters and the deciding rule arrive at a subscriber."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dark_spots import SIDE, dark_bundle, spots
from edge import daemon
from edge.bundle import ModelBundle
from edge.camera import Plane, open_camera, write_camera
from edge.commands.rescore import rescore
from edge.config import EdgeConfig, load_config
from edge.daemon import Ready, StopRequest
from edge.demo.line import write_config
from edge.errors import ConfigError
from edge.events import DefectEvent
from edge.sender import CameraSender
from edge.sinks.event_log import EventLog

MakeBundle = Callable[..., ModelBundle]
MM = 0.05

RULES = """\
version = 1
ignore = ["clamp"]

[[zones]]
name = "clamp"
polygon_mm = [[0, 0], [1, 0], [1, 3.2], [0, 3.2]]

[[rules]]
name = "one long"
length_over_mm = 0.3

[[rules]]
name = "three near each other"
at_least = 3
within_mm = 1.0
"""


def line(folder: Path, bundle: ModelBundle, rules: str = RULES, *, scale: bool = True) -> EdgeConfig:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    gain = (1 + 0.5 * columns / SIDE + 0 * rows).astype(np.float32)[:, :, None]
    plane = Plane((MM, 0, 0, 0, MM, 0, 0, 0, 1)) if scale else None
    write_camera(folder / "cam.camera", size=(SIDE, SIDE), gain=gain, dark=gain * 0 + 4, plane=plane)
    (folder / "cam.rules.toml").write_text(rules, encoding="utf-8")
    camera = {"name": "cam", "calibration": "cam.camera", "rules": "cam.rules.toml"}
    config = write_config(folder / "line.toml", bundle.path, [], cameras=[camera], engine={"backend": "fake"})
    return load_config(config)


def judge(config: EdgeConfig, frames: list[np.ndarray]) -> list[DefectEvent]:
    """Send the frames as the uneven camera would have seen them; return their events."""
    stop = StopRequest()
    gain = 1 + 0.5 * np.arange(SIDE) / SIDE

    def on_ready(ready: Ready) -> None:
        with CameraSender(ready.frames_address, "cam") as sender:
            for frame in frames:
                seen = np.clip(np.rint(frame / gain + 4), 0, 255).astype(np.uint8)
                sender.send(seen, encoding="raw", timeout_s=20)
            assert sender.drain(20) == 0
        stop.set()

    daemon.serve(config, Path("line.toml"), stop, on_ready=on_ready)
    log = EventLog(Path(config.log.path), daemon.SystemClock())
    events = [event for event, _ in log.read_since(0, 100)]
    log.close()
    return events


def test_a_rule_file_decides_on_a_real_line(
    tmp_path: Path, make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """Good; one of 0.25 mm; one of 0.4 mm; three near; three apart; a long one on the clamp. One is scored again."""
    small = (30, 30, 34, 33)
    config = line(tmp_path, dark_bundle(make_bundle, tmp_path / "bundle"))
    frames = [
        spots(),
        spots(small),
        spots((30, 30, 38, 33)),
        spots(small, (40, 30, 44, 33), (36, 40, 40, 43)),
        spots(small, (56, 30, 60, 33), (36, 55, 40, 58)),
        spots((2, 10, 18, 12)),
    ]

    good, one, long, near, apart, clamped = judge(config, frames)

    assert [(event.decision, event.reason) for event in (good, one, long, near, apart, clamped)] == [
        ("accept", "score"), ("accept", "rule"), ("reject", "rule"), ("reject", "rule"), ("accept", "rule"),
        ("accept", "rule"),
    ]  # fmt: skip
    assert "rule 'one long': 1 region length over 0.3 mm; longest 0.427 mm" in long.detail
    assert "rule 'three near each other': 3 regions within 1 mm" in near.detail
    assert clamped.regions[0].ignored_by == "clamp" and "1 ignored in zone clamp" in clamped.detail
    assert one.regions[0].length_mm == pytest.approx(0.25) and one.regions[0].area_mm2 == pytest.approx(0.03)
    assert one.regions[0].center_mm_xy == pytest.approx((1.6, 1.575))
    assert {event.calibration_id for event in (good, one)} == {open_camera(tmp_path / "cam.camera").id}
    assert good.rules_id == one.rules_id is not None
    capsys.readouterr()

    rescore(long.id, tmp_path / "line.toml")  # the frame was kept as the camera sent it

    assert capsys.readouterr().out.startswith("identical: reject")


def test_rules_in_millimeters_without_a_scale_are_refused_at_the_start(tmp_path: Path, make_bundle: MakeBundle) -> None:
    """Also by --check; the message names camera, file and rule."""
    config = line(tmp_path, dark_bundle(make_bundle, tmp_path / "bundle"), scale=False)

    with pytest.raises(ConfigError, match=r"cam: rules: .*cam.rules.toml: rule 'one long' is in millimeters"):
        daemon.check(config, Path("line.toml"))


def test_a_rule_file_that_is_wrong_keeps_the_line_from_starting(tmp_path: Path, make_bundle: MakeBundle) -> None:
    """A key that nobody knows is no rule."""
    wrong = RULES.replace("length_over_mm", "longer_than_mm")
    config = line(tmp_path, dark_bundle(make_bundle, tmp_path / "bundle"), wrong)

    with pytest.raises(ConfigError, match=r"cam.rules.toml:10: rules.0.longer_than_mm: unknown key"):
        daemon.check(config, Path("line.toml"))
