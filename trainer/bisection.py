"""Order statistics inside an exported graph, without sorting.

TensorRT's TopK stops at 3,840 values and a map has up to a million; halving an interval a fixed number of times needs
nothing but comparisons and means, on any number of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 26
"""Halvings: float32 has 24 bits, two more for the rounding of the middles."""


def median(scores: Tensor) -> Tensor:
    """The median (N, 1, 1) of each map (N, h, w), to 2^-24 of the map's range; between the two middle values of many.

    Float32 throughout: the shares of cells below must be exact to one cell.
    """
    low = scores.amin((1, 2), keepdim=True)
    high = scores.amax((1, 2), keepdim=True)
    for _ in range(STEPS):
        middle = (low + high) * 0.5
        below = (scores <= middle).float().mean((1, 2), keepdim=True) >= 0.5
        low, high = torch.where(below, low, middle), torch.where(below, middle, high)
    return (low + high) * 0.5
