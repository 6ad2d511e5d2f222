"""The patch networks: teacher and students of one profile share this architecture.

Owns the layer tables of the paper (p = 17, 33, 65) and of EfficientAD's PDN-S, the width profiles, the input
normalization and the seeded initialization.  Leaves losses to ``distill`` and ``methods``, and dense evaluation at
other strides to ``fdfe``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

LEAKY_SLOPE = 5e-3
"""Slope of every LeakyReLU (paper, appendix tables 4 and 5)."""

Family = Literal["paper", "pdn"]
"""Whose layer table: ``paper`` is Bergmann et al. 2020, ``pdn`` EfficientAD's patch description network PDN-S
(Batzner et al. 2023, table 6) without padding."""

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True, slots=True)
class Layer:
    """One step of a patch network: a valid convolution, its activation, optionally a 2 x 2 pool of stride 2.

    ``negative_slope`` is the activation's; 0 makes it a plain ReLU.  The last layer has no activation in either
    family, so its slope counts for nothing.
    """

    kernel: int
    pool: Literal["max", "average"] | None = None
    negative_slope: float = LEAKY_SLOPE


# "Consistent choice" of the paper's tables 4 and 5: the printed tables contradict themselves, these kernels are
# the ones that give the printed output sizes (p = 33: conv1 is 5x5; p = 17: conv1 is 6x6; p = 65: conv5 is 1x1).
LAYERS: Mapping[tuple[Family, int], tuple[Layer, ...]] = MappingProxyType(
    {
        ("paper", 17): (Layer(6), Layer(5), Layer(5), Layer(4)),
        ("paper", 33): (Layer(5, "max"), Layer(5, "max"), Layer(2), Layer(4)),
        ("paper", 65): (Layer(5, "max"), Layer(5, "max"), Layer(5, "max"), Layer(4), Layer(1)),
        ("pdn", 33): (Layer(4, "average", 0.0), Layer(4, "average", 0.0), Layer(3, None, 0.0), Layer(4, None, 0.0)),
    }
)


@dataclass(frozen=True, slots=True)
class PatchNetSpec:
    """What identifies a patch network's shape: patch side in px, widths of all but the last layer, output width,
    and whose layer table it follows.

    Raises:
        ValueError: the family has no layer table for the patch, or the widths do not fit it.
    """

    patch: int
    widths: tuple[int, ...]
    descriptor_dim: int
    family: Family = "paper"

    def __post_init__(self) -> None:
        if (self.family, self.patch) not in LAYERS:
            known = ", ".join(f"{patch} px of family {family!r}" for family, patch in LAYERS)
            raise ValueError(f"no layer table for a patch of {self.patch} px of family {self.family!r}; known: {known}")
        expected = len(self.layers) - 1
        if len(self.widths) != expected or min(self.widths) < 1 or self.descriptor_dim < 1:
            raise ValueError(
                f"a p = {self.patch} network takes {expected} positive widths and a positive descriptor_dim, "
                f"got widths {self.widths} and descriptor_dim {self.descriptor_dim}"
            )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layer table of this family and patch size."""
        return LAYERS[self.family, self.patch]

    @property
    def stride(self) -> int:
        """Distance in input px between neighboring descriptors when the network runs on a whole image."""
        return int(2 ** sum(layer.pool is not None for layer in self.layers))

    @property
    def footprint(self) -> int:
        """Side in px of what a descriptor truly sees; pooling floors, so 17, 32, 60 for p = 17, 33, 65 (PDN: 33)."""
        side, step = 1, 1
        for layer in self.layers:
            side += (layer.kernel - 1) * step
            if layer.pool:
                side += step
                step *= 2
        return side

    @property
    def center(self) -> float:
        """Pixel index, in px from the patch's corner pixel, of the middle of the footprint."""
        return (self.footprint - 1) / 2

    def grid(self, side_px: int) -> int:
        """Number of descriptors along an image side of ``side_px`` px (no padding)."""
        return (side_px - self.footprint) // self.stride + 1

    def macs(self, height_px: int, width_px: int) -> int:
        """Multiply-adds of one network on an image of ``height_px`` x ``width_px`` px, without any padding."""
        total, channels = 0, 3
        for layer, width in zip(self.layers, (*self.widths, self.descriptor_dim), strict=True):
            height_px, width_px = height_px - layer.kernel + 1, width_px - layer.kernel + 1
            total += channels * width * layer.kernel**2 * height_px * width_px
            channels = width
            if layer.pool:
                height_px, width_px = height_px // 2, width_px // 2
        return total

    def to_json(self) -> dict[str, object]:
        """A JSON-ready form; ``from_json`` reads it back."""
        found: dict[str, object] = {
            "patch": self.patch,
            "widths": list(self.widths),
            "descriptor_dim": self.descriptor_dim,
        }
        # Left out for the paper's nets, so that teachers written before there were families compare equal.
        return found if self.family == "paper" else found | {"family": self.family}

    @classmethod
    def from_json(cls, value: object) -> PatchNetSpec:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: a key is missing, unknown or of another type.
        """
        match value:
            case {"patch": int(patch), "widths": list(widths), "descriptor_dim": int(dim), **rest}:
                family = rest.pop("family", "paper")
                if not rest and family in ("paper", "pdn") and all(isinstance(width, int) for width in widths):
                    return cls(patch, tuple(widths), dim, family)
        raise ValueError(f"not a patch network spec: {value!r}; expected patch, widths, descriptor_dim, maybe family")


PROFILES: Mapping[str, PatchNetSpec] = MappingProxyType(
    {
        "line": PatchNetSpec(patch=33, widths=(32, 64, 64), descriptor_dim=32),
        "line-fast": PatchNetSpec(patch=33, widths=(16, 32, 32), descriptor_dim=32),
        "line-17": PatchNetSpec(patch=17, widths=(32, 64, 64), descriptor_dim=32),
        "line-65": PatchNetSpec(patch=65, widths=(32, 32, 32, 64), descriptor_dim=32),
        "half-65": PatchNetSpec(patch=65, widths=(64, 64, 64, 128), descriptor_dim=48),
        "paper-17": PatchNetSpec(patch=17, widths=(128, 256, 256), descriptor_dim=128),
        "paper-33": PatchNetSpec(patch=33, widths=(128, 256, 256), descriptor_dim=128),
        "paper-65": PatchNetSpec(patch=65, widths=(128, 128, 128, 256), descriptor_dim=128),
        "pdn-s": PatchNetSpec(patch=33, widths=(128, 256, 256), descriptor_dim=384, family="pdn"),
    }
)
"""Named shapes.

