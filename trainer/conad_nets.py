"""Networks of ConAD: an encoder, a decoder whose last layer has H heads, and a critic.

Owns layers and shapes.  Leaves what they are trained with to ``conad_losses`` and what is scored to ``conad_graph``.
The paper says "DCGAN-like" and "all-convolutional" and no more; sizes are settings (``configs.conad``).

    encoder   4 x 4 convolutions of stride 2, batch norm, leaky ReLU; then mean and log variance of q(z|x)
    trunk     the same backward: 4 x 4 transposed convolutions of stride 2, batch norm, ReLU
    heads     one 3 x 3 convolution each, the only layer that is not shared; tanh
    critic    4 x 4 convolutions of stride 2, leaky ReLU, no batch norm: real and made pictures would be told apart by
              the batch they came in; hypothesis discrimination; one logit
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from edge.errors import CommandError
from trainer.conad_losses import closeness

SLOPE = 0.2  # DCGAN
LEAST_SIDE_PX = 2
"""The smallest side of the encoder's last map."""

KERNELS, KERNEL_DIM = 16, 8
"""Minibatch discrimination: B kernels of C numbers.  Not found in the paper; Salimans et al. 2016 took 100 and 5."""


@dataclass(frozen=True, slots=True)
class ConadSpec:
    """Pictures of ``side`` px and ``channels``; one stage for each of ``widths``, from the picture down.

    ``latent`` numbers describe a picture, or with ``grid`` every cell of the encoder's last map.  ``learned_sigma``: a
    head gives a log deviation for every value beside its mean.

    Raises:
        CommandError: a size that these stages cannot halve, or nothing to build.
    """

    side: int
    channels: int
    widths: tuple[int, ...]
    critic_widths: tuple[int, ...]
    latent: int
    heads: int
    grid: bool = False
    learned_sigma: bool = False

    def __post_init__(self) -> None:
        for name, widths in (("widths", self.widths), ("critic_widths", self.critic_widths)):
            if not widths or min(widths) < 1:
                raise CommandError(f"{name} = {list(widths)}: expected the channels of one stage or more, from 1 up")
            step = 2 ** len(widths)
            if self.side % step or self.side // step < LEAST_SIDE_PX:
                raise CommandError(
                    f"size_px = {self.side}: the {len(widths)} stages of {name} halve it, so it must be a multiple of "
                    f"{step}, at least {LEAST_SIDE_PX * step}"
                )
        if self.latent < 1 or self.heads < 1:
            raise CommandError(f"latent = {self.latent} and heads = {self.heads}: both must be at least 1")

    @property
    def bottom(self) -> int:
        """Side of the encoder's last map, in cells."""
        return int(self.side // 2 ** len(self.widths))


class Generator(nn.Module):
    """Pictures in [-1, 1] -> q(z|x); z -> H pictures and their log deviations."""

    def __init__(self, spec: ConadSpec) -> None:
        super().__init__()
        self.spec = spec
        sides = (spec.channels, *spec.widths)
        self.encoder = nn.Sequential(*(
            layer
            for taken, given in pairwise(sides)
            for layer in (nn.Conv2d(taken, given, 4, 2, 1), nn.BatchNorm2d(given), nn.LeakyReLU(SLOPE))
        ))  # fmt: skip
        last, kernel = spec.widths[-1], 1 if spec.grid else spec.bottom
        self.mean = nn.Conv2d(last, spec.latent, kernel)
        self.log_variance = nn.Conv2d(last, spec.latent, kernel)
        up = (last, *spec.widths[-2::-1], spec.widths[0])
        self.trunk = nn.Sequential(
            nn.ConvTranspose2d(spec.latent, last, kernel), nn.BatchNorm2d(last), nn.ReLU(),
            *(
                layer
                for taken, given in pairwise(up)
                for layer in (nn.ConvTranspose2d(taken, given, 4, 2, 1), nn.BatchNorm2d(given), nn.ReLU())
            ),
        )  # fmt: skip
        # One convolution of all heads: every output channel draws its own first weights, so no two heads start alike.
        self.heads = nn.Conv2d(spec.widths[0], spec.heads * spec.channels * (2 if spec.learned_sigma else 1), 3, 1, 1)

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(n, C, s, s) -> mean and log variance of q(z|x), both (n, latent, g, g); g = 1 without a grid."""
        found = self.encoder(pictures)
        return self.mean(found), self.log_variance(found)

    def decode(self, latent: Tensor) -> tuple[Tensor, Tensor | None]:
        """z (n, latent, g, g) -> means (n, H, C, s, s) in [-1, 1]; where they are learned, raw log deviations."""
        spec = self.spec
        answers = self.heads(self.trunk(latent))
        split = answers.reshape(-1, spec.heads, answers.shape[1] // spec.heads, spec.side, spec.side)
        means = torch.tanh(split[:, :, : spec.channels])
        return means, split[:, :, spec.channels :] if spec.learned_sigma else None


class Critic(nn.Module):
    """The discriminator: logits, high for pictures that it takes for real.

    With ``discriminate`` it also sees how close a picture is to the others of its group, by minibatch discrimination
    (Salimans et al. 2016, section 3.2): for a made picture the group is the H hypotheses of one input.
    """

    def __init__(self, spec: ConadSpec, *, discriminate: bool) -> None:
        super().__init__()
        self.heads = spec.heads
        sides = (spec.channels, *spec.critic_widths)
        self.body = nn.Sequential(
            *(
                layer
                for taken, given in pairwise(sides)
                for layer in (nn.Conv2d(taken, given, 4, 2, 1), nn.LeakyReLU(SLOPE))
            ),
            nn.Flatten(),
        )
        features = spec.critic_widths[-1] * int(spec.side // 2 ** len(spec.critic_widths)) ** 2
        self.kernels = nn.Linear(features, KERNELS * KERNEL_DIM, bias=False) if discriminate else None
        self.answer = nn.Linear(features + (KERNELS if discriminate else 0), 1)

    def of_hypotheses(self, pictures: Tensor) -> Tensor:
        """Logits (n, H) of the H hypotheses (n, H, C, s, s) of n inputs, each beside those of its own input."""
        features = self.body(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])
        if self.kernels is None:
            return self._logits(features)
        own = self.kernels(features).unflatten(-1, (KERNELS, KERNEL_DIM))
        return self._logits(torch.cat([features, closeness(own, own) - 1], -1))  # 1: to itself

    def of_pictures(self, pictures: Tensor) -> Tensor:
        """Logits (n,) of real pictures (n, C, s, s), each beside the H - 1 that follow it in the batch."""
        features = self.body(pictures)
        if self.kernels is None:
            return self._logits(features)
        own = self.kernels(features).unflatten(-1, (KERNELS, KERNEL_DIM))
        others = [own.roll(-shift, 0) for shift in range(1, self.heads)]
        near = closeness(own[:, None], torch.stack(others, 1))[:, 0] if others else own.new_zeros(len(own), KERNELS)
        return self._logits(torch.cat([features, near], -1))

    def _logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.answer(features)[..., 0]
        return logits
