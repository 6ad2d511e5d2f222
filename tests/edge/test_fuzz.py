"""Whatever bytes come from outside, a parser accepts or refuses them by its own errors: a short run of `make fuzz`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge import bundle_files, model_file, signature, wire
from edge.demo.line import BUNDLE
from edge.errors import BundleError, WireError
from fuzzing import EDITS, Finding, check, damage, damaged, run, targets

TARGETS = {target.name: target for target in targets(BUNDLE)}
EDIT = st.tuples(st.integers(0, EDITS - 1), st.integers(0, 1 << 20), st.binary(max_size=8))


@pytest.mark.parametrize("name", TARGETS)
def test_random_damage_is_refused_or_harmless(name: str) -> None:
    """The same damage in every run; `make fuzz` takes a new seed each time and far more of it."""
    found = run(TARGETS[name], 3_000, seed=1)

    assert found.total() == 3_000
    # Otherwise the damage would be so rough that the parser's inside is never reached.
    assert found["accepted"] > 15


@given(st.sampled_from(sorted(TARGETS)), st.integers(0, 99), st.lists(EDIT, min_size=1, max_size=4))
@settings(max_examples=400, deadline=None)
def test_chosen_damage_is_refused_or_harmless(name: str, seed: int, edits: list[tuple[int, int, bytes]]) -> None:
    """Hypothesis chooses, and makes what it finds small."""
    target = TARGETS[name]
    parts = target.seeds[seed % len(target.seeds)]
    for edit in edits:
        parts = damage(parts, *edit)

    check(target, parts)


@given(st.sampled_from(sorted(TARGETS)), st.lists(st.binary(max_size=200), max_size=4))
@settings(max_examples=200, deadline=None)
def test_bytes_without_any_sense_are_refused(name: str, parts: list[bytes]) -> None:
    """No valid message to start from."""
    check(TARGETS[name], parts)


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_starts_from_what_is_valid(name: str) -> None:
    """Damage to what was refused already would show nothing."""
    target = TARGETS[name]

    assert {check(target, parts) for parts in target.seeds} <= {"accepted", "message_type"}


def test_every_parser_of_the_wire_is_a_target() -> None:
    """A message that is added to the wire must be fuzzed as well."""
    parsers = {name for name in vars(wire) if name.startswith(("parse_", "read_", "decode_"))}

    # decode_payload, the pixels of a frame, is reached through read_frame.
    assert parsers == {
        "parse_camera_message", "read_frame", "parse_frame", "parse_published", "parse_credit", "decode_event",
        "decode_payload", "parse_request", "parse_answer",
    }  # fmt: skip


# --- planted bugs: each is found --------------------------------------------------------------------------------------


def _trusts_the_header_of_an_array(data: bytes, dtype: Any, shape: Any, where: str) -> Any:
    """np.load's way: the header says how much there is."""
    found, _, _, start = bundle_files._npy_header(data, where)
    return np.frombuffer(data, dtype, int(np.prod(found)), start).reshape(found)


def _trusts_a_length(message: memoryview) -> Any:
    """model_file without its look at the end: a length beyond it gives a payload that is shorter than it says."""
    at = 0
    while at < len(message):
        key, at = model_file._varint(message, at)
        length, at = model_file._varint(message, at) if key & 7 == 2 else (0, at)
        payload = bytearray(length)
        payload[:] = message[at : at + length]
        if len(payload) != length:
            raise IndexError("short")
        at += length
        yield key >> 3, key & 7, 0, message[at - length : at]


def _trusts_width_and_height(encoding: str, width: int, height: int, payload: Any, limits: Any) -> Any:
    return np.frombuffer(payload, np.uint8).reshape(height, width, -1)


def _lets_bad_text_through(decoder: Any, data: Any) -> Any:
    """A decoder that knows msgspec's errors and not Python's own for text that is no UTF-8."""
    try:
        return decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise WireError("header_not_json", str(error)) from None


def _believes_any_signature(data: bytes, files: Any, where: str) -> str:
    try:
        return msgspec.json.decode(data, type=signature.SignatureFile).public_key
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError(str(error)) from None


@pytest.mark.parametrize(
    ("name", "module", "attribute", "planted"),
    [
        ("array", bundle_files, "parse_array", _trusts_the_header_of_an_array),
        ("model", model_file, "_fields", _trusts_a_length),
        ("camera message", wire, "decode_payload", _trusts_width_and_height),
        ("published", wire, "_decode", _lets_bad_text_through),
        ("signature", signature, "check_signature", _believes_any_signature),
    ],
)
def test_a_planted_bug_is_found(
    monkeypatch: pytest.MonkeyPatch, name: str, module: Any, attribute: str, planted: Callable[..., Any]
) -> None:
    """Controls: a parser that trusts a length, a size, a text or a signature does not last."""
    monkeypatch.setattr(module, attribute, planted)

    with pytest.raises(Finding, match=name):
        run(TARGETS[name], 20_000, seed=1)


# --- what was found --------------------------------------------------------------------------------------------------


def test_text_that_is_no_utf8_in_a_frames_header_is_refused() -> None:
    """Found by fuzzing: in a field that the envelope skips, it came out as Python's own error and ended the line."""
    header = (
        b'{"type":"frame","version":1,"camera":"c","epoch":1,"sequence":1,"captured_ns":1,"encoding":"\xe7",'
        b'"width":1,"height":1}'
    )

    with pytest.raises(WireError) as refused:
        wire.parse_camera_message([header, b""])
    assert refused.value.reason == "header_not_json"


def test_an_arrays_header_is_not_python_to_be_read() -> None:
    """Found by fuzzing: NumPy's reader takes a damaged header for Python 2's and raises its tokenizer's error."""
    good = bundle_files.array_bytes(np.zeros((2, 3), np.uint8))

    with pytest.raises(BundleError, match="no bundle's array has such a header"):
        bundle_files.parse_array(good.replace(b"3), ", b"3),("), np.dtype(np.uint8), (2, 3), "x.npy")


def test_the_damage_is_the_same_for_the_same_seed() -> None:
    """So that a finding of `make fuzz` can be repeated."""
    seeds = TARGETS["frame"].seeds

    assert damaged(random.Random(3), seeds) == damaged(random.Random(3), seeds)
