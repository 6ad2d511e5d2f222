"""The deployed graph of students and teachers: uint8 frames in, one anomaly map and image score out.

Owns the module that is exported and what is folded into which weight.  Leaves what the numbers mean to
``student_scale`` and the method, and the form of the file to ``export``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edge.bundle import MapGeometry
from trainer.autoencoder import AutoEncoder
from trainer.backbone_teacher import BackboneTeacher
from trainer.bisection import median
from trainer.config import Center
from trainer.gaussian_metric import GaussianMetric
from trainer.grids import reading_weights
from trainer.patch_nets import InputNormalization, PatchNet
from trainer.student_scale import Scale, around, copied, student_errors, teacher_at


@dataclass(frozen=True, slots=True)
class Affine:
    """A raw map's normalization: (x - shift) * scale."""

    shift: float
    scale: float


class ScaleGraph(nn.Module):
    """Raw pixels (N, C, h, w) in 0..255 -> the normalized maps of one scale, summed (N, h', w').

    Input normalization is folded into the first convolutions, for gray input at a third of their cost, unless zeros
    are to stand around the *normalized* image; mu and sigma are folded into the teacher's last.  All exact.
    """

    def __init__(self, scale: Scale, normalizations: Mapping[str, Affine], channels: int, stride: int) -> None:
        super().__init__()
        config = scale.config
        self.dims = scale.spec.descriptor_dim
        # Of maps that were not chosen, nothing is computed.
        asked = normalizations.keys() - {"t"}
        teacher, students = _own(scale.teacher.net), [copied(_patch_net(net)) for net in scale.nets if asked]
        folds = config.pad != "zero" and scale.autoencoder is None
        self.normalize = None if folds else InputNormalization()
        if folds:
            for net in (teacher, *students):
                if isinstance(net, PatchNet):
                    fold_input(net, channels)
        if isinstance(teacher, PatchNet):
            standardize_output(teacher.last_conv, scale.mu, scale.sigma)
        else:
            teacher.standardize(scale.mu, scale.sigma)
        self.teacher = teacher_at(teacher, scale.spec, config, stride)
        # P itself pads with zeros inside, so nothing can be folded in front of it.
        self.before_teacher = InputNormalization() if folds and not isinstance(teacher, PatchNet) else None
        self.students = nn.ModuleList(around(net.spec, net, stride, config.pad, config.form) for net in students)
        self.metrics = nn.ModuleDict(
            {name: MetricGraph(metric) for name, metric in scale.metrics.items() if name in normalizations}
        )
        self.autoencoder: AutoEncoder | None = None
        if scale.autoencoder is not None:
            self.autoencoder = AutoEncoder(self.dims, scale.autoencoder.side)
            self.autoencoder.load_state_dict({k: v.detach().cpu() for k, v in scale.autoencoder.state_dict().items()})
        # The sum of (x - shift) * scale, with one constant for all maps together.
        self.factors = {name: one.scale for name, one in normalizations.items()}
        self.shift = sum(one.shift * one.scale for one in normalizations.values())

    def forward(self, pixels: Tensor) -> Tensor:
        if self.normalize is not None:
            pixels = (pixels - self.normalize.mean) / self.normalize.std
        parts = [part for net in self.students for part in net(pixels).split(self.dims, 1)]
        answers = parts[:1] if self.autoencoder is not None else parts
        before = self.before_teacher
        seen = pixels if before is None else (pixels - before.mean) / before.std  # gray broadcasts to three channels
        maps = student_errors(self.teacher(seen), answers, dict(self.metrics.items()))
        if self.autoencoder is not None:
            maps["a"] = ((self.autoencoder(pixels) - parts[1]) ** 2).mean(1)
        first, *others = (maps[name] * factor for name, factor in self.factors.items())
        for other in others:
            first = first + other
        return first - self.shift


class MetricGraph(nn.Module):
    """``GaussianMetric`` with its constants as part of the graph: vectors (N, d, h', w') -> distances (N, h', w')."""

    def __init__(self, metric: GaussianMetric) -> None:
        super().__init__()
        places, dims = metric.mean.shape
        self.placed = metric.placed
        # || W (x - m) ||^2 = || x W' - m W' ||^2: one product and one sum a place.
        weight = metric.whiten.transpose(1, 2).contiguous()  # (P, d, d)
        self.register_buffer("weight", weight if self.placed else metric.whiten[0].reshape(dims, dims, 1, 1).clone())
        moved = (metric.mean[:, None] @ weight).reshape(places, 1, dims)
        self.register_buffer("moved", moved if self.placed else moved.reshape(dims))

    def forward(self, vectors: Tensor) -> Tensor:
        weight, moved = self.get_buffer("weight"), self.get_buffer("moved")
        if not self.placed:
            white = nn.functional.conv2d(vectors, weight, -moved)
            return (white**2).sum(1)
        dims, height, width = vectors.shape[1:]
        columns = vectors.permute(2, 3, 0, 1).reshape(height * width, -1, dims)  # (P, N, d)
        white = torch.matmul(columns, weight) - moved
        return (white**2).sum(2).transpose(0, 1).reshape(-1, height, width)


