"""How much faster is run-based segmentation than cv2.connectedComponentsWithStats, at equal statistics?

Both sides start from the same float32 score map and threshold and end with each region's area, box and peak. OpenCV's
side is its fastest honest form: threshold straight to uint8, label, and read the peaks inside the boxes. `ratio` is
against cv2.connectedComponentsWithStats; `ratio_to_grana` against the one of its algorithms that is faster than the
default on one thread, which only the WithAlgorithm form reaches. Rounds alternate in one process; medians. Prints one
JSON object; run with `python benchmarks/segmentation.py [--rounds N]`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge import masks
from edge.images import cv2
from edge.stages.segment import MAX_REGIONS, Segment, render_map
from edge.types import AnomalyMap, FrameId, Roi

THRESHOLD = 0.5
Region = tuple[int, tuple[int, int, int, int], float]


def blobs(height: int, width: int, count: int, seed: int) -> NDArray[np.float32]:
    """A (height, width) float32 map of `count` blobs 20 to 80 px across over noise below the threshold."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.0, 0.4, (height, width)).astype(np.float32)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for index in range(count):
        center_y, center_x = rng.uniform(50, height - 50), (index + rng.uniform(0.45, 0.55)) * width / count
        radius_y, radius_x = rng.uniform(10, 40, 2)
        distance = ((y - center_y) / radius_y) ** 2 + ((x - center_x) / radius_x) ** 2
        scores = np.where(distance < 1.0, 1.6 - distance + 0.1 * np.sin(y + x), scores).astype(np.float32)
    return scores


def by_runs(scores: NDArray[np.float32]) -> list[Region]:
    """Area, box and peak by `edge.masks` (which also keeps every region's mask)."""
    return [(region.area_px, region.box_xyxy, region.peak) for region in masks.regions(scores, THRESHOLD)]


def by_opencv(algorithm: int) -> Callable[[NDArray[np.float32]], list[Region]]:
    """Area, box and peak by cv2.connectedComponentsWithStats (NumPy thresholds as fast as cv2.compare)."""

    def measure(scores: NDArray[np.float32]) -> list[Region]:
        mask = (scores > THRESHOLD).view(np.uint8)
        count, labels, stats, _ = cv2.connectedComponentsWithStatsWithAlgorithm(mask, 8, cv2.CV_32S, algorithm)
        found = []
        for label in range(1, count):
            left, top, width, height, area = stats[label].tolist()
            part = np.s_[top : top + height, left : left + width]
            peak = float(scores[part][labels[part] == label].max())
            found.append((area, (left, top, left + width, top + height), peak))
        return sorted(found, key=lambda region: -region[0])

    return measure


def interleaved_ms(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median of each contender in milliseconds, the order turning round by round."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 3):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begun = time.perf_counter()
            contenders[name]()
            times[name].append((time.perf_counter() - begun) * 1e3)
    return {name: statistics.median(values[3:]) for name, values in times.items()}


def compare(scores: NDArray[np.float32], rounds: int, threads: int) -> dict[str, Any]:
    """Time the run-based form against every form of OpenCV's with `threads` OpenCV threads (0: its default)."""
    cv2.setNumThreads(threads if threads else -1)
    forms = {"opencv": by_opencv(cv2.CCL_DEFAULT), "opencv_grana": by_opencv(cv2.CCL_GRANA)}
    answer = sorted(by_runs(scores))
    equal = all(sorted(form(scores)) == answer for form in forms.values())
    contenders = {"runs": by_runs} | forms
    medians = interleaved_ms({name: partial(form, scores) for name, form in contenders.items()}, rounds)
    return {
        "equal_statistics": equal,
        "regions": len(answer),
        "median_ms": medians,
        "ratio": medians["opencv"] / medians["runs"],
        "ratio_to_grana": medians["opencv_grana"] / medians["runs"],
    }


def stage(rounds: int) -> dict[str, float]:
    """The segment stage, 57 x 57 map over a 640 x 480 frame: rendering alone, a clean frame, one with a defect."""
    frame_id, size, roi = FrameId("bench", 0, 0, 0), (480, 640), Roi(0.0, 0.0, 640.0, 480.0)
    rng = np.random.default_rng(1)
    clean = rng.uniform(0.0, 0.4, (57, 57)).astype(np.float32)
    flawed = clean.copy()
    flawed[20:24, 30:35] = 1.0
    maps = [AnomalyMap(frame_id, scores, float(scores.max()), roi, roi) for scores in (clean, flawed)]
    segment = Segment(THRESHOLD, 4)
    return interleaved_ms(
        {
            "render_ms": lambda: render_map(maps[1], size),
            "segment_clean_ms": lambda: segment(maps[0], size),
            "segment_defect_ms": lambda: segment(maps[1], size),
        },
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    scores = blobs(1024, 1280, 12, seed=3)
    noise = np.random.default_rng(4).random((1024, 1280), np.float32)
    single = compare(scores, rounds, threads=1)
    many = compare(scores, rounds, threads=0)
    cv2.setNumThreads(1)
    past = interleaved_ms({"fallback": lambda: masks.regions(noise, THRESHOLD, limit=MAX_REGIONS)}, 5)
    report = {
        "question": "segmentation: run-based against cv2.connectedComponentsWithStats, 1280 x 1024, a dozen blobs",
        "ratio": min(single["ratio"], many["ratio"]),
        "target": 10.0,
        "opencv_one_thread": single,
        "opencv_default_threads": many,
        "past_the_run_limit_ms": past["fallback"],
        "stage_640x480": stage(rounds),
        "versions": {"opencv": cv2.__version__, "numpy": np.__version__, "machine": platform.machine()},
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
