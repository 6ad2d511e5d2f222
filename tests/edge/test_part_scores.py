"""A certificate counts parts, and so does the watch: frames become parts as they did in the sample."""

from __future__ import annotations

import numpy as np
import pytest

from edge.bundle import ScoreCalibration
from edge.part_scores import OPEN_PARTS, Blocks, Frames, NamedParts, PartScores, part_scores
from edge.types import Decision, FrameId, Reason, Verdict

CALIBRATION = ScoreCalibration("order-statistic", True, 6.0, 6.0, 1, (1.0,), "fake", "0" * 64)


def verdict(score: float | None, part: str | None = None) -> Verdict:
    reason, decision = (Reason.LATE, Decision.INCONCLUSIVE) if score is None else (Reason.SCORE, Decision.ACCEPT)
    return Verdict(FrameId("cam", 1, 0, 0), decision, reason, "", score, 6.0, 0.5, True, (), (2, 2), "m", part_id=part)


def fed(parts: PartScores, *frames: Verdict) -> list[float]:
    return [score for frame in frames for score in parts.add(frame)]


def test_the_unit_of_the_certificate_says_what_a_part_is() -> None:
    """An image, a part_id, a block."""
    units = [("image", None, Frames), ("part", None, NamedParts), ("block", (3, 1), Blocks)]

    for unit, block, kind in units:
        calibration = ScoreCalibration(
            **{name: getattr(CALIBRATION, name) for name in CALIBRATION.__struct_fields__}
            | {"unit": unit, "block": block}
        )
        assert isinstance(part_scores(calibration), kind)


def test_a_parts_score_is_its_highest_frames() -> None:
    """Also when frames of the next part come between; it is complete when enough others have begun."""
    frames = [verdict(1.0, "a"), verdict(9.0, "b"), verdict(3.0, "a")]
    others = [verdict(0.0, f"later {place}") for place in range(OPEN_PARTS - 1)]

    assert fed(NamedParts(), *frames, *others) == [3.0]


def test_a_part_with_a_frame_that_has_no_score_has_none() -> None:
    """The highest of the others is lower than that of a whole part."""
    frames = [verdict(1.0, "a"), verdict(None, "a"), verdict(3.0, "a")]

    assert fed(NamedParts(), *frames, *(verdict(0.0, str(place)) for place in range(OPEN_PARTS))) == []


def test_frames_without_a_part_id_are_counted_and_no_part() -> None:
    """Nobody knows whose they are."""
    parts = NamedParts()

    assert fed(parts, *(verdict(1.0) for _ in range(10))) == [] and parts.unnamed == 10


def test_a_block_is_so_many_frames_and_then_a_gap() -> None:
    """Two count, three do not."""
    assert fed(Blocks(2, 3), *(verdict(float(score)) for score in range(10))) == [1.0, 6.0]


def test_a_block_that_lacks_a_frame_begins_anew() -> None:
    """Only whole blocks are compared with whole blocks."""
    assert fed(Blocks(2, 0), verdict(5.0), verdict(None), verdict(1.0), verdict(2.0)) == [2.0]


@pytest.mark.parametrize(("block", "gap"), [(1, 0), (3, 0), (5, 5)])
def test_blocks_are_cut_as_the_sample_was(block: int, gap: int) -> None:
    """The same frames give the same parts in the folder and on the line."""
    scores = np.random.default_rng(0).random(40)
    period = block + gap
    expected = [scores[at : at + block].max() for at in range(0, 40, period) if at + block <= 40]

    assert fed(Blocks(block, gap), *(verdict(float(score)) for score in scores)) == expected
