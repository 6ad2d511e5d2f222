"""The worst point of a shell around a sample: projected gradient ascent, Euclidean or weighted by saliency.

Goyal et al., "DROCC: Deep Robust One-Class Classification", ICML 2020 (arXiv 2002.12718): algorithm 1, the shell

    N(x) = { x~ : r <= ||x~ - x|| <= gamma r },    ||u||^2 = sum_j w_j u_j^2    (w = 1: DROCC; w = saliency: DROCC-LF)

and the nearest point of it (proposition 1).  Owns the ascent and the projection.  Leaves the loss that is climbed to
the caller, the training objective to ``drocc_objective``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edge.errors import CommandError, TrainingError

BISECTIONS = 40
"""Halvings of a bracket of tau: beyond float32 for any bracket that occurs."""

NUDGE = 1e-4
"""Share of r that stands in for a component of exactly 0 along the heaviest coordinate; see ``_push_out``."""


@dataclass(frozen=True, slots=True)
class Shell:
    """Radii of the shell, ``radius`` and ``gamma * radius``, in units of the network's normalized input.

    Raises:
        CommandError: the radius is not a positive number, or gamma is below 1: the shell is empty.
    """

    radius: float
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.radius < float("inf"):
            raise CommandError(
                f"radius = {self.radius}: the shell around a good sample collapses; expected a positive number in "
                "units of the normalized input, sqrt(d) / 2 to begin with"
            )
        if not 1 <= self.gamma < float("inf"):
            raise CommandError(f"gamma = {self.gamma}: the outer radius is gamma x radius, so gamma is at least 1")


@dataclass(frozen=True, slots=True)
class Ascent:
    """``steps`` steps of length ``step`` each; back onto the shell after every ``project_every`` (paper: 1, code: 10).

    Raises:
        CommandError: a value is out of range.
    """

    steps: int
    step: float
    project_every: int = 1

    def __post_init__(self) -> None:
        if self.steps < 0 or not 0 < self.step < float("inf") or self.project_every < 1:
            raise CommandError(
                f"ascent of {self.steps} steps of {self.step}, projected every {self.project_every}: expected steps "
                "of at least 0 (0: random points), a positive length and a projection every 1 or more"
            )


def worst_in_shell(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    shell: Shell,
    ascent: Ascent,
    random: torch.Generator,
    weights: Tensor | None = None,
) -> Tensor:
    """Points (B, ...) of the shell around ``x`` (B, ...) at which ``loss`` (maps (B, ...) to (B,)) is large; detached.

    Starts at x + N(0, I), climbs along each sample's own normalized gradient (algorithm 1), ends on the shell.
    ``weights`` (B, ...) are at least 0; None is the Euclidean shell.

    Raises:
        TrainingError: the gradient is not finite.
    """
    x = x.detach()
    h = torch.randn(x.shape, generator=random).to(x.device)
    for number in range(1, ascent.steps + 1):
        h = h + ascent.step * _uphill(loss, x + h)
        if number % ascent.project_every == 0:
            h = onto_shell(h, shell, weights)
    return x + onto_shell(h, shell, weights)


def onto_shell(offset: Tensor, shell: Shell, weights: Tensor | None = None) -> Tensor:
    """The point of the shell nearest to ``offset`` (B, ...), in the plain distance; ``offset`` itself if it is inside.

    Without weights that is radial.  With weights w it is (I + tau W)^-1 offset (proposition 1), tau found by bisection:
    the weighted norm falls monotonically in tau, so the optimum lies on the violated radius.

    Raises:
        TrainingError: all weights of a sample are 0, so nothing is ever ``radius`` away from it.
    """
    flat = offset.reshape(len(offset), -1)
    if weights is None:
        return _radially(flat, shell).reshape(offset.shape)
    w = weights.reshape(len(offset), -1)
    heaviest, place = w.max(1)
    if not bool((heaviest > 0).all()):
        raise TrainingError(
            f"{int((heaviest <= 0).sum())} of {len(w)} samples have weights of 0 everywhere: the network's answer does "
            "not depend on its input any more; train again with a lower learning rate"
        )
    norm = _norm(flat, w)
    near = norm < shell.radius
    far = norm > shell.gamma * shell.radius
    pushed = _push_out(flat, w, shell.radius, heaviest, place)
    pulled = _pull_in(flat, w, shell.gamma * shell.radius)
    found = torch.where(near[:, None], pushed, torch.where(far[:, None], pulled, flat))
    return found.reshape(offset.shape)


def _radially(flat: Tensor, shell: Shell) -> Tensor:
    norm = flat.norm(dim=1, keepdim=True)
    # Every direction is as near to the center itself as any other: the first axis.
    axis = torch.zeros_like(flat)
    axis[:, 0] = 1.0
    direction = torch.where(norm > 0, flat / norm.clamp_min(torch.finfo(flat.dtype).tiny), axis)
    onto: Tensor = direction * norm.clamp(shell.radius, shell.gamma * shell.radius)
    return onto


def _pull_in(flat: Tensor, w: Tensor, radius: float) -> Tensor:
    """tau >= 0 with a weighted norm of ``radius``; (1 + t w)^2 >= 4 t w bounds it by ||offset||^2 / (4 r^2)."""
    low = torch.zeros(len(flat), 1, dtype=flat.dtype, device=flat.device)
    high = (flat**2).sum(1, keepdim=True) / (4 * radius**2)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        outside = _norm(flat / (1 + middle * w), w)[:, None] > radius
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    return _exactly(flat / (1 + high * w), w, radius)


def _push_out(flat: Tensor, w: Tensor, radius: float, heaviest: Tensor, place: Tensor) -> Tensor:
    """tau in (-1 / max w, 0] with a weighted norm of ``radius``, by u = 1 + tau max w in (0, 1].

    If the offset has no component along the heaviest coordinate the optimum is at tau = -1 / max w, with the missing
    length along it: a nudge of ``NUDGE`` r makes that the limit of the common case.
    """
    component = flat.gather(1, place[:, None])
    least = NUDGE * radius / heaviest[:, None].sqrt()
    nudged = torch.where(component < 0, -1.0, 1.0) * component.abs().maximum(least)
    flat = flat.scatter(1, place[:, None], nudged)
    share = w / heaviest[:, None]
    low = nudged.abs() * heaviest[:, None].sqrt() / radius  # the heaviest coordinate alone reaches the radius here
    high = torch.ones_like(low)
    low = low.minimum(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        outside = _norm(flat / (1 + (middle - 1) * share), w)[:, None] > radius
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    return _exactly(flat / (1 + (low - 1) * share), w, radius)


def _exactly(flat: Tensor, w: Tensor, radius: float) -> Tensor:
    """The last digits, which bisection leaves to rounding."""
    return flat * (radius / _norm(flat, w).clamp_min(torch.finfo(flat.dtype).tiny))[:, None]


def _norm(flat: Tensor, w: Tensor) -> Tensor:
    return (w * flat**2).sum(1).sqrt()


def _uphill(loss: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Each sample's gradient divided by its length; 0 where the gradient is 0 (a ReLU network may be flat there)."""
    with torch.enable_grad():
        point = point.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(point).sum(), point)
    length = gradient.reshape(len(point), -1).norm(dim=1)
    if not bool(torch.isfinite(length).all()):
        raise TrainingError(
            "the gradient of the adversarial search became NaN or infinite; train with a lower learning rate"
        )
    unit: Tensor = gradient / length.clamp_min(torch.finfo(gradient.dtype).tiny).reshape(-1, *[1] * (point.ndim - 1))
    return unit
