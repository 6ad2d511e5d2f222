"""What a calibrated camera costs: the flat field against NumPy's, and measuring a region against the whole frame.

The flat field's two forms give the same bytes; rounds alternate in one process, medians. Measuring is one region of
200 x 3 px through a distorting lens, with length, area and center; remapping is cv2.remap of the frame, the way not
taken. Prints one JSON object; run with `python benchmarks/camera.py [--rounds N]`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np

from edge.camera import CameraCalibration, Lens, Plane, distorted
from edge.images import cv2
from edge.masks import RunLength
from edge.stages.flatfield import FlatField
from edge.stages.measure import Measure
from edge.types import DefectRegion

HEIGHT, WIDTH = 1024, 1280
LENS = Lens((1040.0, 1030.0, 650.0, 500.0), (-0.21, 0.06, 0.0012, -0.0008, 0.0), 0.1, 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (HEIGHT, WIDTH, 1), dtype=np.uint8)
    gain = rng.uniform(0.8, 1.6, image.shape).astype(np.float32)
    dark = rng.uniform(0, 12, image.shape).astype(np.float32)
    flat = FlatField(gain, dark)
    camera = CameraCalibration("id", (HEIGHT, WIDTH), lens=LENS, plane=Plane((0.05, 0, 0, 0, 0.05, 0, 0, 0, 1)))
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[500:503, 900:1100] = True
    runs = RunLength.from_mask(mask)
    region, measure = DefectRegion(runs.box_xyxy, runs.area_px, 1.0, runs), Measure(camera)
    grid = np.stack(np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5), axis=-1).reshape(-1, 2)
    where = (distorted(grid, LENS) - 0.5).astype(np.float32).reshape(HEIGHT, WIDTH, 2)

    def by_numpy() -> np.ndarray:
        return np.clip(np.rint((image.astype(np.float32) - dark) * gain), 0, 255).astype(np.uint8)

    assert np.array_equal(flat(image), by_numpy())
    ms = _medians(
        rounds,
        {
            "flat": lambda: flat(image),
            "numpy": by_numpy,
            "measure": lambda: measure.measured(region),
            "remap": lambda: cv2.remap(image, where, None, cv2.INTER_LINEAR),
        },
    )
    print(
        json.dumps(
            {
                "frame": [HEIGHT, WIDTH],
                "ratio": ms["numpy"] / ms["flat"],
                "measure_to_remap": ms["remap"] / ms["measure"],
                "ms": ms,
                "machine": platform.processor() or platform.machine(),
            }
        )
    )


def _medians(rounds: int, what: dict[str, Callable[[], object]]) -> dict[str, float]:
    took: dict[str, list[float]] = {name: [] for name in what}
    for _ in range(rounds):
        for name, work in what.items():
            started = time.perf_counter()
            work()
            took[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(times) for name, times in took.items()}


if __name__ == "__main__":
    main()
