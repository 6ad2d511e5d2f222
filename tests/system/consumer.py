"""A registered subscriber in a process of its own: writes each event down once, then commits; goes on after a kill.

python consumer.py EVENTS_ADDRESS REPLAY_ADDRESS NAME FILE
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from edge.client import Subscriber
from edge.errors import SourceTimeout

if __name__ == "__main__":
    events, replay, name, file = sys.argv[1:]
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    # Killed between writing and committing, the daemon gives some events again; the place written down tells them.
    last = tuple(map(int, lines[-1].split()[:2])) if lines else (0, 0)
    written = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with Subscriber(events, replay=replay, name=name, since="beginning") as subscriber:
        while True:
            try:
                event, _ = subscriber.receive(1.0)
            except SourceTimeout:
                continue
            if event.log_epoch == last[0] and event.log_sequence <= last[1]:
                continue
            os.write(written, f"{event.log_epoch} {event.log_sequence} {event.id}\n".encode())
            if event.log_sequence % 16 == 0:
                with contextlib.suppress(SourceTimeout):
                    subscriber.commit(0.5)
