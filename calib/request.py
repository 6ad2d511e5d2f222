"""What is asked of a certificate, and whether the pictures can give it.

Owns the question and what may be said about cameras; the answer is `certificate`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from calib.parts import Grouping, PartImage
from calib.sample import Sample
from edge.bundle import RoiXywh, Zone
from edge.config import EngineConfig
from edge.errors import CommandError, DataError
from edge.opening import DEFAULT_ENGINE

MinArea = int | Literal["certify"] | None


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for, beside the sample.

    `min_area_px` None keeps the source's; "certify" fits it: at most `false_rejects` of good parts show a region of
    that size above the source's pixel threshold, which is then kept. `line` are the regions of interest of a line's
    cameras, None for whole frames, `flat_fields` the ids of those that correct their frames; `zones` are by camera, ""
    where cameras are not told apart.
    """

    false_rejects: float
    confidence: float
    min_area_px: MinArea = None
    engine: EngineConfig = DEFAULT_ENGINE
    skip_bad: bool = False
    grouping: Grouping = field(default_factory=Grouping)
    bad: Path | None = None
    labels: Path | None = None
    line: Mapping[str, RoiXywh | None] | None = None
    flat_fields: Mapping[str, str | None] = field(default_factory=dict)
    zones: Mapping[str, Sequence[Zone]] = field(default_factory=dict)


def require_cameras(request: Request, sample: Sample, bad: Iterable[PartImage]) -> None:
    """Refuse zones and bad parts of cameras that took no good parts.

    Raises:
        CommandError: zones of such a camera, or `certify` with zones.
        DataError: bad parts of such a camera.
    """
    cameras = sample.cameras()
    if unknown := sorted(request.zones.keys() - set(cameras)):
        who = f"of camera {unknown[0]!r}" if unknown[0] else "without a camera"
        seen = f"of {', '.join(cameras)}" if cameras != [""] else "not told apart by camera"
        raise CommandError(f"zones {who}, but the pictures are {seen}; name the same cameras in both, or none")
    if lost := sorted({image.camera for image in bad if image.camera} - set(cameras)):
        raise DataError(f"{request.bad}: bad parts of camera {lost[0]!r}, of which there are no good parts")
    if request.min_area_px == "certify" and any(request.zones.values()):
        raise CommandError("--min-area certify: with zones the pixel threshold is theirs; give a number of pixels")


def regions_of(request: Request, sample: Sample) -> dict[str, RoiXywh | None]:
    """Return the region of interest of each camera of the sample, None for whole frames.

    Raises:
        CommandError: the line does not have a camera, or has several and the pictures do not say which one took them.
    """
    line, cameras = request.line, sample.cameras()
    if line is None:
        return dict.fromkeys(cameras)
    if cameras == [""]:
        if len(line) > 1:
            raise CommandError(
                f"the line has the cameras {', '.join(line)}; say which one took each picture: (?P<camera>…) in "
                "--part-pattern, or a column camera in --parts"
            )
        return {"": next(iter(line.values()))}
    if strange := [camera for camera in cameras if camera not in line]:
        raise CommandError(f"pictures of camera {strange[0]!r}, but the line has {', '.join(line)}; correct the names")
    return {camera: line[camera] for camera in cameras}


def flat_fields_of(request: Request, sample: Sample) -> dict[str, str | None]:
    """Return which flat field the pictures of each camera of the sample are said to be corrected by."""
    alone = next(iter(request.line or ()), "")  # `regions_of` has refused a line of several
    return {camera: request.flat_fields.get(camera or alone) for camera in sample.cameras()}


def notes_of(request: Request, suspects: Mapping[str, float], cameras: Collection[str]) -> list[str]:
    """Return what a reader must know: suspects, what several cameras promise together, cameras without pictures."""
    notes = []
    if suspects:
        notes.append(
            f"{len(suspects)} of the good parts score far above the others and may be bad ones: "
            f"{', '.join(list(suspects)[:3])}; look at them on the certificate's page; they count until they are taken "
            "out"
        )
    if len(cameras) > 1:
        joint = min(1.0, len(cameras) * request.false_rejects)
        sure = max(0.0, 1 - len(cameras) * (1 - request.confidence))
        notes.append(
            f"each of {len(cameras)} cameras has a certificate of its own; that at most {100 * joint:.4g}% of good "
            f"parts are rejected by any of them has {100 * sure:.4g}% confidence"
        )
    if (
        request.line is not None
        and "" not in cameras
        and (left := [name for name in request.line if name not in cameras])
    ):
        notes.append(f"no pictures of the line's camera {', '.join(left)}: its verdicts will not be certified")
    return notes
