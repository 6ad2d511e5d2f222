"""Map and regions -> Verdict: one answer for every frame, and REJECT only for a score above the threshold."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.bundle import ScoreCalibration
from edge.stages import decide
from edge.stages.decide import Decide, p_value
from edge.types import AnomalyMap, Decision, DefectRegion, Frame, FrameId, Reason, Roi, Unreadable, Verdict

ID = FrameId("cam-1", 7, 42, 1_700_000_000_000_000_000)
FRAME = Frame(ID, np.zeros((48, 64, 1), np.uint8), received_ns=5, part_id="part-9")
GOOD = (0.1, 0.2, 0.2, 0.4)


def calibration(**changes: Any) -> ScoreCalibration:
    values: dict[str, Any] = {
        "kind": "order-statistic", "certified": True, "threshold": 0.5, "pixel_threshold": 0.4, "min_area_px": 4,
        "scores": GOOD, "engine": "fake", "data_sha256": "0" * 64,
    }  # fmt: skip
    return ScoreCalibration(**values | changes)


def judged(score: float, frame_id: FrameId = ID, regions: tuple[DefectRegion, ...] = (), **changes: Any) -> Verdict:
    roi = Roi(0, 0, 64, 48)
    scored = AnomalyMap(frame_id, np.zeros((3, 4), np.float32), score, roi, roi)
    return Decide(calibration(**changes), "model-1").verdict(FRAME, scored, regions)


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(allow_nan=False, allow_infinity=False))
def test_reject_if_and_only_if_the_score_is_above_the_threshold(score: float, threshold: float) -> None:
    """For every pair of numbers; what is no finite score is no answer at all."""
    verdict = judged(score, threshold=threshold)

    if not math.isfinite(score):
        assert (verdict.decision, verdict.reason, verdict.score) == (Decision.INCONCLUSIVE, Reason.ENGINE, None)
    else:
        assert verdict.decision is (Decision.REJECT if score > threshold else Decision.ACCEPT)
        assert (verdict.reason, verdict.score, verdict.threshold) == (Reason.SCORE, score, threshold)


def test_a_score_at_the_threshold_is_accepted_and_the_next_one_is_not() -> None:
    """The threshold is a good part's score; calibration promises that good parts up to it pass."""
    assert judged(0.5).decision is Decision.ACCEPT
    assert judged(math.nextafter(0.5, 1)).decision is Decision.REJECT


def test_a_verdict_leads_back_to_its_frame_and_model() -> None:
    """Whatever is asked later can be answered from the verdict."""
    verdict = judged(0.9, certified=False)

    assert (verdict.frame_id, verdict.model_id, verdict.frame_size) == (ID, "model-1", (48, 64))
    assert (verdict.received_ns, verdict.part_id, verdict.certified) == (5, "part-9", False)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(-6, 6))
def test_the_p_value_is_the_share_of_good_parts_as_bad_as_this_one(good: list[float], score: float) -> None:
    """(1 + #{good >= score}) / (n + 1), in (0, 1]."""
    p = p_value(score, sorted(good))

    assert p == (1 + sum(value >= score for value in good)) / (len(good) + 1)
    assert 0 < p <= 1


def test_a_p_value_that_leaves_out_ties_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: `>` for `>=` makes p too small for a score that a good part had."""
    assert judged(0.2).p_value == 4 / 5
    monkeypatch.setattr(decide, "bisect_left", bisect_right)
    assert judged(0.2).p_value != 4 / 5


def test_without_good_scores_there_is_no_p_value() -> None:
    """1.0 would claim that a good part looks like this."""
    assert judged(0.2, scores=()).p_value is None


@pytest.mark.parametrize("reason", [reason for reason in Reason if not reason.is_judged])
def test_every_reason_not_to_judge_holds_the_part(reason: Reason) -> None:
    """No score, no regions, and the reason with its detail; of an unreadable frame not even the size is known."""
    decider = Decide(calibration(), "model-1")
    seen = decider.inconclusive(FRAME, reason, "because")
    unseen = decider.inconclusive(Unreadable(ID, "truncated", "cut", 6, "part-9"), reason, "because")

    for verdict in (seen, unseen):
        assert (verdict.decision, verdict.reason, verdict.detail) == (Decision.INCONCLUSIVE, reason, "because")
        assert (verdict.score, verdict.threshold, verdict.p_value, verdict.regions) == (None, None, None, ())
    assert (seen.frame_size, unseen.frame_size) == ((48, 64), (0, 0))
    assert (seen.received_ns, unseen.received_ns, unseen.part_id) == (5, 6, "part-9")


def test_inconclusive_because_of_the_score_is_no_answer() -> None:
    """SCORE belongs to judged frames."""
    with pytest.raises(ValueError, match="reason other than"):
        Decide(calibration(), "m").inconclusive(FRAME, Reason.SCORE, "")


def test_a_map_of_another_frame_never_judges_this_one() -> None:
    """A mix-up in the pipeline must hold the part, not pass it on a stranger's score."""
    verdict = judged(0.0, frame_id=FrameId("cam-1", 7, 41, 0))

    assert (verdict.decision, verdict.reason) == (Decision.INCONCLUSIVE, Reason.ENGINE)
    assert "41" in verdict.detail


@pytest.mark.parametrize("changes", [{"threshold": math.nan}, {"threshold": math.inf}, {"scores": (0.2, 0.1)},
                                     {"scores": (0.1, math.nan)}])  # fmt: skip
def test_a_calibration_that_cannot_decide_is_refused(changes: dict[str, Any]) -> None:
    """Nothing is greater than NaN or infinity: every part would pass."""
    with pytest.raises(ValueError, match="finite"):
        Decide(calibration(**changes), "m")
