"""A coarse look: the margin keeps its promise, the export checks both graphs, and the command refuses early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from numpy.typing import NDArray
from onnx import numpy_helper
from typer.testing import CliRunner, Result

import trainer.export
from calib.threshold import fit_threshold
from edge.bundle import InputSpec, ModelBundle, check_golden, open_bundle
from edge.engines.refine import RefineEngine
from edge.engines.registry import open_engine
from edge.errors import CalibrationError, CommandError, ParityError
from edge.images import encode_png
from refining import noise, refining_bundle
from trainer.checkpoint import module_tensors, save_checkpoint
from trainer.config import LINE
from trainer.distill import Teacher
from trainer.export import BundleFacts, export_bundle, to_onnx
from trainer.method import Frames
from trainer.methods.student_teacher import StudentTeacher
from trainer.patch_nets import PatchNetSpec, build_patch_net
from trainer.refine import (
    CONFIDENCE,
    FittedRefine,
    RefineRequest,
    coarse_geometry,
    describe,
    fit_refine,
    largest_cells,
    require_tiles,
)
from trainer.train_command import train

TINY = PatchNetSpec(patch=33, widths=(4, 4, 4), descriptor_dim=4)
HALF = RefineRequest(4, 0.5)
"""Five good tiles are enough for a rate of one half."""

Peaks = NDArray[np.float64]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8", RefineRequest(8, 0.001)), ("4:1%", RefineRequest(4, 0.01)), ("4:0.0005", RefineRequest(4, 0.0005))],
)
def test_the_option_is_a_stride_and_maybe_a_rate(text: str, expected: RefineRequest) -> None:
    """A tenth of a percent unless another is asked for."""
    assert RefineRequest.parse(text) == expected


@pytest.mark.parametrize("text", ["", "four", "0", "-4", "4:", "4:0", "4:100%", "4.5", "4:1%:2"])
def test_an_option_that_is_neither_is_refused(text: str) -> None:
    """Never guessed."""
    with pytest.raises(CommandError, match="--refine"):
        RefineRequest.parse(text)


def test_too_few_tiles_are_refused_with_the_number_needed_and_the_rate_supported() -> None:
    """2,995 for 0.1 % at 95 %; what the message proposes is then accepted."""
    require_tiles(2995, RefineRequest(4))
    with pytest.raises(CalibrationError, match=r"needs at least 2,995 good tiles set aside.*2,994.*--refine 4:0\.11%"):
        require_tiles(2994, RefineRequest(4))
    with pytest.raises(CalibrationError, match=r"there are 6.*--refine 4:40%"):
        require_tiles(6, RefineRequest(4))
    require_tiles(6, RefineRequest.parse("4:40%"))


# --- the promise -----------------------------------------------------------------------------------------------------


def simulated(random: np.random.Generator, tiles: int) -> tuple[Peaks, Peaks]:
    """Dense and coarse maxima of maps of 8 x 8 cells with heavy tails, each second cell coarse."""
    maps = random.exponential(1.0, (tiles, 8, 8)) ** 2
    return maps.max(axis=(1, 2)), maps[:, ::2, ::2].max(axis=(1, 2))


def missed(dense: Peaks, coarse: Peaks, threshold: float, margin: float) -> float:
    """The share of tiles with a cell above the threshold that are not refined."""
    return float(np.mean((dense > threshold) & (coarse <= threshold - margin)))


def worst(dense: Peaks, coarse: Peaks, margin: float) -> float:
    """The largest such share, over thresholds from the middle of good tiles to their end."""
    thresholds = np.quantile(dense, [0.2, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
    return max(missed(dense, coarse, float(threshold), margin) for threshold in thresholds)


def test_no_more_tiles_are_missed_than_stated_whatever_the_threshold() -> None:
    """300 samples of the smallest size that supports 1 %: the promise is kept as often as it says."""
    random = np.random.default_rng(1)
    world = simulated(random, 60_000)
    kept = []
    for _ in range(300):
        dense, coarse = simulated(random, 299)
        margin = fit_threshold(dense - coarse, false_rejects=0.01, confidence=CONFIDENCE).threshold
        kept.append(worst(*world, margin) <= 0.01)

    assert np.mean(kept) >= CONFIDENCE - 4 * np.sqrt(CONFIDENCE * (1 - CONFIDENCE) / 300)


def test_control_a_gate_at_the_threshold_misses_far_more() -> None:
    """Planted bug: no margin. The check above would see it."""
    world = simulated(np.random.default_rng(1), 60_000)

    assert worst(*world, margin=0.0) > 0.1


@pytest.fixture(scope="module")
def network(
    make_bundle: Callable[..., ModelBundle], tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelBundle, FittedRefine]:
    """The tiny network with a margin for 1 %, fitted on 299 tiles through its engines; a tenth of them exceed 1.4."""
    folder = tmp_path_factory.mktemp("coarse")
    draft = refining_bundle(make_bundle, folder / "draft", threshold=1.4, margin=0.0)
    fitted = fit_refine(draft, noise(299, seed=1), RefineRequest(4, 0.01), backend="openvino")
    bundle = refining_bundle(make_bundle, folder / "bundle", threshold=1.4, margin=fitted.refine.margin)
    return bundle, fitted


def misses(bundle: ModelBundle, margin: float, frames: Frames) -> tuple[int, int]:
    """How many of `frames` hold a pixel above the threshold and are not refined, and how many are not refined."""
    with open_engine(bundle, max_batch=1) as engine, open_engine(bundle, max_batch=1, refine=False) as dense:
        assert isinstance(engine, RefineEngine)
        engine.gate = bundle.calibration.threshold - margin
        lost = 0
        for frame in frames:
            found, expected = (one.infer(frame[None])[0][0] for one in (engine, dense))
            lost += int((expected > bundle.calibration.pixel_threshold).any() and not np.array_equal(found, expected))
        return lost, engine.tiles - engine.tiles_refined


def test_a_real_network_misses_no_pixel_above_the_threshold_beyond_the_rate(
    network: tuple[ModelBundle, FittedRefine],
) -> None:
    """Fresh tiles through both engines, compared with dense everywhere: 1 % of 600, and two standard errors."""
    bundle, fitted = network

    lost, left_out = misses(bundle, fitted.refine.margin, noise(600, seed=2))

    assert lost <= 6 + 2 * np.sqrt(6)
    assert left_out > 100  # and the promise is not kept by refining everything


def test_control_without_the_margin_the_real_network_misses_more(network: tuple[ModelBundle, FittedRefine]) -> None:
    """Planted bug: the gate at the threshold itself."""
    lost, _ = misses(network[0], 0.0, noise(600, seed=2))

    assert lost > 6 + 2 * np.sqrt(6)


def test_the_margin_is_an_order_statistic_of_the_gaps(network: tuple[ModelBundle, FittedRefine]) -> None:
    """The largest of 299 for 1 %, and what it stands on is said."""
    bundle, fitted = network
    dense, _ = largest_cells(bundle, noise(299, seed=1), "openvino")

    assert fitted.refine.margin == pytest.approx(float((dense - fitted.peaks).max()))
    assert (fitted.refine.tiles, fitted.refine.rank, fitted.refine.rate) == (299, 299, 0.01)
    assert fitted.refined_share(bundle.calibration) == np.mean(fitted.peaks > 1.4 - fitted.refine.margin)


# --- the export ------------------------------------------------------------------------------------------------------


def facts() -> BundleFacts:
    spec = InputSpec(height=64, width=64, channels=1, max_batch=4)
    return BundleFacts("tiny", "student-teacher", "line", spec, "d" * 64, True, {"seed": 1})


def method_of(**settings: object) -> tuple[StudentTeacher, Frames]:
    """A fitted student-teacher of a tiny teacher, a descriptor for every second pixel."""
    frames = np.random.default_rng(8).integers(0, 256, (8, 64, 64, 1), np.uint8)
    net = build_patch_net(TINY, 50).eval().requires_grad_(False)
    teacher = Teacher("tiny", TINY, net, torch.zeros(1, 4), torch.zeros(1), {}, "0" * 64)
    config = replace(LINE, teachers=("tiny",), size_px=64, **{"stride": 2, **settings})  # type: ignore[arg-type]
    method = StudentTeacher(config, [teacher], seed=1)
    method.prepare(frames)
    method.fit_statistics(frames)
    return method, frames


@pytest.mark.parametrize("pad", ["none", "reflect", "zero"])
def test_the_bundle_holds_both_graphs_and_both_answer_as_torch_does(tmp_path: Path, pad: str) -> None:
    """On both backends; the coarse cells are every second dense one, also where the graph pads."""
    method, frames = method_of(pad=pad)

    export_bundle(method, tmp_path / "b", facts(), held_out=frames, refine=HALF)

    bundle = open_bundle(tmp_path / "b")
    refine = bundle.manifest.refine
    assert refine is not None and refine.map == method.map_geometry(64, 64, stride=4)
    assert (refine.rate, refine.confidence, refine.tiles) == (0.5, CONFIDENCE, 8) and refine.margin > 0
    assert bundle.provenance["refine"]["parity_max_abs"].keys() == {"openvino", "onnxruntime"}
    for backend in ("openvino", "onnxruntime"):
        with open_engine(bundle, backend=backend) as engine:
            assert check_golden(bundle, engine, require=True).ok


def test_the_dense_graph_and_threshold_are_those_of_a_bundle_without_a_coarse_one(tmp_path: Path) -> None:
    """Asking for a coarse look changes neither what is computed nor what is rejected."""
    method, frames = method_of()
    plain = export_bundle(method, tmp_path / "plain", facts(), held_out=frames)
    both = export_bundle(method, tmp_path / "both", facts(), held_out=frames, refine=HALF)

    assert plain.manifest.refine is None and plain.coarse is None
    assert both.model == plain.model and both.calibration.scores == plain.calibration.scores


def test_a_coarse_graph_that_differs_from_torch_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: one of its weight tensors is one percent off; the error names the file, and there is no bundle."""
    method, frames = method_of()

    def wrong(deployed: torch.nn.Module, spec: InputSpec) -> bytes:
        data = to_onnx(deployed, spec)
        model = onnx.load_from_string(data)
        if model.graph.output[0].type.tensor_type.shape.dim[1].dim_value == method.map_geometry(64, 64).height:
            return data
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
        return bytes(model.SerializeToString())

    monkeypatch.setattr(trainer.export, "to_onnx", wrong)
    with pytest.raises(ParityError, match=r"coarse\.onnx was not written"):
        export_bundle(method, tmp_path / "b", facts(), held_out=frames, refine=HALF)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_a_stride_that_is_no_coarser_multiple_is_refused(stride: int) -> None:
    """The dense map has a cell every 2 px; the message proposes 4."""
    method, _ = method_of()

    with pytest.raises(CommandError, match=rf"--refine {stride}: .*such as 4"):
        coarse_geometry(method, facts().input, RefineRequest(stride))


