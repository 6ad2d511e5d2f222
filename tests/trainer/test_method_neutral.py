"""`kizu train` is the same command for every method: what one needs is asked for by the method, not by the command."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from calib.evaluation import evaluate_bundle
from edge.bundle import check_golden, open_bundle
from edge.engines.registry import open_engine
from edge.errors import CommandError, DataError, TrainingError
from edge.images import encode_png
from trainer.config import Schedule, override
from trainer.methods import METHODS
from trainer.negatives import require_unseen
from trainer.presets import PRESETS, choose_preset
from trainer.train_command import INTERRUPTED, train


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A data set with 16 good photographs and a tested flaw, and beside it bad/ with two more and their masks."""
    data = tmp_path / "data"
    for folder, first, count in (("data/train/good", 0, 16), ("data/test/spot", 50, 1), ("bad", 60, 2)):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(first, first + count):
            pixels = np.random.default_rng(number).integers(0, 256, (64, 64), np.uint8)
            (tmp_path / folder / f"{number:02}.png").write_bytes(encode_png(pixels))
    flaw = np.zeros((64, 64), np.uint8)
    flaw[20:40, 20:40] = 255
    for image in sorted((tmp_path / "bad").iterdir()):
        image.with_name(f"{image.stem}_mask.png").write_bytes(encode_png(flaw))
    assert data.is_dir()
    return tmp_path


def run(place: Path, method: str, *extra: str, size: int | None = 64) -> Result:
    app = typer.Typer()
    app.command()(train)
    options = ["--data", str(place / "data"), "--out", str(place / "bundle"), "--steps", "2"]
    return CliRunner().invoke(app, [method, *options, *([] if size is None else ["--size", str(size)]), *extra])


CHEAP = ["--set", "crops=2", "--set", "ascent_steps=1"]


@pytest.mark.parametrize(
    ("method", "preset", "bad", "more"),
    [
        ("drocc", "dense", False, CHEAP),
        ("drocc-lf", "dense", True, CHEAP),
        ("fcdd", "confetti", True, []),
        ("fcdd", "confetti-masks", True, []),
    ],
)
def test_another_method_becomes_a_bundle_by_the_same_command(
    place: Path, method: str, preset: str, bad: bool, more: list[str]
) -> None:
    """Trained, exported, and its golden frames agree in the line's engine; bad parts are named by digest."""
    result = run(place, method, "--preset", preset, *more, *(["--bad", str(place / "bad")] if bad else []))

    assert result.exit_code == 0, (result.output, result.exception)
    bundle = open_bundle(place / "bundle")
    assert (bundle.manifest.method, bundle.manifest.preset) == (method, preset)
    assert (bundle.provenance["method"].get("bad", {}).get("images") == 2) == bad
    with open_engine(bundle, backend="openvino") as engine:
        assert check_golden(bundle, engine).ok


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("drocc", ["--teacher", "line"], "--teacher line: drocc has no use for it"),
        ("drocc", ["--photographs", "photos"], "--photographs photos: drocc has no use for it"),
        ("student-teacher", ["--bad", "bad"], "--bad bad: student-teacher has no use for it"),
        ("drocc", ["--bad", "bad"], "train drocc-lf with --bad"),
        ("drocc-lf", [], "--bad DIR"),
        ("drocc-lf", ["--bad", "bad", "--fit", "tile"], "leave out --fit tile"),
        ("fcdd", ["--set", "bad=bad", "--aspect", "keep"], "leave out --aspect keep"),
        ("fcdd", ["--set", "patience=x"], "patience"),
        ("drocc", ["--preset", "line"], "dense"),
        ("crocc", [], "drocc-lf"),
    ],
)
def test_what_a_method_lacks_or_cannot_use_is_told_before_the_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, options: list[str], message: str
) -> None:
    """There is no folder of images here, and none of the messages is about that."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(encode_png(np.zeros((64, 64), np.uint8)))

    error = run(tmp_path, method, *options).exception

    assert isinstance(error, CommandError) and message in str(error)


def test_a_bundle_that_gives_one_number_an_image_is_asked_for_no_map(place: Path) -> None:
    """DROCC's own setting judges whole crops; the patch grid of `paper-frames` has a map and is not refused."""
    small = ["--set", "ascent_steps=1", "--set", "batch_size=8", "--set", "patch_px=32", "--set", "crops=1"]
    for preset, size in (("paper", 32), ("paper-frames", 64)):
        given = ["--preset", preset, "--set", f"size_px={size}", *small, "--out", str(place / preset)]
        assert run(place, "drocc", *given, size=None).exit_code == 0
    (place / "data" / "test" / "good").mkdir()
    shutil.copy(place / "data" / "train" / "good" / "00.png", place / "data" / "test" / "good" / "00.png")

    with pytest.raises(CommandError, match="gives one number an image and no map; leave --maps out"):
        evaluate_bundle(open_bundle(place / "paper"), place / "data", maps=place / "maps")
    found = evaluate_bundle(open_bundle(place / "paper"), place / "data")
    assert found.image_auroc is not None and any("one number an image" in note for note in found.warnings)
    grid = evaluate_bundle(open_bundle(place / "paper-frames"), place / "data", maps=place / "maps")
    assert (place / "maps" / "test" / "spot" / "50.tiff").is_file()
    assert not any("one number" in note for note in grid.warnings)


