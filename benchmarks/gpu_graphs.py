"""Graphs for the benchmarks on a GPU, made in memory: presets that nobody trained, and dense networks in both forms.

Weights are the shipped teachers' or random: they change no time, and parity is a matter of the graph's arithmetic. Each
comes with its torch module, which runs where TensorRT does not, and with golden answers in fp32 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge.bundle import (
    SCHEMA_VERSION,
    Golden,
    InputSpec,
    Manifest,
    MapGeometry,
    ModelBundle,
    ScoreCalibration,
    Tolerance,
)

if TYPE_CHECKING:
    from torch import nn

SIDE_PX = 256
MAX_BATCH = 8
PRESETS = ("line", "paper-33", "paper-multiscale")


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A bundle that is on no disk, and the module that it was exported from; None for one that was opened."""

    name: str
    bundle: ModelBundle
    module: Any = None


def preset_graph(preset: str, frames: NDArray[np.uint8], device: str) -> Graph:
    """Student-teacher as `preset` says; statistics from `frames` (4 or more, h, w, 3) uint8, computed on `device`."""
    from trainer.methods import METHODS
    from trainer.presets import PRESETS as OF_METHOD

    method = METHODS["student-teacher"](OF_METHOD["student-teacher"][preset], seed=1, device=device)
    method.prepare(frames[:2])
    method.fit_statistics(frames[2:4])
    spec = InputSpec(*frames.shape[1:3], 3, MAX_BATCH)
    return _graph(preset, method.deployed(3).cpu().eval(), spec, method.map_geometry(*frames.shape[1:3]), frames[:2])


def dense_graph(patch: int, form: Literal["multipool", "dilated"], frames: NDArray[np.uint8]) -> Graph:
    """A teacher and three students of `paper-PATCH` with a descriptor for every pixel, and how far they differ."""
    side = frames.shape[1]
    geometry = MapGeometry(side, side, stride=1.0, offset_y=0.0, offset_x=0.0, rim_px=patch - 1)
    return _graph(
        f"dense-{patch}-{form}", dense_module(patch, form), InputSpec(side, side, 3, MAX_BATCH), geometry, frames
    )


def dense_module(patch: int, form: Literal["multipool", "dilated"]) -> nn.Module:
    """frames (N, h, w, 3) uint8 -> map (N, h, w) and score (N,); both forms of a patch size have the same weights."""
    import torch
    from torch import nn

    from trainer.patch_nets import PROFILES, InputNormalization, build_patch_net
    from trainer.student_scale import around

    spec = PROFILES[f"paper-{patch}"]

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalize = InputNormalization()
            self.nets = nn.ModuleList(around(spec, build_patch_net(spec, seed), 1, "zero", form) for seed in range(4))

        def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            pixels = self.normalize(frames)
            teacher, *students = (net(pixels).float() for net in self.nets)
            missed = torch.stack(students).mean(0) - teacher
            cells = (missed * missed).sum(1)
            return cells, cells.amax((1, 2))

    return Dense().eval()


def flop_of(module: nn.Module, side: int) -> int:
    """Floating-point operations of one frame, two for each multiply-add, counted on tensors that hold nothing."""
    import copy

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    empty = copy.deepcopy(module).to("meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        empty(torch.empty((1, side, side, 3), dtype=torch.uint8, device="meta"))
    return int(counter.get_total_flops())


def _graph(
    name: str, module: nn.Module, spec: InputSpec, geometry: MapGeometry, golden_frames: NDArray[np.uint8]
) -> Graph:
    from trainer.export import golden_answers, to_onnx

    golden: Golden = golden_answers(module, golden_frames)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION, name=name, method="student-teacher", preset=name, input=spec, map=geometry,
        tolerance=Tolerance(absolute=1e-4, relative=1e-3), created_ns=0, files={},
    )  # fmt: skip
    calibration = ScoreCalibration(
        kind="provisional", certified=False, threshold=1.0, pixel_threshold=1.0, min_area_px=1, scores=(1.0,),
        engine="none", data_sha256="0" * 64, margin=0.0,
    )  # fmt: skip
    bundle = ModelBundle(
        path=Path(name), model_id=name, manifest=manifest, model=to_onnx(module, spec), golden=golden,
        calibration=calibration, provenance={},
    )  # fmt: skip
    return Graph(name, bundle, module)
