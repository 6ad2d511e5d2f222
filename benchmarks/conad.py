"""One class of CIFAR-10 is normal, the other nine are not: image AUROC of ConAD with H heads.

The paper's mean over ten classes and three runs is 0.671 for H = 8; its figures for single classes are told for H = 16
only.  Each class learns from part of its training images and is judged by a seeded subset of the test images, all
classes alike, after the last step.

    python benchmarks/conad.py --classes airplane,automobile,bird --seeds 1,2 --train 4500 --test 5000 --steps 2000
    python benchmarks/conad.py --classes all --seeds 1,2,3 --train 4500 --test 10000 --steps 14000       (paper's data)

``--validate`` judges by training images instead, of all classes and not learned from: that is where settings may be
compared.  What follows ``--`` are settings, ``KEY=VALUE``.  The data are not shipped: a file `cifar10_jpeg.npz`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.drocc import DATA, HELD_OUT, balanced, images, judged_by  # noqa: E402
from calib.metrics import image_auroc  # noqa: E402
from trainer.config import override  # noqa: E402
from trainer.configs.conad import CIFAR, ConadConfig  # noqa: E402
from trainer.loop import run_training  # noqa: E402
from trainer.methods.conad import Conad  # noqa: E402

PAPER_MEAN = {2: 0.643, 4: 0.639, 8: 0.671, 16: 0.659}
PAPER_H16 = {
    "airplane": 0.772, "automobile": 0.631, "bird": 0.631, "cat": 0.615, "deer": 0.633, "dog": 0.588, "frog": 0.691,
    "horse": 0.640, "ship": 0.755, "truck": 0.637,
}  # fmt: skip
CHUNK = 250
loaded = lru_cache(images)


def main() -> None:
    options = _options()
    if not options.data.is_file():
        raise SystemExit(f"{options.data} is not there; give --data")
    torch.set_num_threads(options.threads)
    steps = f"min_steps={options.steps}", f"max_steps={options.steps}"
    config = override(CIFAR, [*steps, *options.settings])
    names = list(PAPER_H16) if options.classes == "all" else options.classes.split(",")
    rows: dict[str, list[dict[str, float]]] = {}
    started = time.monotonic()
    for name in names:
        for seed in map(int, options.seeds.split(",")):
            row = judge(name, seed, config, options)
            rows.setdefault(name, []).append(row)
            print(f"conad: {name} seed {seed} {row}", file=sys.stderr, flush=True)
    means = {name: round(statistics.mean(row["auroc"] for row in runs), 4) for name, runs in rows.items()}
    print(json.dumps({
        "benchmark": "conad cifar10 one-vs-rest", "mean": round(statistics.mean(means.values()), 4),
        "paper_mean_of_ten": PAPER_MEAN.get(config.heads),
        "paper_h16_mean_of_these": round(statistics.mean(PAPER_H16[name] for name in means), 4),
        "means": means, "classes": rows, "judged_by": judged_by(options), "train_images_a_class": options.train,
        "steps": options.steps, "seeds": options.seeds, "settings": options.settings, "config": config.to_json(),
        "seconds": round(time.monotonic() - started), "threads": options.threads, "cores": os.cpu_count(),
        "machine": platform.machine(),
    }))  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--classes", default="airplane,automobile,bird", help="by commas, or all")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--train", type=int, default=4500, help="images of the normal class to learn from (of 5,000)")
    parser.add_argument("--test", type=int, default=5000, help="images judged, all classes alike")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--validate", action="store_true", help="judge by training images, not by the test split")
    parser.add_argument("settings", nargs="*", help="after --: KEY=VALUE of trainer/configs/conad.py")
    return parser.parse_args()


def judge(name: str, seed: int, config: ConadConfig, options: argparse.Namespace) -> dict[str, float]:
    """AUROC after the last step, the winners' shares on held-out images, and what a step cost."""
    train, labels, names = loaded(str(options.data), "train", config.size_px)
    own = names.index(name)
    normal = np.random.default_rng([seed, own]).permutation(np.flatnonzero(labels == own))
    learned, held = train[normal[: options.train]], train[normal[options.train : options.train + HELD_OUT]]
    if options.validate:
        labels = labels.copy()
        labels[normal[: options.train]] = -1
        judged, truth = train, labels
    else:
        judged, truth, _ = loaded(str(options.data), "test", config.size_px)
    keep = balanced(truth, options.test, seed)
    judged, truth = judged[keep], truth[keep]
    method = Conad(config, seed=seed)
    method.prepare(learned)
    core = time.process_time()
    outcome = run_training(method, learned, held, config.schedule(len(learned)), seed=seed, identity={})
    core = time.process_time() - core
    method.fit_statistics(held)
    graph = method.deployed(3)
    with torch.no_grad():
        parts = [graph(torch.from_numpy(part))[1].numpy() for part in np.array_split(judged, len(judged) // CHUNK + 1)]
    scores = np.concatenate(parts)
    auroc = image_auroc(scores[truth == own].tolist(), scores[truth != own].tolist())
    terms = {key: round(value, 3) for key, value in outcome.curve[-1].terms.items()}
    print(f"  {name} {terms} {method.statistics}", file=sys.stderr, flush=True)
    return {"auroc": round(auroc, 4), "core_s_a_step": round(core / outcome.steps, 3)}


if __name__ == "__main__":
    main()
