"""The patch networks: teacher and students of one profile share this architecture.

Owns the layer tables of the paper (p = 17, 33, 65), the width profiles, the input normalization and the seeded
initialization.  Leaves losses to ``distill`` and ``methods``, and dense evaluation at other strides to ``fdfe``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

LEAKY_SLOPE = 5e-3
"""Slope of every LeakyReLU (paper, appendix tables 4 and 5)."""

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True, slots=True)
class Layer:
    """One step of a patch network: a valid convolution, optionally followed by a 2 x 2 max pool of stride 2."""

    kernel: int
    pool: bool = False


# "Consistent choice" of the paper's tables 4 and 5: the printed tables contradict themselves, these kernels are
# the ones that give the printed output sizes (p = 33: conv1 is 5x5; p = 17: conv1 is 6x6; p = 65: conv5 is 1x1).
LAYERS: Mapping[int, tuple[Layer, ...]] = MappingProxyType(
    {
        17: (Layer(6), Layer(5), Layer(5), Layer(4)),
        33: (Layer(5, pool=True), Layer(5, pool=True), Layer(2), Layer(4)),
        65: (Layer(5, pool=True), Layer(5, pool=True), Layer(5, pool=True), Layer(4), Layer(1)),
    }
)


@dataclass(frozen=True, slots=True)
class PatchNetSpec:
    """What identifies a patch network's shape: patch side in px, widths of all but the last layer, output width.

    Raises:
        ValueError: the patch has no layer table, or the widths do not fit it.
    """

    patch: int
    widths: tuple[int, ...]
    descriptor_dim: int

    def __post_init__(self) -> None:
        if self.patch not in LAYERS:
            raise ValueError(f"patch must be one of {sorted(LAYERS)} px, got {self.patch}")
        expected = len(LAYERS[self.patch]) - 1
        if len(self.widths) != expected or min(self.widths) < 1 or self.descriptor_dim < 1:
            raise ValueError(
                f"a p = {self.patch} network takes {expected} positive widths and a positive descriptor_dim, "
                f"got widths {self.widths} and descriptor_dim {self.descriptor_dim}"
            )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layer table of this patch size."""
        return LAYERS[self.patch]

    @property
    def stride(self) -> int:
        """Distance in input px between neighboring descriptors when the network runs on a whole image."""
        return int(2 ** sum(layer.pool for layer in self.layers))

    @property
    def footprint(self) -> int:
        """Side in px of what a descriptor truly sees; pooling floors, so 17, 32, 60 for p = 17, 33, 65."""
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
        return {"patch": self.patch, "widths": list(self.widths), "descriptor_dim": self.descriptor_dim}

    @classmethod
    def from_json(cls, value: object) -> PatchNetSpec:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: a key is missing, unknown or of another type.
        """
        match value:
            case {"patch": int(patch), "widths": list(widths), "descriptor_dim": int(dim), **rest} if not rest:
                if all(isinstance(width, int) for width in widths):
                    return cls(patch, tuple(widths), dim)
        raise ValueError(f"not a patch network spec: {value!r}; expected patch, widths, descriptor_dim")


PROFILES: Mapping[str, PatchNetSpec] = MappingProxyType(
    {
        "line": PatchNetSpec(patch=33, widths=(32, 64, 64), descriptor_dim=32),
    }
)
"""Named shapes; ``line`` is the paper's p = 33 at a quarter of its width (11.1 GFLOP for teacher and 3 students at
256 x 256 with the rim padded by reflection)."""


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
                steps.append(nn.LeakyReLU(LEAKY_SLOPE))
            if layer.pool:
                steps.append(nn.MaxPool2d(2, 2))
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
    gain = nn.init.calculate_gain("leaky_relu", LEAKY_SLOPE)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
                scale = 1.0 if module is net.last_conv else gain
                module.weight.normal_(0.0, scale / math.sqrt(fan_in), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
    return net
