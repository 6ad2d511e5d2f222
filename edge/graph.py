"""The exported graph as ONNX: what a TensorRT build would refuse in it, and the same graph at half the precision.

Owns the operator rules and the precision rewrite. Opens no file and builds nothing; `compile` does. onnx is imported
inside functions: it belongs to the extra `compile`, and the line runs without it.

TensorRT 11 and TensorRT for RTX build strongly typed networks: a tensor has the type that the graph says, so precision
is written into the graph and not asked for by a flag.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from edge.errors import EngineError

if TYPE_CHECKING:
    import onnx

Precision = Literal["fp32", "fp16", "bf16"]

MAX_TOP_K: Final = 3840

# fmt: off
OPERATORS: Final[frozenset[str]] = frozenset({
    "Abs", "Add", "And", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Constant",
    "ConstantOfShape", "Conv", "ConvTranspose", "DepthToSpace", "DequantizeLinear", "Div", "Elu", "Equal", "Erf",
    "Exp", "Expand", "Flatten", "Floor", "Gather", "Gemm", "GlobalAveragePool", "Greater", "GreaterOrEqual",
    "Identity", "InstanceNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "MatMul", "Max", "MaxPool",
    "Min", "Mul", "Neg", "Not", "Or", "PRelu", "Pad", "Pow", "QuantizeLinear", "Reciprocal", "ReduceL2",
    "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu", "Reshape", "Resize", "Shape",
    "Sigmoid", "Slice", "Softmax", "Softplus", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Tile",
    "TopK", "Transpose", "Unsqueeze", "Where",
})
# fmt: on
"""Operators that were seen to build (tests/edge/test_graph.py builds each); others are refused until they are here."""

INSTEAD: Final[Mapping[str, str]] = MappingProxyType(
    {
        "NonZero": "its output has no fixed shape; keep the whole map and mask it with Where",
        "DFT": "write the transform as two constant matrix products",
        "STFT": "write the transform as two constant matrix products",
        "Unique": "its output has no fixed shape; do this outside the graph",
        "Loop": "unroll it: the graph's steps are few and fixed",
        "Scan": "unroll it: the graph's steps are few and fixed",
        "If": "compute both and choose with Where",
        "RandomNormal": "an exported graph must answer the same twice; draw at training time only",
        "RandomNormalLike": "an exported graph must answer the same twice; export the mean instead of a draw",
        "Dropout": "export the network in evaluation mode",
    }
)
"""What to write in place of operators that were asked for before."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One node that a TensorRT build refuses, why, and what to write instead."""

    node: str
    operator: str
    why: str
    instead: str

    def __str__(self) -> str:
        return f"node {self.node} ({self.operator}): {self.why}; {self.instead}"


def lint(model: bytes) -> tuple[Finding, ...]:
    """What in an ONNX model TensorRT would refuse; empty if nothing that is known.

    Raises:
        EngineError: the package onnx is missing, or these bytes are no model.
    """
    loaded = _load(model)
    kinds = _element_types(loaded)
    return tuple(found for node in loaded.graph.node for found in _look_at(node, loaded, kinds))


def require_buildable(model: bytes, what: str) -> None:
    """Refuse a model in which `lint` finds something.

    Raises:
        EngineError: names every node, why, and what to write instead.
    """
    found = lint(model)
    if found:
        listed = "\n".join(f"  {one}" for one in found)
        raise EngineError(f"{what} cannot be built by TensorRT:\n{listed}")


def at_precision(model: bytes, precision: Precision) -> bytes:
    """The same graph with its convolutions, and what lies between them, at `precision`; everything else float32.

    What a convolution hands to anything but another convolution (through activations, pooling and padding) is float32
    again at once: differences of teacher and student, their variance, statistics and reductions are small numbers made
    of large ones. The input stays uint8, the outputs float32.

    Raises:
        EngineError: the package onnx is missing, or these bytes are no model.
    """
    if precision == "fp32":
        return model
    loaded = _load(model)
    _constants_to_initializers(loaded)
    _Rewrite(loaded, precision).run()
    data: bytes = loaded.SerializeToString(deterministic=True)
    return data


