"""`kizu rescore EVENT_ID CONFIG`: score a recorded frame again, through the line's own pipeline, and compare."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import quote

import typer

from edge.errors import CommandError, EndOfStream, KizuError, LogError

if TYPE_CHECKING:
    from edge.config import EdgeConfig
    from edge.events import DefectEvent
    from edge.types import Frame

# What may differ between two looks at one frame: when, and where it stands in the log.
_NOT_COMPARED: Final = frozenset({"decided_ns", "latency_ns", "log_epoch", "log_sequence", "line"})
_WAIT_S: Final = 120.0


def rescore(
    event_id: Annotated[str, typer.Argument(help="CAMERA/EPOCH/SEQUENCE, an event's `id`.")],
    config: Annotated[Path, typer.Argument(help="The line's TOML file: it names the log and the bundle.")],
) -> None:
    """Score the frame of a rejected part again and say "identical", or what differs (exit status 1).

    Raises:
        CommandError: no such event, or its frame is not kept (any more).
        ConfigError, BundleError, EngineError: the line cannot be opened.
        KizuError: the answer differs.
    """
    from edge.config import load_config

    loaded = load_config(config)
    logged, mask = _find(event_id, Path(loaded.log.path))
    again, mask_again = _judge(loaded, config, _frame(logged, Path(loaded.log.path)))
    found = differences(logged, again)
    if mask != mask_again:
        found.append("mask: the pixels differ")
    if found:
        raise KizuError(f"event {event_id} differs from what was logged:\n  " + "\n  ".join(found))
    typer.echo(
        f"identical: {again.decision}, score {again.score}, {len(again.regions)} regions, model {again.model_id}"
    )


def differences(logged: DefectEvent, again: DefectEvent) -> list[str]:
    """Each field that differs, as `name: logged ..., now ...`."""
    return [
        f"{name}: logged {getattr(logged, name)!r}, now {getattr(again, name)!r}"
        for name in logged.__struct_fields__
        if name not in _NOT_COMPARED and getattr(logged, name) != getattr(again, name)
    ]


def _find(event_id: str, log: Path) -> tuple[DefectEvent, bytes | None]:
    from edge.wire import decode_event

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
    from edge.wire import NAME

    camera, epoch, sequence = (*event_id.split("/"), "", "")[:3]
    if not NAME.fullmatch(camera) or not epoch.isdecimal() or not sequence.isdecimal() or event_id.count("/") != 2:
        raise CommandError(f"event id {event_id!r}: expected CAMERA/EPOCH/SEQUENCE, an event's `id`")
    return camera, int(epoch), int(sequence)


def _frame(event: DefectEvent, log: Path) -> Frame:
    from edge.images import read_image
    from edge.sinks.rejects import frame_path, rejects_folder
    from edge.types import Frame, FrameId

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


def _judge(config: EdgeConfig, where: Path, frame: Frame) -> tuple[DefectEvent, bytes | None]:
    """The line's pipeline on this one frame."""
    from prometheus_client import CollectorRegistry

    from edge import daemon
    from edge.bundle import open_bundle
    from edge.clock import SystemClock
    from edge.metrics import Metrics
    from edge.opening import EngineOpener
    from edge.pipeline import Pipeline

    bundle, clock, answer = open_bundle(Path(config.bundle)), SystemClock(), _Answer()
    opener = EngineOpener(config, bundle)
    pipeline = Pipeline(
        source=_OneFrame(frame),
        engine=opener.open(),
        open_engine=opener.open,
        stages=daemon.make_stages(config, bundle, where),
        log=answer,
        publisher=answer,
        metrics=Metrics(CollectorRegistry(), [frame.id.camera], clock),
        clock=clock,
        capacity=1,
        max_batch=config.batching.max_batch,
        max_wait_ms=0.0,
        warn=lambda text, fields: typer.echo(f"{text}: {dict(fields)}", err=True),
    )
    pipeline.start()
    answer.there.wait(_WAIT_S)
    pipeline.stop(daemon.STOP_TIMEOUT_S)
    if answer.found is None:
        raise KizuError(f"the frame got no verdict: {pipeline.failure or f'none within {_WAIT_S:.0f} s'}")
    return answer.found
