"""Does every graph build for every GPU at every precision, how fast, and the same twice?

Every preset of every method whose teachers are shipped is exported from a few of the demo's photographs (untrained: a
build does not see what weights mean; the paper's student-teacher presets at 64 px a side), and every bundle given is
taken as it is. TensorRT for RTX builds each for each target alone, at fp32, fp16 and bf16, and at int8 and fp8 where
`kizu quantize` takes the graph (ranges of one photograph, no accuracy gate); fp8 must be refused by name where a GPU
has none. Everything is built twice by `kizu compile`, to compare the bytes. Prints one JSON line a graph and precision,
then one of totals; exits with 1 if anything does not build, has other bytes the second time, or takes longer than
`--bound-s`.

    python benchmarks/compile_all.py [--only METHOD/PRESET ...] [--bundles DIR ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from calib.int8 import Activations, chosen_layers, find_ranges, observe, quantize_graph
from calib.quantize import draft_bundle
from calib.ranges import QuantizedPrecision
from edge.bundle import InputSpec, ModelBundle, derive_bundle, open_bundle
from edge.errors import KizuError
from edge.graph import quantized_types

if TYPE_CHECKING:
    from trainer.config import MethodConfig

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "edge" / "demo" / "photos"
TARGETS = ("sm80", "sm86", "sm89", "sm120")
WITHOUT_FP8 = {"sm80", "sm86"}
FLOATS = ("fp32", "fp16", "bf16")
PAPER_SIDE_PX = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One graph at one precision, built twice for each target; `failed` holds messages by target."""

    graph: str
    precision: str
    engines: int
    same_bytes: int
    slowest_s: float
    mib: float
    refused: list[str]
    failed: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, nargs="*", default=[], help="further bundles")
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD/PRESET", help="these presets; default: all")
    parser.add_argument("--bound-s", type=float, default=3.0)
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for bundle in itertools.chain(presets(Path(folder), options.only), map(open_bundle, options.bundles)):
            for precision, variant in variants(bundle, Path(folder)):
                rows.append(matrix(bundle.manifest.name, variant, precision))
                print(json.dumps(dataclasses.asdict(rows[-1])), flush=True)
    engines, failed = sum(row.engines for row in rows), sum(len(row.failed) for row in rows)
    other_bytes, slowest = sum(row.engines - row.same_bytes for row in rows), max(row.slowest_s for row in rows)
    totals = {"engines": engines, "failed": failed, "other_bytes": other_bytes, "slowest_s": slowest}
    print(json.dumps({"benchmark": "compile_all"} | totals))
    sys.exit(1 if failed or other_bytes or slowest > options.bound_s or not engines else 0)


def variants(bundle: ModelBundle, folder: Path) -> Iterator[tuple[str, Path]]:
    """Every precision of one graph, with the bundle on disk that has it."""
    held = quantized_types(bundle.model)
    yield from ((precision, bundle.path) for precision in held or FLOATS)
    if not held:
        yield from quantized(bundle, folder)


def quantized(bundle: ModelBundle, folder: Path) -> Iterator[tuple[str, Path]]:
    """The graph in eight bits as `kizu quantize` would write it, not judged."""
    seen: Activations | None = None
    for precision in get_args(QuantizedPrecision):
        try:
            layers = chosen_layers(bundle.model, precision)
            # int8 comes first and has every layer that fp8 has.
            seen = seen or observe(bundle, layers, sorted(PHOTOS.rglob("*.jpg"))[:1], lambda done: None)
            ranges = find_ranges(layers, seen, "mse", precision)
            made = quantize_graph(bundle.model, layers, ranges, precision, seen.means)
            path = folder / f"{bundle.manifest.name}-{precision}"
            draft = draft_bundle(bundle, made)
            derive_bundle(
                bundle, path, calibration=bundle.calibration, provenance_extra={}, model=draft.model,
                golden=draft.golden, tolerance=draft.manifest.tolerance,
            )  # fmt: skip
            yield precision, path
        except KizuError as error:
            print(f"compile_all: {bundle.manifest.name} {precision} left out: {error}", file=sys.stderr)


