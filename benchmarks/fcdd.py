"""One class of CIFAR-10 is normal, the other nine are not: image AUROC of FCDD with outlier exposure (paper: 0.95).

The paper's anomalies for training are CIFAR-100. Here they are `--views` pieces of a folder of everyday photographs,
32 px, JPEG-coded as this copy of CIFAR-10 is, so that the coding tells nothing; photographs whose names say that they
show one of CIFAR-10's own classes are left out (`OWN_CLASSES`; unlabeled ones may still). The authors' network, losses
and batch; Adam in the authors' three stages over `--steps`, where theirs takes 15,000 (600 epochs). The score is
that of the deployed graph after the last step; no epoch is chosen.

    python benchmarks/fcdd.py --classes airplane,automobile,bird --seeds 1,2 --steps 250 --batch 128 --precision bf16
    python benchmarks/fcdd.py --classes airplane --steps 15000 --test 10000                              (paper)
    python benchmarks/fcdd.py --preset cifar-resnet --steps 400 --batch 32 --precision bf16       (ImageNet's weights)

`--validate` judges by training images of other classes instead: that is where settings may be compared. `--labels
random` is the control. The data are not shipped: a file `cifar10_jpeg.npz`, a folder of photographs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.cifar import DATA, balanced, images  # noqa: E402
from calib.metrics import image_auroc  # noqa: E402
from trainer.config import override  # noqa: E402
from trainer.configs.fcdd import FcddConfig  # noqa: E402
from trainer.loop import run_training  # noqa: E402
from trainer.method import Frames  # noqa: E402
from trainer.methods.fcdd import Fcdd  # noqa: E402
from trainer.photographs import Photographs, ViewRecipe, cut_view, read_photographs  # noqa: E402
from trainer.presets import choose_preset  # noqa: E402

PHOTOS = ROOT.parent / "shared" / "data" / "photos"
PAPER_MEAN = 0.95
SIDE = 32
HELD_OUT = 200
JPEG_QUALITY = 75
"""Of this copy of CIFAR-10: its quantization tables and color subsampling are those that OpenCV writes at 75."""

# WordNet numbers of ImageNet's birds, frogs, dogs, cats and horse, and the names of what flies, drives and swims.
OWN_NUMBERS = (
    (1514668, 1622779), (1641577, 1644900), (1795545, 1860187), (2002556, 2058221), (2085620, 2113978),
    (2123045, 2124075), (2389026, 2389026),
)  # fmt: skip
OWN_NAMES = (
    "aircraft", "airliner", "airship", "ambulance", "amphibian", "beach_wagon", "cab", "canoe", "car", "catamaran",
    "container_ship", "convertible", "fireboat", "fire_engine", "garbage_truck", "go-kart", "gondola", "jeep",
    "lifeboat", "limousine", "liner", "minibus", "minivan", "model_t", "moving_van", "pickup", "pirate",
    "police_van", "racer", "schooner", "speedboat", "sports_car", "submarine", "tow_truck", "trailer_truck",
    "trimaran", "warplane", "wing", "wreck", "yawl",
)  # fmt: skip


def main() -> None:
    options = _options()
    for needed in (options.data, options.photographs):
        if not needed.exists():
            raise SystemExit(f"{needed} is not there; give --data and --photographs")
    torch.set_num_threads(options.threads)
    exposed = views(read_photographs(options.photographs), options.views)
    rows: dict[str, list[dict[str, float]]] = {}
    started = time.monotonic()
    for name in options.classes.split(","):
        for seed in map(int, options.seeds.split(",")):
            row = judge(name, seed, exposed, options)
            rows.setdefault(name, []).append(row)
            print(f"fcdd: {name} seed {seed} {row}", file=sys.stderr, flush=True)
    means = {name: round(statistics.mean(row["auroc"] for row in runs), 4) for name, runs in rows.items()}
    print(json.dumps({
        "benchmark": "fcdd cifar10 one-vs-rest", "mean": round(statistics.mean(means.values()), 4),
        "paper_mean_of_ten": PAPER_MEAN, "means": means, "classes": rows, "labels": options.labels,
        "judged_by": f"{options.test} {'training images not learned from' if options.validate else 'test images'}, "
                     "all classes alike",
        "preset": options.preset, "settings": options.set, "train_images_a_class": options.train,
        "steps": options.steps, "batch": options.batch, "rate": configured(options).learning_rate,
        "exposed_views": len(exposed), "exposed_sha256": exposed.digest, "precision": options.precision,
        "seeds": options.seeds, "seconds": round(time.monotonic() - started), "threads": options.threads,
        "cores": os.cpu_count(), "machine": platform.machine(),
    }))  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--photographs", type=Path, default=PHOTOS)
    parser.add_argument("--views", type=int, default=10_000, help="pieces of photographs to learn from")
    parser.add_argument("--classes", default="airplane,automobile,bird")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--train", type=int, default=4800, help="images of the normal class to learn from (of 5,000)")
    parser.add_argument("--test", type=int, default=5000, help="test images, all classes alike (of 10,000)")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--rate", type=float, help="default: the preset's")
    parser.add_argument("--preset", default="paper-cifar", help="paper-cifar or cifar-resnet")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the preset")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--labels", choices=("true", "random"), default="true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--validate", action="store_true", help="judge by training images, not by the test split")
    return parser.parse_args()


def views(photographs: Photographs, count: int) -> Photographs:
    """``count`` pieces of 32 px of photographs that show none of CIFAR-10's classes, as far as names tell."""
    chosen = [place for place, name in enumerate(photographs.names) if not shows_own_class(name)]
    recipe = ViewRecipe(side_px=SIDE, zoom_px=(SIDE, 3 * SIDE), gray_share=0.0)
    made, digest = [], hashlib.sha256()
    for number in range(count):
        view = cv2.cvtColor(cut_view(photographs, chosen, recipe, 0, number), cv2.COLOR_RGB2BGR)
        _, coded = cv2.imencode(".jpg", view, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        digest.update(coded.tobytes())
        made.append(np.asarray(cv2.cvtColor(cv2.imdecode(coded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), np.uint8))
    names = tuple(f"view-{number}" for number in range(count))
    return Photographs(names, tuple(made), digest.hexdigest(), ())


def shows_own_class(name: str) -> bool:
    """Whether a photograph of ImageNet is of a class that CIFAR-10 has too; its name is imagenet_nNUMBER_CLASS.jpg."""
    found = re.match(r"imagenet_n(\d+)_(.*)\.", name)
    if found is None:
        return False
    number, title = int(found[1]), found[2].lower()
    return any(low <= number <= high for low, high in OWN_NUMBERS) or any(
        own in title.split("_") or title == own or title.startswith(f"{own}_") for own in OWN_NAMES
    )


def configured(options: argparse.Namespace) -> FcddConfig:
    """The preset with the settings and the length that were asked for."""
    preset = override(choose_preset("fcdd", options.preset), options.set)
    assert isinstance(preset, FcddConfig)
    return replace(
        preset, batch_size=options.batch, min_steps=options.steps, max_steps=options.steps,
        learning_rate=options.rate or preset.learning_rate, precision=options.precision, labels=options.labels,
    )  # fmt: skip


def judge(name: str, seed: int, exposed: Photographs, options: argparse.Namespace) -> dict[str, float]:
    """AUROC of the deployed graph's image scores, and the last training loss."""
    train, labels, names = images(options.data, "train", SIDE)
    own = names.index(name)
    normal = np.random.default_rng([seed, own]).permutation(np.flatnonzero(labels == own))
    learned, held = train[normal[: options.train]], train[normal[options.train : options.train + HELD_OUT]]
    if options.validate:
        truth = labels.copy()
        truth[normal[: options.train]] = -1
        judged = train
    else:
        judged, truth, _ = images(options.data, "test", SIDE)
    keep = balanced(truth, options.test, seed)
    config = configured(options)
    method = Fcdd(config, seed=seed, photographs=exposed)
    method.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    method.prepare(learned)
    outcome = run_training(method, learned, held, config.schedule(len(learned)), seed=seed, identity={})
    method.fit_statistics(held)
    scores = answers(method, judged[keep])
    mine = truth[keep] == own
    return {
        "auroc": round(image_auroc(scores[mine].tolist(), scores[~mine].tolist()), 4),
        "loss": round(outcome.curve[-1].loss, 4),
    }


@torch.no_grad()
def answers(method: Fcdd, frames: Frames) -> NDArray[np.float32]:
    """The deployed graph's image scores."""
    graph = method.deployed(3)
    parts: list[Any] = np.array_split(frames, max(1, len(frames) // 100))
    return np.concatenate([graph(torch.from_numpy(part.copy()))[1].numpy() for part in parts])


if __name__ == "__main__":
    main()
