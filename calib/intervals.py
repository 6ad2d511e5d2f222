"""How far a figure may be off: bootstrap over images, and exact intervals of rates.

Owns the resampling; the figures are `metrics`. Images are drawn with replacement, good and defective ones separately,
because the split between them was chosen and not observed. Pixels are never drawn by themselves: those of one image
stand and fall together. A set that is separated perfectly has the interval [1, 1]: the bootstrap cannot see failures
that never happened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from calib.metrics import Maps, Masks, PixelRanking, checked_map, component_weights

Counts = NDArray[np.float64]
"""How often each image was drawn, (resamples, images)."""

CHUNK = 64
"""Resamples held at once: bounds memory to a few MB whatever their number."""


class Interval(NamedTuple):
    """Lower and upper end, both possible values."""

    low: float
    high: float


def bootstrap_interval(
    statistic: Callable[[Counts, Counts], NDArray[np.float64]],
    good: int,
    bad: int,
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the percentile interval of `statistic` when `good` and `bad` images are drawn again, each kind separately.

    `statistic` takes the counts (B, good) and (B, bad) and returns B figures; a NaN (an undefined figure) is left
    out. The draws depend on `seed`, `good`, `bad` and `resamples` only.

    Raises:
        ValueError: a kind is empty, or every figure is NaN.
    """
    if good < 1 or bad < 1:
        raise ValueError(f"a bootstrap needs good and defective images, not {good} and {bad}")
    rng = np.random.default_rng(seed)
    figures = []
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        figures.append(statistic(_draw(rng, good, size), _draw(rng, bad, size)))
    values = np.concatenate(figures)
    values = values[~np.isnan(values)]
    if values.size == 0:
        raise ValueError("the figure is undefined in every resample")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def image_auroc_interval(
    good: ArrayLike, bad: ArrayLike, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Return the bootstrap interval of `metrics.image_auroc` for the scores `good` (n,) and `bad` (m,)."""
    good_scores, bad_scores = np.asarray(good, np.float64), np.asarray(bad, np.float64)
    order = np.argsort(good_scores)
    below = np.searchsorted(good_scores[order], bad_scores, side="left")
    not_above = np.searchsorted(good_scores[order], bad_scores, side="right")

    def statistic(good_counts: Counts, bad_counts: Counts) -> NDArray[np.float64]:
        drawn = np.zeros((good_counts.shape[0], good_scores.size + 1))
        np.cumsum(good_counts[:, order], axis=1, out=drawn[:, 1:])
        won = (drawn[:, below] + drawn[:, not_above]) / 2
        return np.asarray((won * bad_counts).sum(axis=1) / (good_scores.size * bad_scores.size))

    return bootstrap_interval(
        statistic, good_scores.size, bad_scores.size, resamples=resamples, confidence=confidence, seed=seed
    )


@dataclass(frozen=True, slots=True, eq=False)
class PixelHistograms:
    """Per image, how many pixels fall into each of 2,700 score bins, highest bin first.

    `normal` and `defect` (images, bins) count pixels, `overlap` (images, bins) sums one over the component's area;
    `components` (images,). Bins are narrow where the pixel FPR is low: at most 1/20,000 of the normal pixels up to FPR
    0.05, 1/4,000 up to 0.30, 1/1,000 beyond, unless more than that tie. A figure read from them is off by at most half
    a bin, on the sample itself 0.0005 for AUROC and AU-PRO; the figures themselves are not read from them.
    """

    normal: NDArray[np.float32]
    defect: NDArray[np.float32]
    overlap: NDArray[np.float32]
    components: NDArray[np.float64]

    def subset(self, images: ArrayLike) -> PixelHistograms:
        """Return the histograms of the images with these indices."""
        rows = np.asarray(images, dtype=np.intp)
        return PixelHistograms(self.normal[rows], self.defect[rows], self.overlap[rows], self.components[rows])

    def auroc(self, counts: Counts) -> NDArray[np.float64]:
        """Return the pooled pixel AUROC (B,) with image i counted `counts[:, i]` times."""
        x, y = self._curve(counts, self.defect)
        with np.errstate(invalid="ignore", divide="ignore"):
            area = (np.diff(x) * (y[:, 1:] + y[:, :-1]) / 2).sum(axis=1)
            return np.asarray(area / (x[:, -1] * y[:, -1]))

    def au_pro(self, counts: Counts, fpr_limit: float) -> NDArray[np.float64]:
        """Return AU-PRO up to `fpr_limit` (B,) with image i counted `counts[:, i]` times."""
        x, y = self._curve(counts, self.overlap)
        limit = fpr_limit * x[:, -1:]
        width = np.diff(x)
        kept = np.clip(limit - x[:, :-1], 0.0, width)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(width > 0, kept / width, 0.0)
            area = (kept * (y[:, :-1] + 0.5 * share * np.diff(y))).sum(axis=1)
            return np.asarray(np.minimum(1.0, area / (limit[:, 0] * (counts @ self.components))))

    def interval(
        self,
        figure: Callable[[PixelHistograms, Counts], NDArray[np.float64]],
        bad: NDArray[np.bool_],
        *,
        resamples: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> Interval:
        """Return the bootstrap interval of `figure`; `bad` (images,) says which images are defective.

        Raises:
            ValueError: as `bootstrap_interval`.
        """

        def statistic(good_counts: Counts, bad_counts: Counts) -> NDArray[np.float64]:
            counts = np.empty((good_counts.shape[0], bad.size))
            counts[:, ~bad], counts[:, bad] = good_counts, bad_counts
            return figure(self, counts)

        number = int(bad.sum())
        return bootstrap_interval(
            statistic, bad.size - number, number, resamples=resamples, confidence=confidence, seed=seed
        )

    def _curve(self, counts: Counts, rising: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        drawn = counts.astype(np.float32)  # whole numbers below 2**24: exact up to the matrix product's own rounding
        x = np.zeros((counts.shape[0], rising.shape[1] + 1))
        y = np.zeros_like(x)
        np.cumsum(drawn @ self.normal, axis=1, dtype=np.float64, out=x[:, 1:])
        np.cumsum(drawn @ rising, axis=1, dtype=np.float64, out=y[:, 1:])
        return x, y


def pixel_histograms(maps: Maps, masks: Masks, ranking: PixelRanking) -> PixelHistograms:
    """Read every map once more and count its pixels in bins cut at quantiles of `ranking.normal`.

    Raises:
        ValueError: as `metrics.rank_pixels`.
    """
    edges = _edges(ranking.normal)
    shape = (len(masks), edges.size + 1)
    normal, defect, overlap = (np.zeros(shape, np.float32) for _ in range(3))
    components = np.zeros(len(masks))
    for index, mask in enumerate(masks):
        scores = checked_map(maps[index], mask, index)
        # Left: a bin ends with its edge, so the last bin holds only what no normal pixel reaches.
        bins = edges.size - np.searchsorted(edges, scores, side="left")
        if mask is None:
            normal[index] = np.bincount(bins.ravel(), minlength=shape[1])
            continue
        weights, components[index] = component_weights(mask)
        normal[index] = np.bincount(bins[~mask], minlength=shape[1])
        defect[index] = np.bincount(bins[mask], minlength=shape[1])
        overlap[index] = np.bincount(bins[mask], weights, minlength=shape[1])
    return PixelHistograms(normal=normal, defect=defect, overlap=overlap, components=components)


def rate_interval(hits: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Return the exact two-sided interval of a rate seen `hits` times in `trials` (Clopper and Pearson, 1934).

    Raises:
        ValueError: `trials` is not positive or `hits` is not within it.
    """
    if trials < 1 or not 0 <= hits <= trials:
        raise ValueError(f"{hits} of {trials} is no rate")
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(special.betaincinv(hits, trials - hits + 1, tail))
    high = 1.0 if hits == trials else float(special.betaincinv(hits + 1, trials - hits, 1 - tail))
    return Interval(low, high)


def _draw(rng: np.random.Generator, images: int, resamples: int) -> Counts:
    return rng.multinomial(images, np.full(images, 1.0 / images), size=resamples).astype(np.float64)


def _edges(normal: NDArray[np.float32]) -> NDArray[np.float32]:
    cuts = np.concatenate(
        [np.arange(0, 0.05, 1 / 20_000), np.arange(0.05, 0.30, 1 / 4_000), np.arange(0.30, 1.0, 1 / 1_000)]
    )
    ranks = np.floor((1.0 - cuts) * (normal.size - 1)).astype(np.intp)
    return np.unique(normal[ranks])
