"""The rule file: what it says is what happens, and what it cannot mean is refused with its line."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge import rules as rules_module
from edge.camera import CameraCalibration, Plane
from edge.errors import ConfigError
from edge.masks import RunLength
from edge.rule_file import Rule, RuleFile, Zone, is_simple
from edge.rules import Measured, Rules, cluster, in_polygon, load_rules
from edge.stages.measure import Measure
from edge.types import DefectRegion

WRITTEN = """\
version = 1
ignore = ["b"]

[[zones]]
name = "b"
polygon_px = [[100, 0], [200, 0], [200, 100], [100, 100]]

[[rules]]
name = "one long"
length_over_mm = 3.0

[[rules]]
name = "a cluster"
at_least = 3
within_mm = 5.0
"""
MM = 0.1
"""Millimeters a pixel in these tests."""


def write(folder: Path, text: str) -> Path:
    path = folder / "rules.toml"
    path.write_text(text, encoding="utf-8")
    return path


def measured(x: int, y: int, width: int = 4, height: int = 2, size: tuple[int, int] = (400, 400)) -> Measured:
    """A rectangle of pixels, in a picture of 0.1 mm a pixel."""
    runs = np.array([(row, x, x + width) for row in range(y, y + height)], np.int32)
    mask = RunLength(runs, *size)
    region = DefectRegion(mask.box_xyxy, mask.area_px, 2.0, mask)
    camera = CameraCalibration("id", size, plane=Plane((MM, 0, 0, 0, MM, 0, 0, 0, 1)))
    return Measure(camera).measured(region, with_pixels=True)


def test_a_file_decides_as_it_reads(tmp_path: Path) -> None:
    """One over 3 mm, or three within 5 mm, and nothing in zone b; the explanation names the rule and what it saw."""
    rules = load_rules(write(tmp_path, WRITTEN))
    short, long = [measured(10, 10)], [measured(10, 10), measured(10, 50, width=40)]
    three = [measured(10, 10), measured(30, 10), measured(20, 30)]
    apart = [measured(10, 10), measured(30, 10), measured(20, 90)]
    in_b = [measured(120, 10, width=60), measured(10, 10)]

    assert not rules.judge(short).reject
    assert rules.judge(long).rule == "one long" and "longest 4 mm" in rules.judge(long).detail
    assert rules.judge(three).rule == "a cluster" and "3 regions within 5 mm" in rules.judge(three).detail
    assert not rules.judge(apart).reject
    assert rules.judge(in_b).ignored_by == ("b", None) and "1 ignored in zone b" in rules.judge(in_b).detail


def test_a_region_that_reaches_out_of_an_ignored_zone_counts() -> None:
    """Half a scratch in a zone that does not matter is a scratch all the same."""
    rules = Rules(
        RuleFile(1, (Rule("any"),), (Zone("b", polygon_px=((100, 0), (200, 0), (200, 90), (100, 90))),), ("b",))
    )

    assert not rules.judge([measured(100, 10, width=100)]).reject
    assert rules.judge([measured(99, 10, width=100)]).reject


def test_a_gap_in_a_zone_is_no_part_of_it() -> None:
    """A zone shaped like a U: what spans its arms lies in the gap as well, and counts."""
    u = ((0, 0), (300, 0), (300, 100), (200, 100), (200, 10), (100, 10), (100, 100), (0, 100))
    rules = Rules(RuleFile(1, (Rule("any"),), (Zone("u", polygon_px=u),), ("u",)))

    assert rules.judge([measured(50, 50, width=200)]).reject
    assert not rules.judge([measured(50, 2, width=200)]).reject


def test_a_rule_for_a_zone_is_about_what_touches_it() -> None:
    """The other way round: one pixel in the zone is enough to count."""
    zone = Zone("a", polygon_mm=((10, 0), (20, 0), (20, 9), (10, 9)))
    rules = Rules(RuleFile(1, (Rule("in a", zones=("a",)),), (zone,)))

    assert rules.judge([measured(97, 10)]).rule == "in a"
    assert not rules.judge([measured(96, 10)]).reject


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("length_over_mm", "lenght_over_mm"), r"rules.toml:10: rules.0.lenght_over_mm: unknown key; did you mean len"),
        (("length_over_mm = 3.0", "length_over_mm = -3"), r"rules.toml:10: rules.0.length_over_mm: expected"),
        (("length_over_mm = 3.0", "length_over_mm = nan"), r"rules.0.length_over_mm: expected"),
        (("length_over_mm = 3.0", "length_over_mm = inf"), r"rules.0.length_over_mm: expected"),
        (("length_over_mm = 3.0", "peak_over = inf"), r"rules.0.peak_over: inf is no number"),
        (("version = 1", "version = 2"), r"version: "),
        (('ignore = ["b"]', 'ignore = ["c"]'), r"rules.toml:2: ignore: there is no zone 'c'; known: b"),
        (("at_least = 3\n", ""), r"rules.toml:12: rules.1: `within` is about several regions"),
        (("within_mm = 5.0", 'zones = ["z"]'), r"rules.toml:15: rules.1.zones: there is no zone 'z'"),
        (('"a cluster"', '"one long"'), r"rules.toml:13: rules.1.name: 'one long' is given twice"),
        (("[100, 100]]", "[150, -50]]"), r"rules.toml:4: zones.0: .*edges cross"),
        (("polygon_px", "polygon_in"), r"zones.0.polygon_in: unknown key"),
        (("[[100, 0], [200, 0], [200, 100], [100, 100]]", "[[0, 0], [1, 1]]"), r"zones.0.polygon_px: expected"),
        (("[[rules]]", "[[rule]]"), r"rule"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    """A rule that nobody checked is a rule that never fires."""
    with pytest.raises(ConfigError, match=words):
        load_rules(write(tmp_path, WRITTEN.replace(*change)))


def test_rules_in_millimeters_need_a_scale() -> None:
    """A length in mm of a camera that knows none would never be over anything."""
    with pytest.raises(ValueError, match="rule 'one long' is in millimeters"):
        Measure(None, Rules(RuleFile(1, (Rule("one long", length_over_mm=1.0),))))


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(WRITTEN)), cut=st.integers(0, 12), put=st.text(max_size=6))
def test_a_damaged_file_is_refused_or_read_but_never_a_crash(at: int, cut: int, put: str) -> None:
    """Any slip of the hand in the file ends in rules, or in a message that names it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rules.toml"
        path.write_bytes((WRITTEN[:at] + put + WRITTEN[at + cut :]).encode("utf-8", "surrogatepass"))
        try:
            load_rules(path)
        except ConfigError as refused:
            assert str(path) in str(refused)


