"""FCDD: a fully convolutional network whose output is the explanation.

Liznerski et al., "Explainable Deep One-Class Classification", ICLR 2021 (arXiv 2007.01760).  Owns what is drawn in a
step, the normalization of the map, and where it lies.  Leaves formulas to ``fcdd_objective``, anomalies to
``confetti``, the spreading Gaussian to ``heatmap``.

    A = sqrt(phi(x)^2 + 1) - 1;   A' = U A U^T;   map = A' in deviations of held-out good maps;   score = its maximum

The paper scores an image by the mean of A; a part is rejected here for its worst place, as with every other method, so
that the threshold of the image and that of the mask are one (docs/methods/fcdd.md).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from edge.bundle import MapGeometry
from edge.errors import CommandError, TrainingError
from trainer.confetti import with_confetti
from trainer.configs.fcdd import FcddConfig
from trainer.distill import load_teacher
from trainer.fcdd_objective import fcdd_loss, pixel_loss, pseudo_huber
from trainer.heatmap import spreading
from trainer.method import Batch, Frames
from trainer.patch_nets import InputNormalization, PatchNet, PatchNetSpec, build_patch_net
from trainer.photographs import Photographs, read_photographs

_CHUNK = 4


class FcddNet(nn.Module):
    """uint8 frames (n, h, w, C) -> phi (n, u, v): a patch network's convolutions, and a 1 x 1 convolution to one."""

    def __init__(self, net: PatchNet, frozen: int, seed: int) -> None:
        super().__init__()
        self.normalize = InputNormalization()
        self.trunk = net
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Conv2d(net.spec.descriptor_dim, 1, 1)  # with a bias, as in the authors' code
        convolutions = [layer for layer in net.layers if isinstance(layer, nn.Conv2d)]
        for layer in convolutions[:frozen]:
            layer.requires_grad_(False)

    def forward(self, frames: Tensor) -> Tensor:
        answers: Tensor = self.head(torch.nn.functional.leaky_relu(self.trunk(self.normalize(frames)), 0.005))
        return answers[:, 0]


class FcddGraph(nn.Module):
    """The graph contract: uint8 (N, h, w, C) -> maps (N, h', w'), scores (N,)."""

    def __init__(self, net: FcddNet, rows: Tensor, columns: Tensor, shift: float, scale: float) -> None:
        super().__init__()
        self.net, self.shift, self.scale = net, shift, scale
        self.register_buffer("rows", rows)  # (h', u)
        self.register_buffer("columns", columns.T.contiguous())  # (v, w')

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        coarse = pseudo_huber(self.net(frames))
        spread = torch.matmul(torch.matmul(self.get_buffer("rows"), coarse), self.get_buffer("columns"))
        maps = (spread - self.shift) * self.scale
        return maps, maps.amax((1, 2))


