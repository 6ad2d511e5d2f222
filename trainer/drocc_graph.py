"""DROCC's deployed graph: uint8 frames in, minus the logit of every patch out.

Owns the module that is exported.  Leaves the dense form to ``fdfe``; no adversary and no saliency comes here.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from trainer.drocc_nets import LeNetSpec
from trainer.fdfe import densify


class DroccGraph(nn.Module):
    """uint8 (N, h, w, C) -> anomaly map (N, h', w') = (-f - ``shift``) * ``scale``, image score (N,) = its maximum.

    ``dense`` networks run once over the frame, exactly as on each patch; ``paper`` networks, whose padding belongs to
    the crop, run on all crops as one batch.  ``mean`` and ``std`` (C,) are of gray values 0..255.
    """

    def __init__(
        self, net: nn.Module, spec: LeNetSpec, mean: Tensor, std: Tensor, *, stride: int, shift: float = 0.0,
        scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        own = copy.deepcopy(net).cpu().float().eval().requires_grad_(False)
        self.net = (
            densify(own, spec.patch, stride, "dilated") if spec.kind == "dense" else CropGrid(own, spec.patch, stride)
        )
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1).clone())
        self.register_buffer("std", std.reshape(1, -1, 1, 1).clone())
        self.shift, self.scale = shift, scale

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        pixels = frames.float().permute(0, 3, 1, 2)  # cast before permute, as TensorRT wants it
        logits = self.net((pixels - self.get_buffer("mean")) / self.get_buffer("std"))
        anomaly_map = (-logits[:, 0] - self.shift) * self.scale
        return anomaly_map, anomaly_map.amax((1, 2))


class CropGrid(nn.Module):
    """``net`` (N, C, p, p) -> (N, 1) on a grid of crops ``stride`` px apart: (N, C, h, w) -> (N, 1, h', w').

    Crops are slices, first along rows, then along columns, stacked on the batch: no gather, no loop in the graph.
    """

    def __init__(self, net: nn.Module, patch: int, stride: int) -> None:
        super().__init__()
        self.net, self.patch, self.stride = net, patch, stride

    def forward(self, image: Tensor) -> Tensor:
        rows, columns = ((int(side) - self.patch) // self.stride + 1 for side in image.shape[2:])
        starts = [[place * self.stride for place in range(count)] for count in (rows, columns)]
        strips = torch.cat([image[:, :, y : y + self.patch] for y in starts[0]])  # (rows N, C, p, w)
        crops = torch.cat([strips[:, :, :, x : x + self.patch] for x in starts[1]])  # (columns rows N, C, p, p)
        answers: Tensor = self.net(crops)
        return answers.reshape(columns, rows, -1, 1).permute(2, 3, 1, 0)
