"""Fuzzing of everything that reads bytes from outside: what is fed in, how it is damaged, what may come out.

A `Target` is one parser with valid inputs to start from, the errors by which it may refuse, and what must hold for
whatever it accepts. Anything else that it raises is a finding. `make fuzz` runs this file as a program.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge import bundle, bundle_files, images, model_file, signature, wire
from edge.errors import BundleError, ConfigError, ImageRefused, WireError
from edge.payloads import ENCODINGS, FrameLimits, encode_image
from edge.types import Frame, Unreadable
from sample_events import sample_event

Parts = list[bytes]

_LIMITS = FrameLimits(max_side_px=256, max_pixels=64 * 64, max_payload_bytes=16_384)
_MEMORY_BYTES = 3 << 30


@dataclass(frozen=True)
class Target:
    """`feed` takes the parts of one input and returns what it accepted; `refusals` are the only errors it may raise."""

    name: str
    seeds: list[Parts]
    feed: Callable[[Parts], object]
    refusals: tuple[type[Exception], ...]


class Finding(AssertionError):
    """A parser broke its word; the message holds the input."""


def check(target: Target, parts: Parts) -> str:
    """Feed one input; return `accepted` or the refusal's word.

    Raises:
        Finding: another error came out, or what was accepted is not what it should be.
    """
    try:
        target.feed(parts)
    except target.refusals as refused:
        return str(getattr(refused, "reason", type(refused).__name__))
    except Exception as error:
        raise Finding(f"{target.name}: {type(error).__name__}: {error}; input {parts!r}"[:4000]) from error
    return "accepted"


# --- damage -----------------------------------------------------------------------------------------------------------

EDITS = 10
_WORDS = (
    b"", b"\x00", b"\xff", b"\xff" * 4, b"\xff" * 8, b"\x00" * 8, b"\x80", b"\x7f\xff\xff\xff", b"\xc3\x28",
    b"-1", b"0", b"1e308", b"9223372036854775808", b"18446744073709551616", b"NaN", b"null", b"true", b"{}", b"[]",
    b'""', b'"\\ud800"', b"[" * 1200, b'{"a":' * 600, b"../", b"/", b"\n", b",", b":", b'"', b"type", b"version",
    b"IDAT", b"IEND",
)  # fmt: skip
_DIGITS = frozenset(b"0123456789")


def damage(parts: Sequence[bytes], edit: int, at: int, word: bytes) -> Parts:
    """One edit of `parts`: which of EDITS, where (any number) and with what."""
    parts = [*parts]
    if not parts:
        return [word]
    index = at % len(parts)
    data = parts[index]
    here = (at // len(parts)) % (len(data) + 1)
    until = min(len(data), here + 1 + len(word))
    if edit == 0:  # one bit
        data = data[:here] + bytes([data[here] ^ 1 << at % 8]) + data[here + 1 :] if here < len(data) else data + word
    elif edit == 1:
        data = data[:here] + word + data[here:]
    elif edit == 2:
        data = data[:here] + word + data[until:]
    elif edit == 3:
        data = data[:here]
    elif edit == 4:
        data = data[:here] + data[until + at % 64 :]
    elif edit == 5:  # again what stands here
        data = data[:until] + data[here:until] * (1 + at % 16) + data[until:]
    elif edit == 6:  # another number in place of one
        start = next((place for place in range(here, len(data)) if data[place] in _DIGITS), len(data))
        stop = next((place for place in range(start, len(data)) if data[place] not in _DIGITS), len(data))
        data = data[:start] + (word or b"-1") + data[stop:]
    elif edit == 7:
        return [*parts[:index], *parts[index + 1 :]]
    elif edit == 8:
        return [*parts[:index], data, *parts[index:]] if len(parts) < 8 else parts
    elif edit == 9:  # the first and the last half change places
        data = data[here:] + data[:here]
    parts[index] = data
    return parts


def damaged(source: random.Random, seeds: Sequence[Parts]) -> Parts:
    """A valid input after one to four edits."""
    parts = source.choice(seeds)
    for _ in range(source.randint(1, 4)):
        word = source.choice(_WORDS) if source.random() < 0.7 else source.randbytes(source.randint(1, 8))
        parts = damage(parts, source.randrange(EDITS), source.getrandbits(20), word)
    return parts


# --- what is fed ------------------------------------------------------------------------------------------------------


def _frame_message(encoding: str, payload: bytes) -> Parts:
    header = wire.FrameHeader(1, "cam1", 7, 3, 1_700_000_000_000_000_000, encoding, 12, 10, "part-7", -5)
    return [bytes(part) for part in wire.pack_frame(header, payload)]


def _frame_messages() -> list[Parts]:
    gray = np.arange(120, dtype=np.uint8).reshape(10, 12)
    color = np.repeat(gray[:, :, None], 3, axis=2)
    found = [_frame_message(name, bytes(120 if "8" in name and "gb8" not in name else 360)) for name in ENCODINGS[:-2]]
    for image in (gray, color):
        for kind in ("png", "jpeg"):
            name, payload = encode_image(image, kind)  # type: ignore[arg-type]
            found.append(_frame_message(name, bytes(payload)))
    return [*found, [bytes(part) for part in wire.pack_hello("cam1", 7)]]


def _feed_frame(parts: Parts) -> object:
    """What a ROUTER hands over; a frame that is accepted has the size of its header."""
    header = wire.parse_camera_message(parts)
    if not isinstance(header, wire.FrameHeader):
        return header
    found = wire.read_frame(header, parts[1], _LIMITS, 0)
    if isinstance(found, Frame):
        assert found.image.shape[:2] == (header.height, header.width), found.image.shape
        assert found.image.dtype == np.uint8 and found.image.size <= 3 * _LIMITS.max_pixels
    assert isinstance(found, Frame) or found.reason in wire.UNREADABLE_REASONS
    return found


def _feed_whole_frame(parts: Parts) -> object:
    if parts and parts[0].startswith(b'{"type":"hello"'):
        raise WireError("message_type", "")
    found = wire.parse_frame(parts, _LIMITS)
    assert isinstance(found, Frame | Unreadable)
    return found


def _events() -> list[Parts]:
    mask = images.encode_mask_png(np.eye(9, dtype=np.bool_))
    told = wire.Head(1, "line-1", 5, 9)
    found = [wire.pack_event(sample_event(mask="inline"), mask), wire.pack_event(sample_event(mask="none"), None)]
    return [[bytes(part) for part in message] for message in (*found, wire.pack_head(told))]


def _feed_published(parts: Parts) -> object:
    """What a subscriber hears; an event that is accepted is the same event when it is sent on."""
    found = wire.parse_published(parts)
    if isinstance(found, wire.Head):
        return found
    event, mask = found
    again = wire.parse_published([bytes(part) for part in wire.pack_event(event, mask)])
    assert again == (event, mask)
    if mask is not None:
        try:
            images.decode_image(mask, channels=1, max_pixels=4096)
        except ImageRefused:
            return event
    return event


def _feed_event(parts: Parts) -> object:
    return wire.decode_event(parts[0] if parts else b"")


def _feed_credit(parts: Parts) -> object:
    state = wire.parse_credit(parts)
    assert state.acked_through >= -1 and 0 <= state.window <= 65536
    return state


def _requests() -> list[Parts]:
    asked = [wire.ReplayRequest(1, 4, 5, 9, 16, 4096), wire.CursorRequest(1, 5, "dash", 5, 9, "now")]
    return [[bytes(part) for part in wire.pack_message(request)] for request in asked]


def _feed_request(parts: Parts) -> object:
    """What the log is asked for is bounded, and a cursor's name is one."""
    found = wire.parse_request(parts)
    if isinstance(found, wire.ReplayRequest):
        assert 1 <= found.limit <= wire.MAX_REPLAY_EVENTS and 1 <= found.max_bytes <= wire.MAX_REPLAY_BYTES
    else:
        assert wire.NAME.fullmatch(found.name)
    return found


