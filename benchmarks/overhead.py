"""What does everything but the model cost, in core time per frame?

    python benchmarks/overhead.py [--frames 3000] [--cameras 2]

A real daemon with the fake engine, cameras in other processes, raw 640 x 480 mono frames over loopback: transport,
preprocessing, batching, decision, event, durable log, publishing, acknowledging. Prints one JSON object; the figure is
the daemon's process CPU time per frame, less what the fake engine itself takes (measured here, on the same frames).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.daemons import cameras, cpu_seconds, line_bundle, scrape  # noqa: E402
from edge.bundle import ModelBundle  # noqa: E402
from edge.demo.line import DaemonProcess, write_config  # noqa: E402
from edge.engines.registry import open_engine  # noqa: E402

BOUND_CORE_MS = 1.5
SHAPE = (480, 640, 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=3000)
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--window", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), options.frames, options.cameras, options.window), indent=2))


def measure(folder: Path, frames: int, count: int, window: int) -> dict[str, object]:
    """See the module's docstring."""
    bundle = line_bundle(folder / "bundle", channels=1)
    names = [f"cam{index}" for index in range(count)]
    config = write_config(
        folder / "line.toml", bundle.path, names, window=window, engine={"backend": "fake"}, batching={"max_batch": 8}
    )
    engine_ms = fake_engine_ms(bundle)
    with DaemonProcess(config) as daemon:
        ready = daemon.wait_until_ready(30.0)
        with cameras(ready["frames_address"], names, SHAPE, 100, window):
            pass  # the first frames load what is loaded late
        before, start = cpu_seconds(daemon.pid), time.monotonic()
        with cameras(ready["frames_address"], names, SHAPE, frames // count, window) as reports:
            used, wall = cpu_seconds(daemon.pid) - before, time.monotonic() - start
        samples = scrape(ready["metrics_url"])
    judged = sum(value for name, value in samples.items() if name.startswith("kizu_verdicts_total"))
    total = frames // count * count
    core_ms = used / total * 1e3
    active_s = max(last for _, last, _ in reports) - min(first for first, _, _ in reports)
    return {
        "frames": total,
        "judged": int(judged) - 100 * count,
        "left": sum(left for _, _, left in reports),
        "daemon_core_ms_per_frame": round(core_ms, 3),
        "fake_engine_core_ms_per_frame": round(engine_ms, 3),
        "overhead_core_ms_per_frame": round(core_ms - engine_ms, 3),
        "bound_core_ms_per_frame": BOUND_CORE_MS,
        "ratio_to_bound": round((core_ms - engine_ms) / BOUND_CORE_MS, 3),
        "frames_per_s": round(total / active_s, 1),
        "wall_s": round(wall, 2),
        "cores": os.cpu_count(),
    }


def fake_engine_ms(bundle: ModelBundle, rounds: int = 40) -> float:
    """Core milliseconds of the fake engine per frame, in batches of 8."""
    batch = np.random.default_rng(1).integers(100, 156, (8, 256, 256, 1), np.uint8)
    with open_engine(bundle, backend="fake", max_batch=8) as engine:
        engine.infer(batch)
        start = time.process_time()
        for _ in range(rounds):
            engine.infer(batch)
        return (time.process_time() - start) / (rounds * len(batch)) * 1e3


if __name__ == "__main__":
    main()
