"""Export: what torch computed, ONNX Runtime and OpenVINO compute too, or nothing is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import trainer.export
from edge.bundle import InputSpec, check_golden, open_bundle
from edge.engines.registry import open_engine
from edge.errors import BundleError, ParityError
from trainer.config import LINE
from trainer.distill import Teacher
from trainer.export import BundleFacts, export_bundle, provisional_calibration, to_onnx
from trainer.method import Frames
from trainer.methods.student_teacher import StudentTeacher
from trainer.patch_nets import PatchNetSpec, build_patch_net

TINY = PatchNetSpec(patch=33, widths=(4, 4, 4), descriptor_dim=4)
REFUSED_BY_TENSORRT = {"NonZero", "DFT", "If", "Loop", "Scan", "Resize"}


def facts_for(channels: int) -> BundleFacts:
    spec = InputSpec(height=64, width=64, channels=channels, max_batch=4)  # type: ignore[arg-type]
    return BundleFacts("tiny", "student-teacher", "line", spec, "d" * 64, True, {"seed": 1})


def fitted(channels: int) -> tuple[StudentTeacher, Frames]:
    frames = np.random.default_rng(8).integers(0, 256, (8, 64, 64, channels), np.uint8)
    net = build_patch_net(TINY, 50).eval().requires_grad_(False)
    teacher = Teacher("tiny", TINY, net, torch.zeros(1, 4), torch.zeros(1), {}, "0" * 64)
    config = replace(LINE, teachers=("tiny",), size_px=64)
    method = StudentTeacher(config, [teacher], seed=1)
    method.prepare(frames)
    method.fit_statistics(frames)
    return method, frames


@pytest.mark.parametrize("channels", [1, 3])
def test_the_bundle_answers_as_torch_does_on_both_backends(tmp_path: Path, channels: int) -> None:
    """The gate of the export, looked at from outside: open what was written and run it."""
    method, frames = fitted(channels)
    export_bundle(method, tmp_path / "tiny", facts_for(channels), held_out=frames)

    bundle = open_bundle(tmp_path / "tiny")

    for backend in ("openvino", "onnxruntime"):
        with open_engine(bundle, backend=backend) as engine:
            assert check_golden(bundle, engine, require=True).ok
            maps, scores = engine.infer(frames[:3])
            assert maps.shape == (3, 9, 9) and scores.shape == (3,)
    expected = method.deployed(channels)(torch.from_numpy(frames[:3]))[0].numpy()
    np.testing.assert_allclose(maps, expected, atol=1e-3, rtol=1e-3)
    assert bundle.provenance["parity_max_abs"].keys() == {"openvino", "onnxruntime"}


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_graph_that_differs_from_torch_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Planted bug: one weight tensor is one percent off (or not a number), and there is no bundle."""
    method, frames = fitted(1)

    def wrong(deployed: torch.nn.Module, spec: InputSpec) -> bytes:
        model = onnx.load_from_string(to_onnx(deployed, spec))
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
        return bytes(model.SerializeToString())

    monkeypatch.setattr(trainer.export, "to_onnx", wrong)
    with pytest.raises(ParityError, match="was not written"):
        export_bundle(method, tmp_path / "tiny", facts_for(1), held_out=frames)
    assert list(tmp_path.iterdir()) == []


def test_the_graph_keeps_the_contract_and_what_tensorrt_takes() -> None:
    """uint8 in, cast before anything else, N dynamic, opset fixed, no operator that TensorRT refuses."""
    model = onnx.load_from_string(to_onnx(fitted(3)[0].deployed(3).eval(), facts_for(3).input))

    graph = model.graph
    sides = [side.dim_param or side.dim_value for side in graph.input[0].type.tensor_type.shape.dim]
    assert ([port.name for port in graph.input], sides) == (["frames"], ["N", 64, 64, 3])
    assert [port.name for port in graph.output] == ["anomaly_map", "image_score"]
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [node.op_type for node in graph.node if "frames" in node.input] == ["Cast"]
    assert not {node.op_type for node in graph.node} & REFUSED_BY_TENSORRT
    assert model.opset_import[0].version == trainer.export.OPSET


def test_the_same_training_gives_the_same_graph_bytes() -> None:
    """model_id follows from content, so the content must not depend on the hour or the process."""
    spec = facts_for(1).input

    assert to_onnx(fitted(1)[0].deployed(1).eval(), spec) == to_onnx(fitted(1)[0].deployed(1).eval(), spec)


def test_the_provisional_threshold_is_the_maximum_plus_its_stated_margin(tmp_path: Path) -> None:
    """And it never claims to be certified."""
    scores = np.array([3.0, 1.0, 2.0, 7.0, 2.0], np.float32)

    calibration = provisional_calibration(scores, facts_for(1), engine="test")

    assert calibration.threshold == calibration.pixel_threshold == pytest.approx(7 + 0.1 * (7 - 2))
    assert calibration.margin == pytest.approx(0.5)
    assert (calibration.kind, calibration.certified, calibration.statistics_shared) == ("provisional", False, True)
    assert calibration.scores == (1.0, 2.0, 2.0, 3.0, 7.0)


def test_no_held_out_image_is_rejected_by_the_bundle_it_set_the_threshold_of(tmp_path: Path) -> None:
    """The threshold comes from the exported graph itself, so it holds there, not only in torch."""
    method, frames = fitted(1)
    bundle = export_bundle(method, tmp_path / "tiny", facts_for(1), held_out=frames)

    with open_engine(bundle) as engine:
        scores = np.concatenate([engine.infer(frame[None])[1] for frame in frames])

    assert (scores <= bundle.calibration.threshold).all()
    np.testing.assert_allclose(sorted(scores), bundle.calibration.scores, rtol=1e-4)


def test_an_existing_path_is_left_alone(tmp_path: Path) -> None:
    """Bundles are written once."""
    method, frames = fitted(1)
    (tmp_path / "tiny").mkdir()

    with pytest.raises(BundleError, match="exists"):
        export_bundle(method, tmp_path / "tiny", facts_for(1), held_out=frames)