def _answers() -> list[Parts]:
    mask = images.encode_mask_png(np.eye(9, dtype=np.bool_))
    events = [(sample_event(number, log_epoch=5, log_sequence=number), mask) for number in (7, 8)]
    header = wire.ReplayHeader(1, 4, 5, 9, len(events), wire.Gap(3, 6))
    told = [wire.CursorState(1, 5, "dash", 5, 9, 12), wire.Refused(1, 5, "log", "disk full")]
    messages = [wire.pack_replay(header, events), *(wire.pack_message(answer) for answer in told)]
    return [[bytes(part) for part in message] for message in messages]


def _feed_answer(parts: Parts) -> object:
    """Events that are accepted are as many as was said, and follow each other."""
    found = wire.parse_answer(parts)
    if isinstance(found, tuple):
        header, events = found
        assert header.count == len(events)
        numbers = [event.log_sequence for event, _ in events]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
    return found


def _manifest_of(path: Path) -> bytes:
    return (path / bundle.MANIFEST).read_bytes()


def _feed_manifest(parts: Parts) -> object:
    """A manifest that is accepted names files inside the bundle only, none of them larger than its cap."""
    manifest = bundle._parse_manifest(parts[0] if parts else b"", Path("fuzzed"))
    for name, digest in manifest.files.items():
        assert not name.startswith("/") and ".." not in name.split("/")
        assert 0 <= digest.size <= 512 << 20
    assert manifest.input.height * manifest.input.width <= 1 << 28
    return manifest


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited field of a protocol buffer, for payloads below 128 bytes."""
    return bytes([number << 3 | 2, len(payload)]) + payload


def _model() -> bytes:
    """A graph with an initializer, and a node whose attribute holds a tensor."""
    tensor = b"\x08\x04\x10\x01" + _field(8, b"w") + _field(9, bytes(16)) + b"\x70\x00"
    node = _field(1, b"a") + _field(4, b"Constant") + _field(5, _field(1, b"value") + _field(5, tensor))
    return b"\x08\x09" + _field(7, _field(1, node) + _field(2, b"g") + _field(5, tensor))


def _feed_model(parts: Parts) -> object:
    model_file.require_self_contained(parts[0] if parts else b"", "fuzzed")
    return None


def _feed_array(parts: Parts) -> object:
    """An array that is accepted is made of the file's own bytes."""
    data = parts[0] if parts else b""
    found = bundle_files.parse_array(data, np.dtype(np.uint8), (None, 3, None), "fuzzed")
    assert found.nbytes <= len(data) and not found.flags.writeable
    return found


