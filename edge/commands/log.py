"""`kizu log ACTION PATH`: look at an event log: is it sound, what does it hold, and its events for other programs."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from edge.errors import CommandError, LogError

if TYPE_CHECKING:
    from edge.events import DefectEvent


class Action(StrEnum):
    """What is done with the log."""

    VERIFY = "verify"
    EXPORT = "export"
    STATS = "stats"
    FORGET = "forget"


def log(
    action: Annotated[
        Action, typer.Argument(help="verify, export (JSON lines on stdout), stats (one JSON object) or forget.")
    ],
    path: Annotated[
        Path,
        typer.Argument(help="The event log's SQLite file; the daemon may be running. forget: the line's TOML file."),
    ],
    name: Annotated[str | None, typer.Option(help="forget: the registered subscriber whose program is gone.")] = None,
    since: Annotated[int, typer.Option(min=0, help="export: only events after this log sequence.")] = 0,
) -> None:
    """Verify, export or summarize an event log, or forget a subscriber of it; only `forget` writes.

    `export` prints each event as JSON with its mask as `segmentation`, a COCO run-length encoding ({size, counts};
    counts run down the columns, as COCO's do), null where there is no mask.

    `forget CONFIG.toml --name NAME` strikes a registered subscriber that will not come back: its lag is no longer told,
    and nothing is kept for it. One that still runs registers again. The daemon does it if it runs.

    Raises:
        CommandError: there is no event log at PATH, or nobody of that name.
        LogError: the log is damaged; names the first row.
    """
    if action is Action.FORGET:
        _forget(path, name)
        return
    connection = _open(path)
    try:
        if action is Action.EXPORT:
            _export(connection, path, since)
        else:
            _print(_verify(connection, path) if action is Action.VERIFY else _stats(connection, path))
    except (sqlite3.Error, TypeError) as error:
        raise LogError(f"event log {path}: damaged: {error}; see what `kizu log verify` says") from None
    finally:
        connection.close()


def _open(path: Path) -> sqlite3.Connection:
    from edge.sinks.log_file import APPLICATION_ID, BUSY_TIMEOUT_S, SCHEMA_VERSION

    if not path.is_file():
        raise CommandError(f"event log {path} does not exist; name the file of the configuration's log.path")
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None
    )
    try:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.Error as error:
        connection.close()
        raise LogError(f"event log {path}: damaged or no SQLite file: {error}") from None
    if application != APPLICATION_ID:
        connection.close()
        raise CommandError(f"{path} is no event log of kizu; name the file of the configuration's log.path")
    if version != SCHEMA_VERSION:
        connection.close()
        raise CommandError(
            f"event log {path} has schema {version}, this kizu reads {SCHEMA_VERSION}; open it once with `kizu run`"
        )
    return connection


def _verify(connection: sqlite3.Connection, path: Path) -> dict[str, Any]:
    from edge.sinks.log_check import check_log

    return {"log": str(path), "events": check_log(connection, path), "ok": True}


def _stats(connection: sqlite3.Connection, path: Path) -> dict[str, Any]:
    from edge.sinks.retention import used_bytes

    meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    count, head = connection.execute("SELECT COUNT(*), COALESCE(MAX(log_sequence), 0) FROM events").fetchone()
    head = max(head, meta["removed_through"])
    cursors = connection.execute("SELECT name, cursor, seen_ns FROM subscribers ORDER BY name").fetchall()
    failures = connection.execute("SELECT at_ns, head, why FROM failures ORDER BY at_ns").fetchall()
    marks = connection.execute("SELECT camera, camera_epoch, acked_through FROM marks ORDER BY camera").fetchall()
    return {
        "log": str(path),
        "epoch": meta["epoch"],
        "created_ns": meta["created_ns"],
        "events": count,
        "head": head,
        "removed_through": meta["removed_through"],
        "removed_ns": meta["removed_ns"],
        "used_bytes": used_bytes(connection),
        "subscribers": [
            {"name": name, "cursor": cursor, "lag": head - cursor, "seen_ns": seen} for name, cursor, seen in cursors
        ],
        "marks": [{"camera": camera, "epoch": epoch, "acked_through": mark} for camera, epoch, mark in marks],
        "failures": [{"at_ns": at, "head": at_head, "why": why} for at, at_head, why in failures],
    }


def _events(connection: sqlite3.Connection, path: Path, since: int) -> Iterator[tuple[DefectEvent, bytes | None]]:
    from edge.sinks.log_file import checksum_of
    from edge.wire import decode_event

    rows = connection.execute(
        "SELECT log_sequence, event, mask, checksum FROM events WHERE log_sequence > ? ORDER BY log_sequence", (since,)
    )
    for sequence, event, mask, checksum in rows:
        if not isinstance(event, bytes) or checksum_of(sequence, event, mask) != checksum:
            raise LogError(f"event log {path}, log sequence {sequence}: the row was changed after it was written")
        yield decode_event(event), mask


def _export(connection: sqlite3.Connection, path: Path, since: int) -> None:
    import msgspec

    from edge.images import decode_image
    from edge.masks import coco_counts

    try:
        for event, mask_png in _events(connection, path, since):
            line = msgspec.to_builtins(event)
            line["segmentation"] = None
            if mask_png is not None:
                mask = decode_image(mask_png, channels=1)[:, :, 0] > 0
                line["segmentation"] = {"size": list(mask.shape), "counts": coco_counts(mask)}
            sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    except BrokenPipeError:
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115  # the reader went away; Python would complain at exit


def _forget(config_path: Path, name: str | None) -> None:
    """By the running daemon, or, where none listens, in the log itself."""
    from edge.clock import SystemClock
    from edge.config import load_config
    from edge.daemon import default_control_address
    from edge.sinks.event_log import EventLog
    from edge.sinks.forgetting import ask_daemon, forget

    if name is None:
        raise CommandError("forget: say whom with --name; `kizu log stats` lists the registered subscribers")
    config = load_config(config_path)
    told = ask_daemon(config.control_address or default_control_address(config), name)
    if told is None:
        _open(Path(config.log.path)).close()  # a log that is not there is not made
        with EventLog(Path(config.log.path), SystemClock()) as resting:
            told = forget(resting, name)
    if told.was_at is None:
        known = ", ".join(told.registered) or "nobody"
        raise CommandError(f"no subscriber {name!r} is registered in {config.log.path}; registered: {known}")
    typer.echo(f"forgotten: {name}, which had everything through {told.was_at}")


def _print(found: dict[str, Any]) -> None:
    import msgspec

    typer.echo(msgspec.json.encode(found).decode())
