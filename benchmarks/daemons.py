"""What the daemon's benchmarks share: bundles to run, and cameras in processes of their own.

Everything runs over real sockets through `edge.demo.line`, exactly as `kizu run` does it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from edge.bundle import (  # noqa: E402
    Golden,
    InputSpec,
    MapGeometry,
    ModelBundle,
    ScoreCalibration,
    Tolerance,
    write_bundle,
)

LINE_MAP = MapGeometry(height=57, width=57, stride=4.0, offset_y=15.5, offset_x=15.5)


def line_bundle(path: Path, channels: int = 3, model: bytes | None = None, threshold: float = 1e9) -> ModelBundle:
    """A bundle of the `line` shape with random weights; nothing is over the thresholds unless asked."""
    from benchmarks.line_graph import line_model

    spec = InputSpec(256, 256, 3 if channels == 3 else 1, max_batch=8)
    model = line_model() if model is None else model
    frames = np.random.default_rng(0).integers(0, 256, (2, 256, 256, channels), np.uint8)
    calibration = ScoreCalibration("provisional", False, threshold, threshold, 4, (0.0, 1.0), "none", "0" * 64)
    golden = Golden(frames, np.zeros((2, 57, 57), np.float32), np.zeros(2, np.float32))
    if channels == 3:
        import onnxruntime

        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        maps, scores = session.run(["anomaly_map", "image_score"], {"frames": frames})
        golden = Golden(frames, maps, scores)
    return write_bundle(
        path,
        name="benchmark",
        method="none",
        preset="line",
        input=spec,
        map=LINE_MAP,
        tolerance=Tolerance(1e-3, 1e-3),
        model=model,
        golden=golden,
        calibration=calibration,
        provenance={"made_by": "benchmarks"},
    )


def noise(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The frame that benchmarks send where none is given, (h, w, C)."""
    return np.random.default_rng(1).integers(100, 156, shape, np.uint8)


def send_frames(
    address: str, camera: str, shape: tuple[int, ...], count: int, window: int, report: Any, file: Path | None
) -> None:
    """A camera's process: `count` raw frames as fast as credits allow; puts (first sent, last acknowledged, left)."""
    from edge.images import read_image
    from edge.sender import CameraSender

    image = noise(shape) if file is None else read_image(file)
    payload = image.tobytes()
    encoding = "mono8" if shape[-1] == 1 else "rgb8"
    with CameraSender(address, camera, window=window) as sender:
        start = time.monotonic()
        for _ in range(count):
            sender.send_encoded(payload, encoding, shape[1], shape[0], timeout_s=60.0)
        left = sender.drain(60.0)
        report.put((start, time.monotonic(), left))


@contextmanager
def cameras(
    address: str, names: list[str], shape: tuple[int, ...], count: int, window: int = 8, file: Path | None = None
) -> Iterator[list[tuple[float, float, int]]]:
    """Run one camera process per name to its end; the list is filled when the block begins.

    Frames are ``file``, an image of ``shape``, or noise of it.
    """
    spawn = multiprocessing.get_context("spawn")  # never fork a process that has threads
    report = spawn.Queue()
    processes = [
        spawn.Process(target=send_frames, args=(address, name, shape, count, window, report, file), daemon=True)
        for name in names
    ]
    for process in processes:
        process.start()
    try:
        yield [report.get(timeout=1800) for _ in processes]
    finally:
        for process in processes:
            process.join(10)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and all its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))


def resident_mb(pid: int) -> float:
    """Resident memory of a process in MB (1e6 bytes)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * float(os.sysconf("SC_PAGE_SIZE")) / 1e6


def scrape(url: str) -> dict[str, float]:
    """Every sample of a metrics page by its name with labels."""
    with urllib.request.urlopen(url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}
