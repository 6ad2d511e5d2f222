"""LRDAN: two auto-encoders, one that learns to reconstruct good images and one that also unlearns generated ones.

"Anomaly Detection by One Class Latent Regularized Networks", arXiv 2002.01607.  Owns the turns of a step, the warm-up
and the center, the normalization of the map.  Leaves formulas to ``lrdan_objective``, networks to ``lrdan_nets``, the
deployed graph to ``lrdan_graph``.

    map = |x - answer|, mean over channels, in deviations of held-out good images;   score = its mean

The paper is known here by its formulas alone; docs/methods/lrdan.md lists what had to be chosen.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge.bundle import MapGeometry
from edge.errors import CommandError, DataError, TrainingError
from trainer.configs.lrdan import LrdanConfig
from trainer.lrdan_graph import LrdanGraph, Pooling, differences
from trainer.lrdan_nets import LrdanNets, to_signed
from trainer.lrdan_objective import Look, Objective, Terms, latent_center
from trainer.method import Batch, Frames, Losses, Turn

_CHUNK = 16
COLLAPSED = 1e-6
"""Deviation of a map, in the units of -1 to 1, below which an auto-encoder says the same of everything."""


class Lrdan:
    """``method.Method`` and ``method.Adversarial``; ``seed`` draws the first weights, nothing is drawn later."""

    name = "lrdan"

    def __init__(self, config: LrdanConfig, *, seed: int, device: str = "cpu") -> None:
        self.config, self.device, self.seed = config, device, seed
        # Gray until `prepare` says otherwise: the first convolution depends on the channels.
        self._build(1)
        self._frames: Frames | None = None
        self._blank: float | None = None
        self._looked: tuple[Batch, Look] | None = None
        self.statistics: dict[str, float] = {}

    @property
    def trainable(self) -> nn.Module:
        """All three networks, the center, and where the warm-up stands."""
        return self.nets

    @property
    def local(self) -> bool:
        """Every cell depends on the whole image, by way of the latent vector."""
        return False

    def prepare(self, frames: Frames) -> None:
        """Keep the training images, from which the center is computed when the warm-up ends.

        Raises:
            DataError: the images are constant, or of another size than the networks.
        """
        height, width, channels = frames.shape[1:]
        side = self.config.size_px
        if (height, width) != (side, side):
            raise DataError(
                f"the images are {width} x {height} px and the networks of size_px = {side}; an auto-encoder knows one "
                f"size only: resize the images to {side} x {side}, or set size_px"
            )
        if not any(np.ptp(frame) for frame in frames):
            raise DataError("the training images are constant; there is nothing to reconstruct in them")
        if channels != self.nets.spec.channels:
            self._build(channels)
        self._frames, self._blank = frames, blank_error(frames)

    def turns(self) -> tuple[Turn, ...]:
        """D, then D', then G; in the scheme ``joint`` D, then both auto-encoders.  Turns without a term are left out."""
        config, nets = self.config, self.nets
        judge = (nets.discriminator, "discriminator", self._discriminator_terms)
        if config.scheme == "joint":
            pair = nn.ModuleList([nets.auxiliary, nets.generator] if config.w_d else [nets.generator])
            return self._turns([judge] if config.w_a else [], (pair, "autoencoders", self._joint_terms))
        helpers = [judge] if config.w_a else []
        if config.w_d:
            helpers.append((nets.auxiliary, "auxiliary", self._auxiliary_terms))
        elif config.w_z:
            helpers.append((nets.auxiliary.encoder, "auxiliary", self._auxiliary_terms))
        return self._turns(helpers, (nets.generator, "generator", self._generator_terms))
