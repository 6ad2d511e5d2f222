"""Every Prometheus series of the daemon, declared once on a registry that is passed in.

Owns names, labels, buckets and the endpoint; the pipeline says what happened. Children exist from the start for every
camera, decision and reason, so that an alert sees a zero and not an absence. The frame account (received = accepted +
rejected + inconclusive + in flight) is read under one lock, so it holds in every scrape.
"""

from __future__ import annotations

import threading
from collections import Counter as Tally
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Final, Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge.bundle import Manifest
from edge.errors import DEVICE_REASONS, ConfigError
from edge.events import DefectEvent
from edge.protocols import Clock
from edge.types import Decision, Reason
from edge.wire import REFUSALS

FrameKey = tuple[str, int, int]

STAGES: Final = ("preprocess", "engine", "segment", "commit", "total")
"""Stage labels: `engine` is a batch's submission to answer, `commit` verdict to durable, `total` all of it."""

CHALLENGE_RESULTS: Final = ("passed", "failed")
QUEUES: Final = ("inference", "verdict", "log")
STATES: Final = ("starting", "ready", "withheld", "degraded", "stalled", "stopping")

_JUDGED: Final = (Decision.ACCEPT, Decision.REJECT)
VERDICTS: Final = (
    *((decision.value, reason.value) for reason in Reason if reason.is_judged for decision in _JUDGED),
    *((Decision.INCONCLUSIVE.value, reason.value) for reason in Reason if not reason.is_judged),
)
"""Every (decision, reason) that a verdict can have."""

CONNECTION_REFUSALS: Final = (
    "key_unknown", "not_allowed", "no_key", "wrong_key", "list_unreadable", "malformed", "abandoned",
)  # fmt: skip
"""The reasons of `doorkeeper.REASONS`, which may not be imported from here; a test holds the two together."""

_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


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
        self._progress_ns = start_ns

    def receive(self, key: FrameKey) -> bool:
        """Count a frame that needs a verdict; False, and not counted, when it is in flight already."""
        now_ns = self._clock.monotonic_ns()
        with self._lock:
            if key in self._in_flight:
                return False
            if not self._in_flight:
                self._progress_ns = now_ns
            self._in_flight[key] = None
            self._received[key[0]] += 1
            self._last_ns[key[0]] = now_ns
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
            received, verdicts, last_ns = dict(self._received), dict(self._verdicts), dict(self._last_ns)
            waiting = Tally(camera for camera, _, _ in self._in_flight)
        yield _counter("kizu_frames_received", "Frames that need a verdict.", ["camera"], received.items())
        yield _counter(
            "kizu_verdicts",
            "Durable verdicts; with kizu_frames_in_flight they add up to kizu_frames_received_total.",
            ["camera", "decision", "reason"],
            verdicts.items(),
        )
        flight = GaugeMetricFamily(
            "kizu_frames_in_flight", "Frames received, verdict not durable yet.", labels=["camera"]
        )
        age = GaugeMetricFamily(
            "kizu_last_frame_age_seconds",
            "Seconds since the camera's last frame, or since the start.",
            labels=["camera"],
        )
        for camera in received:
            flight.add_metric([camera], waiting[camera])
            age.add_metric([camera], (now_ns - last_ns[camera]) / 1e9)
        yield flight
        yield age


