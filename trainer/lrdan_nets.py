"""The three networks of LRDAN: generator and auxiliary auto-encoder, which are alike, and the discriminator.

Owns the architecture and which values images have inside it.  Leaves what each network learns to ``lrdan_objective``
and the score to ``lrdan_graph``.

arXiv 2002.01607 draws five convolutions an encoder and gives no sizes.  Chosen here, after DCGAN: 4 x 4 convolutions of
stride 2, leaky ReLU, a tanh at the end, nothing normalized in the first layer.  Five of them take 32 px to one vector;
256 px take eight.  Normalization is by groups of channels of one image instead of by batch: a batch of real and one of
generated images have different statistics, and a network normalized by either would be another one when deployed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edge.errors import CommandError

SLOPE = 0.2
GROUP = 16
"""Channels normalized together."""


@dataclass(frozen=True, slots=True)
class LrdanSpec:
    """Sizes of the networks: images of ``side`` px, a latent grid of ``grid`` x ``grid`` cells of ``latent`` numbers.

    ``width`` channels after the first convolution, doubled by each further one up to eight times as many.

    Raises:
        CommandError: halving ``side`` does not lead to ``grid``, or a number is out of range.
    """

    side: int
    channels: int
    width: int = 32
    latent: int = 128
    grid: int = 1

    def __post_init__(self) -> None:
        if self.width < GROUP or self.width % GROUP or self.latent < 1 or self.grid < 1:
            raise CommandError(
                f"width = {self.width}, latent = {self.latent}, grid = {self.grid}: expected a multiple of {GROUP}, "
                "and two numbers of at least 1"
            )
        if self.grid << self.stages != self.side or self.stages < 2:
            raise CommandError(
                f"size_px = {self.side}: the networks halve an image until {self.grid} x {self.grid} cells are left, "
                f"at least twice; give {self.grid} times a power of two, such as {self.grid * self._power()}"
            )

    @property
    def stages(self) -> int:
        """How many times an encoder halves the image."""
        return max(0, round(math.log2(max(self.side, 1) / self.grid)))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after every stage but the last."""
        return tuple(self.width * min(2**stage, 8) for stage in range(self.stages - 1))

    def _power(self) -> int:
        return int(max(4, 2 ** round(math.log2(max(self.side / self.grid, 1)))))


class Encoder(nn.Sequential):
    """Images (N, C, s, s) -> (N, outputs, g, g): ``G_e`` and ``G_e'``, and with one output and one cell D."""

    def __init__(self, spec: LrdanSpec, outputs: int) -> None:
        super().__init__()
        inputs = spec.channels
        for stage, width in enumerate(spec.widths):
            self.append(nn.Conv2d(inputs, width, 4, stride=2, padding=1))
            if stage > 0:
                self.append(nn.GroupNorm(width // GROUP, width))
            self.append(nn.LeakyReLU(SLOPE))
            inputs = width
        self.append(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1))


class Decoder(nn.Sequential):
    """Latents (N, latent, g, g) -> images (N, C, s, s) in -1 to 1: ``G_d`` and ``G_d'``."""

    def __init__(self, spec: LrdanSpec) -> None:
        super().__init__()
        inputs = spec.latent
        for width in reversed(spec.widths):
            self.append(nn.ConvTranspose2d(inputs, width, 4, stride=2, padding=1))
            self.append(nn.GroupNorm(width // GROUP, width))
            self.append(nn.LeakyReLU(SLOPE))
            inputs = width
        self.append(nn.ConvTranspose2d(inputs, spec.channels, 4, stride=2, padding=1))
        self.append(nn.Tanh())


class AutoEncoder(nn.Module):
    """Images (N, C, s, s) -> their reconstructions, in -1 to 1: G or D'."""

    def __init__(self, spec: LrdanSpec) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(spec, spec.latent), Decoder(spec)

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.decoder(self.encoder(images))
        return answer


class Discriminator(nn.Module):
    """Images (N, C, s, s) -> logits (N,), high for real ones; a latent grid is judged cell by cell and averaged."""

    def __init__(self, spec: LrdanSpec) -> None:
        super().__init__()
        self.layers = Encoder(spec, 1)

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.layers(images).mean((1, 2, 3))
        return answer


class LrdanNets(nn.Module):
    """All that LRDAN learns, and what else a resumed run must find again, as buffers.

    ``center`` (latent, g, g) is c: fixed, but only from the end of the warm-up on, which ``seen``, the training steps
    taken, tells.  ``dual_errors`` (2,) are |x - D'(x)|_1 and |x' - D'(x')|_1 an element, averaged over recent steps.
    """

    center: Tensor
    seen: Tensor
    dual_errors: Tensor

    def __init__(self, spec: LrdanSpec, seed: int) -> None:
        super().__init__()
        self.spec = spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = AutoEncoder(spec)
            self.auxiliary = AutoEncoder(spec)
            self.discriminator = Discriminator(spec)
        self.register_buffer("center", torch.zeros(spec.latent, spec.grid, spec.grid))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("dual_errors", torch.zeros(2))


def to_signed(frames: Tensor) -> Tensor:
    """uint8 (N, h, w, C) -> float32 (N, C, h, w) in -1 to 1, the range of the decoders' tanh."""
    return frames.float().permute(0, 3, 1, 2) / 127.5 - 1