def test_a_map_that_depends_on_the_whole_picture_has_no_coarse_form() -> None:
    """Its coarse mean is another than its dense one."""
    method, _ = method_of(center="median")

    with pytest.raises(CommandError, match="whole picture"):
        coarse_geometry(method, facts().input, HALF)


def test_a_coarse_pass_that_saves_nothing_is_said(network: tuple[ModelBundle, FittedRefine]) -> None:
    """Cheap and rarely refined: faster. As dear as the dense one: leave it out."""
    bundle, fitted = network
    cheap, dear = (replace(fitted, coarse_time_share=share).facts(bundle.calibration) for share in (0.01, 1.0))

    assert " x faster on good parts" in describe(fitted.refine, cheap)
    assert "leave --refine out" in describe(fitted.refine, dear)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """good/ with 16 pictures of 100 x 100 px, four crops of 64 px each, and teacher.safetensors."""
    (tmp_path / "good").mkdir()
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (100, 100), np.uint8)
        (tmp_path / "good" / f"{number:02}.png").write_bytes(encode_png(pixels))
    tensors = module_tensors("net", build_patch_net(TINY, 9))
    tensors |= {"decoder.weight": torch.zeros(1, 4), "decoder.bias": torch.zeros(1)}
    save_checkpoint(tmp_path / "teacher.safetensors", tensors, {"kind": "teacher", "spec": TINY.to_json()})
    return tmp_path


