"""From counted trials to the smallest sizes found, kind by kind, contrast by contrast, region by region.

Owns the report and which frames take part: held-out good ones; those that are rejected as they are, are named and left
out. The trials are `trials`', the statistics `smallest`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from calib.evaluation import calibration_for
from calib.places import Box, regions_of
from calib.planting import SCRATCH_WIDTH_PX
from calib.sample import choose_sample
from calib.smallest import Tried, lower_bound, smallest_found
from calib.trials import Cell, Line, Plan, in_order, read_pictures, stages_of
from edge.bundle import ModelBundle
from edge.camera import CameraCalibration
from edge.config import EngineConfig
from edge.errors import DataError
from edge.opening import DEFAULT_ENGINE
from edge.rules import Rules

SCHEMA_VERSION: Final = 1


class Point(msgspec.Struct, frozen=True):
    """One size: `hits` of `trials` found, which shows at least `lower`."""

    size: float
    trials: int
    hits: int
    lower: float


class Curve(msgspec.Struct, frozen=True):
    """One kind, contrast and region. `smallest` is the size found with the stated probability and confidence, None if
    not even the largest is; `measured` is the median of measured length over planted size among those found."""

    kind: str
    contrast: float
    region: str
    points: tuple[Point, ...]
    smallest: float | None
    measured: float | None


class SizesReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `kizu sizes --json` writes."""

    schema_version: int
    bundle: str
    model_id: str
    engine: str
    threshold: float
    pixel_threshold: float
    min_area_px: int
    calibration_id: str | None
    rules_id: str | None
    unit: str
    probability: float
    confidence: float
    trials: int
    seed: int
    blur_px: float
    frames: int
    rejected_as_they_are: tuple[str, ...]
    scratch_width_px: float
    curves: tuple[Curve, ...]
    warnings: tuple[str, ...]


def find_sizes(
    source: ModelBundle,
    good: Path,
    plan: Plan,
    *,
    engine: EngineConfig = DEFAULT_ENGINE,
    roi_xywh: Box | None = None,
    camera: CameraCalibration | None = None,
    rules: Rules | None = None,
    seen_by: str | None = None,
) -> SizesReport:
    """Try `plan` on the good images in the folder `good`, which the camera `seen_by` took if the bundle asks for it.

    Raises:
        CommandError: it does, and no such camera is named.
        DataError: an image was trained on, cannot be inspected, or is too small for what is to be planted.
        EngineError, ParityError: the engine failed, cannot be had (DeviceError: its GPU), or does not give the bundle's
            golden answers on this machine.
    """
    source = replace(source, calibration=calibration_for(source, seen_by))
    sample = choose_sample(source, good)
    pictures = read_pictures([image.path for image in sample.images])
    stages = stages_of(source, roi_xywh, camera, rules)
    line = Line(source, stages, engine)
    rejected = line.rejected_as_they_are(pictures, plan.blur_px)
    kept = {name: image for name, image in pictures.items() if name not in rejected}
    if not kept:
        raise DataError(f"{good}: every image is rejected as it is; look at them, or calibrate the threshold first")
    frame_sizes = {(image.shape[0], image.shape[1]) for image in kept.values()}
    regions = regions_of(frame_sizes, roi_xywh=roi_xywh, grid=plan.grid, masks=plan.masks)
    cells = [
        Cell(kind, contrast, region, size, np.random.SeedSequence((plan.seed, number)))
        for number, (kind, contrast, region, size) in enumerate(in_order(plan, regions))
    ]
    line.run(cells, kept, plan, camera)
    scale = camera is not None and camera.has_scale
    warnings = list(sample.warnings)
    if not source.calibration.certified:
        warnings.append("the threshold is provisional: another one, from `kizu calibrate`, finds other sizes")
    return SizesReport(
        schema_version=SCHEMA_VERSION,
        bundle=str(source.path),
        model_id=source.model_id,
        engine=line.engine,
        threshold=source.calibration.threshold,
        pixel_threshold=source.calibration.pixel_threshold,
        min_area_px=stages.segment.min_area_px,
        calibration_id=None if camera is None else camera.id,
        rules_id=None if rules is None else rules.id,
        unit="mm" if scale else "px",
        probability=plan.probability,
        confidence=plan.confidence,
        trials=plan.trials,
        seed=plan.seed,
        blur_px=plan.blur_px,
        frames=len(kept),
        rejected_as_they_are=tuple(sorted(rejected)),
        scratch_width_px=SCRATCH_WIDTH_PX,
        curves=tuple(_curves(cells, plan)),
        warnings=tuple(warnings),
    )


def _curves(cells: Sequence[Cell], plan: Plan) -> Iterator[Curve]:
    for (kind, contrast, region), group in itertools.groupby(cells, lambda cell: cell.series):
        tried = [cell for cell in group if cell.given]
        lengths = [length for cell in tried for length in cell.lengths]
        points = tuple(
            Point(cell.size, cell.given, cell.hits, lower_bound(cell.hits, cell.given, confidence=plan.confidence))
            for cell in reversed(tried)
        )
        counts = [Tried(cell.size, cell.hits, cell.given) for cell in tried]
        smallest = smallest_found(counts, probability=plan.probability, confidence=plan.confidence)
        yield Curve(kind, contrast, region, points, smallest, float(np.median(lengths)) if lengths else None)
