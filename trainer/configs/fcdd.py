"""Settings of ``methods.fcdd`` (Liznerski et al., ICLR 2021), and its named presets.

Owns what can be set and why each default is what it is.  [P] is the paper, [I] the authors' code, [C] chosen here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from edge.errors import CommandError
from trainer.config import Decay, Schedule, schedule_of


@dataclass(frozen=True, slots=True)
class FcddConfig:
    """Settings of FCDD.

    ``trunk`` is a shipped teacher's name or file: its convolutions are the network's, with ``frozen`` of them left as
    they are; ``random`` weights of the same shape are the control.  ``sigma`` is the Gaussian's, in px; the map has a
    cell every ``stride`` px.

    Anomalies are good images with confetti on them, with ``photographs`` also pieces of everyday photographs, half each
    ([I]: one kind at a time).  ``supervision`` ``image`` labels images, ``pixel`` learns from masks, which confetti
    has.  ``anomaly_share`` of the images of a step are anomalies.  ``labels`` ``random`` is the control.

    Raises:
        CommandError: a value out of range, or settings that contradict each other.
    """

    preset: str
    trunk: str = "line-65"  # [C]: no VGG-11-BN here; distilled from ResNet-18, p = 65 ([I] for MVTec AD: r = 62)
    weights: Literal["teacher", "random"] = "teacher"  # [I] for MVTec AD: ImageNet weights
    frozen: int = 2  # [I]: the front half of the network for MVTec AD
    sigma: float = 12.0  # [I] for MVTec AD
    stride: int = 4  # [C]: the paper's map has a cell a pixel
    size_px: int = 256
    supervision: Literal["image", "pixel"] = "image"  # [P] unsupervised: image labels
    photographs: str | None = None
    labels: Literal["true", "random"] = "true"
    anomaly_share: float = 0.5  # [P]
    epochs: int = 200  # [I]
    min_steps: int = 1
    max_steps: int = 1_000_000
    batch_size: int = 16  # [I]: 128 by joining eight
    learning_rate: float = 1e-3  # [I]
    weight_decay: float = 1e-4  # [I]
    decay: Decay = "cosine"  # [C]; [I]: x 0.985 an epoch
    patience: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise CommandError(f"sigma must be a positive number of px, got {self.sigma}")
        if not 0 < self.anomaly_share < 1:
            raise CommandError(
                f"anomaly_share = {self.anomaly_share}: without anomalies a map of zeros is perfect, and without good "
                "images nothing is learned; give a share between 0 and 1"
            )
        if self.stride < 1 or self.frozen < 0:
            raise CommandError(f"stride = {self.stride} and frozen = {self.frozen}: expected at least 1 and 0")
        if self.supervision == "pixel" and self.photographs is not None:
            raise CommandError("supervision = pixel needs a mask for every anomaly, and photographs have none")

    def schedule(self, images: int) -> Schedule:
        """The schedule for a training set of ``images``."""
        return schedule_of(self, images)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form for checkpoints and provenance."""
        return asdict(self)


CONFETTI = FcddConfig(preset="confetti", batch_size=8, epochs=20, min_steps=300, max_steps=800)
"""The recommended preset: the paper's unsupervised setting for industrial images, sized for two CPU cores."""

CONFETTI_MASKS = replace(CONFETTI, preset="confetti-masks", supervision="pixel")
"""The same with the confetti's masks (the authors' "malformed_normal_gt"), equation 5 in place of 4."""

PAPER = FcddConfig(preset="paper-frames")
"""The authors' schedule for MVTec AD with this project's trunk."""

PRESETS: Mapping[str, FcddConfig] = MappingProxyType(
    {preset.preset: preset for preset in (CONFETTI, CONFETTI_MASKS, PAPER)}
)
RECOMMENDED = "confetti"
