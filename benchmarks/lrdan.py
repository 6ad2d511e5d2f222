"""One class of MNIST or CIFAR-10 is normal, the other nine are not: image AUROC of LRDAN beside the paper's claim.

Every row of the paper's loss ablation, or only the last, all five losses; every score (A1, A2, A3) of the same weights,
after the last step.  A1 and A2 look through the auxiliary decoder, which learns by the dual loss alone, so rows without
it have A3 only.  MNIST gets 2 px of border; data that are not shipped are read from `mnist.npz`, `cifar10_jpeg.npz`.

    python benchmarks/lrdan.py --data mnist --classes 5,3 --rows irec+adv,+zrec,+center,+dual --steps 600
    python benchmarks/lrdan.py --data cifar10 --classes bird,frog,ship --seeds 1,2 --steps 800
    python benchmarks/lrdan.py --data cifar10 --classes 0..9 --train 4800 --test 10000 --steps 20000    (all of it)

``--validate`` judges by training images of other classes instead: that is where settings may be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from calib.metrics import image_auroc
from trainer.config import override
from trainer.configs.lrdan import PRESETS, LrdanConfig
from trainer.loop import run_training
from trainer.lrdan_graph import Score, differences
from trainer.method import Frames
from trainer.methods.lrdan import Lrdan

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
FILES = {"mnist": SHARED / "mnist" / "mnist.npz", "cifar10": SHARED / "cifar10" / "cifar10_jpeg.npz"}
PRESET = {"mnist": "mnist", "cifar10": "cifar"}
BORDER = 2
HELD_OUT = 200
LOOKS = 6
SCORES: tuple[Score, ...] = ("a1", "a2", "a3")

Found = dict[str, dict[str, list[dict[str, float]]]]
"""Row of the ablation -> class -> one answer a seed."""

WITHOUT = {
    "irec+adv": {"w_z": 0.0, "w_c": 0.0, "w_d": 0.0},
    "+zrec": {"w_c": 0.0, "w_d": 0.0},
    "+center": {"w_d": 0.0},
    "+dual": {},
}
"""Rows of the paper's table 1, each with what it leaves out."""

CLAIMED = {
    "5": (0.59, 0.63, 0.65, 0.99), "3": (0.63, 0.68, 0.70, 0.99),
    "frog": (0.54, 0.58, 0.60, 0.97), "bird": (0.60, 0.61, 0.63, 0.98),
}  # fmt: skip
"""The same table; unreplicated."""

CLAIMED_ALL = {
    "0": 1.0, "1": 1.0, "2": 0.977, "3": 0.989, "4": 0.996, "5": 0.997, "6": 0.996, "7": 0.992, "8": 0.953, "9": 0.987,
    "airplane": 0.995, "automobile": 0.988, "bird": 0.984, "cat": 0.880, "deer": 0.918, "dog": 0.919, "frog": 0.967,
    "horse": 0.895, "ship": 0.943, "truck": 0.997,
}  # fmt: skip
"""All five losses, read off the paper's plot."""


def main() -> None:
    options = _options()
    if not FILES[options.data].is_file():
        raise SystemExit(f"{FILES[options.data]} is not there: this benchmark needs it")
    torch.set_num_threads(options.threads)
    train, labels, names = images(options.data, "train")
    test, test_labels, _ = images(options.data, "test")
    found: Found = {}
    started = time.monotonic()
    for name in names if options.classes == "0..9" else options.classes.split(","):
        own = names.index(name)
        for seed in map(int, options.seeds.split(",")):
            order = np.random.default_rng([seed, own]).permutation(np.flatnonzero(labels == own))
            learned, held = np.split(train[order[: options.train + HELD_OUT]], [options.train])
            judged, bad = (
                (test, test_labels != own) if not options.validate else unseen(train, labels, own, order, options)
            )
            keep = balanced(bad, options.test, seed)
            for row in options.rows.split(","):
                looks = LOOKS if options.validate else 0
                answer = judge(config_of(row, options), seed, learned, held, judged[keep], bad[keep], looks)
                found.setdefault(row, {}).setdefault(name, []).append(answer)
                print(f"lrdan: {name} seed {seed} {row} {answer}", file=sys.stderr, flush=True)
    print(json.dumps({
        "benchmark": f"lrdan {options.data} one-vs-rest", "rows": found, "means": means(found),
        "claimed": claimed(found),
        "judged_by": "training images not learned from" if options.validate else "test images",
        "judged_images": options.test, "train_images": options.train, "config": config_of("+dual", options).to_json(),
        "steps": options.steps, "seeds": options.seeds, "seconds": round(time.monotonic() - started),
        "threads": options.threads, "cores": os.cpu_count(), "machine": platform.machine(),
    }))  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(FILES), default="mnist")
    parser.add_argument("--classes", default="5,3", help="by name, or 0..9 for all ten")
    parser.add_argument("--rows", default="+dual", help=f"of {', '.join(WITHOUT)}")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--train", type=int, default=2000, help="images of the normal class to learn from")
    parser.add_argument(
        "--test", type=int, default=2000, help="images judged, half of them normal if there are as many"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for kizu train")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--validate", action="store_true", help="judge by training images, not by the test split")
    return parser.parse_args()


