"""Map and regions -> Verdict.

Owns the decision and its p-value; thresholds come from the bundle, lateness and drops from the pipeline.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from edge.bundle import ScoreCalibration
from edge.types import AnomalyMap, Decision, DefectRegion, Frame, Reason, Unreadable, Verdict


@dataclass(frozen=True, slots=True)
class Decide:
    """Judges frames of one model: REJECT if and only if the image score is greater than the threshold.

    Raises:
        ValueError: the threshold is not finite, or the good scores are not finite and ascending.
    """

    calibration: ScoreCalibration
    model_id: str
    _table: dict[str, ScoreCalibration] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        table = {camera: self.calibration.of(camera) for camera in self.calibration.cameras}
        object.__setattr__(self, "_table", table)
        for calibration in (self.calibration, *table.values()):
            if not math.isfinite(calibration.threshold):
                raise ValueError(f"the threshold must be finite, not {calibration.threshold}")
            scores = calibration.scores
            if not all(map(math.isfinite, scores)) or any(a > b for a, b in pairwise(scores)):
                raise ValueError("the calibration's good scores must be finite and ascending")

    def of(self, camera: str) -> ScoreCalibration:
        """What holds for one camera."""
        return self._table.get(camera) or self.calibration.of(camera)

    def verdict(self, frame: Frame, anomaly_map: AnomalyMap, regions: tuple[DefectRegion, ...]) -> Verdict:
        """ACCEPT or REJECT by score; INCONCLUSIVE(engine) when the score is no number or the map is another frame's."""
        if anomaly_map.frame_id != frame.id:
            return self.inconclusive(frame, Reason.ENGINE, f"the map belongs to frame {anomaly_map.frame_id.key}")
        score = anomaly_map.score
        if not math.isfinite(score):
            return self.inconclusive(frame, Reason.ENGINE, f"the image score is {score}")
        calibration = self.of(frame.id.camera)
        threshold, good = calibration.threshold, calibration.scores
        return Verdict(
            frame_id=frame.id,
            decision=Decision.REJECT if score > threshold else Decision.ACCEPT,
            reason=Reason.SCORE,
            detail="",
            score=score,
            threshold=threshold,
            p_value=p_value(score, good) if good else None,
            certified=calibration.certified,
            regions=regions,
            frame_size=(frame.image.shape[0], frame.image.shape[1]),
            model_id=self.model_id,
            received_ns=frame.received_ns,
            part_id=frame.part_id,
        )

    def inconclusive(self, frame: Frame | Unreadable, reason: Reason, detail: str) -> Verdict:
        """The answer for a frame that could not be judged: no score, no regions, and the part is held.

        Raises:
            ValueError: `reason` is SCORE or RULE, which belong to judged frames.
        """
        if reason.is_judged:
            raise ValueError(f"an inconclusive verdict needs a reason other than {reason.value!r}")
        size = (frame.image.shape[0], frame.image.shape[1]) if isinstance(frame, Frame) else (0, 0)
        return Verdict(
            frame_id=frame.id,
            decision=Decision.INCONCLUSIVE,
            reason=reason,
            detail=detail,
            score=None,
            threshold=None,
            p_value=None,
            certified=self.of(frame.id.camera).certified,
            regions=(),
            frame_size=size,
            model_id=self.model_id,
            received_ns=frame.received_ns,
            part_id=frame.part_id,
        )


def p_value(score: float, sorted_scores: Sequence[float]) -> float:
    """(1 + #{good >= score}) / (n + 1), in (0, 1], for good scores in ascending order.

    The conformal p-value: for a good part exchangeable with the sample, P(p <= a) <= a (Vovk et al. 2005, ch. 2).
    """
    n = len(sorted_scores)
    return (1 + n - bisect_left(sorted_scores, score)) / (n + 1)
