"""A graph's convolutions in eight bits: Q/DQ nodes in the ONNX file, from the activations of good frames.

Owns which nodes are quantized, the activations' ranges and the rewrite. How ranges are found is `ranges`, whether the
result is good enough is `quantize`. onnx and onnxruntime are imported inside functions (extra `compile`).

Only the convolution trunks are quantized: a convolution with constant weights that is reached from the pixels through
convolutions, activations, pooling and the like. What follows, the difference of teacher and students, its variance,
statistics, normalization and reductions, is left as it is. Weights are symmetric per output channel, activations
symmetric per tensor. The bias stays float32: an int32 bias would tie it to one activation's scale, and TensorRT wants
none. It takes up what rounding the weights does to the mean input (Nagel et al., Data-Free Quantization, 2019, section
4.2, here with means that were measured): the first layer sees pixels far from zero, where that error outweighed all
others together (demo bundle: map error 1.30 without, 0.19 with it). Precision is in the graph; no switch is left.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from calib.collect import collect
from calib.progress import Advance
from calib.ranges import LARGEST, Finder, Magnitudes, QuantizedPrecision, find_range, rounded
from edge.bundle import ModelBundle
from edge.errors import CalibrationError, CommandError, EngineError
from edge.protocols import EngineSpec, Ticket

if TYPE_CHECKING:
    import onnx

OPSET: Final[Mapping[str, int]] = {"int8": 13, "fp8": 19}
"""The first opset that has such Q/DQ nodes."""

# fmt: off
TRUNK: Final = frozenset({
    "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Conv", "ConvTranspose", "DepthToSpace",
    "DequantizeLinear", "Div", "Elu", "Identity", "LeakyRelu", "MatMul", "Max", "MaxPool", "Mul", "Pad", "PRelu",
    "QuantizeLinear", "Relu", "Resize", "Sigmoid", "Slice", "SpaceToDepth", "Split", "Sub", "Tanh", "Transpose",
})
# fmt: on
"""Operators that lead from the pixels to a convolution of a trunk."""
_CONSTANT_ONLY: Final = frozenset({"Div", "MatMul", "Mul", "Sub"})
"""Of those, the ones that take one tensor and a constant (MatMul enlarges); of two tensors it is score math."""
_DATA_INPUTS: Final[Mapping[str, tuple[int, ...]]] = {"Pad": (0, 2), "Resize": (0,), "Slice": (0,), "Split": (0,)}
"""Inputs that hold values; the others say how much or where, and exporters compute them from shapes and constants."""
_SELECTING: Final = frozenset({"Concat", "Max", "MaxPool", "Slice"})
"""Operators that hand on values of their inputs as they are: rounding commutes with them. FDFE's phases are made so."""
_PIXEL_WAY: Final = frozenset({"Cast", "Transpose", "Identity", "Slice"})
_AFFINE: Final = _PIXEL_WAY | {"Add", "Div", "Mul", "Pad", "Sub"}
_MIDDLE_GRAY: Final = 128.0
_LARGEST_OF_SEVEN_BITS: Final = 63.0


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution that can be quantized: its `name`, its `input` tensor, and the `tensor` whose rounding it sees.

    `tensor` lies before pooling, slices and their concatenation where there are any: rounding commutes with those, and
    they are then done in eight bits too. `pixels` says that the input is uint8 pixels and not padded: int8 holds them
    exactly less 128. `scaled_pixels`: pixels that are padded or normalized by constants: their range is known, whatever
    frames show.
    """

    name: str
    input: str
    tensor: str
    pixels: bool
    scaled_pixels: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """What good frames gave: the magnitudes of each tensor to be rounded, and each layer input's mean by channel (C,).

    `means` is by layer name. `extremes` is the largest magnitude that black and white frames give a tensor of scaled
    pixels: ranges from good frames alone would clip what is brighter than any good part.
    """

    magnitudes: dict[str, Magnitudes]
    extremes: dict[str, float]
    means: dict[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """The quantized graph, and per layer the range T of its input activation (128 for pixels)."""

    model: bytes
    precision: QuantizedPrecision
    ranges: dict[str, float]


def layers_of(model: bytes, precision: QuantizedPrecision = "int8") -> tuple[Layer, ...]:
    """The convolutions that `quantize_graph` quantizes unless told to keep them, in the graph's order.

    In fp8 those that see pixels are not among them: three bits of mantissa lose 16 gray levels.

    Raises:
        EngineError: the package onnx is missing, or these bytes are no model.
    """
    graph = _Graph(_load(model))
    return tuple(layer for layer in graph.layers() if precision == "int8" or not layer.pixels)


def chosen_layers(model: bytes, precision: QuantizedPrecision, keep: Sequence[str] = ()) -> tuple[Layer, ...]:
    """`layers_of` without those in `keep`, which are names or patterns such as `/scales.2/teacher/*`.

    Raises:
        CommandError: what `keep` says fits no layer, or nothing is left to quantize.
    """
    every = layers_of(model, precision)
    names = [layer.name for layer in every]
    if unknown := [pattern for pattern in keep if not fnmatch.filter(names, pattern)]:
        raise CommandError(f"--keep {unknown[0]}: no such layer; the graph's are {', '.join(names) or 'none'}")
    left = tuple(layer for layer in every if not any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in keep))
    if not left:
        raise CommandError(
            f"nothing to quantize: the graph has {len(every)} convolutions for {precision} that are reached from the "
            f"pixels and {len(keep)} are kept; keep fewer"
        )
    return left


def observe(bundle: ModelBundle, layers: Sequence[Layer], paths: Sequence[Path], advance: Advance) -> Activations:
    """Run the bundle's graph over good frames, as the line prepares them; return what the layers saw.

    Raises:
        DataError: a file cannot be inspected.
        EngineError: onnxruntime or onnx is missing, or fails.
        CalibrationError: an activation is not finite.
    """
    observer = _Observer(bundle, layers)
    for _ in collect(bundle, observer, paths, advance=advance):
        pass
    extremes = observer.extremes([layer.tensor for layer in layers if layer.scaled_pixels])
    return Activations(observer.found, extremes, {layer.name: observer.mean(layer.input) for layer in layers})


def find_ranges(
    layers: Sequence[Layer], seen: Activations, finder: Finder, precision: QuantizedPrecision
) -> dict[str, float]:
    """Range T by layer name; 128 where the layer sees pixels."""
    limits = {tensor: find_range(found, finder, precision) for tensor, found in seen.magnitudes.items()} | {
        tensor: limit or 1.0 for tensor, limit in seen.extremes.items()
    }
    return {layer.name: _MIDDLE_GRAY if layer.pixels else limits[layer.tensor] for layer in layers}


def quantize_graph(
    model: bytes,
    layers: Sequence[Layer],
    ranges: Mapping[str, float],
    precision: QuantizedPrecision,
    means: Mapping[str, NDArray[np.float64]],
    weight_bits: int = 8,
) -> Quantized:
    """The graph with `layers` quantized and the others as they are; `means` are `Activations.means`.

    With `weight_bits` 7 int8 weights stay within +-63: two products with 8-bit activations then fit into the 16 bits in
    which x86 CPUs without VNNI add them; with 8 those saturate, and the answers are wrong.

    Raises:
        EngineError: the package onnx is missing, or the graph cannot be brought to the opset that fp8 needs.
    """
    loaded = _at_opset(_load(model), OPSET[precision])
    largest = LARGEST[precision] if weight_bits == 8 else _LARGEST_OF_SEVEN_BITS
    rewrite = _Rewrite(_Graph(loaded), precision, largest)
    for layer in layers:
        rewrite.layer(layer, ranges[layer.name], means[layer.name])
    rewrite.finish()
    data: bytes = loaded.SerializeToString(deterministic=True)
    require_trunk_only(data)
    return Quantized(data, precision, {layer.name: ranges[layer.name] for layer in layers})


def require_trunk_only(model: bytes) -> None:
    """Refuse a graph in which anything but a trunk convolution's input or weight is rounded.

    Raises:
        CalibrationError: a bias or the score math is quantized; names the node.
    """
    graph = _Graph(_load(model))
    trunk = graph.trunk()
    for node in graph.nodes:
        if node.op_type == "QuantizeLinear" and node.input[0] not in trunk:
            raise CalibrationError(
                f"node {_name(node)} rounds {node.input[0]}, which is not part of a convolution trunk: e, v, "
                "statistics and reductions stay float32"
            )
        if node.op_type == "DequantizeLinear":
            for user in graph.users.get(node.output[0], []):
                _require_convolution(graph, user, node.output[0])


def _require_convolution(graph: _Graph, user: onnx.NodeProto, tensor: str) -> None:
    if user.op_type == "Conv" and tensor in user.input[:2]:
        return
    if user.op_type == "Conv":
        raise CalibrationError(f"the bias of {_name(user)} is quantized; it must stay float32")
    if user.op_type == "Shape":  # takes no value
        return
    if user.op_type not in _SELECTING:
        raise CalibrationError(
            f"{_name(user)} ({user.op_type}) takes the rounded {tensor}; only convolutions may: the score math stays "
            "float32"
        )
    for following in graph.users.get(user.output[0], []):
        _require_convolution(graph, following, user.output[0])


# --- the graph --------------------------------------------------------------------------------------------------------


class _Graph:
    """A model with its constants and who makes and takes each tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
            elif node.op_type == "Identity" and node.input[0] in self.constants:  # of equal weights one is kept
                self.constants[node.output[0]] = self.constants[node.input[0]]
        self.makers = {tensor: node for node in self.nodes for tensor in node.output}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for tensor in node.input:
                self.users.setdefault(tensor, []).append(node)
        self.outputs = {value.name for value in model.graph.output}

    def trunk(self) -> set[str]:
        """Tensors that are reached from the pixels by `TRUNK` operators alone."""
        reached = {value.name for value in self.graph.input} - self.constants.keys()
        for node in self.nodes:
            taken = [tensor for tensor in self.data(node) if not self._fixed(tensor)]
            alone = node.op_type not in _CONSTANT_ONLY or len(taken) == 1
            if node.op_type in TRUNK and taken and alone and all(tensor in reached for tensor in taken):
                reached.update(node.output)
        return reached

    def data(self, node: onnx.NodeProto) -> list[str]:
        """The inputs whose values the node computes with."""
        places = _DATA_INPUTS.get(node.op_type, range(len(node.input)))
        return [node.input[place] for place in places if place < len(node.input) and node.input[place]]

    def _fixed(self, tensor: str) -> bool:
        maker = self.makers.get(tensor)
        return tensor in self.constants or (
            maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in self.constants
        )

    def layers(self) -> Iterator[Layer]:
        from onnx import TensorProto

        trunk = self.trunk()
        nodes = [
            node
            for node in self.nodes
            if node.op_type == "Conv" and node.input[0] in trunk and self._weight_type(node) == TensorProto.FLOAT
        ]
        chosen = {id(node) for node in nodes}
        for node in nodes:
            tensor = self._before_selection(str(node.input[0]), chosen)
            yield Layer(_name(node), str(node.input[0]), tensor, *self._sees_pixels(node))

    def _weight_type(self, node: onnx.NodeProto) -> int | None:
        tensor = self.constants.get(node.input[1])
        return None if tensor is None else int(tensor.data_type)

    def _before_selection(self, tensor: str, chosen: set[int]) -> str:
        """The one tensor whose values `tensor` holds, if what is made of it goes to `chosen` convolutions alone."""
        origins = self._origins(tensor)
        (origin, *others) = origins
        return origin if not others and self._only_for(origin, chosen) else tensor

    def _origins(self, tensor: str) -> set[str]:
        maker = self.makers.get(tensor)
        if maker is None or not self.selects(maker):
            return {tensor}
        return set().union(*map(self._origins, self.data(maker)))

    def _only_for(self, tensor: str, chosen: set[int]) -> bool:
        return tensor not in self.outputs and all(
            id(user) in chosen
            or user.op_type == "Shape"
            or (self.selects(user) and self._only_for(user.output[0], chosen))
            for user in self.users[tensor]
        )

    def selects(self, node: onnx.NodeProto) -> bool:
        """Whether its output holds values of its inputs, and nothing else."""
        return node.op_type in _SELECTING and len(node.output) == 1

    def _sees_pixels(self, node: onnx.NodeProto) -> tuple[bool, bool]:
        """Whether the input is uint8 pixels and not padded, and whether it is pixels that are scaled or padded."""
        from onnx import TensorProto

        given, affine = _attributes(node), False
        tensor = node.input[0]
        while (maker := self.makers.get(tensor)) is not None:
            taken = [one for one in self.data(maker) if one not in self.constants]
            if maker.op_type not in _AFFINE or len(taken) != 1:
                return False, False
            affine = affine or maker.op_type not in _PIXEL_WAY
            tensor = taken[0]
        kinds = {value.name: value.type.tensor_type.elem_type for value in self.graph.input}
        if kinds.get(tensor) != TensorProto.UINT8:
            return False, False
        padded = any(given.get("pads", ())) or given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
        return not (affine or padded), affine or padded