def quantized_types(model: bytes) -> tuple[str, ...]:
    """Of `int8` and `fp8`, those that the graph's own Q/DQ nodes round to; empty for a graph without any.

    Raises:
        EngineError: the package onnx is missing, or these bytes are no model.
    """
    from onnx import TensorProto

    loaded = _load(model)
    kinds = _element_types(loaded)
    taken = {kinds.get(node.input[0]) for node in loaded.graph.node if node.op_type == "DequantizeLinear"}
    names = {"int8": {TensorProto.INT8, TensorProto.UINT8}, "fp8": {TensorProto.FLOAT8E4M3FN}}
    return tuple(name for name, types in names.items() if types & taken)


# --- the rules --------------------------------------------------------------------------------------------------------


def _look_at(node: onnx.NodeProto, model: onnx.ModelProto, kinds: Mapping[str, int]) -> Iterator[Finding]:
    from onnx import TensorProto

    name, kind = node.name or (node.output[0] if node.output else "?"), node.op_type

    def finding(why: str, instead: str) -> Finding:
        return Finding(name, kind, why, instead)

    if node.domain not in ("", "ai.onnx"):
        yield finding(f"it is of the domain {node.domain!r}", "use operators of the standard domain only")
        return
    if kind not in OPERATORS:
        yield finding("the operator is not known to build", INSTEAD.get(kind, "write it with operators that are"))
    bytes_in = [tensor for tensor in node.input if kinds.get(tensor) == TensorProto.UINT8]
    if bytes_in and kind not in ("Cast", "DequantizeLinear"):
        yield finding(f"it takes {bytes_in[0]}, which is uint8", "cast to float before anything else")
    if any(kinds.get(tensor) == TensorProto.DOUBLE for tensor in (*node.input, *node.output)):
        yield finding("it computes in float64", "cast constants and inputs to float32")
    yield from _attributes(node, model, finding)


def _attributes(node: onnx.NodeProto, model: onnx.ModelProto, finding: Any) -> Iterator[Finding]:
    from onnx import helper

    given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if node.op_type == "MaxPool" and any(step != 1 for step in given.get("dilations", [])):
        yield finding("max pooling with a dilation", "write it as the Max of shifted slices")
    if node.op_type == "Resize" and given.get("antialias", 0):
        yield finding("an antialiased resize", "resize before the graph, or by two constant matrix products")
    if node.op_type == "Pad" and given.get("mode", b"constant") not in (b"constant", b"reflect", b"edge"):
        yield finding(f"padding of mode {given['mode'].decode()!r}", "pad by a constant, by reflection or by the edge")
    if node.op_type == "TopK":
        k = _constant(model, node.input[1]) if len(node.input) > 1 else None
        if k is None or int(k.max()) > MAX_TOP_K:
            told = "of a size that is not constant" if k is None else f"of {int(k.max())} elements"
            yield finding(f"a TopK {told}, at most {MAX_TOP_K} are possible", "find the threshold by bisection")


def _constant(model: onnx.ModelProto, name: str) -> Any:
    from onnx import numpy_helper

    for tensor in model.graph.initializer:
        if tensor.name == name:
            return numpy_helper.to_array(tensor)
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] == name and node.attribute[0].name == "value":
            return numpy_helper.to_array(node.attribute[0].t)
    return None


# --- precision --------------------------------------------------------------------------------------------------------

_HEAVY: Final = frozenset({"Conv", "ConvTranspose"})
_NOT_IN_BF16: Final = frozenset({"ConvTranspose"})
"""TensorRT for RTX 1.7.1 builds no transposed convolution of bf16 ("could not infer output types": deconv)."""

_BETWEEN: Final = frozenset(
    {"AveragePool", "BatchNormalization", "Clip", "Concat", "Elu", "LeakyRelu", "Max", "MaxPool", "PRelu", "Pad"}
    | {"Relu", "Sigmoid", "Slice", "Tanh", "Transpose"}
)
"""Operators that may lie between two convolutions without costing precision beyond that of the tensors themselves."""


