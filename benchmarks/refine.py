"""How much faster is a coarse look first, and what does it miss?

    python benchmarks/refine.py [BUNDLE --images FOLDER] [--side 1024] [--rate 1%] [--stride 4] [--only N]

Every image goes through the bundle twice, coarse first and densely everywhere, interleaved on one machine; prints one
JSON object with the share of tiles refined, the ratio of the times (medians over the images), and the pixels and tiles
above the threshold that the coarse look missed. `worst_threshold` is the share of tiles that would be missed at the
threshold where most are, with the margin and, as a control, without: the shipped flaws are far above any threshold.

Without BUNDLE nothing is trained either: the shipped students are evaluated at every pixel and at every `--stride`-th
one, on frames of `--side` px made of the shipped photographs (mirrored, at the size that the students know). Margin
and threshold come from good photographs that were held out when they learned, for the stated `--rate`; the frames
judged are of others. A flaw is cut out of a flawed photograph and put into a good frame.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from calib.collect import collect
from calib.threshold import parse_rate, required_parts
from edge.bundle import InputSpec, ModelBundle, cells_between, open_bundle
from edge.demo.line import BUNDLE, PHOTOS
from edge.engines.refine import RefineEngine
from edge.engines.registry import open_engine
from edge.images import IMAGE_SUFFIXES, encode_png, read_image
from edge.protocols import Engine
from edge.stages.tile import smallest_side_px, tiling_of

SIDE_PX = 256
Image = NDArray[np.uint8]
Map = NDArray[np.float32]
Cells = tuple[slice, slice]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, help="one trained with --refine")
    parser.add_argument("--images", type=Path, help="folder of images; those of one folder are one group")
    parser.add_argument("--side", type=int, default=1024, help="of the frames that are made, in px")
    parser.add_argument("--rate", default="1%", help="share of tiles that may be missed")
    parser.add_argument("--stride", type=int, default=4, help="of the coarse look; the dense one is at every pixel")
    parser.add_argument("--only", type=int, default=1000, help="images of each group")
    options = parser.parse_args()
    if (options.bundle is None) != (options.images is None):
        parser.error("give a bundle and --images, or neither")
    with tempfile.TemporaryDirectory() as folder:
        bundle, images = options.bundle, options.images
        if bundle is None:
            bundle, images = Path(folder) / "bundle", Path(folder) / "frames"
            write_frames(images, options.side)
            write_bundle_of_shipped_students(bundle, options.stride, parse_rate(options.rate, "--rate"), options.side)
        groups: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(images.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES and len(groups[path.parent.name]) < options.only:
                groups[path.parent.name].append(path)
        print(json.dumps(measure(open_bundle(bundle), groups), indent=2))


def measure(bundle: ModelBundle, groups: dict[str, list[Path]]) -> dict[str, Any]:
    """See the module's docstring."""
    refine = bundle.manifest.refine
    if refine is None:
        raise SystemExit(f"{bundle.path} has no coarse graph; train it with `kizu train ... --refine STRIDE`")
    with open_engine(bundle, max_batch=1) as engine, open_engine(bundle, max_batch=1, refine=False) as dense:
        assert isinstance(engine, RefineEngine)
        engine.warmup()
        dense.warmup()
        found = {name: judge(bundle, engine, dense, paths) for name, paths in groups.items()}
    return {
        "bundle": bundle.manifest.name,
        "dense_stride_px": bundle.manifest.map.stride,
        "coarse_stride_px": refine.map.stride,
        "margin": refine.margin,
        "margin_from_tiles": refine.tiles,
        "stated_rate": refine.rate,
        "pixel_threshold": bundle.calibration.pixel_threshold,
        "gate": refine.gate(bundle.calibration),
        "trainer_says": bundle.provenance.get("refine"),
        "groups": found,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }


