"""A certificate on a running line: void on drift, said in every verdict, and not forgotten by a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge.bundle import ScoreCalibration
from edge.clock import ManualClock
from edge.errors import ConfigError
from edge.stages.watch import WatchSettings
from edge.types import Decision, FrameId, Reason, Verdict
from edge.warrant import Void, Warrant

GOOD = tuple(sorted(np.random.default_rng(0).gumbel(0, 1, 300).tolist()))
CALIBRATION = ScoreCalibration("order-statistic", True, 6.0, 6.0, 1, GOOD, "fake", "0" * 64, False, 0.01, 0.95)
SETTINGS = WatchSettings(parts_between_false_alarms=1e5)


def verdict(score: float, camera: str = "cam", reason: Reason = Reason.SCORE) -> Verdict:
    decision = (
        Decision.INCONCLUSIVE if reason is not Reason.SCORE else Decision.REJECT if score > 6 else Decision.ACCEPT
    )
    return Verdict(FrameId(camera, 1, 0, 0), decision, reason, "", score, 6.0, 0.5, True, (), (2, 2), "model-1")


def warrant(path: Path, told: list[Void] | None = None, model_id: str = "model-1") -> Warrant:
    on_void: Any = (told if told is not None else []).append
    return Warrant(path, CALIBRATION, model_id, ["cam", "other"], SETTINGS, ManualClock(), on_void=on_void)


def test_drift_on_one_camera_voids_the_certificate_once_and_every_verdict_says_so(tmp_path: Path) -> None:
    """Told once, with camera, alarm and time; the other camera's parts are no longer certified either."""
    told: list[Void] = []
    one = warrant(tmp_path / "void.json", told)
    live = np.random.default_rng(1).gumbel(2, 1, 400).tolist()

    stamped = [one.stamp(verdict(score)) for score in live]

    assert stamped[0].certified and not stamped[-1].certified
    assert not one.stamp(verdict(0.0, "other")).certified
    assert len(told) == 1 and (told[0].camera, told[0].model_id) == ("cam", "model-1")
    assert told[0].alarm in ("scores", "rejects") and told[0].parts < 400
    assert one.evidence("other") == 1.0


def test_a_restart_does_not_forget_and_a_new_certificate_is_not_blamed(tmp_path: Path) -> None:
    """The note is by model: the same one stays void, its successor is whole."""
    path = tmp_path / "void.json"
    one = warrant(path)
    for score in np.random.default_rng(1).gumbel(2, 1, 400).tolist():
        one.stamp(verdict(score))

    again, successor = warrant(path), warrant(path, model_id="model-2")

    assert again.void == one.void and not again.stamp(verdict(0.0)).certified
    assert successor.void is None and successor.stamp(verdict(0.0)).certified
    assert msgspec.json.decode(path.read_bytes(), type=list[Void]) == [one.void]


def test_frames_without_a_score_are_no_parts(tmp_path: Path) -> None:
    """Late, unreadable: nothing is learned from them."""
    one = warrant(tmp_path / "void.json")

    for _ in range(500):
        one.stamp(verdict(100.0, reason=Reason.LATE))

    assert one.void is None and one.evidence("cam") == 0.0


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'[{"model_id": 1}]'])
def test_a_note_that_cannot_be_read_is_no_valid_certificate(tmp_path: Path, content: bytes) -> None:
    """A damaged note must not make a void certificate whole again."""
    path = tmp_path / "void.json"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match="void certificates"):
        warrant(path)
