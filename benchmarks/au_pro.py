"""How much faster is the exact AU-PRO than straightforward implementations with scikit-image, at equal figures?

1,000 maps of 256 x 256, a third of them good, the others with one to three flaws. Two implementations as they are
commonly written, both labelling with `skimage.measure.label`:

    sorting     every pixel of every map in one argsort, cumulative sums of false positives and overlaps; exact for any
                map (the way of MVTec's own evaluation code)
    thresholds  for each threshold and each region of `regionprops`, the share of it that is above; exact only if every
                score is a threshold, so its maps are rounded to LEVELS levels, and so are ours in that comparison

`ratio` is theirs / ours, single thread, medians of ROUNDS alternating rounds. Prints one JSON object; run with
`python benchmarks/au_pro.py [--maps N] [--rounds N] [--slow-maps N]`. The thresholds' time grows with the number of
maps (it is measured on fewer and scaled), ours as n log n.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import skimage
from numpy.typing import NDArray
from skimage import measure

from calib.metrics import au_pro

SIDE = 256
LIMIT = 0.3
LEVELS = 200

Map = NDArray[np.float32]
Mask = NDArray[np.bool_]


def test_set(number: int, seed: int = 0) -> tuple[list[Map], list[Mask]]:
    """Noise of a smoothed look, brighter in flaws, which are ellipses 6 to 40 px across."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    maps, masks = [], []
    for index in range(number):
        mask = np.zeros((SIDE, SIDE), bool)
        for _ in range(0 if index % 3 == 0 else int(rng.integers(1, 4))):
            center, radius = rng.uniform(20, SIDE - 20, 2), rng.uniform(3, 20, 2)
            mask |= ((y - center[0]) / radius[0]) ** 2 + ((x - center[1]) / radius[1]) ** 2 < 1
        coarse = rng.normal(0, 1, (SIDE // 4, SIDE // 4)).repeat(4, axis=0).repeat(4, axis=1)
        maps.append((coarse + 0.3 * rng.normal(0, 1, mask.shape) + 1.5 * mask).astype(np.float32))
        masks.append(mask)
    return maps, masks


def by_sorting(maps: Sequence[Map], masks: Sequence[Mask], limit: float = LIMIT) -> float:
    """Exact, with one sort of all pixels."""
    normal = sum(int((~mask).sum()) for mask in masks)
    rise_x, rise_y, regions = [], [], 0
    for mask in masks:
        labels = measure.label(mask, connectivity=2)
        share = np.zeros(mask.shape)
        for region in range(1, labels.max() + 1):
            inside = labels == region
            share[inside] = 1.0 / inside.sum()
        regions += int(labels.max())
        rise_x.append((~mask).ravel() / normal)
        rise_y.append(share.ravel())
    scores = np.concatenate([one.ravel() for one in maps])
    order = np.argsort(scores)[::-1]
    x = np.cumsum(np.concatenate(rise_x)[order])
    y = np.cumsum(np.concatenate(rise_y)[order]) / regions
    last = np.append(np.diff(scores[order]) != 0, True)
    return area(np.concatenate([[0.0], x[last]]), np.concatenate([[0.0], y[last]]), limit)


def by_thresholds(maps: Sequence[Map], masks: Sequence[Mask], limit: float = LIMIT) -> float:
    """For every distinct score and every region; exact where the maps have few distinct scores."""
    thresholds = np.unique(np.concatenate([np.unique(one) for one in maps]))[::-1]
    regions = [measure.regionprops(measure.label(mask, connectivity=2)) for mask in masks]
    normal = sum(int((~mask).sum()) for mask in masks)
    x, y = [0.0], [0.0]
    for threshold in thresholds:
        false, overlaps = 0, []
        for scores, mask, found in zip(maps, masks, regions, strict=True):
            above = scores >= threshold
            false += int((above & ~mask).sum())
            for region in found:
                rows, columns = region.coords.T
                overlaps.append(above[rows, columns].mean())
        x.append(false / normal)
        y.append(float(np.mean(overlaps)))
        if x[-1] > limit:
            break
    return area(np.array(x), np.array(y), limit)


def area(x: NDArray[np.float64], y: NDArray[np.float64], limit: float) -> float:
    """Under the line through (x, y) up to `limit`, divided by it."""
    inside = x <= limit
    end = np.interp(limit, x, y)
    return float(np.trapezoid(np.append(y[inside], end), np.append(x[inside], limit)) / limit)


def rounded(maps: Sequence[Map]) -> list[Map]:
    """To LEVELS levels over the range of all maps."""
    low, high = min(one.min() for one in maps), max(one.max() for one in maps)
    return [np.round((one - low) / (high - low) * (LEVELS - 1)).astype(np.float32) for one in maps]


def timed(call: Callable[[], float]) -> tuple[float, float]:
    """(seconds, figure)."""
    start = time.perf_counter()
    figure = call()
    return time.perf_counter() - start, figure


def compare(
    theirs: Callable[[Sequence[Map], Sequence[Mask]], float], maps: Sequence[Map], masks: Sequence[Mask], rounds: int
) -> dict[str, float]:
    """Alternating rounds; medians of seconds."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        other, figure = timed(lambda: theirs(maps, masks))
        own, own_figure = timed(lambda: au_pro(maps, masks, LIMIT))
        times[0].append(other)
        times[1].append(own)
    seconds = [statistics.median(one) for one in times]
    return {
        "maps": len(maps),
        "theirs_s": round(seconds[0], 3),
        "ours_s": round(seconds[1], 3),
        "ratio": round(seconds[0] / seconds[1], 1),
        "au_pro": own_figure,
        "difference": abs(figure - own_figure),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--maps", type=int, default=1000)
    parser.add_argument("--slow-maps", type=int, default=100, help="maps for the implementation by thresholds")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    au_pro(*test_set(3), LIMIT)  # compiled before the clock starts
    maps, masks = test_set(given.maps)
    sorting = compare(by_sorting, maps, masks, given.rounds)
    few = compare(by_thresholds, rounded(maps[: given.slow_maps]), masks[: given.slow_maps], 1)
    print(json.dumps({"cpu": platform.processor() or platform.machine(), "numpy": np.__version__,
                      "scikit_image": skimage.__version__,
                      "sorting": sorting, "thresholds": few}))  # fmt: skip


if __name__ == "__main__":
    main()