def judge(bundle: ModelBundle, engine: RefineEngine, dense: Engine, paths: list[Path]) -> dict[str, Any]:
    """One group of images, each coarse first and densely in turn."""
    seen, refined = engine.tiles, engine.tiles_refined
    times: dict[str, list[float]] = {"refine": [], "dense": []}
    counts = np.zeros(4, np.int64)
    peaks: list[tuple[float, float]] = []
    rejects = {"refine": 0, "dense": 0}
    for place, path in enumerate(paths):
        maps: dict[str, Map] = {}
        # Whoever comes first finds cold caches: in turn.
        for name in ("refine", "dense") if place % 2 else ("dense", "refine"):
            started = time.perf_counter()
            (answer,) = collect(bundle, engine if name == "refine" else dense, [path])
            times[name].append(time.perf_counter() - started)
            assert answer.anomaly_map is not None
            maps[name] = answer.anomaly_map.scores
            rejects[name] += answer.verdict.decision.value == "reject"
        tiles = tiles_of_map(bundle, read_image(path).shape[:2])
        counts += np.array(missed(bundle, maps["dense"], maps["refine"], tiles))
        peaks += [largest(maps["dense"][tile], skip, engine.every) for tile, skip in tiles]
    pixels, lost_pixels, hit_tiles, lost_tiles = counts.tolist()
    assert bundle.manifest.refine is not None
    looked = engine.tiles - seen
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "images": len(paths),
        "tiles": looked,
        "tiles_refined_share": round((engine.tiles_refined - refined) / looked, 4),
        "dense_s_per_image": round(middle["dense"], 4),
        "refine_s_per_image": round(middle["refine"], 4),
        "times_faster": round(middle["dense"] / middle["refine"], 3),
        "pixels_above_threshold": pixels,
        "pixels_missed": lost_pixels,
        "tiles_above_threshold": hit_tiles,
        "tiles_missed": lost_tiles,
        "tiles_missed_rate": round(lost_tiles / looked, 6),
        "worst_threshold": {
            "missed_rate": round(worst(peaks, bundle.manifest.refine.margin), 6),
            "control_without_margin": round(worst(peaks, 0.0), 6),
        },
        "rejected": rejects,
    }


def tiles_of_map(bundle: ModelBundle, size: tuple[int, ...]) -> list[tuple[Cells, Cells]]:
    """For each tile where its cells are in the whole map, and where its first coarse ones are among those."""
    refine = bundle.manifest.refine
    tiling = tiling_of(bundle.manifest.input, bundle.manifest.map)
    if tiling is None or refine is None:
        return [((slice(None), slice(None)), (slice(0, None), slice(0, None)))]
    every = cells_between(bundle.manifest, refine)
    return [
        (
            (slice(tile.row.first, tile.row.stop), slice(tile.column.first, tile.column.stop)),
            (slice(-tile.row.skip % every, None), slice(-tile.column.skip % every, None)),
        )
        for tile in tiling.plan(size[0], size[1])
    ]


def missed(bundle: ModelBundle, dense: Map, found: Map, tiles: list[tuple[Cells, Cells]]) -> tuple[int, int, int, int]:
    """Cells above the pixel threshold and those of them missed; tiles that hold any and those with any missed."""
    above = dense > bundle.calibration.pixel_threshold
    lost = above & ~(found > bundle.calibration.pixel_threshold)
    hit, gone = (sum(bool(cells[tile].any()) for tile, _ in tiles) for cells in (above, lost))
    return int(above.sum()), int(lost.sum()), hit, gone


def largest(cells: Map, start: Cells, every: int) -> tuple[float, float]:
    """A tile's largest dense value and its largest coarse one, which is one of the dense ones."""
    coarse = cells[start][::every, ::every]
    return float(cells.max()), float(coarse.max()) if coarse.size else -np.inf


def worst(peaks: list[tuple[float, float]], margin: float) -> float:
    """The largest share of tiles with a value above any one threshold whose coarse value is not above its gate."""
    dense, coarse = np.array(peaks).T
    return max(float(np.mean((dense > t) & (coarse <= t - margin))) for t in coarse + margin)


# --- frames and a bundle from what is shipped -------------------------------------------------------------------------