def matrix(graph: str, bundle: Path, precision: str) -> Row:
    """An engine for each target alone, twice."""
    row = Row(graph, precision, 0, 0, 0.0, 0.0, [], {})
    for target in TARGETS:
        first, second = build(bundle, precision, target), build(bundle, precision, target)
        if isinstance(first, str) or isinstance(second, str):
            told = first if isinstance(first, str) else str(second)
            if precision == "fp8" and target in WITHOUT_FP8 and f"GPUs of {target} do not compute in fp8" in told:
                row.refused.append(target)
                continue
            row.failed[target] = told
            row = replace(row, engines=row.engines + 1)
            continue
        row = replace(
            row,
            engines=row.engines + 1,
            same_bytes=row.same_bytes + (first["sha256"] == second["sha256"]),
            slowest_s=max(row.slowest_s, first["build_s"], second["build_s"]),
            mib=max(row.mib, round(first["size"] / 2**20, 1)),
        )
    return row


def build(bundle: Path, precision: str, target: str) -> dict[str, Any] | str:
    """What `kizu compile --json` prints, or what it says on failing."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "edge.cli", "compile", str(bundle), "--target", target, "--json"]
        command += ["--precision", precision, "--cache", cache]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr[-400:] or f"exit status {done.returncode}"
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
    return answer


def presets(folder: Path, only: list[str]) -> Iterator[ModelBundle]:
    """A bundle of every preset that can be made of the photographs alone, one at a time."""
    from trainer.presets import PRESETS

    for method_name, of_method in PRESETS.items():
        for preset, config in of_method.items():
            name = f"{method_name}/{preset}"
            if only and name not in only:
                continue
            try:
                yield untrained(folder / name.replace("/", "-"), method_name, preset, config)
            except KizuError as error:
                print(f"compile_all: {name} left out: {error}", file=sys.stderr)


def untrained(path: Path, method_name: str, preset: str, config: MethodConfig) -> ModelBundle:
    """A preset's graph with the statistics of a few photographs: a build does not see the numbers."""
    from trainer.config import StudentTeacherConfig
    from trainer.data import load_training_set
    from trainer.export import BundleFacts, export_bundle
    from trainer.methods import METHODS

    config = with_anomalies(method_name, config, path.with_name("bad"))
    if isinstance(config, StudentTeacherConfig):
        config = replace(config, maps="all")  # the largest graph that a product may get
    frames = load_training_set(PHOTOS, size_px=config.size_px, aspect="stretch", skip_bad=False).take(np.arange(16))
    if method_name == "student-teacher" and preset.startswith("paper-"):
        # The same nodes; at 256 px a photograph takes a CPU up to a minute, and fp16 is compared on one.
        frames = frames[:, :PAPER_SIDE_PX, :PAPER_SIDE_PX]
    method = METHODS[method_name](config, seed=1, device="cpu")
    method.prepare(frames[:8])
    # Few images: a cell a pixel at full width costs seconds an image.
    method.fit_statistics(frames[8:10])
    side = frames.shape[1]
    spec = InputSpec(side, side, 3, max_batch=16)
    facts = BundleFacts(path.name, method_name, preset, spec, "0" * 64, True, {})
    return export_bundle(method, path, facts, held_out=frames[10:11])


def with_anomalies(method_name: str, config: MethodConfig, bad: Path) -> MethodConfig:
    """`config` with what some presets ask for beyond good parts: other photographs, or bad parts with their masks."""
    if getattr(config, "penalty", 0.0) > 0 or config.preset in ("paper-cifar", "paper-gray", "cifar-resnet"):
        return replace(config, photographs=str(PHOTOS / "train" / "good"))
    if method_name != "drocc-lf":
        return config
    bad.mkdir(exist_ok=True)
    for image in sorted((PHOTOS / "test" / "color").iterdir()):
        shutil.copy(image, bad)
        shutil.copy(PHOTOS / "ground_truth" / "color" / f"{image.stem}_mask.png", bad)
    return replace(config, bad=str(bad))


if __name__ == "__main__":
    main()
