"""DROCC and DROCC-LF: good patches against the most convincing patches a fixed distance away.

Goyal et al., "DROCC: Deep Robust One-Class Classification", ICML 2020 (arXiv 2002.12718).  Owns how patches are drawn
from frames, the normalization of input and score, and where the map lies.  Leaves the networks to ``drocc_nets``, the
loss to ``drocc_objective``, the search to ``shell_search``, bad parts to ``negatives``, the graph to ``drocc_graph``.

    score of a patch = -f(patch), in deviations of held-out good patches (paper: -f); image score = maximum of the map

The paper scores whole small images.  Frames are ours: every step draws ``crops`` patches uniformly from each of its
frames, so all places of a part are one class of "good", and the map is f at every ``stride`` px.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge.bundle import MapGeometry
from edge.errors import CommandError, DataError, TrainingError
from trainer.configs.drocc import DroccConfig
from trainer.drocc_graph import DroccGraph
from trainer.drocc_nets import LeNetSpec, build_lenet
from trainer.drocc_objective import drocc_loss
from trainer.method import Batch, Frames
from trainer.negatives import BadPatches

GRAY_STEP_DEVIATION = 1 / math.sqrt(12)
"""Deviation of rounding to whole gray levels, in gray levels."""

COLLAPSED = 1e-4
"""Deviation of the logit over good patches below which it says the same of everything."""


class Drocc:
    """``method.Method`` for one network; ``seed`` draws its first weights, each batch's ``draw`` everything later.

    Raises:
        CommandError: ``bad`` is given where the method has no use for it, or missing where it has.
    """

    name = "drocc"
    needs_bad = False

    def __init__(self, config: DroccConfig, *, seed: int, device: str = "cpu") -> None:
        if self.needs_bad and config.bad is None:
            raise CommandError(
                f"{self.name} learns from a few bad parts too; give a folder of them with --bad DIR, "
                "or train drocc, which needs none"
            )
        if config.bad is not None and not self.needs_bad:
            raise CommandError(f"{self.name} takes no bad parts; train drocc-lf with --bad {config.bad}")
        self.config, self.device, self.seed = config, device, seed
        # Gray until `prepare` says otherwise: the first convolution depends on the channels.
        self._build(1)
        self._bad: BadPatches | None = None
        self.mean, self.std = torch.zeros(1), torch.ones(1)
        self.statistics: dict[str, float] = {}

    @property
    def trainable(self) -> torch.nn.Module:
        """The network, batch-norm statistics included."""
        return self.net

    @property
    def local(self) -> bool:
        """A cell is one patch's answer."""
        return True

    def prepare(self, frames: Frames) -> None:
        """Fit mean and deviation of each channel on ``frames`` (n, h, w, C), build the network, read bad parts.

        Raises:
            DataError: the images are constant, or the radius is too small for them: a shell that rounding to gray
                levels crosses holds nothing but good patches.
        """
        channels = frames.shape[3]
        moments = np.array([[f.mean((0, 1)), (f.astype(np.float32) ** 2).mean((0, 1))] for f in frames], np.float64)
        mean, square = moments.mean(0)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        if not (std > 0).all():
            raise DataError("the training images are constant in a channel; there is nothing to learn from them")
        rounding = GRAY_STEP_DEVIATION * self.config.patch_px * math.sqrt(float((1 / std**2).sum()))
        radius = self.config.objective(channels).shell.radius
        if radius <= rounding:
            raise DataError(
                f"radius = {radius:.3g} collapses here: rounding to gray levels alone moves a patch of these images "
                f"by {rounding:.3g}; give a larger radius, {math.sqrt(channels) * self.config.patch_px / 4:.3g} say"
            )
        self.mean, self.std = torch.from_numpy(mean).float(), torch.from_numpy(std).float()
        if channels != self._channels:
            self._build(channels)
        if self.config.bad is not None:
            self._bad = BadPatches.read(self.config.bad, self.config.size_px, self.config.patch_px, channels)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of one step's patches; of images outside the training set by the running statistics."""
        learning = batch.index is not None
        self.net.train(learning)
        random = torch.Generator().manual_seed(batch.draw)
        patches = random_patches(batch.frames, self.config.patch_px, self.config.crops, random)
        label = torch.ones(len(patches))
        if self._bad is not None and learning:
            bad = self._bad.draw(self.config.negatives, random)
            patches, label = torch.cat([patches, bad]), torch.cat([label, torch.zeros(len(bad))])
        x = self.normalized(patches)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return drocc_loss(self.net, x, self.config.objective(x.shape[1]), random, label=label.to(self.device))

    @torch.no_grad()
    def fit_statistics(self, frames: Frames) -> None:
        """Fit mean and deviation of -f over all places of held-out good images (n, h, w, C).

        Raises:
            TrainingError: the network says the same of every patch.
        """
        graph = DroccGraph(self.net, self._spec, self.mean, self.std, stride=self.config.stride)
        numbers = np.concatenate([graph.eval()(torch.from_numpy(f[None].copy()))[0].flatten().numpy() for f in frames])
        mu, sigma = float(numbers.mean(dtype=np.float64)), float(numbers.std(dtype=np.float64))
        if not (math.isfinite(mu) and sigma > COLLAPSED):
            raise TrainingError(
                f"the network's answers to held-out good patches have mean {-mu:.4g} and deviation {sigma:.3g}: it "
                "says the same of everything; train longer, or with another radius"
            )
        self.statistics = {"mu": mu, "sigma": sigma}

    def deployed(self, channels: int, *, stride: int | None = None) -> torch.nn.Module:
        """The graph contract as a module on the CPU: uint8 (N, h, w, channels) -> maps (N, h', w'), scores (N,).

        Raises:
            CommandError: ``stride`` is no multiple of the configured one.
            TrainingError: the network was trained for another number of channels.
        """
        if channels != self._channels:
            raise TrainingError(f"trained on {self._channels} channels, asked for a graph of {channels}")
        return DroccGraph(
            self.net, self._spec, self.mean, self.std, stride=self._stride(stride),
            shift=self.statistics["mu"], scale=1 / self.statistics["sigma"],
        )  # fmt: skip

    def map_geometry(self, height_px: int, width_px: int, *, stride: int | None = None) -> MapGeometry:
        """A cell in the middle of every patch: 28 x 28 of them, 8 px apart from 17.5, for ``dense`` at 256 px."""
        step, patch = self._stride(stride), self.config.patch_px
        offset = (patch - 1) / 2
        return MapGeometry(
            height=(height_px - patch) // step + 1, width=(width_px - patch) // step + 1, stride=float(step),
            offset_y=offset, offset_x=offset, reduction="max",
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Shell, ascent, input normalization, fitted statistics, and the bad parts' digest."""
        objective = self.config.objective(self._channels)
        return {
            "radius": objective.shell.radius,
            "ascent_step": objective.ascent.step,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "statistics": dict(self.statistics),
            **({"bad": self._bad.describe()} if self._bad is not None else {}),
        }

    def _build(self, channels: int) -> None:
        self._channels = channels
        self._spec = LeNetSpec(self.config.network, self.config.patch_px, channels)
        self.net = build_lenet(self._spec, self.seed).to(self.device)

    def normalized(self, patches: Tensor) -> Tensor:
        """uint8 (n, p, p, C) -> (n, C, p, p), each channel with mean 0 and deviation 1 over the training images."""
        pixels = patches.to(self.device).float().permute(0, 3, 1, 2)
        mean, std = (one.to(self.device)[:, None, None] for one in (self.mean, self.std))
        return (pixels - mean) / std

    def _stride(self, stride: int | None) -> int:
        if stride is None:
            return self.config.stride
        if stride % self.config.stride:
            raise CommandError(
                f"this model cannot be evaluated every {stride} px: its own map has a cell every {self.config.stride} "
                "px; give a multiple of that"
            )
        return stride


class DroccLf(Drocc):
    """DROCC with limited negatives: bad patches with label 0, and a shell measured by saliency (paper, section 4)."""

    name = "drocc-lf"
    needs_bad = True


def random_patches(frames: Tensor, side: int, count: int, random: torch.Generator) -> Tensor:
    """``count`` patches of every frame, (B, h, w, C) -> (B count, side, side, C), uniform over all places they fit.

    Frames of exactly that side are given back as they are, ``count`` or not: another copy would teach nothing.
    """
    height, width = frames.shape[1:3]
    if (height, width) == (side, side):
        return frames
    top = torch.randint(height - side + 1, (len(frames), count), generator=random).tolist()
    left = torch.randint(width - side + 1, (len(frames), count), generator=random).tolist()
    return torch.stack([
        frame[y : y + side, x : x + side]
        for frame, rows, columns in zip(frames, top, left, strict=True)
        for y, x in zip(rows, columns, strict=True)
    ])  # fmt: skip