def known_size(path: Path) -> Image:
    """A photograph as the shipped students know it, (256, 256, 3)."""
    return np.asarray(cv2.resize(read_image(path), (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA), np.uint8)


def mirrored(image: Image, side: int) -> Image:
    """`image` continued by reflection to a square of `side` px: large, and without seams."""
    more = max(0, side - SIDE_PX)
    return np.pad(image, ((0, more), (0, more), (0, 0)), mode="symmetric")[:side, :side]


def write_frames(folder: Path, side: int) -> None:
    """`good` and `flawed` frames of the photographs in test/; each flaw in a good frame of another photograph."""
    good = [mirrored(known_size(path), side) for path in sorted((PHOTOS / "test" / "good").iterdir())]
    for name in ("good", "flawed"):
        (folder / name).mkdir(parents=True)
    for number, frame in enumerate(good):
        (folder / "good" / f"{number:02}.png").write_bytes(encode_png(frame))
    random = np.random.default_rng(1)
    for number, path in enumerate(sorted((PHOTOS / "test" / "color").iterdir())):
        mask_path = PHOTOS / "ground_truth" / "color" / f"{path.stem}_mask.png"
        mask = cv2.resize(read_image(mask_path)[:, :, 0], (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA) > 127
        frame = good[number % len(good)].copy()
        y, x = random.integers(0, side - SIDE_PX + 1, 2)
        frame[y : y + SIDE_PX, x : x + SIDE_PX][mask] = known_size(path)[mask]
        (folder / "flawed" / f"{number:02}.png").write_bytes(encode_png(frame))


def write_bundle_of_shipped_students(path: Path, stride: int, rate: float, side: int) -> None:
    """The demo's students at every pixel, and coarsely at every `stride`-th; margin and threshold are fitted."""
    from trainer.config import LINE
    from trainer.distill import load_teacher
    from trainer.export import BundleFacts, export_bundle
    from trainer.methods.student_teacher import StudentTeacher
    from trainer.refine import RefineRequest

    shipped = open_bundle(BUNDLE)
    method = StudentTeacher(replace(LINE, stride=1, train_stride=4), [load_teacher("line")], seed=1)
    load_students(method.scales[0].nets, shipped.model)
    names = shipped.provenance["data"]["threshold"]
    photos = {path.name: known_size(path) for path in sorted((PHOTOS / "train" / "good").iterdir())}
    method.prepare(np.stack([photo for name, photo in photos.items() if name not in names]))
    method.fit_statistics(np.stack([photos[name] for name in names]))
    whole = []
    for name in names:
        whole.append(path.parent / f"held-out-{Path(name).stem}.png")
        whole[-1].write_bytes(encode_png(mirrored(photos[name], side)))
    spec = InputSpec(SIDE_PX, SIDE_PX, 3, max_batch=16, fit="tile")
    least = smallest_side_px(method.map_geometry(SIDE_PX, SIDE_PX))
    spec = msgspec.structs.replace(spec, min_side_px=max(spec.min_side_px, least))
    facts = BundleFacts("shipped-dense", method.name, "line", spec, "0" * 64, True, {})
    crops = np.stack(
        list(tiles_of([photos[name] for name in names], required_parts(false_rejects=rate, confidence=0.95)))
    )
    export_bundle(method, path, facts, held_out=crops, whole_images=whole, refine=RefineRequest(stride, rate))


def tiles_of(photos: list[Image], count: int) -> Iterator[Image]:
    """`count` crops at random places of the photographs' mirrored frames, turned at random."""
    random = np.random.default_rng(2)
    frames = [mirrored(photo, 3 * SIDE_PX) for photo in photos]
    for number in range(count):
        y, x = random.integers(0, 2 * SIDE_PX, 2)
        crop = frames[number % len(frames)][y : y + SIDE_PX, x : x + SIDE_PX]
        yield np.ascontiguousarray(np.rot90(crop, random.integers(4)))


def load_students(nets: Any, model: bytes) -> None:
    """The students of an exported graph, with input normalization taken out of their first layers again."""
    import onnx
    import torch
    from onnx import numpy_helper

    from trainer.patch_nets import InputNormalization

    found = {}
    for tensor in onnx.load_from_string(model).graph.initializer:
        if name := re.search(r"students\.(\d+)\.(?:\w+\.)*?layers\.(\d+)\.(weight|bias)$", tensor.name):
            found[name.groups()] = torch.from_numpy(numpy_helper.to_array(tensor).copy()).double()
    normalize = InputNormalization()
    for number, net in enumerate(nets):
        for place, layer in enumerate(net.layers):
            if not hasattr(layer, "weight"):
                continue
            weight, bias = (found[str(number), str(place), kind] for kind in ("weight", "bias"))
            if place == 0:
                bias = bias + (weight * normalize.mean).sum((1, 2, 3))
                weight = weight * normalize.std
            layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})


if __name__ == "__main__":
    main()
