"""Which maps does this product need?  Chosen for every product by defects planted in its own held-out good pictures.

Owns the choice.  Leaves the maps to ``student_scale``, the flaws to ``planted``.  An improvement over the paper, which
sums the maps of all receptive fields alike: where no two parts are alike, say, what the teacher's answer looks like at
a place tells nothing, and a large receptive field little, and either drowns what the students miss.

From the sum of all maps, one is left out at a time: the one without which planted flaws are told best, as long as that
is better by ``GAIN`` than with it.  Flaws are told by the mean of four areas under the ROC curve, of images and of
cells, for small flaws and for large ones.  A map is left out only for a reason: planted flaws are no real ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.metrics import image_auroc
from edge.bundle import MapGeometry
from trainer.distill_losses import varied_exposure
from trainer.method import Frames
from trainer.planted import large_flaw, small_flaw

GAIN = 0.01
"""Twice the figure's standard error over 60 pictures, about."""

PLANTINGS = 3
"""Flaws of each size planted in every picture, one at a time."""

MAX_PICTURES = 40

EXPOSURE = 0.1
"""Good and flawed pictures are exposed differently by this much, so that a map that only knows light is not chosen."""

CELLS = 50_000
"""Cells drawn from each side for their area under the curve."""

Maps = Mapping[tuple[int, str], Tensor]
"""Normalized maps (n, h', w') on one grid by scale and name."""


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Pictures with a flaw of one size each (n, h, w, C), and where (n, h, w) bool."""

    flawed: Frames
    where: NDArray[np.bool_]


def trials(held_out: Frames, seed: int) -> tuple[Frames, dict[str, Trial]]:
    """What is judged, from at most ``MAX_PICTURES`` good pictures (n, h, w, C): they themselves, and flaws in them."""
    pictures = held_out[:MAX_PICTURES]
    found = {}
    for name, planted in (("small", small_flaw), ("large", large_flaw)):
        random = np.random.default_rng(seed)
        pairs = [
            planted(picture, pictures[(place + 1) % len(pictures)], random)
            for _ in range(PLANTINGS)
            for place, picture in enumerate(pictures)
        ]
        flawed = _exposed(np.stack([picture for picture, _ in pairs]), seed)
        found[name] = Trial(flawed, np.stack([mask for _, mask in pairs]) > 127)
    return _exposed(pictures, seed + 1), found


def choose(
    good: Maps, flawed: Mapping[str, Maps], cells: Mapping[str, NDArray[np.bool_]], settle: Callable[[Tensor], Tensor]
) -> tuple[list[tuple[int, str]], dict[str, float]]:
    """The maps to sum, in their order, and what all of them and the chosen ones come to.

    ``cells`` says by size of flaw which cells of a map (n, h', w') are flawed, ``settle`` what is done to a sum
    (centering).
    """
    kept = list(good)
    told = whole = figure(kept, good, flawed, cells, settle)
    while len(kept) > 1:
        without = {one: figure([key for key in kept if key != one], good, flawed, cells, settle) for one in kept}
        best = max(without, key=lambda one: without[one])
        if without[best] < told + GAIN:
            break
        kept.remove(best)
        told = without[best]
    return kept, {"all": round(whole, 4), "chosen": round(told, 4)}


def figure(
    keys: list[tuple[int, str]],
    good: Maps,
    flawed: Mapping[str, Maps],
    cells: Mapping[str, NDArray[np.bool_]],
    settle: Callable[[Tensor], Tensor],
) -> float:
    """How well the sum of the maps ``keys`` tells flaws, in 0..1."""
    right = settle(torch.stack([good[key] for key in keys]).sum(0)).numpy()
    areas = []
    for size, maps in flawed.items():
        wrong = settle(torch.stack([maps[key] for key in keys]).sum(0)).numpy()
        areas.append(image_auroc(right.max((1, 2)).tolist(), wrong.max((1, 2)).tolist()))
        random = np.random.default_rng(0)
        normal = np.concatenate([right.ravel(), wrong[~cells[size]]])
        if (bad := wrong[cells[size]]).size:
            areas.append(image_auroc(random.choice(normal, CELLS).tolist(), random.choice(bad, CELLS).tolist()))
    return statistics.mean(areas)


def at_cells(where: NDArray[np.bool_], grid: MapGeometry) -> NDArray[np.bool_]:
    """``where`` (n, h, w) at the pixels nearest to the centers of the map's cells (n, h', w')."""
    rows, columns = (
        np.clip(np.round(offset + grid.stride * np.arange(cells)).astype(int), 0, side - 1)
        for offset, cells, side in (
            (grid.offset_y, grid.height, where.shape[1]), (grid.offset_x, grid.width, where.shape[2]),
        )
    )  # fmt: skip
    return where[:, rows][:, :, columns]


def _exposed(frames: Frames, seed: int) -> Frames:
    generator = torch.Generator().manual_seed(seed)
    varied = varied_exposure(torch.from_numpy(np.ascontiguousarray(frames)).float(), EXPOSURE, generator)
    return varied.round().byte().numpy()
