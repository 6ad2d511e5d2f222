"""One defect planted in one frame and looked at, over and over: what is tried where, and what counts as found.

Owns the plan and the way through the line's own code: frames go through `edge.inference`, so preprocessing, engine,
threshold, segmentation, measuring and rules are those of the daemon. What follows from the counts is `sizes`'.

Found means: the part is rejected, and a region touches the planted pixels, grown by one cell of the map. A rejection
for something elsewhere finds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Final

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from calib.collect import COLLECT_TIMEOUT_S
from calib.dataset import read_stored_image
from calib.places import Box, Region, place
from calib.planting import Defect, Kind, plant
from calib.progress import Advance, progress
from edge.bundle import ModelBundle, check_golden
from edge.camera import CameraCalibration
from edge.challenge import verdicts_of
from edge.clock import SystemClock
from edge.config import EngineConfig
from edge.errors import DataError, EngineError, ImageRefused
from edge.images import cv2
from edge.inference import EngineRunner, Scored, Stages, Unjudged
from edge.metrics import Metrics
from edge.opening import engine_words, looseness, open_on
from edge.rules import Rules
from edge.stages.decide import Decide
from edge.stages.flatfield import flat_field_of
from edge.stages.measure import Measure
from edge.stages.preprocess import Preprocess
from edge.stages.segment import Segment
from edge.stages.tile import tiling_of
from edge.stages.zones import Zones
from edge.types import Decision, DefectRegion, Frame, FrameId, Reason, Verdict

CAMERA: Final = "planted"
GIVEN_UP_BELOW: Final = 0.05
"""A size of which fewer are found ends the way down: smaller ones would cost time and show nothing."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is tried. `sizes` in mm where the camera has a scale, else in px.

    `grid` is (rows, columns) of regions; or `masks` a folder of pictures, each not 0 in the region named like its file.
    `blur_px` is the standard deviation of a Gaussian that blurs every frame, after planting.
    """

    kinds: tuple[Kind, ...]
    contrasts: tuple[float, ...]
    sizes: tuple[float, ...]
    trials: int = 61
    probability: float = 0.9
    confidence: float = 0.95
    grid: tuple[int, int] = (1, 1)
    masks: Path | None = None
    blur_px: float = 0.0
    seed: int = 0


@dataclass(slots=True, eq=False)
class Cell:
    """All trials of one size."""

    kind: Kind
    contrast: float
    region: Region
    size: float
    random: np.random.SeedSequence
    given: int = 0
    answered: int = 0
    hits: int = 0
    lengths: list[float] = field(default_factory=list)

    @property
    def series(self) -> tuple[str, float, str]:
        """Kind, contrast and region: the curve that it is a point of."""
        return self.kind, self.contrast, self.region.name


def in_order(plan: Plan, regions: Sequence[Region]) -> Iterator[tuple[Kind, float, Region, float]]:
    """Everything that is tried; within a curve from the largest size down."""
    for kind in plan.kinds:
        for contrast in plan.contrasts:
            for region in regions:
                for size in sorted(plan.sizes, reverse=True):
                    yield kind, contrast, region, size


# --- looking ----------------------------------------------------------------------------------------------------------


def read_pictures(paths: Sequence[Path]) -> dict[str, NDArray[np.uint8]]:
    """Images as stored, by name.

    Raises:
        DataError: one cannot be read.
    """
    pictures = {}
    for path in paths:
        try:
            pictures[path.name] = read_stored_image(path)
        except ImageRefused as error:
            raise DataError(str(error)) from None
    return pictures


def stages_of(
    source: ModelBundle, roi_xywh: Box | None, camera: CameraCalibration | None, rules: Rules | None
) -> Stages:
    """The stages of a line that runs `source`, for one camera."""
    manifest, calibration = source.manifest, source.calibration
    size = None if camera is None else camera.size
    return Stages(
        line="sizes",
        input=manifest.input,
        geometry=manifest.map,
        preprocess={CAMERA: Preprocess(manifest.input, roi_xywh, size, flat_field_of(camera))},
        segment=Segment(calibration.pixel_threshold, max(1, calibration.min_area_px)),
        decide=Decide(calibration, source.model_id),
        tiling=tiling_of(manifest.input, manifest.map),
        zones={CAMERA: Zones(calibration.zones, manifest.map)} if calibration.zones else {},
        measures={CAMERA: Measure(camera, rules)},
    )


class Line:
    """Judges frames one after the other as the daemon would: the same runner, stages and engine."""

    def __init__(self, source: ModelBundle, stages: Stages, asked: EngineConfig) -> None:
        self.engine = ""
        self._source, self._stages, self._asked = source, stages, asked

    def rejected_as_they_are(self, pictures: dict[str, NDArray[np.uint8]], blur_px: float) -> set[str]:
        """Names of the pictures that the line rejects with nothing planted."""
        names, rejected = list(pictures), set[str]()

        def note(verdict: Verdict) -> None:
            if verdict.decision is Decision.REJECT:
                rejected.add(names[verdict.frame_id.sequence])

        with progress("look at good frames", len(names)) as advance:
            self._judge(_Clean(list(pictures.values()), blur_px, advance), note)
        return rejected

    def run(
        self,
        cells: Sequence[Cell],
        pictures: dict[str, NDArray[np.uint8]],
        plan: Plan,
        camera: CameraCalibration | None,
    ) -> None:
        """Fill every cell that is worth it."""
        with progress("plant and look", len(cells) * plan.trials) as advance:
            queue = _Planting(cells, list(pictures.values()), plan, camera, self._cell_px(pictures), advance)
            self._judge(queue, queue.note)

    def _cell_px(self, pictures: dict[str, NDArray[np.uint8]]) -> int:
        """The side of a map's cell in frame pixels, at most, rounded up."""
        spec, stage = self._source.manifest.input, self._stages.preprocess[CAMERA]
        sizes = [stage.roi_xywh[2:] if stage.roi_xywh else image.shape[1::-1] for image in pictures.values()]
        widest = max(max(width / spec.width, height / spec.height) for width, height in sizes)
        return math.ceil(self._source.manifest.map.stride * (1.0 if spec.fit == "tile" else widest))

    def _judge(self, frames: _Clean | _Planting, note: Callable[[Verdict], None]) -> None:
        with ExitStack() as opened:
            engine = opened.enter_context(open_on(self._source, self._asked))
            engine.warmup()
            is_real = self._asked.backend != "fake"
            check_golden(self._source, engine, require=is_real, loose=looseness(self._asked, engine))
            self.engine = engine_words(self._asked, engine)
            opened.pop_all()  # the runner's to close from here on

        def hand_over(item: Scored | Unjudged) -> None:
            for verdict in verdicts_of(item, self._stages):
                if verdict.decision is Decision.INCONCLUSIVE:
                    raise _refusal(verdict)
                note(verdict)

        def warn(text: str, fields: Mapping[str, object]) -> None: ...  # what fails is refused above

        clock, most = SystemClock(), self._source.manifest.input.max_batch
        aside = Metrics(CollectorRegistry(), (), clock)
        runner = EngineRunner(
            engine, lambda: engine, self._stages, aside, clock, most, 0, hand_over, warn, COLLECT_TIMEOUT_S
        )
        runner.run(frames)


