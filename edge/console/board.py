"""Board: everything the operator's page shows, and what of it changed since a page last heard.

Owns the counts, each camera's newest event, the last rejects, health. Nothing grows: cameras, rejects and bins are
bounded, and a page that is slow finds the newest of each camera when it comes back, not a queue. Written by the feed's
thread, read by the server's; reads no socket and no wall clock of its own but the one it is given.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.console.shown import MAX_NAME, MAX_TEXT, CameraHealth, Delta, Health, Shown, Tile, shown
from edge.console.trend import BIN_S, WINDOW_S, Trend
from edge.events import DefectEvent
from edge.protocols import Clock
from edge.wire import Head

MAX_CAMERAS: Final = 64
MAX_REJECTS: Final = 240
RECENT: Final = 60
AWAY_AFTER_S: Final = 3.0
"""Three heads missed."""
_SILENT_AFTER_S: Final = 5.0
_SILENT_INTERVALS: Final = 10
_SILENT_AT_MOST_S: Final = 60.0
_SMOOTH: Final = 0.1
_CLOCK_OFF_S: Final = 30.0
_TOLD_S: Final = 600.0
_MAX_MODELS: Final = 16

Notify = Callable[[], None]


@dataclass(slots=True)
class FeedCounts:
    """What the feed knows of its subscriber."""

    lag: int | None = None
    lost: int = 0
    refused: int = 0
    logs_replaced: int = 0


@dataclass(slots=True, eq=False)
class _Camera:
    newest: Shown
    number: int
    at_s: float
    decided_ns: int
    interval_s: float = 1.0
    recent: deque[tuple[int, float | None, str]] = field(default_factory=lambda: deque(maxlen=RECENT))
    seconds: OrderedDict[int, list[int]] = field(default_factory=OrderedDict)


class Board:
    """Thread-safe; `on_change` is called after each change, in the thread that made it."""

    def __init__(self, clock: Clock, on_change: Notify = lambda: None) -> None:
        self.on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._cameras: dict[str, _Camera] = {}
        self._rejects: OrderedDict[str, Shown] = OrderedDict()
        self._trend = Trend()
        self._number = 0
        self._ordinal = 0
        self._further: set[str] = set()
        self._labels: dict[str, str] = {}
        self._head: Head | None = None
        self._log_epoch = 0
        self._sign_s: float | None = None
        self._start_s = self._now_s()
        self._counts = FeedCounts()
        self._log_replaced_s: float | None = None
        self._clock_off_s: float | None = None
        self._clock_step: tuple[float, float] | None = None
        self._challenge: tuple[bool, float, str] | None = None
        self._model = ""
        self._certified: OrderedDict[str, tuple[frozenset[str], float | None]] = OrderedDict()
        self._failure = ""

    # --- the feed's side ----------------------------------------------------------------------------------------------

    def take(self, event: DefectEvent, mask: NDArray[np.bool_] | None, *, live: bool) -> None:
        """Note one event; `live` if it came by itself and not from the log. What is about no part is no part here."""
        if event.kind != "frame":
            self._take_other(event, live)
            return
        is_reject = event.decision == "reject"
        # Outlining takes a millisecond: not under the lock that the pages wait for.
        one = shown(event, mask, self._ordinal + is_reject)
        with self._lock:
            self._note_log(event.log_epoch)
            self._number += 1
            self._ordinal += is_reject
            if is_reject:
                self._keep(one)
            now_s, off_s = self._now_s(), (self._clock.wall_ns() - event.decided_ns) / 1e9
            # By the console's own clock: the line's may be set while we look.
            at_s = now_s if live else now_s - min(max(off_s, 0.0), WINDOW_S)
            if live:
                self._sign_s = now_s
                self._clock_off_s = off_s if abs(off_s) > _CLOCK_OFF_S else None
            self._trend.add(at_s, event.decision, event.p_value)
            self._note_certificate(event, now_s)
            self._note_camera(one, event, at_s, live)
        self.on_change()

    def _take_other(self, event: DefectEvent, live: bool) -> None:
        """A challenge of the line; kinds that are not known yet are skipped."""
        with self._lock:
            self._note_log(event.log_epoch)
            if event.kind == "challenge":
                now_s, off_s = self._now_s(), (self._clock.wall_ns() - event.decided_ns) / 1e9
                at_s = now_s if live else now_s - max(off_s, 0.0)
                self._challenge = (event.decision == "accept", at_s, event.detail[:MAX_TEXT])
        self.on_change()

    def head(self, head: Head) -> None:
        """Note a sign of life."""
        with self._lock:
            self._note_log(head.log_epoch)
            self._head = head
            self._sign_s = self._now_s()

    def counts(self, counts: FeedCounts) -> None:
        """Note what the subscriber counted."""
        with self._lock:
            self._counts = counts

    def fail(self, why: str) -> None:
        """Say what the feed stumbled over; empty when it goes on."""
        with self._lock:
            self._failure = why[:MAX_TEXT]

    def _note_log(self, epoch: int) -> None:
        if self._log_epoch not in (0, epoch):
            self._log_replaced_s = self._now_s()
        self._log_epoch = epoch

    def _keep(self, one: Shown) -> None:
        self._rejects[one.id] = one
        self._rejects.move_to_end(one.id)
        if len(self._rejects) > MAX_REJECTS:
            self._rejects.popitem(last=False)

    def _note_camera(self, one: Shown, event: DefectEvent, at_s: float, live: bool) -> None:
        camera = self._cameras.get(one.camera)
        if camera is None:
            if len(self._cameras) >= MAX_CAMERAS:
                if len(self._further) < MAX_CAMERAS:
                    self._further.add(one.camera)
                return
            camera = self._cameras[one.camera] = _Camera(one, self._number, at_s, event.decided_ns)
        elif live and event.decided_ns < camera.decided_ns - 1_000_000_000:
            self._clock_step = ((event.decided_ns - camera.decided_ns) / 1e9, self._now_s())
        camera.newest, camera.number, camera.decided_ns = one, self._number, event.decided_ns
        camera.interval_s += _SMOOTH * (max(0.0, at_s - camera.at_s) - camera.interval_s)
        camera.at_s = max(camera.at_s, at_s)
        camera.recent.append((self._number, event.score, event.decision[0]))
        counted = camera.seconds.setdefault(int(at_s), [0, 0, 0])
        counted[("accept", "reject", "inconclusive").index(event.decision)] += 1
        if len(camera.seconds) > 61:
            camera.seconds.popitem(last=False)

    def _note_certificate(self, event: DefectEvent, now_s: float) -> None:
        """A model whose verdicts bore a certificate and no longer do: its certificate is void.

        Of the same camera: a certificate need not cover all of them.
        """
        self._model = event.model_id[:MAX_TEXT]
        covered, void_s = self._certified.pop(self._model, (frozenset[str](), None))
        camera = event.camera[:MAX_NAME]
        if event.certified:
            covered, void_s = (covered | {camera} if len(covered) < MAX_CAMERAS else covered), None
        elif camera in covered and void_s is None:
            void_s = now_s
        self._certified[self._model] = (covered, void_s)
        if len(self._certified) > _MAX_MODELS:
            self._certified.popitem(last=False)

    # --- the page's side ----------------------------------------------------------------------------------------------

    @property
    def line(self) -> str:
        """The line's name, empty until it is known."""
        with self._lock:
            return "" if self._head is None else self._head.line[:MAX_NAME]

    def label(self, event_id: str, label: str | None) -> None:
        """Show a person's word about an event; None takes it back."""
        with self._lock:
            if label is None:
                self._labels.pop(event_id, None)
            else:
                self._labels[event_id] = label

    def find(self, event_id: str) -> Shown | None:
        """The event, if it is one of the last rejects or a camera's newest."""
        with self._lock:
            found = self._rejects.get(event_id)
            if found is None:
                found = next((one.newest for one in self._cameras.values() if one.newest.id == event_id), None)
            return None if found is None else self._labeled(found)

    def delta(self, number: int, ordinal: int, *, health: bool = False, trend: bool = False) -> Delta:
        """What changed since (`number`, `ordinal`) of the last delta; (-1, -1) for everything."""
        with self._lock:
            now_s = self._now_s()
            rejects = [self._labeled(one) for one in self._rejects.values() if one.ordinal > ordinal]
            skipped = 0 if ordinal < 0 else self._ordinal - ordinal - len(rejects)
            return Delta(
                number=self._number,
                ordinal=self._ordinal,
                tiles=[self._tile(name, one, number) for name, one in self._cameras.items() if one.number > number],
                rejects=rejects,
                skipped=max(0, skipped),
                health=self._health(now_s) if health else None,
                trend=self._trend.bins(now_s) if trend else None,
                bin_s=BIN_S if trend else 0,
                first=number < 0,
            )

    def _labeled(self, one: Shown) -> Shown:
        label = self._labels.get(one.id)
        return one if label is None else msgspec.structs.replace(one, label=label)

    def _tile(self, name: str, camera: _Camera, number: int) -> Tile:
        return Tile(name, camera.newest, [(score, kind) for at, score, kind in camera.recent if at > number])

    def _health(self, now_s: float) -> Health:
        quiet_s = now_s - (self._start_s if self._sign_s is None else self._sign_s)
        away_s = round(quiet_s, 1) if quiet_s > AWAY_AFTER_S else None
        covered, void_s = self._certified.get(self._model, (frozenset[str](), None))
        step = self._clock_step if self._clock_step and now_s - self._clock_step[1] < _TOLD_S else None
        replaced, challenge = self._log_replaced_s, self._challenge
        return Health(
            line="" if self._head is None else self._head.line[:MAX_NAME],
            away_s=away_s,
            heard=self._sign_s is not None,
            since_ms=None if away_s is None else round(self._clock.wall_ns() / 1e6 - quiet_s * 1e3),
            state="" if self._head is None else self._head.state[:MAX_NAME],
            fallback="" if self._head is None else self._head.fallback[:MAX_TEXT],
            model=self._model,
            certificate=self._certificate(covered, void_s),
            certificate_s=None if void_s is None else round(now_s - void_s, 1),
            lag=self._counts.lag,
            lost=self._counts.lost,
            refused=self._counts.refused,
            logs_replaced=self._counts.logs_replaced,
            log_replaced_s=None if replaced is None or now_s - replaced > _TOLD_S else round(now_s - replaced, 1),
            clock_off_s=None if self._clock_off_s is None else round(self._clock_off_s, 1),
            clock_step_s=None if step is None else round(step[0], 1),
            challenge="" if challenge is None else "passed" if challenge[0] else "failed",
            challenge_s=None if challenge is None else round(now_s - challenge[1], 1),
            challenge_detail="" if challenge is None else challenge[2],
            further_cameras=len(self._further),
            failure=self._failure,
            cameras=[self._camera_health(name, one, now_s) for name, one in self._cameras.items()],
        )

    def _certificate(self, covered: frozenset[str], void_s: float | None) -> str:
        if not self._model:
            return ""
        if void_s is None:
            return "valid" if covered else "none"
        # While the CPU stands in for the GPU nothing is certified, and nothing is wrong with the parts.
        return "paused" if self._head is not None and self._head.fallback else "void"

    def _camera_health(self, name: str, camera: _Camera, now_s: float) -> CameraHealth:
        age_s = max(0.0, now_s - camera.at_s)
        counted = [kinds for second, kinds in camera.seconds.items() if now_s - second <= 61]
        accepted, rejected, inconclusive = (sum(kinds[index] for kinds in counted) for index in range(3))
        last = [sum(kinds) for second, kinds in camera.seconds.items() if 1 <= int(now_s) - second <= 5]
        return CameraHealth(
            camera=name,
            age_s=round(age_s, 1),
            silent=age_s > min(max(_SILENT_AFTER_S, _SILENT_INTERVALS * camera.interval_s), _SILENT_AT_MOST_S),
            fps=round(sum(last) / 5, 1),
            parts=accepted + rejected + inconclusive,
            rejected=rejected,
            inconclusive=inconclusive,
        )

    def _now_s(self) -> float:
        return self._clock.monotonic_ns() / 1e9
