"""Board: what an operator sees, whatever the line sends; nothing in it grows."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from edge.clock import ManualClock
from edge.console.board import MAX_CAMERAS, MAX_REJECTS, RECENT, Board, FeedCounts
from edge.console.shown import MAX_NAME, MAX_REGIONS, Health, Region
from edge.console.trend import BINS, WINDOW_S, Trend
from edge.events import EventRegion
from edge.wire import Head
from sample_events import sample_event

S = 1_000_000_000


class Shop:
    """A board, the clock that it reads, and events that are decided now."""

    def __init__(self) -> None:
        self.clock = ManualClock(1000 * S)
        self.board = Board(self.clock)
        self.count = 0

    def part(self, camera: str = "cam1", decision: str = "accept", *, live: bool = True, **changes: Any) -> str:
        self.count += 1
        changes.setdefault("decided_ns", self.clock.wall_ns())
        event = sample_event(self.count, camera, decision=decision, **changes)
        self.board.take(event, None, live=live)
        return event.id

    def later(self, seconds: float, *, wall_s: float | None = None) -> None:
        self.clock._monotonic_ns += round(seconds * S)
        self.clock._wall_ns += round((seconds if wall_s is None else wall_s) * S)

    def head(self, epoch: int = 5, sequence: int = 1, state: str = "ready", fallback: str = "") -> None:
        self.board.head(Head(1, "line-a", epoch, sequence, state, fallback))

    @property
    def health(self) -> Health:
        found = self.board.delta(-1, -1, health=True).health
        assert found is not None
        return found


@pytest.fixture
def shop() -> Shop:
    return Shop()


def test_a_page_that_comes_is_told_everything_then_only_what_changed(shop: Shop) -> None:
    """The newest of each camera, and every reject."""
    shop.part("cam1")
    rejected = shop.part("cam2", "reject")
    first = shop.board.delta(-1, -1)
    shop.part("cam1", "inconclusive", score=None)

    second = shop.board.delta(first.number, first.ordinal)

    assert first.first and [tile.camera for tile in first.tiles] == ["cam1", "cam2"]
    assert [one.id for one in first.rejects] == [rejected]
    assert [tile.camera for tile in second.tiles] == ["cam1"] and second.rejects == []
    assert second.tiles[0].recent == [(None, "i")]


def test_a_thousand_parts_between_two_looks_are_one_tile_and_every_reject(shop: Shop) -> None:
    """Coalesced: the newest per camera, its last parts, and the rejects."""
    start = shop.board.delta(-1, -1)
    for number in range(1000):
        shop.part("cam1", "reject" if number % 100 == 0 else "accept")

    found = shop.board.delta(start.number, start.ordinal)

    assert len(found.tiles) == 1 and len(found.tiles[0].recent) == RECENT
    assert len(found.rejects) == 10 and found.skipped == 0


def test_a_page_too_slow_for_all_rejects_is_told_how_many_it_missed(shop: Shop) -> None:
    """The board forgets the oldest; nothing grows, and nothing is missed in silence."""
    start = shop.board.delta(-1, -1)
    for _ in range(MAX_REJECTS + 60):
        shop.part(decision="reject")

    found = shop.board.delta(start.number, start.ordinal)

    assert len(found.rejects) == MAX_REJECTS and found.skipped == 60


def test_the_daemons_absence_is_told_with_its_beginning_and_ends_by_itself(shop: Shop) -> None:
    """Since when: by the console's own clock."""
    shop.head()
    shop.later(7)
    away = shop.health
    shop.head()

    assert away.away_s == 7 and away.since_ms == (shop.clock.wall_ns() - 7 * S) // 1_000_000
    assert shop.health.away_s is None


def test_a_daemon_that_was_never_heard_is_away_since_the_start(shop: Shop) -> None:
    """And the page knows that it is not the same."""
    shop.later(5)

    assert shop.health.away_s == 5 and not shop.health.heard


def test_a_step_of_the_wall_clock_moves_no_age(shop: Shop) -> None:
    """Ages are of the monotonic clock: an hour back and a day forward leave them alone."""
    shop.head()
    shop.part()
    for wall_s in (-3600.0, 86_400.0):
        shop.later(1, wall_s=wall_s)

    assert shop.health.cameras[0].age_s == 2 and shop.health.away_s is None


