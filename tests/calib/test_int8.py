"""Convolution trunks in eight bits: what is rounded, what is not, and what the graph then answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from calib.int8 import (
    Activations,
    Layer,
    chosen_layers,
    find_ranges,
    layers_of,
    observe,
    quantize_graph,
    require_trunk_only,
)
from calib.ranges import QuantizedPrecision
from edge.bundle import ModelBundle, open_bundle
from edge.compile import compile_bundle
from edge.errors import CalibrationError, CommandError, EngineError
from edge.graph import quantized_types, require_buildable
from edge.images import encode_png
from onnx_graphs import SIDE, f32, graph_of

DEMO = Path(__file__).parents[2] / "edge" / "demo"
Answer = tuple[NDArray[np.float32], NDArray[np.float32]]


def run(model: bytes, frames: NDArray[np.uint8]) -> Answer:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    maps, scores = session.run(["anomaly_map", "image_score"], {"frames": frames})
    return maps, scores


@pytest.fixture(scope="module")
def demo() -> ModelBundle:
    return open_bundle(DEMO / "bundle")


@pytest.fixture(scope="module")
def watched(demo: ModelBundle) -> tuple[tuple[Layer, ...], Activations]:
    """The demo's layers, and what three of its good photographs gave."""
    layers = layers_of(demo.model)
    return layers, observe(demo, layers, sorted((DEMO / "photos/train/good").iterdir())[:3], lambda done: None)


def quantized(
    demo: ModelBundle, watched: tuple[tuple[Layer, ...], Activations], precision: QuantizedPrecision = "int8"
) -> bytes:
    layers = chosen_layers(demo.model, precision)
    seen = watched[1]
    return quantize_graph(demo.model, layers, find_ranges(layers, seen, "mse", precision), precision, seen.means).model


def map_error(model: bytes, demo: ModelBundle) -> float:
    maps = run(model, demo.golden.frames[:1])[0]
    return float(np.sqrt(np.mean((maps - demo.golden.maps[:1]) ** 2)) / demo.golden.maps[:1].std())


@pytest.mark.parametrize(("precision", "layers", "error"), [("int8", 16, 0.3), ("fp8", 12, 0.6)])
def test_the_demo_in_eight_bits_answers_nearly_the_same(
    precision: QuantizedPrecision,
    layers: int,
    error: float,
    demo: ModelBundle,
    watched: tuple[tuple[Layer, ...], Activations],
) -> None:
    """All sixteen convolutions of teacher and students in int8; in fp8 those that see pixels stay float32."""
    model = quantized(demo, watched, precision)

    assert quantized_types(model) == (precision,)
    assert len(chosen_layers(demo.model, precision)) == layers
    assert 0 < map_error(model, demo) < error
    require_buildable(model, "it")


def test_the_mean_that_rounded_weights_lose_is_given_back_by_the_bias(
    demo: ModelBundle, watched: tuple[tuple[Layer, ...], Activations]
) -> None:
    """The control leaves it out (means of zero): pixels lie far from zero, and the map is then off by its own size."""
    layers, seen = watched
    ranges = find_ranges(layers, seen, "mse", "int8")
    zero = {name: np.zeros_like(mean) for name, mean in seen.means.items()}

    with_it = map_error(quantize_graph(demo.model, layers, ranges, "int8", seen.means).model, demo)
    without = map_error(quantize_graph(demo.model, layers, ranges, "int8", zero).model, demo)

    assert without > 3 * with_it


def one_convolution(weights: NDArray[np.float32], more: list[Any] | None = None, **attributes: Any) -> bytes:
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y" if more is None else "c"], name="conv", **attributes)]
    return graph_of([*nodes, *(more or [])], {"w": weights, "b": f32(len(weights))})


def test_int8_holds_pixels_exactly() -> None:
    """Weights that are on the int8 grid already: every one of 256 gray levels gives the very same answer."""
    steps = np.random.default_rng(0).integers(-127, 128, (4, 3, 3, 3))
    steps[:, 0, 0, 0] = 127
    model = one_convolution((steps / 64).astype(np.float32))
    (layer,) = layers_of(model)
    made = quantize_graph(model, [layer], {"conv": 128.0}, "int8", {"conv": np.array([7.0, 7.0, 7.0])}).model
    frames = np.random.default_rng(1).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)

    assert layer.pixels
    np.testing.assert_allclose(run(made, frames)[1], run(model, frames)[1], rtol=1e-5)
    assert not layers_of(one_convolution(f32(4, 3, 3, 3), pads=[1, 1, 1, 1]))[0].pixels  # padding is 0, not 128
    assert layers_of(model, "fp8") == ()


