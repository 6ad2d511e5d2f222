"""DROCC on the paper's toy manifolds: AUROC against its tables 6 and 7.

    ball   points in the unit ball are good, points on the sphere of radius 1.2 are not       paper 0.9944
    sine   (x, sin x) is good, the same shifted up by 0.2 or 0.6 is not                       paper 0.9680, 0.9992
    helix  (cos t, sin t, t / 4) is good, the same 0.4 farther from the axis is not; not in the paper

Dimension of the ball (3), counts and noise are not in any text at hand; they are ours.  ``random`` is the same network
against random points of the shell (no ascent), ``none`` without adversaries.  The tables of the paper (Thyroid,
Arrhythmia, Abalone) are not shipped and were not run.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from calib.metrics import image_auroc
from trainer.drocc_rows import Rows, RowsConfig, fit_rows

Draw = Callable[[np.random.Generator, int], Rows]
SEEDS = (1, 2, 3)


def ball(random: np.random.Generator, count: int) -> Rows:
    direction = random.normal(size=(count, 3))
    rows: Rows = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    return rows * random.uniform(size=(count, 1)) ** (1 / 3)


def sphere(random: np.random.Generator, count: int) -> Rows:
    direction = random.normal(size=(count, 3))
    rows: Rows = 1.2 * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    return rows


def sine(shift: float) -> Draw:
    def draw(random: np.random.Generator, count: int) -> Rows:
        x = random.uniform(-3, 3, count)
        return np.stack([x, np.sin(x) + shift], 1)

    return draw


def helix(radius: float) -> Draw:
    def draw(random: np.random.Generator, count: int) -> Rows:
        t = random.uniform(0, 4 * np.pi, count)
        return np.stack([radius * np.cos(t), radius * np.sin(t), t / 4], 1)

    return draw


CASES: dict[str, tuple[Draw, Draw, float, float | None]] = {
    # name: good, bad, radius in standardized units, the paper's AUROC
    "ball": (ball, sphere, 0.6, 0.9944),
    "sine 0.2": (sine(0.0), sine(0.2), 0.15, 0.9680),
    "sine 0.6": (sine(0.0), sine(0.6), 0.4, 0.9992),
    "helix": (helix(1.0), helix(1.4), 0.4, None),
}
BASE = RowsConfig(radius=1.0, gamma=1.5, ascent_steps=10, ascent_step=0.05, learning_rate=5e-3, epochs=150)
VARIANTS = {"drocc": BASE, "random": replace(BASE, ascent_steps=0), "none": replace(BASE, mu=1e-9, ascent_steps=0)}


def main() -> None:
    torch.set_num_threads(1)
    started = time.monotonic()
    rows = {}
    for name, (good, bad, radius, paper) in CASES.items():
        rows[name] = {"paper": paper} | {
            variant: round(statistics.mean(auroc(good, bad, replace(config, radius=radius), seed) for seed in SEEDS), 4)
            for variant, config in VARIANTS.items()
        }
    seconds = round(time.monotonic() - started)
    print(json.dumps({"benchmark": "drocc toy manifolds", "auroc": rows, "seeds": SEEDS, "seconds": seconds}))


def auroc(good: Draw, bad: Draw, config: RowsConfig, seed: int) -> float:
    random = np.random.default_rng(seed)
    model = fit_rows(good(random, 1000), config, seed=seed)
    return image_auroc(model.scores(good(random, 1000)).tolist(), model.scores(bad(random, 1000)).tolist())


if __name__ == "__main__":
    main()
