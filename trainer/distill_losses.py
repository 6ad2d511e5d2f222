"""The three losses of the teacher, and what happens to a batch before them.

Owns L_k, L_m and L_c of the paper, the selection of positions where P was asked, what L_m compares with, and the
exposure variation of the teacher's input.  Leaves the losses' weights to ``distill_config``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge.errors import TrainingError

NOISE_GRAY_LEVELS = 25.5
"""Deviation of the noise on p+: 0.1 of the range of pixel values (recalled from the paper, not checked)."""


def knowledge_loss(descriptors: Tensor, decoder: nn.Conv2d, target: Tensor) -> Tensor:
    """L_k: mean squared difference between decoded descriptors and P's features (Bergmann et al. 2020, eq. 2).

    ``descriptors`` (N, d, n) float32, ``target`` (N, C, n) bfloat16.  The decoder being linear, the square is
    expanded into d x d and d x C products, so that no (N, C, n) prediction is ever made: a tenth of the time.
    """
    if decoder.bias is None:
        raise TrainingError("the decoder needs a bias")
    weight, bias = decoder.weight.flatten(1), decoder.bias  # (C, d), (C,)
    low = descriptors.bfloat16()  # loses nothing where they come out of autocast; twice as fast at d = C = 384
    gram = torch.bmm(low, low.transpose(1, 2)).float().sum(0)  # (d, d)
    cross = torch.bmm(low, target.transpose(1, 2)).float().sum(0)  # (d, C)
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


def triplet_loss(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    """L_m: the mean of max(0, delta + d_plus - d_minus) over triplets (Bergmann et al. 2020, section 3.1).

    All three are (N, d, n), column by column a triplet.  d_plus is the squared distance of anchor and positive,
    d_minus the smaller one of the negative to either of them.
    """
    near = (anchor - positive).square().sum(dim=1)
    far = torch.minimum((anchor - negative).square().sum(dim=1), (positive - negative).square().sum(dim=1))
    loss: Tensor = (margin + near - far).clamp_min(0.0).mean()
    return loss


def shifted_views(pixels: Tensor, room_px: int, generator: torch.Generator) -> Tensor:
    """What p+ is cut from: every view moved by its own 0 to ``room_px`` px each way, with Gaussian noise on it.

    ``pixels`` (N, h, w, C) in 0..255 have ``room_px`` to spare on every side, the answer has not; clipped like a
    sensor.
    """
    count, height, width, channels = pixels.shape
    tall, wide = height - 2 * room_px, width - 2 * room_px
    corners = torch.randint(0, 2 * room_px + 1, (count, 2), generator=generator).tolist()
    moved = torch.stack([view[y : y + tall, x : x + wide] for view, (y, x) in zip(pixels, corners, strict=True)])
    noise = torch.randn(count, tall, wide, channels, generator=generator).to(pixels.device)
    return (moved + NOISE_GRAY_LEVELS * noise).clamp(0.0, 255.0)


def strangers(descriptors: Tensor, generator: torch.Generator) -> Tensor:
    """Descriptors (N, d, n) of p- for each of ``descriptors``: another view's, at a random place."""
    count, columns = descriptors.shape[0], descriptors.shape[2]
    by = int(torch.randint(1, count, (), generator=generator))  # never 0: a view is no stranger to itself
    places = torch.randperm(columns, generator=generator).to(descriptors.device)
    return descriptors.roll(by, dims=0)[:, :, places]


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