def test_normalized_pixels_keep_their_whole_range(make_bundle: Callable[..., ModelBundle], tmp_path: Path) -> None:
    """Good parts of middle gray only: what is brighter than any of them must not be clipped, the defect may be."""
    bundle = make_bundle(tmp_path / "tiny")  # (x - 128) / 64 in the graph
    folder = tmp_path / "gray"
    folder.mkdir()
    (folder / "0.png").write_bytes(encode_png(np.full((32, 32, 1), 130, np.uint8)))
    (layer,) = layers_of(bundle.model)
    seen = observe(bundle, [layer], [folder / "0.png"], lambda done: None)

    assert (layer.pixels, layer.scaled_pixels) == (False, True)
    assert seen.magnitudes[layer.tensor].peak == 2 / 64  # the control: what good frames alone would give
    assert find_ranges([layer], seen, "percentile", "int8") == {layer.name: 2.0}


def test_seven_bits_leave_room_where_two_products_are_added_in_sixteen(
    demo: ModelBundle, watched: tuple[tuple[Layer, ...], Activations]
) -> None:
    """x86 CPUs without VNNI add two u8 x s8 products with saturation at 32,767; the control, eight bits, passes it."""
    layers, seen = watched
    ranges = find_ranges(layers, seen, "mse", "int8")
    largest = {}
    for bits in (7, 8):
        model = onnx.load_from_string(quantize_graph(demo.model, layers, ranges, "int8", seen.means, bits).model)
        weights = [one for one in model.graph.initializer if one.name.endswith("weight__int8")]
        largest[bits] = max(int(np.abs(numpy_helper.to_array(one).astype(int)).max()) for one in weights)

    assert 2 * 255 * largest[7] <= 32_767 < 2 * 255 * largest[8]


def test_pooling_is_done_in_eight_bits_too_unless_the_score_wants_it() -> None:
    """Rounding moves before the pooling; but not where what is pooled also goes elsewhere."""
    pool = helper.make_node("MaxPool", ["c"], ["p"], name="pool", kernel_shape=[2, 2])
    second = helper.make_node("Conv", ["p", "w2"], ["d"], name="second")
    last = helper.make_node("ReduceMax", ["d"], ["y"], name="max", axes=[2, 3], keepdims=1)
    shared = helper.make_node("ReduceMax", ["p"], ["y"], name="max", axes=[2, 3], keepdims=1)
    constants = {"w": f32(4, 3, 3, 3), "b": f32(4), "w2": f32(2, 4, 2, 2)}
    first = helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv")

    assert [one.tensor for one in layers_of(graph_of([first, pool, second, last], constants))] == ["x", "c"]
    assert [one.tensor for one in layers_of(graph_of([first, pool, second, shared], constants))] == ["x", "p"]


def test_grouped_and_padded_convolutions_are_quantized() -> None:
    """A depthwise layer after an ordinary one; the answer stays within eight bits of what it was."""
    first = helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1, 1, 1, 1])
    depthwise = helper.make_node("Conv", ["c", "w2"], ["y"], name="depthwise", group=4)
    model = graph_of([first, depthwise], {"w": f32(4, 3, 3, 3) - 0.5, "b": f32(4), "w2": f32(4, 1, 2, 2)})
    layers = layers_of(model)
    frames = np.random.default_rng(1).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    inside = onnx.load_from_string(model)
    inside.graph.output.append(helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, None))
    (c,) = onnxruntime.InferenceSession(inside.SerializeToString()).run(["c"], {"frames": frames})
    ranges = {"conv": 255.0, "depthwise": float(np.abs(c).max())}
    means = {"conv": frames.mean(axis=(0, 1, 2)), "depthwise": c.mean(axis=(0, 2, 3))}
    made = quantize_graph(model, layers, ranges, "int8", means).model

    assert [one.name for one in layers] == ["conv", "depthwise"]
    np.testing.assert_allclose(run(made, frames)[1], run(model, frames)[1], rtol=0.02)


def test_weights_that_an_exporter_shares_through_an_identity_are_found() -> None:
    """Of two equal biases PyTorch keeps one and hands the other on by Identity; the answer is that of two biases."""
    frames = np.random.default_rng(1).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    weights = {"w": f32(4, 3, 3, 3) - 0.5, "v": f32(4, 4, 1, 1), "b": f32(4)}

    def made(second_bias: str, *nodes: Any) -> bytes:
        first = helper.make_node("Conv", ["x", "w", "b"], ["c"], name="first")
        second = helper.make_node("Conv", ["c", "v", second_bias], ["y"], name="second")
        model = graph_of([*nodes, first, second], weights | {"b2": weights["b"]} if not nodes else weights)
        ranges, means = {"first": 255.0, "second": 1000.0}, {"first": f32(3), "second": f32(4)}
        return quantize_graph(model, layers_of(model), ranges, "int8", means).model

    shared = made("same", helper.make_node("Identity", ["b"], ["same"], name="sharing"))

    np.testing.assert_array_equal(run(shared, frames)[1], run(made("b2"), frames)[1])


