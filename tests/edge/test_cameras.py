"""A certificate holds for the cameras and regions that it names, and each camera is judged by its own row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge.bundle import CameraThresholds, ModelBundle, ScoreCalibration, Zone
from edge.camera import CameraCalibration, write_camera
from edge.cameras import calibration_of_line, uncertified
from edge.clock import ManualClock
from edge.config import EdgeConfig
from edge.inference import judged
from edge.line_stages import flat_fields_of, make_stages
from edge.stages.preprocess import prepare
from edge.stages.watch import WatchSettings
from edge.types import Decision, Frame, FrameId, ModelInput, Reason, Verdict
from edge.warrant import Warrant

GOOD = tuple(sorted(np.random.default_rng(0).gumbel(0, 1, 300).tolist()))
ROW = CameraThresholds(1.0, 1.0, 4, (0.1, 0.5))
CALIBRATION = ScoreCalibration(
    "order-statistic", True, 2.0, 2.0, 1, (), "onnxruntime 1 cpu", "0" * 64, cameras={"left": ROW}
)


def config(*cameras: dict[str, Any]) -> EdgeConfig:
    keys = {"line": "door", "bundle": "x", "frames_address": "ipc:///f", "events_address": "ipc:///e"}
    return msgspec.convert(
        {**keys, "log": {"path": "log.db"}, "cameras": list(cameras), "engine": {"backend": "onnxruntime"}}, EdgeConfig
    )


def test_a_camera_that_the_certificate_does_not_name_is_not_certified() -> None:
    """It is judged by the most lenient thresholds, and told apart."""
    line = config({"name": "left"}, {"name": "top"})

    found = calibration_of_line(line, CALIBRATION)

    assert list(uncertified(line, CALIBRATION)) == ["top"]
    assert (found.of("left").certified, found.of("left").threshold) == (True, 1.0)
    assert (found.of("top").certified, found.of("top").threshold) == (False, 2.0)
    assert found.certified and not calibration_of_line(config({"name": "top"}), CALIBRATION).certified


@pytest.mark.parametrize(("certified", "here", "holds"), [
    (None, None, True), ((0, 0, 8, 8), (0, 0, 8, 8), True), (None, (0, 0, 8, 8), False), ((0, 0, 8, 8), None, False),
])  # fmt: skip
def test_another_region_of_interest_is_another_line(certified: Any, here: Any, holds: bool) -> None:
    """Also where the certificate is about whole frames and the line looks at a part of them."""
    calibration = msgspec.structs.replace(CALIBRATION, cameras={}, scores=(0.1,), roi_xywh=certified)
    line = config({"name": "left", "roi_xywh": here})

    assert calibration_of_line(line, calibration).of("left").certified is holds
    assert bool(uncertified(line, calibration)) is not holds


@pytest.mark.parametrize(("certified", "here", "holds"), [
    (1.0, 1.0, True), (None, None, True), (1.0, 1.5, False), (None, 1.5, False), (1.0, None, False),
])  # fmt: skip
def test_another_flat_field_is_another_line(
    tmp_path: Path, make_bundle: Any, tiny_bundle: ModelBundle, certified: float | None, here: float | None, holds: bool
) -> None:
    """A certificate about corrected pictures holds for frames corrected alike, and for no others."""

    def write(name: str, gain: float | None) -> CameraCalibration:
        even = np.ones((32, 32, 1), np.float32)
        flat = {} if gain is None else {"gain": even * gain, "dark": even}
        return write_camera(tmp_path / name, size=(32, 32), **flat)  # type: ignore[arg-type]

    made_with, _ = write("then", certified), write("now", here)
    calibration = msgspec.structs.replace(
        tiny_bundle.calibration, certified=True, engine="onnxruntime 1 cpu", flat_field=made_with.flat_field_id
    )
    bundle = make_bundle(tmp_path / "bundle", calibration=calibration)
    line = config({"name": "left", "calibration": str(tmp_path / "now")})
    stages = make_stages(line, bundle, Path("line.toml"))

    assert stages.decide.calibration.of("left").certified is holds
    why = uncertified(line, calibration, flat_fields_of(stages.measures))
    assert (why == {}) is holds and (holds or "`kizu correct`" in why["left"])


def test_a_provisional_calibration_has_no_certificate_to_lose() -> None:
    """No warning for what was never promised."""
    provisional = msgspec.structs.replace(CALIBRATION, certified=False, cameras={})

    assert uncertified(config({"name": "left", "roi_xywh": (0, 0, 8, 8)}), provisional) == {}


def verdict_of(stages: Any, bundle: ModelBundle, camera: str) -> Verdict:
    frame = Frame(FrameId(camera, 1, 0, 0), np.zeros((32, 32, 1), np.uint8))
    pixels, roi = prepare(frame.image, bundle.manifest.input)
    cells = np.full((14, 14), 1.5, np.float32)
    return judged(stages, frame, ModelInput(frame.id, pixels, roi), cells, 1.5, bundle.manifest.map)


def test_each_camera_is_judged_by_its_own_row(tiny_bundle: ModelBundle) -> None:
    """One map, one score: above the left camera's threshold, below the other's, and outside a third one's zone."""
    far = Zone("far", (((1000.0, 0.0), (1010.0, 0.0), (1010.0, 10.0)),))
    corner = Zone("corner", (((0.0, 0.0), (16.0, 0.0), (16.0, 16.0), (0.0, 16.0)),), offset=-0.75)
    rows = {
        "left": ROW,
        "right": CameraThresholds(2.0, 2.0, 4, (0.1,)),
        "zoned": CameraThresholds(1.0, 1.0, 4, (0.1,), zones=(corner,)),
        "lost": CameraThresholds(1.0, 1.0, 4, (0.1,), zones=(far,)),
    }
    calibration = msgspec.structs.replace(CALIBRATION, cameras=rows)
    bundle = ModelBundle(
        **{name: getattr(tiny_bundle, name) for name in ModelBundle.__slots__} | {"calibration": calibration}
    )
    stages = make_stages(config(*({"name": name} for name in rows)), bundle, Path("line.toml"))

    found = {name: verdict_of(stages, bundle, name) for name in rows}

    assert [one.decision for one in found.values()] == [
        Decision.REJECT, Decision.ACCEPT, Decision.ACCEPT, Decision.INCONCLUSIVE
    ]  # fmt: skip
    assert (found["left"].threshold, found["right"].threshold, found["zoned"].score) == (1.0, 2.0, 0.75)
    assert found["left"].regions and not found["right"].regions and not found["zoned"].regions
    assert found["lost"].reason is Reason.SHAPE and "far" in found["lost"].detail


