"""Reading a row of cells between their centers: the one bilinear weight matrix of targets and of deployed maps."""

from __future__ import annotations

import torch
from torch import Tensor


def reading_weights(cells: int, position: Tensor) -> Tensor:
    """Weights (wanted, cells) that read a row of ``cells`` at ``position`` (wanted,), in cells from the first center.

    Linear between neighbors, the outermost cell beyond it.
    """
    position = position.double().clamp(0, cells - 1)
    below = position.floor().long().clamp(max=max(cells - 2, 0))
    share = (position - below).float()
    weights = torch.zeros(len(position), cells)
    rows = torch.arange(len(position))
    weights[rows, below] += 1 - share
    weights[rows, (below + 1).clamp(max=cells - 1)] += share
    return weights
