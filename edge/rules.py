"""Rules: what a quality department writes about defects, as data: "one over 0.3 mm, or three within 50 mm, not in B".

Owns the rule file's schema, its checks, and the judgment of measured regions with its explanation. Measuring is
`stages.measure`'s, and so is what follows for the verdict: rules are asked only about parts whose score is above the
threshold, and may let them pass. They never reject a part that the threshold accepts, so what a certificate promises
about good parts holds with any rules.

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge.bundle_files import sha256_hex
from edge.config import MAX_CONFIG_BYTES, Name, line_of
from edge.errors import ConfigError
from edge.types import DefectRegion

Points = NDArray[np.float64]

_Positive = Annotated[float, Meta(gt=0, le=1e9)]
_Coordinate = Annotated[float, Meta(ge=-1e9, le=1e9)]
_Polygon = Annotated[tuple[tuple[_Coordinate, _Coordinate], ...], Meta(min_length=3, max_length=256)]
_SLACK: Final = 1e-9


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


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A region with what rules ask about. `pixels` (n, 2) are the centers of its pixels in frame pixels and
    `pixels_mm` the same in the plane; those in mm are None without a scale, and both may be empty where no zone asks.
    """

    region: DefectRegion
    length_px: float
    center_px: tuple[float, float]
    pixels: Points
    pixels_mm: Points | None = None


