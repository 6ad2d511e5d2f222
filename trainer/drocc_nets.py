"""DROCC's networks: one logit for a sample, above 0 for normal.

Owns layer tables and their patch arithmetic.  Leaves the dense form to ``fdfe``, what they learn to
``drocc_objective``.

* ``LeNet``: Deep SVDD's LeNet with a binary head (paper, section 5; details from the authors' code): three times
  {convolution 5 x 5 without bias, batch norm without scale and shift (eps 1e-4), LeakyReLU 0.01, max-pool 2}, then
  128 and 64 units and one logit, no biases.  ``paper`` pads every convolution by 2; ``dense`` pads nothing, so that
  its dense form is exact, and needs a larger patch for the same number of poolings.
* ``VectorNet``: one hidden layer of 128 ReLU units, for rows of a table (paper, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from edge.errors import CommandError

NetworkKind = Literal["paper", "dense"]

WIDTHS = (32, 64, 128)
HIDDEN = (128, 64)
KERNEL = 5
SLOPE = 0.01
BATCH_NORM_EPS = 1e-4
STRIDE = 8
"""Product of the three poolings: the network's own distance between answers."""

SMALLEST_DENSE_PX = 36


@dataclass(frozen=True, slots=True)
class LeNetSpec:
    """``kind`` and the side of its square patch in px: a multiple of 8 for ``paper``, 36 plus one for ``dense``.

    Raises:
        CommandError: poolings would drop pixels of such a patch.
    """

    kind: NetworkKind
    patch: int
    channels: int

    def __post_init__(self) -> None:
        least = STRIDE if self.kind == "paper" else SMALLEST_DENSE_PX
        if self.patch < least or (self.patch - least) % STRIDE:
            raise CommandError(
                f"patch_px = {self.patch}: network {self.kind} takes {least}, {least + STRIDE}, {least + 2 * STRIDE}, "
                "... px, so that no pooling drops a row"
            )

    @property
    def left(self) -> int:
        """Side of what is left of a patch behind the last pooling."""
        return self.patch // STRIDE if self.kind == "paper" else (self.patch - SMALLEST_DENSE_PX) // STRIDE + 1


def build_lenet(spec: LeNetSpec, seed: int) -> nn.Sequential:
    """A network (N, C, patch, patch) -> (N, 1), initialized by torch's own rule from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        before = spec.channels
        for width in WIDTHS:
            layers += [
                nn.Conv2d(before, width, KERNEL, padding=2 if spec.kind == "paper" else 0, bias=False),
                nn.BatchNorm2d(width, eps=BATCH_NORM_EPS, affine=False),
                nn.LeakyReLU(SLOPE),
                nn.MaxPool2d(2),
            ]
            before = width
        layers.append(nn.Flatten())
        before *= spec.left**2
        for units in HIDDEN:
            layers += [nn.Linear(before, units, bias=False), nn.LeakyReLU(SLOPE)]
            before = units
        return nn.Sequential(*layers, nn.Linear(before, 1, bias=False))


class VectorNet(nn.Module):
    """Rows (N, d) -> (N, 1), from ``seed``."""

    def __init__(self, features: int, *, seed: int, hidden: int = 128) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, rows: Tensor) -> Tensor:
        answer: Tensor = self.layers(rows)
        return answer
