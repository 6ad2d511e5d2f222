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
    cells = _cells(scores)
    flat, count = scores.reshape(-1, cells), float(math.ceil(round(share * cells, 6)))
    threshold = _lowest_with_at_most(flat, cells, count)
    return threshold[:, 0] + torch.relu(flat - threshold).sum(1) / count


def median(scores: Tensor) -> Tensor:
    """The median (N, 1, 1) of each map (N, h, w), to 2^-24 of the map's range; the lower of the two middle values.

    Float32 throughout: the counts of cells above must be exact to one cell.
    """
    cells = _cells(scores)
    return _lowest_with_at_most(scores.reshape(-1, cells), cells, float(cells // 2))[:, :, None]


def _cells(scores: Tensor) -> int:
    """A plain number while tracing, too: the graph's size is fixed."""
    return int(scores.shape[1]) * int(scores.shape[2])


def _lowest_with_at_most(flat: Tensor, cells: int, count: float) -> Tensor:
    """The lowest value (N, 1) above which at most ``count`` values of each row of (N, cells) lie, by halving."""
    ones = torch.ones(cells, 1, device=flat.device)
    low = flat.amin(1, keepdim=True)
    span = flat.amax(1, keepdim=True) - low
    for step in range(1, 1 + STEPS):
        width = span * 2.0**-step
        # Counted by a product and moved by arithmetic: TensorRT for RTX fuses 26 comparisons, sums and Where into one
        # kernel, for which its builder takes twice as long with every two of them, or fails.
        many = torch.matmul((flat > low + width).float(), ones) > count
        low = low + width * many.float()
    return low + span * 2.0**-STEPS
