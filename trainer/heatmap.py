"""A coarse map spread over the frame by each cell's receptive field (FCDD, section 3), as two matrix products.

Owns the matrix and its geometry.  The paper sends every cell through a transposed convolution with one fixed Gaussian
of the receptive field's size, not normalized.  That kernel is an outer product, so A' = U A U^T with a constant U is
the same map: column q of U is the Gaussian around the center of the receptive field of cell q, cut off where that ends.

A field of an even side has its center between two pixels.  ``smooth`` lets the Gaussian lie there.  ``authors`` is the
kernel of the authors' code: that of one tap less, its middle tap laid twice with half its height, which leaves a dent.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Kernel = Literal["smooth", "authors"]


def spreading(
    cells: int, *, offset: float, jump: float, field: int, sigma: float, at: np.ndarray, kernel: Kernel = "smooth"
) -> Tensor:
    """U (len(at), cells) float32: the weight of each cell at each pixel index of ``at``, all along one axis.

    Cell q is centered at pixel index ``offset`` + q ``jump`` and sees ``field`` pixels; ``sigma`` is in pixels.
    """
    centers = offset + jump * np.arange(cells, dtype=np.float64)
    distance = np.abs(np.asarray(at, np.float64)[:, None] - centers[None, :])
    inside = distance <= (field - 1) / 2
    if kernel == "authors" and field % 2 == 0:
        weights = np.where(distance < 1, 0.5, np.exp(-0.5 * ((distance - 0.5) / sigma) ** 2))
    else:
        weights = np.exp(-0.5 * (distance / sigma) ** 2)
    return torch.from_numpy((weights * inside).astype(np.float32))
