"""DROCC on rows of numbers: the toy manifolds, limited negatives, and rows that teach nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from calib.metrics import image_auroc
from edge.errors import CommandError, DataError
from trainer.drocc_rows import Rows, RowsConfig, RowsModel, fit_rows

QUICK = RowsConfig(radius=0.4, gamma=1.5, ascent_steps=6, ascent_step=0.08, learning_rate=5e-3, epochs=80)


def auroc(model: RowsModel, good: Rows, bad: Rows) -> float:
    return image_auroc(model.scores(good).tolist(), model.scores(bad).tolist())


def helix(count: int, radius: float = 1.0, seed: int = 1) -> Rows:
    t = np.random.default_rng(seed).uniform(0, 4 * np.pi, count)
    return np.stack([radius * np.cos(t), radius * np.sin(t), t / 4], 1)


def test_a_helix_is_told_from_a_wider_one_and_only_because_of_the_adversary() -> None:
    """Features of three sizes, standardized inside; with mu next to 0 the network says good to everything."""
    good, bad = helix(300, seed=2), helix(300, 1.5, seed=3)

    model = fit_rows(helix(500), QUICK, seed=1)
    blind = fit_rows(helix(500), replace(QUICK, mu=1e-9, ascent_steps=0), seed=1)

    assert auroc(model, good, bad) > 0.85
    assert auroc(blind, good, bad) < 0.75


def test_bad_rows_make_their_side_of_the_manifold_worse_than_it_would_be() -> None:
    """DROCC-LF: 100 known bad rows beside 400 good ones; what they say cannot be found by an adversary alone."""
    random = np.random.default_rng(1)
    good, bad = random.normal(0, 1, (400, 4)), random.normal(0, 1, (400, 4)) + np.array([1.5, 0, 0, 0])
    fresh = random.normal(0, 1, (300, 4))
    config = replace(QUICK, radius=2.0, ascent_steps=4, ascent_step=0.2, epochs=30)

    limited = auroc(fit_rows(good, config, seed=1, bad=bad[:100]), fresh, bad[100:])
    without = auroc(fit_rows(good, config, seed=1), fresh, bad[100:])

    assert limited > without + 0.03


def test_rows_that_teach_nothing_are_refused_by_name() -> None:
    """Which row, which feature, what to do."""
    rows = helix(20)
    holed, constant = rows.copy(), rows.copy()
    holed[4, 2], constant[:, 1] = np.nan, 3.0
    model = fit_rows(rows, replace(QUICK, epochs=1), seed=1)

    with pytest.raises(DataError, match="row 4, feature 2 is nan"):
        fit_rows(holed, QUICK, seed=1)
    with pytest.raises(DataError, match="feature 1 is the same"):
        fit_rows(constant, QUICK, seed=1)
    with pytest.raises(DataError, match=r"expected \(n, 3\)"):
        model.scores(np.zeros((2, 4)))
    with pytest.raises(DataError, match="1 good rows"):
        fit_rows(rows[:1], QUICK, seed=1)


@pytest.mark.parametrize("changes", [{"radius": 0.0}, {"gamma": 0.5}, {"epochs": 0}, {"learning_rate": 0.0}])
def test_settings_out_of_range_are_refused(changes: dict[str, float]) -> None:
    """A radius of 0 is a shell that collapsed."""
    with pytest.raises(CommandError):
        replace(QUICK, **changes)  # type: ignore[arg-type]
