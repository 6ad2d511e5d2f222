"""LRDAN: two auto-encoders, one that learns to reconstruct good images and one that also unlearns generated ones.

"Anomaly Detection by One Class Latent Regularized Networks", arXiv 2002.01607.  Owns the turns of a step, the warm-up
and the center, the normalization of the map.  Leaves formulas to ``lrdan_objective``, networks to ``lrdan_nets``, the
deployed graph to ``lrdan_graph``.

    map = |x - answer|, mean over channels, in deviations of held-out good images
    score = its mean, or that of its largest share

The paper is known here by its formulas alone; docs/methods/lrdan.md lists what had to be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge.bundle import MapGeometry
from edge.errors import CommandError, DataError, TrainingError
from trainer.configs.lrdan import LrdanConfig
from trainer.lrdan_graph import LrdanGraph, differences
from trainer.lrdan_nets import LrdanNets, to_signed
from trainer.lrdan_objective import Look, Objective, Terms, latent_center
from trainer.method import Batch, Frames, Losses, Turn

_Part = tuple[str, tuple[nn.Module, ...], Callable[[Batch], Losses]]
"""A turn's name, the networks that learn in it, and its terms."""

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
        """Keep the training images, of which the center is computed when the warm-up ends.

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
        """D, then D', then G; with scheme ``joint`` D, then both auto-encoders.  A turn without a term is left out."""
        config, nets = self.config, self.nets
        parts: list[_Part] = []
        if config.w_a:
            parts.append(("discriminator", (nets.discriminator,), self._discriminator_terms))
        # Without the dual loss nothing teaches the auxiliary decoder; without the latent one, nothing its encoder.
        auxiliary = (nets.auxiliary,) if config.w_d else (nets.auxiliary.encoder,) if config.w_z else ()
        if config.scheme == "joint":
            parts.append(("autoencoders", (*auxiliary, nets.generator), self._joint_terms))
        else:
            if auxiliary:
                parts.append(("auxiliary", auxiliary, self._auxiliary_terms))
            parts.append(("generator", (nets.generator,), self._generator_terms))
        return tuple(
            Turn(name, tuple(p for net in learning for p in net.parameters()), terms, betas=(config.beta1, 0.999))
            for name, learning, terms in parts
        )

    @torch.no_grad()
    def loss(self, batch: Batch) -> Losses:
        """How far images are from what they are compared with, before normalization: what a good part should be near.

        It decides nothing unless the schedule has patience; ``turns`` are what is trained.
        """
        return self._differences(batch.frames.to(self.device)).mean()

    @torch.no_grad()
    def fit_statistics(self, frames: Frames) -> None:
        """Fit mean and deviation of the map over all places of held-out good images (n, h, w, C).

        Raises:
            TrainingError: the map is the same everywhere.
        """
        values = np.concatenate([self._differences(part).cpu().numpy().ravel() for part in self._parts(frames)])
        mu, sigma = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
        if not (math.isfinite(mu) and sigma > COLLAPSED):
            raise TrainingError(
                f"what held-out good images leave has mean {mu:.4g} and deviation {sigma:.3g}: that is no map; "
                "train longer, or at a lower learning rate"
            )
        self.statistics = {"mu": mu, "sigma": sigma}

    def deployed(self, channels: int, *, stride: int | None = None) -> nn.Module:
        """The graph contract as a module on the CPU: uint8 (N, h, w, channels) -> maps (N, h, w), scores (N,).

        Raises:
            CommandError: ``stride`` is not 1.
            TrainingError: the networks were trained for another number of channels.
        """
        _require_every_pixel(stride)
        if channels != self.nets.spec.channels:
            raise TrainingError(f"trained on {self.nets.spec.channels} channels, asked for a graph of {channels}")
        nets = LrdanNets(self.nets.spec, self.seed)
        nets.load_state_dict({name: tensor.detach().cpu() for name, tensor in self.nets.state_dict().items()})
        mu, sigma = self.statistics["mu"], self.statistics["sigma"]
        config = self.config
        graph = LrdanGraph(nets, config.score, config.pool, share=config.share, shift=mu, scale=1 / sigma)
        return graph.eval().requires_grad_(False)

    def map_geometry(self, height_px: int, width_px: int, *, stride: int | None = None) -> MapGeometry:
        """A cell for every pixel."""
        _require_every_pixel(stride)
        return MapGeometry(
            height=height_px, width=width_px, stride=1.0, offset_y=0.0, offset_x=0.0,
            reduction="mean" if self.config.pool == "mean" else "top-q",
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """The fitted statistics, the two halves of the dual loss at the end, and the error of a single color."""
        missed, spoiled = (round(value, 6) for value in self.nets.dual_errors.tolist())
        return {
            "statistics": dict(self.statistics),
            "warmed_up": int(self.nets.seen) > self.config.warmup_steps,
            "dual_errors": {"good": missed, "generated": spoiled, "single_color": self._blank},
        }

    def _build(self, channels: int) -> None:
        # Channels last, as frames come: a step on 256 px takes 0.80 instead of 0.96 core-s (batch 8, AVX-512).
        nets = LrdanNets(self.config.spec(channels), self.seed)
        self.nets: LrdanNets = nets.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _discriminator_terms(self, batch: Batch) -> Losses:
        # From the first step on: a judge that has never seen anything would mislead the generator later.
        with self._autocast():
            return Objective(self.config.weights).discriminator(self.nets, self._look(batch))

    def _auxiliary_terms(self, batch: Batch) -> Losses:
        with self._autocast():
            look = self._look(batch)
            return self._objective().auxiliary(self.nets, look)

    def _generator_terms(self, batch: Batch) -> Losses:
        with self._autocast():
            look = self._look(batch)
            return self._last(self._objective().generator(self.nets, look))

    def _joint_terms(self, batch: Batch) -> Losses:
        with self._autocast():
            look = self._look(batch)
            return self._last(self._objective().joint(self.nets, look))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _last(self, terms: Terms) -> Terms:
        """``terms`` of a step's last turn, after which the step counts as taken."""
        self._looked = None
        self.nets.seen += 1
        return terms

    def _look(self, batch: Batch) -> Look:
        """G's answers to the step's images, computed once: G does not change before its own turn, the last one."""
        if self._looked is None or self._looked[0] is not batch:
            if int(self.nets.seen) == self.config.warmup_steps:
                self._fix_center()
            self._looked = batch, Look.at(self.nets, to_signed(batch.frames.to(self.device)))
        return self._looked[1]

    def _objective(self) -> Objective:
        """The loss of this step: during the warm-up, reconstruction alone."""
        weights = self.config.weights
        if int(self.nets.seen) < self.config.warmup_steps:
            weights = weights.warming_up()
        return Objective(weights, self.config.norms, self._blank)

    @torch.no_grad()
    def _fix_center(self) -> None:
        """c from all training images, by the generator's encoder as it is now (Ruff et al. 2018)."""
        assert self._frames is not None, "`prepare` comes before training"
        encoder = self.nets.generator.encoder
        with torch.autocast(self.device, enabled=False):
            latents = torch.cat([encoder(to_signed(part)) for part in self._parts(self._frames)])
        self.nets.center.copy_(latent_center(latents))

    def _differences(self, frames: Tensor) -> Tensor:
        return differences(self.nets, self.config.score, frames)

    def _parts(self, frames: Frames) -> list[Tensor]:
        """``frames`` in chunks on the device: eight stages of 256 px take a while and much memory for a whole set."""
        return [
            torch.from_numpy(np.ascontiguousarray(frames[start : start + _CHUNK])).to(self.device)
            for start in range(0, len(frames), _CHUNK)
        ]


def blank_error(frames: Frames) -> float:
    """Mean |x - m| in the units of -1 to 1, where m is the mean color of all images (n, h, w, C)."""
    mean = np.stack([frame.mean((0, 1), dtype=np.float64) for frame in frames]).mean(0)
    return float(np.mean([np.abs(frame - mean).mean() for frame in frames]) / 127.5)


def _require_every_pixel(stride: int | None) -> None:
    if stride not in (None, 1):
        raise CommandError(
            f"this model cannot be evaluated every {stride} px: an auto-encoder answers all pixels or none; leave "
            "--refine out, or choose a method of patches"
        )
