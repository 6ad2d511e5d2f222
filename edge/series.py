"""What the metrics page shows: every series' name, kind, labels, unit, bounds and meaning, declared once.

Owns the declarations; `metrics` makes instruments of them and says what happened, `frame_account` and `gpu_metrics`
read theirs when the page is asked for. `docs/metrics.md` is written from here (`make pages`).

Labels take their values from the configuration, from the lists here, or are bounded as their entry says; but for the
names of registered subscribers, nothing that a peer sends becomes a label. Where all values are known, the children
exist from the start, so that an alert sees a zero and not an absence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from edge.errors import DEVICE_REASONS
from edge.types import Decision, Reason
from edge.wire import REFUSALS

STAGES: Final = ("preprocess", "engine", "segment", "commit")
"""Stage labels: `engine` is a batch's submission to answer, `commit` verdict to durable."""

QUEUES: Final = ("inference", "verdict", "log")
STATES: Final = ("starting", "ready", "withheld", "degraded", "stalled", "stopping")
CHALLENGE_RESULTS: Final = ("passed", "failed")

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

SCRAPE_REFUSALS: Final = ("login", "tls", "busy")
"""Why the metrics page was not given: no or a wrong password; no TLS handshake; too many askers at once."""

SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
P_VALUES: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PIXELS: Final = (10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6)

Kind = Literal["counter", "gauge", "histogram"]
Values = tuple[str, ...] | str

CAMERA: Final = "a configured camera"


