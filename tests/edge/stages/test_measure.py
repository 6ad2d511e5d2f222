"""Measuring regions, and what rules make of a verdict: they let parts pass, and never reject what the score accepts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.camera import CameraCalibration, Plane
from edge.masks import RunLength
from edge.rule_file import Rule, RuleFile
from edge.rules import Rules
from edge.stages import measure as stage
from edge.stages.measure import Measure
from edge.stages.segment import MAX_REGIONS, Segment
from edge.types import Decision, DefectRegion, FrameId, Reason, Verdict

SIZE = (60, 80)
CAMERA = CameraCalibration("camera-id", SIZE, plane=Plane((0.5, 0, 0, 0, 0.25, 0, 0, 0, 1)))
"""Half a millimeter across, a quarter down."""
LONG = Rules(RuleFile(1, (Rule("long", length_over_px=10.0),)), "rules-id")


def region(x: int, y: int, width: int, height: int) -> DefectRegion:
    mask = np.zeros(SIZE, bool)
    mask[y : y + height, x : x + width] = True
    runs = RunLength.from_mask(mask)
    return DefectRegion(runs.box_xyxy, runs.area_px, 2.0, runs)


def verdict(decision: Decision, *regions: DefectRegion) -> Verdict:
    return Verdict(FrameId("cam", 1, 0, 0), decision, Reason.SCORE, "", 2.0, 1.0, 0.1, True, regions, SIZE, "model")


def test_a_region_is_as_long_and_as_large_as_its_pixels() -> None:
    """8 x 12 pixels are 4 x 3 mm here: longest distance 5 mm, area 12 mm2, center in the middle."""
    found = Measure(CAMERA)(verdict(Decision.REJECT, region(10, 20, 8, 12)), 1)

    one = found.regions[0]
    assert (one.length_mm, one.area_mm2) == (pytest.approx(5.0), pytest.approx(12.0))
    assert one.center_mm_xy == (pytest.approx(7.0), pytest.approx(6.5))
    assert (found.decision, found.reason, found.calibration_id) == (Decision.REJECT, Reason.SCORE, "camera-id")


def test_a_ragged_region_is_measured_like_its_mask() -> None:
    """Length by trying all pairs of pixel corners, area by counting pixels."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = np.zeros(SIZE, bool)
        y, x = rng.integers(0, 40, 2)
        mask[y : y + 15, x : x + 15] = rng.random((15, 15)) < 0.3
        mask[y, x] = True
        runs = RunLength.from_mask(mask)
        rows, columns = np.nonzero(mask)
        corners = np.array([(c + i, r + j) for r, c in zip(rows, columns, strict=True) for i in (0, 1) for j in (0, 1)])
        apart = (corners[:, None] - corners[None]) * (0.5, 0.25)

        one = Measure(CAMERA).measured(DefectRegion(runs.box_xyxy, runs.area_px, 1.0, runs), with_pixels=True)

        assert one.region.length_mm == pytest.approx(np.hypot(apart[:, :, 0], apart[:, :, 1]).max())
        assert one.region.area_mm2 == pytest.approx(mask.sum() * 0.125)
        assert {tuple(p) for p in one.pixels.tolist()} == {
            (c + 0.5, r + 0.5) for r, c in zip(rows, columns, strict=True)
        }


def test_without_calibration_and_rules_nothing_changes() -> None:
    """The verdict is the same object: a line that measures nothing pays nothing."""
    given_verdict = verdict(Decision.REJECT, region(0, 0, 2, 2))

    assert Measure()(given_verdict, 100) is given_verdict


def test_rules_let_pass_what_none_of_them_forbids() -> None:
    """Short regions only: accepted by rule, and the event says so; score and threshold stay what they are."""
    found = Measure(None, LONG)(verdict(Decision.REJECT, region(0, 0, 4, 4)), 1)

    assert (found.decision, found.reason, found.rules_id) == (Decision.ACCEPT, Reason.RULE, "rules-id")
    assert found.detail.startswith("no rule holds: 1 region, longest 5.7 px") and (found.score, found.threshold) == (
        2,
        1,
    )


def test_what_is_too_small_to_report_is_seen_by_the_rules() -> None:
    """min_area_px is about what is shown; two of three regions are below it, and the rule needs all three."""
    three = Rules(RuleFile(1, (Rule("three", at_least=3),)))
    given_verdict = verdict(Decision.REJECT, region(0, 0, 5, 5), region(20, 0, 1, 1), region(40, 0, 1, 1))

    found = Measure(None, three)(given_verdict, 16)

    assert Measure(None, three).segment(Segment(1.0, 16)).min_area_px == 1
    assert found.decision is Decision.REJECT and len(found.regions) == 1


def test_a_rejected_part_without_regions_stays_rejected() -> None:
    """Its score is above the threshold, and the rules have nothing to say about why."""
    found = Measure(None, LONG)(verdict(Decision.REJECT), 1)

    assert (found.decision, found.reason) == (Decision.REJECT, Reason.SCORE) and "nothing to go by" in found.detail


def test_a_picture_full_of_regions_is_never_let_pass() -> None:
    """Beyond the largest MAX_REGIONS nothing was looked at, so no rule can vouch for them."""
    many = [region(index % 80, index // 80, 1, 1) for index in range(MAX_REGIONS)]

    assert Measure(None, LONG)(verdict(Decision.REJECT, *many), 1).decision is Decision.REJECT
    assert Measure(None, LONG)(verdict(Decision.REJECT, *many[1:]), 1).decision is Decision.ACCEPT


RULES = st.builds(
    lambda at_least, length, area: Rules(RuleFile(1, (Rule("r", at_least, length_over_px=length, area_over_px=area),))),
    st.integers(1, 3),
    st.sampled_from([None, 1.0, 5.0, 50.0]),
    st.sampled_from([None, 1.0, 30.0]),
)
REGIONS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 40), st.integers(1, 20), st.integers(1, 20)), max_size=4
)


@settings(max_examples=150, deadline=None)
@given(rules=RULES, boxes=REGIONS, decision=st.sampled_from([Decision.ACCEPT, Decision.INCONCLUSIVE]))
def test_no_rule_ever_rejects_what_the_threshold_accepts(
    rules: Rules, boxes: list[tuple[int, int, int, int]], decision: Decision
) -> None:
    """This is why a certificate about good parts holds with any rule file: rejected parts only become fewer."""
    given_verdict = verdict(decision, *(region(*box) for box in boxes))

    assert Measure(None, rules)(given_verdict, 1).decision is decision


def test_a_ruling_on_accepted_parts_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: rules that are asked about every part do reject an accepted one."""
    accepted = verdict(Decision.ACCEPT, region(0, 0, 20, 2))
    asked = stage._ruled(accepted, LONG, [Measure().measured(one) for one in accepted.regions], 1)

    assert asked.decision is Decision.REJECT
    assert Measure(None, LONG)(accepted, 1).decision is Decision.ACCEPT
