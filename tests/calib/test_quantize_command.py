"""`kizu quantize`: a bundle in eight bits that says the same, or a refusal that names what to try."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from calib import quantize as quantizing
from calib.agreement import Compared, Limits, complaints
from calib.calibrate_command import calibrate
from calib.dataset import file_sha256
from calib.evaluate_command import evaluate
from calib.quantize import LEAST_GOOD, margin_share
from calib.quantize_command import quantize
from edge.bundle import CameraThresholds, ModelBundle, ScoreCalibration, check_golden, open_bundle
from edge.engines.registry import open_engine
from edge.errors import CalibrationError, CommandError, DataError, ParityError
from edge.graph import quantized_types
from edge.images import encode_png
from refining import refining_bundle

Invoke = Callable[..., Any]
Folder = Callable[..., Path]
INT8 = ("--precision", "int8")


@pytest.fixture
def bundle(make_bundle: Callable[..., ModelBundle], good_folder: Folder, tmp_path: Path) -> Path:
    """The tiny model with the provisional threshold that its own scores of ten good parts give."""
    plain = make_bundle(tmp_path / "plain")
    with open_engine(plain, backend="openvino", max_batch=1) as engine:
        from calib.collect import collect

        folder = good_folder(10, "held_out", seed=8)
        scores = sorted(one.verdict.score for one in collect(plain, engine, sorted(folder.iterdir())))
    margin = 2.0 * (scores[-1] - float(np.median(scores)))
    calibration = ScoreCalibration(
        kind="provisional",
        certified=False,
        threshold=scores[-1] + margin,
        pixel_threshold=scores[-1] + margin,
        min_area_px=3,
        scores=tuple(scores),
        engine="openvino",
        data_sha256="0" * 64,
        margin=margin,
    )
    return make_bundle(tmp_path / "bundle", calibration=calibration, provenance={"training_files": []}).path


@pytest.fixture
def bad_folder(tmp_path: Path) -> Path:
    """Five parts with a white square."""
    folder, rng = tmp_path / "bad", np.random.default_rng(4)
    folder.mkdir()
    for index in range(5):
        image = rng.integers(108, 149, (32, 32, 1), dtype=np.uint8)
        image[8:20, 8 : 18 + index] = 255
        (folder / f"{index}.png").write_bytes(encode_png(image))
    return folder


def test_the_quantized_bundle_runs_on_both_backends_and_says_what_it_stands_on(
    bundle: Path, good_folder: Folder, bad_folder: Path, invoke: Invoke, tmp_path: Path
) -> None:
    """New graph, new golden answers, a refitted provisional threshold, and the agreement table in print and inside."""
    result = invoke(
        quantize, bundle, "--good", good_folder(12), *INT8, "--bad", bad_folder, "--out", tmp_path / "small"
    )
    source, small = open_bundle(bundle), open_bundle(tmp_path / "small")
    record = small.provenance["quantization"]

    assert quantized_types(small.model) == ("int8",) and small.provenance["derived_from"] == [source.model_id]
    for backend in ("onnxruntime", "openvino"):
        with open_engine(small, backend=backend, max_batch=1) as engine:
            assert check_golden(small, engine).ok
    assert not np.array_equal(small.golden.maps, source.golden.maps)
    assert (small.calibration.kind, small.calibration.certified, small.calibration.min_area_px) == (
        "provisional",
        False,
        3,
    )
    scores = np.array(small.calibration.scores)
    assert small.calibration.threshold == pytest.approx(scores.max() + 2.0 * (scores.max() - np.median(scores)))
    assert (record["precision"], record["agreement"]["bad"], record["agreement"]["verdicts"]) == ("int8", 5, 1.0)
    assert "same verdict" in result.stdout and (tmp_path / "small/report/quantization.txt").read_text() in result.stdout


def test_the_same_frames_give_the_same_bundle(
    bundle: Path, good_folder: Folder, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is drawn at random, and `--json` is all that is printed to stdout."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    good = good_folder(8)
    printed = [
        json.loads(invoke(quantize, bundle, "--good", good, *INT8, "--out", tmp_path / name, "--json").stdout)
        for name in "ab"
    ]

    assert printed[0]["model_id"] == printed[1]["model_id"] == open_bundle(tmp_path / "a").model_id


@pytest.mark.parametrize("ranges", ["percentile", "entropy", "mse"])
def test_every_range_finder_keeps_the_maps(
    ranges: str, bundle: Path, good_folder: Folder, invoke: Invoke, tmp_path: Path
) -> None:
    """Good frames' maps within 5 % of their spread."""
    out = tmp_path / ranges
    result = invoke(quantize, bundle, "--good", good_folder(8), *INT8, "--ranges", ranges, "--out", out, "--json")

    assert json.loads(result.stdout)["agreement"]["map_error"] < 0.05


