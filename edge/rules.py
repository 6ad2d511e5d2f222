"""Rules: what a quality department writes about defects: "one over 0.3 mm, or three within 50 mm, not in zone B".

Owns the judgment of measured regions with its explanation. What may be written is `rule_file`'s, measuring is
`stages.measure`'s, and so is what follows for the verdict: rules are asked only about parts whose score is above the
threshold, and may let them pass. They never reject a part that the threshold accepts, so what a certificate promises
about good parts holds with any rules.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge.rule_file import Points, Rule, RuleFile, Zone, read_rule_file
from edge.types import DefectRegion

_SLACK: Final = 1e-9


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


def load_rules(path: Path) -> Rules:
    """Read and check a rule file.

    Raises:
        ConfigError: names file, line and key, what was given, what was expected.
    """
    return Rules(*read_rule_file(path))


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