``line`` is the paper's p = 33 at a quarter of its width (11.1 GFLOP for teacher and 3 students at 256 x 256 with the
rim padded by reflection), ``line-fast`` at an eighth; ``line-17`` and ``line-65`` are the other two scales at a
quarter, ``half-65`` the last at half.  ``paper-17``, ``paper-33`` and ``paper-65`` have the paper's widths.  Its table
for p = 65 contradicts itself on conv3: ``paper-65`` takes 128 channels, the other reading is widths (128, 128, 256,
256).  ``pdn-s`` is EfficientAD's PDN-S.
"""


class InputNormalization(nn.Module):
    """uint8 pixels (N, h, w, C), C = 1 gray or 3 RGB -> float32 (N, 3, h, w), ImageNet mean 0 and deviation 1.

    Shared by training and export, so that no normalization can differ between the two.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        pixels = frames.float().permute(0, 3, 1, 2)  # (N, C, h, w); cast before permute, as TensorRT wants it
        return (pixels - self.mean) / self.std  # gray broadcasts to (N, 3, h, w)


class PatchNet(nn.Module):
    """One teacher or student: normalized pixels (N, 3, h, w) -> descriptors (N, d, grid(h), grid(w)).

    Position (i, j) equals the network on the patch whose corner pixel is (stride * i, stride * j).  The last
    convolution is linear, so that a per-channel mean and deviation can be folded into it.
    """

    def __init__(self, spec: PatchNetSpec) -> None:
        super().__init__()
        self.spec = spec
        steps: list[nn.Module] = []
        channels = 3
        widths = (*spec.widths, spec.descriptor_dim)
        for index, (layer, width) in enumerate(zip(spec.layers, widths, strict=True)):
            steps.append(nn.Conv2d(channels, width, layer.kernel))
            if index + 1 < len(widths):
                steps.append(nn.LeakyReLU(layer.negative_slope) if layer.negative_slope else nn.ReLU())
            if layer.pool is not None:
                steps.append(nn.MaxPool2d(2, 2) if layer.pool == "max" else nn.AvgPool2d(2, 2))
            channels = width
        self.layers = nn.Sequential(*steps)

    def forward(self, pixels: Tensor) -> Tensor:
        descriptors: Tensor = self.layers(pixels)
        return descriptors

    @property
    def last_conv(self) -> nn.Conv2d:
        """The linear convolution that writes the descriptor; mu and sigma are folded here."""
        conv = self.layers[-1]
        if not isinstance(conv, nn.Conv2d):
            raise TypeError("a patch network ends in its linear convolution")
        return conv


def build_patch_net(spec: PatchNetSpec, seed: int) -> PatchNet:
    """A fresh network, Kaiming-normal weights and zero biases drawn from ``seed`` alone (global RNG untouched)."""
    with torch.random.fork_rng(devices=[]):  # torch's own initialization draws from the global generator
        net = PatchNet(spec)
    generator = torch.Generator().manual_seed(seed)
    convs = [module for module in net.layers if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for layer, conv in zip(spec.layers, convs, strict=True):
            fan_in = conv.in_channels * layer.kernel**2
            gain = nn.init.calculate_gain("leaky_relu", layer.negative_slope)
            scale = 1.0 if conv is net.last_conv else gain
            conv.weight.normal_(0.0, scale / math.sqrt(fan_in), generator=generator)
            if conv.bias is not None:
                conv.bias.zero_()
    return net
