"""A recorded frame scored again, through the line's own pipeline, and compared with what was logged.

Owns finding the event and its frame, and the run of one frame; nothing is written and no port is opened. What is shown
is `commands.rescore`'s and the console's.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from prometheus_client import CollectorRegistry

from edge.bundle import open_bundle
from edge.clock import SystemClock
from edge.config import EdgeConfig
from edge.daemon import STOP_TIMEOUT_S
from edge.errors import CommandError, EndOfStream, KizuError, LogError
from edge.events import DefectEvent
from edge.images import read_image
from edge.line_stages import make_stages
from edge.metrics import Metrics
from edge.opening import EngineOpener
from edge.pipeline import Pipeline
from edge.sinks.rejects import frame_path, rejects_folder
from edge.stages.segment import Segment
from edge.types import AnomalyMap, DefectRegion, Frame, FrameId
from edge.wire import NAME, decode_event

Warn = Callable[[str], None]

# What may differ between two looks at one frame: when, where it stands in the log, and whether the certificate held
# then, which other parts decided. A bundle with another certificate is another `model_id`.
_NOT_COMPARED: Final = frozenset({"decided_ns", "latency_ns", "log_epoch", "log_sequence", "line", "certified"})
_WAIT_S: Final = 120.0


@dataclass(frozen=True, slots=True, eq=False)
class Rescored:
    """Both answers, what differs between them (empty: identical), and the map that the second stands on.

    `anomaly_map` is None where the model gave none: the verdict is INCONCLUSIVE.
    """

    logged: DefectEvent
    again: DefectEvent
    differences: list[str]
    anomaly_map: AnomalyMap | None


def rescore_event(event_id: str, config: EdgeConfig, where: Path, warn: Warn = lambda text: None) -> Rescored:
    """Score the frame of event `event_id` (CAMERA/EPOCH/SEQUENCE) again; `where` is the configuration's path.

    Raises:
        CommandError: no such event, or its frame is not kept (any more).
        ConfigError, BundleError, EngineError: the line cannot be opened.
        KizuError: the frame got no verdict.
    """
    log = Path(config.log.path)
    logged, mask = _find(event_id, log)
    again, mask_again, maps = _judge(config, where, _frame(logged, log), warn)
    found = differences(logged, again)
    if mask != mask_again:
        found.append("mask: the pixels differ")
    return Rescored(logged, again, found, maps[-1] if maps else None)


def differences(logged: DefectEvent, again: DefectEvent) -> list[str]:
    """Each field that differs, as `name: logged ..., now ...`."""
    return [
        f"{name}: logged {getattr(logged, name)!r}, now {getattr(again, name)!r}"
        for name in logged.__struct_fields__
        if name not in _NOT_COMPARED and getattr(logged, name) != getattr(again, name)
    ]


def _find(event_id: str, log: Path) -> tuple[DefectEvent, bytes | None]:
    camera, epoch, sequence = _parse(event_id)
    if not log.is_file():
        raise CommandError(f"event log {log} does not exist; has this line ever run?")
    connection = sqlite3.connect(f"file:{quote(str(log))}?mode=ro", uri=True, timeout=5.0)
    try:
        found = connection.execute(
            "SELECT event, mask FROM events WHERE camera = ? AND camera_epoch = ? AND frame_sequence = ?",
            (camera, epoch, sequence),
        ).fetchone()
    except sqlite3.Error as error:
        raise LogError(f"event log {log}: cannot be read: {error}") from None
    finally:
        connection.close()
    if found is None:
        raise CommandError(f"event {event_id} is not in {log}; `kizu log export` lists what is")
    return decode_event(found[0]), found[1]


def _parse(event_id: str) -> tuple[str, int, int]:
    camera, epoch, sequence = (*event_id.split("/"), "", "")[:3]
    if not NAME.fullmatch(camera) or not epoch.isdecimal() or not sequence.isdecimal() or event_id.count("/") != 2:
        raise CommandError(f"event id {event_id!r}: expected CAMERA/EPOCH/SEQUENCE, an event's `id`")
    return camera, int(epoch), int(sequence)


def _frame(event: DefectEvent, log: Path) -> Frame:
    file = frame_path(rejects_folder(log), event.camera, event.camera_epoch, event.frame_sequence)
    if not file.is_file():
        why = (
            f"the newest rejected frames are kept in {rejects_folder(log)}; see log.rejects_bytes and log.rejects_count"
            if event.decision == "reject"
            else f"only rejected parts' frames are kept, this one was {event.decision}"
        )
        raise CommandError(f"the frame of event {event.id} is not there: {why}")
    frame_id = FrameId(event.camera, event.camera_epoch, event.frame_sequence, event.captured_ns)
    return Frame(frame_id, read_image(file), 0, event.part_id)


class _OneFrame:
    """A source of one frame."""

    def __init__(self, frame: Frame) -> None:
        self._frames = [frame]

    def read(self, timeout_s: float) -> Frame:
        if not self._frames:
            raise EndOfStream("the frame was read")
        return self._frames.pop()

    def service(self) -> None: ...
    def acknowledge(self, keys: Iterable[tuple[str, int, int]]) -> None: ...
    def close(self) -> None: ...


class _Answer:
    """In the log's place: keeps the one event; nothing is written anywhere."""

    def __init__(self) -> None:
        self.found: tuple[DefectEvent, bytes | None] | None = None
        self.there = threading.Event()

    def append(
        self, event: DefectEvent, mask_png: bytes | None = None, on_commit: Callable[[Any], None] | None = None
    ) -> None:
        self.found = (event, mask_png)
        if on_commit is not None:
            on_commit(event)
        self.there.set()

    def flush(self, timeout_s: float) -> None: ...
    def publish(self, event: DefectEvent, mask_png: bytes | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class _Keeping(Segment):
    """The line's segmentation, which also keeps each map that passes."""

    maps: list[AnomalyMap] = field(default_factory=list)

    def __call__(self, anomaly_map: AnomalyMap, frame_size: tuple[int, int]) -> tuple[DefectRegion, ...]:
        self.maps.append(anomaly_map)
        # Not super(): a dataclass with slots is another class than the one that `super` remembers.
        return Segment.__call__(self, anomaly_map, frame_size)


def _judge(
    config: EdgeConfig, where: Path, frame: Frame, warn: Warn
) -> tuple[DefectEvent, bytes | None, list[AnomalyMap]]:
    """The line's pipeline on this one frame."""
    bundle, clock, answer = open_bundle(Path(config.bundle)), SystemClock(), _Answer()
    stages = make_stages(config, bundle, where)
    opener = EngineOpener(config, bundle, fields=stages.fields)
    keeping = _Keeping(stages.segment.pixel_threshold, stages.segment.min_area_px)
    pipeline = Pipeline(
        source=_OneFrame(frame),
        engine=opener.open(),
        open_engine=opener.open,
        stages=replace(stages, segment=keeping),
        log=answer,
        publisher=answer,
        metrics=Metrics(CollectorRegistry(), [frame.id.camera], clock),
        clock=clock,
        capacity=1,
        max_batch=config.batching.max_batch,
        max_wait_ms=0.0,
        warn=lambda text, fields: warn(f"{text}: {dict(fields)}"),
    )
    pipeline.start()
    answer.there.wait(_WAIT_S)
    pipeline.stop(STOP_TIMEOUT_S)
    if answer.found is None:
        raise KizuError(f"the frame got no verdict: {pipeline.failure or f'none within {_WAIT_S:.0f} s'}")
    return (*answer.found, keeping.maps)
