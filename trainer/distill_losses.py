"""The two losses of the teacher, and what happens to a batch before them.

Owns L_k and L_c of the paper, the selection of positions where P was asked, and the exposure variation of the
teacher's input.  Leaves their weights and the schedule to ``distill``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge.errors import TrainingError


def knowledge_loss(descriptors: Tensor, decoder: nn.Conv2d, target: Tensor) -> Tensor:
    """L_k: mean squared difference between decoded descriptors and P's features (Bergmann et al. 2020, eq. 2).

    ``descriptors`` (N, d, n) float32, ``target`` (N, C, n) bfloat16.  The decoder being linear, the square is
    expanded into d x d and d x C products, so that no (N, C, n) prediction is ever made: a tenth of the time.
    """
    if decoder.bias is None:
        raise TrainingError("the decoder needs a bias")
    weight, bias = decoder.weight.flatten(1), decoder.bias  # (C, d), (C,)
    gram = torch.einsum("nap,nbp->ab", descriptors, descriptors)
    cross = torch.bmm(descriptors.bfloat16(), target.transpose(1, 2)).float().sum(0)  # (d, C)
    descriptor_sum, target_sum = descriptors.sum(dim=(0, 2)), target.sum(dim=(0, 2), dtype=torch.float32)
    columns = descriptors.shape[0] * descriptors.shape[2]
    squares: Tensor = (
        target.float().square().sum() + ((weight.T @ weight) * gram).sum() - 2.0 * (weight.T * cross).sum()
    )
    squares = squares + 2.0 * bias @ (weight @ descriptor_sum - target_sum) + columns * bias.square().sum()
    return squares / (columns * weight.shape[0])


def correlation_loss(descriptors: Tensor) -> Tensor:
    """L_c: mean squared off-diagonal entry of the d x d correlation matrix over all positions of (N, d, n) (eq. 4)."""
    columns = descriptors.transpose(0, 1).flatten(1).float()
    columns = columns - columns.mean(dim=1, keepdim=True)
    columns = columns / columns.norm(dim=1, keepdim=True).clamp_min(1e-6)
    correlation = columns @ columns.T
    dims = correlation.shape[0]
    if dims < 2:
        return torch.zeros((), device=columns.device)
    off_diagonal = correlation - torch.diag(torch.diagonal(correlation))
    mean_square: Tensor = off_diagonal.square().sum() / (dims * (dims - 1))
    return mean_square


def known_columns(descriptors: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps (N, *, g, g) as columns (N, *, n), without the positions where P was not asked (NaN)."""
    descriptors, target = descriptors.flatten(2), target.flatten(2)
    known = torch.isfinite(target[0, 0])  # the asked positions are the same in every view
    return (descriptors, target) if bool(known.all()) else (descriptors[:, :, known], target[:, :, known])


def varied_exposure(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Random gain, gamma and offset per view on float pixels (N, h, w, C) in 0..255; clipped like a sensor.

    Only the teacher's input is varied, P's target stays, so the descriptors learn to disregard the exposure.
    """
    draws = torch.rand(3, pixels.shape[0], 1, 1, 1, generator=generator).to(pixels.device) * 2 - 1
    gain, gamma, offset = (strength * draws[0]).exp(), (strength * draws[1]).exp(), 40.0 * strength * draws[2]
    return (255.0 * (pixels / 255.0).pow(gamma) * gain + offset).clamp(0.0, 255.0)