def test_the_watch_looks_at_certified_cameras_and_at_parts_as_they_were_counted(tmp_path: Path) -> None:
    """Frames of one part with scores as the sample's: by part nothing changed, and a camera without a row is not
    watched."""
    calibration = msgspec.structs.replace(
        CALIBRATION, unit="part", cameras={"left": CameraThresholds(9.0, 9.0, 1, GOOD)}
    )
    told: list[str] = []
    warrant = Warrant(
        tmp_path / "void.json", calibration, "m", ["left", "top"], WatchSettings(1e5), ManualClock(),
        on_unnamed=told.append,
    )  # fmt: skip
    rng = np.random.default_rng(2)
    for part in range(600):
        highest = float(rng.gumbel(0, 1))
        for score in (highest - 1.0, highest, highest - 2.0):
            warrant.stamp(seen("left", score, f"{part}"))
            warrant.stamp(seen("top", 50.0, f"{part}"))

    assert warrant.void is None and 0 < warrant.evidence("left") < 1 and warrant.evidence("top") == 0.0
    warrant.stamp(seen("left", 0.0, None))
    warrant.stamp(seen("left", 0.0, None))
    assert told == ["left"]


def test_control_frames_taken_for_parts_void_a_certificate_that_holds(tmp_path: Path) -> None:
    """Planted: the same frames watched one by one."""
    calibration = msgspec.structs.replace(CALIBRATION, cameras={"left": CameraThresholds(9.0, 9.0, 1, GOOD)})
    warrant = Warrant(tmp_path / "void.json", calibration, "m", ["left"], WatchSettings(1e5), ManualClock())
    rng = np.random.default_rng(2)
    for part in range(600):
        highest = float(rng.gumbel(0, 1))
        for score in (highest - 1.0, highest, highest - 2.0):
            warrant.stamp(seen("left", score, f"{part}"))

    assert warrant.void is not None


def seen(camera: str, score: float, part: str | None) -> Verdict:
    return Verdict(
        FrameId(camera, 1, 0, 0), Decision.ACCEPT, Reason.SCORE, "", score, 9.0, 0.5, True, (), (2, 2), "m",
        part_id=part,
    )  # fmt: skip
