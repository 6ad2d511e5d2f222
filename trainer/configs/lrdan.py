"""Settings of ``methods.lrdan`` (arXiv 2002.01607), and its named presets.

Owns what can be set and why each default is what it is.  [S] is the paper by way of a summary that quotes its formulas,
[C] chosen here: the paper's text gives no network sizes, no optimizer, no score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from edge.errors import CommandError
from trainer.config import Decay, Schedule, schedule_of
from trainer.lrdan_graph import Pool, Score
from trainer.lrdan_nets import LrdanSpec
from trainer.lrdan_objective import Norms, Scheme, Weights


@dataclass(frozen=True, slots=True)
class LrdanConfig:
    """Settings of LRDAN.

    The networks: images of ``size_px`` are halved until ``grid`` x ``grid`` cells of ``latent`` numbers are left, with
    ``width`` channels in the first layer.

    The losses: ``w_i`` (image), ``w_a`` (adversarial), ``w_z`` (latent), ``w_c`` (center), ``w_d`` (dual) and ``k`` are
    the paper's; ``norms`` says whether a norm is per element or as written.  ``scheme`` says who minimizes what, and
    ``w_g`` lets the generator also minimize |x' - D'(x')|_1 (ADAE: w_d k).  A generated image that is missed by
    ``dual_cap`` an element (of 2 at most) counts as no worse; see docs/methods/lrdan.md for what happens without.  For
    ``warmup_steps`` both auto-encoders learn to reconstruct and nothing else; then the center is fixed.

    The score: ``score`` says what an image is compared with (see ``lrdan_graph``); ``pool`` whether an image's score is
    the mean of its map or of the map's largest ``share``.

    Raises:
        CommandError: a value out of range, or settings that contradict each other.
    """

    preset: str
    size_px: int = 256
    width: int = 16
    latent: int = 128
    grid: int = 1  # [S]: a latent vector
    w_i: float = 1.0  # [S]
    w_a: float = 5.0  # [S]
    w_z: float = 1.0  # [S]
    w_c: float = 0.05  # [S]
    w_d: float = 1.0  # [S]
    w_g: float = 0.0  # [C]
    k: float = 0.4  # [S]
    dual_cap: float | None = None  # [C]; None: the formula as it stands
    norms: Norms = "sum"  # [C]
    scheme: Scheme = "turns"  # [C]
    warmup_steps: int = 100  # [C]
    score: Score = "a1"  # [C]
    pool: Pool = "mean"  # [C]
    share: float = 0.1  # [C]
    epochs: int = 100  # [C]
    min_steps: int = 1
    max_steps: int = 1_000_000
    batch_size: int = 64  # [C], after DCGAN, as the next two
    learning_rate: float = 2e-4
    beta1: float = 0.5
    weight_decay: float = 0.0  # [C]
    decay: Decay = "constant"  # [C]
    patience: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        self.spec(1)
        if self.weights.rival and self.scheme == "joint":
            raise CommandError("w_g is for scheme = turns; in a joint loss both auto-encoders minimize the same")
        if self.score != "a3" and self.w_d == 0:
            raise CommandError(
                f"score = {self.score} looks through the auxiliary auto-encoder, which learns to reconstruct by w_d "
                "alone, and w_d is 0; set score=a3, or a w_d above 0"
            )
        if self.warmup_steps < 0:
            raise CommandError(f"warmup_steps must be at least 0, got {self.warmup_steps}")
        if not 0 < self.share <= 1:
            raise CommandError(f"share = {self.share}: expected a share of the map's cells, above 0 and at most 1")
        if not 0 <= self.beta1 < 1:
            raise CommandError(f"beta1 must be at least 0 and below 1, got {self.beta1}")

    def spec(self, channels: int) -> LrdanSpec:
        """The networks' sizes for images of ``channels``."""
        return LrdanSpec(self.size_px, channels, self.width, self.latent, self.grid)

    @property
    def weights(self) -> Weights:
        """The losses' weights."""
        cap = math.inf if self.dual_cap is None else self.dual_cap
        return Weights(self.w_i, self.w_a, self.w_z, self.w_c, self.w_d, self.w_g, self.k, cap)

    def schedule(self, images: int) -> Schedule:
        """The schedule for a training set of ``images``."""
        return schedule_of(self, images)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form for checkpoints and provenance."""
        return asdict(self)


FRAMES = LrdanConfig(
    preset="frames",
    batch_size=8,
    epochs=20,
    min_steps=300,
    max_steps=600,
    learning_rate=5e-4,
    decay="cosine",
    warmup_steps=50,
)
"""The recommended preset: eight halvings of 256 px, sized for two CPU cores."""

SMALL = LrdanConfig(preset="small", size_px=32, width=32)

MNIST = replace(SMALL, preset="mnist")
"""Digits, 28 px with 2 px of border all around: five halvings, as in the paper's figure."""

CIFAR = replace(SMALL, preset="cifar")
"""The same for color images of 32 px."""

PRESETS: Mapping[str, LrdanConfig] = MappingProxyType({preset.preset: preset for preset in (FRAMES, MNIST, CIFAR)})
RECOMMENDED = "frames"
