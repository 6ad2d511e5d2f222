"""The account of frames: received = accepted + rejected + inconclusive + in flight, for every camera, at every moment.

Owns the counting, under one lock, and reading it consistently; names and meanings are `series`'.
"""

from __future__ import annotations

import threading
from collections import Counter as Tally
from collections.abc import Collection, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge.events import DefectEvent
from edge.protocols import Clock
from edge.series import SERIES, VERDICTS

FrameKey = tuple[str, int, int]


class FrameAccount(Collector):
    """The one count of frames: received, judged, in flight, by camera; consistent at every moment.

    Thread-safe. `camera` names beyond those given at start are counted as they come.
    """

    def __init__(self, cameras: Collection[str], clock: Clock) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._received: Tally[str] = Tally(dict.fromkeys(cameras, 0))
        self._verdicts: Tally[tuple[str, str, str]] = Tally({(c, *verdict): 0 for c in cameras for verdict in VERDICTS})
        self._in_flight: dict[FrameKey, None] = {}
        start_ns = clock.monotonic_ns()
        self._last_ns = dict.fromkeys(cameras, start_ns)
        self._last_wall_ns = dict.fromkeys(cameras, 0)
        self._progress_ns = start_ns

    def receive(self, key: FrameKey) -> bool:
        """Count a frame that needs a verdict; False, and not counted, when it is in flight already."""
        now_ns, wall_ns = self._clock.monotonic_ns(), self._clock.wall_ns()
        with self._lock:
            if key in self._in_flight:
                return False
            if not self._in_flight:
                self._progress_ns = now_ns
            self._in_flight[key] = None
            self._received[key[0]] += 1
            self._last_ns[key[0]] = now_ns
            self._last_wall_ns[key[0]] = wall_ns
            return True

    def judge(self, event: DefectEvent) -> None:
        """Count a durable verdict."""
        now_ns = self._clock.monotonic_ns()
        with self._lock:
            self._in_flight.pop((event.camera, event.camera_epoch, event.frame_sequence), None)
            self._verdicts[event.camera, event.decision, event.reason] += 1
            self._progress_ns = now_ns

    @property
    def in_flight(self) -> int:
        """Frames received whose verdict is not durable yet."""
        return len(self._in_flight)

    @property
    def judged(self) -> int:
        """Durable verdicts so far."""
        with self._lock:
            return self._verdicts.total()

    @property
    def progress_ns(self) -> int:
        """Monotonic time of the last durable verdict, or of the first frame that waits since then."""
        with self._lock:
            return self._progress_ns

    def collect(self) -> Iterator[Metric]:
        """One consistent reading of all frame series."""
        now_ns = self._clock.monotonic_ns()
        with self._lock:
            received, verdicts = dict(self._received), dict(self._verdicts)
            last_ns, last_wall_ns = dict(self._last_ns), dict(self._last_wall_ns)
            waiting = Tally(camera for camera, _, _ in self._in_flight)
        yield _counter("kizu_frames_received", (((camera,), count) for camera, count in received.items()))
        yield _counter("kizu_verdicts", verdicts.items())
        yield _gauge("kizu_frames_in_flight", ((camera, waiting[camera]) for camera in received))
        # A frame may come between the two readings of the clock.
        ages = ((camera, max(0, now_ns - last_ns[camera]) / 1e9) for camera in received)
        yield _gauge("kizu_last_frame_age_seconds", ages)
        yield _gauge("kizu_last_frame_timestamp_seconds", ((c, last_wall_ns[c] / 1e9) for c in received))


def _counter(name: str, counts: Iterable[tuple[tuple[str, ...], int]]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, SERIES[name].text, labels=list(SERIES[name].labels))
    for values, count in counts:
        family.add_metric(values, count)
    return family


def _gauge(name: str, values: Iterable[tuple[str, float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, SERIES[name].text, labels=list(SERIES[name].labels))
    for camera, value in values:
        family.add_metric([camera], value)
    return family
