"""A teacher that is a pretrained network P itself, read where the students' cells lie; nothing is distilled.

Owns the reduction of P's layers to one descriptor and the reading between P's own cells.  Leaves P to ``backbones``,
the students, who are patch networks as always, to ``student_scale``.

Later work than the paper, which distills P into a patch network, so that a descriptor sees p x p pixels and no more
(section 3.1): STFPM (Wang et al. 2021) and PaDiM (Defard et al. 2020) ask P itself.  With F_l the layers of P, and R a
fixed matrix with orthonormal rows (PaDiM picks channels at random; a rotation keeps a share of every one):

    T(r, c) = R [F_2(r, c); F_3(r, c)]         each layer read between its cells at pixel (r, c)

P pads with zeros, so its answer at the rim is its own; a metric with a place for every cell knows that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.backbones import ResNet18, load_backbone
from trainer.grids import reading_weights
from trainer.patch_nets import PatchNetSpec

LAYERS = ("layer2", "layer3")
"""Of ResNet-18: 128 channels every 8 px and 256 every 16 px (Defard et al. take layer1 as well)."""

STUDENT = PatchNetSpec(patch=65, widths=(32, 32, 32, 64), descriptor_dim=64)
"""Who is to foretell P: the p = 65 network at a quarter of its width, with a cell every 8 px as in layer2."""

SEED = 0
"""Of the rotation, the same in every model."""

LICENSE = "torchvision ResNet-18 IMAGENET1K_V1, BSD-3-Clause (trainer/assets/backbones/LICENSE-resnet18.txt)"

NAMES = ("resnet18",)
"""Shipped backbones that can be asked for as teachers."""


class BackboneTeacher(nn.Module):
    """P and the rotation, which is kept as one 1 x 1 convolution a layer; ``at`` says where it is to answer.

    The first convolution has a bias, so that the students' mu and sigma can be folded in.
    """

    def __init__(self, backbone: ResNet18, spec: PatchNetSpec = STUDENT) -> None:
        super().__init__()
        self.backbone, self.spec = backbone, spec
        widths = [backbone.layer(name).channels for name in LAYERS]
        parts = torch.split(_rotation(sum(widths), spec.descriptor_dim), widths, 1)
        self.projections = nn.ModuleList(_projection(part, bias=place == 0) for place, part in enumerate(parts))

    @property
    def rotation(self) -> Tensor:
        """R (d, channels of all layers)."""
        return torch.cat([parameter.flatten(1) for name, parameter in self.projections.named_parameters()
                          if name.endswith("weight")], 1)  # fmt: skip

    def at(self, rows: Tensor, columns: Tensor, size_px: tuple[int, int]) -> BackboneReader:
        """The network that answers at these pixel positions, (h',) and (w',), of images of that height and width."""
        return BackboneReader(self, rows, columns, size_px)

    def standardize(self, mu: Tensor, sigma: Tensor) -> None:
        """Fold (T - mu) / sigma, both (d,), into the projections."""
        for projection in self.projections:
            assert isinstance(projection, nn.Conv2d)  # nn.ModuleList forgets the type
            projection.weight.data = (projection.weight.double() / sigma.double().view(-1, 1, 1, 1)).float()
            if projection.bias is not None:
                projection.bias.data = ((projection.bias.double() - mu.double()) / sigma.double()).float()


class BackboneReader(nn.Module):
    """Normalized pixels (N, 3, h, w) of one size -> T (N, d, h', w') at fixed positions, by constant products."""

    def __init__(self, teacher: BackboneTeacher, rows: Tensor, columns: Tensor, size_px: tuple[int, int]) -> None:
        super().__init__()
        self.teacher = teacher
        for name in LAYERS:
            layer = teacher.backbone.layer(name)
            for axis, side, wanted in (("rows", size_px[0], rows), ("columns", size_px[1], columns)):
                weights = reading_weights(-(-side // layer.stride), (wanted - layer.origin) / layer.stride)
                self.register_buffer(f"{name}_{axis}", weights if axis == "rows" else weights.T.contiguous())

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.teacher.backbone.features(pixels)
        first, second = (
            torch.matmul(
                torch.matmul(self.get_buffer(f"{name}_rows"), projection(features[name])),
                self.get_buffer(f"{name}_columns"),
            )
            for name, projection in zip(LAYERS, self.teacher.projections, strict=True)
        )
        answer: Tensor = first + second
        return answer


def load_backbone_teacher(name: str) -> tuple[BackboneTeacher, dict[str, Any], str]:
    """The teacher, its card and the SHA-256 of P's weights."""
    loaded = load_backbone(name)
    assert isinstance(loaded.net, ResNet18)
    card = {"name": name, "backbone": {"file": loaded.file, "sha256": loaded.sha256, "known_as": loaded.known_as},
            "license": LICENSE, "layers": list(LAYERS), "rotation_seed": SEED}  # fmt: skip
    return BackboneTeacher(loaded.net).eval().requires_grad_(False), card, loaded.sha256


def _projection(weight: Tensor, *, bias: bool) -> nn.Conv2d:
    """The 1 x 1 convolution of a matrix (outputs, inputs)."""
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias)
    convolution.load_state_dict(
        {"weight": weight[:, :, None, None], **({"bias": torch.zeros(len(weight))} if bias else {})}
    )
    return convolution


def _rotation(inputs: int, outputs: int) -> Tensor:
    """(outputs, inputs) with orthonormal rows."""
    generator = torch.Generator().manual_seed(SEED)
    square: Tensor = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator, dtype=torch.float64))[0]
    return square[:outputs].float()
