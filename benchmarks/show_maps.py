"""Draw e, v and their sum for real flaws, as docs/methods/student-teacher.jpg has them.

Trains a preset with e + v on the shipped photographs (a few minutes for the preset's own steps) and lays the raw maps
over flawed ones: photograph, e, v, score. Each kind of map has one color scale, its largest value on the good
photographs to the left of the scale's middle.

    python benchmarks/show_maps.py --out docs/methods/student-teacher.jpg [--preset line] [--steps 600]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

import edge.demo
from calib.dataset import read_test_set
from edge.bundle import InputSpec
from edge.images import read_image
from edge.stages.infer import map_roi
from edge.stages.preprocess import prepare
from edge.stages.segment import render_map
from edge.types import AnomalyMap, FrameId, Roi
from trainer.config import STUDENT_TEACHER
from trainer.data import load_training_set, split_by_part
from trainer.distill import load_teacher
from trainer.loop import run_training
from trainer.methods.student_teacher import StudentTeacher
from trainer.progress import TerminalReporter

PHOTOS = Path(next(iter(edge.demo.__path__))) / "photos"
SIDE = 256
GAP = 6
HEAD = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="line")
    parser.add_argument("--steps", type=int, default=None, help="default: the preset's")
    parser.add_argument("--flawed", type=int, default=3, help="how many flawed photographs, after one good one")
    options = parser.parse_args()
    config = STUDENT_TEACHER[options.preset]
    found = load_training_set(PHOTOS, size_px=config.size_px, aspect="stretch", skip_bad=False)
    split = split_by_part(found.names, found.file_sha256, share=0.2, seed=1)
    method = StudentTeacher(config, [load_teacher(name) for name in config.teachers], seed=1)
    frames = found.take(split.train)
    method.prepare(frames)
    schedule = config.schedule(len(frames))
    if options.steps is not None:
        schedule = replace(schedule, steps=options.steps)
    with TerminalReporter("training") as report:
        run_training(method, frames, found.take(split.statistics), schedule, seed=1, identity={}, report=report)
    method.fit_statistics(found.take(split.statistics))

    images = read_test_set(PHOTOS)
    shown = [image for image in images if image.is_good][:1] + [image for image in images if not image.is_good]
    spec = InputSpec(config.size_px, config.size_px, 3, max_batch=1)
    rows = [row_of(method, prepare(read_image(image.path), spec)[0]) for image in shown[: 1 + options.flawed]]
    write_sheet(options.out, rows)


def row_of(method: StudentTeacher, pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The photograph and its three maps, (SIDE, SIDE, 3) RGB each."""
    maps, fitted = method.scales[0].maps(pixels[None]), method.statistics[0]
    normalized = {
        name: (maps[name][0].numpy() - row["mu"]) / row["sigma"] for name, row in fitted.items() if name in "ev"
    }
    layers = [*normalized.values(), sum(normalized.values())]
    return [resized(pixels), *(resized(colored(method, np.asarray(one, np.float32), pixels)) for one in layers)]


def colored(method: StudentTeacher, scores: NDArray[np.float32], pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Deviations of good pixels on a logarithmic scale from 0 to 1,000, over the darkened photograph."""
    side = pixels.shape[0]
    whole = Roi(0.0, 0.0, float(side), float(side))
    spec = InputSpec(side, side, 3, max_batch=1)
    roi = map_roi(whole, spec, method.map_geometry(side, side))
    name = FrameId("show", 0, 0, 0)
    rendered = render_map(AnomalyMap(name, scores.copy(), float(scores.max()), roi, whole), (side, side))
    heat = np.clip(np.log10(1 + np.maximum(rendered, 0)) / 3, 0, 1)
    color = cv2.cvtColor(cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    share = np.clip(heat * 1.6, 0.0, 1.0)[..., None]
    return np.asarray(color * share + 0.55 * pixels * (1 - share), np.uint8)


def resized(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8)


def write_sheet(path: Path, rows: list[list[NDArray[np.uint8]]]) -> None:
    """One row a photograph, a head over each column."""
    heads = ("photograph", "e: students miss", "v: students disagree", "score: e + v")
    height, width = HEAD + len(rows) * (SIDE + GAP), len(heads) * (SIDE + GAP) - GAP
    sheet = np.full((height, width, 3), 255, np.uint8)
    for column, head in enumerate(heads):
        x = column * (SIDE + GAP)
        cv2.putText(sheet, head, (x + 2, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (30, 30, 30), 1, cv2.LINE_AA)
        for line, row in enumerate(rows):
            y = HEAD + line * (SIDE + GAP)
            sheet[y : y + SIDE, x : x + SIDE] = row[column]
    cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))


if __name__ == "__main__":
    main()
