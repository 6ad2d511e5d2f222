"""Training at native resolution: crops that cover every image, a bundle that tiles, a threshold from whole images."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

import trainer.data
from calib.collect import collect
from edge.bundle import InputSpec, open_bundle
from edge.engines.registry import open_engine
from edge.errors import BundleError, CommandError, DataError
from edge.images import encode_png, read_image
from edge.stages.tile import Tiling
from edge.types import FrameId, ModelInput, Roi
from trainer.checkpoint import module_tensors, save_checkpoint
from trainer.config import LINE
from trainer.data import TrainingSet, crop_starts, load_training_set, split_by_part
from trainer.distill import Teacher
from trainer.export import to_onnx
from trainer.method import Frames
from trainer.methods.student_teacher import StudentTeacher
from trainer.patch_nets import PatchNetSpec, build_patch_net
from trainer.train_command import train

TINY = PatchNetSpec(patch=33, widths=(4, 4, 4), descriptor_dim=4)
SIZES = ((64, 64), (150, 100), (80, 200), (40, 90))


def write_images(folder: Path, count: int) -> None:
    """Noise of four sizes, one of them lower than a crop."""
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, SIZES[number % len(SIZES)], np.uint8)
        (folder / f"{number:02}.png").write_bytes(encode_png(pixels))


def load(folder: Path) -> TrainingSet:
    return load_training_set(folder, size_px=64, aspect="stretch", skip_bad=False, fit="tile")


@given(st.integers(1, 3000), st.integers(64, 512))
def test_crops_cover_a_side_from_edge_to_edge_and_overlap(side: int, size: int) -> None:
    """No pixel is left out, and what a network sees at once lies in one crop as a whole."""
    starts = crop_starts(side, size)

    assert starts[0] == 0 and starts[-1] == max(0, side - size)
    assert all(0 < b - a <= size - size // trainer.data.OVERLAP for a, b in pairwise(starts))


def test_crops_are_the_images_own_pixels_in_the_order_of_the_images(tmp_path: Path) -> None:
    """Nothing is resized; an image that is lower than a crop is continued by reflection."""
    write_images(tmp_path / "good", 4)

    found = load(tmp_path / "good")

    assert found.crops == (1, 3 * 2, 2 * 4, 2) and len(found.frames) == sum(found.crops)
    image = read_image(tmp_path / "good" / "01.png")
    np.testing.assert_array_equal(found.frames[1], image[:64, :64])
    np.testing.assert_array_equal(found.frames[6], image[-64:, -64:])
    low = read_image(tmp_path / "good" / "03.png")
    np.testing.assert_array_equal(found.frames[-1], np.concatenate([low, low[-2:-26:-1]])[:, -64:])


def test_all_crops_of_an_image_are_on_its_side_of_the_split(tmp_path: Path) -> None:
    """A crop beside one that was learned from is no new part."""
    write_images(tmp_path / "good", 16)
    found = load(tmp_path / "good")
    split = split_by_part(found.names, found.file_sha256, share=0.2, seed=1)

    sides = [found.take(places) for places in (split.train, split.threshold)]

    assert sum(map(len, sides)) == len(found.frames)
    for frames, places in zip(sides, (split.train, split.threshold), strict=True):
        assert len(frames) == sum(found.crops[place] for place in places)
        first = read_image(found.paths(places)[0])
        np.testing.assert_array_equal(frames[0][: first.shape[0]], first[:64, :64])


def test_large_sets_go_to_a_temporary_file_if_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixels are the same; where they would not fit, that is said before the disk is full."""
    write_images(tmp_path / "good", 8)
    in_memory = load(tmp_path / "good")
    monkeypatch.setattr(trainer.data, "RAM_LIMIT_BYTES", 1)

    paged = load(tmp_path / "good")

    assert isinstance(paged.frames, np.memmap)
    np.testing.assert_array_equal(paged.frames, in_memory.frames)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match="set TMPDIR"):
        load(tmp_path / "good")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good/ with 16 images of four sizes, and teacher.safetensors."""
    folder = tmp_path_factory.mktemp("tiled")
    write_images(folder / "good", 16)
    tensors = module_tensors("net", build_patch_net(TINY, 9))
    tensors |= {"decoder.weight": torch.zeros(1, 4), "decoder.bias": torch.zeros(1)}
    save_checkpoint(folder / "teacher.safetensors", tensors, {"kind": "teacher", "spec": TINY.to_json()})
    return folder


def run(place: Path, out: str, *extra: str) -> Result:
    app = typer.Typer()
    app.command()(train)
    options = [
        "student-teacher", "--preset", "line", "--data", str(place / "good"), "--out", str(place / out), "--size", "64",
        "--steps", "6",
        "--teacher", str(place / "teacher.safetensors"), *extra,
    ]  # fmt: skip
    return CliRunner().invoke(app, options)


def test_a_bundle_trained_on_tiles_tiles_and_no_held_out_image_is_above_its_threshold(place: Path) -> None:
    """The provisional threshold stands on whole images, scored as the line will score them."""
    result = run(place, "bundle", "--fit", "tile")

    assert result.exit_code == 0, result.output
    assert "16 good images (gray, in 68 crops)" in result.output
    bundle = open_bundle(place / "bundle")
    assert (bundle.manifest.input.fit, bundle.manifest.input.min_side_px) == ("tile", 32)
    names = bundle.provenance["data"]["threshold"]
    with open_engine(bundle, max_batch=1) as engine:
        found = list(collect(bundle, engine, [place / "good" / name for name in names]))
    scores = sorted(one.verdict.score for one in found if one.verdict.score is not None)
    assert len(names) == len(scores) == 6
    np.testing.assert_allclose(scores, bundle.calibration.scores, rtol=1e-5)
    assert scores[-1] <= bundle.calibration.threshold == bundle.calibration.pixel_threshold
    sizes = {one.anomaly_map.scores.shape for one in found if one.anomaly_map is not None}
    assert sizes <= {(9, 9), (30, 18), (13, 43), (3, 15)} and len(sizes) > 1


def test_a_map_that_cannot_be_put_together_is_refused_before_the_training(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: a method that says its cells lie elsewhere than they do would leave seams."""
    geometry = StudentTeacher.map_geometry
    monkeypatch.setattr(
        StudentTeacher,
        "map_geometry",
        lambda self, height, width, **more: msgspec.structs.replace(geometry(self, height, width), offset_x=13.0),
    )

    result = run(place, "seams", "--fit", "tile")

    assert isinstance(result.exception, BundleError) and "tiles would not join" in str(result.exception)
    assert "training" not in result.output and run(place, "resized").exit_code == 0


