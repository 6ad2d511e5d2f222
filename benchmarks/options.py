"""Which options of a method are worth having?  Judged by planted defects, never by test images.

Only ``train/good`` is read.  It is split by physical part as `kizu train` splits it; the part set aside is judged as it
is, with a small defect planted in each image (scratch, blob, foreign texture, dent), and with one that covers a large
part of it.  Each variant is the preset with `--set` settings, trained for ``--steps`` where there is anything to train.
Prints one JSON object a variant: image AUROC and pixel AUROC for both sizes, by set and in the mean.

    python benchmarks/options.py --sets aitex_01,aitex_02,elpv_mono --variant "" --variant center=none \\
        --variant "metric=gaussian" --variant "teachers=line"
    python benchmarks/options.py --method conad --sets aitex_02 --steps 300 --variant "" --variant sigma=0.1
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import DATA, TRAIN_OPTIONS
from numpy.typing import NDArray

from calib.metrics import image_auroc
from edge.bundle import InputSpec, MapGeometry
from edge.stages.infer import map_roi
from edge.stages.segment import render_map
from edge.types import AnomalyMap, FrameId, Roi
from trainer.config import MethodConfig, override
from trainer.data import load_training_set, split_by_part
from trainer.distill_losses import varied_exposure
from trainer.loop import run_training
from trainer.method import Frames
from trainer.methods import METHODS
from trainer.planted import large_flaw, small_flaw
from trainer.presets import choose_preset

PIXELS = 200_000
"""Pixels drawn from each side for the pixel AUROC: its error is then below 0.002."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", default="aitex_01,aitex_02,elpv_mono,magnetic_tile,hazelnut_toy")
    parser.add_argument("--method", default="student-teacher")
    parser.add_argument("--preset", default=None, help="default: duo, or the method's recommended one")
    parser.add_argument("--variant", action="append", default=[], help='settings by spaces, "" for the preset itself')
    parser.add_argument("--judged", type=int, default=40, help="held-out images of a set, at most")
    parser.add_argument("--learned", type=int, default=160, help="images of a set to learn from, at most")
    parser.add_argument("--exposure", type=float, default=0.0, help="vary the judged images' exposure by this much")
    parser.add_argument("--steps", type=int, default=1500, help="for variants with something to train")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.preset is None and options.method == "student-teacher":
        options.preset = "duo"
    for variant in options.variant or [""]:
        started = time.monotonic()
        config = override(choose_preset(options.method, options.preset), variant.split())
        rows = {}
        for name in options.sets.split(","):
            rows[name] = judge(config, options, name)
            print(f"options: {variant or config.preset} {name} {rows[name]}", file=sys.stderr, flush=True)
        mean = {key: round(statistics.mean(row[key] for row in rows.values()), 3) for key in next(iter(rows.values()))}
        report = {"variant": variant or config.preset, "mean": mean, "sets": rows}
        print(json.dumps(report | {"seconds": round(time.monotonic() - started)}), flush=True)


def judge(config: MethodConfig, options: argparse.Namespace, name: str) -> dict[str, float]:
    """Image and pixel AUROC of small and large planted defects in the held-out images of one set."""
    learned, held = images(options, name, config.size_px)
    method = METHODS[options.method](config, seed=options.seed, device="cpu")
    method.prepare(learned)
    if any(True for _ in method.trainable.parameters()):
        schedule = replace(config.schedule(len(learned)), steps=options.steps)
        run_training(method, learned, held, schedule, seed=options.seed, identity={})
    method.fit_statistics(held)
    deployed = method.deployed(held.shape[3])
    geometry = method.map_geometry(config.size_px, config.size_px)
    good, good_scores = answers(deployed, exposed(held, options), geometry)
    result = {}
    for size, planted in (("small", small_flaw), ("large", large_flaw)):
        rng = np.random.default_rng(options.seed)
        pairs = [planted(image, held[(i + 1) % len(held)], rng) for i, image in enumerate(held)]
        pictures = np.stack([picture for picture, _ in pairs])
        bad, scores = answers(deployed, exposed(pictures, options), geometry)
        masks = np.stack([mask for _, mask in pairs]) > 127
        sample = np.random.default_rng(0)
        normal = sample.choice(np.concatenate([good.ravel(), bad[~masks]]), PIXELS)
        result[f"{size}_image"] = round(image_auroc(good_scores.tolist(), scores.tolist()), 3)
        result[f"{size}_pixel"] = round(image_auroc(normal.tolist(), sample.choice(bad[masks], PIXELS).tolist()), 3)
    return result


def images(options: argparse.Namespace, name: str, side: int) -> tuple[Frames, Frames]:
    """Images to learn from and held-out ones of a set, split as `kizu train` does with the set's own options."""
    own = dict(zip(TRAIN_OPTIONS.get(name, [])[::2], TRAIN_OPTIONS.get(name, [])[1::2], strict=True))
    aspect: Any = own.get("--aspect", "stretch")
    found = load_training_set(options.data / name, size_px=side, aspect=aspect, skip_bad=False)
    split = split_by_part(
        found.names, found.file_sha256, share=0.2, seed=options.seed, part_regex=own.get("--part-regex")
    )
    held = np.union1d(split.statistics, split.threshold)
    return found.take(split.train[: options.learned]), found.take(held[: options.judged])


@torch.inference_mode()
def answers(
    deployed: torch.nn.Module, frames: Frames, geometry: MapGeometry
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Maps at model size (n, h, w) and image scores (n,)."""
    maps, scores = [], []
    whole = Roi(0.0, 0.0, float(frames.shape[2]), float(frames.shape[1]))
    spec = InputSpec(frames.shape[1], frames.shape[2], 1, max_batch=1)
    roi = map_roi(whole, spec, geometry)
    for frame in frames:
        one_map, score = deployed(torch.from_numpy(frame[None]))
        anomaly_map = AnomalyMap(FrameId("options", 0, 0, 0), one_map[0].numpy(), float(score), roi, whole)
        maps.append(render_map(anomaly_map, frame.shape[:2]))
        scores.append(score.numpy())
    return np.stack(maps), np.concatenate(scores)


def exposed(frames: Frames, options: argparse.Namespace) -> Frames:
    """``frames`` with gain, gamma and offset of each drawn by seed; the same for good and flawed ones."""
    if options.exposure == 0:
        return frames
    generator = torch.Generator().manual_seed(options.seed)
    return varied_exposure(torch.from_numpy(frames).float(), options.exposure, generator).round().byte().numpy()


if __name__ == "__main__":
    main()