# --- against brute force ----------------------------------------------------------------------------------------------

COORDINATES = st.integers(0, 12)
POINTS = st.lists(st.tuples(COORDINATES, COORDINATES), min_size=0, max_size=9)


def most_in_a_circle(points: np.ndarray, diameter: float) -> int:
    """By trying every circle that could matter: around each point, and through each pair of them."""
    radius = diameter / 2
    centers = list(points)
    for one, other in itertools.combinations(points, 2):
        half = (other - one) / 2
        apart = float(np.hypot(*half))
        if 0 < apart <= radius:
            lift = math.sqrt(radius**2 - apart**2) / apart
            centers += [one + half + lift * np.array((-half[1], half[0])) * sign for sign in (1, -1)]
    return max((int((np.hypot(*(points - center).T) <= radius + 1e-7).sum()) for center in centers), default=0)


@settings(max_examples=300, deadline=None)
@given(points=POINTS, at_least=st.integers(1, 6), diameter=st.sampled_from([1.0, 2.5, 4.0, 5.0, 7.3, 20.0]))
def test_a_cluster_is_found_exactly_where_a_circle_holds_it(
    points: list[tuple[int, int]], at_least: int, diameter: float
) -> None:
    """Whole coordinates, so that many points lie exactly on the rim; the rim counts."""
    given_points = np.array(points, np.float64).reshape(-1, 2)

    found = cluster(given_points, at_least, diameter)

    assert bool(found) == (most_in_a_circle(given_points, diameter) >= at_least)
    if found:
        assert len(set(found)) >= at_least
        assert most_in_a_circle(given_points[found], diameter) == len(found)


