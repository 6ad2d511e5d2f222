"""DefectEvent: what the world outside learns about one frame.

Owns the event's schema and Verdict -> event; its bytes on a socket are `wire`.

New fields come only at the end and with defaults; readers skip what they do not know.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from edge.types import DefectRegion, Verdict

SCHEMA_VERSION = 1

FRAME: Final = "frame"
"""The kind of an event that is about one frame; others are about the line."""

MaskState = Literal["inline", "replay", "none"]


class EventRegion(msgspec.Struct, frozen=True):
    """One defect region in frame pixels: half-open box, area, raw peak.

    Where the camera's scale is known: area, longest distance between two of its points, and center, in millimeters of
    the inspected plane. `ignored_by` names the zone that the rules pass over and that holds all of it.
    """

    box_xyxy: tuple[int, int, int, int]
    area_px: int
    peak: float
    area_mm2: float | None = None
    length_mm: float | None = None
    center_mm_xy: tuple[float, float] | None = None
    ignored_by: str | None = None


class DefectEvent(msgspec.Struct, frozen=True):
    """One verdict as it is logged and published.

    `log_epoch` and `log_sequence` are given by the event log at commit (0 before); `id` is `CAMERA/EPOCH/SEQUENCE` of
    the frame. `score` and `threshold` are raw and in one unit, null when the frame could not be scored. `captured_ns`
    and `decided_ns` are Unix nanoseconds; `latency_ns` is reception to decision on the daemon's monotonic clock.
    `calibration_id` and `rules_id` are digests of the camera calibration and the rule file that took part.

    `kind` is `frame`, or `challenge`: then the event is about the line and no part, `camera` is `challenge`, and
    `decision` is `accept` for a challenge that was passed and `inconclusive` for one that was not. Skip unknown kinds.
    """

    version: int
    id: str
    line: str
    camera: str
    camera_epoch: int
    frame_sequence: int
    captured_ns: int
    decided_ns: int
    latency_ns: int
    decision: Literal["accept", "reject", "inconclusive"]
    reason: str
    detail: str
    score: float | None
    threshold: float | None
    p_value: float | None
    certified: bool
    regions: tuple[EventRegion, ...]
    frame_height: int
    frame_width: int
    model_id: str
    mask: MaskState
    part_id: str | None = None
    log_epoch: int = 0
    log_sequence: int = 0
    kind: str = FRAME
    calibration_id: str | None = None
    rules_id: str | None = None


def event_of(verdict: Verdict, line: str, decided_ns: int, latency_ns: int, mask: MaskState) -> DefectEvent:
    """Build the event of `verdict`; the log numbers it at commit."""
    frame = verdict.frame_id
    height, width = verdict.frame_size
    return DefectEvent(
        version=SCHEMA_VERSION,
        id=f"{frame.camera}/{frame.epoch}/{frame.sequence}",
        line=line,
        camera=frame.camera,
        camera_epoch=frame.epoch,
        frame_sequence=frame.sequence,
        captured_ns=frame.captured_ns,
        decided_ns=decided_ns,
        latency_ns=latency_ns,
        decision=verdict.decision.value,
        reason=verdict.reason.value,
        detail=verdict.detail,
        score=verdict.score,
        threshold=verdict.threshold,
        p_value=verdict.p_value,
        certified=verdict.certified,
        regions=tuple(map(_event_region, verdict.regions)),
        frame_height=height,
        frame_width=width,
        model_id=verdict.model_id,
        mask=mask,
        part_id=verdict.part_id,
        calibration_id=verdict.calibration_id,
        rules_id=verdict.rules_id,
    )


def _event_region(region: DefectRegion) -> EventRegion:
    return EventRegion(
        region.box_xyxy,
        region.area_px,
        region.peak,
        region.area_mm2,
        region.length_mm,
        region.center_mm_xy,
        region.ignored_by,
    )
