"""Settings of ``methods.conad`` (Nguyen et al., ICML 2019), and its named presets.

Owns what can be set and why each default is what it is.  [P] is the paper, [I] a third party's code, [C] chosen here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

from edge.errors import CommandError
from trainer.conad_graph import Score
from trainer.conad_nets import ConadSpec
from trainer.config import Decay, Schedule, schedule_of


@dataclass(frozen=True, slots=True)
class ConadConfig:
    """Settings of ConAD.

    Networks: ``widths`` are the channels of the encoder's stages, each of which halves the picture of ``size_px``, and
    backward those of the trunk; ``critic_widths`` those of the discriminator.  ``latent`` numbers describe a picture,
    with ``grid`` each cell of the last stage.  ``heads`` is H.

    Losses: ``variance`` ``fixed`` takes ``sigma`` for every value of a picture in [-1, 1]; ``learned`` lets every head
    say it for every value, between ``sigma`` and 1.  ``relaxation`` epsilon shares the winner's loss with the other
    heads, 0 is winner-takes-all.  ``hypothesis_discrimination`` shows the critic how alike the heads of one input are.
    ``adversarial`` and ``kl`` weigh those terms of the generator; ``critic_rate`` multiplies the critic's rate.

    Score: the map is the winner's NLL, a mean over ``stride`` x ``stride`` px; an image is judged by the mean of the
    ``top_share`` of its cells (``top``), or of all of them (``sum``).

    Raises:
        CommandError: a value out of range, or settings that contradict each other.
    """

    preset: str
    size_px: int = 256  # [P]: 224 for metal parts
    widths: tuple[int, ...] = (16, 32, 64, 64, 64)  # [C]
    critic_widths: tuple[int, ...] = (8, 16, 32, 64, 64)  # [C]
    latent: int = 128  # [I]
    grid: bool = False  # [C]
    heads: int = 2  # [P]: the best for metal parts; 8 for CIFAR-10
    variance: Literal["fixed", "learned"] = "fixed"  # [C]
    sigma: float = 0.3  # [C]
    relaxation: float = 0.0  # [P]
    hypothesis_discrimination: bool = True  # [P]
    adversarial: float = 1.0  # [P]
    kl: float = 1.0  # [P]
    score: Score = "top"  # [P]: for metal parts
    top_share: float = 0.1  # [P]
    stride: int = 4  # [C]
    epochs: int = 200  # [C]
    min_steps: int = 1
    max_steps: int = 1_000_000
    batch_size: int = 8  # [C]; [I]: 32
    learning_rate: float = 2e-4  # [C]: DCGAN
    critic_rate: float = 1.0
    beta1: float = 0.5  # [C]: DCGAN
    weight_decay: float = 0.0
    decay: Decay = "constant"
    patience: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        self.spec(1)
        for name in ("sigma", "critic_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise CommandError(f"{name} must be a positive number, got {value}")
        if self.variance == "learned" and self.sigma >= 1:
            raise CommandError(f"variance = learned keeps deviations between sigma and 1; sigma = {self.sigma}")
        most = (self.heads - 1) / self.heads
        if not 0 <= self.relaxation <= most:
            raise CommandError(
                f"relaxation = {self.relaxation}: expected 0 (winner takes all) to {most:.3g} (all {self.heads} alike)"
            )
        if not (min(self.adversarial, self.kl) >= 0 and math.isfinite(self.adversarial + self.kl)):
            raise CommandError(f"adversarial = {self.adversarial} and kl = {self.kl} are weights, from 0 up")
        if not (0 < self.top_share <= 1 and 0 <= self.beta1 < 1):
            raise CommandError(f"top_share = {self.top_share} and beta1 = {self.beta1}: expected shares of 1")
        if self.stride < 1 or self.size_px % self.stride:
            raise CommandError(f"stride = {self.stride} px must divide size_px = {self.size_px}")
        if self.hypothesis_discrimination and self.batch_size < self.heads:
            raise CommandError(
                f"batch_size = {self.batch_size}: hypothesis discrimination compares {self.heads} hypotheses of an "
                f"input with {self.heads} different pictures; give batch_size={self.heads} or more, or fewer heads"
            )

    def spec(self, channels: int) -> ConadSpec:
        """The networks for pictures of ``channels`` channels."""
        return ConadSpec(
            self.size_px, channels, self.widths, self.critic_widths, self.latent, self.heads, self.grid,
            self.variance == "learned",
        )  # fmt: skip

    def schedule(self, images: int) -> Schedule:
        """The schedule for a training set of ``images``."""
        return schedule_of(self, images)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form for checkpoints and provenance."""
        return asdict(self) | {"widths": list(self.widths), "critic_widths": list(self.critic_widths)}


FRAMES = ConadConfig(preset="frames", epochs=20, min_steps=400, max_steps=600, learning_rate=1e-3, decay="cosine")
"""The recommended preset: whole frames, two heads, sized for two CPU cores.

A rate of 1e-3 that falls to zero instead of DCGAN's constant 2e-4, which is for a hundred times as many steps.
"""

PAPER_FRAMES = ConadConfig(preset="paper-frames", size_px=224, stride=1, batch_size=32)
"""The paper's setting for metal parts as far as it is told: 224 px, a cell a pixel, two heads, the largest tenth."""

CIFAR = ConadConfig(
    preset="cifar",
    size_px=32,
    widths=(32, 64, 128),
    critic_widths=(32, 64, 128),
    latent=64,
    heads=8,
    score="sum",
    stride=1,
    batch_size=32,
    epochs=100,
)
"""The paper's CIFAR-10 setting as far as it is told: 32 x 32 px, DCGAN-like, eight heads, the whole NLL as score."""

PRESETS: Mapping[str, ConadConfig] = MappingProxyType(
    {preset.preset: preset for preset in (FRAMES, PAPER_FRAMES, CIFAR)}
)
RECOMMENDED = "frames"
