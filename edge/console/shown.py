"""What the page is told: events, cameras and health as small structs, every text and list in them bounded.

Owns the shapes of the stream's JSON; what is counted is `board`'s. An event comes from outside: its texts may be long
and may hold anything, so they are cut here, and the page shows them as text and never as markup.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.console.outline import outline
from edge.console.trend import Bin
from edge.events import DefectEvent, EventRegion

MAX_NAME: Final = 64
MAX_TEXT: Final = 300
MAX_REGIONS: Final = 12


class Region(msgspec.Struct, frozen=True, array_like=True):
    """One region: box and area in frame pixels, peak; square and longest millimeters; the zone that passes over it."""

    box: tuple[int, int, int, int]
    area_px: int
    peak: float
    area_mm2: float | None
    length_mm: float | None = None
    ignored_by: str | None = None


class Shown(msgspec.Struct, frozen=True):
    """One event as the page shows it; times are Unix milliseconds."""

    id: str
    camera: str
    ordinal: int
    decision: str
    reason: str
    detail: str
    score: float | None
    threshold: float | None
    p: float | None
    certified: bool
    model: str
    part: str | None
    at_ms: int
    captured_ms: int
    latency_ms: float
    width: int
    height: int
    outline: str
    regions: list[Region]
    more_regions: int
    label: str | None = None


class Tile(msgspec.Struct, frozen=True):
    """A camera's newest event, and (score, decision's first letter) of the parts since the page last heard."""

    camera: str
    shown: Shown
    recent: list[tuple[float | None, str]]


class CameraHealth(msgspec.Struct, frozen=True):
    """How a camera is doing: seconds since its last event, events per second, and the last minute's counts."""

    camera: str
    age_s: float
    silent: bool
    fps: float
    parts: int
    rejected: int
    inconclusive: int


class Health(msgspec.Struct, frozen=True):
    """How line, model and this console are doing; every age is in seconds, so no clock but the sender's is needed."""

    line: str
    away_s: float | None
    heard: bool
    since_ms: int | None
    state: str
    fallback: str
    model: str
    certificate: str
    certificate_s: float | None
    lag: int | None
    lost: int
    refused: int
    logs_replaced: int
    log_replaced_s: float | None
    clock_off_s: float | None
    clock_step_s: float | None
    challenge: str
    challenge_s: float | None
    challenge_detail: str
    further_cameras: int
    failure: str
    cameras: list[CameraHealth]


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What changed since a page last heard; `skipped` are rejects that it was too slow for."""

    number: int
    ordinal: int
    tiles: list[Tile] = []
    rejects: list[Shown] = []
    skipped: int = 0
    health: Health | None = None
    trend: list[Bin] | None = None
    bin_s: int = 0
    first: bool = False


def shown(event: DefectEvent, mask: NDArray[np.bool_] | None, ordinal: int) -> Shown:
    """The event for the page; its mask becomes an outline."""
    regions = [_region(one) for one in event.regions[:MAX_REGIONS]]
    return Shown(
        id=event.id[:MAX_TEXT],
        camera=event.camera[:MAX_NAME],
        ordinal=ordinal,
        decision=event.decision,
        reason=event.reason[:MAX_NAME],
        detail=event.detail[:MAX_TEXT],
        score=event.score,
        threshold=event.threshold,
        p=event.p_value,
        certified=event.certified,
        model=event.model_id[:MAX_TEXT],
        part=None if event.part_id is None else event.part_id[:MAX_TEXT],
        at_ms=event.decided_ns // 1_000_000,
        captured_ms=event.captured_ns // 1_000_000,
        latency_ms=round(event.latency_ns / 1e6, 2),
        width=event.frame_width,
        height=event.frame_height,
        outline="" if mask is None else outline(mask),
        regions=regions,
        more_regions=len(event.regions) - len(regions),
    )


def _region(one: EventRegion) -> Region:
    zone = None if one.ignored_by is None else one.ignored_by[:MAX_NAME]
    return Region(one.box_xyxy, one.area_px, one.peak, one.area_mm2, one.length_mm, zone)