@dataclass(frozen=True, slots=True)
class Ruling:
    """Whether to reject, by which `rule` (None: none holds), the reason in words, and per region the zone that it is
    ignored for."""

    reject: bool
    rule: str | None
    detail: str
    ignored_by: tuple[str | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Rules:
    """A checked rule file; `id` is the SHA-256 of its bytes."""

    file: RuleFile
    id: str = ""

    @property
    def has_zones(self) -> bool:
        """Whether any zone is asked about."""
        return bool(self.file.ignore) or any(rule.zones for rule in self.file.rules)

    @property
    def in_mm(self) -> str | None:
        """What needs the camera's scale, in words; None if nothing does."""
        found = [f"rule {rule.name!r}" for rule in self.file.rules if rule.in_mm]
        found += [f"zone {zone.name!r}" for zone in self.file.zones if zone.polygon_mm is not None]
        return found[0] if found else None

    def judge(self, regions: Sequence[Measured]) -> Ruling:
        """Ask the rules one after the other; the first that holds decides, and none means that the part may pass."""
        inside = {zone.name: [contains(zone, region) for region in regions] for zone in self._zones_asked()}
        ignored_by = tuple(
            next((name for name in self.file.ignore if inside[name][index].all()), None)
            for index in range(len(regions))
        )
        counted = [index for index in range(len(regions)) if ignored_by[index] is None]
        for rule in self.file.rules:
            among = [
                index
                for index in counted
                if _is_meant(rule, regions[index])
                and (not rule.zones or any(inside[name][index].any() for name in rule.zones))
            ]
            if found := _enough(rule, regions, among):
                return Ruling(True, rule.name, _because(rule, regions, found), ignored_by)
        return Ruling(False, None, _acquitted(regions, counted, ignored_by), ignored_by)

    def _zones_asked(self) -> list[Zone]:
        asked = {*self.file.ignore, *itertools.chain.from_iterable(rule.zones for rule in self.file.rules)}
        return [zone for zone in self.file.zones if zone.name in asked]


def contains(zone: Zone, region: Measured) -> NDArray[np.bool_]:
    """For each pixel of the region, whether its center lies in the zone (n,)."""
    points = region.pixels if zone.polygon_px is not None else region.pixels_mm
    assert points is not None  # a line with zones in mm does not start without a scale
    return in_polygon(points, zone.corners)


def in_polygon(points: Points, corners: Points) -> NDArray[np.bool_]:
    """Whether each of `points` (n, 2) lies in the polygon (m, 2): a ray to the right meets an odd number of edges."""
    x, y = points[:, 0], points[:, 1]
    inside = np.zeros(len(points), np.bool_)
    for (x0, y0), (x1, y1) in itertools.pairwise([*corners.tolist(), corners[0].tolist()]):
        if y0 != y1:  # a level edge is never crossed by a level ray
            crossed = (y0 > y) != (y1 > y)
            inside ^= crossed & (x < x0 + (y - y0) * ((x1 - x0) / (y1 - y0)))
    return inside


def cluster(points: Points, at_least: int, diameter: float) -> list[int]:
    """At least so many of `points` (n, 2) that a circle of `diameter` holds, rim included, as indices; empty if none.

    If any circle does, one with a point on its rim does. For each point the circle is turned about it: another point at
    distance d is inside while the direction of the center is within acos(d / diameter) of its own, so the question is
    whether enough such arcs have an angle in common.
    """
    if at_least <= 1:
        return [0] if len(points) else []
    for index, point in enumerate(points):
        away = points - point
        distance = np.hypot(away[:, 0], away[:, 1])
        near = np.flatnonzero(distance <= diameter * (1 + _SLACK))
        if len(near) < at_least:
            continue
        always = near[distance[near] <= diameter * _SLACK]  # the point itself, and others on the same spot
        turning = near[distance[near] > diameter * _SLACK]
        if len(always) >= at_least:
            return sorted(always.tolist())
        direction = np.arctan2(away[turning, 1], away[turning, 0])
        reach = np.arccos(np.minimum(1.0, distance[turning] / diameter)) + _SLACK
        # An arc common to several begins where one of them begins: it is enough to look there.
        for start in direction - reach:
            gap = np.abs(np.remainder(direction - start + math.pi, 2 * math.pi) - math.pi)
            held = turning[gap <= reach + _SLACK]
            if len(held) + len(always) >= at_least:
                return sorted({index, *always.tolist(), *held.tolist()})
    return []


def _is_meant(rule: Rule, one: Measured) -> bool:
    region = one.region
    asked = (
        (rule.length_over_mm, region.length_mm),
        (rule.length_over_px, one.length_px),
        (rule.area_over_mm2, region.area_mm2),
        (rule.area_over_px, region.area_px),
        (rule.peak_over, region.peak),
    )
    return all(limit is None or (value is not None and value > limit) for limit, value in asked)


def _enough(rule: Rule, regions: Sequence[Measured], among: list[int]) -> list[int]:
    """The regions by which the rule holds; empty if it does not."""
    if len(among) < rule.at_least:
        return []
    found = among
    for diameter, centers in ((rule.within_mm, _centers_mm), (rule.within_px, _centers_px)):
        if diameter is not None:
            near = cluster(centers([regions[index] for index in among]), rule.at_least, diameter)
            found = [among[index] for index in near]
    return found


def _centers_px(regions: Sequence[Measured]) -> Points:
    return np.array([one.center_px for one in regions], np.float64).reshape(-1, 2)


def _centers_mm(regions: Sequence[Measured]) -> Points:
    return np.array([one.region.center_mm_xy for one in regions], np.float64).reshape(-1, 2)


# --- in words ---------------------------------------------------------------------------------------------------------


def _because(rule: Rule, regions: Sequence[Measured], found: list[int]) -> str:
    limits = [
        f"{what} over {limit:g} {unit}".rstrip()
        for what, limit, unit in (
            ("length", rule.length_over_mm, "mm"),
            ("length", rule.length_over_px, "px"),
            ("area", rule.area_over_mm2, "mm2"),
            ("area", rule.area_over_px, "px"),
            ("peak", rule.peak_over, ""),
        )
        if limit is not None
    ]
    limits += [f"in zone {' or '.join(rule.zones)}"] if rule.zones else []
    for diameter, unit in ((rule.within_mm, "mm"), (rule.within_px, "px")):
        limits += [f"within {diameter:g} {unit}"] if diameter is not None else []
    count = f"{len(found)} region{'s' * (len(found) != 1)}"
    wanted = f", at least {rule.at_least} asked" if rule.at_least > 1 else ""
    what = " ".join([count, ", ".join(limits)]).strip()
    return f"rule {rule.name!r}: {what}{wanted}; longest {_longest(regions, found)}"


def _acquitted(regions: Sequence[Measured], counted: list[int], ignored_by: Sequence[str | None]) -> str:
    parts = [f"no rule holds: {len(counted)} region{'s' * (len(counted) != 1)}"]
    if counted:
        parts.append(f"longest {_longest(regions, counted)}")
    names = [name for name in ignored_by if name is not None]
    if names:
        parts.append(f"{len(names)} ignored in zone {', '.join(sorted(set(names)))}")
    return ", ".join(parts)


def _longest(regions: Sequence[Measured], among: list[int]) -> str:
    one = regions[max(among, key=lambda index: regions[index].length_px)]
    if one.region.length_mm is None or one.region.center_mm_xy is None:
        return f"{one.length_px:.1f} px at ({one.center_px[0]:.0f}, {one.center_px[1]:.0f}) px"
    x, y = one.region.center_mm_xy
    return f"{one.region.length_mm:.3g} mm at ({x:.1f}, {y:.1f}) mm"


# --- the file ---------------------------------------------------------------------------------------------------------


def load_rules(path: Path) -> Rules:
    """Read and check a rule file.

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
    return Rules(parsed, sha256_hex(data))


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
        if not _is_simple(zone.corners):
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


def _is_simple(corners: Points) -> bool:
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
