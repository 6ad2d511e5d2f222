"""A model keeps all its tensors in its own bytes: checked without the onnx package, against files made by it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import edge.model_file
from edge.bundle import ModelBundle
from edge.errors import BundleError
from edge.model_file import require_self_contained


def external(name: str = "w") -> Any:
    """A TensorProto that points to a file."""
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def model_of(graph: Any, **more: Any) -> bytes:
    return bytes(helper.make_model(graph, **more).SerializeToString())


def in_initializer() -> bytes:
    return model_of(helper.make_graph([], "g", [], [], [external()]))


def in_constant_node() -> bytes:
    return model_of(helper.make_graph([helper.make_node("Constant", [], ["c"], value=external())], "g", [], []))


def in_branch_of_an_if() -> bytes:
    inner = helper.make_graph([], "inner", [], [], [external()])
    plain = helper.make_graph([], "plain", [], [])
    node = helper.make_node("If", ["c"], ["y"], then_branch=plain, else_branch=inner)
    return model_of(helper.make_graph([node], "g", [], []))


def in_sparse_initializer() -> bytes:
    graph = helper.make_graph([], "g", [], [])
    sparse = graph.sparse_initializer.add()
    sparse.values.CopyFrom(external())
    return model_of(graph)


def in_function() -> bytes:
    body = [helper.make_node("Constant", [], ["c"], value=external())]
    function = helper.make_function("local", "F", [], ["c"], body, [helper.make_opsetid("", 18)])
    return model_of(helper.make_graph([], "g", [], []), functions=[function])


def in_location_only() -> bytes:
    tensor = external()
    tensor.ClearField("external_data")
    return model_of(helper.make_graph([], "g", [], [], [tensor]))


def wrapped(key: int, payload: bytes) -> bytes:
    """A length-delimited field."""
    digits, length = bytearray([key]), len(payload)
    while length > 0x7F:
        digits.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*digits, length]) + payload


PLACES = [in_initializer, in_constant_node, in_branch_of_an_if, in_sparse_initializer, in_function, in_location_only]


@pytest.mark.parametrize("make", PLACES)
def test_external_data_is_found_wherever_a_tensor_may_be(make: Callable[[], bytes]) -> None:
    """Initializers, attributes, nested graphs, sparse tensors, functions: every way to a tensor is walked."""
    with pytest.raises(BundleError, match="external data"):
        require_self_contained(make(), "model.onnx")


def test_a_model_saved_by_onnx_with_external_data_cannot_become_a_bundle(
    make_model: Callable[..., bytes], make_bundle: Callable[..., ModelBundle], tmp_path: Path
) -> None:
    """The real thing, as `onnx.save` writes it: the file beside the model would be covered by no digest."""
    path = tmp_path / "model.onnx"
    onnx.save(
        onnx.load_from_string(make_model()), path, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    golden = make_bundle(tmp_path / "good").golden

    with pytest.raises(BundleError, match="external data"):
        make_bundle(tmp_path / "bad", model=path.read_bytes(), golden=golden)


def test_a_plain_model_passes_and_so_does_one_with_attributes_and_branches(make_model: Callable[..., bytes]) -> None:
    """No false alarm: strings that look like field numbers are skipped by their length."""
    require_self_contained(make_model(), "model.onnx")
    plain = helper.make_graph([helper.make_node("Constant", [], ["c"], value_string=b"j\x00p\x01")], "b", [], [])
    node = helper.make_node("If", ["c"], ["y"], then_branch=plain, else_branch=plain)
    require_self_contained(model_of(helper.make_graph([node], "g", [], [])), "model.onnx")


def test_control_a_walker_blind_to_attributes_would_miss_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take one way out of the table and the tensor behind it goes unseen."""
    monkeypatch.setattr(edge.model_file, "_CHILDREN", {**edge.model_file._CHILDREN, "node": {}})

    require_self_contained(in_constant_node(), "model.onnx")


@pytest.mark.parametrize("data", [b"", b"\x00", b"<?xml version='1.0'?>", b"\x3a\xff\xff\xff\xff\x0f", b"\x80" * 20])
def test_bytes_that_are_no_onnx_message_are_refused(data: bytes) -> None:
    """OpenVINO guesses the format from the bytes; only ONNX gets that far."""
    with pytest.raises(BundleError, match="not an ONNX model"):
        require_self_contained(data, "model.onnx")


def test_nesting_is_bounded() -> None:
    """A graph in a graph in a graph ... ends before the stack does."""
    graph = b""
    for _ in range(200):
        graph = wrapped(0x0A, wrapped(0x2A, wrapped(0x32, graph)))  # graph.node, node.attribute, attribute.g

    with pytest.raises(BundleError, match="nested deeper"):
        require_self_contained(wrapped(0x3A, graph), "model.onnx")


@given(st.binary(max_size=64), st.integers(0, 3000))
def test_damage_never_raises_anything_but_a_bundle_error(noise: bytes, at: int) -> None:
    """Whatever the bytes are, the answer is yes or BundleError."""
    data = in_branch_of_an_if() + in_function()
    with contextlib.suppress(BundleError):
        require_self_contained(data[: at % len(data)] + noise + data[at % len(data) :], "model.onnx")