def test_a_line_whose_clock_is_set_back_is_named(shop: Shop) -> None:
    """The console sees decisions that go back in time."""
    shop.part(decided_ns=shop.clock.wall_ns())
    shop.part(decided_ns=shop.clock.wall_ns() - 3600 * S)

    assert shop.health.clock_step_s == -3600 and shop.health.clock_off_s == 3600


def test_events_from_the_past_are_no_clock_that_is_off(shop: Shop) -> None:
    """Control: what the log is asked for is old, and that is right."""
    shop.part(live=False, decided_ns=shop.clock.wall_ns() - 300 * S)

    assert shop.health.clock_off_s is None and shop.health.clock_step_s is None


@pytest.mark.parametrize("decided_s", [-1e9, -1e4, 1e9])
def test_an_impossible_time_lands_inside_the_trend(shop: Shop, decided_s: float) -> None:
    """A log written under another clock does not break the chart."""
    shop.part(live=False, decided_ns=max(0, shop.clock.wall_ns() + round(decided_s * S)))
    shop.part()

    bins = shop.board.delta(-1, -1, trend=True).trend
    assert bins is not None and sum(one.parts for one in bins) in (1, 2)
    assert all(0 <= one.ago < BINS for one in bins)


def test_a_certificate_that_was_borne_and_is_gone_is_void(shop: Shop) -> None:
    """The same model's verdicts lose it; another model begins anew."""
    shop.part(certified=True)
    valid = shop.health.certificate
    shop.part(certified=False)
    shop.later(9)
    void = shop.health
    shop.part(certified=False, model_id="other")

    assert (valid, void.certificate, void.certificate_s) == ("valid", "void", 9)
    assert shop.health.certificate == "none"


def test_a_certificate_rests_while_the_cpu_stands_in_for_the_gpu(shop: Shop) -> None:
    """Verdicts lose it then, but no part has changed: nobody is told to calibrate again."""
    shop.part(certified=True)
    shop.head(fallback="driver")
    shop.part(certified=False)
    resting = shop.health.certificate
    shop.head()
    shop.part(certified=True)

    assert (resting, shop.health.certificate) == ("paused", "valid")


def test_a_camera_that_the_certificate_never_covered_does_not_void_it(shop: Shop) -> None:
    """One of two cameras has another region of interest than was certified; the other one's certificate holds."""
    shop.part("cam1", certified=True)
    shop.part("cam2", certified=False)

    assert shop.health.certificate == "valid"
    shop.part("cam1", certified=False)
    assert shop.health.certificate == "void"


def test_state_and_fallback_come_from_the_head(shop: Shop) -> None:
    """The daemon says itself that the CPU stands in."""
    shop.head(state="degraded", fallback="driver")

    assert (shop.health.state, shop.health.fallback, shop.health.line) == ("degraded", "driver", "line-a")


def test_a_log_of_another_epoch_is_named_for_a_while(shop: Shop) -> None:
    """Wiped or replaced; ten minutes later nobody needs to know."""
    shop.head(epoch=5)
    shop.head(epoch=6)
    shop.later(3)
    told = shop.health.log_replaced_s
    shop.later(700)

    assert told == 3 and shop.health.log_replaced_s is None


def test_what_the_subscriber_counted_is_shown(shop: Shop) -> None:
    """Lag, losses, refusals."""
    shop.board.counts(FeedCounts(lag=12, lost=3, refused=2))

    assert (shop.health.lag, shop.health.lost, shop.health.refused) == (12, 3, 2)


def test_a_camera_that_stops_is_silent_by_its_own_rhythm(shop: Shop) -> None:
    """Ten of its intervals, at least five seconds: a slow camera is not silent between two parts."""
    for _ in range(100):
        shop.part("fast")
        shop.later(0.1)
    for _ in range(100):
        shop.part("slow")
        shop.later(4)
    shop.part("fast")
    shop.later(20)

    assert {one.camera: one.silent for one in shop.health.cameras} == {"fast": False, "slow": False}


def test_a_challenge_is_no_camera_that_falls_silent(shop: Shop) -> None:
    """An event about the line has no tile, no place among the rejects and no count; it is a sign of life."""
    shop.part("cam1")
    shop.part("challenge", kind="challenge", reason="challenge")
    shop.part("challenge", "inconclusive", kind="challenge", reason="challenge")
    shop.later(120)

    assert [camera.camera for camera in shop.health.cameras] == ["cam1"]


