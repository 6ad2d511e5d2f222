"""`kizu verify` and `kizu inspect`: what a person asks of a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from calib.inspect_command import inspect
from edge.bundle import ModelBundle
from edge.commands.verify import verify
from edge.errors import BundleError, CommandError, ParityError

APP = typer.Typer()
APP.command()(verify)
APP.command()(inspect)


def test_verify_reports_hashes_and_golden_frames_as_json(tiny_bundle: ModelBundle) -> None:
    """One object, nothing else on the output."""
    result = CliRunner().invoke(APP, ["verify", str(tiny_bundle.path), "--json"])

    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["ok"] and found["model_id"] == tiny_bundle.model_id
    assert found["backend"] == "openvino" and found["golden_frames"] == 3 and found["share_of_tolerance"] < 1


def test_verify_prints_a_table_for_people(tiny_bundle: ModelBundle) -> None:
    """The verdict is the title."""
    result = CliRunner().invoke(APP, ["verify", str(tiny_bundle.path), "--backend", "onnxruntime"])

    assert result.exit_code == 0 and "bundle as written" in result.stdout and "onnxruntime" in result.stdout


def test_verify_fails_for_an_engine_that_answers_differently(tiny_bundle: ModelBundle) -> None:
    """The fake does not run the model: the work failed (exit 1), the command line was right."""
    result = CliRunner().invoke(APP, ["verify", str(tiny_bundle.path), "--backend", "fake", "--json"])

    assert not json.loads(result.stdout)["ok"]
    assert isinstance(result.exception, ParityError) and result.exception.exit_code == 1


def test_verify_refuses_a_changed_bundle_and_an_unknown_backend(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    """Both are the command line's or a file's fault: exit 2."""
    copy = Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy"))
    (copy / "provenance.json").write_bytes(b"{}")

    with pytest.raises(BundleError, match="was changed"):
        verify(copy)
    with pytest.raises(CommandError, match="openvino, onnxruntime, tensorrt, fake"):
        verify(tiny_bundle.path, backend="tensorflow")


def test_inspect_shows_manifest_calibration_and_provenance(tiny_bundle: ModelBundle) -> None:
    """As JSON the whole of it, as tables what fits a screen."""
    found = json.loads(CliRunner().invoke(APP, ["inspect", str(tiny_bundle.path), "--json"]).stdout)
    shown = CliRunner().invoke(APP, ["inspect", str(tiny_bundle.path)]).stdout

    assert found["manifest"]["input"]["height"] == 32 and found["provenance"]["seed"] == 5
    assert found["calibration"]["scores"] == [0.5, 1.0, 1.5]
    for words in ("input.height", "provisional", "made_by", "model.onnx", "2023-11-14"):
        assert words in shown
