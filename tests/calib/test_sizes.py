"""`kizu sizes` through the daemon's own code: known truth, regions, blur, rules, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from calib import trials
from calib.sizes import SizesReport, find_sizes
from calib.sizes_command import sizes
from calib.sizes_picture import draw
from calib.trials import Plan
from dark_spots import SIDE, dark_bundle
from edge.bundle import CameraThresholds, ModelBundle, Zone
from edge.camera import CameraCalibration, Plane
from edge.config import EngineConfig
from edge.errors import CommandError, DataError
from edge.images import decode_image, encode_mask_png, encode_png
from edge.rule_file import Rule, RuleFile
from edge.rules import Rules

Invoke = Callable[..., Any]


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., ModelBundle], tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """Finds whatever is darker than its ground by more than half of 128: pixel by pixel, so the truth is known."""
    return dark_bundle(make_bundle, tmp_path_factory.mktemp("sizes") / "bundle")


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Four good frames, gray with a little noise."""
    rng, folder = np.random.default_rng(5), tmp_path / "good"
    folder.mkdir()
    for index in range(4):
        picture = rng.integers(124, 133, (SIDE, SIDE, 1), dtype=np.uint8)
        (folder / f"{index}.png").write_bytes(encode_png(picture))
    return folder


def tried(bundle: ModelBundle, good: Path, **changes: Any) -> SizesReport:
    more = {key: changes.pop(key) for key in ("camera", "rules", "roi_xywh", "seen_by") if key in changes}
    plan = {"kinds": ("spot",), "contrasts": (-100.0,), "sizes": (1.0, 2.0, 4.0, 8.0), "trials": 29, **changes}
    return find_sizes(bundle, good, Plan(**plan), engine=EngineConfig("fake"), **more)


def test_the_smallest_spot_is_where_its_pixels_become_dark_enough(bundle: ModelBundle, good: Path) -> None:
    """A spot of 2 px covers some pixel by more than the half that the threshold asks for; one of 1 px rarely does."""
    (curve,) = tried(bundle, good).curves

    assert curve.smallest == 2.0
    assert [point.hits for point in curve.points[1:]] == [29, 29, 29] and curve.points[0].hits < 29


def test_what_lies_in_no_zone_is_not_found_and_a_camera_must_be_named(bundle: ModelBundle, good: Path) -> None:
    """The bundle's zone is a corner: spots elsewhere are planted, and none of them counts as found."""
    corner = Zone("corner", (((0.0, 0.0), (8.0, 0.0), (8.0, 8.0), (0.0, 8.0)),))
    zoned = msgspec.structs.replace(bundle.calibration, zones=(corner,))
    row = CameraThresholds(zoned.threshold, zoned.pixel_threshold, 1, (0.1,))
    table = msgspec.structs.replace(bundle.calibration, cameras={"left": row})

    (curve,) = tried(replace(bundle, calibration=zoned), good).curves
    (named,) = tried(replace(bundle, calibration=table), good, seen_by="left").curves

    assert curve.smallest is None and named.smallest == 2.0
    with pytest.raises(CommandError, match="for the cameras left"):
        tried(replace(bundle, calibration=table), good)


def test_a_contrast_below_the_threshold_is_never_found(bundle: ModelBundle, good: Path) -> None:
    """And the way down ends at the first size: the others would only cost time."""
    (curve,) = tried(bundle, good, contrasts=(-40.0,)).curves

    assert curve.smallest is None and [point.size for point in curve.points] == [8.0]


@pytest.mark.parametrize("kind", ["spot", "scratch", "dent"])
def test_blur_makes_it_worse(bundle: ModelBundle, good: Path, kind: str) -> None:
    """Out of focus, a defect must be larger to be found; the curve says by how much."""
    plan = {"kinds": (kind,), "sizes": (2.0, 4.0, 8.0, 16.0, 32.0)}
    (sharp,) = tried(bundle, good, **plan).curves
    (blurred,) = tried(bundle, good, **plan, blur_px=2.0).curves

    assert sharp.smallest is not None
    assert blurred.smallest is None or blurred.smallest > sharp.smallest


def test_the_same_seed_gives_the_same_report(bundle: ModelBundle, good: Path) -> None:
    """And another seed other defects."""
    one, again, other = (tried(bundle, good, sizes=(1.0, 1.5), seed=seed) for seed in (1, 1, 2))

    assert one == again
    assert one.curves != other.curves


