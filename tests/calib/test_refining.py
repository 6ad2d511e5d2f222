"""Acceptance of a bundle that looks coarsely first: thresholds from dense scores, figures from what a line will do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.certificate import certify
from calib.collect import collect
from calib.evaluate_command import evaluate
from edge.bundle import InputSpec, ModelBundle, open_bundle
from edge.engines.registry import open_engine
from refining import refining_bundle

TILED = InputSpec(32, 32, 1, max_batch=4, fit="tile", min_side_px=8)
MakeBundle = Callable[..., ModelBundle]


def scores_of(bundle: ModelBundle, paths: list[Path], refine: bool) -> list[float]:
    with open_engine(bundle, max_batch=1, refine=refine) as engine:
        return [float(one.verdict.score or 0) for one in collect(bundle, engine, paths)]


def test_a_threshold_is_certified_on_dense_scores(
    make_bundle: MakeBundle, good_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Scores from a coarse look are lower, and a new gate could refine what the sample's did not: the promise of the
    dense ones holds for both. The derived bundle looks coarsely under its new gate."""
    bundle = refining_bundle(make_bundle, tmp_path / "bundle", threshold=100.0, margin=0.01)
    folder = good_folder(60)
    paths = sorted(folder.iterdir())

    certify(bundle, folder, tmp_path / "certified", false_rejects=0.05, confidence=0.95)

    derived = open_bundle(tmp_path / "certified")
    np.testing.assert_allclose(derived.calibration.scores, sorted(scores_of(bundle, paths, refine=False)), rtol=1e-6)
    assert sum(scores_of(bundle, paths, refine=True)) < sum(derived.calibration.scores)  # control: not the same
    assert derived.coarse == bundle.coarse and derived.manifest.refine == bundle.manifest.refine
    rejected = sum(score > derived.calibration.threshold for score in scores_of(derived, paths, refine=True))
    assert rejected <= sum(score > derived.calibration.threshold for score in derived.calibration.scores)


@pytest.mark.parametrize("options", [[], ["--no-refine"]])
def test_an_evaluation_counts_the_tiles_it_refined(
    make_bundle: MakeBundle,
    invoke: Callable[..., Any],
    test_folder: Path,
    tmp_path: Path,
    options: list[str],
) -> None:
    """As a line would do it, and with the switch densely; the white holes are found either way."""
    bundle = refining_bundle(make_bundle, tmp_path / "bundle", threshold=1.0, margin=0.5, input=TILED)

    result = invoke(
        evaluate, bundle.path, "--data", test_folder, "--json", tmp_path / "out.json", *options, "--skip-bad-images"
    )

    found = json.loads((tmp_path / "out.json").read_text())
    assert found["kinds"]["hole"]["escapes"] == 0 == found["false_rejects"]
    if options:
        assert found["tiles"] is None and found["tiles_refined"] is None and "refined" not in result.stdout
    else:
        assert 0 < found["tiles_refined"] < found["tiles"]
        assert f"refined        {found['tiles_refined']} of {found['tiles']} tiles" in result.stdout