def test_a_fast_camera_that_stops_is_silent_soon(shop: Shop) -> None:
    """Control."""
    for _ in range(100):
        shop.part("fast")
        shop.later(0.1)
    shop.later(6)

    assert shop.health.cameras[0].silent


def test_hostile_texts_are_cut_and_cameras_are_bounded(shop: Shop) -> None:
    """Two hundred names of a megabyte: sixty-four tiles of sixty-four characters, the rest counted."""
    for number in range(200):
        shop.part(f"{number:03}" + "x" * 1000, "reject", detail="y" * 10_000, part_id="z" * 10_000)

    found = shop.board.delta(-1, -1, health=True)

    assert len(found.tiles) == MAX_CAMERAS and found.health is not None and found.health.further_cameras == MAX_CAMERAS
    assert max(len(tile.camera) for tile in found.tiles) == MAX_NAME
    assert len(msgspec.json.encode(found)) < 600_000


def test_many_regions_are_told_by_their_number(shop: Shop) -> None:
    """The biggest, and how many more."""
    regions = tuple(EventRegion((0, 0, 1, 1), 1, 1.0) for _ in range(200))
    shop.part(decision="reject", regions=regions)

    shown = shop.board.delta(-1, -1).rejects[0]
    assert len(shown.regions) == MAX_REGIONS and shown.more_regions == 200 - MAX_REGIONS


def test_a_challenge_is_about_the_line_and_counts_as_no_part(shop: Shop) -> None:
    """It has no tile, is no reject, and the page says how it went; a kind that nobody knows yet is skipped."""
    shop.part("challenge", "inconclusive", kind="challenge", reason="challenge", detail="bad-3.png was accepted")
    shop.part("cam9", "reject", kind="of tomorrow")
    shop.later(4)
    failed = shop.board.delta(-1, -1, health=True, trend=True)
    shop.part("challenge", kind="challenge")

    assert failed.tiles == [] and failed.rejects == [] and failed.trend == []
    assert failed.health is not None
    assert (failed.health.challenge, failed.health.challenge_s) == ("failed", 4)
    assert failed.health.challenge_detail == "bad-3.png was accepted" and shop.health.challenge == "passed"


def test_sizes_in_millimeters_and_ignored_zones_come_along(shop: Shop) -> None:
    """Where the camera's scale is known, and where rules pass over a region."""
    region = EventRegion((0, 0, 4, 2), 8, 1.5, area_mm2=0.5, length_mm=1.2, ignored_by="logo")
    shop.part(decision="accept", reason="rule", detail="0 regions count", regions=(region,))

    found = shop.board.delta(-1, -1).tiles[0].shown
    assert found.regions[0] == Region((0, 0, 4, 2), 8, 1.5, 0.5, 1.2, "logo") and found.detail == "0 regions count"


def test_a_label_travels_with_its_event(shop: Shop) -> None:
    """And is gone when it is taken back."""
    rejected = shop.part(decision="reject")
    shop.board.label(rejected, "false_reject")
    labeled = shop.board.find(rejected)
    shop.board.label(rejected, None)
    bare = shop.board.find(rejected)

    assert labeled is not None and labeled.label == "false_reject"
    assert bare is not None and bare.label is None


def test_events_far_in_the_past_are_not_on_the_board(shop: Shop) -> None:
    """Only the last rejects and the newest of each camera can be asked for."""
    first = shop.part()
    shop.part()

    assert shop.board.find(first) is None


def test_the_trend_keeps_its_number_of_bins() -> None:
    """A day of parts: a quarter of an hour remains."""
    trend = Trend()
    for second in range(0, 86_400, 7):
        trend.add(float(second), "reject" if second % 2 else "accept", 0.5)

    bins = trend.bins(86_400.0)

    assert len(bins) <= BINS and len(trend._bins) <= BINS
    assert 0.4 < sum(one.rejected for one in bins) / sum(one.parts for one in bins) < 0.6


def test_quartiles_are_those_of_the_bin() -> None:
    """Uniform p-values have their quartiles at a quarter and three quarters."""
    trend = Trend()
    for p in np.linspace(0, 1, 101):
        trend.add(5.0, "accept", float(p))

    one = trend.bins(5.0)[0]
    assert (one.low, one.median, one.high) == (0.25, 0.5, 0.75) and one.ago == 0
    assert WINDOW_S == 900