class Resample(nn.Module):
    """A map (N, h, w) laid over another grid (N, h', w'): bilinear between cell centers, the nearest cell outside.

    Two constant products, exact for any strides and offsets; grids may differ in both.
    """

    def __init__(self, source: MapGeometry, target: MapGeometry) -> None:
        super().__init__()
        rows = _between(source.height, source.offset_y, source.stride, target.height, target.offset_y, target.stride)
        columns = _between(source.width, source.offset_x, source.stride, target.width, target.offset_x, target.stride)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns.T.contiguous())

    def forward(self, scores: Tensor) -> Tensor:
        return torch.matmul(torch.matmul(self.get_buffer("rows"), scores), self.get_buffer("columns"))


class DeployedStudentTeacher(nn.Module):
    """The graph contract: uint8 (N, h, w, C) -> anomaly map (N, h', w'), image score (N,) = its maximum.

    The unweighted mean over scales (paper, section 3.4), all laid on ``geometries[0]``'s grid.
    """

    def __init__(self, scales: Sequence[ScaleGraph], geometries: Sequence[MapGeometry], *, center: Center) -> None:
        super().__init__()
        self.center = center
        self.scales = nn.ModuleList(scales)
        self.onto = nn.ModuleList(
            nn.Identity() if same_grid(one, geometries[0]) else Resample(one, geometries[0]) for one in geometries
        )

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        pixels = frames.float().permute(0, 3, 1, 2)  # (N, C, h, w); cast before permute, as TensorRT wants it
        maps = [onto(scale(pixels)) for scale, onto in zip(self.scales, self.onto, strict=True)]
        anomaly_map = maps[0]
        for other in maps[1:]:
            anomaly_map = anomaly_map + other
        if len(maps) > 1:
            anomaly_map = anomaly_map / len(maps)
        anomaly_map = centered(anomaly_map, self.center)
        return anomaly_map, anomaly_map.amax((1, 2))


def centered(maps: Tensor, center: Center) -> Tensor:
    """Maps (N, h, w), each less its own median or mean."""
    if center == "none":
        return maps
    return maps - (median(maps) if center == "median" else maps.mean((1, 2), keepdim=True))


def same_grid(one: MapGeometry, other: MapGeometry) -> bool:
    """Whether maps are summed cell by cell: equal sides and strides.

    Offsets may differ by what pooling floors cut from the footprints (0, 0.5 and 2.5 px): the paper sums all the same.
    """
    return (one.height, one.width, one.stride) == (other.height, other.width, other.stride)


def fold_input(net: PatchNet, channels: int) -> None:
    """Make ``net`` take pixels 0..255 of ``channels`` channels: w' = w / std, b' = b - sum w' mean."""
    first = net.layers[0]
    assert isinstance(first, nn.Conv2d)
    assert first.bias is not None
    normalize = InputNormalization()
    weight = first.weight.detach().double() / normalize.std
    bias = first.bias.detach().double() - (weight * normalize.mean).sum((1, 2, 3))
    if channels == 1:
        weight = weight.sum(1, keepdim=True)  # the gray value is every color
    folded = nn.Conv2d(channels, first.out_channels, first.kernel_size)  # type: ignore[arg-type]
    folded.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    net.layers[0] = folded.eval().requires_grad_(False)


def standardize_output(conv: nn.Conv2d, mu: Tensor, sigma: Tensor) -> None:
    """Fold (y - mu) / sigma into the linear convolution that gives y (reference, section 10)."""
    conv.weight.data = (conv.weight.double() / sigma.double().view(-1, 1, 1, 1)).float()
    assert conv.bias is not None
    conv.bias.data = ((conv.bias.double() - mu.double()) / sigma.double()).float()


def _between(cells: int, offset: float, stride: float, wanted: int, to_offset: float, to_stride: float) -> Tensor:
    """Weights (wanted, cells) that read a row of cells at the centers of another."""
    centers = to_offset + to_stride * torch.arange(wanted, dtype=torch.float64)
    return reading_weights(cells, (centers - offset) / stride)


def _own(net: PatchNet | BackboneTeacher) -> PatchNet | BackboneTeacher:
    """A copy on the CPU, ready to be changed."""
    return copied(net) if isinstance(net, PatchNet) else copy.deepcopy(net).cpu()


def _patch_net(net: nn.Module) -> PatchNet:
    assert isinstance(net, PatchNet)  # nn.ModuleList forgets the type
    return net
