"""FCDD's networks (Liznerski et al., ICLR 2021, appendix; layer lists of the authors' code) and their receptive fields.

Owns architecture only: frames in, one number phi for each place out.  Leaves what phi is to be to ``fcdd_objective``
and where a number lies in the frame to ``heatmap``, which takes the field from here.

    cnn28   28 px (MNIST, Fashion-MNIST)   two 5 x 5 convolutions, field 16 px, a number every 4 px
    cnn32   32 px (CIFAR-10)               four 3 x 3 convolutions, field 22 px, every 4 px
    vgg     224 px (ImageNet, MVTec AD)    VGG-11 with batch norm up to its third block, field 62 px, every 8 px
    patch   frames                         a shipped teacher's convolutions: ours, where the authors have ImageNet's VGG
    resnet  frames, or small images        ImageNet's ResNet-18 up to a layer: ours again; small images enlarged first
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

from trainer.backbones import ResNet18
from trainer.grids import reading_weights
from trainer.method import Frames
from trainer.patch_nets import LEAKY_SLOPE, InputNormalization, PatchNet

Network = Literal["patch", "resnet", "cnn28", "cnn32", "vgg"]
ResNetLayer = Literal["layer1", "layer2", "layer3"]
"""Where ``resnet`` ends: its numbers see 43, 99 or 211 px, one every 4, 8 or 16."""
Normalization = Literal["fixed", "contrast"]
"""Of the input: by ImageNet's mean and deviation, or by each frame's own contrast."""

DARK: Final = 0.1
"""Mean absolute contrast in gray levels below which a frame is not stretched any further."""

SMALL_EPS: Final = 1e-4
"""Of batch norm in the two small networks (authors' code); ``vgg`` has torch's 1e-5."""


@dataclass(frozen=True, slots=True)
class Field:
    """What a number sees: ``size_px`` of the frame, ``stride_px`` between numbers, the first centered at ``start_px``.

    ``layers`` are (kernel, stride, padding) from input to output, of the longest path where there are several; they
    see the frame ``enlarge`` times as large, by ``Enlargement``, and their stride is a multiple of that.
    """

    layers: tuple[tuple[int, int, int], ...]
    enlarge: int = 1

    @property
    def size_px(self) -> int:
        size, jump = 1, 1
        for kernel, stride, _ in self.layers:
            size, jump = size + (kernel - 1) * jump, jump * stride
        if self.enlarge == 1:
            return size
        # The outermost pixels of the enlarged frame are each read between two of the frame's.
        first, last = (self._in_frame(self._start() + side * (size - 1) / 2) for side in (-1, 1))
        return math.ceil(last) - math.floor(first) + 1

    @property
    def stride_px(self) -> int:
        jump = 1
        for _, stride, _ in self.layers:
            jump *= stride
        return jump // self.enlarge

    @property
    def start_px(self) -> float:
        return self._in_frame(self._start())

    def cells(self, side_px: int) -> int:
        """How many numbers there are along a side; 0 or less where the side is too small."""
        side_px *= self.enlarge
        for kernel, stride, padding in self.layers:
            side_px = (side_px + 2 * padding - kernel) // stride + 1
        return side_px

    def _start(self) -> float:
        start, jump = 0.0, 1
        for kernel, stride, padding in self.layers:
            start, jump = start + ((kernel - 1) / 2 - padding) * jump, jump * stride
        return start

    def _in_frame(self, enlarged_px: float) -> float:
        return (enlarged_px + 0.5) / self.enlarge - 0.5


_SEES_FARTHER = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


class Enlargement(nn.Module):
    """(n, 3, side, side) -> (n, 3, k side, k side): bilinear, as two products with one constant matrix.

    As ``interpolate(align_corners=False)``; TensorRT builds products where it may refuse a resize.
    """

    def __init__(self, side_px: int, factor: int) -> None:
        super().__init__()
        at = (torch.arange(side_px * factor) + 0.5) / factor - 0.5
        self.register_buffer("weights", reading_weights(side_px, at), persistent=False)  # (k side, side)

    def forward(self, pixels: Tensor) -> Tensor:
        weights = self.get_buffer("weights")
        return torch.matmul(torch.matmul(weights, pixels), weights.T)


class ContrastNormalization(nn.Module):
    """uint8 (n, h, w, C) -> (n, 3, h, w): less the frame's mean, in its mean contrast, between training extremes.

    The authors' local contrast normalization for MVTec AD, with ``extremes`` (least, largest) of the training images.
    """

    extremes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("extremes", torch.tensor([0.0, 1.0]))

    @torch.no_grad()
    def fit(self, frames: Frames) -> None:
        """Take the extremes from training images (n, h, w, C)."""
        found = [self.contrast(torch.from_numpy(frame[None].copy())).aminmax() for frame in frames]
        least, largest = min(float(one.min) for one in found), max(float(one.max) for one in found)
        self.extremes.copy_(torch.tensor([least, largest]))

    def contrast(self, frames: Tensor) -> Tensor:
        """What lies between the extremes."""
        pixels = frames.float().permute(0, 3, 1, 2)
        pixels = pixels - pixels.mean((1, 2, 3), keepdim=True)
        # A frame of one gray level is all zeros, not a division by zero: a camera in the dark must not end a line.
        level: Tensor = pixels.abs().mean((1, 2, 3), keepdim=True).clamp_min(DARK)
        flat: Tensor = pixels / level
        return flat

    def forward(self, frames: Tensor) -> Tensor:
        least, largest = self.extremes
        three: Tensor = ((self.contrast(frames) - least) / (largest - least)).expand(-1, 3, -1, -1)
        return three


class FcddNet(nn.Module):
    """uint8 frames (n, h, w, C) -> phi (n, u, v): convolutions, and a 1 x 1 convolution to one number.

    Gray frames are shown in all three channels, so that one network serves both.  With ``enlarge`` above 1 the frames
    are ``side_px`` square.
    """

    def __init__(
        self, trunk: nn.Sequential, width: int, normalization: Normalization = "fixed", *, enlarge: int = 1,
        side_px: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.normalize = InputNormalization() if normalization == "fixed" else ContrastNormalization()
        self.enlarge = Enlargement(side_px, enlarge) if enlarge > 1 else nn.Identity()
        self.trunk = trunk
        self.head = nn.Conv2d(width, 1, 1)  # with a bias, as in the authors' code: it is the center
        self.field = Field(tuple(_steps(trunk)), enlarge)

    def forward(self, frames: Tensor) -> Tensor:
        answers: Tensor = self.head(self.trunk(self.enlarge(self.normalize(frames))))
        return answers[:, 0]


def paper_net(network: Network, seed: int, normalization: Normalization = "fixed") -> FcddNet:
    """One of the authors' networks, its first weights drawn from ``seed`` alone.

    Raises:
        KeyError: ``patch`` and ``resnet``, which are made of other networks.
    """
    layers, width = {"cnn28": (_cnn28, 128), "cnn32": (_cnn32, 128), "vgg": (_vgg, 512)}[network]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FcddNet(nn.Sequential(*layers()), width, normalization)


def patch_net(net: PatchNet, frozen: int, seed: int) -> FcddNet:
    """A copy of a patch network with its first ``frozen`` convolutions kept as they are; ``seed`` draws the head."""
    own = PatchNet(net.spec)
    own.load_state_dict(net.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = FcddNet(nn.Sequential(own, nn.LeakyReLU(LEAKY_SLOPE)), net.spec.descriptor_dim)
    convolutions = [layer for layer in own.layers if isinstance(layer, nn.Conv2d)]
    for layer in convolutions[:frozen]:
        layer.requires_grad_(False)
    return made


def resnet_net(
    backbone: ResNet18, layer: ResNetLayer, frozen: int, seed: int, *, enlarge: int = 1, side_px: int = 0
) -> FcddNet:
    """A copy of ResNet-18 up to ``layer``; its first ``frozen`` parts (stem, layer1, layer2, layer3) kept as they are.

    There is no batch norm left in it, so nothing drifts in the frozen part.  ``seed`` draws the head.
    """
    own = copy.deepcopy(backbone).requires_grad_(True)
    stem = nn.Sequential(own.conv1, nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
    parts = {"stem": stem, "layer1": own.layer1, "layer2": own.layer2, "layer3": own.layer3}
    kept = list(parts.values())[: list(parts).index(layer) + 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = FcddNet(nn.Sequential(*kept), backbone.layer(layer).channels, enlarge=enlarge, side_px=side_px)
    for part in kept[:frozen]:
        part.requires_grad_(False)
    return made


def random_resnet(seed: int) -> ResNet18:
    """The same shape from random weights, a control: He's deviation, and each block's second convolution at zero.

    Without batch norm a block that starts as its shortcut is what trains (Zhang et al. 2019, "Fixup").
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = ResNet18()
        for name, layer in made.named_modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
                if name.endswith("conv2"):
                    nn.init.zeros_(layer.weight)
    return made


def _cnn28() -> list[nn.Module]:
    return [*_block(3, 128, 5), nn.MaxPool2d(2), *_block(128, 128, 5), nn.MaxPool2d(2)]


def _cnn32() -> list[nn.Module]:
    return [
        *_block(3, 128, 3), nn.MaxPool2d(2), *_block(128, 256, 3), *_block(256, 256, 3), nn.MaxPool2d(2),
        nn.Conv2d(256, 128, 3, padding=1),
    ]  # fmt: skip


def _block(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    return [convolution, nn.BatchNorm2d(outputs, eps=SMALL_EPS), nn.LeakyReLU()]


def _vgg() -> list[nn.Module]:
    layers: list[nn.Module] = []
    inputs = 3
    for width in (64, None, 128, None, 256, 256, None, 512, 512):
        if width is None:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return layers


def _steps(trunk: nn.Module) -> Iterable[tuple[int, int, int]]:
    """Of the longest path: a block's shortcut sees less than its convolutions do, and around the same center."""
    for name, layer in trunk.named_modules():
        if "downsample" not in name.split(".") and isinstance(layer, _SEES_FARTHER):
            yield _side(layer.kernel_size), _side(layer.stride), _side(layer.padding)


def _side(value: object) -> int:
    """A square layer's side; torch keeps some as pairs, some as numbers."""
    match value:
        case int(side) | (int(side), *_):
            return side
    raise TypeError(f"a layer with the side {value!r}, expected whole numbers of pixels")