def test_fp8_is_written_for_gpus(bundle: Path, good_folder: Folder, invoke: Invoke, tmp_path: Path) -> None:
    """The reference engine computes it here, slowly."""
    invoke(quantize, bundle, "--good", good_folder(8), "--precision", "fp8", "--out", tmp_path / "small")

    assert quantized_types(open_bundle(tmp_path / "small").model) == ("fp8",)


def test_images_of_training_give_ranges_but_no_threshold(
    make_bundle: Callable[..., ModelBundle], good_folder: Folder, invoke: Invoke, tmp_path: Path
) -> None:
    """A model scores them too low. With too few others the command says how many it needs."""
    good = good_folder(14)
    trained = [file_sha256(path) for path in sorted(good.iterdir())[:8]]
    source = make_bundle(tmp_path / "b", provenance={"training_files": trained}).path
    result = invoke(quantize, source, "--good", good, *INT8, "--out", tmp_path / "small", "--json")
    record = json.loads(result.stdout)

    assert (record["range_frames"], record["threshold_frames"]) == (14, 6)
    for path in sorted(good.iterdir())[8:10]:
        path.unlink()
    with pytest.raises(
        CalibrationError, match=f"4 images that the model was not trained on .8 that it was.*{LEAST_GOOD}"
    ):
        invoke(quantize, source, "--good", good, *INT8, "--out", tmp_path / "other")