@dataclass(frozen=True, slots=True)
class Series:
    """One family: `labels` says of each label its values, or in words what bounds them; `bounds` are a histogram's.

    `name` is without the `_total` that Prometheus' text format adds to a counter; `shown` is with it.
    """

    kind: Kind
    name: str
    text: str
    labels: Mapping[str, Values] = field(default_factory=lambda: MappingProxyType({}))
    bounds: tuple[float, ...] = ()

    @property
    def shown(self) -> str:
        """The name as queries spell it."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def with_deadlines(bounds: tuple[float, ...], deadlines_s: Iterable[float]) -> tuple[float, ...]:
    """`bounds` and every deadline, ascending: the share within a deadline can then be read off exactly."""
    return tuple(sorted({*bounds, *deadlines_s}))


def _camera(**others: Values) -> Mapping[str, Values]:
    return MappingProxyType({"camera": CAMERA, **others})


def _labels(**labels: Values) -> Mapping[str, Values]:
    return MappingProxyType(labels)


GROUPS: Final[Mapping[str, tuple[Series, ...]]] = MappingProxyType({
    "Frames and verdicts": (
        Series("counter", "kizu_frames_received", "Frames that need a verdict.", _camera()),
        Series(
            "counter",
            "kizu_verdicts",
            "Durable verdicts; with kizu_frames_in_flight they add up to kizu_frames_received_total.",
            _camera(
                decision=tuple(decision.value for decision in Decision), reason=tuple(reason.value for reason in Reason)
            ),
        ),
        Series("gauge", "kizu_frames_in_flight", "Frames received, verdict not durable yet.", _camera()),
        Series("counter", "kizu_frames_duplicate", "Frames that came again; never judged twice.", _camera()),
        Series(
            "gauge",
            "kizu_last_frame_age_seconds",
            "Seconds since the camera's last frame, or since the start; no step of the clock changes it.",
            _camera(),
        ),
        Series(
            "gauge",
            "kizu_last_frame_timestamp_seconds",
            "Unix time at which the camera's last frame was received; 0 before the first.",
            _camera(),
        ),
        Series(
            "counter",
            "kizu_camera_reconnects",
            "Times a camera came back on another connection, or was started again.",
            _camera(),
        ),
        Series(
            "gauge",
            "kizu_camera_connected",
            "1 while the camera is connected and has said hello; noticed within 3 s where its network is cut.",
            _camera(),
        ),
        Series(
            "counter",
            "kizu_results_discarded",
            "Engine results that came after their frame was late or displaced; the verdict stood.",
            _camera(),
        ),
    ),
    "What was found": (
        Series(
            "histogram",
            "kizu_score_p_value",
            "P-values of judged frames against the calibration's good parts; evenly spread while parts are like those.",
            _camera(),
            P_VALUES,
        ),
        Series(
            "histogram",
            "kizu_defect_area_pixels",
            "Area of all regions of a rejected frame together, in frame pixels.",
            _camera(),
            PIXELS,
        ),
        Series(
            "gauge",
            "kizu_certificate_valid",
            "1 while the running model's threshold is certified and nothing speaks against it.",
        ),
        Series(
            "gauge",
            "kizu_certificate_void",
            "1 while the running model had a certificate and the watch voided it, in this run or an earlier one.",
        ),
        Series(
            "gauge",
            "kizu_watch_evidence",
            "0 to 1: how far the watch is on the way to voiding the certificate.",
            _camera(),
        ),
        Series("counter", "kizu_challenges", "Challenges taken, by result.", _labels(result=CHALLENGE_RESULTS)),
        Series(
            "gauge",
            "kizu_challenge_passed",
            "1 if the last challenge was passed, or none is configured; 0 before the first.",
        ),
        Series(
            "gauge", "kizu_challenge_timestamp_seconds", "Unix time of the last challenge; 0 before the first."
        ),
    ),
    "Time": (
        Series(
            "histogram",
            "kizu_latency_seconds",
            "Reception of a frame to its durable verdict; every camera's deadline is among the bounds.",
            _camera(),
            SECONDS,
        ),
        Series(
            "histogram",
            "kizu_stage_seconds",
            "Time of a frame (engine: of a batch) in a stage; every camera's deadline is among the bounds.",
            _labels(stage=STAGES),
            SECONDS,
        ),
        Series(
            "gauge",
            "kizu_camera_deadline_seconds",
            "The configured deadline; only of cameras that have one.",
            _labels(camera="a configured camera with a deadline"),
        ),
        Series("gauge", "kizu_queue_depth", "Items that wait before a stage.", _labels(queue=QUEUES)),
        Series(
            "gauge",
            "kizu_queue_capacity",
            "Items that can wait; cameras wait for credit beyond it, nothing is dropped.",
            _labels(queue=QUEUES),
        ),
    ),
    "Event log and subscribers": (
        Series("gauge", "kizu_log_head", "The event log's last committed sequence."),
        Series("gauge", "kizu_log_bytes", "Bytes that the event log uses."),
        Series("gauge", "kizu_log_removed_through", "The last log sequence that retention removed."),
        Series("gauge", "kizu_log_disk_free_bytes", "Bytes that the daemon may still write on the log's disk."),
        Series("gauge", "kizu_log_disk_size_bytes", "Size of the log's disk in bytes."),
        Series("histogram", "kizu_log_commit_seconds", "Insert to synced, per group.", bounds=SECONDS),
        Series("counter", "kizu_log_group_events", "Events committed, over all groups."),
        Series(
            "gauge",
            "kizu_subscriber_lag_events",
            "Events a registered subscriber has not got.",
            _labels(name="a registered subscriber, at most 256"),
        ),
        Series(
            "counter",
            "kizu_subscriber_passed_events",
            "Events that retention removed before a registered subscriber had them.",
            _labels(name="a registered subscriber, at most 256"),
        ),
        Series("counter", "kizu_events_replayed", "Events sent again to subscribers that asked."),
        Series("counter", "kizu_events_unpublished", "Logged events that the publisher's socket refused."),
        Series("counter", "kizu_reject_frames_dropped", "Frames of rejected parts that could not be kept."),
    ),
    "Refused": (
        Series(
            "counter",
            "kizu_messages_refused",
            "Messages refused without a verdict; they name no admissible frame.",
            _labels(reason=REFUSALS),
        ),
        Series(
            "counter",
            "kizu_connections_refused",
            "Connections that did not come about: by the list of peers, for want of a key, by a wrong one, unfinished.",
            _labels(reason=CONNECTION_REFUSALS),
        ),
        Series(
            "counter",
            "kizu_connections",
            "Connections by how far they came; accepted and neither admitted nor refused spoke another protocol.",
            _labels(socket=("frames", "events", "replay"), step=("accepted", "admitted", "accept_failed")),
        ),
        Series(
            "counter",
            "kizu_scrapes_refused",
            "Askers who did not get this page.",
            _labels(reason=SCRAPE_REFUSALS),
        ),
    ),
    "Model and engine": (
        Series(
            "gauge",
            "kizu_build_info",
            "Always 1; the line and the program that runs it.",
            _labels(line="the configured line", version="of kizu", python="of the interpreter"),
        ),
        Series(
            "gauge",
            "kizu_model_info",
            "Always 1; the bundle.",
            _labels(
                model_id="the running bundle's",
                name="the running bundle's",
                method="the running bundle's",
                preset="the running bundle's",
                certified=("true", "false"),
            ),
        ),
        Series(
            "gauge",
            "kizu_engine_info",
            "Always 1; what runs the graph.",
            _labels(backend="the engine's", version="the engine's", device="the engine's"),
        ),
        Series("counter", "kizu_engine_failures", "Batches that the engine failed."),
        Series("counter", "kizu_engine_reopens", "Times the engine was opened again."),
        Series(
            "counter",
            "kizu_engine_fallbacks",
            "Times the CPU took the GPU's place.",
            _labels(reason=DEVICE_REASONS),
        ),
        Series("gauge", "kizu_engine_substitute", "1 while the CPU runs the graph in place of the configured GPU."),
        Series("counter", "kizu_tiles", "Tiles, or whole frames, that a coarse graph looked at first."),
        Series("counter", "kizu_tiles_refined", "Those of kizu_tiles_total that were computed densely."),
    ),
    "The daemon itself": (
        Series("gauge", "kizu_state", "1 for the daemon's present state.", _labels(state=STATES)),
        Series(
            "counter",
            "kizu_thread_crashes",
            "Threads that ended by an unforeseen error; must stay 0.",
            _labels(thread=("source", "inference", "verdict", "deadlines")),
        ),
    ),
    "GPU": (
        Series("gauge", "kizu_gpu_memory_used_bytes", "Memory in use, by all processes.", _labels(gpu="its number")),
        Series("gauge", "kizu_gpu_memory_size_bytes", "All of its memory.", _labels(gpu="its number")),
        Series(
            "gauge",
            "kizu_gpu_utilization_ratio",
            "Share of the last sample period, up to a second, in which a kernel ran.",
            _labels(gpu="its number"),
        ),
    ),
})  # fmt: skip
"""By the heading under which the page lists them."""

SERIES: Final[Mapping[str, Series]] = MappingProxyType({one.name: one for group in GROUPS.values() for one in group})
"""By name."""
