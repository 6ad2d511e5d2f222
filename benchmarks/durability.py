"""What does durability cost? Events a second through the event log, and what its commit adds to a verdict.

    python benchmarks/durability.py [--events 20000] [--rate 50] [--folder DIR]

First as many events as the log takes, in groups that form by themselves, against one commit for each event (the ratio).
Then events at the rate of a line, one at a time: from the verdict's hand-over to its durable report, which is what
durability adds. Prints one JSON object; the folder decides which disk is measured, and a bare fsync there is timed too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests" / "helpers"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from edge.clock import SystemClock  # noqa: E402
from edge.errors import SinkFull  # noqa: E402
from edge.images import encode_mask_png  # noqa: E402
from edge.sinks.event_log import EventLog  # noqa: E402
from sample_events import sample_event  # noqa: E402

WANTED_PER_S = 5000
WANTED_P50_MS = 10.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(json.dumps(measure(Path(folder), options.events, options.rate), indent=2))


def measure(folder: Path, events: int, rate: float) -> dict[str, Any]:
    """See the module's docstring."""
    grouped, sizes = throughput(folder / "grouped.db", events, 128)
    single, _ = throughput(folder / "single.db", events // 10, 1)
    added = latencies_ms(folder / "paced.db", rate, 300)
    return {
        "events": events,
        "durable_events_per_s": round(grouped),
        "wanted_events_per_s": WANTED_PER_S,
        "one_commit_each_events_per_s": round(single),
        "ratio_to_one_commit_each": round(grouped / single, 2),
        "mean_group": round(float(np.mean(sizes)), 1),
        "added_p50_ms": round(float(np.percentile(added, 50)), 2),
        "added_p99_ms": round(float(np.percentile(added, 99)), 2),
        "wanted_added_p50_ms": WANTED_P50_MS,
        "bare_fsync_p50_ms": round(float(np.percentile(fsyncs_ms(folder / "bare"), 50)), 2),
        "cores": os.cpu_count(),
    }


def throughput(path: Path, events: int, group: int) -> tuple[float, list[int]]:
    """Durable events per second, and the sizes of the groups."""
    sizes: list[int] = []
    mask = encode_mask_png(np.eye(480, 640, dtype=bool))
    made = [sample_event(number, decision="reject", mask="inline") for number in range(events)]
    with EventLog(path, SystemClock(), group_events=group, on_group=lambda count, _: sizes.append(count)) as log:
        start = time.monotonic()
        for number, event in enumerate(made):
            while True:
                try:
                    log.append(event, mask if number % 20 == 0 else None)
                    break
                except SinkFull:
                    time.sleep(0.0005)
        log.flush(600)
        elapsed = time.monotonic() - start
        assert log.verify() == events
    return events / elapsed, sizes


def latencies_ms(path: Path, rate: float, count: int) -> list[float]:
    """Hand-over to durable report, at `rate` events a second."""
    taken: list[float] = []
    with EventLog(path, SystemClock()) as log:
        for number in range(count):
            start = time.monotonic()
            log.append(
                sample_event(number), None, lambda _, start=start: taken.append((time.monotonic() - start) * 1e3)
            )
            time.sleep(1 / rate)
        log.flush(60)
    return taken


def fsyncs_ms(path: Path, count: int = 100) -> list[float]:
    """What the disk takes for 4 KiB and an fsync."""
    taken = []
    with path.open("wb", buffering=0) as file:
        for _ in range(count):
            start = time.monotonic()
            file.write(b"x" * 4096)
            os.fsync(file.fileno())
            taken.append((time.monotonic() - start) * 1e3)
    return taken


if __name__ == "__main__":
    main()
