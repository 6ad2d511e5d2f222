"""A bundle with a coarse graph: hashed and checked as the dense one, and refused by name where the two do not agree."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge.bundle import ModelBundle, check_golden, coarse_bundle, derive_bundle, open_bundle
from edge.bundle_files import sha256_hex
from edge.engines.registry import open_engine
from edge.errors import BundleError, ParityError
from refining import TINY_COARSE, coarse_model, refine_of, refining_bundle

MakeBundle = Callable[..., ModelBundle]
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def bundle(make_bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """Threshold 2, margin 0.5."""
    return refining_bundle(make_bundle, tmp_path_factory.mktemp("coarse") / "bundle", threshold=2.0, margin=0.5)


@pytest.fixture
def copy(bundle: ModelBundle, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundle.path, tmp_path / "copy"))


def rewrite_manifest(path: Path, change: Change) -> None:
    manifest = msgspec.json.decode((path / "bundle.json").read_bytes())
    change(manifest)
    (path / "bundle.json").write_bytes(msgspec.json.encode(manifest))


def test_what_was_written_is_what_is_opened(bundle: ModelBundle) -> None:
    """Both graphs and what the margin stands on."""
    opened = open_bundle(bundle.path)

    assert opened.coarse == bundle.coarse and opened.coarse != opened.model
    assert opened.manifest.refine == refine_of(0.5)
    assert "coarse.onnx" in opened.manifest.files


def test_a_bundle_written_before_there_was_a_coarse_graph_still_opens(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    """The field comes last and with a default."""
    old = Path(shutil.copytree(tiny_bundle.path, tmp_path / "old"))
    rewrite_manifest(old, lambda manifest: manifest.pop("refine"))

    opened = open_bundle(old)

    assert opened.manifest.refine is None and opened.coarse is None
    with pytest.raises(BundleError, match="has no coarse"):
        coarse_bundle(opened)


def test_one_changed_byte_or_a_missing_file_is_found_and_named(copy: Path) -> None:
    """As for every other file."""
    data = bytearray((copy / "coarse.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "coarse.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"coarse\.onnx was changed"):
        open_bundle(copy)

    (copy / "coarse.onnx").unlink()
    with pytest.raises(BundleError, match=r"lacks coarse\.onnx"):
        open_bundle(copy)


def test_the_coarse_graph_keeps_no_tensor_in_another_file(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """A digest would not cover it."""
    model = onnx.load_from_string(coarse_model(make_bundle(tmp_path / "plain").model))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")

    with pytest.raises(BundleError, match=r"coarse\.onnx.*external data"):
        make_bundle(tmp_path / "b", coarse=model.SerializeToString(), refine=refine_of(0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(refine=None), r"lists coarse\.onnx but does not say"),
        (lambda manifest: manifest["files"].pop("coarse.onnx"), r"refine but does not list coarse\.onnx"),
        (lambda manifest: manifest["files"]["coarse.onnx"].update(size=1 << 40), r"coarse\.onnx"),
        (lambda manifest: manifest["refine"].update(margin=-0.1), "margin of -0.1"),
        (lambda manifest: manifest["refine"].update(rate=0.0), "rate of 0.0"),
        (lambda manifest: manifest["refine"].update(confidence=1.0), "confidence 1.0"),
        (lambda manifest: manifest["refine"].update(rank=2996), "rank 2996 among 2995"),
        (lambda manifest: manifest["refine"].update(rank=0), "rank 0"),
        (lambda manifest: manifest["refine"].update(surprise=1), "surprise"),
        (lambda manifest: manifest["refine"]["map"].update(stride=5.0), "coarse stride of 5.0"),
        (lambda manifest: manifest["refine"]["map"].update(stride=2.0), "coarse stride of 2.0"),
        (lambda manifest: manifest["refine"]["map"].update(height=8), "coarse map"),
        (lambda manifest: manifest["refine"]["map"].update(offset_x=3.0), "coarse map"),
        (lambda manifest: manifest["refine"]["map"].update(rim_px=1), "coarse map"),
        (lambda manifest: manifest["map"].update(reduction="mean"), "reduction is 'mean'"),
    ],
)
def test_a_coarse_graph_that_cannot_belong_to_the_dense_one_is_refused(
    copy: Path, change: Change, message: str
) -> None:
    """Both or neither, and the coarse cells are every k-th of the dense ones."""
    rewrite_manifest(copy, change)

    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


def test_a_derived_bundle_keeps_the_coarse_graph_and_its_gate_follows_the_threshold(
    bundle: ModelBundle, tmp_path: Path
) -> None:
    """`kizu calibrate` moves the threshold; the margin is of the networks and stays."""
    moved = msgspec.structs.replace(bundle.calibration, threshold=3.0, pixel_threshold=2.75)

    derive_bundle(bundle, tmp_path / "derived", calibration=moved, provenance_extra={})

    opened = open_bundle(tmp_path / "derived")
    assert opened.coarse == bundle.coarse and opened.manifest.refine == bundle.manifest.refine
    assert opened.manifest.refine is not None
    assert opened.manifest.refine.gate(opened.calibration) == 2.25  # of the lower threshold: no pixel is missed either


def test_the_coarse_graph_is_a_bundle_of_its_own_whose_golden_answers_are_there_already(bundle: ModelBundle) -> None:
    """Every second cell of the dense ones; both backends give them."""
    coarse = coarse_bundle(bundle)

    assert coarse.manifest.map == TINY_COARSE and coarse.manifest.refine is None
    np.testing.assert_array_equal(coarse.golden.maps, bundle.golden.maps[:, ::2, ::2])
    for backend in ("openvino", "onnxruntime"):
        with open_engine(coarse, backend=backend) as engine:
            assert check_golden(coarse, engine, require=True).max_abs < 1e-4


def test_the_golden_check_looks_at_both_graphs(make_bundle: MakeBundle, bundle: ModelBundle, tmp_path: Path) -> None:
    """Planted bug: a coarse graph whose weights are one percent off would skip tiles that matter; it is found."""
    assert bundle.coarse is not None
    model = onnx.load_from_string(bundle.coarse)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(0.99), "weight"))
    wrong = make_bundle(tmp_path / "wrong", coarse=model.SerializeToString(), refine=refine_of(0.5))

    with open_engine(bundle) as engine:
        assert check_golden(bundle, engine, require=True).ok
    with open_engine(wrong) as engine:
        assert not check_golden(wrong, engine).ok
        with pytest.raises(ParityError, match=r"coarse\.onnx"):
            check_golden(wrong, engine, require=True)
    with open_engine(wrong, refine=False) as engine:  # control: the dense graph is right
        assert check_golden(wrong, engine).ok


def test_the_size_and_digest_of_the_coarse_graph_are_in_the_identity(bundle: ModelBundle) -> None:
    """Another coarse graph is another model."""
    assert bundle.coarse is not None
    assert bundle.manifest.files["coarse.onnx"].sha256 == sha256_hex(bundle.coarse)
