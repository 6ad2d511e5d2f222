"""How well scores and maps tell defects from good parts: AUROC and AU-PRO; their intervals are `intervals`.

Every figure is exact: pixels are ranked, not put into a histogram, and a tie counts one half everywhere. A map that
says nothing (constant or random) therefore gets AUROC 0.5 and AU-PRO limit / 2 (0.15 at 0.30), a perfect one gets 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage


class Maps(Protocol):
    """Anomaly maps (H, W) float32 of their masks' size; each is asked for once a pass, so they may be made on
    demand."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> NDArray[np.float32]: ...


Masks = Sequence[NDArray[np.bool_] | None]
"""Ground truth (H, W), true where defective; None stands for an image without any defective pixel."""

EIGHT_NEIGHBORS = np.ones((3, 3), dtype=np.int8)


def image_auroc(good: ArrayLike, bad: ArrayLike) -> float:
    """Return the probability that a defective image scores above a good one, ties counting one half.

    `good` (n,) and `bad` (m,) are image scores, higher means more anomalous; an infinite score is an extreme one.

    Raises:
        ValueError: one of them is empty, not one-dimensional or holds NaN.
    """
    good_scores, bad_scores = np.sort(_scores(good, "good")), _scores(bad, "bad")
    below = np.searchsorted(good_scores, bad_scores, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(good_scores, bad_scores, side="right").sum(dtype=np.int64)
    return float((below + not_above) / (2 * good_scores.size * bad_scores.size))


def pixel_auroc(maps: Maps, masks: Masks) -> float:
    """Return the AUROC over all pixels of all images pooled, ties counting one half.

    Raises:
        ValueError: as `rank_pixels`, or there is no defective pixel.
    """
    return rank_pixels(maps, masks).auroc()


def au_pro(maps: Maps, masks: Masks, fpr_limit: float) -> float:
    """Return the area under the PRO curve up to `fpr_limit`, divided by it: 0 to 1.

    PRO is the mean over ground-truth components (8-connected) of the share of the component that is detected; FPR is
    over all normal pixels of all images, good ones included. Source: Bergmann et al., Uninformed Students (2020).

    Raises:
        ValueError: as `rank_pixels`, there is no defective pixel, or `fpr_limit` is not in (0, 1].
    """
    return rank_pixels(maps, masks).au_pro(fpr_limit)


@dataclass(frozen=True, slots=True, eq=False)
class PixelRanking:
    """All pixels of a test set in order of their scores: what every pixel figure is read from.

    `normal` (n,) and `defect` (m,) are float32 scores, ascending. `overlap` (m,) float64 goes with `defect`: one over
    the area of the pixel's component, so that it sums to `components`.
    """

    normal: NDArray[np.float32]
    defect: NDArray[np.float32]
    overlap: NDArray[np.float64]
    components: int

    def auroc(self) -> float:
        """Return the pooled pixel AUROC, exactly.

        Raises:
            ValueError: there is no defective pixel.
        """
        self._require_defects()
        # Twice the number of pairs stays below 2**63 up to 4e9 normal x 1e9 defective pixels.
        return float(_twice_pairs_won(self.normal, self.defect) / (2.0 * self.normal.size * self.defect.size))

    def au_pro(self, fpr_limit: float) -> float:
        """Return the normalized area under the PRO curve up to `fpr_limit`.

        Between two neighboring thresholds the curve is a straight line, also through pixels that tie; at the limit it
        is interpolated.

        Raises:
            ValueError: there is no defective pixel, or `fpr_limit` is not in (0, 1].
        """
        self._require_defects()
        if not 0.0 < fpr_limit <= 1.0:
            raise ValueError(f"an FPR limit lies in (0, 1], not {fpr_limit}")
        limit = fpr_limit * self.normal.size
        area = float(_area_to_limit(self.normal, self.defect, self.overlap, limit))
        return min(1.0, area / (limit * self.components))  # the sum of 1/area over a component may round past 1

    def _require_defects(self) -> None:
        if self.components == 0:
            raise ValueError("no defective pixel in any mask: pixel AUROC and AU-PRO are undefined")


def rank_pixels(maps: Maps, masks: Masks) -> PixelRanking:
    """Read every map once and sort its pixels; needs about 8 bytes a pixel while it runs, then 4.

    Raises:
        ValueError: numbers or sizes of maps and masks differ, a map holds a value that is not finite, or no pixel is
        normal.
    """
    if len(maps) != len(masks):
        raise ValueError(f"{len(maps)} maps but {len(masks)} masks")
    normal: list[NDArray[np.float32]] = []
    defect: list[NDArray[np.float32]] = []
    overlap: list[NDArray[np.float64]] = []
    components = 0
    for index, mask in enumerate(masks):
        scores = checked_map(maps[index], mask, index)
        if mask is None:
            normal.append(scores.ravel().copy())
            continue
        weights, found = component_weights(mask)
        normal.append(scores[~mask])
        defect.append(scores[mask])
        overlap.append(weights)
        components += found
    if not any(part.size for part in normal):
        raise ValueError("no normal pixel in any image: a false-positive rate is undefined")
    ranked = np.concatenate(normal)
    ranked.sort()
    pooled = np.concatenate(defect) if defect else np.empty(0, np.float32)
    order = np.argsort(pooled)
    weighted = np.concatenate(overlap)[order] if overlap else np.empty(0, np.float64)
    return PixelRanking(normal=ranked, defect=pooled[order], overlap=weighted, components=components)


def component_weights(mask: NDArray[np.bool_]) -> tuple[NDArray[np.float64], int]:
    """Return, for each defective pixel in row order, one over its component's area, and the number of components.

    Components are 8-connected.
    """
    labels, found = ndimage.label(mask, structure=EIGHT_NEIGHBORS)
    of_pixel = labels[mask]
    areas = np.bincount(of_pixel, minlength=int(found) + 1)
    return 1.0 / areas[of_pixel], int(found)


def checked_map(scores: NDArray[np.float32], mask: NDArray[np.bool_] | None, index: int) -> NDArray[np.float32]:
    """Return `scores` as float32 if it is finite and of the mask's size.

    Raises:
        ValueError: it is not.
    """
    if scores.ndim != 2 or (mask is not None and mask.shape != scores.shape):
        raise ValueError(
            f"map {index} is {scores.shape}, its mask {None if mask is None else mask.shape}; both must be one (H, W)"
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"map {index} holds a value that is not finite; a map must be finite everywhere")
    return np.asarray(scores, dtype=np.float32)


def _scores(values: ArrayLike, name: str) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"{name} scores are one-dimensional with at least one value, not of shape {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{name} scores hold NaN, which has no rank")
    return scores


