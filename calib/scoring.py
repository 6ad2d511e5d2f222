"""What the engine says of parts: each part's highest score, and the pictures of the parts that score highest.

Owns the step from frames to parts. A part with a frame that cannot be inspected does not count: the highest of fewer
frames is lower, and a promise from it would be too good.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.collect import Collected, collect
from calib.parts import PartImage
from calib.progress import Advance
from edge.bundle import ModelBundle
from edge.protocols import Engine
from edge.stages.segment import Segment
from edge.stages.zones import Zones
from edge.types import AnomalyMap

PICTURES = 12
"""Parts whose maps are kept for the certificate's page."""


@dataclass(frozen=True, slots=True, eq=False)
class Worst:
    """The frame that gave a part its score."""

    image: PartImage
    score: float
    anomaly_map: AnomalyMap
    frame_size: tuple[int, int]


@dataclass(slots=True, eq=False)
class Scored:
    """By part, in the order of their first frame: highest score, highest map value, largest region in frame pixels.

    `zones` holds the highest raw value in each zone (zones,); `sizes` are the frames' (height, width). `files` are the
    images that count with their digests, `skipped` the others with what is wrong with them, `left_out` the parts that
    lack one of them.
    """

    scores: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    areas: dict[str, float] = field(default_factory=dict)
    zones: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    files: dict[PartImage, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    worst: dict[str, Worst] = field(default_factory=dict)
    sizes: set[tuple[int, int]] = field(default_factory=set)

    lowest: bool = False
    """Whether the pictures are those of the parts that score lowest: of bad parts, these are the ones to look at."""

    def shown(self) -> list[Worst]:
        """The parts whose pictures are kept, the most extreme first."""
        return sorted(self.worst.values(), key=lambda one: one.score if self.lowest else -one.score)[:PICTURES]


def score_parts(
    bundle: ModelBundle,
    engine: Engine,
    images: Mapping[PartImage, str],
    camera: str,
    *,
    skip_bad: bool,
    areas: bool,
    lowest: bool = False,
    advance: Advance = lambda done: None,
) -> Scored:
    """Score `images` (with their digests) of one camera of the bundle's calibration, frame by frame.

    `areas` measures regions above the bundle's pixel threshold.

    Raises:
        DataError: an image cannot be inspected, without `skip_bad`.
        EngineError: the engine failed.
    """
    calibration = bundle.calibration.of(camera)
    zones = Zones(calibration.zones, bundle.manifest.map) if calibration.zones else None
    segment = Segment(calibration.pixel_threshold, 1) if areas else None
    scored = Scored(lowest=lowest)
    paths = [image.path for image in images]
    answers = collect(bundle, engine, paths, skip_bad=skip_bad, advance=advance, camera=camera)
    broken: dict[str, None] = {}
    for image, answer in zip(images, answers, strict=True):
        if answer.anomaly_map is None:
            scored.skipped[image.name] = answer.problem
            broken[image.part] = None
            continue
        scored.files[image] = images[image]
        _add(scored, image, answer, answer.anomaly_map, zones, segment)
    _leave_out(scored, list(broken))
    return scored


def _add(
    scored: Scored,
    image: PartImage,
    answer: Collected,
    anomaly_map: AnomalyMap,
    zones: Zones | None,
    segment: Segment | None,
) -> None:
    part, size = image.part, answer.verdict.frame_size
    scored.sizes.add(size)
    score = anomaly_map.score
    if score > scored.scores.get(part, -np.inf):
        scored.worst[part] = Worst(image, score, anomaly_map, size)
        if len(scored.worst) > 4 * PICTURES:
            scored.worst = {one.image.part: one for one in scored.shown()}
    _raise(scored.scores, part, score)
    _raise(scored.peaks, part, float(anomaly_map.scores.max()))
    if zones is not None:
        peaks = zones.peaks(anomaly_map)
        scored.zones[part] = np.maximum(scored.zones.get(part, peaks), peaks)
    if segment is not None:
        regions = segment(anomaly_map, size)
        _raise(scored.areas, part, float(max((region.area_px for region in regions), default=0)))


def _raise(values: dict[str, float], part: str, value: float) -> None:
    values[part] = max(values.get(part, -np.inf), value)


def _leave_out(scored: Scored, parts: list[str]) -> None:
    by_part: tuple[dict[str, Any], ...] = (scored.scores, scored.peaks, scored.areas, scored.zones, scored.worst)
    for part in parts:
        for values in by_part:
            values.pop(part, None)
    gone = set(parts)
    scored.files = {image: digest for image, digest in scored.files.items() if image.part not in gone}
    scored.left_out = parts