def config_of(row: str, options: argparse.Namespace) -> LrdanConfig:
    config = override(PRESETS[PRESET[options.data]], options.set)
    left_out: dict[str, Any] = {**WITHOUT[row], **({} if row == "+dual" else {"score": "a3"})}
    return replace(config, min_steps=options.steps, max_steps=options.steps, **left_out)


def judge(
    config: LrdanConfig, seed: int, learned: Frames, held: Frames, judged: Frames, bad: NDArray[np.bool_], looks: int
) -> dict[str, float]:
    """AUROC of every score that there is, after the last step; ``looks`` on the way are printed."""
    method = Lrdan(config, seed=seed)
    method.prepare(learned)
    started = time.process_time()
    scores = SCORES if config.w_d else ("a3",)

    def look(step: int, steps: int, loss: float) -> None:
        if looks and step % max(1, steps // looks) == 0:
            answers = {score: auroc(method, score, judged, bad) for score in scores}
            print(f"  {step}/{steps} {answers} loss {loss:.3f}", file=sys.stderr, flush=True)

    outcome = run_training(method, learned, held, config.schedule(len(learned)), seed=seed, identity={}, report=look)
    seconds = round(time.process_time() - started, 1)
    found = {score: auroc(method, score, judged, bad) for score in scores}
    missed = {
        score: round(float(differences(method.nets, score, torch.from_numpy(held)).mean()), 4) for score in scores
    }
    return {
        **found,
        "core_s": seconds,
        "steps": outcome.steps,
        **{f"held_out_{score}": v for score, v in missed.items()},
    }


def auroc(method: Lrdan, score: Score, frames: Frames, bad: NDArray[np.bool_]) -> float:
    """How well the map's mean tells ``bad`` images from the others."""
    parts = [
        differences(method.nets, score, torch.from_numpy(part)).mean((1, 2)) for part in np.array_split(frames, 16)
    ]
    answers = torch.cat(parts).double().numpy()
    return round(image_auroc(answers[~bad].tolist(), answers[bad].tolist()), 4)


def claimed(found: Found) -> dict[str, dict[str, Any]]:
    """What the paper says of the classes that were run."""
    return {name: {"table 1": CLAIMED.get(name), "plot": CLAIMED_ALL[name]} for name in next(iter(found.values()))}


def means(found: Found) -> dict[str, dict[str, float]]:
    """Each row's and score's mean over classes and seeds."""
    table: dict[str, dict[str, float]] = {}
    for row, classes in found.items():
        runs = [run for one in classes.values() for run in one]
        table[row] = {s: round(statistics.mean(run[s] for run in runs), 4) for s in SCORES if s in runs[0]}
    return table


def unseen(
    train: Frames, labels: NDArray[np.int64], own: int, order: NDArray[np.int64], options: argparse.Namespace
) -> tuple[Frames, NDArray[np.bool_]]:
    """Training images of the class that were not learned from, and those of other classes; which are bad."""
    rest = np.concatenate([order[options.train + HELD_OUT :], np.flatnonzero(labels != own)])
    return train[rest], labels[rest] != own


def balanced(bad: NDArray[np.bool_], count: int, seed: int) -> NDArray[np.int64]:
    """Places of ``count`` images, half of them bad unless there are too few good ones; drawn by ``seed``."""
    random = np.random.default_rng(seed)
    good = random.permutation(np.flatnonzero(~bad))[: count // 2]
    return np.sort(np.concatenate([good, random.permutation(np.flatnonzero(bad))[: count - len(good)]]))


def images(data: str, split: str) -> tuple[Frames, NDArray[np.int64], list[str]]:
    """All images of a split, (n, 32, 32, C) uint8, their labels, and the classes' names."""
    with np.load(FILES[data]) as file:
        if data == "mnist":
            bordered = np.pad(file[f"{split}_images"], ((0, 0), (BORDER, BORDER), (BORDER, BORDER)))
            return bordered[..., None], file[f"{split}_labels"].astype(np.int64), [str(digit) for digit in range(10)]
        offsets, jpeg = file[f"{split}_offsets"], file[f"{split}_jpeg"]
        labels, names = file[f"{split}_labels"].astype(np.int64), [str(name) for name in file["classes"]]
    decoded: list[Any] = [cv2.imdecode(jpeg[start:end], cv2.IMREAD_COLOR) for start, end in pairwise(offsets)]
    return np.stack([cv2.cvtColor(one, cv2.COLOR_BGR2RGB) for one in decoded]), labels, names


if __name__ == "__main__":
    main()
