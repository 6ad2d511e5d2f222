"""What does a frame cost the host on the GPU path? Goal: at most 1 core-millisecond.

    python benchmarks/gpu_host.py [BUNDLE] [--frames 400] [--batch 8]

Prints one JSON object. Runs preprocessing, the double-buffered schedule and segmentation on a fake device that computes
nothing: what is left is the host's work, in CPU time of all threads. The fake's own checks of order are in it, so the
figure for `engine` is an upper bound; a real driver's calls are not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from edge import masks  # noqa: E402
from edge.bundle import ModelBundle, open_bundle  # noqa: E402
from edge.engines.fake_device import FakeDevice, FakeProgram  # noqa: E402
from edge.engines.streamed import StreamedEngine  # noqa: E402
from edge.engines.tensorrt import spec_of  # noqa: E402
from edge.stages.infer import to_map  # noqa: E402
from edge.stages.preprocess import Preprocess  # noqa: E402
from edge.stages.segment import Segment  # noqa: E402
from edge.types import Frame, FrameId  # noqa: E402

GOAL_MS = 1.0


def still_engine(bundle: ModelBundle, batch: int) -> StreamedEngine:
    """The schedule over a device whose graph gives the first golden answer for every frame."""
    spec = spec_of(bundle.manifest, "0", "fake device", batch)
    maps = np.repeat(bundle.golden.maps[:1], batch, axis=0)
    scores = np.repeat(bundle.golden.scores[:1], batch)

    def answer(frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return maps[: len(frames)], scores[: len(frames)]

    device = FakeDevice()
    return StreamedEngine(spec, device, FakeProgram(device, spec, answer, fail_at=frozenset()))


def cpu_ms(work: Callable[[], object], frames: int, rounds: int = 7) -> float:
    """CPU milliseconds for each of `frames`, the median of rounds."""
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        taken.append((time.process_time() - started) * 1e3 / frames)
    return statistics.median(taken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, default=ROOT / "edge" / "demo" / "bundle")
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    bundle = open_bundle(given.bundle)
    manifest, calibration = bundle.manifest, bundle.calibration
    batch = min(given.batch, manifest.input.max_batch)
    masks.warm()
    preprocess = Preprocess(manifest.input, None)
    segment = Segment(calibration.pixel_threshold, max(1, calibration.min_area_px))
    image = bundle.golden.frames[0]
    frame = Frame(FrameId("cam", 1, 0, 0), image, 0)
    taken = preprocess(frame)
    score, cells = float(bundle.golden.scores[0]), bundle.golden.maps[0]
    pixels = np.repeat(image[None], batch, axis=0)

    def stream() -> None:
        out = 0
        for _ in range(given.frames // batch):
            if out == engine.spec.depth:
                engine.collect(10.0)
                out -= 1
            engine.submit(pixels)
            out += 1
        for _ in range(out):
            engine.collect(10.0)

    def judge() -> None:
        for _ in range(given.frames):
            segment(to_map(taken, cells, score, manifest.map), (image.shape[0], image.shape[1]))

    with still_engine(bundle, batch) as engine:
        stream()
        judge()
        parts = {
            "preprocess": cpu_ms(lambda: [preprocess(frame) for _ in range(given.frames)], given.frames),
            "engine": cpu_ms(stream, given.frames // batch * batch),
            "segment": cpu_ms(judge, given.frames),
        }
    total = sum(parts.values())
    report = {
        "benchmark": "gpu_host",
        "model": manifest.name,
        "batch": batch,
        "frame": list(image.shape),
        "core_ms": {name: round(value, 4) for name, value in parts.items()},
        "total_core_ms": round(total, 4),
        "goal_core_ms": GOAL_MS,
        "within_goal": total <= GOAL_MS,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