def _feed_calibration(parts: Parts) -> object:
    found = bundle._parse_json(parts[0] if parts else b"", bundle.ScoreCalibration, Path("fuzzed"))
    bundle._require_sane_calibration(Path("fuzzed"), found)
    assert list(found.scores) == sorted(found.scores) and all(np.isfinite(found.scores))
    return found


def _feed_image(parts: Parts) -> object:
    found = images.decode_image(parts[0] if parts else b"", max_pixels=4096)
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[0] * found.shape[1] <= 4096
    return found


def _pictures() -> list[Parts]:
    random_pixels = np.random.default_rng(3).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    found = []
    for suffix in (".png", ".jpg", ".bmp", ".tiff"):
        for picture in (random_pixels, random_pixels[:, :, 0]):
            found.append([images.cv2.imencode(suffix, picture)[1].tobytes()])
    return found


class SignedBundle:
    """Digests with their signature; whatever else is accepted must bear the same signature."""

    def __init__(self) -> None:
        from edge import keys

        with tempfile.TemporaryDirectory() as name:
            secret, _ = keys.make_pair("signing", "fuzz", Path(name) / "keys")
            self.files = {"bundle.json": ("a" * 64, 7), "model.onnx": ("b" * 64, 8)}
            self.data = signature.sign(self.files, secret)
        self.truth = json.loads(self.data)

    def feed(self, parts: Parts) -> object:
        data = parts[0] if parts else b""
        found = signature.check_signature(data, self.files, "fuzzed")
        assert found == self.truth["public_key"] and json.loads(data)["signature"] == self.truth["signature"]
        return found


def targets(directory: Path) -> list[Target]:
    """Every parser; `directory` is any bundle, whose files are where the damage starts."""
    signed = SignedBundle()
    array = bundle_files.array_bytes(np.arange(12, dtype=np.uint8).reshape(2, 3, 2))
    credit = [bytes(part) for part in wire.pack_credit(wire.CreditState(1, "cam1", 7, 40, (42, 43), 8))]
    event = [wire.encode_event(sample_event(mask="none"))]
    wired = (WireError,)
    return [
        Target("camera message", _frame_messages(), _feed_frame, wired),
        Target("frame", _frame_messages(), _feed_whole_frame, wired),
        Target("published", _events(), _feed_published, wired),
        Target("logged event", [event], _feed_event, wired),
        Target("credit", [credit], _feed_credit, wired),
        Target("replay request", _requests(), _feed_request, wired),
        Target("replay answer", _answers(), _feed_answer, wired),
        Target("manifest", [[_manifest_of(directory)]], _feed_manifest, (BundleError,)),
        Target("model", [[_model()]], _feed_model, (BundleError,)),
        Target("array", [[array]], _feed_array, (BundleError,)),
        Target("calibration", [[(directory / bundle.CALIBRATION).read_bytes()]], _feed_calibration, (BundleError,)),
        Target("signature", [[signed.data]], signed.feed, (BundleError, ConfigError)),
        Target("picture", _pictures(), _feed_image, (ImageRefused,)),
    ]


# --- many -------------------------------------------------------------------------------------------------------------


def run(target: Target, inputs: int, seed: int) -> Counter[str]:
    """Feed `inputs` damaged inputs; the same seed gives the same ones.

    Raises:
        Finding: see `check`.
    """
    source = random.Random(f"{seed} {target.name}")
    return Counter(check(target, damaged(source, target.seeds)) for _ in range(inputs))


def main() -> int:
    """`make fuzz`: all targets, one JSON line each; exit status 1 at the first finding."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--inputs", type=int, default=1_100_000, help="over all targets")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--bundle", type=Path, default=Path(__file__).parents[2] / "edge/demo/bundle")
    options = parser.parse_args()
    # A parser that believes a length asks for more than this, and the MemoryError is a finding.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libjpeg and libpng comment on every damaged picture
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    chosen = targets(options.bundle)
    total = 0
    for target in chosen:
        started = time.perf_counter()
        try:
            found = run(target, options.inputs // len(chosen), options.seed)
        except Finding as finding:
            print(json.dumps({"target": target.name, "seed": options.seed, "finding": str(finding)}), flush=True)
            return 1
        total += found.total()
        facts: dict[str, Any] = {"target": target.name, "seed": options.seed, "inputs": found.total()}
        facts["seconds"] = round(time.perf_counter() - started, 1)
        print(json.dumps({**facts, "outcomes": dict(found.most_common())}), flush=True)
    print(json.dumps({"inputs": total, "findings": 0}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
