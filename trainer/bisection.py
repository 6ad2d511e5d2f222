"""Order statistics inside an exported graph, without sorting.

TensorRT's TopK stops at 3,840 values and a map has up to a million; halving an interval a fixed number of times needs
nothing but comparisons and means, on any number of values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEPS = 26
"""Halvings: float32 has 24 bits, two more for the rounding of the middles."""


def top_mean(scores: Tensor, share: float) -> Tensor:
    """The mean (N,) of the largest ``share`` of each map's (N, h, w) values, ceil(share h w) of them.

    The sum of the k largest is the smallest k t + sum(max(x - t, 0)) over all t, reached where at most k values lie
    above t; halving finds such a t to 2^-24 of the map's range, and that close the curve is flat.
    """
    cells = int(scores.shape[1]) * int(scores.shape[2])  # plain numbers while tracing, too: the graph's size is fixed
    count = float(math.ceil(round(share * cells, 6)))
    flat = scores.reshape(-1, cells)
    ones = torch.ones(cells, 1, device=scores.device)
    low = flat.amin(1, keepdim=True)
    span = flat.amax(1, keepdim=True) - low
    for step in range(1, 1 + STEPS):
        width = span * 2.0**-step
        # Counted by a product and moved by arithmetic: TensorRT for RTX fuses 26 comparisons, sums and Where into one
        # kernel, for which its builder takes twice as long with every two of them, or fails.
        many = torch.matmul((flat > low + width).float(), ones) > count
        low = low + width * many.float()
    threshold = low + span * 2.0**-STEPS
    return threshold[:, 0] + torch.relu(flat - threshold).sum(1) / count


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