def run(place: Path, *extra: str) -> Result:
    app = typer.Typer()
    app.command()(train)
    options = [
        "student-teacher", "--data", str(place / "good"), "--out", str(place / "bundle"), "--size", "64",
        "--teacher", str(place / "teacher.safetensors"), "--steps", "6", "--preset", "line",
        "--set", "stride=2", *extra,
    ]  # fmt: skip
    return CliRunner().invoke(app, options)


def test_a_bundle_that_looks_coarsely_first_is_trained_with_one_option(place: Path) -> None:
    """The margin stands on the crops of the images set aside, and the command says what is gained."""
    result = run(place, "--fit", "tile", "--refine", "8:15%")

    assert result.exit_code == 0, result.output
    bundle = open_bundle(place / "bundle")
    refine = bundle.manifest.refine
    assert refine is not None and (refine.map.stride, refine.rate) == (8.0, 0.15)
    assert refine.tiles == 4 * len(bundle.provenance["data"]["threshold"])
    assert "looks every 8 px first" in result.output and "of good tiles densely" in result.output
    assert bundle.provenance["refine"].keys() >= {"coarse_time_share", "good_tiles_refined_share"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--refine", "four"], CommandError, "expected STRIDE"),
        (["--refine", "3:50%"], CommandError, "expected a multiple"),
        (["--refine", "4"], CalibrationError, "2,995 good tiles"),
        (["--refine", "4:50%", "--set", "center=median"], CommandError, "whole picture"),
    ],
)
def test_what_cannot_be_is_refused_before_the_training(
    place: Path, options: list[str], error: type[Exception], message: str
) -> None:
    """Not after ten minutes of it; nothing is left behind."""
    result = run(place, *options)

    assert isinstance(result.exception, error) and message in str(result.exception)
    assert {path.name for path in place.iterdir()} == {"good", "teacher.safetensors"}
