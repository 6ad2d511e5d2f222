"""One class of CIFAR-10 is normal, the other nine are not: image AUROC of DROCC against the paper's mean of 0.742.

Each class learns with its own radius and mu (paper, table 11) from part of its training images and is judged by a
seeded subset of the test images, all classes alike.  The score is that of the last step.  The authors' script reports
the best epoch on the test images; ``best_on_test`` says what that would have given here, for comparison only.

    python benchmarks/drocc.py --classes airplane,automobile,bird --seeds 1,2 --train 1000 --test 2000 --steps 250
    python benchmarks/drocc.py --network paper --train 5000 --test 10000 --steps 2000 --ascent-steps 50    (paper)

``--validate`` judges by training images of other classes instead: that is where settings may be compared.
The data are not shipped: a file `cifar10_jpeg.npz`.
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
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from calib.metrics import image_auroc
from trainer.configs.drocc import CIFAR, PAPER, DroccConfig
from trainer.loop import run_training
from trainer.method import Frames
from trainer.methods.drocc import Drocc

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "cifar10" / "cifar10_jpeg.npz"
PAPER_AUROC = {
    "airplane": 0.8166, "automobile": 0.7674, "bird": 0.6666, "cat": 0.6713, "deer": 0.7362, "dog": 0.7443,
    "frog": 0.7443, "horse": 0.7139, "ship": 0.8002, "truck": 0.7621,
}  # fmt: skip
HELD_OUT = 200
LOOKS = 5


def main() -> None:
    options = _options()
    if not options.data.is_file():
        raise SystemExit(f"{options.data} is not there; give --data")
    torch.set_num_threads(options.threads)
    rows: dict[str, list[dict[str, float]]] = {}
    started = time.monotonic()
    for name in options.classes.split(","):
        for seed in map(int, options.seeds.split(",")):
            row = judge(name, seed, options)
            rows.setdefault(name, []).append(row)
            print(f"drocc: {name} seed {seed} {row}", file=sys.stderr, flush=True)
    means = {name: round(statistics.mean(row["last"] for row in runs), 4) for name, runs in rows.items()}
    print(json.dumps({
        "benchmark": "drocc cifar10 one-vs-rest", "mean": round(statistics.mean(means.values()), 4),
        "paper_mean_of_these": round(statistics.mean(PAPER_AUROC[name] for name in means), 4),
        "means": means, "classes": rows, "network": options.network, "judged_by": judged_by(options),
        "train_images_a_class": options.train, "steps": options.steps, "batch": options.batch,
        "ascent_steps": options.ascent_steps, "ascent_step": options.ascent_step, "batch_norm": options.batch_norm,
        "radius": options.radius or "paper's of the class", "optimizer": "Adam, cosine to 0", "rate": options.rate,
        "precision": options.precision, "seeds": options.seeds, "seconds": round(time.monotonic() - started),
        "threads": options.threads, "cores": os.cpu_count(), "machine": platform.machine(),
    }))  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--network", choices=("paper", "dense"), default="paper")
    parser.add_argument("--classes", default="airplane,automobile,bird")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--train", type=int, default=1000, help="images of the normal class to learn from (of 5,000)")
    parser.add_argument("--test", type=int, default=2000, help="test images, all classes alike (of 10,000)")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--radius", type=float, default=None, help="instead of the paper's for the class")
    parser.add_argument("--ascent-steps", type=int, default=2)
    parser.add_argument("--ascent-step", type=float, default=None, help="default: radius / steps")
    parser.add_argument("--batch-norm", choices=("joint", "apart"), default="joint")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--validate", action="store_true", help="judge by training images, not by the test split")
    return parser.parse_args()


def judged_by(options: argparse.Namespace) -> str:
    if options.validate:
        return f"{options.test} training images not learned from, all classes alike"
    return f"{options.test} test images, all classes alike"


def judge(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """AUROC after the last step, and the best of ``LOOKS`` looks at the images judged by."""
    config = config_of(name, options)
    train, labels, names = images(str(options.data), "train", config.size_px)
    own = names.index(name)
    normal = np.random.default_rng([seed, own]).permutation(np.flatnonzero(labels == own))
    learned, held = train[normal[: options.train]], train[normal[options.train : options.train + HELD_OUT]]
    if options.validate:
        labels = labels.copy()
        labels[normal[: options.train]] = -1
        judged, truth = train, labels
    else:
        judged, truth, _ = images(str(options.data), "test", config.size_px)
    keep = balanced(truth, options.test, seed)
    judged, truth = judged[keep], truth[keep]
    method = Drocc(config, seed=seed)
    method.prepare(learned)
    looks: list[float] = []

    def look(step: int, steps: int, loss: float) -> None:
        if step % max(1, steps // LOOKS) == 0 or step == steps:
            scores = answers(method, judged)
            looks.append(image_auroc(scores[truth == own].tolist(), scores[truth != own].tolist()))
            print(f"  {name} {step}/{steps} loss {loss:.3f} auroc {looks[-1]:.4f}", file=sys.stderr, flush=True)

    run_training(method, learned, held, config.schedule(len(learned)), seed=seed, identity={}, report=look)
    return {"last": round(looks[-1], 4), "best_on_test": round(max(looks), 4)}


def config_of(name: str, options: argparse.Namespace) -> DroccConfig:
    """The paper's radius and mu of a class; a ``dense`` patch has 36 px, and its radius grows with sqrt(d)."""
    radius, mu, _ = CIFAR[name]
    side = 32 if options.network == "paper" else 36
    network: Literal["paper", "dense"] = options.network
    return replace(
        PAPER, network=network, size_px=side, patch_px=side, stride=side, mu=mu,
        radius=(options.radius or radius) * side / 32, ascent_steps=options.ascent_steps,
        ascent_step=options.ascent_step, batch_norm=options.batch_norm, precision=options.precision,
        batch_size=options.batch, learning_rate=options.rate, max_steps=options.steps, min_steps=options.steps,
    )  # fmt: skip


@torch.no_grad()
def answers(method: Drocc, frames: Frames) -> NDArray[np.float64]:
    """-f of whole frames."""
    training = method.net.training
    method.net.eval()
    found = [-method.net(method.normalized(torch.from_numpy(part)))[:, 0].double().numpy()
             for part in np.array_split(frames, max(1, len(frames) // 250))]  # fmt: skip
    method.net.train(training)
    return np.concatenate(found)


def images(data: str, split: str, side: int) -> tuple[Frames, NDArray[np.int64], list[str]]:
    """All images of a split (n, side, side, 3) uint8 RGB, their labels, and the classes' names."""
    with np.load(data) as file:
        offsets, jpeg = file[f"{split}_offsets"], file[f"{split}_jpeg"]
        labels, names = file[f"{split}_labels"].astype(np.int64), [str(name) for name in file["classes"]]
    frames = np.empty((len(labels), side, side, 3), np.uint8)
    for i in range(len(labels)):
        decoded = cv2.imdecode(jpeg[offsets[i] : offsets[i + 1]], cv2.IMREAD_COLOR)
        assert decoded is not None, f"{split} image {i} of {data} is damaged"
        small = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
        frames[i] = small if side == 32 else cv2.resize(small, (side, side), interpolation=cv2.INTER_LINEAR)
    return frames, labels, names


def balanced(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Places of ``count`` images, equally many of each class."""
    rng = np.random.default_rng(seed)
    each: list[Any] = [rng.permutation(np.flatnonzero(labels == label))[: count // 10] for label in range(10)]
    return np.sort(np.concatenate(each))


if __name__ == "__main__":
    main()
