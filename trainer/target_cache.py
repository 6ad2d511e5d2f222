"""Views and P's features for them, computed once and kept in a folder.

Owns the preparation, the normalization of the features per channel, and the reuse of a folder prepared for exactly
the same run.  Leaves cutting views to ``photographs`` and features to ``targets``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.photographs import Photographs, ViewRecipe, cut_view
from trainer.targets import Target

CHUNK = 16
STATISTICS_VIEWS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Memory-mapped views (n, s, s, 3) uint8 and targets (n, C, g, g) float16, zero mean and unit deviation."""

    views: NDArray[np.uint8]
    targets: NDArray[np.float16]


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


def prepare(
    folder: Path,
    name: str,
    supply: Supply,
    count: int,
    target: Target,
    grid: int,
    statistics: tuple[Tensor, Tensor],
    identity: dict[str, Any],
    report: Callable[[float], None] = lambda share: None,
) -> Prepared:
    """Fill ``folder`` with ``count`` views and their targets, or reuse it when it was filled for ``identity``.

    ``statistics`` are mean and deviation, each (C, 1, 1), from ``target_statistics``.
    """
    views_file, targets_file, note = (folder / f"{name}-{part}" for part in ("views.npy", "targets.npy", "done"))
    digest = hashlib.sha256(json.dumps([identity, count, supply.seed], sort_keys=True).encode()).hexdigest()
    if note.is_file() and note.read_text() == digest:
        return Prepared(np.load(views_file, mmap_mode="r"), np.load(targets_file, mmap_mode="r"))
    note.unlink(missing_ok=True)
    side = supply.recipe.side_px - 2 * target.margin_px
    views = np.lib.format.open_memmap(views_file, "w+", np.uint8, (count, side, side, 3))
    targets = np.lib.format.open_memmap(targets_file, "w+", np.float16, (count, target.channels, grid, grid))
    mean, deviation = statistics
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        whole = supply.views(range(start, stop))
        margin = target.margin_px
        views[start:stop] = whole[:, margin : margin + side, margin : margin + side].numpy()
        # A handful of channels are silent on most photographs: without the limit they would rule the loss.
        normalized = ((target(whole) - mean) / deviation).clamp(-30.0, 30.0)
        targets[start:stop] = normalized.numpy().astype(np.float16)
        report(stop / count)
    note.write_text(digest)
    return Prepared(views, targets)


def target_statistics(supply: Supply, target: Target) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C, 1, 1) of P's features over the first views: each channel counts alike in L_k."""
    parts = [target(supply.views(range(start, start + CHUNK))) for start in range(0, STATISTICS_VIEWS, CHUNK)]
    columns = torch.cat(parts).transpose(0, 1).flatten(1)
    columns = columns[:, torch.isfinite(columns[0])]
    deviation, mean = torch.std_mean(columns, dim=1)
    return mean.view(-1, 1, 1), deviation.clamp_min(1e-6).view(-1, 1, 1)