@pytest.mark.parametrize("taken_from", ["test/spot/50.png", "train/good/03.png"])
@pytest.mark.parametrize("data", ["data", "data/train/good"])
def test_a_bad_part_that_is_tested_with_or_called_good_is_refused_under_any_name(
    place: Path, taken_from: str, data: str
) -> None:
    """The bytes decide, not the name, and it is told before an hour of training."""
    require_unseen(place / "bad", place / data)  # the control: nothing is in both
    shutil.copy(place / "data" / taken_from, place / "bad" / "another-name.png")

    with pytest.raises(DataError, match=r"1 of 3 images .*another-name.png as (50|03).png"):
        require_unseen(place / "bad", place / data)
    error = run(place, "drocc-lf", "--bad", str(place / "bad")).exception
    assert isinstance(error, DataError) and "another-name.png" in str(error)


def test_a_stopped_run_does_not_go_on_with_other_bad_parts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's name is the same, what lies in it is not; unchanged, the run goes on."""
    rate_at = Schedule.rate_at

    def interrupting(schedule: Schedule, step: int) -> float:
        if step == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return rate_at(schedule, step)

    monkeypatch.setattr(Schedule, "rate_at", interrupting)
    assert run(place, "fcdd", "--bad", str(place / "bad")).exit_code == INTERRUPTED
    monkeypatch.undo()
    taken = {path.name: path.read_bytes() for path in (place / "bad").glob("60*")}
    for name in taken:
        (place / "bad" / name).unlink()

    with pytest.raises(TrainingError, match="belongs to another run: bad seen differ"):
        raise run(place, "fcdd", "--bad", str(place / "bad"), "--resume").exception or AssertionError("not refused")
    for name, data in taken.items():
        (place / "bad" / name).write_bytes(data)
    assert run(place, "fcdd", "--bad", str(place / "bad"), "--resume").exit_code == 0


def test_every_method_has_presets_that_take_the_common_settings() -> None:
    """A name on the command line without settings, or settings without a method, would be found by a user."""
    assert METHODS.keys() == PRESETS.keys()
    for method, presets in PRESETS.items():
        assert choose_preset(method, None) is next(iter(presets.values()))
        changed = override(choose_preset(method, None), ["size_px=128", "patience=3", "epochs=1", "min_steps=9"])
        schedule = changed.schedule(1)
        assert (changed.size_px, schedule.patience, schedule.steps) == (128, 3, 9)


def test_none_is_no_value_except_where_it_is_a_choice() -> None:
    """`center=none` is a word of student-teacher's; `bad=none` takes a folder away."""
    assert override(choose_preset("student-teacher", "duo"), ["center=none"]).to_json()["center"] == "none"
    assert override(choose_preset("drocc-lf", None), ["bad=none"]).to_json()["bad"] is None
    assert override(choose_preset("student-teacher", "duo"), ["teachers=line,pdn-s"]).to_json()["teachers"] == [
        "line", "pdn-s",
    ]  # fmt: skip
