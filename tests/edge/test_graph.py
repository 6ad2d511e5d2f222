"""What a TensorRT build would refuse, said before; and graphs at half the precision whose scores stay whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge import graph
from edge.bundle import ModelBundle, open_bundle
from edge.errors import EngineError
from edge.graph import OPERATORS, Precision, at_precision, lint, quantized_types, require_buildable
from onnx_graphs import f32, graph_of, i64, of_each_operator, one

DEMO = Path(__file__).parents[2] / "edge" / "demo" / "bundle"
EACH = of_each_operator()


@pytest.fixture(scope="module")
def demo() -> ModelBundle:
    return open_bundle(DEMO)


def answers(model: bytes, frames: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> list[np.ndarray]:  # type: ignore[type-arg]
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(["anomaly_map", "image_score"], {"frames": frames})  # type: ignore[type-arg]
    return found


def test_every_known_operator_has_a_graph_that_shows_it() -> None:
    """The list is what was seen to build, so each name on it must be tried."""
    assert set(EACH) == OPERATORS


@pytest.mark.parametrize("operator", sorted(EACH))
def test_a_graph_of_a_known_operator_is_clean_and_builds(operator: str, tmp_path: Path) -> None:
    """Both sides of the rule: the linter is silent, and the library does build it (where it is installed)."""
    onnx.checker.check_model(onnx.load_from_string(EACH[operator]))
    assert lint(EACH[operator]) == ()

    library = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install tensorrt-rtx")
    from edge.compile import Progress, _build
    from edge.plan_cache import PlanKey

    key = PlanKey("tensorrt_rtx", str(library.__version__), "0" * 64, "model", "fp32", ("sm89",), 2, (8, 8, 3))
    assert len(_build(library, EACH[operator], key, Progress())) > 1000


def moved_first() -> bytes:
    """uint8 permuted before it is cast."""
    model = onnx.load_from_string(one("Relu"))
    cast, transpose = model.graph.node[0], model.graph.node[1]
    transpose.input[0], transpose.output[0] = "frames", "moved"
    cast.input[0], cast.output[0] = "moved", "x"
    del model.graph.node[:2]
    model.graph.node.insert(0, cast)
    model.graph.node.insert(0, transpose)
    return model.SerializeToString()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "operator", "instead"),
    [
        (moved_first(), "Transpose", "cast to float before anything else"),
        (one("MaxPool", kernel_shape=[2, 2], dilations=[2, 2]), "MaxPool", "Max of shifted slices"),
        (one("NonZero"), "NonZero", "mask it with Where"),
        (one("Dropout"), "Dropout", "evaluation mode"),
        (one("Cast", to=TensorProto.DOUBLE), "Cast", "float32"),
        (one("Pad", ["n"], {"n": i64(0, 0, 2, 2, 0, 0, 2, 2)}, mode="wrap"), "Pad", "by reflection"),
        (
            one("Resize", ["", "r"], {"r": np.array([1, 1, 2, 2], np.float32)}, mode="linear", antialias=1),
            "Resize",
            "resize before the graph",
        ),
        (
            graph_of([helper.make_node("TopK", ["x", "k"], ["y", "i"], name="middle")], {"k": i64(3841)}),
            "TopK",
            "bisection",
        ),
    ],
)
def test_what_a_build_would_refuse_is_named_with_what_to_write_instead(
    model: bytes, operator: str, instead: str
) -> None:
    """The operator at fault and no other, and the export stops with it."""
    found = lint(model)

    assert found[0].operator == operator and instead in found[0].instead
    assert {one.operator for one in found} == {operator}
    with pytest.raises(EngineError, match=r"model\.onnx cannot be built by TensorRT"):
        require_buildable(model, "model.onnx")


def test_operators_of_another_domain_are_refused() -> None:
    """A runtime's own operators would tie the bundle to it."""
    model = graph_of([helper.make_node("Gelu", ["x"], ["y"], name="middle", domain="com.microsoft")], {})

    assert [one.why for one in lint(model)] == ["it is of the domain 'com.microsoft'"]


def test_bytes_that_are_no_model_are_refused() -> None:
    """An error that says so, not protobuf's."""
    with pytest.raises(EngineError, match="no ONNX model"):
        lint(b"\x08\xff\xff\xff")


# --- precision --------------------------------------------------------------------------------------------------------


def types_in(model: bytes) -> dict[str, int]:
    return graph._element_types(onnx.load_from_string(model))


