"""Student-teacher regression: Bergmann et al., "Uninformed Students", CVPR 2020 (arXiv 1911.02357), and later.

Owns the sum over receptive fields (section 3.4 of the paper), the normalization of the scores e and v (section 3.3),
and where the map lies.  Leaves what one receptive field learns to ``student_scale``, the graph to ``student_graph``,
the teacher to ``distill``, the layer tables to ``patch_nets`` and the order of steps to ``loop``.

With e and v of each scale l (see ``student_scale``) and every position (r, c) of the map:

    score_l     = (e - e_mu) / e_sigma + (v - v_mu) / v_sigma     scalars over all positions of held-out good images
    score       = 1/L sum_l score_l
    image score = max_rc score                                    not in the paper; what its authors do later

Deviations that every preset shares: students see each image once a step together, in the same order (the paper trains
them one by one).  ``line`` and the other presets without padding have descriptors on the teacher's stride instead of
every pixel, and only where the whole footprint lies inside the image: padded borders make good images peak at the rim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge.bundle import MapGeometry
from edge.errors import CommandError, TrainingError
from trainer.backbone_teacher import BackboneTeacher
from trainer.config import StudentTeacherConfig
from trainer.distill import Teacher, load_teacher
from trainer.map_choice import at_cells, choose, trials
from trainer.method import Batch, Frames
from trainer.student_graph import Affine, DeployedStudentTeacher, Resample, ScaleGraph, centered, same_grid
from trainer.student_scale import Scale, cells, offset_px

QUANTILES = (0.9, 0.995)
"""q_a and q_b of EfficientAD: maps are shifted and scaled so that these quantiles become 0 and 0.1."""

QUANTILE_SPAN = 0.1


class StudentTeacher:
    """``method.Method`` for M students of each of one or more teachers; ``seed`` draws them, each from its own stream.

    Raises:
        CommandError: a setting lacks what it needs, or the teachers cannot work together.
    """

    name = "student-teacher"

    def __init__(
        self, config: StudentTeacherConfig, teachers: Sequence[Teacher], *, seed: int, device: str = "cpu"
    ) -> None:
        self.config = config
        self.scales = [
            Scale(config, teacher, seed=seed, number=number, device=device) for number, teacher in enumerate(teachers)
        ]
        self._trainable = nn.ModuleList(scale.trainable for scale in self.scales)
        self._training: Frames | None = None
        self.seed = seed
        self.statistics: list[dict[str, dict[str, float]]] = []
        self.choice: dict[str, Any] = {}

    @property
    def trainable(self) -> nn.Module:
        """All students."""
        return self._trainable

    @property
    def local(self) -> bool:
        """No score looks at the whole picture, and all scales move by the same stride."""
        grids = [scale.stride for scale in self.scales]
        whole = self.config.center != "none" or self.config.metric == "placed" or self.config.autoencoder
        # P pads with zeros at the rim of what it is shown, which would be the rim of every tile.
        whole = whole or any(isinstance(scale.teacher.net, BackboneTeacher) for scale in self.scales)
        return not whole and len(set(grids)) == 1 and (len(grids) == 1 or self.config.pad != "none")

    def prepare(self, frames: Frames) -> None:
        """Fit each teacher's mu and sigma on ``frames`` (n, h, w, C).

        Raises:
            DataError: a teacher answers the same everywhere.
        """
        self._training = frames
        for scale in self.scales:
            scale.prepare(frames)

    def loss(self, batch: Batch) -> Tensor:
        """Sum over scales and students."""
        return torch.stack([scale.loss(batch) for scale in self.scales]).sum()

    def fit_statistics(self, frames: Frames) -> None:
        """Fit the metric and each map's normalization over all positions of held-out good images (n, h, w, C).

        Raises:
            TrainingError: a score does not vary.
        """
        self.statistics, self.choice = [], {}
        for scale in self.scales:
            if self.config.metric != "plain" or set(self.config.terms) & {"s", "t"}:
                assert self._training is not None, "prepare comes first"
                scale.fit_metrics(self._training, frames)
            maps = scale.maps(frames)
            shown = {name: values for name, values in maps.items() if name in self._summed()}
            size = maps.get("e", next(iter(shown.values())))
            self.statistics.append({name: self._fitted(name, values, size) for name, values in shown.items()})
        if self.config.maps == "planted":
            self._choose(frames)

    def deployed(self, channels: int, *, stride: int | None = None) -> nn.Module:
        """The graph contract as a module on the CPU: uint8 (N, h, w, channels) -> maps (N, h', w'), scores (N,).

        Raises:
            CommandError: ``stride`` is no multiple of the configured one, or the map depends on the whole picture.
        """
        side = self.config.size_px
        order = self._finest_first(side, side, stride)
        graphs = [
            ScaleGraph(self.scales[i], self._affine(self.statistics[i]), channels, self._stride(self.scales[i], stride))
            for i in order
        ]
        geometries = [self._geometry(self.scales[i], side, side, stride) for i in order]
        return DeployedStudentTeacher(graphs, geometries, center=self.config.center)

    def map_geometry(self, height_px: int, width_px: int, *, stride: int | None = None) -> MapGeometry:
        """57 x 57 cells, 4 px apart from 15.5, for ``line`` at 256 px; a cell for each pixel for the paper's presets.

        Scales that are summed cell by cell have the mean of their offsets.
        """
        found = [self._geometry(self.scales[i], height_px, width_px, stride)
                 for i in self._finest_first(height_px, width_px, stride)]  # fmt: skip
        first = found[0]
        alike = [one for one in found if same_grid(one, first)]
        offset = sum(one.offset_y for one in alike) / len(alike)
        return MapGeometry(
            height=first.height, width=first.width, stride=first.stride, offset_y=offset, offset_x=offset,
            reduction="max", rim_px=first.rim_px,
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Each scale's teacher (name, digest, card), metric, and fitted normalizations."""
        fitted = self.statistics or [{}] * len(self.scales)
        scales = [scale.describe() | {"statistics": row} for scale, row in zip(self.scales, fitted, strict=True)]
        described = scales[0] if len(scales) == 1 else {"scales": scales}
        return described | ({"choice": self.choice} if self.choice else {})

    def _choose(self, frames: Frames) -> None:
        """Leave out the maps without which planted flaws are told better; all were fitted on ``frames`` just now."""
        side = self.config.size_px
        grid = self._geometry(self.scales[self._finest_first(side, side, None)[0]], side, side, None)
        good, flawed = trials(frames, self.seed)
        kept, told = choose(
            self._normalized(good, grid),
            {size: self._normalized(trial.flawed, grid) for size, trial in flawed.items()},
            {size: at_cells(trial.where, grid) for size, trial in flawed.items()},
            lambda maps: centered(maps, self.config.center),
        )
        for number, row in enumerate(self.statistics):
            self.statistics[number] = {name: values for name, values in row.items() if (number, name) in kept}
        self.choice = {"kept": [f"{name} of {self.scales[number].teacher.name}" for number, name in kept], "told": told}

    def _normalized(self, frames: Frames, grid: MapGeometry) -> dict[tuple[int, str], Tensor]:
        """Every fitted map of ``frames`` by scale and name, on ``grid``."""
        side, found = self.config.size_px, {}
        for number, (scale, fitted) in enumerate(zip(self.scales, self.statistics, strict=True)):
            own, maps = self._geometry(scale, side, side, None), scale.maps(frames)
            for name, affine in self._affine(fitted).items():
                normalized = (maps[name] - affine.shift) * affine.scale
                found[number, name] = normalized if same_grid(own, grid) else Resample(own, grid)(normalized)
        return found

    def _summed(self) -> tuple[str, ...]:
        """Names of the maps that make up the score."""
        return (*self.config.terms, *(("a",) if self.config.autoencoder else ()))

    def _fitted(self, name: str, values: Tensor, size: Tensor) -> dict[str, float]:
        """``mu`` and ``sigma`` of one raw map, or its two quantiles."""
        numbers = values.flatten().double().numpy()
        if self.config.normalization == "quantile":
            low, high = (float(q) for q in np.quantile(numbers, QUANTILES))
            middle, spread, found = low, high - low, {"q_a": low, "q_b": high}
        else:
            middle, spread = float(numbers.mean()), float(numbers.std())
            found = {"mu": middle, "sigma": spread}
        # Relative to the maps' size: equal students give a v of pure rounding, about 1e-14 of it, not zero.
        if not np.isfinite(middle) or not spread > 1e-6 * float(size.mean()) * (name != "a"):
            raise TrainingError(
                f"score {name} has {', '.join(f'{key} {value:.4g}' for key, value in found.items())} over "
                f"{len(values)} held-out images; nothing can be normalized by that: train longer or at a lower "
                "learning rate"
            )
        return found

    def _affine(self, fitted: dict[str, dict[str, float]]) -> dict[str, Affine]:
        """The fitted numbers as shift and scale; EfficientAD weighs its two maps by one half each."""
        weight = 0.5 if self.config.autoencoder else 1.0
        return {
            name: Affine(row["mu"], weight / row["sigma"])
            if "mu" in row
            else Affine(row["q_a"], weight * QUANTILE_SPAN / (row["q_b"] - row["q_a"]))
            for name, row in fitted.items()
        }

    def _stride(self, scale: Scale, stride: int | None) -> int:
        if stride is None or stride == scale.stride:
            return scale.stride
        if not self.local or stride % scale.stride:
            raise CommandError(
                f"this model cannot be evaluated every {stride} px: its own map has a cell every {scale.stride} px"
                + ("" if self.local else ", and its scores depend on the whole picture")
                + f"; give a multiple of {scale.stride} and a preset without center, placed metric or auto-encoder"
            )
        return stride

    def _geometry(self, scale: Scale, height_px: int, width_px: int, stride: int | None) -> MapGeometry:
        step, pad = self._stride(scale, stride), self.config.pad
        offset = offset_px(scale.spec, pad)
        return MapGeometry(
            height=cells(scale.spec, height_px, step, pad), width=cells(scale.spec, width_px, step, pad),
            stride=float(step), offset_y=offset, offset_x=offset, reduction="max",
            # What a cell within this of a side sees is partly padding.
            rim_px=0 if pad == "none" else max(one.spec.patch for one in self.scales) - 1,
        )  # fmt: skip

    def _finest_first(self, height_px: int, width_px: int, stride: int | None) -> list[int]:
        """Scales in the order in which they are summed: the one whose grid the map takes comes first.

        Those of which nothing was chosen are left out.
        """
        found = [self._geometry(scale, height_px, width_px, stride) for scale in self.scales]
        used = [i for i in range(len(found)) if not self.statistics or self.statistics[i]]
        return sorted(used, key=lambda i: (found[i].stride, -found[i].height * found[i].width))


def with_its_teachers(config: StudentTeacherConfig, *, seed: int, device: str) -> StudentTeacher:
    """The method with the teachers that ``config`` names, read from the shipped assets or from files.

    Raises:
        TrainingError: there is no such teacher, or a file is none.
        CommandError: as the method itself.
    """
    return StudentTeacher(config, [load_teacher(name) for name in config.teachers], seed=seed, device=device)