def _refusal(verdict: Verdict) -> EngineError | DataError:
    if verdict.reason is Reason.SHAPE:
        return DataError(f"an image cannot be inspected: {verdict.detail}")
    return EngineError(verdict.detail)


class _Clean:
    """A queue of frames as they are, `sequence` being their place."""

    def __init__(self, images: Sequence[NDArray[np.uint8]], blur_px: float, advance: Advance) -> None:
        self._left, self._blur_px, self._advance = iter(enumerate(images)), blur_px, advance

    def get(self, *, timeout: float) -> Frame | None:
        return self.get_nowait()

    def get_nowait(self) -> Frame | None:
        for index, image in self._left:
            self._advance(index + 1)
            return _frame(index, image, self._blur_px)
        return None


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """What was planted, until its verdict: `near` are the pixels where a region finds it."""

    cell: Cell
    near: NDArray[np.bool_]


class _Planting:
    """A queue of frames with one planted defect each, cell by cell; `note` takes their verdicts.

    A cell's last frames are waited for before the next begins, for they may show that it is not worth beginning.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        images: Sequence[NDArray[np.uint8]],
        plan: Plan,
        camera: CameraCalibration | None,
        grown_px: int,
        advance: Advance,
    ) -> None:
        self._cells, self._at = list(cells), 0
        self._images, self._plan, self._camera, self._advance = images, plan, camera, advance
        self._grown_px = grown_px
        self._random = np.random.default_rng(cells[0].random)
        self._out: dict[int, _Trial] = {}
        self._number = 0

    def get(self, *, timeout: float) -> Frame | None:
        return self.get_nowait()

    def get_nowait(self) -> Frame | None:
        while self._at < len(self._cells):
            cell = self._cells[self._at]
            if cell.given < self._plan.trials:
                return self._planted(cell)
            if cell.answered < cell.given:
                raise Empty
            self._go_on(cell)
        return None

    def note(self, verdict: Verdict) -> None:
        """Count one answer."""
        trial = self._out.pop(verdict.frame_id.sequence)
        trial.cell.answered += 1
        found = [region for region in verdict.regions if _touches(region, trial.near)]
        if verdict.decision is Decision.REJECT and found:
            trial.cell.hits += 1
            trial.cell.lengths.append(max(map(self._length, found)) / trial.cell.size)

    def _length(self, region: DefectRegion) -> float:
        return region.length_mm if region.length_mm is not None else Measure().measured(region).length_px

    def _go_on(self, done: Cell) -> None:
        """To the next cell; past those of the same curve if this one was hardly ever found."""
        self._at += 1
        if done.hits < GIVEN_UP_BELOW * done.given:
            while self._at < len(self._cells) and self._cells[self._at].series == done.series:
                self._at += 1
        self._advance(self._at * self._plan.trials)
        if self._at < len(self._cells):
            self._random = np.random.default_rng(self._cells[self._at].random)

    def _planted(self, cell: Cell) -> Frame:
        rng = self._random
        image = self._images[int(rng.integers(len(self._images)))]
        scale = 1.0
        if self._camera is not None and self._camera.has_scale:
            # The size in pixels follows from the place, and the place must have room for it: the frame's middle decides
            # how much room is asked for, with a quarter to spare.
            scale = self._camera.mm_per_px(image.shape[1] / 2, image.shape[0] / 2)
        margin = Defect(cell.kind, cell.size / scale, cell.contrast).reach_px * (1 if scale == 1.0 else 1.25)
        x, y = place(cell.region, image.shape[:2], margin, rng)
        if self._camera is not None and self._camera.has_scale:
            scale = self._camera.mm_per_px(x, y)
        defect = Defect(cell.kind, cell.size / scale, cell.contrast, float(rng.uniform(0, 2 * math.pi)))
        planted, mask = plant(image, defect, (x, y))
        self._out[self._number] = _Trial(cell, _grown(mask, self._grown_px))
        cell.given += 1
        self._number += 1
        self._advance(self._at * self._plan.trials + cell.given)
        return _frame(self._number - 1, planted, self._plan.blur_px)


def _frame(number: int, image: NDArray[np.uint8], blur_px: float) -> Frame:
    if blur_px > 0:
        blurred = np.asarray(cv2.GaussianBlur(image, (0, 0), blur_px), np.uint8)
        image = np.ascontiguousarray(blurred).reshape(image.shape)
    return Frame(FrameId(CAMERA, 0, number, 0), image)


def _grown(mask: NDArray[np.bool_], by_px: int) -> NDArray[np.bool_]:
    kernel = np.ones((2 * by_px + 1, 2 * by_px + 1), np.uint8)
    return np.asarray(cv2.dilate(mask.view(np.uint8), kernel), np.bool_)


def _touches(region: DefectRegion, near: NDArray[np.bool_]) -> bool:
    return any(near[row, start:stop].any() for row, start, stop in region.mask.runs.tolist())
