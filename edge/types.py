"""What flows through the runtime: frames, maps, regions, verdicts.

Owns no behavior; what crosses a border is in `events`, `bundle` and `wire`. All arrays
are made read-only on construction; array fields make equality ambiguous, so it is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from edge.masks import RunLength


@dataclass(frozen=True, slots=True)
class FrameId:
    """The name of one exposure: it rides along every later type, so any verdict leads back to its picture.

    `epoch` is random per camera start, `sequence` counts from 0 within it, `captured_ns` is Unix time at exposure.
    """

    camera: str
    epoch: int
    sequence: int
    captured_ns: int

    @property
    def key(self) -> tuple[str, int, int]:
        """What identifies the frame: (camera, epoch, sequence)."""
        return self.camera, self.epoch, self.sequence


@dataclass(frozen=True, slots=True)
class Roi:
    """The rectangle of frame pixels that a model's pixels or a map's cells tile evenly.

    `x, y` is its top left corner and `width, height` its size, in frame pixels where pixel i covers [i, i + 1).
    It may reach beyond the frame (aspect kept by reflection) and need not be whole.
    """

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One picture as the camera took it: `image` (H, W, C) uint8, C = 1 gray or 3 RGB, C-contiguous, full sensor frame.

    `received_ns` is the runtime's monotonic clock at reception.
    """

    id: FrameId
    image: NDArray[np.uint8]
    received_ns: int = 0
    part_id: str | None = None

    def __post_init__(self) -> None:
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] not in (1, 3):
            raise ValueError(f"a frame's image is (H, W, 1 or 3) uint8, not {self.image.shape} {self.image.dtype}")
        if not self.image.flags.c_contiguous:
            raise ValueError("a frame's image must be C-contiguous; pass numpy.ascontiguousarray(image)")
        self.image.setflags(write=False)


@dataclass(frozen=True, slots=True, eq=False)
class Unreadable:
    """A frame that can be named but not looked at: it gets INCONCLUSIVE(unreadable), never silence.

    `reason` is the refusal's one word (`truncated`, `bomb`, `format`, `size`, `length`); `detail` is for people.
    """

    id: FrameId
    reason: str
    detail: str
    received_ns: int = 0
    part_id: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class FlatMaps:
    """A camera's flat field over its region of interest: `gain` and `dark` (H, W, C) float32, C-contiguous.

    Known by its identity: an engine keeps those on the device that it was opened with. See `stages.flatfield`.
    """

    gain: NDArray[np.float32]
    dark: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Uneven:
    """Pixels that did not go through their flat field yet: pixel (0, 0) lies at (`top`, `left`) of `maps`.

    What lies beyond a side of the maps was made by reflection, the outermost pixel left single; gray may have become
    RGB.
    """

    maps: FlatMaps
    top: int
    left: int


@dataclass(frozen=True, slots=True, eq=False)
class ModelInput:
    """What the graph takes: `pixels` (h, w, C) uint8; `roi` maps them back to frame pixels.

    Where frames are tiled it is at first the whole region at its own size, which `stages.tile` cuts up.
    `extent` is the frame rectangle that was really looked at: less than `roi` where an aspect was kept by reflection or
    a partial block was filled up. None means all of `roi`. With `uneven` the pixels are to be corrected before the
    graph sees them; None: they are as the graph takes them.
    """

    frame_id: FrameId
    pixels: NDArray[np.uint8]
    roi: Roi
    extent: Roi | None = None
    uneven: Uneven | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AnomalyMap:
    """Raw scores (h', w') float32, finite, higher means more anomalous; `score` is the graph's raw image score.

    `roi` is the frame rectangle that the cells tile; what lies outside it takes the nearest cell's value. `extent` is
    the frame rectangle that was inspected (the ModelInput's), the only place where regions are reported.
    """

    frame_id: FrameId
    scores: NDArray[np.float32]
    score: float
    roi: Roi
    extent: Roi

    def __post_init__(self) -> None:
        self.scores.setflags(write=False)


@dataclass(frozen=True, slots=True, eq=False)
class DefectRegion:
    """One connected flaw in frame coordinates: half-open `box_xyxy`, `area_px`, raw map value `peak`.

    `area_mm2`, `length_mm` (the longest distance between two of its points) and `center_mm_xy`, in the inspected plane,
    are known only where the scale is. `ignored_by` names the zone that the rules pass over and that holds all of it.
    """

    box_xyxy: tuple[int, int, int, int]
    area_px: int
    peak: float
    mask: RunLength
    area_mm2: float | None = None
    length_mm: float | None = None
    center_mm_xy: tuple[float, float] | None = None
    ignored_by: str | None = None


class Decision(StrEnum):
    """What is done with the part; INCONCLUSIVE holds it."""

    ACCEPT = "accept"
    REJECT = "reject"
    INCONCLUSIVE = "inconclusive"


class Reason(StrEnum):
    """Why a verdict is what it is; `SCORE` and `RULE` for ACCEPT and REJECT, the others only with INCONCLUSIVE.

    `RULE`: the score was above the threshold, and the camera's written rules decided; the detail says which.
    """

    SCORE = "score"
    RULE = "rule"
    UNREADABLE = "unreadable"
    SHAPE = "shape"
    LATE = "late"
    FROZEN = "frozen"
    DROPPED = "dropped"
    ENGINE = "engine"
    CHALLENGE = "challenge"

    @property
    def is_judged(self) -> bool:
        """Whether the frame was scored and accepted or rejected."""
        return self in (Reason.SCORE, Reason.RULE)


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """The one answer a frame gets; never a bool.

    `score` and `threshold` are raw and in the same unit (None when the frame could not be scored); `p_value` in (0, 1]
    is against the calibration sample; `frame_size` is (height, width) in pixels, (0, 0) if unknown. `calibration_id` is
    the camera calibration's that the frame was seen through, `rules_id` the rule file's that had a say, None without.
    """

    frame_id: FrameId
    decision: Decision
    reason: Reason
    detail: str
    score: float | None
    threshold: float | None
    p_value: float | None
    certified: bool
    regions: tuple[DefectRegion, ...]
    frame_size: tuple[int, int]
    model_id: str
    received_ns: int = 0
    part_id: str | None = None
    calibration_id: str | None = None
    rules_id: str | None = None
