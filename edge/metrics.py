"""The daemon's metrics: instruments for what `series` declares, on a registry that is passed in.

Owns what each thing that happens does to the series, and that children exist from the start; the pipeline says what
happened, `frame_account` counts frames, `metrics_server` gives the page out.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Collection, Iterator, Mapping
from itertools import product
from types import MappingProxyType
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from edge.bundle import Manifest
from edge.events import DefectEvent
from edge.frame_account import FrameAccount
from edge.protocols import Clock
from edge.series import CAMERA, SERIES, STATES, Series, with_deadlines

_Instrument = TypeVar("_Instrument", Counter, Gauge, Histogram)


class Metrics:
    """All series, on `registry`; `cameras` are the configured names, `deadlines_s` the deadlines where there are.

    Every method may be called from any thread.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        cameras: Collection[str],
        clock: Clock,
        deadlines_s: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self._registry, self._cameras, self._deadlines_s = registry, tuple(cameras), tuple(deadlines_s.values())
        self.frames = FrameAccount(cameras, clock)
        registry.register(self.frames)
        # What was found, and when
        self._p_value = _Children(self._make(Histogram, "kizu_score_p_value"))
        self._area = _Children(self._make(Histogram, "kizu_defect_area_pixels"))
        self._latency = _Children(self._make(Histogram, "kizu_latency_seconds"))
        self._stage = _Children(self._make(Histogram, "kizu_stage_seconds"))
        self._deadline = self._make(Gauge, "kizu_camera_deadline_seconds")
        self._depth = self._make(Gauge, "kizu_queue_depth")
        self._capacity = self._make(Gauge, "kizu_queue_capacity")
        self._certificate_valid = self._make(Gauge, "kizu_certificate_valid")
        self._certificate_void = self._make(Gauge, "kizu_certificate_void")
        self._evidence = _Children(self._make(Gauge, "kizu_watch_evidence"))
        self._challenges = self._make(Counter, "kizu_challenges")
        self.challenge_passed = self._make(Gauge, "kizu_challenge_passed")
        self.challenge_passed.set(1)
        self.challenge_at = self._make(Gauge, "kizu_challenge_timestamp_seconds")
        self._discarded = self._make(Counter, "kizu_results_discarded")
        # Who came, and who was sent away
        self._duplicates = self._make(Counter, "kizu_frames_duplicate")
        self._reconnects = self._make(Counter, "kizu_camera_reconnects")
        self._refused = self._make(Counter, "kizu_messages_refused")
        self._unconnected = self._make(Counter, "kizu_connections_refused")
        self._connections = self._make(Counter, "kizu_connections")
        self._connected = self._make(Gauge, "kizu_camera_connected")
        self._scrapes = self._make(Counter, "kizu_scrapes_refused")
        # Log and subscribers
        self.log_head = self._make(Gauge, "kizu_log_head")
        self.log_bytes = self._make(Gauge, "kizu_log_bytes")
        self.log_removed_through = self._make(Gauge, "kizu_log_removed_through")
        self._log_disk_free = self._make(Gauge, "kizu_log_disk_free_bytes")
        self._log_disk_size = self._make(Gauge, "kizu_log_disk_size_bytes")
        self._log_commit = self._make(Histogram, "kizu_log_commit_seconds")
        self._log_group = self._make(Counter, "kizu_log_group_events")
        self._lag = self._make(Gauge, "kizu_subscriber_lag_events")
        self._passed = self._make(Counter, "kizu_subscriber_passed_events")
        self._lagging: frozenset[str] = frozenset()
        self._replayed = _Running(self._make(Counter, "kizu_events_replayed"))
        self._rejects_dropped = _Running(self._make(Counter, "kizu_reject_frames_dropped"))
        self.publish_drops = self._make(Counter, "kizu_events_unpublished")
        # Model, engine, daemon
        self._build = self._make(Gauge, "kizu_build_info")
        self._model = self._make(Gauge, "kizu_model_info")
        self._engine = self._make(Gauge, "kizu_engine_info")
        self.engine_failures = self._make(Counter, "kizu_engine_failures")
        self.engine_reopens = self._make(Counter, "kizu_engine_reopens")
        self._fallbacks = self._make(Counter, "kizu_engine_fallbacks")
        self._substitute = self._make(Gauge, "kizu_engine_substitute")
        self._tiles = self._make(Counter, "kizu_tiles")
        self._tiles_refined = self._make(Counter, "kizu_tiles_refined")
        self._state = self._make(Gauge, "kizu_state")
        self._crashes = self._make(Counter, "kizu_thread_crashes")
        self._model_id = ""
        self._certified = False
        self._voided: set[str] = set()
        for camera, deadline_s in deadlines_s.items():
            self._deadline.labels(camera).set(deadline_s)
        self.set_state("starting")

    def _make(self, kind: type[_Instrument], name: str) -> _Instrument:
        """The instrument of a declared series, with all children whose labels are known by now."""
        series = SERIES[name]
        bounds: dict[str, Any] = {}
        if series.bounds:
            deadlines_s = self._deadlines_s if name in ("kizu_latency_seconds", "kizu_stage_seconds") else ()
            bounds["buckets"] = with_deadlines(series.bounds, deadlines_s)
        made = kind(name, series.text, list(series.labels), registry=self._registry, **bounds)
        for values in _known(series, self._cameras):
            made.labels(*values)
        return made

    # --- frames and verdicts ------------------------------------------------------------------------------------------

    def judge(self, event: DefectEvent, latency_ns: int) -> None:
        """Count a durable verdict, `latency_ns` after its frame was received."""
        self._latency[event.camera].observe(latency_ns / 1e9)
        if event.p_value is not None:
            self._p_value[event.camera].observe(event.p_value)
        if event.decision == "reject":
            self._area[event.camera].observe(sum(region.area_px for region in event.regions))
        self.frames.judge(event)

    def duplicate(self, camera: str) -> None:
        """Count a frame that came again."""
        self._duplicates.labels(camera).inc()

    def reconnect(self, camera: str) -> None:
        """Count a camera that came back on another connection, or as another run of itself."""
        self._reconnects.labels(camera).inc()

    def set_connected(self, camera: str, connected: bool) -> None:
        """Note that a camera came or went."""
        self._connected.labels(camera).set(connected)

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
        self._stage[stage].observe(elapsed_ns / 1e9)

    def set_depth(self, queue: str, depth: int) -> None:
        """Note how many items wait in one of QUEUES."""
        self._depth.labels(queue).set(depth)

    def set_capacity(self, queue: str, capacity: int) -> None:
        """Note how many items can wait in one of QUEUES."""
        self._capacity.labels(queue).set(capacity)

    # --- refusals -----------------------------------------------------------------------------------------------------

    def refuse(self, reason: str) -> None:
        """Count a message refused without a verdict."""
        self._refused.labels(reason).inc()

    def refuse_connection(self, reason: str) -> None:
        """Count a connection that did not come about; a reason of `doorkeeper.REASONS`."""
        self._unconnected.labels(reason).inc()

    def refuse_scrape(self, reason: str) -> None:
        """Count an asker who did not get the page; one of SCRAPE_REFUSALS."""
        self._scrapes.labels(reason).inc()

    def connection(self, socket: str, step: str) -> None:
        """Count a connection that came as far as one of `doorkeeper.STEPS`."""
        self._connections.labels(socket, step).inc()

    # --- log and subscribers ------------------------------------------------------------------------------------------

    def observe_group(self, events: int, elapsed_ns: int) -> None:
        """Note one commit of the event log."""
        self._log_group.inc(events)
        self._log_commit.observe(elapsed_ns / 1e9)

    def set_lags(self, head: int, cursors: Mapping[str, int]) -> None:
        """Note how far each registered subscriber is behind `head`; those that are no more are not shown."""
        for name in self._lagging - cursors.keys():
            self._lag.remove(name)
            self._passed.remove(name)
        self._lagging = frozenset(cursors)
        for name, cursor in cursors.items():
            self._lag.labels(name).set(max(0, head - cursor))
            self._passed.labels(name)

    def passed(self, name: str, events: int) -> None:
        """Count events that a registered subscriber will never get."""
        self._passed.labels(name).inc(events)

    def set_log_disk(self, path: str) -> None:
        """Note how full the disk of the log at `path` is; the last reading stays where it cannot be told."""
        with contextlib.suppress(OSError):
            # What is free to us: a part of a disk is often kept for root.
            found = os.statvfs(os.path.dirname(path) or ".")
            self._log_disk_free.set(found.f_bavail * found.f_frsize)
            self._log_disk_size.set(found.f_blocks * found.f_frsize)

    def set_replayed(self, events: int) -> None:
        """Note how many events were sent again since the start."""
        self._replayed.reach(events)

    def set_rejects_dropped(self, frames: int) -> None:
        """Note how many frames of rejected parts could not be kept since the start."""
        self._rejects_dropped.reach(frames)

    # --- model, engine, daemon ----------------------------------------------------------------------------------------

    def set_build(self, line: str) -> None:
        """Say which line this is, and which program runs it."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("kizu")
        except PackageNotFoundError:  # run from a folder that was never installed
            found = "unknown"
        self._build.labels(line, found, platform.python_version()).set(1)

    def set_engine(self, backend: str, version: str, device: str) -> None:
        """Say what runs the graph, in place of what did."""
        self._engine.clear()
        self._engine.labels(backend, version, device).set(1)

    def set_model(self, model_id: str, manifest: Manifest, certified: bool) -> None:
        """Say which bundle runs; the one before is no longer shown."""
        self._model.clear()
        labels = (model_id, manifest.name, manifest.method, manifest.preset, str(certified).lower())
        self._model.labels(*labels).set(1)
        self._model_id, self._certified = model_id, certified
        self._show_certificate()

    def void_certificate(self, model_id: str) -> None:
        """Note that this model's certificate no longer holds, now or in an earlier run."""
        self._voided.add(model_id)
        self._show_certificate()

    def _show_certificate(self) -> None:
        void = self._model_id in self._voided
        self._certificate_valid.set(self._certified and not void)
        self._certificate_void.set(void)

    def set_evidence(self, camera: str, evidence: float) -> None:
        """Note how far a camera's watch is, 0 to 1."""
        self._evidence[camera].set(evidence)

    def count_tiles(self, seen: int, refined: int) -> None:
        """Count tiles that were looked at coarsely, and those of them that were computed densely."""
        self._tiles.inc(seen)
        self._tiles_refined.inc(refined)

    def fall_back(self, reason: str) -> None:
        """Count the CPU taking the place of the GPU; `reason` is one of DEVICE_REASONS."""
        self._fallbacks.labels(reason).inc()

    def set_substitute(self, substitute: bool) -> None:
        """Say whether the CPU stands in for the configured GPU."""
        self._substitute.set(substitute)

    def crash(self, thread: str) -> None:
        """Count a thread that ended by an unforeseen error."""
        self._crashes.labels(thread).inc()

    def set_state(self, state: str) -> None:
        """Set the daemon's one present state, of STATES."""
        for name in STATES:
            self._state.labels(name).set(name == state)


class _Children(dict[str, Any]):
    """The children of an instrument with one label; looking one up by `labels` costs as much as what is then noted."""

    def __init__(self, instrument: Histogram | Gauge) -> None:
        super().__init__()
        self._instrument = instrument

    def __missing__(self, value: str) -> Any:
        child = self[value] = self._instrument.labels(value)
        return child


class _Running:
    """A counter fed from a total that somebody else keeps since the start."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._reached = 0

    def reach(self, total: int) -> None:
        self._counter.inc(max(0, total - self._reached))
        self._reached = max(total, self._reached)


def _known(series: Series, cameras: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every combination of label values, where all of them can be listed; nothing for a series without labels."""
    values = [cameras if given == CAMERA else given for given in series.labels.values()]
    if values and all(isinstance(given, tuple) for given in values):
        yield from product(*values)
