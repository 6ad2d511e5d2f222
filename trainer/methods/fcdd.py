"""FCDD: a fully convolutional network whose output is the explanation.

Liznerski et al., "Explainable Deep One-Class Classification", ICLR 2021 (arXiv 2007.01760).  Owns what is drawn in a
step, the normalization of the map, and where it lies.  Leaves formulas to ``fcdd_objective``, networks to
``fcdd_nets``, anomalies to ``confetti``, ``photographs`` and ``negatives``, the spreading Gaussian to ``heatmap``.

    A = sqrt(phi(x)^2 + 1) - 1;   A' = U A U^T;   map = A' in deviations of held-out good maps;   score = its maximum

The paper scores an image by the mean of A; a part is rejected here for its worst place, as with every other method, so
that the threshold of the image and that of the mask are one (docs/methods/fcdd.md).
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Literal, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge.bundle import MapGeometry
from edge.errors import CommandError, DataError, TrainingError
from trainer.augment import augmented
from trainer.backbones import ResNet18, load_backbone
from trainer.confetti import with_confetti
from trainer.configs.fcdd import FcddConfig
from trainer.distill import load_teacher
from trainer.fcdd_nets import ContrastNormalization, FcddNet, paper_net, patch_net, random_resnet, resnet_net
from trainer.fcdd_objective import fcdd_loss, pixel_loss, pseudo_huber
from trainer.heatmap import spreading
from trainer.method import Batch, Frames
from trainer.negatives import BadPatches
from trainer.patch_nets import PatchNet, build_patch_net
from trainer.photographs import Photographs, ViewRecipe, cut_view, read_photographs

_CHUNK = 4
ZOOM = 3
"""A piece of a photograph shows at least a third of its short side, unless that would enlarge it."""


class FcddGraph(nn.Module):
    """The graph contract: uint8 (N, h, w, C) -> maps (N, h', w'), scores (N,)."""

    def __init__(
        self, net: FcddNet, rows: Tensor, columns: Tensor, shift: float, scale: float, score: Literal["max", "mean"]
    ) -> None:
        super().__init__()
        self.net, self.shift, self.scale, self.score = net, shift, scale, score
        self.register_buffer("rows", rows)  # (h', u)
        self.register_buffer("columns", columns.T.contiguous())  # (v, w')

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        coarse = pseudo_huber(self.net(frames))
        spread = torch.matmul(torch.matmul(self.get_buffer("rows"), coarse), self.get_buffer("columns"))
        maps = (spread - self.shift) * self.scale
        return maps, maps.mean((1, 2)) if self.score == "mean" else maps.amax((1, 2))


class Fcdd:
    """``method.Method`` for one network; ``seed`` draws its first weights, each batch's ``draw`` its anomalies.

    ``photographs`` stands in for the folder that ``config`` names, where images are made rather than read.

    Raises:
        CommandError: no anomalies of any kind, or frames that the network makes nothing of.
        TrainingError: there is no such teacher.
        DataError: the photographs cannot be read.
    """

    name = "fcdd"

    def __init__(
        self, config: FcddConfig, *, seed: int, device: str = "cpu", photographs: Photographs | None = None
    ) -> None:
        self.config, self.seed, self.device = config, seed, device
        if not config.confetti and config.bad is None and config.photographs is None and photographs is None:
            raise CommandError(
                "fcdd learns from anomalies and has none, and a map of zeros would be a perfect answer; give everyday "
                "pictures with --photographs DIR, a few flawed parts with --bad DIR, or confetti with --set "
                "confetti=true"
            )
        self._teacher: dict[str, Any] = {}
        self._backbone: dict[str, Any] = {}
        self.net = self._network().to(device)
        if self.net.field.cells(config.size_px) < 1:
            raise CommandError(
                f"size_px = {config.size_px}: a number of this network sees {self.net.field.size_px} px; give larger "
                "images"
            )
        self._photographs = photographs
        if photographs is None and config.photographs is not None:
            self._photographs = read_photographs(Path(config.photographs))
        self._bad: BadPatches | None = None
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
        """Read the bad parts; fit what the normalization of the input needs.

        Raises:
            DataError: the images are constant, or a bad part cannot be used: unreadable, or without the mask that
                learning from pixels takes.
        """
        if all(int(frame.min()) == int(frame.max()) for frame in frames):
            raise DataError("the training images are constant; there is nothing to learn from them")
        if isinstance(self.net.normalize, ContrastNormalization):
            self.net.normalize.fit(frames)
        side = self.config.size_px
        if self.config.bad is not None:
            # Patches as large as the image need no mask; a pixel's flaw must be marked.
            patch = 1 if self.config.supervision == "pixel" else side
            self._bad = BadPatches.read(self.config.bad, side, patch, frames.shape[3])

    def loss(self, batch: Batch) -> Tensor:
        """The loss of good images and of anomalies made of them; on images outside the training set drawn alike."""
        self.net.train(batch.index is not None)
        frames, bad, masks = self.with_anomalies(batch.frames.numpy(), batch.draw)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.config.precision == "bf16"):
            answers = self.net(torch.from_numpy(frames).to(self.device))
        maps = pseudo_huber(answers.float())
        if self.config.supervision == "image":
            return fcdd_loss(maps, torch.from_numpy(bad).to(self.device))
        height, width = frames.shape[1:3]
        rows, columns = (self._spreading(side, np.arange(side)).to(self.device) for side in (height, width))
        return pixel_loss(rows @ maps @ columns.T, torch.from_numpy(masks).to(self.device))

    def with_anomalies(self, frames: Frames, draw: int) -> tuple[Frames, NDArray[np.float32], NDArray[np.float32]]:
        """``frames`` with a share of them made anomalies, labels (n,), and masks (n, h, w); ``draw`` decides."""
        random = np.random.default_rng(draw)
        made = np.empty_like(frames)
        masks = np.zeros(frames.shape[:3], np.float32)
        bad = (random.random(len(frames)) < self.config.anomaly_share).astype(np.float32)
        for place, frame in enumerate(frames):
            one, mask = self._anomaly(frame, random) if bad[place] else (frame, masks[place])
            made[place], masks[place] = augmented(one, self.config.augment, random), mask
        if self.config.labels == "random":  # the control: nothing can be learned from these
            bad = random.permutation(bad)
        return made, bad, masks

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
            reduction=self.config.score,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """The trunk, the fitted statistics, and the digests of what stood for anomalies."""
        return {
            **({"teacher": self._teacher} if self._teacher else {}),
            **({"backbone": self._backbone} if self._backbone else {}),
            "statistics": dict(self.statistics),
            **({} if self._photographs is None else {"photographs": self._photographs.digest}),
            **({} if self._bad is None else {"bad": self._bad.describe()}),
        }

    def _network(self) -> FcddNet:
        config = self.config
        if config.network == "resnet":
            return self._resnet()
        if config.network != "patch":
            return paper_net(config.network, self.seed, config.normalization)
        teacher = load_teacher(config.trunk)
        self._teacher = {"name": teacher.name, "sha256": teacher.sha256, "card": teacher.card}
        if not isinstance(teacher.net, PatchNet):
            raise CommandError(f"trunk = {config.trunk}: not a patch network; give one that `kizu distill` made")
        trunk = teacher.net if config.weights == "teacher" else build_patch_net(teacher.spec, self.seed)
        return patch_net(trunk, config.frozen, self.seed)

    def _resnet(self) -> FcddNet:
        config = self.config
        if config.weights == "random":
            backbone = random_resnet(self.seed)
        else:
            loaded = load_backbone("resnet18")
            self._backbone = {"name": "resnet18", "file": loaded.file, "sha256": loaded.sha256}
            backbone = cast(ResNet18, loaded.net)
        return resnet_net(
            backbone, config.layer, config.frozen, self.seed, enlarge=config.enlarge, side_px=config.size_px
        )

    def _graph(self, height_px: int, width_px: int, step: int, shift: float, scale: float) -> FcddGraph:
        net = copy.deepcopy(self.net).cpu()
        offset = (step - 1) / 2
        rows, columns = (
            self._spreading(side, offset + step * np.arange(side // step)) for side in (height_px, width_px)
        )
        return FcddGraph(net, rows, columns, shift, scale, self.config.score).eval().requires_grad_(False)

    def _spreading(self, side_px: int, at: NDArray[Any]) -> Tensor:
        field = self.net.field
        return spreading(
            field.cells(side_px), offset=field.start_px, jump=field.stride_px, field=field.size_px,
            sigma=self.config.sigma, at=at, kernel=self.config.kernel,
        )  # fmt: skip

    def _anomaly(self, frame: Frames, random: np.random.Generator) -> tuple[Frames, NDArray[np.bool_]]:
        """One anomaly in place of ``frame`` (h, w, C), and its mask (h, w), which a photograph leaves empty."""
        made_up = self.config.confetti or self._photographs is not None
        if self._bad is not None and (not made_up or random.random() < 0.5):
            return self._bad.draw_image(random)
        if self._photographs is not None and (not self.config.confetti or random.random() < 0.5):
            return self._piece(self._photographs, frame.shape, random), np.zeros(frame.shape[:2], np.bool_)
        return with_confetti(frame, random)

    def _piece(self, photographs: Photographs, shape: tuple[int, ...], random: np.random.Generator) -> Frames:
        """A square piece of a photograph, of the frame's size and channels."""
        place = int(random.integers(len(photographs)))
        short = min(photographs.images[place].shape[:2])
        zoom = (shape[0], max(shape[0], min(ZOOM * shape[0], short)))
        recipe = ViewRecipe(side_px=shape[0], zoom_px=zoom, gray_share=0.0)
        piece = cut_view(photographs, [place], recipe, self.seed, int(random.integers(2**31)))
        if shape[2] == 1:
            piece = np.asarray(cv2.cvtColor(piece, cv2.COLOR_RGB2GRAY), np.uint8)
        return piece.reshape(shape)

    def _stride(self, stride: int | None) -> int:
        if stride is None:
            return self.config.stride
        if stride % self.config.stride:
            raise CommandError(
                f"this model cannot be evaluated every {stride} px: its own map has a cell every {self.config.stride} "
                "px; give a multiple of that"
            )
        if self.config.kernel == "authors" and stride % 2 == 0:
            raise CommandError(f"kernel = authors is made of whole pixels, and a stride of {stride} falls between them")
        return stride
