"""What runs in the virtual machine of `power_cut.py`: looks at what the log holds, then appends until the power goes.

    python power_guest.py LOG FIRST [--normal]

Prints `holds FIRST LAST` for each run of frames that the log has, `sound COUNT`, then `acked N` for each frame once it
is durable. `--normal` is the planted fault: SQLite's `synchronous=NORMAL`, which does not sync the log at a commit.
"""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path

# The log decodes no picture; OpenCV would be three quarters of the machine's memory.
sys.modules.setdefault("cv2", types.ModuleType("cv2"))

from edge.clock import SystemClock  # noqa: E402
from edge.errors import KizuError, SinkFull  # noqa: E402
from edge.events import DefectEvent  # noqa: E402
from edge.sinks.event_log import EventLog  # noqa: E402
from sample_events import sample_event  # noqa: E402


def runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, last)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def normal(log: EventLog) -> None:
    """The planted fault, on the writer's connection, before it writes anything."""
    log._connection.execute("PRAGMA synchronous = NORMAL")


def acknowledge(event: DefectEvent) -> None:
    """What the daemon would tell the camera at this point."""
    print("acked", event.frame_sequence, flush=True)


def work(path: Path, first: int, count: int | None, faulty: bool) -> None:
    with EventLog(path, SystemClock(), capacity=64) as log:
        if faulty:
            normal(log)
        rows = log.verify()
        for run in runs(sorted(event.frame_sequence for event, _ in log.read_since(0, 10**9))):
            print("holds", *run, flush=True)
        print("sound", rows, flush=True)
        number = first
        while count is None or number < first + count:
            try:
                log.append(sample_event(number), b"m" * 200, acknowledge)
                number += 1
            except SinkFull:
                time.sleep(0.005)


def needed() -> dict[str, list[str]]:
    """The files that this process has loaded: the virtual machine gets these and no others."""
    modules = {getattr(module, "__file__", None) for module in sys.modules.values()}
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    libraries = {words[5] for words in maps if len(words) == 6 and words[5].startswith("/")}
    found = {str(Path(name).resolve()) for name in {*modules, *libraries} if name and Path(name).is_file()}
    return {"files": sorted(found), "libraries": sorted(libraries), "path": [one for one in sys.path if one]}


if __name__ == "__main__":
    try:
        if "--needed" in sys.argv:
            work(Path(sys.argv[1]), 0, 10, False)
            print(json.dumps(needed()))
        else:
            work(Path(sys.argv[1]), int(sys.argv[2]), None, "--normal" in sys.argv)
    except KizuError as error:
        print("failed", error, flush=True)
