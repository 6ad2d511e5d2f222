"""Views and P's features for them: computed once and kept in a folder, or anew for every batch.

Owns the preparation, the normalization of the features per channel, and the reuse of a folder prepared for the same
patches.  Leaves cutting views to ``photographs`` and features to ``targets``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.photographs import Photographs, ViewRecipe, cut_view
from trainer.targets import Target, patch_grid

STATISTICS_VIEWS = 64
STATISTICS_PATCHES = 4096


class Batches(Protocol):
    """Where training batches come from; the step number decides what is drawn, so that a resumed run repeats it."""

    def draw(self, step: int, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """``count`` views (count, s, s, 3) uint8 and normalized targets (count, C, g, g)."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Memory-mapped views (n, s, s, 3) uint8 and targets (n, C, g, g) float16, zero mean and unit deviation."""

    views: NDArray[np.uint8]
    targets: NDArray[np.float16]

    def draw(self, step: int, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Different ones of all views, by ``rng`` alone."""
        return self.take(np.sort(rng.choice(len(self.views), count, replace=False)))

    def take(self, chosen: NDArray[np.integer[Any]]) -> tuple[Tensor, Tensor]:
        """The views of these numbers; fancy indexing copies them out of the map."""
        return torch.from_numpy(self.views[chosen]), torch.from_numpy(self.targets[chosen])


@dataclass(frozen=True, slots=True, eq=False)
class Supply:
    """Where views come from: photographs, which of them, how they are cut, and a seed of their own."""

    photographs: Photographs
    chosen: list[int]
    recipe: ViewRecipe
    seed: int

    def views(self, numbers: range) -> Tensor:
        """Views (len(numbers), side, side, 3) uint8."""
        cut = [cut_view(self.photographs, self.chosen, self.recipe, self.seed, number) for number in numbers]
        return torch.from_numpy(np.stack(cut))


@dataclass(frozen=True, slots=True, eq=False)
class Anew:
    """Views cut for one batch and forgotten; P is asked at every step.

    What the paper's 50 000 batches of new patches need: kept, they would fill 10 to 40 GB.
    """

    supply: Supply
    target: Target
    statistics: tuple[Tensor, Tensor]
    room_px: int = 0

    def draw(self, step: int, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """The views numbered from ``step * count`` on."""
        whole = self.supply.views(range(step * count, (step + 1) * count))
        return inner_views(whole, self.target, self.room_px), normalized(self.target(whole), self.statistics)


def prepare(
    folder: Path,
    name: str,
    supply: Supply,
    count: int,
    target: Target,
    room_px: int,
    statistics: tuple[Tensor, Tensor],
    identity: dict[str, Any],
    report: Callable[[float], None] = lambda share: None,
) -> Prepared:
    """Fill ``folder`` with ``count`` views and their targets, or reuse it when it was filled for ``identity``.

    Views keep ``room_px`` around the inner view; ``statistics`` come from ``target_statistics``.
    """
    views_file, targets_file, note = (folder / f"{name}-{part}" for part in ("views.npy", "targets.npy", "done"))
    digest = hashlib.sha256(json.dumps([identity, count, supply.seed], sort_keys=True).encode()).hexdigest()
    if note.is_file() and note.read_text() == digest:
        return Prepared(np.load(views_file, mmap_mode="r"), np.load(targets_file, mmap_mode="r"))
    note.unlink(missing_ok=True)
    inner = supply.recipe.side_px - 2 * target.margin_px
    side, grid = inner + 2 * room_px, patch_grid(target.spec, target.stride_px, inner)
    views = np.lib.format.open_memmap(views_file, "w+", np.uint8, (count, side, side, 3))
    targets = np.lib.format.open_memmap(targets_file, "w+", np.float16, (count, target.channels, grid, grid))
    chunk = _chunk(supply.recipe)
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        whole = supply.views(range(start, stop))
        views[start:stop] = inner_views(whole, target, room_px).numpy()
        targets[start:stop] = normalized(target(whole), statistics).numpy().astype(np.float16)
        report(stop / count)
    note.write_text(digest)
    return Prepared(views, targets)


def target_statistics(supply: Supply, target: Target) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C, 1, 1) of P's features over the first views: each channel counts alike in L_k."""
    patches = patch_grid(target.spec, target.stride_px, supply.recipe.side_px - 2 * target.margin_px) ** 2
    count, chunk = max(STATISTICS_VIEWS, STATISTICS_PATCHES // patches), _chunk(supply.recipe)
    parts = [target(supply.views(range(start, min(start + chunk, count)))) for start in range(0, count, chunk)]
    columns = torch.cat(parts).transpose(0, 1).flatten(1)
    columns = columns[:, torch.isfinite(columns[0])]
    deviation, mean = torch.std_mean(columns, dim=1)
    return mean.view(-1, 1, 1), deviation.clamp_min(1e-6).view(-1, 1, 1)


def normalized(features: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
    """P's features (N, C, g, g) less the mean, by the deviation, limited to 30.

    A handful of channels are silent on most photographs: without the limit they would rule the loss.
    """
    mean, deviation = statistics
    return ((features - mean) / deviation).clamp(-30.0, 30.0)


def inner_views(whole: Tensor, target: Target, room_px: int) -> Tensor:
    """Views less the target's margin on every side, but for ``room_px`` of it."""
    cut = target.margin_px - room_px
    side = whole.shape[1] - 2 * cut
    return whole[:, cut : cut + side, cut : cut + side]


def _chunk(recipe: ViewRecipe) -> int:
    """Views that P sees at a time: about half a megapixel, as many as P runs well on."""
    return max(16, min(256, 2**19 // recipe.side_px**2))