def _count_pairs(normal: NDArray[np.float32], defect: NDArray[np.float32]) -> int:
    below = 0
    not_above = 0
    twice = 0
    for value in defect:
        while below < normal.size and normal[below] < value:
            below += 1
        not_above = max(not_above, below)
        while not_above < normal.size and normal[not_above] <= value:
            not_above += 1
        twice += below + not_above
    return twice


def _integrate(
    normal: NDArray[np.float32], defect: NDArray[np.float32], overlap: NDArray[np.float64], limit: float
) -> float:
    # Lowers the threshold one distinct value at a time; x counts false positives, y sums overlaps.
    area = 0.0
    x = 0.0
    y = 0.0
    i = normal.size - 1
    j = defect.size - 1
    while i >= 0 and x < limit:
        value = normal[i]
        if j >= 0 and defect[j] > value:
            value = defect[j]
        width = 0.0
        height = 0.0
        while i >= 0 and normal[i] == value:
            width += 1.0
            i -= 1
        while j >= 0 and defect[j] == value:
            height += overlap[j]
            j -= 1
        if x + width > limit:
            height *= (limit - x) / width
            width = limit - x
        area += width * (y + 0.5 * height)
        x += width
        y += height
    return area


# Compiled by call and not by decorator, which is untyped and would hide the signatures from mypy.
_twice_pairs_won: Callable[[NDArray[np.float32], NDArray[np.float32]], int] = numba.njit(cache=True, nogil=True)(
    _count_pairs
)
_area_to_limit: Callable[[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64], float], float] = numba.njit(
    cache=True, nogil=True
)(_integrate)
