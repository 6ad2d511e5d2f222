"""How well do descriptors tell planted defects from good surface?  Prints JSON, one entry for each descriptor.

Only ``train/good`` images are read: a part is the bank (one Gaussian over all positions, and nearest neighbors in
the same whitened space), the rest is judged, once as it is and once with a defect planted (scratch, blob, foreign
texture, dent).  Students are not involved; this is the ceiling of what they can be given.

    python benchmarks/descriptors.py --data ../shared/data --teacher line --control \\
        --backbone resnet18 --weights ../shared/weights/resnet18_layer3_folded.safetensors
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.metrics import image_auroc
from trainer.backbones import Backbone, load_backbone
from trainer.distill import load_teacher
from trainer.patch_nets import PROFILES, InputNormalization, PatchNet, build_patch_net
from trainer.planted import SIDE_PX, small_flaw
from trainer.targets import MapTarget

SETS = ("aitex_01", "aitex_02", "aitex_04", "magnetic_tile", "hazelnut_toy", "elpv_mono")
CENTERS = 16 + 4 * np.arange(57)  # pixel under the middle of each 32 px footprint
Image = NDArray[np.uint8]
Describe = Callable[[Image], Tensor]
"""(256, 256, 3) uint8 -> descriptors (57 * 57, d)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--teacher", action="append", default=[], help="name or file; may be repeated")
    parser.add_argument("--control", action="store_true", help="add an untrained teacher")
    parser.add_argument("--backbone", default=None, help="add P's own features")
    parser.add_argument("--weights", type=Path, default=None)
    parser.add_argument("--layers", action="append", default=[], help="LAYER,LAYER@MAGNIFY, say layer2,layer3@2")
    parser.add_argument("--bank", type=int, default=60)
    parser.add_argument("--judged", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exposure", type=float, default=0.0, help="vary the judged images' exposure by this much")
    options = parser.parse_args()
    for label, describe in _descriptors(options):
        started = time.monotonic()
        sets = {name: judge(describe, options, name) for name in options.sets.split(",")}
        mean = {key: round(float(np.mean([row[key] for row in sets.values()])), 3) for key in next(iter(sets.values()))}
        print(json.dumps({"descriptor": label, "mean": mean, "sets": sets,
                          "seconds": round(time.monotonic() - started, 1)}), flush=True)  # fmt: skip


def judge(describe: Describe, options: argparse.Namespace, name: str) -> dict[str, float]:
    """Image and pixel AUROC of one set, with the Gaussian and with nearest neighbors."""
    bank_images, judged = split(options.data / name, options.bank, options.judged)
    rng = np.random.default_rng(options.seed)
    bank = torch.cat([describe(image) for image in bank_images])
    mean, whiten = _gaussian(bank)
    memory = ((bank - mean) @ whiten)[torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))[:4000]]
    good: dict[str, list[NDArray[Any]]] = {"gauss": [], "knn": []}
    bad: dict[str, list[NDArray[Any]]] = {"gauss": [], "knn": []}
    masks = []
    for index, image in enumerate(judged):
        donor = judged[(index + 1) % len(judged)]
        planted, mask = small_flaw(image, donor, rng)
        exposed = [_exposed(picture, options.exposure, rng) for picture in (image, planted)]
        for store, picture in zip((good, bad), exposed, strict=True):
            white = (describe(picture) - mean) @ whiten
            store["gauss"].append(white.square().sum(1).numpy())
            store["knn"].append(torch.cdist(white, memory).min(dim=1).values.numpy())
        masks.append(mask[np.ix_(CENTERS, CENTERS)].ravel() > 0)
    result = {}
    truth = np.concatenate([*(np.zeros_like(mask) for mask in masks), *masks])
    for kind in ("gauss", "knn"):
        pixels = np.concatenate([*good[kind], *bad[kind]])
        peaks = [[float(values.max()) for values in side[kind]] for side in (good, bad)]
        result[f"{kind}_image"] = round(image_auroc(*peaks), 3)
        result[f"{kind}_pixel"] = round(image_auroc(pixels[~truth], pixels[truth]), 3)
    return result


def _descriptors(options: argparse.Namespace) -> list[tuple[str, Describe]]:
    found: list[tuple[str, Describe]] = []
    for name in options.teacher:
        teacher = load_teacher(name)
        if not isinstance(teacher.net, PatchNet):
            raise SystemExit(f"--teacher {name} is P itself: that is --backbone")
        found.append((f"teacher {teacher.name}", _of_net(teacher.net)))
    if options.control:
        found.append(("untrained teacher", _of_net(build_patch_net(PROFILES["line"], 0).eval())))
    if options.backbone is not None:
        net = load_backbone(options.backbone, options.weights).net
        for choice in options.layers or ["layer2,layer3@2"]:
            names, _, magnify = choice.partition("@")
            found.append((f"{options.backbone} {choice}", _of_backbone(net, names.split(","), int(magnify or 2))))
    return found


def _of_net(net: PatchNet) -> Describe:
    normalize = InputNormalization()

    def describe(image: Image) -> Tensor:
        with torch.inference_mode():
            descriptors: Tensor = net(normalize(torch.from_numpy(image[None])))
        return descriptors[0].flatten(1).T

    return describe


def _of_backbone(net: Backbone, names: Sequence[str], magnify: int) -> Describe:
    target = MapTarget(net, PROFILES["line"], tuple(names), magnify, margin_px=0)

    def describe(image: Image) -> Tensor:
        features = target(torch.from_numpy(image[None]))[0].flatten(1).T
        if features.shape[1] > 128:  # a fixed random projection keeps the covariance small
            generator = torch.Generator().manual_seed(7)
            features = features @ torch.randn(features.shape[1], 128, generator=generator)
        return features

    return describe


def _gaussian(bank: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and whitening matrix, the covariance shrunk by 1 % of its mean variance."""
    mean = bank.mean(dim=0)
    centered = (bank - mean).double()
    covariance = centered.T @ centered / len(bank)
    covariance += 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance)
    return mean, (vectors / values.sqrt()).float()


def split(folder: Path, bank: int, judged: int) -> tuple[list[Image], list[Image]]:
    """Bank and judged images of ``train/good``, split by physical part (strip, tile number) in hash order."""
    paths = sorted((folder / "train" / "good").iterdir())
    parts = sorted({_part(path) for path in paths}, key=lambda part: hashlib.sha1(part.encode()).hexdigest())
    held = set(parts[: max(1, len(parts) // 3)])
    order = sorted(paths, key=lambda path: hashlib.sha1(path.name.encode()).hexdigest())
    return ([_read(path) for path in order if _part(path) not in held][:bank],
            [_read(path) for path in order if _part(path) in held][:judged])  # fmt: skip


def _part(path: Path) -> str:
    """The physical part in a file name: fabric strip or magnet tile; else the file is its own part."""
    stem = path.stem.partition("_x")[0]
    return stem.partition("_num_")[2][:3] if "_num_" in stem else stem


def _read(path: Path) -> Image:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise SystemExit(f"{path}: not a readable image")
    resized = cv2.resize(image, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(resized[:, :, ::-1], dtype=np.uint8)


def _exposed(image: Image, strength: float, rng: np.random.Generator) -> Image:
    gain, offset = np.exp(rng.uniform(-strength, strength)), 40 * strength * rng.uniform(-1, 1)
    exposed: Image = np.clip(image.astype(np.float32) * gain + offset, 0, 255).astype(np.uint8)
    return exposed


if __name__ == "__main__":
    main()
