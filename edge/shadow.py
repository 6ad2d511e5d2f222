"""Shadow: another model looks at the line's own frames, and what it would have said is compared with what was said.

Owns the comparison and the candidate's thread; its verdicts are never logged, published or counted. Frames that come
faster than the candidate can look are passed over, and how many is said.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import replace
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry

from edge.docket import Docket
from edge.inference import EngineRunner, Scored, Stages, Unjudged, judged
from edge.metrics import Metrics
from edge.protocols import Clock, Engine
from edge.types import Decision, Frame, Verdict

MAX_WAITING: Final = 16
"""Frames that may wait for the candidate: each is held in memory beside the line's own."""

FrameKey = tuple[str, int, int]


class Agreement(msgspec.Struct, frozen=True):
    """What came of `compared` frames: the same answer `same` times; `newly_rejected` only the candidate rejected,
    `newly_accepted` only the running model did, `unsure` the candidate could not judge. `passed_over` were not looked
    at for want of time.
    """

    compared: int = 0
    same: int = 0
    newly_rejected: int = 0
    newly_accepted: int = 0
    unsure: int = 0
    passed_over: int = 0

    @property
    def share(self) -> float:
        """Of the frames compared, those with the same answer; 1 before the first."""
        return self.same / self.compared if self.compared else 1.0


class Shadow:
    """Compares `wanted` frames; `offer` them from the verdict thread, `wait` elsewhere, `close` in the end.

    The engine is the shadow's to close.
    """

    def __init__(
        self, engine: Engine, stages: Stages, cameras: Collection[str], clock: Clock, max_batch: int, wanted: int
    ) -> None:
        self._stages, self._wanted = stages, wanted
        self._frames = Docket({}, clock)
        self._said: dict[FrameKey, Verdict] = {}
        self._changed = threading.Condition()
        self._agreement = Agreement()
        # Series of its own: the line's count what the line did.
        aside = Metrics(CollectorRegistry(), cameras, clock)
        self._runner = EngineRunner(
            engine, lambda: engine, stages, aside, clock, max_batch, 0, self._compare, lambda text, fields: None
        )
        self._thread = threading.Thread(target=self._runner.run, args=(self._frames,), name="shadow", daemon=True)
        self._thread.start()

    def offer(self, frame: Frame, verdict: Verdict) -> None:
        """Let the candidate look at a frame of which the running model said `verdict`; returns at once."""
        with self._changed:
            if self._agreement.compared + len(self._said) >= self._wanted:
                return
            if len(self._said) >= MAX_WAITING:
                self._count(passed_over=1)
                return
            self._said[frame.id.key] = verdict
        # A copy: pixels in a camera's ring change once the frame is acknowledged.
        self._frames.enter(replace(frame, image=frame.image.copy()))

    def wait(self, timeout_s: float) -> Agreement:
        """Wait until enough was compared, at most `timeout_s`; return what was found by then."""
        with self._changed:
            self._changed.wait_for(lambda: self._agreement.compared >= self._wanted, timeout_s)
        return self._agreement

    def close(self) -> None:
        """Finish what was begun and close the engine."""
        self._frames.close()
        self._thread.join()

    def _compare(self, item: Scored | Unjudged) -> None:
        """In the candidate's thread."""
        if isinstance(item, Unjudged):
            self._note(item.frame.id.key, Decision.INCONCLUSIVE)
            return
        for frame, model_input, scores, score in zip(item.frames, item.inputs, item.maps, item.scores, strict=True):
            verdict = judged(self._stages, frame, model_input, scores, float(score), item.geometry)
            self._note(frame.id.key, verdict.decision)

    def _note(self, key: FrameKey, candidate: Decision) -> None:
        with self._changed:
            running = self._said.pop(key).decision
            self._count(
                compared=1,
                same=candidate == running,
                unsure=candidate is Decision.INCONCLUSIVE and candidate != running,
                newly_rejected=candidate is Decision.REJECT and candidate != running,
                newly_accepted=candidate is Decision.ACCEPT and candidate != running,
            )
            self._changed.notify_all()

    def _count(self, **more: int) -> None:
        counts = msgspec.structs.asdict(self._agreement)
        self._agreement = Agreement(**{name: counts[name] + int(more.get(name, 0)) for name in counts})
