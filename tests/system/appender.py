"""Appends events to the log at argv[1] until it fails; prints each acknowledged sequence, then why it stopped.

With `--lying` a planted log that goes on after a failed commit and says nothing.
"""

from __future__ import annotations

import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from edge.clock import SystemClock
from edge.errors import KizuError, LogError, SinkFull
from edge.sinks.event_log import EventLog
from sample_events import sample_event


class Lying(EventLog):
    def _commit(self, items: Any) -> Any:
        try:
            return super()._commit(items)
        except sqlite3.Error:
            return [item.event for item in items]


if __name__ == "__main__":
    kind = Lying if "--lying" in sys.argv else EventLog
    try:
        log = kind(Path(sys.argv[1]), SystemClock(), group_events=1)
    except KizuError as error:
        print(f"refused: {error}", flush=True)
        sys.exit(error.exit_code)
    for number in range(400):
        try:
            log.append(sample_event(number, detail="x" * 20_000), None, lambda e: print(e.frame_sequence, flush=True))
            log.flush(10)
        except SinkFull:
            time.sleep(0.01)
        except LogError as error:
            print(f"failed: {error}", flush=True)
            sys.exit(1)
    print("failed: never", flush=True)
