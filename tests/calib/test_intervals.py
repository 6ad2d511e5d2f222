"""Intervals: drawn by image, seeded, and as wide as the sample is small."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from calib import intervals
from calib.intervals import Interval, bootstrap_interval, image_auroc_interval, pixel_histograms, rate_interval
from calib.metrics import image_auroc, rank_pixels

RNG = np.random.default_rng(11)


def pictures(number: int, seed: int = 1) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """Half of the pictures good, half with a defect that scores higher by one deviation; one map has ties only."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for index in range(number):
        mask = np.zeros((40, 50), dtype=bool)
        if index % 2:
            y, x = rng.integers(0, 30, size=2)
            mask[y : y + rng.integers(2, 9), x : x + rng.integers(2, 9)] = True
        maps.append((rng.standard_normal(mask.shape) + rng.normal(0, 0.3) + 1.5 * mask).astype(np.float32))
        masks.append(mask if index % 2 else None)
    maps[0][:] = 0.5
    return maps, masks


def test_the_vectorized_bootstrap_equals_resampling_the_scores_themselves() -> None:
    """Counting how often each image was drawn and drawing it that often give the same AUROC, ties included."""
    good, bad = RNG.integers(0, 20, 13).astype(float), RNG.integers(5, 25, 7).astype(float)
    seen: list[float] = []

    def spelled_out(good_counts: np.ndarray, bad_counts: np.ndarray) -> np.ndarray:
        drawn = [
            image_auroc(np.repeat(good, g.astype(int)), np.repeat(bad, b.astype(int)))
            for g, b in zip(good_counts, bad_counts, strict=True)
        ]
        seen.extend(drawn)
        return np.array(drawn)

    expected = bootstrap_interval(spelled_out, 13, 7, resamples=300, seed=4)

    assert image_auroc_interval(good, bad, resamples=300, seed=4) == pytest.approx(expected)
    assert len(set(seen)) > 50


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Two normal populations one deviation apart: AUROC is 0.760; 200 samples of 40 + 40 cover it in about 95 %."""
    truth = float(stats.norm.cdf(1 / np.sqrt(2)))
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        low, high = image_auroc_interval(rng.normal(0, 1, 40), rng.normal(1, 1, 40), resamples=300)
        covered += low <= truth <= high

    assert 0.89 <= covered / 200 <= 0.99


def test_the_same_seed_gives_the_same_interval_and_another_one_a_similar_one() -> None:
    """A figure in a document can be had again."""
    good, bad = RNG.normal(0, 1, 60), RNG.normal(1, 1, 30)
    first = image_auroc_interval(good, bad, seed=1)

    assert image_auroc_interval(good, bad, seed=1) == first
    assert image_auroc_interval(good, bad, seed=2) != first
    assert image_auroc_interval(good, bad, seed=2) == pytest.approx(first, abs=0.02)


def test_histograms_give_the_exact_figures_within_the_stated_error() -> None:
    """With every image counted once, the binned figures are the exact ones to 0.0005, or what ties allow."""
    maps, masks = pictures(40)
    ranking = rank_pixels(maps, masks)
    once = np.ones((1, 40))
    histograms = pixel_histograms(maps, masks, ranking)

    assert histograms.auroc(once)[0] == pytest.approx(ranking.auroc(), abs=5e-4)
    for limit in (0.30, 0.05):
        assert histograms.au_pro(once, limit)[0] == pytest.approx(ranking.au_pro(limit), abs=5e-4)


def test_counting_an_image_twice_is_having_it_twice() -> None:
    """The resampled figure is that of the resampled test set, good images' pixels and components alike."""
    maps, masks = pictures(6)
    drawn = [0, 0, 2, 1, 1, 3]
    counts = np.array([[2.0, 2, 1, 1, 0, 0]])
    histograms = pixel_histograms(maps, masks, rank_pixels(maps, masks))
    spelled_out = rank_pixels([maps[i] for i in drawn], [masks[i] for i in drawn])

    assert histograms.auroc(counts)[0] == pytest.approx(spelled_out.auroc(), abs=1e-3)
    assert histograms.au_pro(counts, 0.30)[0] == pytest.approx(spelled_out.au_pro(0.30), abs=1e-3)


def test_a_perfect_map_is_perfect_in_every_resample() -> None:
    """The top bin holds what no normal pixel reaches, so 1.0 stays 1.0."""
    _, masks = pictures(10)
    maps = [np.zeros((40, 50), np.float32) if mask is None else mask.astype(np.float32) for mask in masks]
    histograms = pixel_histograms(maps, masks, rank_pixels(maps, masks))
    bad = np.array([mask is not None for mask in masks])

    assert histograms.interval(lambda h, c: h.au_pro(c, 0.05), bad, resamples=100) == pytest.approx((1.0, 1.0))
    assert histograms.interval(lambda h, c: h.auroc(c), bad, resamples=100) == pytest.approx((1.0, 1.0))


def test_a_kind_is_a_subset_of_rows() -> None:
    """One pass over the maps serves the whole set and every kind."""
    maps, masks = pictures(8)
    chosen = [0, 1, 2, 5]
    histograms = pixel_histograms(maps, masks, rank_pixels(maps, masks)).subset(chosen)
    alone = rank_pixels([maps[i] for i in chosen], [masks[i] for i in chosen])

    assert histograms.au_pro(np.ones((1, 4)), 0.30)[0] == pytest.approx(alone.au_pro(0.30), abs=1e-3)


def test_images_and_not_pixels_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two defective images that differ make a wide interval; if every image were drawn once it would be a point."""
    maps, masks = pictures(4)
    maps[1] = np.where(masks[1], 9, 0).astype(np.float32)
    histograms = pixel_histograms(maps, masks, rank_pixels(maps, masks))
    bad = np.array([mask is not None for mask in masks])
    wide = histograms.interval(lambda h, c: h.au_pro(c, 0.30), bad, resamples=200)
    monkeypatch.setattr(intervals, "_draw", lambda rng, images, resamples: np.ones((resamples, images)))
    point = histograms.interval(lambda h, c: h.au_pro(c, 0.30), bad, resamples=200)

    assert wide.high - wide.low > 0.2
    assert point.high == point.low


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (1, 299)])
def test_rate_intervals_are_clopper_and_pearsons(hits: int, trials: int) -> None:
    """SciPy's own exact interval is the reference."""
    expected = stats.binomtest(hits, trials).proportion_ci(0.95, method="exact")

    assert rate_interval(hits, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_an_undefined_figure_is_refused() -> None:
    """No defective image, or nothing but NaN."""
    with pytest.raises(ValueError, match="good and defective"):
        image_auroc_interval([1.0], [])
    with pytest.raises(ValueError, match="undefined"):
        bootstrap_interval(lambda g, b: np.full(g.shape[0], np.nan), 2, 2)
    with pytest.raises(ValueError, match="no rate"):
        rate_interval(1, 0)
    assert isinstance(rate_interval(1, 2), Interval)