class _Rewrite:
    """Casts at every border between what is computed at `precision` and what is not; each tensor is cast once."""

    def __init__(self, model: onnx.ModelProto, precision: Precision) -> None:
        from onnx import TensorProto

        self._graph = model.graph
        self._kinds = _element_types(model)
        self._float = TensorProto.FLOAT
        self._low = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16
        self._suffix = f"__{precision}"
        self._heavy = _HEAVY - _NOT_IN_BF16 if precision == "bf16" else _HEAVY
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for tensor in node.input:
                self._users.setdefault(tensor, []).append(node)
        self._outputs = {value.name for value in model.graph.output}

    def run(self) -> None:
        chosen = self._chosen()
        made: set[str] = set()
        nodes: list[onnx.NodeProto] = []
        for node in self._graph.node:
            if id(node) not in chosen:
                nodes.append(node)
                continue
            copy = type(node)()
            copy.CopyFrom(node)
            for place, tensor in enumerate(node.input):
                if tensor and self._kinds.get(tensor) == self._float:
                    nodes += self._lowered(tensor, made)
                    copy.input[place] = tensor + self._suffix
            nodes.append(copy)
            for place, tensor in enumerate(node.output):
                copy.output[place] = tensor + self._suffix
                made.add(tensor)
                if tensor in self._outputs or any(id(user) not in chosen for user in self._users.get(tensor, [])):
                    nodes.append(_cast(tensor + self._suffix, tensor, self._float))
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        del self._graph.value_info[:]  # of tensors whose type changed
        used = {tensor for node in self._graph.node for tensor in node.input}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in used]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)

    def _lowered(self, tensor: str, made: set[str]) -> list[onnx.NodeProto]:
        """What makes `tensor` at the low precision, unless something did already."""
        if tensor in made:
            return []
        made.add(tensor)
        if tensor in self._initializers:
            self._graph.initializer.append(_converted(self._initializers[tensor], tensor + self._suffix, self._low))
            return []
        return [_cast(tensor, tensor + self._suffix, self._low)]

    def _chosen(self) -> set[int]:
        """The nodes that are computed low: convolutions, and what lies between two of them and nowhere else."""
        by_output = {tensor: node for node in self._graph.node for tensor in node.output}
        chosen = {id(node) for node in self._graph.node if node.op_type in self._heavy}
        between = [node for node in self._graph.node if node.op_type in _BETWEEN]
        after = set(chosen)  # fed by convolutions alone, constants apart
        for node in between:  # nodes of an ONNX graph are in topological order
            sources = [by_output[tensor] for tensor in node.input if tensor in by_output]
            if sources and all(id(source) in after for source in sources):
                after.add(id(node))
        ahead = set(chosen)  # what follows is convolutions alone
        for node in reversed(between):
            users = [user for tensor in node.output for user in self._users.get(tensor, [])]
            inner = not any(tensor in self._outputs for tensor in node.output)
            if users and inner and all(id(user) in ahead for user in users):
                ahead.add(id(node))
        return chosen | (after & ahead)


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node("Cast", [source], [target], name=f"cast {target}", to=kind)


def _converted(tensor: onnx.TensorProto, name: str, kind: int) -> onnx.TensorProto:
    """An initializer at another precision, rounded to nearest even; what would overflow is refused, not infinite."""
    from onnx import TensorProto, numpy_helper

    values = numpy_helper.to_array(tensor).astype(np.float32)
    if kind == TensorProto.FLOAT16:
        largest = float(np.abs(values).max(initial=0.0))
        if largest > float(np.finfo(np.float16).max):
            raise EngineError(
                f"weight {tensor.name} holds {largest:.4g}, beyond fp16's range; compile with bf16 or fp32"
            )
        return numpy_helper.from_array(values.astype(np.float16), name)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    made = TensorProto(name=name, data_type=kind, dims=values.shape)
    made.raw_data = rounded.tobytes()
    return made


# --- reading ----------------------------------------------------------------------------------------------------------


def _load(model: bytes) -> onnx.ModelProto:
    try:
        import onnx
    except ImportError:
        raise EngineError("reading a graph needs the package onnx: pip install 'kizu[compile]'") from None
    from google.protobuf.message import DecodeError

    try:
        return onnx.load_from_string(model)
    except DecodeError as error:
        raise EngineError(f"these bytes are no ONNX model: {error}") from None


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type by tensor name, as far as ONNX's own inference finds it."""
    from onnx import shape_inference

    try:
        inferred = shape_inference.infer_shapes(model).graph
    except shape_inference.InferenceError:  # an operator that ONNX does not know; the rules name it
        inferred = model.graph
    values: Sequence[Any] = (*inferred.input, *inferred.output, *inferred.value_info)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    return kinds | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def _constants_to_initializers(model: onnx.ModelProto) -> None:
    """Constant nodes made initializers, so that there is one kind of constant."""
    kept = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = node.attribute[0].t
            tensor.name = node.output[0]
            model.graph.initializer.append(tensor)
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