def test_a_convolution_in_the_score_math_is_left_alone() -> None:
    """A difference of two trunks, smoothed: the smoothing is no trunk."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["s"], name="student"),
        helper.make_node("Conv", ["x", "v"], ["t"], name="teacher"),
        helper.make_node("Sub", ["s", "t"], ["d"], name="difference"),
        helper.make_node("Conv", ["d", "g"], ["y"], name="smooth"),
    ]
    model = graph_of(nodes, {"w": f32(2, 3, 3, 3), "v": f32(2, 3, 3, 3) + 1, "g": f32(1, 2, 2, 2)})

    assert [one.name for one in layers_of(model)] == ["student", "teacher"]


def test_kept_layers_stay_as_they_are(demo: ModelBundle, watched: tuple[tuple[Layer, ...], Activations]) -> None:
    """By name; an unknown name is answered with the names there are."""
    every, seen = watched
    left = chosen_layers(demo.model, "int8", [every[0].name])
    model = quantize_graph(demo.model, left, find_ranges(left, seen, "mse", "int8"), "int8", seen.means).model
    kept = next(node for node in onnx.load_from_string(model).graph.node if node.name == every[0].name)

    assert kept.input[1] == "teacher.layers.0.weight"
    with pytest.raises(CommandError, match=r"--keep conv9: no such layer; .*/teacher/layers/layers\.0/Conv"):
        chosen_layers(demo.model, "int8", ["conv9"])
    with pytest.raises(CommandError, match="nothing to quantize"):
        chosen_layers(demo.model, "int8", [layer.name for layer in every])


def test_a_pattern_keeps_a_whole_network(demo: ModelBundle) -> None:
    """`/teacher/*` leaves the teacher in float32 and the students in int8; a pattern that fits nothing is refused."""
    every = {layer.name for layer in layers_of(demo.model)}

    left = {layer.name for layer in chosen_layers(demo.model, "int8", ["/teacher/*"])}

    assert every - left == {name for name in every if name.startswith("/teacher/")} != set()
    with pytest.raises(CommandError, match=r"--keep /scales\.9/\*: no such layer"):
        chosen_layers(demo.model, "int8", ["/scales.9/*"])


def rounded_tensor(model: bytes, tensor: str, taker: str, place: int) -> bytes:
    """The planted fault: `tensor` is rounded on its way into input `place` of the node `taker`."""
    loaded = onnx.load_from_string(model)
    loaded.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), "fault_scale"))
    loaded.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), "fault_zero"))
    at = next(index for index, node in enumerate(loaded.graph.node) if node.name == taker)
    loaded.graph.node[at].input[place] = "fault"
    scale = ["fault_scale", "fault_zero"]
    loaded.graph.node.insert(at, helper.make_node("DequantizeLinear", ["low", *scale], ["fault"], name="fault back"))
    loaded.graph.node.insert(at, helper.make_node("QuantizeLinear", [tensor, *scale], ["low"], name="fault low"))
    return loaded.SerializeToString()


@pytest.mark.parametrize(
    ("tensor", "taker", "place", "named"),
    [
        ("b", "conv", 2, "fault low|the bias of conv is quantized"),
        ("x", "sub", 1, "sub .Sub. takes the rounded fault"),
        ("d", "square", 0, "fault low rounds d, which is not part of a convolution trunk"),
    ],
)
def test_a_quantized_bias_or_score_is_caught(tensor: str, taker: str, place: int, named: str) -> None:
    """Each planted into a graph that passes without it."""
    more = [
        helper.make_node("Sub", ["c", "x"], ["d"], name="sub"),
        helper.make_node("Mul", ["d", "d"], ["y"], name="square"),
    ]
    model = one_convolution(f32(3, 3, 1, 1), more)
    require_trunk_only(model)

    with pytest.raises(CalibrationError, match=named):
        require_trunk_only(rounded_tensor(model, tensor, taker, place))


def test_bytes_that_are_no_model_are_told() -> None:
    with pytest.raises(EngineError, match="no ONNX model"):
        layers_of(b"\xff\xff")


@pytest.mark.parametrize(("precision", "target"), [("int8", "sm80"), ("int8", "sm89"), ("fp8", "sm89")])
def test_tensorrt_builds_the_quantized_demo(
    precision: QuantizedPrecision,
    target: str,
    demo: ModelBundle,
    watched: tuple[tuple[Layer, ...], Activations],
    tmp_path: Path,
) -> None:
    """No GPU is needed to build."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    bundle = replace(demo, model=quantized(demo, watched, precision))

    assert compile_bundle(bundle, targets=[target], precision=precision, cache=tmp_path).size > 100_000
