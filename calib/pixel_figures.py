"""Pixel figures of a judged test set for any choice of kinds. Owns which pixels count; see `metrics`, `intervals`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from calib.intervals import Counts, Interval, PixelHistograms, pixel_histograms
from calib.metrics import rank_pixels
from edge.stages.segment import render_map
from edge.types import AnomalyMap

RESAMPLES = 1000

STATISTICS: Mapping[str, Callable[[PixelHistograms, Counts], NDArray[np.float64]]] = MappingProxyType(
    {
        "pixel_auroc": PixelHistograms.auroc,
        "au_pro_30": lambda histograms, counts: histograms.au_pro(counts, 0.30),
        "au_pro_05": lambda histograms, counts: histograms.au_pro(counts, 0.05),
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class MaskedMap:
    """The map of one image with its ground truth (H, W); `mask` is None, and `good` true, for a defect-free image."""

    anomaly_map: AnomalyMap
    size: tuple[int, int]
    kind: str
    good: bool
    mask: NDArray[np.bool_] | None


class Rendered:
    """Maps at image size, made when asked for: all at once they would be gigabytes, as cells they are a few MB."""

    def __init__(self, maps: Sequence[MaskedMap]) -> None:
        self._maps = maps

    def __len__(self) -> int:
        return len(self._maps)

    def __getitem__(self, index: int, /) -> NDArray[np.float32]:
        return render_map(self._maps[index].anomaly_map, self._maps[index].size)


class PixelFigures:
    """Pixel AUROC and AU-PRO of `maps`: good images always belong, defective ones by their kind.

    Holds all pixels of the chosen images while it computes, 8 bytes each at the peak.
    """

    def __init__(self, maps: Sequence[MaskedMap]) -> None:
        self._maps = maps
        self._histograms: PixelHistograms | None = None

    def count(self, kinds: Sequence[str]) -> int:
        """How many defective images of these kinds there are."""
        return sum(not one.good and one.kind in kinds for one in self._maps)

    def figures(self, kinds: Sequence[str]) -> tuple[dict[str, float], dict[str, Interval]]:
        """The figures of `kinds` by name, and their intervals; both empty without a defective pixel.

        Bins for the intervals are cut on the first call, which should be for all kinds.
        """
        rows = [row for row, one in enumerate(self._maps) if one.good or one.kind in kinds]
        chosen = [self._maps[row] for row in rows]
        if not any(one.mask is not None and one.mask.any() for one in chosen):
            return {}, {}
        ranking = rank_pixels(Rendered(chosen), [one.mask for one in chosen])
        values = {"pixel_auroc": ranking.auroc(), "au_pro_30": ranking.au_pro(0.30), "au_pro_05": ranking.au_pro(0.05)}
        if self._histograms is None:
            self._histograms = pixel_histograms(Rendered(self._maps), [one.mask for one in self._maps], ranking)
        bad = np.array([not one.good for one in chosen])
        if bad.all():
            return values, {}
        subset = self._histograms.subset(rows)
        return values, {name: subset.interval(figure, bad, resamples=RESAMPLES) for name, figure in STATISTICS.items()}