class Fcdd:
    """``method.Method`` for one network; ``seed`` draws the last layer, each batch's ``draw`` its anomalies.

    Raises:
        TrainingError: there is no such teacher.
        DataError: the photographs cannot be read.
    """

    name = "fcdd"

    def __init__(self, config: FcddConfig, *, seed: int, device: str = "cpu") -> None:
        self.config, self.device = config, device
        teacher = load_teacher(config.trunk)
        self.spec: PatchNetSpec = teacher.spec
        self._teacher = {"name": teacher.name, "sha256": teacher.sha256, "card": teacher.card}
        trunk = teacher.net if config.weights == "teacher" else build_patch_net(teacher.spec, seed)
        net = PatchNet(teacher.spec)
        net.load_state_dict(trunk.state_dict())
        self.net = FcddNet(net, config.frozen, seed).to(device)
        self._photographs: Photographs | None = None
        if config.photographs is not None:
            self._photographs = read_photographs(Path(config.photographs))
        self.statistics: dict[str, float] = {}

    @property
    def trainable(self) -> nn.Module:
        """All of the network; frozen layers keep still."""
        return self.net

    @property
    def local(self) -> bool:
        """A cell of the spread map follows from its neighborhood alone."""
        return False  # the rim of the frame is spread to as well, which tiles would each do anew

    def prepare(self, frames: Frames) -> None:
        """Nothing: the normalization is the teacher's."""

    def loss(self, batch: Batch) -> Tensor:
        """The loss of good images and of anomalies made of them; on images outside the training set drawn alike."""
        random = np.random.default_rng(batch.draw)
        frames, bad, masks = self._with_anomalies(batch.frames.numpy(), random)
        maps = pseudo_huber(self.net(torch.from_numpy(frames).to(self.device)))
        if self.config.supervision == "image":
            return fcdd_loss(maps, torch.from_numpy(bad).to(self.device))
        height, width = frames.shape[1:3]
        rows, columns = (self._spreading(side, np.arange(side)).to(self.device) for side in (height, width))
        return pixel_loss(rows @ maps @ columns.T, torch.from_numpy(masks).to(self.device))

    @torch.no_grad()
    def fit_statistics(self, frames: Frames) -> None:
        """Fit mean and deviation of A' over all places of held-out good images (n, h, w, C).

        Raises:
            TrainingError: the map is the same everywhere.
        """
        height, width = frames.shape[1:3]
        graph = self._graph(height, width, self.config.stride, 0.0, 1.0)
        chunks = [frames[start : start + _CHUNK] for start in range(0, len(frames), _CHUNK)]
        values = np.concatenate([graph(torch.from_numpy(chunk.copy()))[0].numpy().ravel() for chunk in chunks])
        mu, sigma = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
        if not (math.isfinite(mu) and sigma > 1e-9):
            raise TrainingError(
                f"the maps of held-out good images have mean {mu:.4g} and deviation {sigma:.3g}: the network says the "
                "same of everything; train longer, or at a lower learning rate"
            )
        self.statistics = {"mu": mu, "sigma": sigma}

    def deployed(self, channels: int, *, stride: int | None = None) -> nn.Module:
        """The graph contract as a module on the CPU.

        Raises:
            CommandError: ``stride`` is no multiple of the configured one.
        """
        side = self.config.size_px
        return self._graph(side, side, self._stride(stride), self.statistics["mu"], 1 / self.statistics["sigma"])

    def map_geometry(self, height_px: int, width_px: int, *, stride: int | None = None) -> MapGeometry:
        """A cell in the middle of every ``stride`` x ``stride`` px, rims included: the Gaussian reaches there."""
        step = self._stride(stride)
        offset = (step - 1) / 2
        return MapGeometry(
            height=height_px // step, width=width_px // step, stride=float(step), offset_y=offset, offset_x=offset,
            reduction="max",
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """The trunk, the fitted statistics, and the photographs' digest."""
        shown = {} if self._photographs is None else {"photographs": self._photographs.digest}
        return {"teacher": self._teacher, "statistics": dict(self.statistics), **shown}

    def _graph(self, height_px: int, width_px: int, step: int, shift: float, scale: float) -> FcddGraph:
        net = FcddNet(PatchNet(self.spec), 0, 0)
        net.load_state_dict({name: tensor.detach().cpu() for name, tensor in self.net.state_dict().items()})
        offset = (step - 1) / 2
        rows, columns = (
            self._spreading(side, offset + step * np.arange(side // step)) for side in (height_px, width_px)
        )
        return FcddGraph(net, rows, columns, shift, scale).eval().requires_grad_(False)

    def _spreading(self, side_px: int, at: np.ndarray) -> Tensor:
        spec = self.spec
        return spreading(
            spec.grid(side_px),
            offset=spec.center,
            jump=spec.stride,
            field=spec.footprint,
            sigma=self.config.sigma,
            at=at,
        )

    def _with_anomalies(self, frames: Frames, random: np.random.Generator) -> tuple[Frames, np.ndarray, np.ndarray]:
        """``frames`` with a share of them made anomalies, which (n,), and where (n, h, w)."""
        made = frames.copy()
        masks = np.zeros(frames.shape[:3], np.float32)
        bad = (random.random(len(frames)) < self.config.anomaly_share).astype(np.float32)
        for place in np.flatnonzero(bad):
            if self._photographs is not None and random.random() < 0.5:
                made[place] = self._piece(frames.shape[1:], random)
            else:
                made[place], mask = with_confetti(frames[place], random)
                masks[place] = mask
        if self.config.labels == "random":  # the control: nothing can be learned from these
            bad = random.permutation(bad)
        return made, bad, masks

    def _piece(self, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
        """A square piece of a photograph, of the frames' size and channels."""
        assert self._photographs is not None
        image = self._photographs.images[int(random.integers(len(self._photographs)))]
        side = min(image.shape[:2])
        y, x = (int(random.integers(one - side + 1)) for one in image.shape[:2])
        piece = cv2.resize(image[y : y + side, x : x + side], (shape[1], shape[0]), interpolation=cv2.INTER_AREA)
        if shape[2] == 1:
            piece = cv2.cvtColor(piece, cv2.COLOR_RGB2GRAY)
        return np.asarray(piece, np.uint8).reshape(shape)

    def _stride(self, stride: int | None) -> int:
        if stride is None:
            return self.config.stride
        if stride % self.config.stride:
            raise CommandError(
                f"this model cannot be evaluated every {stride} px: its own map has a cell every {self.config.stride} "
                "px; give a multiple of that"
            )
        return stride
