"""`kizu watch ADDRESS`: what a line decides, as it decides it: a live table, or JSON lines for other programs."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from edge.errors import CommandError, SourceTimeout, WireError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table

    from edge.client import Received, Start, Subscriber
    from edge.events import DefectEvent

_ROWS: Final = 20
_COLORS: Final = {"accept": "green", "reject": "red", "inconclusive": "yellow"}


def watch(
    address: Annotated[str, typer.Argument(help="Where the daemon publishes, e.g. tcp://127.0.0.1:5551.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as one line of JSON.")] = False,
    camera: Annotated[list[str] | None, typer.Option(help="Only this camera; may be given again.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after this many events.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Write each mask here as CAMERA-EPOCH-SEQUENCE.png.")] = None,
    key: Annotated[Path | None, typer.Option(help="Our secret key file, from `kizu keys subscriber NAME`.")] = None,
    server_key: Annotated[Path | None, typer.Option(help="The daemon's public key file, to go with --key.")] = None,
    replay: Annotated[str | None, typer.Option(help="The daemon's replay address: nothing is missed then.")] = None,
    since: Annotated[
        str, typer.Option(help="With --replay, where to begin: EPOCH:SEQUENCE, beginning, or now.")
    ] = "now",
    name: Annotated[
        str | None, typer.Option(help="With --replay: go on where the subscriber of this name ended.")
    ] = None,
    plain_off_host: Annotated[
        bool, typer.Option("--plain-off-host", help="Listen to another host, on a network that is yours.")
    ] = False,
) -> None:
    """Show events as they come; Ctrl-C ends it. Missed events are counted on stderr.

    Raises:
        CommandError: a camera's name is malformed, or the masks' folder cannot be made.
        ConfigError: the address cannot be used.
    """
    from edge.client import Subscriber
    from edge.keys import client_keys
    from edge.wire import check_name

    try:
        for one in camera or ():
            check_name(one, "--camera")
        if name is not None:
            check_name(name, "--name")
    except WireError as error:
        raise CommandError(str(error)) from None
    if masks is not None:
        try:
            masks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"--masks {masks}: {error.strerror}; name a folder that can be written") from None
    place = _place(since)
    if replay is None and (name is not None or place != "now"):
        raise CommandError("--since and --name ask the log; give its address with --replay")
    keys = client_keys(key, server_key)
    with Subscriber(
        address,
        cameras=camera,
        plain_off_host=plain_off_host,
        keys=keys,
        replay=replay,
        name=name,
        since=place,
    ) as subscriber:
        try:
            if as_json:
                _print_lines(subscriber, count, masks)
            else:
                _show_table(subscriber, count, masks)
        except KeyboardInterrupt:
            pass
        except BrokenPipeError:
            # The reader of our lines went away (`| head`); Python would complain again when it flushes at exit.
            sys.stdout = open("/dev/null", "w")  # noqa: SIM115
        if subscriber.lost or subscriber.refused:
            print(f"{subscriber.lost} events missed, {subscriber.refused} messages refused", file=sys.stderr)


def _place(since: str) -> Start:
    if since == "now":
        return "now"
    if since == "beginning":
        return "beginning"
    epoch, _, sequence = since.partition(":")
    if not (epoch.isdecimal() and sequence.isdecimal()):
        raise CommandError(
            f"--since {since!r}: expected EPOCH:SEQUENCE (an event's log_epoch and log_sequence), now, beginning"
        )
    return int(epoch), int(sequence)


def _events(subscriber: Subscriber, count: int | None, masks: Path | None) -> Iterator[Received | None]:
    """Events as they come, None four times a second while there is none."""
    seen, registered = 0, subscriber.registered
    while count is None or seen < count:
        try:
            event, mask = subscriber.receive(0.25)
        except SourceTimeout:
            yield None
            continue
        seen += 1
        if masks is not None and mask is not None:
            _write_mask(masks, event, mask)
        yield event, mask
        # Only here has the caller printed it.
        if registered:
            with contextlib.suppress(SourceTimeout):
                subscriber.commit(1.0)


def _print_lines(subscriber: Subscriber, count: int | None, masks: Path | None) -> None:
    from edge.wire import encode_event

    for received in _events(subscriber, count, masks):
        if received is not None:
            sys.stdout.write(encode_event(received[0]).decode() + "\n")
            sys.stdout.flush()


def _show_table(subscriber: Subscriber, count: int | None, masks: Path | None) -> None:
    from rich.live import Live

    rows: deque[DefectEvent] = deque(maxlen=_ROWS)
    seen = 0
    with Live(_table(rows, seen, subscriber.lost), refresh_per_second=4) as live:
        for received in _events(subscriber, count, masks):
            if received is not None:
                rows.append(received[0])
                seen += 1
            live.update(_table(rows, seen, subscriber.lost))


def _table(rows: deque[DefectEvent], seen: int, lost: int) -> Table:
    from rich.table import Table

    table = Table(title=f"{seen} events, {lost} missed")
    for name in ("line", "camera", "frame", "decision", "score", "threshold", "regions", "latency ms"):
        table.add_column(name, justify="right" if name in ("frame", "score", "threshold", "latency ms") else "left")
    for event in rows:
        table.add_row(
            event.line,
            event.camera,
            str(event.frame_sequence),
            f"[{_COLORS[event.decision]}]{event.decision}[/]" + (f" {event.reason}" if event.score is None else ""),
            "" if event.score is None else f"{event.score:.3f}",
            "" if event.threshold is None else f"{event.threshold:.3f}",
            ", ".join(f"{region.area_px} px" for region in event.regions[:3]),
            f"{event.latency_ns / 1e6:.1f}",
        )
    return table


def _write_mask(folder: Path, event: DefectEvent, mask: NDArray[np.bool_]) -> None:
    from edge.images import encode_mask_png

    # The three parts of a name are checked or numbers; nothing of what was received can lead out of the folder.
    from edge.wire import check_name

    name = f"{check_name(event.camera, 'camera')}-{event.camera_epoch}-{event.frame_sequence}.png"
    (folder / name).write_bytes(encode_mask_png(mask))