def _counter(
    name: str, text: str, labels: list[str], counts: Iterable[tuple[str | tuple[str, ...], int]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, count in counts:
        family.add_metric([key] if isinstance(key, str) else list(key), count)
    return family


class Metrics:
    """All series, on `registry`; `cameras` are the configured names."""

    def __init__(self, registry: CollectorRegistry, cameras: Collection[str], clock: Clock) -> None:
        self.frames = FrameAccount(cameras, clock)
        registry.register(self.frames)
        self._refused = Counter(
            "kizu_messages_refused", "Messages refused without a verdict, by reason.", ["reason"], registry=registry
        )
        self._unconnected = Counter(
            "kizu_connections_refused",
            "Connections that did not come about, by reason.",
            ["reason"],
            registry=registry,
        )
        self._connections = Counter(
            "kizu_connections", "Connections by how far they came.", ["socket", "step"], registry=registry
        )
        self._duplicates = Counter(
            "kizu_frames_duplicate",
            "Frames that came again; acknowledged, never judged twice.",
            ["camera"],
            registry=registry,
        )
        self._stage = Histogram(
            "kizu_stage_seconds",
            "Time of a frame or batch in a stage.",
            ["stage"],
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._depth = Gauge("kizu_queue_depth", "Items that wait before a stage.", ["queue"], registry=registry)
        self.queue_capacity = Gauge(
            "kizu_queue_capacity",
            "Frames admitted at once; cameras wait beyond it, nothing is dropped.",
            registry=registry,
        )
        self._state = Gauge("kizu_state", "1 for the daemon's present state.", ["state"], registry=registry)
        self._engine = Gauge(
            "kizu_engine_info", "Always 1; what runs the graph.", ["backend", "version", "device"], registry=registry
        )
        self._model = Gauge(
            "kizu_model_info",
            "Always 1; the bundle.",
            ["model_id", "name", "method", "preset", "certified"],
            registry=registry,
        )
        self.engine_failures = Counter("kizu_engine_failures", "Batches that the engine failed.", registry=registry)
        self.engine_reopens = Counter("kizu_engine_reopens", "Times the engine was opened again.", registry=registry)
        self._fallbacks = Counter(
            "kizu_engine_fallbacks",
            "Times the CPU took the GPU's place, by reason.",
            ["reason"],
            registry=registry,
        )
        self.publish_drops = Counter(
            "kizu_events_unpublished", "Logged events that the publisher's socket refused.", registry=registry
        )
        self._tiles = Counter(
            "kizu_tiles", "Tiles, or whole frames, that a coarse graph looked at first.", registry=registry
        )
        self._tiles_refined = Counter(
            "kizu_tiles_refined", "Those of kizu_tiles_total that were computed densely.", registry=registry
        )
        self.log_head = Gauge("kizu_log_head", "The event log's last committed sequence.", registry=registry)
        self.log_bytes = Gauge("kizu_log_bytes", "Bytes that the event log uses.", registry=registry)
        self.log_removed_through = Gauge(
            "kizu_log_removed_through", "The last log sequence that retention removed.", registry=registry
        )
        self._log_commit = Histogram(
            "kizu_log_commit_seconds", "Insert to synced, per group.", buckets=_BUCKETS_S, registry=registry
        )
        self._log_group = Counter("kizu_log_group_events", "Events committed, over all groups.", registry=registry)
        self._lag = Gauge(
            "kizu_subscriber_lag_events", "Events a registered subscriber has not got.", ["name"], registry=registry
        )
        self.replayed = Gauge("kizu_replayed_events", "Events sent again since the start.", registry=registry)
        self.rejects_dropped = Gauge(
            "kizu_reject_frames_dropped", "Frames of rejected parts that could not be kept.", registry=registry
        )
        self._crashes = Counter(
            "kizu_thread_crashes", "Threads that ended by an unforeseen error.", ["thread"], registry=registry
        )
        self.certificate_valid = Gauge(
            "kizu_certificate_valid",
            "1 while the running model's threshold is certified and nothing speaks against it.",
            registry=registry,
        )
        self._evidence = Gauge(
            "kizu_watch_evidence",
            "0 to 1: how far the watch is on the way to voiding the certificate.",
            ["camera"],
            registry=registry,
        )
        self._challenges = Counter("kizu_challenges", "Challenges taken, by result.", ["result"], registry=registry)
        self.challenge_passed = Gauge(
            "kizu_challenge_passed",
            "1 if the last challenge was passed, or none is configured; 0 before the first.",
            registry=registry,
        )
        self.challenge_at = Gauge(
            "kizu_challenge_timestamp_seconds",
            "Unix time of the last challenge; 0 before the first.",
            registry=registry,
        )
        self._discarded = Counter(
            "kizu_results_discarded",
            "Engine results that came after their frame was late or displaced; the verdict stood.",
            ["camera"],
            registry=registry,
        )
        self._refusals = {reason: self._refused.labels(reason) for reason in REFUSALS}
        self._stages = {stage: self._stage.labels(stage) for stage in STAGES}
        for reason in CONNECTION_REFUSALS:
            self._unconnected.labels(reason)
        for reason in DEVICE_REASONS:
            self._fallbacks.labels(reason)
        for camera in cameras:
            self._duplicates.labels(camera)
            self._discarded.labels(camera)
            self._evidence.labels(camera)
        for result in CHALLENGE_RESULTS:
            self._challenges.labels(result)
        self.challenge_passed.set(1)
        for queue in QUEUES:
            self._depth.labels(queue)
        self.set_state("starting")

    def refuse(self, reason: str) -> None:
        """Count a message refused without a verdict."""
        self._refusals[reason].inc()

    def refuse_connection(self, reason: str) -> None:
        """Count a connection that did not come about; a reason of `doorkeeper.REASONS`."""
        self._unconnected.labels(reason).inc()

    def connection(self, socket: str, step: str) -> None:
        """Count a connection that came as far as one of `doorkeeper.STEPS`."""
        self._connections.labels(socket, step).inc()

    def duplicate(self, camera: str) -> None:
        """Count a frame that came again."""
        self._duplicates.labels(camera).inc()

    def set_evidence(self, camera: str, evidence: float) -> None:
        """Note how far a camera's watch is, 0 to 1."""
        self._evidence.labels(camera).set(evidence)

    def challenge(self, passed: bool, at_ns: int) -> None:
        """Note a challenge's result."""
        self._challenges.labels("passed" if passed else "failed").inc()
        self.challenge_passed.set(passed)
        self.challenge_at.set(at_ns / 1e9)

    def discard(self, camera: str) -> None:
        """Count a result that came after its frame's verdict."""
        self._discarded.labels(camera).inc()

    def observe(self, stage: str, elapsed_ns: int) -> None:
        """Note how long one of STAGES took."""
        self._stages[stage].observe(elapsed_ns / 1e9)

    def observe_group(self, events: int, elapsed_ns: int) -> None:
        """Note one commit of the event log."""
        self._log_group.inc(events)
        self._log_commit.observe(elapsed_ns / 1e9)

    def set_lags(self, head: int, cursors: Mapping[str, int]) -> None:
        """Note how far each registered subscriber is behind `head`."""
        for name, cursor in cursors.items():
            self._lag.labels(name).set(max(0, head - cursor))

    def count_tiles(self, seen: int, refined: int) -> None:
        """Count tiles that were looked at coarsely, and those of them that were computed densely."""
        self._tiles.inc(seen)
        self._tiles_refined.inc(refined)

    def fall_back(self, reason: str) -> None:
        """Count the CPU taking the place of the GPU; `reason` is one of DEVICE_REASONS."""
        self._fallbacks.labels(reason).inc()

    def crash(self, thread: str) -> None:
        """Count a thread that ended by an unforeseen error."""
        self._crashes.labels(thread).inc()

    def set_depth(self, queue: str, depth: int) -> None:
        """Note how many items wait in one of QUEUES."""
        self._depth.labels(queue).set(depth)

    def set_state(self, state: str) -> None:
        """Set the daemon's one present state, of STATES."""
        for name in STATES:
            self._state.labels(name).set(name == state)

    def set_engine(self, backend: str, version: str, device: str) -> None:
        """Say what runs the graph, in place of what did."""
        self._engine.clear()
        self._engine.labels(backend, version, device).set(1)

    def set_model(self, model_id: str, manifest: Manifest, certified: bool) -> None:
        """Say which bundle runs; the one before is no longer shown."""
        self._model.clear()
        self.certificate_valid.set(certified)
        labels = (model_id, manifest.name, manifest.method, manifest.preset, str(certified).lower())
        self._model.labels(*labels).set(1)


class MetricsServer:
    """The HTTP endpoint `/metrics` in a thread of its own, until closed.

    Raises:
        ConfigError: the address is in use or not of this machine.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError(
                f"metrics.port {port} on {host}: {error.strerror or error}; stop the other process or choose another "
                "metrics.port (0 lets the system choose)"
            ) from None

    @property
    def port(self) -> int:
        """As bound."""
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
