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
from trainer.augment import Augment
from trainer.config import Decay, Schedule, schedule_of
from trainer.fcdd_nets import Network, Normalization, ResNetLayer
from trainer.heatmap import Kernel

ENLARGEMENTS = (1, 2, 4)
"""All divide the stride of every layer of the network, so that its numbers lie a whole number of px apart."""


@dataclass(frozen=True, slots=True)
class FcddConfig:
    """Settings of FCDD.

    ``network`` is ``patch``: ``trunk`` is a shipped teacher's name or file and its convolutions are the network's, with
    ``frozen`` of them left as they are (``weights`` ``random``, of the same shape, are a control); ``resnet``: the
    shipped ResNet-18 with ``weights`` ``imagenet`` (or ``random``) up to ``layer``, ``frozen`` counting its stem and
    layers, and frames made ``enlarge`` times as large in the graph; or one of the authors' networks of ``fcdd_nets``,
    which start from random weights and can take their input by ``normalization`` ``contrast``: each frame by its own.

    ``sigma`` is the Gaussian's, in px, ``kernel`` explained in ``heatmap``; the map has a cell every ``stride`` px, and
    its ``score`` is its maximum or its mean.

    Anomalies are good images with ``confetti`` on them, pieces of everyday ``photographs``, half each where there are
    both ([I]: one kind at a time), and ``bad``: a folder of a few flawed parts that are never tested with, which stand
    in for half of the others ([I]).  ``supervision`` ``image`` labels images, ``pixel`` learns from masks: confetti has
    them, and bad parts must, as ``IMAGE_mask.png`` beside them.  ``anomaly_share`` of the images of a step are
    anomalies; good and bad ones alike are changed as ``augment`` says.  ``labels`` ``random`` is the control.

    Raises:
        CommandError: a value out of range, or settings that contradict each other.
    """

    preset: str
    network: Network = "patch"
    trunk: str = "line-65"  # [C]: distilled from ResNet-18, p = 65 ([I] for MVTec AD: ImageNet's VGG, r = 62)
    layer: ResNetLayer = "layer2"  # [C]: field 99 px, a number every 8 px as in the authors' network
    enlarge: int = 1  # [C]: small images are not what ImageNet's filters are made for
    weights: Literal["teacher", "imagenet", "random"] = "teacher"  # [I] for MVTec AD: ImageNet weights
    frozen: int = 2  # [I]: the front half of the network for MVTec AD
    normalization: Normalization = "fixed"  # [I]: contrast for MVTec AD, fixed for CIFAR-10
    sigma: float = 12.0  # [I] for MVTec AD
    kernel: Kernel = "smooth"  # [C]
    stride: int = 4  # [C]: the paper's map has a cell a pixel
    score: Literal["max", "mean"] = "max"  # [C]; [P]: mean
    size_px: int = 256
    supervision: Literal["image", "pixel"] = "image"  # [P] unsupervised: image labels
    confetti: bool = True
    photographs: str | None = None
    bad: str | None = None
    labels: Literal["true", "random"] = "true"
    anomaly_share: float = 0.5  # [P]
    augment: Augment = "none"  # [C]; [I]: light, and crops
    epochs: int = 200  # [I]
    min_steps: int = 1
    max_steps: int = 1_000_000
    batch_size: int = 16  # [I]: 128 by joining eight
    learning_rate: float = 1e-3  # [I]
    weight_decay: float = 1e-4  # [I]
    decay: Decay = "cosine"  # [C]; [I]: x 0.985 an epoch
    patience: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"

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
        if self.network in ("patch", "resnet") and self.normalization == "contrast":
            raise CommandError("normalization = contrast: learned weights know the fixed one only; use network = vgg")
        self._check_weights()
        if self.kernel == "authors" and self.stride % 2 == 0:
            raise CommandError(
                f"kernel = authors is made of whole pixels, and a stride of {self.stride} falls between them"
            )
        if self.supervision == "pixel" and self.photographs is not None:
            raise CommandError("supervision = pixel needs a mask for every anomaly, and photographs have none")
        if self.supervision == "pixel" and self.augment == "views":
            raise CommandError(
                "augment = views moves images and not their masks, which supervision = pixel learns from"
            )
        if self.supervision == "pixel" and self.labels == "random":
            raise CommandError("labels = random is the control for image labels; supervision = pixel has none")

    def _check_weights(self) -> None:
        other = {"patch": "imagenet", "resnet": "teacher"}.get(self.network)
        if self.weights == other:
            raise CommandError(
                f"network = {self.network} has no weights = {other}: patch takes teacher or random, resnet imagenet or "
                "random"
            )
        if self.enlarge not in ENLARGEMENTS or (self.enlarge > 1 and self.network != "resnet"):
            raise CommandError(
                f"enlarge = {self.enlarge} with network = {self.network}: expected one of "
                f"{', '.join(map(str, ENLARGEMENTS))}, above 1 only with network = resnet"
            )
        if self.network == "resnet" and self.kernel == "authors":
            raise CommandError("kernel = authors is for fields of an even side; network = resnet takes kernel = smooth")

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

PAPER = FcddConfig(preset="paper-frames", augment="light")
"""The authors' schedule for MVTec AD with this project's trunk."""

PAPER_VGG = FcddConfig(
    preset="paper-vgg", network="vgg", normalization="contrast", size_px=224, stride=1, kernel="authors",
    augment="light", batch_size=128,
)  # fmt: skip
"""The authors' network for large images from random weights, as they have it for ImageNet; for a GPU."""

PAPER_CIFAR = FcddConfig(
    preset="paper-cifar", network="cnn32", size_px=32, sigma=1.2, kernel="authors", stride=1, score="mean",
    confetti=False, augment="views", epochs=600, batch_size=200, weight_decay=1e-6, decay="tenths",
)  # fmt: skip
"""The authors' CIFAR-10 setting: 600 epochs, a tenth of the rate from 400 and from 500 on.

It has no anomalies of its own: theirs are CIFAR-100, here a folder of ``--photographs``.
"""

CONFETTI_RESNET = replace(
    CONFETTI, preset="confetti-resnet", network="resnet", weights="imagenet", frozen=2, learning_rate=1e-4
)
"""``confetti`` with ImageNet's ResNet-18, near to the authors' frozen VGG; a comparison, not the better one so far."""

CIFAR_RESNET = replace(
    PAPER_CIFAR, preset="cifar-resnet", network="resnet", weights="imagenet", layer="layer3", frozen=3, enlarge=2,
    kernel="smooth", batch_size=32, learning_rate=1e-4, epochs=7, decay="cosine",
)  # fmt: skip
"""CIFAR-10 from ImageNet's weights, which the authors' setting does not have: another question than theirs.

Depth, frozen part, rate and length were compared on training images (docs/methods/fcdd.md).
"""

PAPER_GRAY = replace(
    PAPER_CIFAR, preset="paper-gray", network="cnn28", size_px=28, epochs=400, batch_size=128, decay="cosine"
)
"""The authors' Fashion-MNIST network and length; Adam at 1e-3, where theirs is Nesterov's momentum at 1e-2."""

_ALL = (CONFETTI, CONFETTI_MASKS, CONFETTI_RESNET, PAPER, PAPER_VGG, PAPER_CIFAR, CIFAR_RESNET, PAPER_GRAY)
PRESETS: Mapping[str, FcddConfig] = MappingProxyType({preset.preset: preset for preset in _ALL})
RECOMMENDED = "confetti"
