"""Small ONNX graphs under the graph contract, one operator in the middle of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 8
Extra = dict[str, np.ndarray[Any, Any]]


def graph_of(nodes: Sequence[onnx.NodeProto], constants: Extra, *, opset: int = 17) -> bytes:
    """uint8 frames (N, 8, 8, 3) -> x float (N, 3, 8, 8) -> `nodes`, the last of which makes y -> both outputs."""
    start = [
        helper.make_node("Cast", ["frames"], ["pixels"], name="to float", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["x"], name="to planes", perm=[0, 3, 1, 2]),
    ]
    end = [
        helper.make_node("Cast", ["y"], ["z"], name="from y", to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["z", "rows"], ["flat"], name="rows of y"),
        helper.make_node("ReduceMax", ["flat"], ["image_score"], name="largest", axes=[1], keepdims=0),
        helper.make_node("ReduceMean", ["x"], ["anomaly_map"], name="map", axes=[1], keepdims=0),
    ]
    initializers = [numpy_helper.from_array(np.array([0, -1], np.int64), "rows")]
    initializers += [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(
        [*start, *nodes, *end],
        "small",
        [helper.make_tensor_value_info("frames", TensorProto.UINT8, ["N", SIDE, SIDE, 3])],
        [
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["N", SIDE, SIDE]),
            helper.make_tensor_value_info("image_score", TensorProto.FLOAT, ["N"]),
        ],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def one(operator: str, more: Sequence[str] = (), constants: Extra | None = None, **attributes: Any) -> bytes:
    """The graph whose middle is `operator` of x and `more`."""
    return graph_of([helper.make_node(operator, ["x", *more], ["y"], name="middle", **attributes)], constants or {})


def f32(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).uniform(0.1, 1.0, shape).astype(np.float32)


def i64(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


_UNARY = [
    "Abs",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Identity",
    "LeakyRelu",
    "Log",
    "Neg",
    "Reciprocal",
    "Relu",
    "Sigmoid",
    "Softplus",
    "Sqrt",
    "Tanh",
    "GlobalAveragePool",
]
_BINARY = ["Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "PRelu"]
_COMPARED = ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]


def of_each_operator() -> dict[str, bytes]:
    """A graph for every operator that `edge.graph` calls known."""
    made = {name: one(name) for name in _UNARY}
    made |= {name: one(name, ["c"], {"c": f32(3, 1, 1)}) for name in _BINARY}
    made |= {name: one(name, ["c"], {"c": f32(1)}) for name in _COMPARED}
    weights: Extra = {"w": f32(4, 3, 3, 3), "b": f32(4)}
    norm: Extra = {"s": f32(3), "b": f32(3), "m": f32(3), "v": f32(3)}
    flat = helper.make_node("Flatten", ["x"], ["f"], name="flat")
    bools = [helper.make_node("Greater", ["x", "c"], ["g"], name="over")]
    half: Extra = {"c": np.array([0.5], np.float32)}
    scale: Extra = {"s": np.array(0.1, np.float32), "o": np.array(0, np.int8)}
    made |= {
        "And": graph_of([*bools, helper.make_node("And", ["g", "g"], ["y"], name="middle")], half),
        "Or": graph_of([*bools, helper.make_node("Or", ["g", "g"], ["y"], name="middle")], half),
        "Not": graph_of([*bools, helper.make_node("Not", ["g"], ["y"], name="middle")], half),
        "Where": graph_of([*bools, helper.make_node("Where", ["g", "x", "c"], ["y"], name="middle")], half),
        "AveragePool": one("AveragePool", kernel_shape=[2, 2], strides=[2, 2]),
        "MaxPool": one("MaxPool", kernel_shape=[2, 2], strides=[1, 1]),
        "BatchNormalization": one("BatchNormalization", ["s", "b", "m", "v"], norm),
        "InstanceNormalization": one("InstanceNormalization", ["s", "b"], {"s": f32(3), "b": f32(3)}),
        "Cast": one("Cast", to=TensorProto.FLOAT16),
        "Clip": one("Clip", ["a", "b"], {"a": np.array(0, np.float32), "b": np.array(6, np.float32)}),
        "Concat": one("Concat", ["x"], axis=1),
        "Constant": graph_of(
            [
                helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(f32(3, 1, 1))),
                helper.make_node("Add", ["x", "c"], ["y"], name="middle"),
            ],
            {},
        ),
        "ConstantOfShape": graph_of(
            [
                helper.make_node("Shape", ["x"], ["n"], name="sides"),
                helper.make_node("ConstantOfShape", ["n"], ["c"], value=numpy_helper.from_array(f32(1))),
                helper.make_node("Add", ["x", "c"], ["y"], name="middle"),
            ],
            {},
        ),
        "Conv": one("Conv", ["w", "b"], weights, kernel_shape=[3, 3], dilations=[2, 2]),
        "ConvTranspose": one("ConvTranspose", ["w"], {"w": f32(3, 4, 3, 3)}, kernel_shape=[3, 3]),
        "DepthToSpace": graph_of(
            [
                helper.make_node("Concat", ["x"] * 4, ["w4"], name="four", axis=1),
                helper.make_node("DepthToSpace", ["w4"], ["y"], name="middle", blocksize=2),
            ],
            {},
        ),
        "SpaceToDepth": one("SpaceToDepth", blocksize=2),
        "Expand": one("Expand", ["n"], {"n": i64(1, 3, SIDE, SIDE)}),
        "Flatten": one("Flatten"),
        "Gather": one("Gather", ["i"], {"i": i64(0, 2)}, axis=1),
        "Gemm": graph_of([flat, helper.make_node("Gemm", ["f", "w"], ["y"], name="middle")], {"w": f32(192, 4)}),
        "MatMul": one("MatMul", ["w"], {"w": f32(SIDE, 5)}),
        "Pad": one("Pad", ["n"], {"n": i64(0, 0, 2, 2, 0, 0, 2, 2)}, mode="reflect"),
        "Reshape": one("Reshape", ["n"], {"n": i64(-1, 3, SIDE * SIDE)}),
        "Resize": one("Resize", ["", "r"], {"r": np.array([1, 1, 2, 2], np.float32)}, mode="linear"),
        "Shape": graph_of(
            [
                helper.make_node("Shape", ["x"], ["n"], name="sides"),
                helper.make_node("Reshape", ["x", "n"], ["y"], name="middle"),
            ],
            {},
        ),
        "Slice": one("Slice", ["a", "e", "d"], {"a": i64(1), "e": i64(5), "d": i64(2)}),
        "Softmax": one("Softmax", axis=1),
        "Split": graph_of(
            [
                helper.make_node("Split", ["x", "n"], ["p", "q"], name="middle", axis=1),
                helper.make_node("Concat", ["p", "q"], ["y"], name="again", axis=1),
            ],
            {"n": i64(1, 2)},
        ),
        "Unsqueeze": one("Unsqueeze", ["d"], {"d": i64(1)}),
        "Squeeze": graph_of(
            [
                helper.make_node("Unsqueeze", ["x", "d"], ["u"], name="up"),
                helper.make_node("Squeeze", ["u", "d"], ["y"], name="middle"),
            ],
            {"d": i64(1)},
        ),
        "Tile": one("Tile", ["n"], {"n": i64(1, 1, 2, 2)}),
        "TopK": graph_of(
            [
                helper.make_node("Flatten", ["x"], ["f"], name="flat"),
                helper.make_node("TopK", ["f", "k"], ["y", "i"], name="middle"),
            ],
            {"k": i64(5)},
        ),
        "Transpose": one("Transpose", perm=[0, 2, 3, 1]),
        "QuantizeLinear": graph_of(
            [
                helper.make_node("QuantizeLinear", ["x", "s", "o"], ["q"], name="middle"),
                helper.make_node("DequantizeLinear", ["q", "s", "o"], ["y"], name="back"),
            ],
            scale,
        ),
    }
    made["DequantizeLinear"] = made["QuantizeLinear"]
    made |= {
        name: one(name, axes=[2, 3], keepdims=1)
        for name in ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd")
    }
    made["ReduceSum"] = one("ReduceSum", ["d"], {"d": i64(2, 3)})
    return made