def test_each_region_has_its_own_curve(bundle: ModelBundle, good: Path, tmp_path: Path) -> None:
    """In the left half the ground is so bright that a dark spot hardly reaches gray: nothing is found there."""
    for path in good.iterdir():
        picture = np.full((SIDE, SIDE, 1), 128, np.uint8)
        picture[:, : SIDE // 2] = 178
        path.write_bytes(encode_png(picture + np.uint8(int(path.stem))))
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, columns in (("bright", slice(0, SIDE // 2 - 4)), ("gray", slice(SIDE // 2 + 4, SIDE))):
        mask = np.zeros((SIDE, SIDE), bool)
        mask[:, columns] = True
        (masks / f"{name}.png").write_bytes(encode_mask_png(mask))

    by_grid = {curve.region: curve for curve in tried(bundle, good, grid=(1, 2), sizes=(4.0,)).curves}
    by_mask = {curve.region: curve for curve in tried(bundle, good, masks=masks, sizes=(4.0,)).curves}

    assert by_grid["row 1 column 1"].smallest is None and by_mask["bright"].smallest is None
    assert by_mask["gray"].smallest == 4.0 and by_grid["row 1 column 2"].points[0].hits >= 27


def test_sizes_are_in_millimeters_where_the_camera_has_a_scale(bundle: ModelBundle, good: Path) -> None:
    """A tenth of a millimeter a pixel: the same truth, ten times smaller numbers; measured length beside it."""
    camera = CameraCalibration("id", (SIDE, SIDE), plane=Plane((0.1, 0, 0, 0, 0.1, 0, 0, 0, 1)))
    report = tried(bundle, good, camera=camera, sizes=(0.1, 0.2, 0.4, 0.8))
    (curve,) = report.curves

    assert (report.unit, curve.smallest, report.calibration_id) == ("mm", 0.2, "id")
    assert curve.measured == pytest.approx(1.0, abs=0.35)


def test_with_rules_found_means_rejected_by_them(bundle: ModelBundle, good: Path) -> None:
    """Spots up to 6 px are let pass on purpose: the curve is that of the whole decision."""
    rules = Rules(RuleFile(1, (Rule("long", length_over_px=7.0),)), "rules-id")
    (curve,) = tried(bundle, good, rules=rules).curves

    assert curve.smallest == 8.0 and curve.points[-2].hits == 0


def test_a_rejection_for_something_elsewhere_finds_nothing(
    bundle: ModelBundle, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: too faint to be found, beside a flaw that every frame has. Without looking where, all are hits."""
    monkeypatch.setattr(trials.Line, "rejected_as_they_are", lambda self, pictures, blur: set())
    for path in good.iterdir():
        picture = np.full((SIDE, SIDE, 1), 128 + int(path.stem), np.uint8)
        picture[:4, :4] = 0
        path.write_bytes(encode_png(picture))
    plan = {"contrasts": (-10.0,), "sizes": (8.0,), "roi_xywh": None}

    honest = tried(bundle, good, **plan).curves[0].points[0].hits
    monkeypatch.setattr(trials, "_touches", lambda region, near: True)
    careless = tried(bundle, good, **plan).curves[0].points[0].hits

    assert honest <= 6 and careless == 29


def test_frames_that_are_rejected_as_they_are_take_no_part(bundle: ModelBundle, good: Path) -> None:
    """Named, not silently left out; where none is left there is nothing to report."""
    spoiled = np.zeros((SIDE, SIDE, 1), np.uint8)
    (good / "0.png").write_bytes(encode_png(spoiled))

    report = tried(bundle, good)
    assert report.rejected_as_they_are == ("0.png",) and report.frames == 3
    for index in range(4):
        (good / f"{index}.png").write_bytes(encode_png(spoiled + np.uint8(index)))
    with pytest.raises(DataError, match="every image is rejected as it is"):
        tried(bundle, good)


def test_the_command_writes_json_and_a_picture(bundle: ModelBundle, good: Path, tmp_path: Path, invoke: Invoke) -> None:
    """Table on stdout, everything in the file, curves in the picture."""
    out, picture = tmp_path / "sizes.json", tmp_path / "sizes.png"

    result = invoke(
        sizes, bundle.path, "--good", good, "--sizes", "1,2,4", "--contrasts=-100,100", "--kinds", "spot,dent",
        "--trials", "29", "--backend", "fake", "--json", out, "--picture", picture,
    )  # fmt: skip

    report = json.loads(out.read_text())
    assert len(report["curves"]) == 4 and report["curves"][0]["points"][-1]["trials"] == 29
    assert "every larger size tried" in result.stdout and "warning: the threshold is provisional" in result.stderr
    assert decode_image(picture.read_bytes()).shape[1] == 2 * 460


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trials", "28"], "29 are needed"),
        (["--kinds", "hole"], "'hole' is not known"),
        (["--contrasts", "0"], "gray levels other than 0"),
        (["--sizes", "2,x"], "sizes above 0"),
        (["--sizes", "-2"], "sizes above 0"),
        (["--grid", "3"], "ROWSxCOLUMNS"),
        (["--roi", "1,2,3"], "x,y,width,height"),
        (["--json", "/nowhere/x.json"], "its folder does not exist"),
    ],
)
def test_options_that_cannot_be_are_refused(
    bundle: ModelBundle, good: Path, invoke: Invoke, options: list[str], words: str
) -> None:
    """Before the engine opens."""
    with pytest.raises(CommandError, match=words):
        invoke(sizes, bundle.path, "--good", good, "--backend", "fake", *options)


def test_a_size_without_room_is_refused(bundle: ModelBundle, good: Path) -> None:
    """It would lie outside the frame in part, and be another size."""
    with pytest.raises(DataError, match=r"'all': a defect of 10\d px has no place"):
        tried(bundle, good, sizes=(100.0,))


def test_a_mask_that_is_no_region_is_refused(bundle: ModelBundle, good: Path, tmp_path: Path) -> None:
    """Of another size, empty, or no folder at all."""
    masks = tmp_path / "masks"
    with pytest.raises(DataError, match="no such folder"):
        tried(bundle, good, masks=masks)
    masks.mkdir()
    (masks / "door.png").write_bytes(encode_mask_png(np.zeros((SIDE, SIDE), bool)))
    with pytest.raises(DataError, match=r"door.png: a mask of 64 x 64 px with 0 pixels set"):
        tried(bundle, good, masks=masks)


def test_the_picture_shows_a_curve_for_each_series(bundle: ModelBundle, good: Path) -> None:
    """Colors that are not there without the curves: something was drawn."""
    report = tried(bundle, good)
    pixels = decode_image(draw(report))

    assert (np.ptp(pixels.astype(int), axis=2) > 60).sum() > 500
