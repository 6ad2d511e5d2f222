"""Does every graph build for every GPU at every precision, how fast, and the same twice?

Every preset of every method whose teachers are shipped is exported from a few of the demo's photographs (untrained: a
build does not see what weights mean), and every bundle given is taken as it is. TensorRT for RTX builds each for each
target alone, at fp32, fp16 and bf16, and at int8 and fp8 where `kizu quantize` takes the graph (ranges of four
photographs, no accuracy gate); fp8 must be refused by name where a GPU has none. Each is built twice, to compare the
bytes, and the bytes with the numbers of intermediate values left out. Prints one JSON line a graph and precision, then
one of totals; exits with 1 if anything does not build, or takes longer than `--bound-s`.

    python benchmarks/compile_all.py [--only METHOD/PRESET ...] [--bundles DIR ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np

from calib.int8 import QuantizedPrecision, chosen_layers, find_ranges, observe, quantize_graph
from edge.bundle import InputSpec, ModelBundle, open_bundle
from edge.compile import compile_bundle
from edge.errors import CommandError, KizuError
from edge.graph import quantized_types
from edge.plan_cache import CompiledPlan, CompilePrecision

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "edge" / "demo" / "photos"
TARGETS = ("sm80", "sm86", "sm89", "sm120")
WITHOUT_FP8 = {"sm80", "sm86"}
FLOATS: tuple[CompilePrecision, ...] = ("fp32", "fp16", "bf16")


@dataclass(frozen=True, slots=True)
class Row:
    """Both builds of one graph at one precision for every target; `failed` holds messages by target."""

    graph: str
    precision: str
    slowest_s: float
    mib: float
    same_bytes: str
    same_but_names: str
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
            for precision, variant in variants(bundle):
                rows.append(matrix(variant, precision, Path(folder)))
                print(json.dumps(dataclasses.asdict(rows[-1])), flush=True)
    failed, slowest = sum(len(row.failed) for row in rows), max((row.slowest_s for row in rows), default=0.0)
    engines = sum(len(TARGETS) - len(row.refused) for row in rows)
    print(json.dumps({"benchmark": "compile_all", "engines": engines, "failed": failed, "slowest_s": slowest}))
    sys.exit(1 if failed or slowest > options.bound_s or not rows else 0)


def variants(bundle: ModelBundle) -> Iterator[tuple[CompilePrecision, ModelBundle]]:
    """Every precision of one graph, with the bundle that has it."""
    held: tuple[CompilePrecision, ...] = quantized_types(bundle.model)  # type: ignore[assignment]
    yield from ((precision, bundle) for precision in held or FLOATS)
    if not held:
        for low in get_args(QuantizedPrecision):
            try:
                yield low, quantized(bundle, low)
            except KizuError as error:
                print(f"compile_all: {bundle.manifest.name} {low} left out: {error}", file=sys.stderr)


def quantized(bundle: ModelBundle, precision: QuantizedPrecision) -> ModelBundle:
    """The graph as `kizu quantize` would write it, not judged."""
    layers = chosen_layers(bundle.model, precision)
    seen = observe(bundle, layers, sorted(PHOTOS.rglob("*.jpg"))[:4], lambda done: None)
    made = quantize_graph(bundle.model, layers, find_ranges(layers, seen, "mse", precision), precision, seen.means)
    return replace(bundle, model=made.model, coarse=None)


def matrix(bundle: ModelBundle, precision: CompilePrecision, folder: Path) -> Row:
    """Two builds for each target."""
    plans: list[CompiledPlan] = []
    failed: dict[str, str] = {}
    refused: list[str] = []
    same = same_but_names = 0
    for target in TARGETS:
        try:
            first, second = (
                compile_bundle(bundle, targets=[target], precision=precision, cache=Path(tempfile.mkdtemp(dir=folder)))
                for _ in range(2)
            )
        except CommandError as error:
            if precision == "fp8" and target in WITHOUT_FP8 and target in str(error):
                refused.append(target)
            else:
                failed[target] = str(error)[:300]
            continue
        except KizuError as error:
            failed[target] = str(error)[:300]
            continue
        plans += [first, second]
        same += first.sha256 == second.sha256
        same_but_names += nameless(first) == nameless(second)
    return Row(
        graph=bundle.manifest.name,
        precision=precision,
        slowest_s=max((plan.build_s for plan in plans), default=0.0),
        mib=round(max((plan.size for plan in plans), default=0) / 2**20, 1),
        same_bytes=f"{same} of {len(TARGETS)}",
        same_but_names=f"{same_but_names} of {len(TARGETS)}",
        refused=refused,
        failed=failed,
    )


def nameless(plan: CompiledPlan) -> bytes:
    return re.sub(rb"__mye\d+", b"__mye", plan.read())


def presets(folder: Path, only: list[str]) -> Iterator[ModelBundle]:
    """A bundle of every preset that can be made of the photographs alone, one at a time."""
    from trainer.data import load_training_set
    from trainer.export import BundleFacts, export_bundle
    from trainer.methods import METHODS
    from trainer.presets import PRESETS

    for method_name, of_method in PRESETS.items():
        for preset, config in of_method.items():
            name = f"{method_name}/{preset}"
            if only and name not in only:
                continue
            side = config.size_px
            frames = load_training_set(PHOTOS, size_px=side, aspect="stretch", skip_bad=False).take(np.arange(8))
            try:
                method = METHODS[method_name](config, seed=1, device="cpu")
                method.prepare(frames[:4])
                # Few images: a cell a pixel at full width costs seconds an image, and a build does not see the numbers.
                method.fit_statistics(frames[4:6])
                spec = InputSpec(side, side, 3, max_batch=16)
                facts = BundleFacts(name.replace("/", "-"), method_name, preset, spec, "0" * 64, True, {}, {})
                yield export_bundle(method, folder / facts.name, facts, held_out=frames[6:7])
            except KizuError as error:
                print(f"compile_all: {name} left out: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
