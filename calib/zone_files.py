"""Zones as their author draws them: polygons in a TOML file, or a mask painted over a picture.

Owns what a file may say; what zones do is `edge.stages.zones`, what their thresholds promise `zoning`.

    [[zones]]                    in frame pixels, where pixel i covers [i, i + 1)
    name = "print"
    camera = "left"              left out with a single camera
    polygon_xy = [[120, 80], [480, 80], [480, 300], [120, 300]]
    [[zones]]
    name = "rim"
    mask = "rim.png"             beside this file; a picture of the frame's size, 0 where not inspected

A mask may also be given by itself: each of its gray levels but 0 is a zone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.bundle import Ring, Zone
from edge.errors import DataError, ImageRefused
from edge.images import IMAGE_SUFFIXES, cv2, read_image

MAX_LEVELS = 16
"""Gray levels of a mask; more are a photograph, or edges that were smoothed."""

MAX_CORNERS = 50_000
"""Of all rings of a mask."""


class _DrawnZone(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    polygon_xy: Annotated[tuple[tuple[float, float], ...], msgspec.Meta(min_length=3, max_length=1000)] | None = None
    mask: str | None = None
    camera: str = ""


class _ZonesFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    zones: Annotated[tuple[_DrawnZone, ...], msgspec.Meta(min_length=1, max_length=64)]


def read_zones(path: Path) -> dict[str, tuple[Zone, ...]]:
    """Return the zones of a TOML file or a mask by camera, "" where none is named.

    Raises:
        DataError: it cannot be read, a key is unknown, a zone has fewer than three corners, two sources or none, a name
            is given twice, or a mask has nothing in it, too many gray levels or too ragged an outline.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return {"": _of_mask(path)}
    try:
        drawn = msgspec.toml.decode(path.read_bytes(), type=_ZonesFile).zones
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"--zones {path}: {error}; expected [[zones]] with name and polygon_xy = [[x, y], …]") from None
    found: dict[str, list[Zone]] = {}
    for zone in drawn:
        others = found.setdefault(zone.camera, [])
        if zone.name in [other.name for other in others]:
            raise DataError(f"--zones {path}: zone {zone.name!r} is given twice; give each a name of its own")
        others.append(_of_entry(path, zone))
    return {camera: tuple(zones) for camera, zones in found.items()}


def _of_entry(path: Path, zone: _DrawnZone) -> Zone:
    if (zone.polygon_xy is None) == (zone.mask is None):
        raise DataError(f"--zones {path}: zone {zone.name!r} needs polygon_xy or mask, and not both")
    if zone.polygon_xy is not None:
        return Zone(zone.name, (zone.polygon_xy,))
    assert zone.mask is not None
    where = path.parent / zone.mask
    return _zone(where, zone.name, _levels(where) > 0)


def _of_mask(path: Path) -> tuple[Zone, ...]:
    levels = _levels(path)
    found = [int(level) for level in np.unique(levels) if level]
    if len(found) > MAX_LEVELS:
        raise DataError(
            f"--zones {path}: {len(found)} gray levels, at most {MAX_LEVELS} are zones; paint without smoothed edges "
            "and save as PNG"
        )
    if len(found) == 1:
        return (_zone(path, "mask", levels > 0),)
    return tuple(_zone(path, f"gray {level}", levels == level) for level in found)


def _levels(path: Path) -> NDArray[np.uint8]:
    try:
        levels = read_image(path, channels=1)[:, :, 0]
    except ImageRefused as error:
        raise DataError(f"--zones: {error}") from None
    if not levels.any():
        raise DataError(f"--zones {path}: all of it is 0, so nothing would be inspected; paint what is to be seen")
    return levels


def _zone(path: Path, name: str, inside: NDArray[np.bool_]) -> Zone:
    rings = outline(inside)
    if sum(map(len, rings)) > MAX_CORNERS:
        raise DataError(f"--zones {path}: the outline has more than {MAX_CORNERS} corners; paint it less ragged")
    return Zone(name, rings, frame_size=(inside.shape[0], inside.shape[1]))


def outline(inside: NDArray[np.bool_]) -> tuple[Ring, ...]:
    """Rings in frame pixels that hold exactly the centers of the pixels of `inside` (H, W), by the even-odd rule."""
    # Twice as large, so that a ring runs a quarter of a pixel inside the edge and never through a pixel's center.
    twice = inside.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(twice, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = [np.asarray(contour, np.float64).reshape(-1, 2) / 2 + 0.25 for contour in contours]
    return tuple(tuple((float(x), float(y)) for x, y in ring) for ring in rings if len(ring) > 2)
