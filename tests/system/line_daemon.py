"""A daemon in a process of its own, for the kill tests; with `--plant ORDER` one whose log works in a wrong order.

    python line_daemon.py CONFIG.toml [--plant publish-first|ack-first|goes-on|deaf] [--stop-at N]

`--stop-at N` makes its log's writer stand still at its N-th group: in the right order between the commit and what is
told about it, in a wrong one between what is told and the commit. The file `between` beside the configuration says so.
"""

from __future__ import annotations

import sqlite3
import sys
import threading
from pathlib import Path
from typing import Any

from edge import daemon, sockets
from edge.config import load_config
from edge.errors import KizuError
from edge.sinks import event_log
from edge.sinks.event_log import EventLog

STOP_AT = int(sys.argv[sys.argv.index("--stop-at") + 1]) if "--stop-at" in sys.argv else 0
PLANTED = sys.argv[sys.argv.index("--plant") + 1] if "--plant" in sys.argv else ""
groups = 0


def stand_still() -> None:
    global groups
    groups += 1
    if groups == STOP_AT:
        Path(sys.argv[1]).with_name("between").touch()
        threading.Event().wait()  # until the SIGKILL


class RightOrder(EventLog):
    """The product's order, with the moment in between."""

    def _report(self, items: Any, answers: Any) -> None:
        stand_still()
        super()._report(items, answers)


class ToldFirst(EventLog):
    """Planted: publishes or acknowledges what is not committed yet."""

    def _insert(self, entry: Any, log_sequence: int) -> Any:
        event = super()._insert(entry, log_sequence)
        pipeline, mask_png = entry.on_commit.func.__self__, entry.mask_png
        if PLANTED == "publish-first":
            pipeline._publisher.publish(event, mask_png)
        else:
            pipeline._source.acknowledge([(event.camera, event.camera_epoch, event.frame_sequence)])
        stand_still()
        return event


class GoesOn(EventLog):
    """Planted: acknowledges what could not be committed."""

    def _commit(self, items: Any) -> Any:
        try:
            return super()._commit(items)
        except sqlite3.Error:
            return [item.event for item in items]


KINDS: dict[str, type[EventLog]] = {"": RightOrder, "goes-on": GoesOn, "deaf": RightOrder}

if __name__ == "__main__":
    if PLANTED == "deaf":  # no heartbeats: a cut network is not noticed
        sockets.HEARTBEAT_IVL_MS = 0  # type: ignore[misc]
    event_log.EventLog = KINDS.get(PLANTED, ToldFirst)  # type: ignore[misc]
    daemon.configure_logging()
    stop = daemon.StopRequest()
    path = Path(sys.argv[1])
    try:
        with daemon.stopping_on_signals(stop):
            daemon.serve(load_config(path), path, stop)
    except KizuError as error:  # as `kizu run` ends
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
