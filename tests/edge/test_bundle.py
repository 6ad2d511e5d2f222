"""A bundle is written once and believed only as far as it was hashed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

import edge.bundle
from edge.bundle import (
    Golden,
    InputSpec,
    ModelBundle,
    Tolerance,
    canonical_json,
    check_golden,
    derive_bundle,
    open_bundle,
)
from edge.bundle_files import array_bytes, parse_array, sha256_hex
from edge.errors import BundleError, ParityError

MakeBundle = Callable[..., ModelBundle]


@pytest.fixture
def copy(tiny_bundle: ModelBundle, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy"))


def rewrite_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """What an attacker without the signature's key can do: edit bundle.json."""
    manifest = msgspec.json.decode((bundle / "bundle.json").read_bytes())
    change(manifest)
    (bundle / "bundle.json").write_bytes(msgspec.json.encode(manifest))


def replace_file(bundle: Path, name: str, data: bytes) -> None:
    """Replace a file and list its new digest, so that only its content can be refused."""
    (bundle / name).write_bytes(data)
    entry = {"sha256": sha256_hex(data), "size": len(data)}
    rewrite_manifest(bundle, lambda manifest: manifest["files"].__setitem__(name, entry))


def test_what_was_written_is_what_is_opened(tiny_bundle: ModelBundle) -> None:
    """Every part of a bundle survives the way through the disk, and the arrays cannot be written to."""
    opened = open_bundle(tiny_bundle.path)

    assert opened.model_id == tiny_bundle.model_id == sha256_hex((tiny_bundle.path / "bundle.json").read_bytes())
    assert (opened.manifest, opened.calibration) == (tiny_bundle.manifest, tiny_bundle.calibration)
    assert opened.model == tiny_bundle.model and opened.provenance == tiny_bundle.provenance
    np.testing.assert_array_equal(opened.golden.maps, tiny_bundle.golden.maps)
    assert not opened.golden.frames.flags.writeable


def test_the_same_content_gives_the_same_model_id(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The identity is of the content alone: not of the path, the order of provenance, or (if told) the time."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first = make_bundle(tmp_path / "a", created_ns=None, provenance={"a": 1, "b": [0.1, None]})
    second = make_bundle(tmp_path / "b", created_ns=None, provenance={"b": [0.1, None], "a": 1})

    assert first.model_id == second.model_id
    assert make_bundle(tmp_path / "c", created_ns=1).model_id != first.model_id


@pytest.mark.parametrize("name", ["model.onnx", "golden/maps.npy", "calibration.json", "report/page.html"])
def test_one_changed_byte_in_any_file_is_found_and_named(make_bundle: MakeBundle, tmp_path: Path, name: str) -> None:
    """A flipped bit anywhere, even in a report nobody computes with, refuses the bundle."""
    path = make_bundle(tmp_path / "b", report={"page.html": b"<p>fine</p>"}).path
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)

    with pytest.raises(BundleError, match=rf"{name} was changed.*kizu verify"):
        open_bundle(path)


