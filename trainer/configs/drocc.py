"""Settings of ``methods.drocc`` (DROCC and DROCC-LF, ICML 2020), and its named presets.

Owns what can be set and why each default is what it is.  [P] is the paper, [I] the authors' code, [C] chosen here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from edge.errors import CommandError
from trainer.config import Schedule, schedule_of
from trainer.drocc_nets import LeNetSpec
from trainer.drocc_objective import BatchNorm, Objective
from trainer.shell_search import Ascent, Shell


@dataclass(frozen=True, slots=True)
class DroccConfig:
    """Settings of DROCC and, with ``bad``, DROCC-LF.

    What is trained: ``network`` is ``paper`` (LeNet, padded by 2, a whole crop) or ``dense`` (nothing padded, exact on
    whole frames).  It sees patches of ``patch_px``: ``crops`` from every frame of ``size_px`` and every step, or the
    frame itself where the sides are equal.  The deployed map has an answer every ``stride`` px.

    The adversary: ``radius`` (in units of the normalized input; None is ``sqrt(d) / 4``) and ``gamma`` bound the shell;
    ``ascent_steps`` of length ``ascent_step`` (None: the radius divided by the steps) climb in it; ``mu`` weighs what
    is found.  ``batch_norm`` is explained in ``drocc_objective``.

    DROCC-LF: ``bad`` is a folder of images of flawed parts that are never tested with; ``IMAGE_mask.png`` beside an
    image marks its flaw (any value above 0), and patches are drawn from there; without a mask the whole image counts,
    which needs ``size_px = patch_px``.  ``negatives`` bad patches go into every step.

    Raises:
        CommandError: a value out of range, or settings that contradict each other.
    """

    preset: str
    network: Literal["paper", "dense"] = "dense"
    size_px: int = 256
    patch_px: int = 36
    stride: int = 8
    crops: int = 8
    radius: float | None = None
    gamma: float = 1.0  # [P]: 1 for all image experiments
    mu: float = 1.0  # [P]: 1 or 0.5
    ascent_steps: int = 50  # [I]
    ascent_step: float | None = 0.001  # [P]: 0.001 for most classes of CIFAR-10
    project_every: int = 1  # [P]; [I]: 10
    batch_norm: BatchNorm = "joint"  # [C]
    bad: str | None = None
    negatives: int = 32  # [C]
    epochs: int = 100  # [I]
    min_steps: int = 1
    max_steps: int = 1_000_000
    batch_size: int = 256  # [I]
    learning_rate: float = 1e-3  # [P]
    weight_decay: float = 0.0  # lambda; [I] never uses it
    decay: Literal["constant", "cosine", "drop"] = "cosine"  # [C]; [I]: 1, 0.1 and 0.01 from 40 % and 80 % on
    patience: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        LeNetSpec(self.network, self.patch_px, 1)
        self.objective(1)
        if self.size_px < self.patch_px:
            raise CommandError(
                f"size_px = {self.size_px} is smaller than the network's patch of {self.patch_px} px; "
                "give larger images or a smaller patch_px"
            )
        for name, value in (("stride", self.stride), ("crops", self.crops), ("negatives", self.negatives)):
            if value < 1:
                raise CommandError(f"{name} must be at least 1, got {value}")
        if not (math.isfinite(self.mu) and self.mu > 0):
            raise CommandError(f"mu = {self.mu}: without adversaries every network that always says good is perfect")

    def objective(self, channels: int) -> Objective:
        """The objective for patches of ``channels`` channels, with everything that was left open filled in."""
        radius = self.radius if self.radius is not None else math.sqrt(channels * self.patch_px**2) / 4
        shell = Shell(radius, self.gamma)
        step = self.ascent_step if self.ascent_step is not None else radius / max(self.ascent_steps, 1)
        ascent = Ascent(self.ascent_steps, step, self.project_every)
        metric: Literal["euclidean", "saliency"] = "euclidean" if self.bad is None else "saliency"
        return Objective(shell, ascent, self.mu, metric, self.batch_norm)

    def schedule(self, images: int) -> Schedule:
        """The schedule for a training set of ``images``."""
        return schedule_of(self, images)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form for checkpoints and provenance."""
        return asdict(self)


DENSE = DroccConfig(
    preset="dense",
    batch_size=8,
    ascent_steps=5,
    ascent_step=0.2,
    epochs=20,
    min_steps=300,
    max_steps=1000,
)
"""The recommended preset: 36 px patches, a map every 8 px, sized for two CPU cores.

Chosen here, without test images: 8 patches of 8 frames a step; a radius of sqrt(d) / 4, half of the paper's starting
point; five ascent steps of 0.2.  Steps of a fifth of the radius, which let the adversary cross its sphere, are too
strong on cloth: on aitex_02 the loss stays at 2 log 2 = 1.386, the network says the same of everything.  With 0.2 it
falls to 0.18 in 80 steps.  Defects planted into held-out good images of aitex_02 (80 steps, pixel AUROC of small and of
large ones): 0.742 and 0.980, with a radius of 5 instead of 9 0.710 and 0.972.
"""

PAPER = DroccConfig(
    preset="paper", network="paper", size_px=32, patch_px=32, stride=32, crops=1, radius=8.0, batch_norm="apart"
)
"""The paper's CIFAR-10 setting: the frame is the crop, one answer for it.  What a class takes: ``CIFAR``.

On larger frames (``--set size_px=256 stride=16``) its map is a grid of crops, computed as one batch.
"""

PAPER_FRAMES = replace(DENSE, preset="paper-frames", network="paper", patch_px=32, stride=16)
"""``dense`` with the padded network: what a map costs when every crop is computed by itself."""

CIFAR: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "airplane": (8, 1, 0.001), "automobile": (8, 0.5, 0.001), "bird": (40, 0.5, 0.001), "cat": (28, 1, 0.001),
        "deer": (32, 1, 0.001), "dog": (24, 0.5, 0.01), "frog": (36, 1, 0.001), "horse": (32, 0.5, 0.001),
        "ship": (28, 0.5, 0.001), "truck": (16, 0.5, 0.001),
    }
)  # fmt: skip
"""Radius, mu and learning rate of each class of CIFAR-10 (paper, table 11); its optimizers are in docs/methods."""

PRESETS: Mapping[str, DroccConfig] = MappingProxyType(
    {preset.preset: preset for preset in (DENSE, PAPER, PAPER_FRAMES)}
)
RECOMMENDED = "dense"
