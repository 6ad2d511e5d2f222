"""What an ONNX file refers to, read from its bytes alone: the runtime has no `onnx` package.

Owns one question, whether a model keeps tensors in other files; what the graph computes is the engines' matter.

An ONNX file is one protocol buffer message. Rather than its whole schema this module knows only the fields that lead to
a TensorProto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3) and skips everything else by its length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from edge.errors import BundleError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# {message: {field number: message it holds}}, every way from the model to a TensorProto.
_CHILDREN: Final[Mapping[str, Mapping[int, str]]] = MappingProxyType(
    {
        "model": {7: "graph", 20: "training", 25: "function"},
        "training": {1: "graph", 2: "graph"},
        "function": {7: "node", 11: "attribute"},
        "graph": {1: "node", 5: "tensor", 15: "sparse"},
        "node": {5: "attribute"},
        "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
        "sparse": {1: "tensor", 2: "tensor"},
        "tensor": {},
    }
)
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # fields of TensorProto; location 1 is EXTERNAL
_MAX_DEPTH = 64


def require_self_contained(model: bytes, where: str) -> None:
    """Refuse a model that keeps any tensor outside its own bytes.

    ONNX Runtime and OpenVINO would follow such a reference to a file that no digest covers.

    Raises:
        BundleError: external data, or bytes that are no ONNX message; the message names `where`.
    """
    try:
        graphs = _walk(memoryview(model), "model", where, 0)
    except (IndexError, ValueError) as error:
        raise BundleError(f"{where} is not an ONNX model: {error}; export it again") from error
    if graphs == 0:
        raise BundleError(f"{where} is not an ONNX model: it holds no graph; export it again")


def _walk(message: memoryview, kind: str, where: str, depth: int) -> int:
    """Visit `message` and what it holds; return how many graphs it holds directly."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested deeper than {_MAX_DEPTH}")
    graphs = 0
    for number, wire_type, value, payload in _fields(message):
        if kind == "tensor":
            # Location counts even when no file is named: some readers then look for a default one.
            if number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value):
                raise BundleError(f"{where} keeps tensors in other files (external data); export it as one file")
            continue
        child = _CHILDREN[kind].get(number)
        if child is None:
            continue
        if wire_type != _BYTES:
            raise ValueError(f"field {number} of {kind} has wire type {wire_type}")
        graphs += child == "graph"
        _walk(payload, child, where, depth + 1)
    return graphs


def _fields(message: memoryview) -> Iterator[tuple[int, int, int, memoryview]]:
    """Yield (field number, wire type, number, payload) of one message; the payload is empty unless length-delimited."""
    at, end, empty = 0, len(message), message[:0]
    while at < end:
        key, at = _varint(message, at)
        number, wire_type, value, payload = key >> 3, key & 7, 0, empty
        if not 0 < key < 1 << 32:  # some parsers drop the bits above and would see another field than we do
            raise ValueError(f"field key {key}")
        if wire_type == _VARINT:
            value, at = _varint(message, at)
        elif wire_type == _BYTES:
            length, at = _varint(message, at)
            payload = message[at : at + length]
            at += length
        elif wire_type in (_FIXED64, _FIXED32):
            at += 8 if wire_type == _FIXED64 else 4
        else:  # groups (3, 4) are not used by ONNX
            raise ValueError(f"wire type {wire_type}")
        if at > end:
            raise ValueError("truncated")
        yield number, wire_type, value, payload


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the base-128 number at `at` and the position after it; IndexError when it runs past the end."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("number longer than 10 bytes")
