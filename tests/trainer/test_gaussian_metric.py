"""The Gaussian of residuals against a plain NumPy loop, and which share of it is common to all places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import trainer.gaussian_metric as module
from edge.errors import TrainingError
from trainer.gaussian_metric import FLOOR, fit_metric


def cloth(count: int, seed: int) -> Tensor:
    """Residuals (count, 3, 4, 5) that are alike everywhere: one covariance, no places."""
    mixing = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.3, 1.0]])
    noise = torch.randn(count, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    return torch.einsum("ab,nbij->naij", mixing, noise)


def part(count: int, seed: int) -> Tensor:
    """Residuals of a part that always lies alike: each place has a size and a mean of its own."""
    sizes = torch.linspace(0.2, 5.0, 20).view(1, 1, 4, 5)
    return cloth(count, seed) * sizes + 3 * sizes


def test_one_gaussian_for_all_places_is_the_mahalanobis_distance() -> None:
    """By hand: mean and covariance over all residuals, the floor on the diagonal, the inverse in between."""
    training = cloth(30, 1)
    rows = training.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
    covariance = np.cov(rows.T, bias=True)
    covariance += FLOOR * np.trace(covariance) / 3 * np.eye(3)
    inverse = np.linalg.inv(covariance)

    e = fit_metric([training[:10], training[10:]], [cloth(5, 2)], placed=False)(training[:2])

    for i in range(4):
        for j in range(5):
            difference = training[1, :, i, j].double().numpy() - rows.mean(0)
            assert float(e[1, i, j]) == pytest.approx(difference @ inverse @ difference, rel=1e-4)


def test_a_place_s_gaussian_is_a_mixture_of_its_own_and_the_common_one() -> None:
    """By hand at one place, for the share that was chosen."""
    training = part(40, 1)
    metric = fit_metric([training], [part(9, 2)], placed=True)
    covariances = [np.cov(training[:, :, i, j].T.double().numpy()) for i in range(4) for j in range(5)]
    mixed = (1 - metric.share) * covariances[7] + metric.share * np.mean(covariances, 0)
    floor = np.mean(
        [np.trace((1 - metric.share) * c + metric.share * np.mean(covariances, 0)) / 3 for c in covariances]
    )
    difference = (training[3, :, 1, 2] - training[:, :, 1, 2].mean(0)).double().numpy()
    expected = difference @ np.linalg.inv(mixed + FLOOR * floor * np.eye(3)) @ difference

    assert float(metric(training)[3, 1, 2]) == pytest.approx(expected, rel=1e-3)


def test_cloth_gets_one_gaussian_and_a_part_one_for_each_place() -> None:
    """Chosen by how likely held-out good images are, never by defects."""
    on_cloth = fit_metric([cloth(12, 1)], [cloth(12, 2)], placed=True)
    on_part = fit_metric([part(40, 1)], [part(12, 2)], placed=True)

    assert (on_cloth.share, on_cloth.placed) == (1.0, False)
    assert on_part.placed and on_part.share < 0.5


def test_a_choice_by_the_training_images_would_overfit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: judged by the residuals that it was fitted to, the most flexible Gaussian always wins."""
    seen = fit_metric([cloth(12, 1)], [cloth(12, 1)], placed=True)

    assert seen.placed and seen.share == min(module.SHARES)


def test_a_metric_too_large_for_a_graph_is_refused() -> None:
    """A descriptor of 128 for every pixel would be gigabytes of constants."""
    with pytest.raises(TrainingError, match="metric = gaussian, or a larger stride"):
        fit_metric([torch.zeros(2, 128, 64, 64)], [torch.zeros(2, 128, 64, 64)], placed=True)


def test_one_image_is_too_few() -> None:
    """A covariance needs two."""
    with pytest.raises(TrainingError, match="two images"):
        fit_metric([cloth(1, 1)], [cloth(1, 2)], placed=True)