@pytest.mark.parametrize(("precision", "kind"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_convolutions_are_lowered_and_the_scores_are_not(demo: ModelBundle, precision: Precision, kind: int) -> None:
    """Every convolution at the precision asked for; squares, sums, differences and the outputs in float32."""
    loaded = onnx.load_from_string(at_precision(demo.model, precision))
    kinds = {tensor.name: tensor.data_type for tensor in loaded.graph.initializer}
    produced = {output: node for node in loaded.graph.node for output in node.output}

    for node in loaded.graph.node:
        if node.op_type == "Conv":
            assert {kinds[name] for name in node.input[1:]} == {kind}
        if node.op_type in ("Sub", "Add", "Pow", "ReduceSum", "ReduceMax", "Mul", "Div"):
            assert not any(name.endswith(f"__{precision}") for name in (*node.input, *node.output))
    assert [value.type.tensor_type.elem_type for value in loaded.graph.output] == [TensorProto.FLOAT] * 2
    assert loaded.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    assert produced["anomaly_map"].op_type != "Conv"


def test_fp16_answers_like_fp32(demo: ModelBundle) -> None:
    """Within one percent of the map's largest value on the golden frames, by ONNX Runtime on the CPU."""
    maps, scores = answers(at_precision(demo.model, "fp16"), demo.golden.frames)

    assert np.abs(maps - demo.golden.maps).max() <= 1e-2 * np.abs(demo.golden.maps).max()
    assert np.abs(scores - demo.golden.scores).max() <= 1e-2 * np.abs(demo.golden.scores).max()


def test_control_scores_in_half_precision_answer_otherwise(demo: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: squares and sums in fp16 too; the same bound is broken."""
    everything = frozenset({"Sub", "Add", "Pow", "ReduceSum", "Mul", "Div", "ReduceMax", *graph._BETWEEN})
    monkeypatch.setattr(graph, "_HEAVY", graph._HEAVY | everything)
    maps, _ = answers(at_precision(demo.model, "fp16"), demo.golden.frames)

    error = np.abs(maps - demo.golden.maps).max() / np.abs(demo.golden.maps).max()
    assert not error <= 3e-3, error


def test_bf16_weights_are_rounded_to_the_nearest() -> None:
    """Ties to even, as the hardware does."""
    values = np.array([1.0, 1.00390625, 1.01171875, -3.1415927, 65280.0], np.float32)
    made = graph._converted(onnx.numpy_helper.from_array(values, "w"), "w16", TensorProto.BFLOAT16)

    bits = np.frombuffer(made.raw_data, np.uint16).astype(np.uint32) << 16
    assert bits.view(np.float32).tolist() == [1.0, 1.0, 1.015625, -3.140625, 65280.0]


@pytest.mark.parametrize(("precision", "kind"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.FLOAT)])
def test_a_transposed_convolution_stays_as_it_is_in_bf16(precision: Precision, kind: int) -> None:
    """TensorRT for RTX cannot build it; tests/trainer/methods/test_lrdan.py builds a graph that has some."""
    model = one("ConvTranspose", ["w"], {"w": np.ones((3, 4, 3, 3), np.float32)}, kernel_shape=[3, 3])

    loaded = onnx.load_from_string(at_precision(model, precision))
    kinds = {tensor.name: tensor.data_type for tensor in loaded.graph.initializer}

    assert [kinds[node.input[1]] for node in loaded.graph.node if node.op_type == "ConvTranspose"] == [kind]


def test_a_weight_beyond_fp16_is_refused_by_name() -> None:
    """It would become infinite without a word."""
    model = one("Conv", ["w"], {"w": np.full((4, 3, 3, 3), 1e5, np.float32)}, kernel_shape=[3, 3])

    with pytest.raises(EngineError, match=r"weight w holds 1e\+05, beyond fp16's range"):
        at_precision(model, "fp16")
    assert at_precision(model, "bf16") != model


def test_a_tensor_used_at_both_precisions_is_there_in_both() -> None:
    """A convolution's output that is an activation's input and a sum's: the sum gets float32."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="one", kernel_shape=[3, 3]),
        helper.make_node("Relu", ["c"], ["r"], name="act"),
        helper.make_node("Conv", ["r", "v"], ["d"], name="two", kernel_shape=[1, 1]),
        helper.make_node("Sub", ["d", "c"], ["y"], name="miss"),
    ]
    model = graph_of(nodes, {"w": f32(4, 3, 3, 3), "v": f32(4, 4, 1, 1)})
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)

    low = at_precision(model, "fp16")

    kinds = types_in(low)
    assert (kinds["c"], kinds["c__fp16"]) == (TensorProto.FLOAT, TensorProto.FLOAT16)
    np.testing.assert_allclose(answers(low, frames)[1], answers(model, frames)[1], rtol=1e-2)


def test_fp32_is_the_graph_itself(demo: ModelBundle) -> None:
    """Not even parsed."""
    assert at_precision(demo.model, "fp32") is demo.model


def test_a_graph_says_to_what_it_was_quantized(demo: ModelBundle) -> None:
    """By its own Q/DQ nodes."""
    assert quantized_types(EACH["QuantizeLinear"]) == ("int8",)
    assert quantized_types(demo.model) == ()
