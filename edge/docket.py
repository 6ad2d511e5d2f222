"""Docket: which frames still need a verdict, in what order they are taken up, and until when each must have it.

Owns the waiting line between reception and inference, each camera's policy and deadline, and the rule that a frame is
settled once: by its result, by its deadline or by a newer frame, whichever comes first. Leaves giving the verdict, and
counting, to the pipeline. Nothing here starts a thread; what waits is bounded by the pipeline's admission.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from queue import Empty

from edge.config import CameraConfig
from edge.protocols import Clock
from edge.types import Frame

FrameKey = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Terms:
    """How a camera's frames are treated.

    With `latest` a frame that waits is given up for a newer one of its camera; otherwise every frame is looked at and
    the camera waits for its credits. A verdict is due `deadline_ns` after reception (None: whenever it comes), or with
    `synchronized` after exposure: then the camera's wall clock is believed, as far as it does not run ahead of ours.
    From `frozen_after` equal pictures in a row on, the camera is taken to be frozen (None: never).
    """

    latest: bool = False
    deadline_ns: int | None = None
    synchronized: bool = False
    frozen_after: int | None = None


def terms_of(camera: CameraConfig) -> Terms:
    """The configured camera's terms."""
    deadline_ns = None if camera.deadline_ms is None else round(camera.deadline_ms * 1e6)
    return Terms(camera.policy == "latest", deadline_ns, camera.clock == "synchronized", camera.frozen_after)


class Docket:
    """The open frames of a line; every method may be called from any thread.

    `terms` by camera; a camera that is not listed has none of its own.
    """

    def __init__(self, terms: Mapping[str, Terms], clock: Clock) -> None:
        self._terms = dict(terms)
        self._clock = clock
        self._changed = threading.Condition()
        self._open: dict[FrameKey, Frame] = {}
        self._waiting: dict[FrameKey, Frame] = {}
        self._due: list[tuple[int, FrameKey]] = []
        self._closed = False

    @property
    def has_deadlines(self) -> bool:
        """Whether any camera has one."""
        return any(terms.deadline_ns is not None for terms in self._terms.values())

    def qsize(self) -> int:
        """Frames that wait to be taken."""
        return len(self._waiting)

    def enter(self, frame: Frame) -> Frame | None:
        """Put `frame` at the end of the line; return the one that it displaced, which is settled by that."""
        terms = self._terms.get(frame.id.camera, Terms())
        due_ns = self._due_ns(frame, terms)
        with self._changed:
            displaced = self._displaced(frame) if terms.latest else None
            self._open[frame.id.key] = self._waiting[frame.id.key] = frame
            if due_ns is not None:
                heapq.heappush(self._due, (due_ns, frame.id.key))
            self._changed.notify_all()
        return displaced

    def get(self, timeout: float) -> Frame | None:
        """Take the frame that waited longest, waiting at most `timeout` seconds; None once closed and empty.

        Raises:
            Empty: none came.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, timeout)
            if self._waiting:
                return self._waiting.pop(next(iter(self._waiting)))
            if self._closed:
                return None
        raise Empty

    def get_nowait(self) -> Frame | None:
        """`get` without waiting.

        Raises:
            Empty: none is there.
        """
        return self.get(0.0)

    def is_open(self, key: FrameKey) -> bool:
        """Whether the frame still needs a verdict."""
        return key in self._open

    def settle(self, key: FrameKey) -> bool:
        """Take the right to give the frame's verdict; False if it was settled before: there is none to give then."""
        with self._changed:
            self._waiting.pop(key, None)
            return self._open.pop(key, None) is not None

    def overdue(self) -> list[Frame]:
        """Settle and return the frames whose deadline has come."""
        found = []
        with self._changed:
            now_ns = self._clock.monotonic_ns()
            while self._due and self._due[0][0] <= now_ns:
                key = heapq.heappop(self._due)[1]
                self._waiting.pop(key, None)
                frame = self._open.pop(key, None)
                if frame is not None:
                    found.append(frame)
        return found

    def wait_for_due(self, timeout_s: float) -> None:
        """Sleep until a deadline comes, at most `timeout_s`; earlier when a frame with one came in."""
        with self._changed:
            first_ns = self._next_due_ns()
            if first_ns is not None:
                timeout_s = min(timeout_s, (first_ns - self._clock.monotonic_ns()) / 1e9)
            if timeout_s > 0:
                self._changed.wait_for(lambda: self._next_due_ns() != first_ns, timeout_s)

    def close(self) -> None:
        """No more frames come; `get` returns None once the line is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _due_ns(self, frame: Frame, terms: Terms) -> int | None:
        if terms.deadline_ns is None:
            return None
        # A clock that runs ahead must not buy time, so an exposure in the future counts as now.
        age_ns = max(0, self._clock.wall_ns() - frame.id.captured_ns) if terms.synchronized else 0
        return frame.received_ns + terms.deadline_ns - age_ns

    def _displaced(self, newer: Frame) -> Frame | None:
        """The waiting frame of the same camera, taken off; there is one at most, each having displaced the last."""
        for key in self._waiting:
            if key[0] == newer.id.camera:
                del self._open[key]
                return self._waiting.pop(key)
        return None

    def _next_due_ns(self) -> int | None:
        while self._due and self._due[0][1] not in self._open:  # settled meanwhile
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None
