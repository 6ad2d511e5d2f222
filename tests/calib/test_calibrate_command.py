"""`kizu calibrate`: what it promises it can keep, and what it cannot promise it refuses with the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calib import certificate
from calib.calibrate_command import calibrate
from calib.dataset import file_sha256
from calib.evaluate_command import evaluate
from edge.bundle import MapGeometry, ModelBundle, open_bundle
from edge.errors import CalibrationError, CommandError, DataError

Invoke = Callable[..., Any]
MakeFakeBundle = Callable[..., ModelBundle]
PROMISE = ("--false-rejects", "5%", "--confidence", "90%", "--backend", "fake")  # 45 good parts


@pytest.fixture
def bundle(make_fake_bundle: MakeFakeBundle, tmp_path: Path) -> Path:
    """A provisional bundle that knows its training files."""
    return make_fake_bundle(tmp_path / "bundle", provenance={"training_files": ["0" * 64], "seed": 5}).path


def test_enough_good_parts_give_a_certified_bundle(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """The threshold is the sample's maximum, map and image agree on it, and the bundle says what it stands on."""
    folder = good_folder(45)
    result = invoke(calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE)
    source, derived = open_bundle(bundle), open_bundle(tmp_path / "line")
    promise = derived.calibration

    assert (promise.kind, promise.certified, promise.false_rejects, promise.confidence) == (
        "order-statistic",
        True,
        0.05,
        0.9,
    )
    assert promise.threshold == promise.pixel_threshold == max(promise.scores) and len(promise.scores) == 45
    assert promise.scores == tuple(sorted(promise.scores)) and not promise.statistics_shared
    assert (derived.model, derived.provenance["derived_from"]) == (source.model, [source.model_id])
    assert derived.provenance["score_calibration"]["files"] == sorted(file_sha256(path) for path in folder.iterdir())
    assert "at most 5% of good parts rejected, with 90% confidence" in result.stdout
    assert "0.5% would need 460 good parts" in result.stdout


def test_the_certified_bundle_is_accepted_by_evaluate_without_the_warning(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path, test_folder: Path
) -> None:
    """And if its own sample is among the test images, that is pointed out."""
    sample = good_folder(45)
    invoke(calibrate, bundle, "--good", sample, "--out", tmp_path / "line", *PROMISE)
    shutil.copy(sample / "0000.png", test_folder / "test" / "good" / "x.png")
    result = invoke(evaluate, tmp_path / "line", "--data", test_folder, "--backend", "fake", "--json", "-")

    assert "provisional" not in result.stderr and json.loads(result.stdout)["certified"] is True
    assert "1 of the good test images were used to set the threshold" in result.stderr


def test_too_few_good_parts_say_how_many_are_needed_before_the_engine_runs(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """299 for 1 % at 95 %, and the rate that forty parts do support."""
    monkeypatch.setattr(certificate, "open_on", lambda *_, **__: pytest.fail("the engine was opened"))

    with pytest.raises(CalibrationError, match=r"at least 299 good parts, but 40 were given; .*--false-rejects 7\.3%"):
        invoke(calibrate, bundle, "--good", good_folder(40), "--false-rejects", "0.01", "--out", tmp_path / "line")
    assert not (tmp_path / "line").exists()


def test_files_with_the_same_bytes_are_one_part(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """Forty-four parts and a copy are not forty-five parts; with one more they are, and the copy is named."""
    folder = good_folder(44)
    shutil.copy(folder / "0003.png", folder / "copy.png")
    with pytest.raises(CalibrationError, match="44 were given"):
        invoke(calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE)
    shutil.copy(good_folder(1, "more", seed=9) / "0000.png", folder / "one_more.png")
    result = invoke(calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE, "--json")
    found = json.loads(result.stdout)

    assert (found["parts"], found["duplicates"]) == (45, {"copy.png": "0003.png"})
    assert len(open_bundle(tmp_path / "line").calibration.scores) == 45


@pytest.mark.parametrize("key", ["training_files", "held_out_files"])
def test_images_that_the_model_has_seen_are_refused_by_name(
    key: str, make_fake_bundle: MakeFakeBundle, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """Their scores are too low to promise anything; the same folder without the list goes through with a warning."""
    folder = good_folder(46)
    known = {"training_files": [], key: [file_sha256(folder / "0007.png")]}
    seen = make_fake_bundle(tmp_path / "seen", provenance=known).path
    silent = make_fake_bundle(tmp_path / "silent", provenance={}).path

    with pytest.raises(DataError, match=r"0007\.png"):
        invoke(calibrate, seen, "--good", folder, "--out", tmp_path / "line", *PROMISE)
    result = invoke(calibrate, silent, "--good", folder, "--out", tmp_path / "line", *PROMISE)
    assert "training_files" in result.stderr


def test_bad_files_are_refused_or_left_out_by_option(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """What was left out is named, and does not count toward the number needed."""
    folder = good_folder(45)
    (folder / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt"):
        invoke(calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE)
    result = invoke(
        calibrate, bundle, "--good", folder, "--out", tmp_path / "line", *PROMISE, "--skip-bad-images", "--json"
    )
    assert list(json.loads(result.stdout)["skipped"]) == ["notes.txt"]

    (folder / "0000.png").write_bytes(b"")
    with pytest.raises(CalibrationError, match="44 were given"):
        invoke(calibrate, bundle, "--good", folder, "--out", tmp_path / "other", *PROMISE, "--skip-bad-images")


def test_another_reduction_takes_the_same_order_statistic_of_the_peaks(
    make_fake_bundle: MakeFakeBundle, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """With `mean` the image threshold says nothing about pixels. (The fake's score is its map's maximum anyway.)"""
    geometry = MapGeometry(16, 16, stride=2.0, offset_y=0.5, offset_x=0.5, reduction="mean")
    source = make_fake_bundle(tmp_path / "mean", provenance={"training_files": []}, map=geometry).path
    invoke(calibrate, source, "--good", good_folder(80), "--out", tmp_path / "line", *PROMISE, "--min-area", "9")
    promise = open_bundle(tmp_path / "line").calibration

    assert promise.pixel_threshold == promise.threshold == promise.scores[-2]
    assert promise.min_area_px == 9


def test_an_option_that_cannot_be_used_is_refused_and_named(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """An existing target, one in no folder, a rate of one, a confidence that is none."""
    folder = good_folder(1)

    with pytest.raises(CommandError, match="exists already"):
        invoke(calibrate, bundle, "--good", folder, "--out", bundle, *PROMISE)
    with pytest.raises(CommandError, match="folder does not exist"):
        invoke(calibrate, bundle, "--good", folder, "--out", tmp_path / "no" / "line", *PROMISE)
    with pytest.raises(CommandError, match="--false-rejects '1'"):
        invoke(calibrate, bundle, "--good", folder, "--out", tmp_path / "line", "--false-rejects", "1")
    with pytest.raises(CommandError, match="--confidence '95'"):
        invoke(
            calibrate,
            bundle,
            "--good",
            folder,
            "--out",
            tmp_path / "line",
            "--false-rejects",
            "1%",
            "--confidence",
            "95",
        )
