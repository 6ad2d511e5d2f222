"""`kizu train` from the command line's side: what it writes, what it refuses, and what Ctrl-C leaves behind."""

from __future__ import annotations

import copy
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner, Result

import trainer.export
import trainer.loop
from calib.dataset import file_sha256
from edge.bundle import check_golden, open_bundle
from edge.engines.registry import open_engine
from edge.errors import BundleError, CommandError, DataError, ParityError, TrainingError
from edge.images import encode_png
from trainer.checkpoint import module_tensors, save_checkpoint
from trainer.config import Schedule
from trainer.patch_nets import PatchNetSpec, build_patch_net
from trainer.student_graph import DeployedStudentTeacher
from trainer.train_command import INTERRUPTED, checkpoint_path, train

TINY = PatchNetSpec(patch=33, widths=(4, 4, 4), descriptor_dim=4)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with good/ (16 photographs) and teacher.safetensors."""
    (tmp_path / "good").mkdir()
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64), np.uint8)
        (tmp_path / "good" / f"{number:02}.png").write_bytes(encode_png(pixels))
    tensors = module_tensors("net", build_patch_net(TINY, 9))
    tensors |= {"decoder.weight": torch.zeros(1, 4), "decoder.bias": torch.zeros(1)}
    save_checkpoint(tmp_path / "teacher.safetensors", tensors, {"kind": "teacher", "spec": TINY.to_json()})
    return tmp_path


def run(place: Path, *extra: str, steps: int | None = 6) -> Result:
    app = typer.Typer()
    app.command()(train)
    options = [
        "student-teacher", "--preset", "line", "--data", str(place / "good"), "--out", str(place / "bundle"),
        "--size", "64",
        "--teacher", str(place / "teacher.safetensors"), *([] if steps is None else ["--steps", str(steps)]), *extra,
    ]  # fmt: skip
    return CliRunner().invoke(app, options)


def test_a_folder_of_good_images_becomes_a_bundle_that_passes_its_own_golden_frames(place: Path) -> None:
    """The whole way, on a model so small that it takes a second."""
    result = run(place)

    bundle = open_bundle(place / "bundle")
    assert result.exit_code == 0, result.output
    assert not checkpoint_path(place / "bundle").exists()
    assert (bundle.manifest.preset, bundle.manifest.input.channels) == ("line", 1)
    assert (bundle.calibration.certified, bundle.calibration.statistics_shared) == (False, True)
    assert bundle.provenance["training"]["schedule"]["steps"] == bundle.provenance["training"]["steps"] == 6
    with open_engine(bundle, backend="onnxruntime") as engine:
        assert check_golden(bundle, engine).ok


def test_a_training_leaves_a_page_of_what_was_learned(place: Path) -> None:
    """Verified with the bundle: learning curve, scores of good parts, the golden frames and their maps."""
    result = run(place)

    page = (place / "bundle" / "report" / "training.html").read_text()
    golden = len(open_bundle(place / "bundle").golden.frames)
    assert str(place / "bundle" / "report" / "training.html") in result.output
    assert 'alt="learning curve"' in page and 'alt="histogram of image scores"' in page and "provisional" in page
    assert len(re.findall(r'alt="golden frame \d+ with its map"', page)) == golden > 0
    assert not re.search(r"https?://", page)


def test_the_bundle_names_every_image_it_has_seen_by_digest(place: Path) -> None:
    """Calibration refuses those images: a certificate from parts the model learned from would be worth nothing."""
    run(place)

    provenance = open_bundle(place / "bundle").provenance
    stored = sorted(file_sha256(path) for path in (place / "good").iterdir())
    assert sorted(provenance["training_files"] + provenance["held_out_files"]) == stored


def test_the_same_command_gives_the_same_model(place: Path) -> None:
    """Seed, data and teacher decide everything but the date."""
    run(place)
    first = (place / "bundle").rename(place / "first")
    run(place)

    assert open_bundle(first).model == open_bundle(place / "bundle").model


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes in the middle of a step; the resumed run ends as if it never came."""
    run(place)
    whole = (place / "bundle").rename(place / "whole")
    rate_at, steps_seen = Schedule.rate_at, []

    def interrupting(schedule: Schedule, step: int) -> float:
        steps_seen.append(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return rate_at(schedule, step)

    monkeypatch.setattr(Schedule, "rate_at", interrupting)
    stopped = run(place)
    monkeypatch.undo()

    assert (stopped.exit_code, steps_seen[-1]) == (INTERRUPTED, 2)
    assert "--resume" in stopped.output and not (place / "bundle").exists()
    assert isinstance(run(place).exception, CommandError), "a second start without --resume would lose the first"
    resumed = run(place, "--resume")
    assert resumed.exit_code == 0 and "going on at step 3 of 6" in resumed.output
    assert open_bundle(whole).model == open_bundle(place / "bundle").model


def test_a_resumed_minutes_run_keeps_its_plan(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of steps was fixed when the run began, however fast the machine is now."""
    rate_at = Schedule.rate_at

    def interrupting(schedule: Schedule, step: int) -> float:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return rate_at(schedule, step)

    monkeypatch.setattr(trainer.loop, "plan_steps", lambda method, frames, schedule, **_: replace(schedule, steps=9))
    monkeypatch.setattr(Schedule, "rate_at", interrupting)
    assert run(place, "--minutes", "1", steps=None).exit_code == INTERRUPTED
    monkeypatch.undo()

    assert run(place, "--minutes", "1", "--resume", steps=None).exit_code == 0
    assert open_bundle(place / "bundle").provenance["training"]["steps"] == 9


def test_bad_files_are_refused_by_name_or_skipped_and_recorded(place: Path) -> None:
    """One broken photograph among good ones."""
    (place / "good" / "99.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")

    refused = run(place)
    skipped = run(place, "--skip-bad-images")

    assert isinstance(refused.exception, DataError) and "99.png" in str(refused.exception)
    assert skipped.exit_code == 0 and "skipped 99.png" in skipped.output
    assert open_bundle(place / "bundle").provenance["data"]["skipped"][0].startswith("99.png")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--steps", "6", "--minutes", "1"], CommandError),
        (["--aspect", "crop"], CommandError),
        (["--device", "tpu"], CommandError),
        (["--preset", "lime"], CommandError),
        (["--holdout", "0.9"], DataError),
        (["--teacher", "nobody"], TrainingError),
    ],
)
def test_wrong_options_are_refused_before_any_work(place: Path, options: list[str], error: type[Exception]) -> None:
    """Nothing is written, neither a bundle nor a checkpoint."""
    result = run(place, *options)

    assert isinstance(result.exception, error)
    assert {path.name for path in place.iterdir()} == {"good", "teacher.safetensors"}


def test_an_existing_bundle_is_refused_before_training(place: Path) -> None:
    """Not after ten minutes of it."""
    (place / "bundle").mkdir()

    assert isinstance(run(place).exception, CommandError | BundleError)


def test_a_failed_parity_keeps_the_training(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: the exported graph disagrees; no bundle, but --resume need not train again."""
    to_onnx = trainer.export.to_onnx
    monkeypatch.setattr(trainer.export, "to_onnx", lambda net, spec: to_onnx(_brighter(net), spec))
    failed = run(place)
    monkeypatch.undo()

    assert isinstance(failed.exception, ParityError) and not (place / "bundle").exists()
    assert checkpoint_path(place / "bundle").exists()
    assert run(place, "--resume").exit_code == 0


def _brighter(net: DeployedStudentTeacher) -> DeployedStudentTeacher:
    wrong = copy.deepcopy(net)
    wrong.scales[0].shift += 0.1  # type: ignore[operator,assignment]
    return wrong


def test_a_preset_without_students_learns_a_product_without_training(place: Path) -> None:
    """`duo`: `--steps` has nothing to count."""
    result = run(place, "--preset", "duo")

    bundle = open_bundle(place / "bundle")
    assert result.exit_code == 0 and "nothing to train" in result.output
    assert bundle.provenance["config"]["students"] == 0 and bundle.provenance["training"]["steps"] == 0
    assert not checkpoint_path(place / "bundle").exists()


def test_another_method_goes_the_same_way(place: Path) -> None:
    """DROCC: no teacher, the same command, a bundle that passes its own golden frames and tells its method."""
    app = typer.Typer()
    app.command()(train)
    options = ["drocc", "--data", str(place / "good"), "--out", str(place / "bundle"), "--size", "64", "--steps", "3"]
    result = CliRunner().invoke(app, [*options, "--set", "ascent_steps=1"])

    bundle = open_bundle(place / "bundle")
    assert result.exit_code == 0, result.output
    assert (bundle.manifest.method, bundle.manifest.preset) == ("drocc", "dense")
    with open_engine(bundle, backend="openvino") as engine:
        check_golden(bundle, engine, require=True)


def test_a_teacher_for_a_method_without_one_is_refused(place: Path) -> None:
    """`--teacher` with DROCC is a misunderstanding, not a setting."""
    app = typer.Typer()
    app.command()(train)
    options = ["drocc", "--data", str(place / "good"), "--out", str(place / "bundle"), "--teacher", "line"]
    result = CliRunner().invoke(app, options)

    assert isinstance(result.exception, CommandError) and "has no use for it" in str(result.exception)


def test_provenance_tells_every_term_and_which_step_was_kept(place: Path) -> None:
    """Two networks against each other, stopped by held-out good images: what a reader needs to believe the result."""
    small = [f"--set={one}" for one in ("widths=8,8", "critic_widths=8,8", "latent=4", "batch_size=2", "patience=1")]
    options = ["conad", "--data", str(place / "good"), "--out", str(place / "terms"), "--size", "64", "--steps", "20"]
    app = typer.Typer()
    app.command()(train)

    result = CliRunner().invoke(app, [*options, *small])

    assert result.exit_code == 0, result.output
    training = open_bundle(place / "terms").provenance["training"]
    assert training["best_step"] <= training["steps"] <= 20
    assert training["schedule"]["patience"] == 1
    assert len(training["terms"]) == len(training["curve"])
    assert {"critic.real", "generator.winner"} <= training["terms"][0].keys()
