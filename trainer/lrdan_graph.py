"""LRDAN as it is deployed: the networks of one score, and the difference they leave, under the graph contract.

Owns the three scores and the normalization of the map.  Leaves how the networks came to be to ``methods.lrdan``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from trainer.bisection import top_mean
from trainer.lrdan_nets import AutoEncoder, LrdanNets, to_signed

Score = Literal["a1", "a2", "a3"]
"""What the image is compared with: a1 = D'(x), the auxiliary auto-encoder alone; a2 = D'(G(x)), one after the other as
in ADAE; a3 = G(x), the generator alone."""

Pool = Literal["mean", "top"]
"""How an image score follows from the map: the mean of all cells (paper), or of its largest ``share``."""


class LrdanGraph(nn.Module):
    """uint8 (N, h, w, C) -> maps (N, h, w), scores (N,): |x - answer| averaged over channels, then normalized.

    A map value is (difference - ``shift``) * ``scale``, the difference in the units of -1 to 1.
    """

    def __init__(
        self,
        nets: LrdanNets,
        score: Score,
        pool: Pool = "mean",
        *,
        share: float = 0.1,
        shift: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.chain = nn.ModuleList(chain_of(nets, score))
        self.pool, self.share, self.shift, self.scale = pool, share, shift, scale

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        images = to_signed(frames)
        answer = images
        for net in self.chain:
            answer = net(answer)
        maps = ((images - answer).abs().mean(1) - self.shift) * self.scale
        return maps, maps.mean((1, 2)) if self.pool == "mean" else top_mean(maps, self.share)


def chain_of(nets: LrdanNets, score: Score) -> tuple[AutoEncoder, ...]:
    """The auto-encoders that an image goes through."""
    chains = {"a1": (nets.auxiliary,), "a2": (nets.generator, nets.auxiliary), "a3": (nets.generator,)}
    return chains[score]


@torch.no_grad()
def differences(nets: LrdanNets, score: Score, frames: Tensor) -> Tensor:
    """The map of ``frames`` (N, h, w, C) uint8 before normalization, (N, h, w) float32."""
    maps: Tensor = LrdanGraph(nets, score)(frames)[0]
    return maps
