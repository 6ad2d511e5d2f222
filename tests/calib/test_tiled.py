"""Images larger than the model in acceptance: evaluated, calibrated and rendered at their own resolution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from calib.certificate import certify
from calib.collect import collect
from calib.dataset import read_stored_image
from calib.evaluation import evaluate_bundle
from edge.bundle import InputSpec, ModelBundle, open_bundle
from edge.config import EngineConfig
from edge.engines.fake import FakeEngine, spec_of
from edge.errors import BundleError, DataError, EngineError
from edge.protocols import EngineSpec
from edge.types import Decision

TILED = InputSpec(32, 32, 1, max_batch=4, fit="tile", min_side_px=8)


@pytest.fixture
def bundle(make_fake_bundle: Callable[..., ModelBundle], tmp_path: Path) -> ModelBundle:
    """The fake's bundle of 32 x 32 px, for frames of any size; the pictures are 96 wide and 64 to 96 high."""
    return make_fake_bundle(tmp_path / "bundle", input=TILED)


@pytest.fixture
def paths(test_folder: Path) -> list[Path]:
    return sorted((test_folder / "test" / "hole").iterdir()) + sorted((test_folder / "test" / "good").iterdir())[:4]


@pytest.mark.parametrize("depth", [1, 3])
def test_scores_and_maps_are_those_of_the_whole_images(bundle: ModelBundle, paths: list[Path], depth: int) -> None:
    """The fake sees 2 x 2 px, so on a whole image it is the same network; tiles of two images are in flight at once."""
    with FakeEngine(spec_of(bundle.manifest, depth=depth)) as engine:
        found = list(collect(bundle, engine, paths))

    assert [one.path for one in found] == paths
    for one in found:
        image = read_stored_image(one.path)
        height, width = image.shape[:2]
        with FakeEngine(EngineSpec("fake", "1", "cpu", height, width, 1, height // 2, width // 2, 1, 1)) as whole:
            maps, scores = whole.infer(image[None])
        assert one.anomaly_map is not None
        np.testing.assert_array_equal(one.anomaly_map.scores, maps[0])
        assert one.verdict.score == scores[0] and one.verdict.frame_size == (height, width)


def test_bad_files_keep_their_place_among_tiled_ones(bundle: ModelBundle, test_folder: Path) -> None:
    """INCONCLUSIVE in the order of the files, or refused by name."""
    folder = test_folder / "test" / "good"
    (folder / "003.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    files = sorted(folder.iterdir())
    with FakeEngine(spec_of(bundle.manifest)) as engine:
        found = list(collect(bundle, engine, files, skip_bad=True))
    with FakeEngine(spec_of(bundle.manifest)) as engine, pytest.raises(DataError, match=r"003\.png"):
        list(collect(bundle, engine, files))

    assert [one.path for one in found] == files
    assert [one.path.name for one in found if one.verdict.decision is Decision.INCONCLUSIVE] == ["003.png"]


def test_a_fault_of_the_engine_in_one_tile_names_the_image(bundle: ModelBundle, paths: list[Path]) -> None:
    """Each image has six or nine tiles of its own; the eighth batch is of the second image."""
    with (
        FakeEngine(spec_of(bundle.manifest), fail_tickets={7}) as engine,
        pytest.raises(EngineError, match=r"001\.png"),
    ):
        list(collect(bundle, engine, paths))


def test_a_large_image_is_evaluated_at_its_own_resolution(
    bundle: ModelBundle, test_folder: Path, tmp_path: Path
) -> None:
    """All figures, and maps of the images' size; the white squares are told from gray exactly."""
    found = evaluate_bundle(bundle, test_folder, through=EngineConfig("fake"), maps=tmp_path / "maps")

    assert found.image_auroc == 1.0 and found.pixel_auroc is not None and found.pixel_auroc > 0.99
    assert found.with_mask == 8 and found.inconclusive == 0
    assert tifffile.imread(tmp_path / "maps" / "test" / "hole" / "002.tiff").shape == (80, 96)


def test_a_tiled_bundle_is_certified_on_whole_images(
    bundle: ModelBundle, good_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """One score a part, however many tiles it takes; the derived bundle tiles too."""
    certificate = certify(
        bundle,
        good_folder(60),
        tmp_path / "certified",
        false_rejects=0.05,
        confidence=0.95,
        engine=EngineConfig("fake"),
    )
    derived = open_bundle(tmp_path / "certified")

    assert certificate.parts == len(derived.calibration.scores) == 60
    assert derived.manifest.input == TILED and derived.manifest.map == bundle.manifest.map


def test_a_map_that_cannot_be_put_together_is_refused_before_the_first_image(
    make_fake_bundle: Callable[..., ModelBundle], tmp_path: Path, paths: list[Path]
) -> None:
    """A smallest side that the network cannot judge."""
    bundle = make_fake_bundle(tmp_path / "wrong", input=InputSpec(32, 32, 1, 4, fit="tile", min_side_px=1))
    with FakeEngine(spec_of(bundle.manifest)) as engine, pytest.raises(BundleError, match="receptive field"):
        list(collect(bundle, engine, paths))
