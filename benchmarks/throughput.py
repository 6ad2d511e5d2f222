"""Does the daemon keep up with its engine?

    python benchmarks/throughput.py [BUNDLE ...] [--image FILE] [--rounds 5] [--frames 60]

Frames per second of a real daemon, cameras in other processes, against the same engine called in a loop on the same
frames, preprocessed beforehand. Any bundle will do, of whatever method; frames are noise of the size given, or
`--image`, a good part of the bundle's, so that nothing is marked that would not be on a line. Rounds alternate between
the two, so that a machine that slows down slows both; the ratio is the median over the rounds. Prints one JSON object a
bundle; docs/methods/README.md takes those of results/throughput-METHOD.json.
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
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.daemons import cameras, cpu_seconds, line_bundle, noise  # noqa: E402
from edge.bundle import ModelBundle, open_bundle  # noqa: E402
from edge.demo.line import BUNDLE, DaemonProcess, write_config  # noqa: E402
from edge.engines.registry import open_engine  # noqa: E402
from edge.images import read_image  # noqa: E402
from edge.protocols import Engine  # noqa: E402
from edge.stages.preprocess import prepare  # noqa: E402

BOUND = 0.9
MAX_BATCH = 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path, help="default: the demo's, or the `line` graph untrained")
    parser.add_argument("--image", type=Path, help="the frame that cameras send; default: noise")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=60, help="frames of each round, over two cameras")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundles = [open_bundle(path) for path in options.bundles or [BUNDLE] if (path / "bundle.json").exists()]
        if len(bundles) < len(options.bundles):
            parser.error("not every one of these is a bundle")
        for number, bundle in enumerate(bundles or [line_bundle(Path(folder) / "bundle")]):
            place = Path(folder) / f"line{number}"
            place.mkdir()
            image = noise((options.height, options.width, bundle.manifest.input.channels))
            if options.image is not None:
                image = read_image(options.image)
            row = measure(place, bundle, image, options.image, options.rounds, options.frames)
            print(json.dumps(row, indent=2), flush=True)


def measure(
    folder: Path, bundle: ModelBundle, image: NDArray[np.uint8], file: Path | None, rounds: int, frames: int
) -> dict[str, object]:
    """See the module's docstring; ``image`` (h, w, C) is what ``file`` holds, where there is one."""
    shape = image.shape
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
            with cameras(ready["frames_address"], names, shape, frames // 2, file=file) as reports:
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
        "image": None if file is None else file.name,
        "method": bundle.manifest.method,
        "preset": bundle.manifest.preset,
        "model_id": bundle.model_id,
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
