"""A random-weights graph of the `line` profile's shape, for benchmarks that need its cost and not its answers.

Teacher and three students, p = 33, quarter width, stride 4, valid convolutions, under the graph contract; and the FLOP
count of any graph made of convolutions and matrix products.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge.bundle import InputSpec, MapGeometry

# (input channels, output channels, kernel, pool) of one branch.
LAYERS = ((3, 32, 5, True), (32, 64, 5, True), (64, 64, 2, False), (64, 32, 4, False))
BRANCHES = 4
LEAKY_SLOPE = 0.005

INPUT = InputSpec(height=256, width=256, channels=3, max_batch=8)
MAP = MapGeometry(height=57, width=57, stride=4.0, offset_y=15.5, offset_x=15.5)

First = Literal["separate", "merged"]


class Graph:
    """Nodes and weights as they are added; every `add` returns the name of its output."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._random = np.random.default_rng(seed)

    def add(self, kind: str, *inputs: str, outputs: int = 1, name: str = "", **attributes: Any) -> str:
        """Append a node; its outputs are NAME, or NAME.0, NAME.1 ... when there are several."""
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        names = [name] if outputs == 1 else [f"{name}.{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return name

    def constant(self, value: NDArray[Any]) -> str:
        """Append an initializer."""
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def conv(self, source: str, channels_in: int, channels_out: int, kernel: int) -> str:
        """A valid convolution with random weights that keep the activations' scale."""
        scale = math.sqrt(2 / (channels_in * kernel * kernel))
        weights = self._random.normal(0, scale, (channels_out, channels_in, kernel, kernel)).astype(np.float32)
        bias = self._random.normal(0, 0.1, channels_out).astype(np.float32)
        return self.add("Conv", source, self.constant(weights), self.constant(bias))


def line_model(first: First = "separate", pool_first: bool = False, seed: int = 0) -> bytes:
    """The `line` graph as ONNX bytes.

    `first` says whether the four branches' first layers are one convolution 3 -> 128; `pool_first` puts the max pool
    before the leaky ReLU, which is the same function because that ReLU never decreases.
    """
    graph = Graph(seed)
    pixels = graph.add("Transpose", graph.add("Cast", "frames", to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    mean = graph.constant(np.array([123.675, 116.28, 103.53], np.float32).reshape(1, 3, 1, 1))
    scale = graph.constant((1 / np.array([58.395, 57.12, 57.375], np.float32)).reshape(1, 3, 1, 1))
    normal = graph.add("Mul", graph.add("Sub", pixels, mean), scale)
    if first == "merged":
        channels_in, channels_out, kernel, pool = LAYERS[0]
        stem = graph.conv(normal, channels_in, channels_out * BRANCHES, kernel)
        stem = _activate(graph, stem, pool, pool_first)
        parts = graph.constant(np.full(BRANCHES, channels_out, np.int64))
        graph.add("Split", stem, parts, outputs=BRANCHES, name="stems", axis=1)
        descriptors = [_branch(graph, f"stems.{index}", LAYERS[1:], pool_first) for index in range(BRANCHES)]
    else:
        descriptors = [_branch(graph, normal, LAYERS, pool_first) for _ in range(BRANCHES)]
    _scores(graph, descriptors)
    return _model(graph)


def _branch(graph: Graph, value: str, layers: tuple[tuple[int, int, int, bool], ...], pool_first: bool) -> str:
    for channels_in, channels_out, kernel, pool in layers:
        value = graph.conv(value, channels_in, channels_out, kernel)
        if channels_out != LAYERS[-1][1] or kernel != LAYERS[-1][2]:  # none after the last layer
            value = _activate(graph, value, pool, pool_first)
    return value


def _activate(graph: Graph, value: str, pool: bool, pool_first: bool) -> str:
    if pool and pool_first:
        value = graph.add("MaxPool", value, kernel_shape=[2, 2], strides=[2, 2])
    value = graph.add("LeakyRelu", value, alpha=LEAKY_SLOPE)
    if pool and not pool_first:
        value = graph.add("MaxPool", value, kernel_shape=[2, 2], strides=[2, 2])
    return value


def _scores(graph: Graph, descriptors: list[str]) -> None:
    """e + v of the paper: squared distance of the students' mean from the teacher, and the students' variance."""
    teacher, *students = descriptors
    axis = graph.constant(np.array([1], np.int64))
    count = graph.constant(np.array(len(students), np.float32))
    mean = graph.add("Div", graph.add("Sum", *students), count)
    gap = graph.add("Sub", mean, teacher)
    error = graph.add("ReduceSum", graph.add("Mul", gap, gap), axis, keepdims=0)
    spreads = [graph.add("Sub", student, mean) for student in students]
    squares = graph.add("Div", graph.add("Sum", *(graph.add("Mul", one, one) for one in spreads)), count)
    graph.add("Add", error, graph.add("ReduceSum", squares, axis, keepdims=0), name="anomaly_map")
    graph.add("ReduceMax", "anomaly_map", graph.constant(np.array([1, 2], np.int64)), keepdims=0, name="image_score")


def _model(graph: Graph) -> bytes:
    sides: list[str | int | None] = ["N", INPUT.height, INPUT.width, INPUT.channels]
    frames = helper.make_tensor_value_info("frames", TensorProto.UINT8, sides)
    maps = helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["N", MAP.height, MAP.width])
    scores = helper.make_tensor_value_info("image_score", TensorProto.FLOAT, ["N"])
    body = helper.make_graph(graph.nodes, "line", [frames], [maps, scores], graph.weights)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def flops(model: bytes, batch: int = 1) -> int:
    """Floating point operations, 2 for each multiply-add, of the convolutions and matrix products of `model`."""
    inferred = onnx.load_from_string(model)
    for side in inferred.graph.input[0].type.tensor_type.shape.dim[:1]:
        side.dim_value = batch
    inferred = onnx.shape_inference.infer_shapes(inferred, data_prop=True)
    shapes = {item.name: tuple(item.dims) for item in inferred.graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        shapes[value.name] = tuple(side.dim_value for side in value.type.tensor_type.shape.dim)
    total = 0
    for node in inferred.graph.node:
        if node.op_type == "Conv":
            weights, result = shapes[node.input[1]], shapes[node.output[0]]
            total += 2 * math.prod((batch, *result[1:])) * math.prod(weights[1:])
        elif node.op_type in ("MatMul", "Gemm"):
            total += 2 * math.prod((batch, *shapes[node.output[0]][1:])) * shapes[node.input[0]][-1]
    return total
