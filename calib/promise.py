"""What is promised, as numbers: for each camera, for the whole, and for the bundle's provenance.

Owns the schema of `kizu calibrate --json`, which `docs/calibration.md` describes. How it comes about is `certificate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from calib.escapes import Escapes, count_escapes
from calib.parts import PartImage
from calib.scoring import Scored
from calib.suspects import find_suspects
from calib.threshold import FittedThreshold
from edge.bundle import ModelBundle, Zone

SCHEMA_VERSION = 1


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """What is certified for one camera. `rank` counts from the smallest of `parts` scores.

    `suspects` are good parts that score so high that they may be bad ones: part -> how many parts that high are
    expected. None was left out. `zones` gives each zone's own threshold.
    """

    certified_rate: float
    threshold: float
    pixel_threshold: float
    min_area_px: int
    rank: int
    parts: int
    images: int
    allowed_exceedances: int
    previous_threshold: float
    rejected_before: int
    suspects: dict[str, float]
    zones: dict[str, float] = {}
    escapes: Escapes | None = None

    @property
    def rule(self) -> str:
        """Where the threshold comes from, in words."""
        above = self.allowed_exceedances
        if self.zones:
            return f"the highest of {len(self.zones)} zones' thresholds, which {above + 1} of {self.parts:,} parts set"
        if above == 0:
            return f"the highest of {self.parts:,} scores"
        return f"number {self.rank:,} of {self.parts:,} scores, ascending; {above} of the sample may lie above"


class Certificate(Promise, frozen=True, kw_only=True):
    """What `kizu calibrate --json` prints: the promise, what it stands on, and the bundle that makes it.

    `parts` are distinct good parts, `duplicates` maps a file left out to the one with the same bytes, `skipped` maps a
    bad file to its problem, `left_out` are parts with such a file, `spacing` counts frames left out between blocks.
    With several `cameras` the fields of `Promise` are the largest, `parts` and counts the sum, of theirs.
    """

    schema_version: int
    bundle: str
    model_id: str
    source_model_id: str
    engine: str
    data_sha256: str
    false_rejects: float
    confidence: float
    unit: str
    grouping: str
    parts_for_a_tenth: int
    duplicates: dict[str, str]
    skipped: dict[str, str]
    left_out: list[str]
    spacing: int
    warnings: list[str]
    cameras: dict[str, Promise] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A camera's thresholds; `zones` with their offsets."""

    fitted: FittedThreshold
    scores: tuple[float, ...]
    pixel_threshold: float
    min_area_px: int
    zones: tuple[Zone, ...]


def promise_of(source: ModelBundle, fit: Fit, scored: Scored, wrong: Scored | None, confidence: float) -> Promise:
    return Promise(
        certified_rate=fit.fitted.certified_rate,
        threshold=fit.fitted.threshold,
        pixel_threshold=fit.pixel_threshold,
        min_area_px=fit.min_area_px,
        rank=fit.fitted.rank,
        parts=fit.fitted.n,
        images=len(scored.files),
        allowed_exceedances=fit.fitted.allowed_exceedances,
        previous_threshold=source.calibration.threshold,
        rejected_before=sum(score > source.calibration.threshold for score in scored.scores.values()),
        suspects=find_suspects(scored.scores),
        zones={zone.name: fit.fitted.threshold - zone.offset for zone in fit.zones},
        escapes=None if wrong is None else count_escapes(wrong, fit.fitted.threshold, fit.zones, confidence),
    )


_SUMMED = ("parts", "images", "rejected_before")


def summary(promises: Mapping[str, Promise]) -> dict[str, Any]:
    """The fields of one `Promise` that speaks for those of all cameras."""
    return {
        name: _summed(name, {camera: getattr(one, name) for camera, one in promises.items()})
        for name in Promise.__struct_fields__
    }


def _summed(name: str, by_camera: dict[str, Any]) -> Any:
    values = list(by_camera.values())
    if len(values) == 1:
        return values[0]
    if name in ("suspects", "zones"):
        return {f"{camera}/{key}": value for camera, one in by_camera.items() for key, value in one.items()}
    if name == "escapes":
        return None  # a bad part may be seen by one camera only; the cameras' own numbers say which
    return sum(values) if name in _SUMMED else max(values)


def record_of(certificate: Certificate, scored: Mapping[str, Scored], bad: Mapping[PartImage, str]) -> dict[str, Any]:
    """What the bundle's provenance keeps as `score_calibration`."""
    kept = ("certified_rate", "rank", "parts", "images", "duplicates", "skipped", "left_out", "spacing", "unit",
            "grouping", "suspects", "zones", "escapes", "cameras", "warnings")  # fmt: skip
    return {
        "files": sorted(digest for one in scored.values() for digest in one.files.values()),
        **({"bad_files": sorted(set(bad.values()))} if bad else {}),
        **{name: msgspec.to_builtins(getattr(certificate, name)) for name in kept},
    }