def test_ranges_that_are_far_too_small_are_refused_with_the_layers_that_hurt(
    bundle: Path,
    good_folder: Folder,
    bad_folder: Path,
    invoke: Invoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planted fault clips every activation to almost nothing: AUROC falls, and nothing is written."""
    found = quantizing.find_ranges
    monkeypatch.setattr(
        quantizing, "find_ranges", lambda *given: {name: limit / 1000 for name, limit in found(*given).items()}
    )

    with pytest.raises(
        CalibrationError, match=r"(?s)--min-agreement.*conv: .*%.*--ranges percentile or entropy.*--keep 'conv'"
    ):
        invoke(quantize, bundle, "--good", good_folder(8), *INT8, "--bad", bad_folder, "--out", tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_keeping_the_old_threshold_on_another_scale_of_scores_is_caught(bundle: Path) -> None:
    """Quantization that halves every score changes no verdict if the threshold follows; the control does not."""
    before = open_bundle(bundle).calibration
    good = list(before.scores)
    compared = Compared()
    for place, score in enumerate([*good, *(before.threshold * factor for factor in (1.1, 1.3, 1.9))]):
        maps = np.full((2, 2), score, np.float32), np.full((2, 2), score / 2, np.float32)
        compared.add(f"{place}", place >= len(good), (score, score / 2), maps)
    limits = Limits(0.95, 0.01)
    after, rule = quantizing.refit(before, compared, "openvino", "0" * 64, "max")

    assert after.threshold == pytest.approx(before.threshold / 2) and "largest of 10 good scores" in rule
    assert complaints(compared.agreement(before.threshold, after.threshold), limits) == []
    (refused,) = complaints(compared.agreement(before.threshold, before.threshold), limits)
    assert "3 of 13 frames get another verdict" in refused


def test_auroc_is_a_gate_of_its_own() -> None:
    """All verdicts equal, but the order of good and bad is lost; allowed on request."""
    compared = Compared()
    for name, bad, scores in (("a", False, (1.0, 2.0)), ("b", False, (2.0, 3.0)), ("c", True, (3.0, 2.5))):
        compared.add(name, bad, scores, (np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)))
    agreement = compared.agreement(9.0, 9.0)

    assert (agreement.verdicts, agreement.auroc_before, agreement.auroc_after) == (1.0, 1.0, 0.5)
    assert ["AUROC falls from 1.0000 to 0.5000" in one for one in complaints(agreement, Limits(0.95, 0.01))] == [True]
    assert complaints(agreement, Limits(0.95, 0.5)) == []


def test_backends_that_disagree_are_refused(
    bundle: Path, good_folder: Folder, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tolerance between them is a tenth of the maps' spread; here none is left."""
    monkeypatch.setattr(quantizing, "PARITY_SHARE", 0.0)
    draft = quantizing.draft_bundle

    def shifted(*given: Any) -> ModelBundle:
        made = draft(*given)
        made.golden.maps.setflags(write=True)
        made.golden.maps[:] += 1.0
        return made

    monkeypatch.setattr(quantizing, "draft_bundle", shifted)

    with pytest.raises(ParityError, match="nothing was written"):
        invoke(quantize, bundle, "--good", good_folder(8), *INT8, "--out", tmp_path / "small")


def test_what_cannot_be_quantized_is_refused_by_name(
    bundle: Path, good_folder: Folder, invoke: Invoke, tmp_path: Path
) -> None:
    """An int8 bundle again, unknown words, both kinds of bad parts, an empty folder of them."""
    good, out = good_folder(8), tmp_path / "small"
    invoke(quantize, bundle, "--good", good, *INT8, "--out", out)
    (tmp_path / "empty").mkdir()
    for error, words, given in (
        (CommandError, "is int8 already", (out, *INT8)),
        (CommandError, "--precision int4: expected one of int8, fp8", (bundle, "--precision", "int4")),
        (CommandError, "--ranges max: expected one of percentile", (bundle, *INT8, "--ranges", "max")),
        (CommandError, "--weight-bits 7: goes with", (bundle, "--precision", "fp8", "--weight-bits", "7")),
        (CommandError, "--keep nothing: no such layer", (bundle, *INT8, "--keep", "nothing")),
        (CommandError, "give one of them", (bundle, *INT8, "--bad", good, "--data", good)),
        (DataError, "no folder with images of bad parts", (bundle, *INT8, "--bad", tmp_path / "empty")),
    ):
        with pytest.raises(error, match=words):
            invoke(quantize, *given, "--good", good, "--out", tmp_path / "other")
    with pytest.raises(CommandError, match="exists already"):
        invoke(quantize, bundle, "--good", good, *INT8, "--out", out)


def test_good_images_that_move_the_threshold_by_themselves_are_pointed_out(
    make_bundle: Callable[..., ModelBundle], bundle: Path, good_folder: Folder, invoke: Invoke, tmp_path: Path
) -> None:
    """The source's threshold is far below its rule's on these images: a warning, no refusal."""
    low = msgspec.structs.replace(open_bundle(bundle).calibration, threshold=0.01, pixel_threshold=0.01, margin=0.0)
    source = make_bundle(tmp_path / "low", calibration=low, provenance={"training_files": []}).path
    result = invoke(quantize, source, "--good", good_folder(8), *INT8, "--out", tmp_path / "small")

    assert "these good images move the threshold by themselves" in result.stderr and "has 0.01" in result.stderr
    assert "100.00%" in result.stdout


def test_a_certified_source_keeps_its_rule_but_not_its_promise(bundle: Path) -> None:
    """With enough good frames its order statistic, else the provisional margin; never certified."""
    plain = open_bundle(bundle).calibration
    certified = msgspec.structs.replace(
        plain, kind="order-statistic", certified=True, false_rejects=0.05, confidence=0.9, margin=None
    )
    for number, threshold, said in ((45, 45.0, "number 45 of 45"), (44, 44.0 + 0.1 * (44 - 22.5), "largest of 44")):
        compared = Compared()
        for score in range(1, number + 1):
            compared.add(f"{score}", False, (1.0, float(score)), (np.zeros((2, 2), np.float32),) * 2)
        after, rule = quantizing.refit(certified, compared, "openvino", "0" * 64, "max")

        assert after.threshold == pytest.approx(threshold) and rule.startswith(said)
        assert (after.kind, after.certified, after.false_rejects) == ("provisional", False, None)


def test_calibrate_refuses_the_images_that_ranges_and_threshold_stand_on(
    bundle: Path, good_folder: Folder, invoke: Invoke, tmp_path: Path
) -> None:
    """The model is not independent of them; other good parts certify the quantized bundle."""
    good = good_folder(45)
    promise = ("--false-rejects", "5%", "--confidence", "90%")
    invoke(quantize, bundle, "--good", good, *INT8, "--out", tmp_path / "small")
    with pytest.raises(DataError, match=r"0000\.png.* and 42 more of the images that .* trained or quantized on"):
        invoke(calibrate, tmp_path / "small", "--good", good, *promise, "--out", tmp_path / "line")
    invoke(calibrate, tmp_path / "small", "--good", good_folder(45, "other", 5), *promise, "--out", tmp_path / "line")
    certified = open_bundle(tmp_path / "line")

    assert certified.calibration.certified and quantized_types(certified.model) == ("int8",)
    assert "same verdict" in (tmp_path / "line" / "report" / "quantization.txt").read_text()
    assert "same verdict" in (tmp_path / "line.certificate.html").read_text()


def test_thresholds_by_camera_are_not_guessed_again(
    make_bundle: Callable[..., ModelBundle], good_folder: Folder, invoke: Invoke, tmp_path: Path
) -> None:
    """A folder does not say which camera took its images; the table is made again from the quantized bundle."""
    row = CameraThresholds(2.0, 2.0, 1, (1.0,))
    table = msgspec.structs.replace(make_bundle(tmp_path / "plain").calibration, cameras={"left": row})
    source = make_bundle(tmp_path / "table", calibration=table).path

    with pytest.raises(CommandError, match="certified for the cameras left"):
        invoke(quantize, source, "--good", good_folder(8), *INT8, "--out", tmp_path / "small")


def test_a_bundle_that_looks_coarsely_first_is_refused(
    make_bundle: Callable[..., ModelBundle], good_folder: Folder, invoke: Invoke, tmp_path: Path
) -> None:
    """Its margin stands on the float32 coarse graph; nothing is known of another."""
    source = refining_bundle(make_bundle, tmp_path / "refining", threshold=0.5, margin=0.1)

    with pytest.raises(CommandError, match=r"refining looks with coarse\.onnx first.*without --refine"):
        invoke(quantize, source.path, "--good", good_folder(8), *INT8, "--out", tmp_path / "small")


def test_evaluate_takes_the_quantized_bundle_and_calls_it_provisional(
    bundle: Path, good_folder: Folder, invoke: Invoke, tmp_path: Path, test_folder: Path
) -> None:
    invoke(quantize, bundle, "--good", good_folder(8), *INT8, "--out", tmp_path / "small")
    result = invoke(evaluate, tmp_path / "small", "--data", test_folder)

    assert "provisional" in result.stderr and "image AUROC" in result.stdout


def test_the_margin_is_the_sources_own(bundle: Path) -> None:
    """Twice the distance to the median there, hence here; a tenth for a source that has no say."""
    calibration = open_bundle(bundle).calibration

    assert margin_share(calibration) == pytest.approx(2.0)
