"""One class of CIFAR-10 is normal, the other nine are not: mean image AUROC over classes, against the paper's 0.8196.

Bergmann et al. 2020, table 2: p = 33, five students, teacher with L_k + L_c.  How the 32 x 32 px images reach a 33 px
patch network and how a map becomes one number is not in any text at hand; here they are enlarged to ``--side`` px, and
both the mean and the maximum of e + v over the map are reported.  Subsets of training and test images are drawn by
seed and their sizes printed.  The data are not shipped: a file `cifar10_jpeg.npz` (see the path below).

    python benchmarks/cifar.py --teacher paper-33 --train 1000 --test 2000 --steps 500 [--classes 0,1,2]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from calib.metrics import image_auroc
from trainer.config import StudentTeacherConfig
from trainer.distill import load_teacher
from trainer.loop import run_training
from trainer.method import Frames
from trainer.methods.student_teacher import StudentTeacher

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "cifar10" / "cifar10_jpeg.npz"
PAPER_MEAN = 0.8196
HELD_OUT = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--teacher", default="paper-33")
    parser.add_argument("--classes", default="0,1,2,3,4,5,6,7,8,9")
    parser.add_argument("--train", type=int, default=1000, help="images of the normal class to learn from (of 5,000)")
    parser.add_argument("--test", type=int, default=2000, help="test images, all classes alike (of 10,000)")
    parser.add_argument("--side", type=int, default=64, help="px that an image is enlarged to")
    parser.add_argument("--students", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if not options.data.is_file():
        raise SystemExit(f"{options.data} is not there; give --data")
    train, train_labels, names = images(options.data, "train", options.side)
    test, test_labels, _ = images(options.data, "test", options.side)
    keep = balanced(test_labels, options.test, options.seed)
    test, test_labels = test[keep], test_labels[keep]
    teacher = load_teacher(options.teacher)
    started = time.monotonic()
    rows: dict[str, dict[str, float]] = {}
    for label in map(int, options.classes.split(",")):
        normal = np.random.default_rng([options.seed, label]).permutation(np.flatnonzero(train_labels == label))
        method = StudentTeacher(config_of(options), [teacher], seed=options.seed)
        scores = judged(method, train[normal[: options.train + HELD_OUT]], test, options)
        own = test_labels == label
        rows[names[label]] = {
            how: round(image_auroc(values[own].tolist(), values[~own].tolist()), 4) for how, values in scores.items()
        }
        print(f"cifar: {names[label]} {rows[names[label]]}", file=sys.stderr, flush=True)
    print(json.dumps({
        "benchmark": "cifar10 one-vs-rest", "paper_mean": PAPER_MEAN,
        "mean": {key: round(statistics.mean(row[key] for row in rows.values()), 4) for key in ("mean", "max")},
        "classes": rows, "teacher": {"name": teacher.name, "sha256": teacher.sha256},
        "train_images_a_class": options.train, "held_out": HELD_OUT, "test_images": len(test),
        "side_px": options.side, "students": options.students, "steps": options.steps, "batch": options.batch,
        "precision": options.precision, "seed": options.seed, "seconds": round(time.monotonic() - started),
        "cores": os.cpu_count(), "machine": platform.machine(),
    }))  # fmt: skip


def config_of(options: argparse.Namespace) -> StudentTeacherConfig:
    """The paper's method on small images; rate and length as given."""
    return StudentTeacherConfig(
        preset="cifar", teachers=(options.teacher,), students=options.students, size_px=options.side,
        batch_size=options.batch, max_steps=options.steps, min_steps=options.steps, learning_rate=options.rate,
        decay="cosine", precision=options.precision,
    )  # fmt: skip


def judged(
    method: StudentTeacher, normal: Frames, test: Frames, options: argparse.Namespace
) -> dict[str, NDArray[np.float32]]:
    """Image scores of ``test`` by reduction, after learning from all but the last of ``normal``."""
    learned, held = normal[:-HELD_OUT], normal[-HELD_OUT:]
    method.prepare(learned)
    run_training(method, learned, held, method.config.schedule(len(learned)), seed=options.seed, identity={})
    method.fit_statistics(held)
    scale, fitted = method.scales[0], method.statistics[0]
    maps = scale.maps(test)
    score = sum(((maps[name] - row["mu"]) / row["sigma"]).numpy() for name, row in fitted.items())
    return {"mean": score.mean((1, 2)), "max": score.max((1, 2))}


def images(data: Path, split: str, side: int) -> tuple[Frames, NDArray[np.int64], list[str]]:
    """All images of a split, enlarged (n, side, side, 3) uint8 RGB, their labels, and the classes' names."""
    with np.load(data) as file:
        offsets, jpeg = file[f"{split}_offsets"], file[f"{split}_jpeg"]
        labels, names = file[f"{split}_labels"].astype(np.int64), [str(name) for name in file["classes"]]
    frames = np.empty((len(labels), side, side, 3), np.uint8)
    for i in range(len(labels)):
        small = cv2.cvtColor(cv2.imdecode(jpeg[offsets[i] : offsets[i + 1]], cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        frames[i] = cv2.resize(small, (side, side), interpolation=cv2.INTER_LINEAR)
    return frames, labels, names


def balanced(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Places of ``count`` images, equally many of each class."""
    rng = np.random.default_rng(seed)
    each: list[Any] = [rng.permutation(np.flatnonzero(labels == label))[: count // 10] for label in range(10)]
    return np.sort(np.concatenate(each))


if __name__ == "__main__":
    main()
