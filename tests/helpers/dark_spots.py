"""A bundle for the fake engine in which dark is defective: frames of 64 x 64 px are judged pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle import Golden, InputSpec, MapGeometry, ModelBundle, ScoreCalibration
from edge.engines.fake import FakeEngine
from edge.protocols import EngineSpec

SIDE = 64
THRESHOLD = 0.5


def dark_bundle(
    make_bundle: Callable[..., ModelBundle], path: Path, *, threshold: float = THRESHOLD, **changes: Any
) -> ModelBundle:
    """Gray 128 scores 0, black 1; a map cell for each pixel."""
    frames = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 1), dtype=np.uint8)
    with FakeEngine(EngineSpec("fake", "1", "cpu", SIDE, SIDE, 1, SIDE, SIDE, 4, 2)) as engine:
        golden = Golden(frames, *engine.infer(frames))
    calibration = ScoreCalibration(
        "provisional", False, threshold, threshold, 1, (0.0, 0.05, 0.1), "fake 1 cpu", "0" * 64, margin=0.1
    )
    arguments = {
        "input": InputSpec(SIDE, SIDE, 1, 4),
        "map": MapGeometry(SIDE, SIDE, stride=1.0, offset_y=0.0, offset_x=0.0),
        "golden": golden,
        "calibration": calibration,
    }
    return make_bundle(path, side=SIDE, **{**arguments, **changes})


def spots(*boxes: tuple[int, int, int, int], level: int = 0) -> NDArray[np.uint8]:
    """A gray frame with dark boxes, each half-open (x0, y0, x1, y1)."""
    frame = np.full((SIDE, SIDE), 128, np.uint8)
    for x0, y0, x1, y1 in boxes:
        frame[y0:y1, x0:x1] = level
    return frame
