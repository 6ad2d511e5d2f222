"""Good images must not peak at the rim: padded borders once made nearly every good image do so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edge.demo
from edge.bundle import ModelBundle, open_bundle
from edge.engines.registry import open_engine
from edge.images import read_image
from edge.stages.infer import map_roi
from edge.stages.preprocess import prepare
from edge.stages.segment import render_map
from edge.types import AnomalyMap, FrameId, Roi

DEMO = Path(next(iter(edge.demo.__path__)))
BAND_PX = 8


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    if not (DEMO / "bundle").is_dir():
        pytest.skip("the demo bundle is not made yet: `make demo-train` makes one")
    return open_bundle(DEMO / "bundle")


@pytest.fixture(scope="module")
def maps(bundle: ModelBundle) -> NDArray[np.float32]:
    """Maps of every good photograph that the demo bundle did not learn from."""
    data, photos = bundle.provenance["data"], DEMO / "photos"
    names = sorted({*data["statistics"], *data["threshold"]})
    paths = [photos / "train" / "good" / name for name in names] + sorted((photos / "test" / "good").iterdir())
    frames = [prepare(read_image(path, bundle.manifest.input.channels), bundle.manifest.input)[0] for path in paths]
    with open_engine(bundle) as engine:
        return np.concatenate([engine.infer(frame[None])[0] for frame in frames])


def share_at_rim(maps: NDArray[np.float32], bundle: ModelBundle) -> float:
    """Share of maps whose largest value, rendered at the model's size, lies within BAND_PX of the rim."""
    spec = bundle.manifest.input
    whole = Roi(0, 0, spec.width, spec.height)
    roi = map_roi(whole, spec, bundle.manifest.map)
    hits = 0
    for scores in maps:
        found = AnomalyMap(FrameId("demo", 0, 0, 0), scores.copy(), float(scores.max()), roi, whole)
        rendered = render_map(found, (spec.height, spec.width))
        y, x = np.unravel_index(int(rendered.argmax()), rendered.shape)
        hits += int(min(y, x, spec.height - 1 - y, spec.width - 1 - x) < BAND_PX)
    return hits / len(maps)


def band_share(bundle: ModelBundle) -> float:
    spec = bundle.manifest.input
    return 1 - (1 - 2 * BAND_PX / spec.height) * (1 - 2 * BAND_PX / spec.width)


def test_good_images_of_the_demo_do_not_peak_at_the_rim(bundle: ModelBundle, maps: NDArray[np.float32]) -> None:
    """At most one and a half times what chance would put there."""
    assert len(maps) >= 6
    assert share_at_rim(maps, bundle) <= 1.5 * band_share(bundle)


def test_a_model_that_trips_over_its_own_border_is_caught(bundle: ModelBundle, maps: NDArray[np.float32]) -> None:
    """Planted bug: the outermost cells score higher, as they do when layers pad with zeros."""
    padded = maps.copy()
    padded[:, 0, :] += 100

    assert share_at_rim(padded, bundle) > 1.5 * band_share(bundle)