def test_control_without_the_digest_check_the_changed_byte_would_pass(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above has teeth: with hashing broken, the same damage is accepted."""
    text = (copy / "calibration.json").read_bytes()
    (copy / "calibration.json").write_bytes(text.replace(b'"threshold": 2', b'"threshold": 9'))
    digests = iter(
        [
            entry["sha256"]
            for _, entry in sorted(msgspec.json.decode((copy / "bundle.json").read_bytes())["files"].items())
        ]
    )
    monkeypatch.setattr(edge.bundle, "sha256_hex", lambda data: next(digests, ""))

    assert open_bundle(copy).calibration.threshold == 9.0


def test_a_missing_file_is_named(copy: Path) -> None:
    """Half a copy is not a bundle."""
    (copy / "golden" / "scores.npy").unlink()

    with pytest.raises(BundleError, match=r"lacks golden/scores\.npy"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["extra.bin", "golden/extra.npy", "report"])
def test_a_file_that_no_digest_covers_is_refused(copy: Path, name: str) -> None:
    """ONNX Runtime and others look for files beside a model; nothing lies there unseen."""
    (copy / name).write_bytes(b"?")

    with pytest.raises(BundleError, match=rf"holds '{name}'.*remove it"):
        open_bundle(copy)


def test_a_signature_may_lie_beside_the_manifest_but_must_be_one(copy: Path) -> None:
    """signature.json signs the manifest, so the manifest cannot list it."""
    (copy / "signature.json").write_bytes(b"{}")

    with pytest.raises(BundleError, match="is no signature"):
        open_bundle(copy)


def test_links_are_refused_for_files_and_for_folders(copy: Path, tmp_path: Path) -> None:
    """A link could lead to bytes that change between two looks."""
    elsewhere = tmp_path / "model.onnx"
    shutil.move(copy / "model.onnx", elsewhere)
    (copy / "model.onnx").symlink_to(elsewhere)
    with pytest.raises(BundleError, match="symbolic link"):
        open_bundle(copy)

    (copy / "model.onnx").unlink()
    shutil.move(elsewhere, copy / "model.onnx")
    shutil.move(copy / "golden", tmp_path / "golden")
    (copy / "golden").symlink_to(tmp_path / "golden")
    with pytest.raises(BundleError, match="golden"):
        open_bundle(copy)


def test_a_pipe_instead_of_a_file_does_not_hang(copy: Path) -> None:
    """Opening a FIFO waits for a writer that never comes; it is refused instead."""
    (copy / "model.onnx").unlink()
    os.mkfifo(copy / "model.onnx")

    with pytest.raises(BundleError, match="not a regular file"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "report/../../x", "report//x", "report/.", "a\\b", "x"])
def test_a_listed_path_must_be_plain(copy: Path, name: str) -> None:
    """The manifest cannot name what is not inside the bundle."""
    rewrite_manifest(copy, lambda manifest: manifest["files"].__setitem__(name, {"sha256": "0" * 64, "size": 1}))

    with pytest.raises(BundleError, match="lists"):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(schema_version=2), "upgrade kizu"),
        (lambda manifest: manifest.update(schema_version=0), "make the bundle again"),
        (lambda manifest: manifest.update(surprise=1), "surprise"),
        (lambda manifest: manifest["files"].pop("model.onnx"), "does not list model.onnx"),
        (lambda manifest: manifest["files"]["model.onnx"].update(size=1 << 40), "model.onnx"),
        (lambda manifest: manifest["input"].update(height=0), "input 0 x 32"),
        (lambda manifest: manifest["map"].update(stride=-1.0), "stride -1"),
        (lambda manifest: manifest["map"].update(rim_px=-1), "rim of -1 px"),
        (lambda manifest: (manifest["input"].update(fit="tile"), manifest["map"].update(stride=2.5)), "whole strides"),
        (
            lambda manifest: (manifest["input"].update(fit="tile"), manifest["map"].update(reduction="top-q")),
            "reduction max or mean",
        ),
        (lambda manifest: manifest["tolerance"].update(absolute=0.0), "tolerance"),
        (lambda manifest: manifest["input"].update(channels=2), "channels"),
        (lambda manifest: manifest["map"].update(height=15), "maps.npy"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    """Each refusal names what is wrong; a newer schema says that kizu is too old."""
    rewrite_manifest(copy, change)

    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


def test_a_bundle_written_before_maps_had_a_rim_still_opens(copy: Path) -> None:
    """New fields come at the end and with defaults; what is meant is a graph without padding."""
    rewrite_manifest(copy, lambda manifest: manifest["map"].pop("rim_px"))

    assert open_bundle(copy).manifest.map.rim_px == 0


def test_a_manifest_that_is_no_json_or_too_long_is_refused(copy: Path, tmp_path: Path) -> None:
    """bundle.json is the only file read before a digest is known, so its size is capped."""
    (copy / "bundle.json").write_bytes(b"[" * 100_000)
    with pytest.raises(BundleError, match="not as expected"):
        open_bundle(copy)

    (copy / "bundle.json").write_bytes(b" " * (edge.bundle.MAX_MANIFEST_BYTES + 1))
    with pytest.raises(BundleError, match="at most"):
        open_bundle(copy)
    with pytest.raises(BundleError, match="does not exist"):
        open_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 14, 14), np.float64), "float64"),
        (np.zeros((3, 14, 15), np.float32), "expected float32"),
        (np.full((3, 14, 14), np.nan, np.float32), "finite"),
    ],
)
def test_golden_maps_must_be_what_the_manifest_says(copy: Path, array: NDArray[Any], message: str) -> None:
    """Right digest, wrong array: another dtype, another shape, not finite."""
    replace_file(copy, "golden/maps.npy", array_bytes(array))

    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


def test_an_array_file_is_never_unpickled_and_its_header_never_believed() -> None:
    """Object arrays, lengths beyond the file, other format versions and plain garbage are refused."""
    f32 = np.dtype("<f4")
    good = array_bytes(np.zeros((2, 3), np.float32))
    huge = good.replace(b"(2, 3)", b"(2, 4)")
    cases = [
        huge,
        good[:-1],
        good + b"\0",
        b"PK\x03\x04",
        b"",
        good[:6] + b"\x03\x00" + good[8:],
        good.replace(b"'<f4'", b"'|O' "),
    ]

    parsed = parse_array(good, f32, (None, 3), "x.npy")
    assert parsed.shape == (2, 3) and not parsed.flags.writeable
    for data in cases:
        with pytest.raises(BundleError, match=r"x\.npy"):
            parse_array(data, f32, (None, None), "x.npy")


@pytest.mark.parametrize(
    "change",
    [{"threshold": None}, {"scores": [2.0, 1.0]}, {"kind": "guessed"}, {"min_area_px": -1}, {"unknown": 1}],
)
def test_a_calibration_that_cannot_be_is_refused(copy: Path, change: dict[str, Any]) -> None:
    """Thresholds decide about parts: not finite, out of order or of unknown kind is no calibration."""
    calibration = msgspec.json.decode((copy / "calibration.json").read_bytes())
    replace_file(copy, "calibration.json", msgspec.json.encode({**calibration, **change}))

    with pytest.raises(BundleError, match="calibration"):
        open_bundle(copy)


def test_an_existing_path_is_never_overwritten(make_bundle: MakeBundle, copy: Path) -> None:
    """A verdict names its model; what that name means must not change."""
    before = (copy / "bundle.json").read_bytes()

    with pytest.raises(BundleError, match="exists"):
        make_bundle(copy, name="other")
    assert (copy / "bundle.json").read_bytes() == before


def test_a_write_that_fails_leaves_nothing(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the middle: no half bundle under the name, no rest beside it."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(BundleError, match="No space left"):
        make_bundle(tmp_path / "b")

    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_opened_is_not_written(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """The writer checks what the reader checks: frames of another size, NaN in provenance, a report that escapes."""
    wrong = Golden(np.zeros((1, 8, 8, 1), np.uint8), np.zeros((1, 14, 14), np.float32), np.zeros(1, np.float32))

    for change in ({"golden": wrong}, {"provenance": {"when": object()}}, {"report": {"../up": b""}}):
        with pytest.raises(BundleError):
            make_bundle(tmp_path / "b", **change)
    assert list(tmp_path.iterdir()) == []


def test_a_derived_bundle_is_the_same_model_under_other_thresholds(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """`kizu calibrate` writes a new bundle with its own model_id, whose provenance leads back to the first."""
    source = make_bundle(tmp_path / "a", report={"page.html": b"<p>fine</p>"})
    calibration = msgspec.structs.replace(source.calibration, threshold=3.0, certified=True)

    child = derive_bundle(source, tmp_path / "b", calibration=calibration, provenance_extra={"line": "door"})
    grandchild = derive_bundle(child, tmp_path / "c", calibration=source.calibration, provenance_extra={})

    opened = open_bundle(tmp_path / "b")
    assert opened.calibration.threshold == 3.0 and opened.model == source.model
    assert opened.provenance == {**source.provenance, "line": "door", "derived_from": [source.model_id]}
    assert grandchild.provenance["derived_from"] == [source.model_id, child.model_id]
    assert (tmp_path / "b" / "report" / "page.html").read_bytes() == b"<p>fine</p>"
    assert len({source.model_id, child.model_id, grandchild.model_id}) == 3


def test_deriving_from_a_bundle_that_changed_since_is_refused(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """Reports are read again to be copied, so their digests are checked again."""
    source = make_bundle(tmp_path / "a", report={"page.html": b"<p>fine</p>"})
    (tmp_path / "a" / "report" / "page.html").write_bytes(b"<p>FINE</p>")

    with pytest.raises(BundleError, match="was changed"):
        derive_bundle(source, tmp_path / "b", calibration=source.calibration, provenance_extra={})


class Echo:
    """Answers golden frames with the expected maps plus an error."""

    def __init__(self, golden: Golden, error: float, score_error: float = 0.0) -> None:
        self._golden, self._error, self._score_error, self._at = golden, error, score_error, 0

    def infer(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        at = self._at
        self._at += 1
        maps = self._golden.maps[at : at + 1] + np.float32(self._error)
        return maps, self._golden.scores[at : at + 1] + np.float32(self._score_error)


def test_the_golden_check_says_how_much_of_the_tolerance_is_used(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """Half the tolerance passes, and so it says; just over fails, and `require` raises."""
    bundle = make_bundle(tmp_path / "b", tolerance=Tolerance(absolute=0.5, relative=0.0))

    inside = check_golden(bundle, Echo(bundle.golden, 0.25), require=True)
    outside = check_golden(bundle, Echo(bundle.golden, 0.51))

    assert inside.ok and inside.frames == 3
    assert inside.max_abs == pytest.approx(0.25) and inside.max_rel_of_tolerance == pytest.approx(0.5)
    assert not outside.ok
    with pytest.raises(ParityError, match="times the tolerance"):
        check_golden(bundle, Echo(bundle.golden, 0.51), require=True)


@pytest.mark.parametrize(("error", "score_error"), [(np.nan, 0.0), (np.inf, 0.0), (0.0, np.nan), (0.0, 1.0)])
def test_no_answer_that_is_not_finite_or_not_scored_right_passes(
    tiny_bundle: ModelBundle, error: float, score_error: float
) -> None:
    """NaN compares false with every limit; a check written the careless way would let it pass."""
    assert not check_golden(tiny_bundle, Echo(tiny_bundle.golden, error, score_error)).ok


def test_canonical_json_is_sorted_and_refuses_what_it_cannot_say() -> None:
    """One text for one value."""
    assert canonical_json({"b": 1, "a": InputSpec(1, 2, 3, 4)}) == canonical_json({"a": InputSpec(1, 2, 3, 4), "b": 1})
    assert canonical_json({"b": 0.1, "a": 1}) == b'{\n  "a": 1,\n  "b": 0.1\n}\n'
    with pytest.raises(BundleError, match="JSON"):
        canonical_json({"x": object()})