def test_the_brute_force_would_notice_a_cluster_of_pairs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: three points of which each is near the next, but no circle holds all, are no cluster."""
    chain = np.array([(0.0, 0.0), (4.0, 0.0), (8.0, 0.0)])

    def near_the_next(points: np.ndarray, at_least: int, diameter: float) -> list[int]:
        steps = np.hypot(*np.diff(points, axis=0).T)
        return list(range(len(points))) if len(points) >= at_least and (steps <= diameter).all() else []

    monkeypatch.setattr(rules_module, "cluster", near_the_next)

    assert rules_module.cluster(chain, 3, 5.0) and most_in_a_circle(chain, 5.0) < 3
    assert not cluster(chain, 3, 5.0)


@settings(max_examples=200, deadline=None)
@given(
    corners=st.lists(st.tuples(COORDINATES, COORDINATES), min_size=3, max_size=7, unique=True),
    point=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
def test_a_point_is_in_a_polygon_when_its_angles_add_up(corners: list[tuple[int, int]], point: tuple[int, int]) -> None:
    """By the winding number, for simple polygons; the point is moved off every edge and corner."""
    polygon, spot = np.array(corners, np.float64), np.add(point, (0.3717, 0.2113))
    if not is_simple(polygon):
        return
    angles = np.arctan2(*(polygon - spot).T[::-1])
    turns = np.sum(np.remainder(np.roll(angles, -1) - angles + math.pi, 2 * math.pi) - math.pi) / (2 * math.pi)

    assert bool(in_polygon(spot[None], polygon)[0]) == (round(abs(float(turns))) == 1)


@settings(max_examples=150, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39), st.integers(1, 30)), max_size=7),
    longer=st.sampled_from([None, 0.5, 1.0, 2.0]),
    area=st.sampled_from([None, 0.051, 0.21]),
    at_least=st.integers(1, 4),
    within=st.sampled_from([None, 3.0, 10.0]),
    ignore=st.booleans(),
)
def test_a_rule_holds_exactly_when_its_words_do(
    places: list[tuple[int, int, int]],
    longer: float | None,
    area: float | None,
    at_least: int,
    within: float | None,
    ignore: bool,
) -> None:
    """The whole judgment again, read off the words, pixel by pixel."""
    if at_least == 1:
        within = None
    zone = Zone("z", polygon_px=((0.0, 0.0), (200.0, 0.0), (0.0, 200.0)))
    rule = Rule("r", at_least, length_over_mm=longer, area_over_mm2=area, within_mm=within)
    rules = Rules(RuleFile(1, (rule,), (zone,), ("z",) if ignore else ()))
    regions = [measured(8 * x, 8 * y, width) for x, y, width in places]

    meant = []
    for (x, y, width), _ in zip(places, regions, strict=True):
        pixels = [(8 * x + i + 0.5, 8 * y + j + 0.5) for i in range(width) for j in range(2)]
        ignored = ignore and all(px + py < 200 for px, py in pixels)
        long_enough = longer is None or math.hypot(width, 2) * MM > longer
        large_enough = area is None or width * 2 * MM * MM > area
        if not ignored and long_enough and large_enough:
            meant.append(((8 * x + width / 2) * MM, (8 * y + 1) * MM))
    centers = np.array(meant).reshape(-1, 2)
    holds = len(meant) >= at_least and (within is None or most_in_a_circle(centers, within) >= at_least)

    assert rules.judge(regions).reject == holds
