"""What the teacher must predict: P's features at the center of every patch of a view.

Owns the two target modes.  ``patch`` is the paper's: P sees each patch alone, pooled to one vector.  ``map`` is a
deviation: P sees the whole view once and its feature maps are sampled at the patch centers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from edge.errors import TrainingError
from trainer.backbones import Backbone, FeatureLayer
from trainer.grids import reading_weights
from trainer.patch_nets import PatchNetSpec

PATCH_STEP = 8
"""P is asked for every eighth patch of a view in each direction, where it sees each of them alone."""


class Target(Protocol):
    """Views (N, s, s, 3) uint8 -> P's features (N, C, g, g) float32, one column for each patch of the inner view.

    The inner view is the view less ``margin_px`` on every side.  Patch (i, j) has its corner pixel at ``stride_px``
    * (i, j) of the inner view, and its center ``spec.center`` px further; g is ``patch_grid`` of the inner side.
    """

    @property
    def mode(self) -> str: ...

    @property
    def spec(self) -> PatchNetSpec: ...

    @property
    def stride_px(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def margin_px(self) -> int: ...

    def __call__(self, views: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class MapTarget:
    """P once on the whole view, magnified, features sampled bilinearly at each patch's exact center.

    ``margin_px`` keeps the centers away from the zeros that P pads with: 32 px of what P sees, plus half a patch, is
    the reach of ResNet-18's layer2.
    """

    backbone: Backbone
    spec: PatchNetSpec
    layer_names: tuple[str, ...]
    magnify: int = 2
    margin_px: int = 16
    mode: str = "map"
    sampling_px: int | None = None

    @property
    def stride_px(self) -> int:
        return self.sampling_px or self.spec.stride

    @property
    def channels(self) -> int:
        return sum(self.backbone.layer(name).channels for name in self.layer_names)

    def __call__(self, views: Tensor) -> Tensor:
        grid = patch_grid(self.spec, self.stride_px, views.shape[1] - 2 * self.margin_px)
        first_px = self.margin_px + self.spec.center
        maps = _features(self.backbone, views, self.magnify)
        sampled = []
        for name in self.layer_names:
            layer, features = self.backbone.layer(name), maps[name]
            weights = center_weights(features.shape[2], layer, first_px, self.stride_px, grid, self.magnify)
            sampled.append(torch.einsum("ip,ncpq,jq->ncij", weights, features, weights))
        return torch.cat(sampled, dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class PatchTarget:
    """The paper's target: P on each p x p patch alone (magnified), each layer average pooled to one vector.

    Costs one run of P for every descriptor, so ``step`` keeps only every ``step``-th patch in each direction (the
    middle one where there are fewer); the others are NaN and count for nothing in the loss.
    """

    backbone: Backbone
    spec: PatchNetSpec
    layer_names: tuple[str, ...]
    magnify: int = 2
    margin_px: int = 0
    step: int = PATCH_STEP
    mode: str = "patch"
    sampling_px: int | None = None

    @property
    def stride_px(self) -> int:
        return self.sampling_px or self.spec.stride

    @property
    def channels(self) -> int:
        return sum(self.backbone.layer(name).channels for name in self.layer_names)

    def __call__(self, views: Tensor) -> Tensor:
        grid = patch_grid(self.spec, self.stride_px, views.shape[1] - 2 * self.margin_px)
        step = min(self.step, grid)
        kept = range(step // 2, grid, step)
        # Footprint, not p: pooling floors, so the last row and column of a 33 px patch are never seen.
        side = self.spec.footprint
        corners = [self.margin_px + self.stride_px * index for index in kept]
        patches = torch.cat([views[:, y : y + side, x : x + side] for y in corners for x in corners])
        maps = _features(self.backbone, patches, self.magnify)
        pooled = torch.cat([maps[name].mean(dim=(2, 3)) for name in self.layer_names], dim=1)
        columns = pooled.view(len(kept), len(kept), views.shape[0], -1).permute(2, 3, 0, 1)
        full = torch.full((views.shape[0], self.channels, grid, grid), float("nan"))
        full[:, :, step // 2 :: step, step // 2 :: step] = columns
        return full


def patch_grid(spec: PatchNetSpec, stride_px: int, side_px: int) -> int:
    """Number of patches ``stride_px`` apart along ``side_px`` px: ``spec.grid`` for the network's own stride.

    Elsewhere a patch counts only if all of its p px are there, as ``fdfe.densify`` has it; p is more than the
    footprint by what pooling floors.
    """
    return spec.grid(side_px) if stride_px == spec.stride else (side_px - spec.patch) // stride_px + 1


def make_target(
    mode: str,
    backbone: Backbone,
    spec: PatchNetSpec,
    layer_names: tuple[str, ...],
    magnify: int,
    *,
    sampling_px: int | None = None,
    room_px: int = 0,
) -> MapTarget | PatchTarget:
    """The target of the named mode, for patches ``sampling_px`` apart, with a margin of at least ``room_px``.

    Raises:
        TrainingError: unknown mode, or a layer that P does not have.
    """
    for name in layer_names:
        backbone.layer(name)
    if mode == "map":
        margin = max(32 // magnify, room_px)
        return MapTarget(backbone, spec, layer_names, magnify, margin_px=margin, sampling_px=sampling_px)
    if mode == "patch":
        return PatchTarget(backbone, spec, layer_names, magnify, margin_px=room_px, sampling_px=sampling_px)
    raise TrainingError(f"unknown target mode {mode!r}; choose map or patch")


def center_weights(cells: int, layer: FeatureLayer, first_px: float, stride_px: int, grid: int, magnify: int) -> Tensor:
    """Bilinear weights (grid, cells) that read a feature map at the pixel indices first + stride * i of the view.

    Index x of the view lies at magnify * x + (magnify - 1) / 2 of the magnified one, and cell k of P sits on its
    pixel index origin + layer stride * k.
    """
    centers = first_px + stride_px * torch.arange(grid, dtype=torch.float64)
    magnified = magnify * centers + (magnify - 1) / 2
    return reading_weights(cells, (magnified - layer.origin) / layer.stride)


def _features(backbone: Backbone, views: Tensor, magnify: int) -> dict[str, Tensor]:
    """P's maps of magnified uint8 views, back on the CPU; bfloat16 inside, which targets do not notice."""
    device = next((tensor.device for tensor in (*backbone.parameters(), *backbone.buffers())), torch.device("cpu"))
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16):
        pixels = views.to(device).permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)
        if magnify > 1:
            pixels = F.interpolate(pixels, scale_factor=magnify, mode="bilinear", align_corners=False)
        return {name: features.float().cpu() for name, features in backbone(pixels).items()}