class _Rewrite:
    """Puts Q/DQ pairs before convolutions; a tensor that several share is rounded once."""

    def __init__(self, graph: _Graph, precision: QuantizedPrecision, largest_weight: float) -> None:
        self._graph = graph
        self._largest_weight = largest_weight
        self._precision = precision
        self._rounded: dict[str, str] = {}
        self._weights: dict[str, str] = {}
        self._first: list[onnx.NodeProto] = []
        self._after: dict[int, list[onnx.NodeProto]] = {}
        self._named = {_name(node): node for node in graph.nodes if node.op_type == "Conv"}

    def layer(self, layer: Layer, limit: float, mean: NDArray[np.float64]) -> None:
        """Quantize one convolution in place."""
        from onnx import numpy_helper

        node = self._named[layer.name]
        values = numpy_helper.to_array(self._graph.constants[node.input[1]]).astype(np.float64)
        scales = channel_scales(values, self._largest_weight)
        self._correct_bias(node, values, scales, mean, _MIDDLE_GRAY if layer.pixels else 0.0)
        if layer.pixels:
            source, limit = self._shifted(layer.tensor), LARGEST["int8"]
        else:
            source = layer.tensor
        self._weight(node, values, scales)
        self._take(node, layer.tensor, self._round(source, limit, layer.tensor))

    def _take(self, node: onnx.NodeProto, tensor: str, rounded_tensor: str) -> None:
        """Let `node`, and what selects values for it, take `rounded_tensor` for `tensor`."""
        for place, given in enumerate(node.input):
            maker = self._graph.makers.get(given)
            if given == tensor and given in self._graph.data(node):
                node.input[place] = rounded_tensor
            elif maker is not None and self._graph.selects(maker):
                self._take(maker, tensor, rounded_tensor)

    def finish(self) -> None:
        """Write the nodes back, each new one right after what it comes from."""
        graph = self._graph.graph
        nodes = [one for node in self._graph.nodes for one in (node, *self._after.get(id(node), []))]
        del graph.node[:]
        graph.node.extend([*self._first, *nodes])
        del graph.value_info[:]
        used = {tensor for node in graph.node for tensor in node.input}
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)

    def _round(self, tensor: str, limit: float, origin: str) -> str:
        from onnx import helper

        if tensor in self._rounded:
            return self._rounded[tensor]
        scale, zero = f"{tensor}__scale", f"{tensor}__zero"
        self._add(scale, np.array(limit / LARGEST[self._precision], np.float32))
        self._add_low(zero, np.zeros(()))
        low, back = f"{tensor}__{self._precision}", f"{tensor}__rounded"
        self._put(origin, helper.make_node("QuantizeLinear", [tensor, scale, zero], [low], name=f"quantize {tensor}"))
        self._put(origin, helper.make_node("DequantizeLinear", [low, scale, zero], [back], name=f"dequantize {tensor}"))
        self._rounded[tensor] = back
        return back

    def _shifted(self, tensor: str) -> str:
        """The pixels minus 128, which int8 holds exactly; made once."""
        from onnx import helper

        moved = f"{tensor}__centered"
        if moved not in self._rounded:
            self._add(f"{tensor}__gray", np.array(_MIDDLE_GRAY, np.float32))
            self._put(tensor, helper.make_node("Sub", [tensor, f"{tensor}__gray"], [moved], name=f"center {tensor}"))
        return moved

    def _correct_bias(
        self,
        node: onnx.NodeProto,
        values: NDArray[np.float64],
        scales: NDArray[np.float64],
        mean: NDArray[np.float64],
        shift: float,
    ) -> None:
        """Let the mean input (C,) give what it gave before, now that weights are rounded and `shift` is subtracted."""
        from onnx import numpy_helper

        name = f"{_name(node)}__bias"
        lost = values - _rounded_weights(values, scales, self._precision)  # (M, C / groups, ...)
        per_channel = lost.reshape(*lost.shape[:2], -1).sum(axis=2)
        groups = len(mean) // lost.shape[1]
        seen = np.repeat(mean.reshape(groups, -1) - shift, len(lost) // groups, axis=0)  # (M, C / groups)
        bias = shift * values.reshape(len(values), -1).sum(axis=1) + (per_channel * seen).sum(axis=1)
        if len(node.input) > 2 and node.input[2]:
            bias += numpy_helper.to_array(self._graph.constants[node.input[2]]).astype(np.float64)
        del node.input[2:]
        node.input.append(name)
        self._add(name, bias.astype(np.float32))

    def _weight(self, node: onnx.NodeProto, values: NDArray[np.float64], scales: NDArray[np.float64]) -> None:
        from onnx import helper

        weight = str(node.input[1])
        if weight not in self._weights:
            low, scale, zero = f"{weight}__{self._precision}", f"{weight}__scale", f"{weight}__zero"
            self._add_low(low, values / _along_first(scales, values.ndim))
            self._add(scale, scales.astype(np.float32))
            self._add_low(zero, np.zeros(len(scales)))
            back = f"{weight}__rounded"
            name = f"dequantize {weight}"
            self._first.append(helper.make_node("DequantizeLinear", [low, scale, zero], [back], name=name, axis=0))
            self._weights[weight] = back
        node.input[1] = self._weights[weight]

    def _put(self, origin: str, made: onnx.NodeProto) -> None:
        """Behind the node that makes `origin`."""
        maker = self._graph.makers.get(origin)
        (self._first if maker is None else self._after.setdefault(id(maker), [])).append(made)

    def _add(self, name: str, values: NDArray[Any]) -> None:
        from onnx import numpy_helper

        self._graph.graph.initializer.append(numpy_helper.from_array(values, name))

    def _add_low(self, name: str, scaled: NDArray[np.float64]) -> None:
        self._graph.graph.initializer.append(low_tensor(name, scaled, self._precision))


def channel_scales(weights: NDArray[np.float64], largest_number: float) -> NDArray[np.float64]:
    """Step (M,) of each output channel's weights (M, ...): their largest magnitude over `largest_number`; never 0."""
    largest = np.abs(weights).reshape(len(weights), -1).max(axis=1)
    # As the graph holds it: float32.
    return (np.where(largest > 0, largest, 1.0) / largest_number).astype(np.float32).astype(np.float64)


def low_tensor(name: str, scaled: NDArray[np.float64], precision: QuantizedPrecision) -> onnx.TensorProto:
    """An initializer of `scaled` values (in units of their step), rounded to nearest even, symmetric."""
    from onnx import TensorProto

    nearest = rounded(scaled, LARGEST[precision], precision)
    kind = TensorProto.INT8 if precision == "int8" else TensorProto.FLOAT8E4M3FN
    raw = nearest.astype(np.int8).tobytes() if precision == "int8" else e4m3_bytes(nearest).tobytes()
    return TensorProto(name=name, data_type=kind, dims=scaled.shape, raw_data=raw)


def e4m3_bytes(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The E4M3FN bytes of `values` that are such numbers already: sign, 4 bits of exponent (bias 7), 3 of mantissa."""
    sizes = np.abs(values)
    exponent = np.maximum(np.frexp(sizes)[1] - 1, -6)
    eighths = np.rint(sizes / np.exp2(exponent - 3.0)).astype(np.int64)  # 8 to 15, below 8 if subnormal
    code = np.where(eighths < 8, eighths, ((exponent + 7) << 3) + eighths - 8)
    return np.asarray(code | (np.signbit(values).astype(np.int64) << 7)).astype(np.uint8)


def _rounded_weights(
    values: NDArray[np.float64], scales: NDArray[np.float64], precision: QuantizedPrecision
) -> NDArray[np.float64]:
    step = _along_first(scales, values.ndim)
    return np.asarray(rounded(values / step, LARGEST[precision], precision) * step)


def _along_first(scales: NDArray[np.float64], dimensions: int) -> NDArray[np.float64]:
    return scales.reshape(-1, *[1] * (dimensions - 1))


# --- watching activations ---------------------------------------------------------------------------------------------


class _Observer:
    """An engine for `collect` that also counts activations: the frames come to it exactly as to the line's engine."""

    def __init__(self, bundle: ModelBundle, layers: Sequence[Layer]) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise EngineError("watching activations needs onnxruntime: pip install 'kizu[compile]'") from None
        from onnx import TensorProto, helper

        self.found = {layer.tensor: Magnitudes() for layer in layers if not layer.pixels}
        self._sums: dict[str, NDArray[np.float64]] = {layer.input: np.zeros(1) for layer in layers}
        self._watched = sorted(self.found.keys() | self._sums.keys())
        model = _load(bundle.model)
        model.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self._watched
        )
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        spec, cells = bundle.manifest.input, bundle.manifest.map
        size = (spec.height, spec.width, spec.channels, cells.height, cells.width)
        self.spec = EngineSpec("observer", str(onnxruntime.__version__), "cpu", *size, max_batch=1, depth=1)
        self._answer: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
        self._next = 0

    def extremes(self, tensors: Sequence[str]) -> dict[str, float]:
        """The largest magnitude of each on a black and a white frame."""
        if not tensors:
            return {}
        shape = (1, self.spec.height, self.spec.width, self.spec.channels)
        ends = [self._session.run(tensors, {"frames": np.full(shape, gray, np.uint8)}) for gray in (0, 255)]
        return {name: max(float(np.abs(end[place]).max()) for end in ends) for place, name in enumerate(tensors)}

    def mean(self, tensor: str) -> NDArray[np.float64]:
        """By channel (C,), over all frames so far."""
        return self._sums[tensor] / max(1, self._next)

    def warmup(self) -> None:
        """Nothing to prepare."""

    def submit(self, batch: NDArray[np.uint8]) -> Ticket:
        """Run `batch` and count what its activations are."""
        maps, scores, *seen = self._session.run(["anomaly_map", "image_score", *self._watched], {"frames": batch})
        for name, values in zip(self._watched, seen, strict=True):
            if name in self.found:
                self.found[name].add(values, f"activation {name}")
            if name in self._sums:
                self._sums[name] = self._sums[name] + values.mean(axis=(0, *range(2, values.ndim)), dtype=np.float64)
        self._answer = (maps, scores)
        self._next += 1
        return Ticket(self._next - 1)

    def collect(self, timeout_s: float) -> tuple[Ticket, NDArray[np.float32], NDArray[np.float32]]:
        """Hand out what `submit` computed."""
        assert self._answer is not None
        return Ticket(self._next - 1), *self._answer

    def infer(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`submit` and `collect` of one batch."""
        self.submit(batch)
        _, maps, scores = self.collect(0.0)
        return maps, scores

    def __enter__(self) -> _Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self._answer = None


# --- reading ----------------------------------------------------------------------------------------------------------


def _load(model: bytes) -> onnx.ModelProto:
    try:
        import onnx
    except ImportError:
        raise EngineError("quantizing needs the package onnx: pip install 'kizu[compile]'") from None
    from google.protobuf.message import DecodeError

    try:
        return onnx.load_from_string(model)
    except DecodeError as error:
        raise EngineError(f"these bytes are no ONNX model: {error}") from None


def _at_opset(model: onnx.ModelProto, least: int) -> onnx.ModelProto:
    from onnx import version_converter

    found = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    if found >= least:
        return model
    try:
        raised = version_converter.convert_version(model, least)
    except (RuntimeError, version_converter.ConvertError) as error:
        raise EngineError(f"the graph of opset {found} cannot be brought to opset {least}: {error}") from None
    raised.ir_version = max(model.ir_version, 9)  # the first that knows 8-bit floats
    return raised


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or node.output[0])


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {one.name: helper.get_attribute_value(one) for one in node.attribute}
