"""Draw what a bundle of any method says of real flaws, as the pictures in docs/methods have it.

    python benchmarks/show_bundle.py BUNDLE --data DIR --out docs/methods/fcdd.jpg [--flawed 2]

One good part of DIR's test images, then flawed ones, spread over its kinds: photograph, map, and the mask at the
bundle's own threshold with the ground truth's rim in green. The map's colors run from the least to the largest value on
the good part and from there to the largest of the sheet, so the first row says what the method sees where nothing is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.show_maps import GAP, HEAD, SIDE  # noqa: E402
from calib.collect import collect  # noqa: E402
from calib.dataset import LabeledImage, read_mask, read_stored_image, read_test_set  # noqa: E402
from edge.bundle import ModelBundle, open_bundle  # noqa: E402
from edge.engines.registry import open_engine  # noqa: E402
from edge.stages.segment import render_map  # noqa: E402

Picture = NDArray[np.uint8]
GOOD_SHARE = 0.35
"""Of the color scale, what good parts have."""

QUALITY = 85


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--flawed", type=int, default=2, help="how many flawed photographs")
    options = parser.parse_args()
    images = read_test_set(options.data)
    flawed = [image for image in images if not image.is_good]
    chosen = [image for image in images if image.is_good][:1] + flawed[:: max(1, len(flawed) // options.flawed)]
    sheet = draw(open_bundle(options.bundle), chosen[: 1 + options.flawed])
    cv2.imwrite(str(options.out), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def draw(bundle: ModelBundle, images: list[LabeledImage]) -> Picture:
    """The sheet (h, w, 3) RGB; the first image is the good part that the colors are measured by."""
    with open_engine(bundle, max_batch=1) as engine:
        engine.warmup()
        answers = list(collect(bundle, engine, [image.path for image in images]))
    photographs = [
        np.repeat(one, 3, 2) if one.shape[2] == 1 else one
        for one in (read_stored_image(image.path) for image in images)
    ]
    maps = [
        render_map(answer.anomaly_map, photograph.shape[:2])
        for answer, photograph in zip(answers, photographs, strict=True)
        if answer.anomaly_map is not None
    ]
    low, good, high = float(maps[0].min()), float(maps[0].max()), max(float(one.max()) for one in maps)
    threshold = bundle.calibration.pixel_threshold
    rows = [
        [
            photograph,
            colored(scores, photograph, (low, good, max(high, good))),
            masked(scores > threshold, read_mask(image, photograph.shape[:2]), photograph),
        ]
        for image, photograph, scores in zip(images, photographs, maps, strict=True)
    ]
    name = f"{bundle.manifest.method}, {bundle.manifest.preset}"
    return laid_out(("photograph", f"map ({name})", "mask, and ground truth's rim"), rows)


def colored(scores: NDArray[np.float32], photograph: Picture, scale: tuple[float, float, float]) -> Picture:
    """``scores`` (h, w) as colors over the darkened photograph; ``scale`` is least, largest of good, largest."""
    heat = np.interp(scores, scale, (0.0, GOOD_SHARE, 1.0))
    color = cv2.cvtColor(cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    share = np.clip(heat * 1.6, 0.0, 1.0)[..., None]
    return np.asarray(color * share + 0.55 * photograph * (1 - share), np.uint8)


def masked(mask: NDArray[np.bool_], truth: NDArray[np.bool_] | None, photograph: Picture) -> Picture:
    """The photograph darkened but for ``mask`` (h, w), which is tinted; the rim of ``truth`` in green."""
    picture = np.where(mask[..., None], 0.5 * photograph + (127, 0, 0), 0.55 * photograph).astype(np.uint8)
    if truth is not None:
        contours, _ = cv2.findContours(truth.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, (0, 255, 0), max(1, round(photograph.shape[0] / 150)))
    return picture


def laid_out(heads: tuple[str, ...], rows: list[list[Picture]]) -> Picture:
    """One row a photograph, a head over each column."""
    height, width = HEAD + len(rows) * (SIDE + GAP), len(heads) * (SIDE + GAP) - GAP
    sheet = np.full((height, width, 3), 255, np.uint8)
    for column, head in enumerate(heads):
        x = column * (SIDE + GAP)
        cv2.putText(sheet, head, (x + 2, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (30, 30, 30), 1, cv2.LINE_AA)
        for line, row in enumerate(rows):
            y = HEAD + line * (SIDE + GAP)
            sheet[y : y + SIDE, x : x + SIDE] = cv2.resize(row[column], (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return sheet


if __name__ == "__main__":
    main()
