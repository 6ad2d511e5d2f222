"""The shell search: the projection against brute force, the ascent against what it must and must not do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import trainer.shell_search as shell_search
from edge.errors import CommandError, TrainingError
from trainer.shell_search import Ascent, Shell, onto_shell, worst_in_shell

Project = Callable[[Tensor, Shell, Tensor | None], Tensor]


def weighted(offset: Tensor, w: Tensor) -> Tensor:
    return (w * offset**2).sum(1).sqrt()


def nearest_on_dense_grid(offset: np.ndarray, shell: Shell, w: np.ndarray) -> float:
    """Smallest plain distance from ``offset`` (2,) to the shell, over 100 radii x 20,000 angles of it."""
    norm = float(np.sqrt((w * offset**2).sum()))
    if shell.radius <= norm <= shell.gamma * shell.radius:
        return 0.0
    angle = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
    best = np.inf
    for radius in np.linspace(shell.radius, shell.gamma * shell.radius, 100 if shell.gamma > 1 else 1):
        x, y = radius * np.cos(angle) / np.sqrt(w[0]), radius * np.sin(angle) / np.sqrt(w[1])
        best = min(best, float(np.hypot(x - offset[0], y - offset[1]).min()))
    return best


def require_nearest(project: Project, *, weights: bool) -> None:
    """Fails unless ``project`` gives members of the shell, as near as the dense grid says they can be."""
    random = np.random.default_rng(4)
    for _ in range(25):
        shell = Shell(float(random.uniform(0.5, 3)), float(random.choice([1.0, 2.0])))
        w = random.uniform(0.05, 3, 2) if weights else np.ones(2)
        offset = random.normal(0, 2.5 * random.uniform(0.05, 2), 2)
        given = torch.tensor(offset[None])
        weight = torch.tensor(w[None]) if weights else None

        found = project(given, shell, weight)

        norm = float(weighted(found, torch.tensor(w[None])))
        assert shell.radius * (1 - 1e-6) <= norm <= shell.gamma * shell.radius * (1 + 1e-6)
        distance = float((found - given).norm())
        assert distance == pytest.approx(nearest_on_dense_grid(offset, shell, w), abs=2e-3)


@pytest.mark.parametrize("weights", [False, True])
def test_the_projection_is_the_nearest_point_of_the_shell(weights: bool) -> None:
    """Euclidean and weighted, inner and outer radius, against a dense grid of the shell in two dimensions."""
    require_nearest(onto_shell, weights=weights)


@pytest.mark.parametrize("weights", [False, True])
def test_a_projection_to_the_outer_ball_alone_is_caught(weights: bool) -> None:
    """Planted bug: what lies too near stays there; good samples would then be their own adversaries."""

    def ball(offset: Tensor, shell: Shell, w: Tensor | None) -> Tensor:
        norm = weighted(offset, torch.ones_like(offset) if w is None else w)
        return torch.where((norm < shell.radius)[:, None], offset, onto_shell(offset, shell, w))

    with pytest.raises(AssertionError):
        require_nearest(ball, weights=weights)


def test_a_radial_projection_is_not_the_nearest_point_once_there_are_weights() -> None:
    """Planted bug: scaling along the ray lands on the shell, but elsewhere than proposition 1."""

    def along_the_ray(offset: Tensor, shell: Shell, w: Tensor | None) -> Tensor:
        assert w is not None
        norm = weighted(offset, w)[:, None]
        return offset * norm.clamp(shell.radius, shell.gamma * shell.radius) / norm

    with pytest.raises(AssertionError):
        require_nearest(along_the_ray, weights=True)


def test_many_dimensions_agree_with_the_papers_grid_search_over_tau() -> None:
    """3,072 coordinates with a few weights of exactly 0: as near as the best of 200,000 values of tau that qualify."""
    random = torch.Generator().manual_seed(2)
    w = torch.rand(1, 300, generator=random, dtype=torch.float64) * 2
    w[:, :20] = 0
    for scale, radius in ((3.0, 20.0), (0.1, 5.0)):
        offset = torch.randn(1, 300, generator=random, dtype=torch.float64) * scale
        found = onto_shell(offset, Shell(radius), w)

        heaviest = float(w.max())
        top = float((offset**2).sum()) / (4 * radius**2)
        tau = np.linspace(0, top, 200_000) if scale > 1 else np.linspace(-1 / heaviest * (1 - 1e-9), 0, 200_000)
        o, v = offset[0].numpy(), w[0].numpy()
        best = np.inf
        for part in np.array_split(tau, 200):
            moved = o / (1 + part[:, None] * v)
            norm = np.sqrt((v * moved**2).sum(1))
            good = norm <= radius if scale > 1 else norm >= radius
            distance = np.sqrt(((moved - o) ** 2).sum(1))[good]
            best = min(best, distance.min(initial=np.inf))
        assert float(weighted(found, w)) == pytest.approx(radius, rel=1e-9)
        assert float((found - offset).norm()) == pytest.approx(best, rel=1e-3)


def test_the_center_itself_is_pushed_out_along_the_heaviest_coordinate() -> None:
    """Zero offset: no direction to scale; weighted, the cheapest way out is r / sqrt(w) along the largest w."""
    plain = onto_shell(torch.zeros(1, 3), Shell(2.0))
    heavy = onto_shell(torch.zeros(1, 3), Shell(2.0), torch.tensor([[1.0, 4.0, 0.5]]))

    assert float(plain.norm()) == pytest.approx(2.0)
    torch.testing.assert_close(heavy.abs(), torch.tensor([[0.0, 1.0, 0.0]]), atol=1e-3, rtol=0)


def test_the_ascent_finds_the_hill_and_stays_on_the_shell() -> None:
    """A linear loss has its maximum on the sphere at x + r times its direction."""
    direction = torch.zeros(8)
    direction[3] = 1.0
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))

    found = worst_in_shell(
        lambda z: (z * direction).sum(1), x, Shell(2.0), Ascent(60, 0.5), torch.Generator().manual_seed(2)
    )

    torch.testing.assert_close(found - x, 2.0 * direction.expand(5, 8), atol=0.25, rtol=0)
    torch.testing.assert_close((found - x).norm(dim=1), torch.full((5,), 2.0))
    assert not found.requires_grad


def test_a_search_without_the_inner_radius_gives_the_sample_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug in the search itself: a loss with its peak at the sample climbs straight into it."""
    x = torch.zeros(4, 6)

    def loss(z: Tensor) -> Tensor:
        return -(z**2).sum(1)

    def nearest() -> float:
        search = worst_in_shell(loss, x, Shell(1.0, 2.0), Ascent(80, 0.2), torch.Generator().manual_seed(1))
        return float((search - x).norm(dim=1).min())

    right = nearest()
    monkeypatch.setattr(
        shell_search, "onto_shell", lambda h, s, w: h * (s.gamma * s.radius / h.norm(dim=1, keepdim=True)).clamp(max=1)
    )

    assert right == pytest.approx(1.0, abs=1e-5)
    assert nearest() < 0.5


