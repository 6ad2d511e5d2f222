"""How far is far?  Descriptors measured against how they vary on good images.

Owns the Gaussian of a descriptor x at every place of the map, as far as good images speak for places.  An improvement
over the paper, which sums the squares of the residual r = T' - mean S: a direction of the descriptor space, or a place
of the part, in which students always miss a little hides flaws elsewhere.  PaDiM (Defard et al. 2020) does this for raw
features; here x is r, so that what students can foretell need not be learned place by place, or what they foretell.

At place p, with x of n good images, mean m_p and covariance C_p there, and C the mean of all C_p:

    C_p' = (1 - share) C_p + share C + floor            share in (0, 1]: how much is common to all places
    d    = (x - m_p)' C_p'^-1 (x - m_p)

``share`` is the one under which held-out good images are most likely; one of the candidates has one mean and one
covariance for all places.  On cloth, which has no places, that one wins; on parts that always lie alike it loses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from edge.errors import TrainingError

SHARES = (0.9, 0.7, 0.5, 0.3, 0.1, 0.03)
FLOOR = 0.01
"""Added to every covariance's diagonal, as a share of the mean variance: no direction is ever taken for noiseless."""

MAX_BYTES = 64 << 20
"""Whitening matrices are constants of the graph; 57 x 57 places of 32 dimensions take 13 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class GaussianMetric:
    """d = || whiten (x - mean) ||^2; ``mean`` (P, d), ``whiten`` (P, d, d), P the map's places, or 1 for all of them.

    ``share`` is what was chosen, 1 for one Gaussian everywhere; ``log_likelihood`` is that of a held-out x.
    """

    mean: Tensor
    whiten: Tensor
    share: float
    log_likelihood: float

    @property
    def placed(self) -> bool:
        """Whether places differ."""
        return len(self.whiten) > 1

    def __call__(self, vectors: Tensor) -> Tensor:
        """d (N, h', w') of vectors (N, d, h', w')."""
        count, dims, height, width = vectors.shape
        columns = vectors.permute(2, 3, 0, 1).reshape(height * width, -1, dims)  # (P, N, d)
        white = (columns - self.mean[:, None]) @ self.whiten.transpose(1, 2)
        return (white**2).sum(2).transpose(0, 1).reshape(count, height, width)


def fit_metric(training: Iterable[Tensor], held_out: Iterable[Tensor], *, placed: bool) -> GaussianMetric:
    """The metric from vectors (N, d, h', w') of the training images, its ``share`` by the held-out ones.

    ``placed`` False admits only one Gaussian for all places.

    Raises:
        TrainingError: fewer than two images, or placed metrics of more than ``MAX_BYTES``.
    """
    count, total, products, shape = 0, None, None, (0, 0)
    for vectors in training:
        columns = vectors.permute(2, 3, 0, 1).flatten(0, 1)  # (P, N, d)
        if total is None or products is None:
            places, _, dims = columns.shape
            if placed and 4 * places * dims * dims > MAX_BYTES:
                raise TrainingError(
                    f"metric = placed: {places} places of {dims} dimensions are {4 * places * dims**2 >> 20} MB of "
                    f"constants, at most {MAX_BYTES >> 20} are taken; say metric = gaussian, or a larger stride"
                )
            total = torch.zeros(places, dims)
            products = torch.zeros(places if placed else 1, dims, dims)
            shape = (places, dims)
        count += columns.shape[1]
        total += columns.sum(1)
        products += (
            columns.transpose(1, 2) @ columns if placed else (columns.flatten(0, 1).T @ columns.flatten(0, 1))[None]
        )
    if total is None or products is None or count < 2:
        raise TrainingError("a metric needs two images at least")
    held = torch.cat([vectors.permute(2, 3, 0, 1).flatten(0, 1) for vectors in held_out], 1)
    places, dims = shape
    overall = total.sum(0) / (count * places)
    everywhere = products.sum(0) / (count * places) - overall[:, None] * overall[None]
    found = [_gaussian(overall[None], everywhere[None], 1.0, held)]
    if placed:
        mean = total / count
        # Unbiased: of a few images the covariance about their own mean is too small.
        covariance = (products / count - mean[:, :, None] * mean[:, None]) * (count / (count - 1))
        common = covariance.mean(0)
        found += [_gaussian(mean, (1 - share) * covariance + share * common, share, held) for share in SHARES]
    return max(found, key=lambda one: one.log_likelihood)


def _gaussian(mean: Tensor, covariance: Tensor, share: float, held: Tensor) -> GaussianMetric:
    dims = covariance.shape[-1]
    floor = FLOOR * covariance.diagonal(dim1=1, dim2=2).mean()
    lower = torch.linalg.cholesky((covariance + floor * torch.eye(dims)).double())
    whiten = torch.linalg.solve_triangular(lower, torch.eye(dims, dtype=torch.float64).expand_as(lower), upper=False)
    white = (held - mean[:, None]).double() @ whiten.transpose(1, 2)
    log_determinant = 2 * lower.diagonal(dim1=1, dim2=2).log().sum(1)
    likelihood = -0.5 * ((white**2).sum(2).mean() + log_determinant.mean())
    return GaussianMetric(mean, whiten.float(), share, float(likelihood))
