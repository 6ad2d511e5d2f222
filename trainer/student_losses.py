"""What students are punished for: the paper's squared distance, and EfficientAD's three terms.

Owns the formulas.  Leaves their sum to ``student_scale`` and photographs to ``photographs``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HARD_SHARE = 0.999
"""p_hard of EfficientAD: the loss is the mean of the errors from this quantile up (section 3.2 there)."""


def mean_distance(answer: Tensor, target: Tensor) -> Tensor:
    """Mean over positions of the squared L2 distance; both (B, d, h', w') (Bergmann et al. 2020, section 3.2)."""
    return ((answer - target) ** 2).sum(1).mean()


def hard_distance(answer: Tensor, target: Tensor) -> Tensor:
    """Mean of the largest 0.1 % of all squared differences of channels and positions (Batzner et al. 2024, L_hard).

    The same shapes as ``mean_distance``; with one image a batch, as there, the quantile is the image's own.
    """
    squares = ((answer - target) ** 2).flatten()
    # kthvalue: torch.quantile refuses more than 2^24 values.
    rank = math.ceil(HARD_SHARE * (squares.numel() - 1)) + 1
    with torch.no_grad():
        limit = squares.kthvalue(rank).values
    return squares[squares >= limit].mean()


def mean_square(difference: Tensor) -> Tensor:
    """Mean over all channels and positions: L_AE, L_STAE and the penalty on photographs (Batzner et al. 2024)."""
    return (difference**2).mean()


def jittered(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, contrast or saturation, one of them, by a factor in [0.8, 1.2]; float pixels (B, 3, h, w) in 0..255.

    What the auto-encoder sees while it learns (EfficientAD, algorithm 1, lines 10 and 11).
    """
    kind = int(torch.randint(3, (), generator=generator))
    factor = 0.8 + 0.4 * float(torch.rand((), generator=generator))
    gray = (pixels * torch.tensor([0.299, 0.587, 0.114], device=pixels.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
    anchor = torch.zeros_like(gray) if kind == 0 else gray.mean((1, 2, 3), keepdim=True) if kind == 1 else gray
    return (anchor + factor * (pixels - anchor)).clamp(0.0, 255.0)
