"""What ConAD deploys: the encoder's mean, the heads, the likelihood under the best of them.

Owns the score graph of a trained ``Generator``.  Leaves its normalization's numbers to ``methods.conad``.  Nothing is
drawn here: z is the mean of q(z|x), and the critic stays at home.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from trainer.bisection import top_mean
from trainer.conad_losses import nll_maps
from trainer.conad_nets import Generator

Score = Literal["top", "sum"]


def pixels(frames: Tensor) -> Tensor:
    """uint8 frames (n, h, w, C) as the networks take them: (n, C, h, w) in [-1, 1]."""
    return frames.float().permute(0, 3, 1, 2) * (2 / 255) - 1


class ConadGraph(nn.Module):
    """The graph contract: uint8 (N, s, s, C) -> maps (N, s / stride, s / stride), scores (N,).

    One head is chosen for the whole image, that of the smallest NLL, and its NLL is the map, as a mean over
    ``stride`` x ``stride`` px; then ``shift`` and ``scale``.  The score of an image is the mean of the largest
    ``top_share`` of the map's cells, or of all (``sum``, up to a constant).
    """

    def __init__(
        self, net: Generator, *, log_sigma: float, bounds: tuple[float, float], score: Score, top_share: float,
        stride: int, shift: float = 0.0, scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.net, self.log_sigma, self.bounds = net, log_sigma, bounds
        self.score: Score = score
        self.top_share, self.stride, self.shift, self.scale = top_share, stride, shift, scale

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.chosen(self.head_maps(pixels(frames)))
        if self.stride > 1:
            maps = nn.functional.avg_pool2d(maps[:, None], self.stride)[:, 0]
        maps = (maps - self.shift) * self.scale
        return maps, maps.mean((1, 2)) if self.score == "sum" else top_mean(maps, self.top_share)

    def head_maps(self, pictures: Tensor) -> Tensor:
        """NLL of every pixel under every head, (N, H, s, s), of pictures (N, C, s, s) in [-1, 1]."""
        means, raw = self.net.decode(self.net.encode(pictures)[0])
        return nll_maps(pictures, means, self.log_sigma if raw is None else raw.clamp(*self.bounds))

    @staticmethod
    def chosen(maps: Tensor) -> Tensor:
        """The best head's maps (N, s, s); of heads that are equally good, their mean.

        Neither ArgMin nor a gather by it is among the operators that are known to build everywhere; a comparison is.
        """
        nll = maps.mean((2, 3))
        best = (nll <= nll.amin(1, keepdim=True)).float()
        return (maps * (best / best.sum(1, keepdim=True))[:, :, None, None]).sum(1)