def test_a_map_judged_against_its_own_mean_is_not_tiled(place: Path) -> None:
    """Each tile has a mean of its own, so the same flaw would score differently from tile to tile."""
    result = run(place, "centered", "--fit", "tile", "--set", "center=median")

    assert isinstance(result.exception, CommandError)
    assert "do not depend on the whole picture" in str(result.exception)


def test_a_method_whose_cells_see_the_whole_picture_is_not_tiled(place: Path) -> None:
    """Told by name, with what to do instead, before the training."""
    app = typer.Typer()
    app.command()(train)
    result = CliRunner().invoke(
        app,
        ["conad", "--data", str(place / "good"), "--out", str(place / "whole"), "--size", "64", "--fit", "tile"],
    )

    assert isinstance(result.exception, CommandError)
    assert "those of conad" in str(result.exception) and "--fit resize" in str(result.exception)


@pytest.mark.parametrize("size", [(150, 101), (64, 200), (50, 33)])
def test_the_line_network_exported_for_the_whole_picture_says_the_same(size: tuple[int, int]) -> None:
    """One method, two graphs: 64 x 64 px by tiles, and one of the picture's own size; equal to 1e-5 of the scores."""
    frames = np.random.default_rng(8).integers(0, 256, (8, 64, 64, 1), np.uint8)
    net = build_patch_net(TINY, 50).eval().requires_grad_(False)
    method = StudentTeacher(LINE, [Teacher("tiny", TINY, net, torch.zeros(1, 4), torch.zeros(1), {}, "0" * 64)], seed=1)
    method.prepare(frames)
    method.fit_statistics(frames)
    image = np.random.default_rng(9).integers(0, 256, (*size, 1), np.uint8)

    def run(pixels: Frames) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        spec = InputSpec(pixels.shape[0], pixels.shape[1], 1, max_batch=1)
        session = onnxruntime.InferenceSession(to_onnx(method.deployed(1).eval(), spec))
        maps, scores = session.run(None, {"frames": pixels[None]})
        return maps[0], scores[0]

    tiling = Tiling(InputSpec(64, 64, 1, 1, fit="tile"), method.map_geometry(64, 64))
    stitch = tiling.begin(ModelInput(FrameId("cam", 1, 0, 0), image, Roi(0, 0, size[1], size[0])))
    for item in stitch.tiles():
        stitch.put(item.tile, run(np.ascontiguousarray(item.pixels))[0])
    whole, score = run(image)

    np.testing.assert_allclose(stitch.scores, whole, rtol=1e-5, atol=1e-5)
    assert stitch.score == pytest.approx(float(score), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"), [(["--fit", "crop"], "resize or tile"), (["--fit", "tile", "--aspect", "keep"], "leave it")]
)
def test_options_that_do_not_go_together_are_refused(place: Path, options: list[str], words: str) -> None:
    """Before any image is read."""
    error = run(place, "none", *options).exception

    assert isinstance(error, CommandError) and words in str(error)
