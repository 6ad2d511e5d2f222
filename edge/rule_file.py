"""The rule file: its schema, reading it, and refusing what cannot be meant.

Owns what may be written; what it means for a part is `rules`. `docs/rules.md` explains the same to its authors.

    version = 1
    ignore = ["b"]                      # zones: a region that lies in one entirely counts for nothing

    [[zones]]
    name = "b"
    polygon_mm = [[0, 0], [12.5, 0], [12.5, 8], [0, 8]]

    [[rules]]
    name = "one long"
    length_over_mm = 0.3

    [[rules]]
    name = "a cluster"
    at_least = 3
    within_mm = 50
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge.bundle_files import sha256_hex
from edge.config import MAX_CONFIG_BYTES, Name, line_of
from edge.errors import ConfigError

Points = NDArray[np.float64]

_Positive = Annotated[float, Meta(gt=0, le=1e9)]
_Coordinate = Annotated[float, Meta(ge=-1e9, le=1e9)]
_Polygon = Annotated[tuple[tuple[_Coordinate, _Coordinate], ...], Meta(min_length=3, max_length=256)]


class Zone(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the picture: the corners (x, y) of a polygon, in frame pixels or in millimeters of the plane."""

    name: Name
    polygon_px: _Polygon | None = None
    polygon_mm: _Polygon | None = None

    @property
    def corners(self) -> Points:
        """(n, 2), in the unit it was given in."""
        return np.asarray(self.polygon_px or self.polygon_mm, np.float64)


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Holds where at least `at_least` regions are each as the other keys say.

    `length_over_*` is the longest distance between two points of the region, `area_over_*` its area, `peak_over` its
    largest map value, raw; all greater than, never equal. With `zones` a region counts if a pixel of it lies in one.
    `within_*` asks for so many centers within a circle of that diameter.
    """

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    at_least: Annotated[int, Meta(ge=1, le=256)] = 1
    length_over_mm: _Positive | None = None
    length_over_px: _Positive | None = None
    area_over_mm2: _Positive | None = None
    area_over_px: _Positive | None = None
    peak_over: float | None = None
    within_mm: _Positive | None = None
    within_px: _Positive | None = None
    zones: tuple[Name, ...] = ()

    @property
    def in_mm(self) -> bool:
        """Whether it needs the camera's scale."""
        return any(key is not None for key in (self.length_over_mm, self.area_over_mm2, self.within_mm))


class RuleFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    version: Literal[1]
    rules: Annotated[tuple[Rule, ...], Meta(min_length=1, max_length=64)]
    zones: Annotated[tuple[Zone, ...], Meta(max_length=64)] = ()
    ignore: tuple[Name, ...] = ()


def read_rule_file(path: Path) -> tuple[RuleFile, str]:
    """Read and check a rule file; with the SHA-256 of its bytes.

    Raises:
        ConfigError: names file, line and key, what was given, what was expected.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"rules {path}: {error.strerror}; docs/rules.md shows one") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"rules {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"rules {path}: larger than {MAX_CONFIG_BYTES} bytes; is it the right file?")
    try:
        parsed = msgspec.convert(tomllib.loads(text), RuleFile)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: this is not TOML: {error}; correct that line") from None
    except msgspec.ValidationError as error:
        raise _explained(error, path, text) from None
    _require_sense(parsed, path, text)
    return parsed, sha256_hex(data)


def _explained(error: msgspec.ValidationError, path: Path, text: str) -> ConfigError:
    message, _, where = str(error).partition(" - at `$")
    steps: list[str | int] = [
        int(index) if index else key
        for key, index in re.findall(r"\.?([A-Za-z0-9_]+)|\[(\d+)\]", where)
        if key or index
    ]
    unknown = re.search(r"unknown field `([^`]*)`", message)
    kind = {"rules": Rule, "zones": Zone}.get(str(steps[0])) if steps else RuleFile
    if unknown and kind is not None:
        known = kind.__struct_fields__
        near = difflib.get_close_matches(unknown[1], known, 1, 0.6)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        steps, message = [*steps, unknown[1]], f"unknown key; {hint}"
    key = ".".join(map(str, steps)) or "the file"
    return ConfigError(f"{path}:{line_of(text, steps)}: {key}: {message[:1].lower()}{message[1:]}; docs/rules.md tells")


def _require_sense(file: RuleFile, path: Path, text: str) -> None:
    """What the types cannot say."""

    def refuse(steps: list[str | int], why: str) -> None:
        raise ConfigError(f"{path}:{line_of(text, steps)}: {'.'.join(map(str, steps))}: {why}")

    for table, names in (("zones", [one.name for one in file.zones]), ("rules", [one.name for one in file.rules])):
        for index, name in enumerate(names):
            if name in names[:index]:
                refuse([table, index, "name"], f"{name!r} is given twice; give each its own name")
    known = {zone.name for zone in file.zones}
    for index, zone in enumerate(file.zones):
        if (zone.polygon_px is None) == (zone.polygon_mm is None):
            refuse(["zones", index], "a zone has either polygon_px or polygon_mm")
        if not is_simple(zone.corners):
            refuse(
                ["zones", index], "the polygon has no area, or its edges cross; name its corners in order, once each"
            )
    for index, rule in enumerate(file.rules):
        if unknown := [name for name in rule.zones if name not in known]:
            refuse(
                ["rules", index, "zones"],
                f"there is no zone {unknown[0]!r}; known: {', '.join(sorted(known)) or 'none'}",
            )
        if rule.at_least < 2 and (rule.within_mm is not None or rule.within_px is not None):
            refuse(["rules", index], "`within` is about several regions; say how many with at_least = 2 or more")
        if rule.within_mm is not None and rule.within_px is not None:
            refuse(["rules", index], "give within_mm or within_px, not both")
        if rule.peak_over is not None and not math.isfinite(rule.peak_over):
            refuse(["rules", index, "peak_over"], f"{rule.peak_over} is no number to compare with")
    if unknown := [name for name in file.ignore if name not in known]:
        refuse(["ignore"], f"there is no zone {unknown[0]!r}; known: {', '.join(sorted(known)) or 'none'}")


def is_simple(corners: Points) -> bool:
    """Whether no two edges of the polygon meet but neighbors in their common corner, and it has an area."""
    x, y = corners[:, 0], corners[:, 1]
    if abs(float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))) <= 0:
        return False
    edges = [(corners[index], corners[(index + 1) % len(corners)]) for index in range(len(corners))]
    for (first, one), (second, other) in itertools.combinations(enumerate(edges), 2):
        neighbors = second - first in (1, len(edges) - 1)
        if not neighbors and _cross(one, other):
            return False
    return not any(np.array_equal(start, stop) for start, stop in edges)


def _cross(one: tuple[Points, Points], other: tuple[Points, Points]) -> bool:
    """Whether two segments have a point in common."""
    sides = [_side(*one, other[0]), _side(*one, other[1]), _side(*other, one[0]), _side(*other, one[1])]
    if sides[0] * sides[1] < 0 and sides[2] * sides[3] < 0:
        return True
    ends = zip(sides, (other[0], other[1], one[0], one[1]), (one, one, other, other), strict=True)
    return any(side == 0 and _within_box(point, segment) for side, point, segment in ends)


def _side(start: Points, stop: Points, point: Points) -> float:
    (x0, y0), (x1, y1), (x, y) = start, stop, point
    return float(np.sign((x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)))


def _within_box(point: Points, segment: tuple[Points, Points]) -> bool:
    low, high = np.minimum(*segment), np.maximum(*segment)
    return bool((low <= point).all() and (point <= high).all())