def test_a_flat_loss_leaves_random_points_on_the_shell() -> None:
    """A ReLU network may have no slope at all; 0 / 0 must not come of it."""
    found = worst_in_shell(
        lambda z: (z * 0).sum(1), torch.zeros(3, 4), Shell(1.5), Ascent(3, 0.1), torch.Generator().manual_seed(1)
    )

    torch.testing.assert_close(found.norm(dim=1), torch.full((3,), 1.5))


def test_the_same_generator_finds_the_same_points() -> None:
    """A resumed run repeats its steps."""
    one, two = (
        worst_in_shell(
            lambda z: z.sum(1), torch.zeros(3, 4), Shell(1.0), Ascent(2, 0.1), torch.Generator().manual_seed(9)
        )
        for _ in range(2)
    )

    assert torch.equal(one, two)


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), float("inf")])
def test_a_radius_that_collapses_is_refused(radius: float) -> None:
    """At 0 the good samples are their own adversaries and nothing can be learned."""
    with pytest.raises(CommandError, match="collapses"):
        Shell(radius)


def test_nonsense_settings_and_gradients_are_refused() -> None:
    """An empty shell, an ascent backward, a NaN slope, weights that are 0 everywhere."""
    with pytest.raises(CommandError, match="gamma"):
        Shell(1.0, 0.9)
    with pytest.raises(CommandError, match="ascent"):
        Ascent(3, -0.1)
    with pytest.raises(TrainingError, match="NaN"):
        worst_in_shell(
            lambda z: (z * float("nan")).sum(1), torch.zeros(1, 2), Shell(1.0), Ascent(1, 1.0), torch.Generator()
        )
    with pytest.raises(TrainingError, match="weights of 0"):
        onto_shell(torch.ones(2, 3), Shell(1.0), torch.zeros(2, 3))
