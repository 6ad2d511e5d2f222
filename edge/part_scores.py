"""Scores of frames -> scores of parts, as a certificate counts them.

Owns when a part is complete. A part's score is the highest of its frames; one with a frame that has no score has none,
for the highest of fewer frames is lower than those that the sample holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final, Protocol

from edge.bundle import ScoreCalibration
from edge.types import Verdict

OPEN_PARTS: Final = 4
"""Parts whose frames may come between each other's; the oldest is complete when another begins."""


class PartScores(Protocol):
    """Takes one camera's verdicts in order and gives the scores of the parts that are complete by then."""

    def add(self, verdict: Verdict) -> Iterator[float]: ...


def part_scores(calibration: ScoreCalibration) -> PartScores:
    """What the calibration's unit asks for."""
    if calibration.unit == "part":
        return NamedParts()
    return Frames() if calibration.block is None else Blocks(*calibration.block)


class Frames:
    """Every frame is a part."""

    def add(self, verdict: Verdict) -> Iterator[float]:
        """Its score, if it has one."""
        if (score := _score(verdict)) is not None:
            yield score


class NamedParts:
    """Frames with one `part_id` are one part; a frame without is none, and counted in `unnamed`."""

    def __init__(self) -> None:
        self.unnamed = 0
        self._open: OrderedDict[str, float | None] = OrderedDict()

    def add(self, verdict: Verdict) -> Iterator[float]:
        """The score of the part that is complete because this frame's is one too many."""
        if verdict.part_id is None:
            self.unnamed += 1
            return
        score, before = _score(verdict), self._open.get(verdict.part_id, float("-inf"))
        self._open[verdict.part_id] = None if score is None or before is None else max(score, before)
        if len(self._open) > OPEN_PARTS:
            _, complete = self._open.popitem(last=False)
            if complete is not None:
                yield complete


class Blocks:
    """`frames` in a row are one part, `gap` more are left out; after a frame without a score a new block begins."""

    def __init__(self, frames: int, gap: int) -> None:
        self._frames, self._gap = frames, gap
        self._seen = 0
        self._highest = float("-inf")

    def add(self, verdict: Verdict) -> Iterator[float]:
        """The block's score, with its last frame."""
        score = _score(verdict)
        if self._seen < self._frames and score is None:
            self._begin()
            return
        self._seen += 1
        if self._seen <= self._frames and score is not None:
            self._highest = max(self._highest, score)
        complete, highest = self._seen == self._frames, self._highest
        if self._seen >= self._frames + self._gap:
            self._begin()
        if complete:
            yield highest

    def _begin(self) -> None:
        self._seen, self._highest = 0, float("-inf")


def _score(verdict: Verdict) -> float | None:
    return verdict.score if verdict.reason.is_judged else None
