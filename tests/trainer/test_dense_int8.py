"""The paper's dense graphs in eight bits: padded, split into phases, and quantized like any other trunk."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as F

from calib import int8
from calib.int8 import Layer, chosen_layers, layers_of, quantize_graph, require_trunk_only
from edge.bundle import InputSpec, open_bundle
from edge.compile import compile_bundle
from edge.errors import CommandError
from edge.graph import require_buildable
from trainer.export import to_onnx
from trainer.fdfe import Form, densify
from trainer.patch_nets import PatchNetSpec, build_patch_net

SIDE = 24
DEMO = Path(__file__).parents[2] / "edge" / "demo" / "bundle"
PAPER = {17: (8, 8, 8), 33: (8, 8, 8), 65: (8, 8, 8, 8)}


class Dense(nn.Module):
    """A narrow network of the paper's for every pixel of normalized, zero-padded frames; the map is its square."""

    def __init__(self, patch: int, form: Form) -> None:
        super().__init__()
        self.dense = densify(build_patch_net(PatchNetSpec(patch, PAPER[patch], 8), seed=1), patch, 1, form)
        self.rim = patch // 2

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        planes = (frames.float().permute(0, 3, 1, 2) - 120) / 60
        maps = self.dense(F.pad(planes, (self.rim, self.rim, self.rim, self.rim))).square().mean(1)
        return maps, maps.amax((1, 2))


def exported(patch: int, form: Form) -> bytes:
    return to_onnx(Dense(patch, form).eval(), InputSpec(SIDE, SIDE, 3, max_batch=2))


def frames() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)


def run(model: bytes, *tensors: str) -> list[NDArray[np.float32]]:
    loaded = onnx.load_from_string(model)
    loaded.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors)
    session = onnxruntime.InferenceSession(loaded.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(one) for one in session.run(["anomaly_map", *tensors], {"frames": frames()})]


Watched = tuple[dict[str, float], dict[str, NDArray[np.float64]]]


def watch(model: bytes, layers: tuple[Layer, ...]) -> Watched:
    """Ranges and mean inputs by layer: a convolution has the same name in either form."""
    ranges = {one.name: float(np.abs(run(model, one.tensor)[1]).max()) for one in layers}
    return ranges, {one.name: run(model, one.input)[1].mean(axis=(0, 2, 3), dtype=np.float64) for one in layers}


def quantized(model: bytes, watched: Watched) -> bytes:
    return quantize_graph(model, layers_of(model), watched[0], "int8", watched[1]).model


def apart(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The root mean square of the difference, in standard deviations of the second."""
    return float(np.sqrt(np.mean((one - other) ** 2)) / other.std())


@pytest.mark.parametrize("patch", PAPER)
def test_every_convolution_of_a_phase_split_graph_is_quantized(patch: int) -> None:
    """Rounded where it leaves an activation, before the phases, which are then cut and pooled in eight bits."""
    model = exported(patch, "multipool")
    layers = layers_of(model)
    made = quantized(model, watch(model, layers))

    assert len(layers) == len(PAPER[patch]) + 1
    assert layers[0].scaled_pixels  # black to white, whatever good frames show, though padded and cut on the way
    assert all("Pad" in one.tensor or "LeakyRelu" in one.tensor for one in layers)
    assert 0 < apart(run(made)[0], run(model)[0]) < 0.1
    require_trunk_only(made)
    require_buildable(made, "it")


@pytest.mark.parametrize("patch", PAPER)
def test_both_dense_forms_answer_the_same_in_eight_bits(patch: int) -> None:
    """Rounding commutes with slices, their concatenation and maxima, so the forms stay equal."""
    multipool, dilated = exported(patch, "multipool"), exported(patch, "dilated")
    watched = watch(dilated, layers_of(dilated))

    assert apart(run(quantized(multipool, watched))[0], run(quantized(dilated, watched))[0]) < 0.01


def test_control_rounding_before_what_it_does_not_commute_with_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: an activation taken for an operator that only selects, in one form of the two."""
    multipool, dilated = exported(33, "multipool"), exported(33, "dilated")
    watched = watch(dilated, layers_of(dilated))
    good = quantized(dilated, watched)
    monkeypatch.setattr(int8, "_SELECTING", int8._SELECTING | {"LeakyRelu"})

    assert apart(run(quantized(multipool, watched))[0], run(good)[0]) > 0.01


def test_control_amounts_taken_for_values_leave_nothing_to_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug, which there was: the padding's sizes, computed from constants, hid the trunk behind them."""
    model = exported(17, "multipool")
    monkeypatch.setattr(int8, "_DATA_INPUTS", {})

    with pytest.raises(CommandError, match="nothing to quantize"):
        chosen_layers(model, "int8")


@pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT for RTX is not installed: pip install 'kizu[tensorrt-rtx]'",
)
@pytest.mark.parametrize("patch", PAPER)
def test_tensorrt_builds_them(patch: int, tmp_path: Path) -> None:
    """Every receptive field of the paper, int8 through the phases."""
    model = exported(patch, "multipool")
    made = quantized(model, watch(model, layers_of(model)))
    demo = open_bundle(DEMO)
    spec = InputSpec(SIDE, SIDE, 3, max_batch=2)
    bundle = replace(demo, model=made, manifest=msgspec.structs.replace(demo.manifest, input=spec))

    assert compile_bundle(bundle, targets=["sm89"], precision="int8", cache=tmp_path).size > 10_000


class Enlarged(nn.Module):
    """A picture enlarged by two constant products, as small images are, before its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.eye(SIDE).repeat_interleave(2, 0))
        self.convs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        planes = (frames.float().permute(0, 3, 1, 2) - 120) / 60
        rows = self.get_buffer("rows")
        maps = self.convs(torch.matmul(torch.matmul(rows, planes), rows.T)).square().mean(1)
        return maps, maps.amax((1, 2))


def test_convolutions_behind_an_enlargement_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product with a constant leads from the pixels to the trunk; without that rule there is nothing to quantize."""
    model = to_onnx(Enlarged().eval(), InputSpec(SIDE, SIDE, 3, max_batch=2))

    assert len(chosen_layers(model, "int8")) == 2

    monkeypatch.setattr(int8, "TRUNK", int8.TRUNK - {"MatMul"})
    with pytest.raises(CommandError, match="nothing to quantize"):
        chosen_layers(model, "int8")
