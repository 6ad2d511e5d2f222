"""Does the daemon keep up with its engine?

    python benchmarks/throughput.py [BUNDLE] [--rounds 5] [--frames 60]

Frames per second of a real daemon, cameras in other processes, against the same engine called in a loop on the same
frames, preprocessed beforehand. Rounds alternate between the two, so that a machine that slows down slows both; the
ratio is the median over the rounds. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.daemons import cameras, cpu_seconds, line_bundle  # noqa: E402
from edge.bundle import ModelBundle, open_bundle  # noqa: E402
from edge.demo.line import BUNDLE, DaemonProcess, write_config  # noqa: E402
from edge.engines.registry import open_engine  # noqa: E402
from edge.protocols import Engine  # noqa: E402
from edge.stages.preprocess import prepare  # noqa: E402

BOUND = 0.9
MAX_BATCH = 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, default=BUNDLE if (BUNDLE / "bundle.json").exists() else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=60, help="frames of each round, over two cameras")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = open_bundle(options.bundle) if options.bundle else line_bundle(Path(folder) / "bundle")
        shape = (options.height, options.width, bundle.manifest.input.channels)
        print(json.dumps(measure(Path(folder), bundle, shape, options.rounds, options.frames), indent=2))


def measure(
    folder: Path, bundle: ModelBundle, shape: tuple[int, int, int], rounds: int, frames: int
) -> dict[str, object]:
    """See the module's docstring."""
    image = np.random.default_rng(1).integers(100, 156, shape, np.uint8)
    pixels, _ = prepare(image, bundle.manifest.input)
    names = ["cam0", "cam1"]
    config = write_config(folder / "line.toml", bundle.path, names, batching={"max_batch": MAX_BATCH})
    bare, served, bare_core, served_core = [], [], [], []
    with DaemonProcess(config) as daemon, open_engine(bundle, max_batch=MAX_BATCH) as engine:
        ready = daemon.wait_until_ready(60.0)
        engine.warmup()
        bare_fps(engine, pixels, frames)
        for _ in range(rounds):
            before = time.process_time()
            bare.append(bare_fps(engine, pixels, frames))
            bare_core.append((time.process_time() - before) / frames)
            used = cpu_seconds(daemon.pid)
            with cameras(ready["frames_address"], names, shape, frames // 2) as reports:
                first, last = min(start for start, _, _ in reports), max(end for _, end, _ in reports)
            served.append(frames // 2 * 2 / (last - first))
            served_core.append((cpu_seconds(daemon.pid) - used) / (frames // 2 * 2))
    ratios = [mine / other for mine, other in zip(served, bare, strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "bound": BOUND,
        "ratios": [round(ratio, 3) for ratio in ratios],
        "daemon_fps": round(statistics.median(served), 2),
        "bare_engine_fps": round(statistics.median(bare), 2),
        "daemon_core_ms_per_frame": round(statistics.median(served_core) * 1e3, 2),
        "bare_engine_core_ms_per_frame": round(statistics.median(bare_core) * 1e3, 2),
        "core_ratio": round(statistics.median(bare_core) / statistics.median(served_core), 3),
        "frames_per_round": frames,
        "frame": list(shape),
        "bundle": bundle.manifest.name,
        "cores": os.cpu_count(),
    }


def bare_fps(engine: Engine, pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], frames: int) -> float:
    """Frames per second of the engine alone: batches of MAX_BATCH, as many in flight as it keeps."""
    batches = [np.repeat(pixels[None], MAX_BATCH, axis=0) for _ in range(engine.spec.depth)]
    left = frames // MAX_BATCH
    out = 0
    start = time.monotonic()
    while left or out:
        if left and out < engine.spec.depth:
            engine.submit(batches[left % len(batches)])
            left, out = left - 1, out + 1
        else:
            engine.collect(60.0)
            out -= 1
    return frames // MAX_BATCH * MAX_BATCH / (time.monotonic() - start)


if __name__ == "__main__":
    main()
