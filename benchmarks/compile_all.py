"""Does every graph build for every GPU at every precision, how fast, and the same twice?

Every preset of student-teacher whose teachers are shipped is exported from a few of the demo's photographs (students
untrained: a build does not see what weights mean), and every bundle given is taken as it is. TensorRT for RTX builds
each for each target alone, at fp32, fp16 and bf16, and quantized bundles at their own precision; twice, to compare the
bytes, and the bytes with the numbers of intermediate values left out. Prints one JSON line a graph and precision, then
one of totals; exits with 1 if anything does not build, or takes longer than `--bound-s`.

    python benchmarks/compile_all.py [--bundles DIR ...]
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge.bundle import InputSpec, ModelBundle, open_bundle
from edge.compile import CompiledPlan, CompilePrecision, compile_bundle
from edge.errors import KizuError
from edge.graph import quantized_types

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "edge" / "demo" / "photos"
TARGETS = ("sm80", "sm86", "sm89", "sm120")
FLOATS: tuple[CompilePrecision, ...] = ("fp32", "fp16", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, nargs="*", default=[], help="further bundles")
    parser.add_argument("--bound-s", type=float, default=3.0)
    options = parser.parse_args()
    failed = total = slow = 0
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for bundle in itertools.chain(presets(Path(folder)), map(open_bundle, options.bundles)):
            held = quantized_types(bundle.model)
            for precision in held or FLOATS:
                row = matrix(bundle, precision, Path(folder))  # type: ignore[arg-type]
                print(json.dumps(row), flush=True)
                total += len(TARGETS)
                failed += len(row["failed"])  # type: ignore[arg-type]
                slowest = max(slowest, row["slowest_s"])  # type: ignore[call-overload]
                slow += row["slowest_s"] > options.bound_s  # type: ignore[operator]
    print(json.dumps({"benchmark": "compile_all", "engines": total, "failed": failed, "slowest_s": slowest}))
    sys.exit(1 if failed or slow else 0)


def matrix(bundle: ModelBundle, precision: CompilePrecision, folder: Path) -> dict[str, object]:
    """Both builds of one graph at one precision for every target."""
    plans, failed, same, same_but_names = [], {}, 0, 0
    for target in TARGETS:
        try:
            first, second = (
                compile_bundle(bundle, targets=[target], precision=precision, cache=Path(tempfile.mkdtemp(dir=folder)))
                for _ in range(2)
            )
        except KizuError as error:
            if precision == "fp8" and target in ("sm80", "sm86"):
                continue  # as it should be
            failed[target] = str(error)[:300]
            continue
        plans += [first, second]
        same += first.sha256 == second.sha256
        same_but_names += nameless(first) == nameless(second)
    return {
        "graph": bundle.manifest.preset or bundle.manifest.name,
        "precision": precision,
        "slowest_s": max((plan.build_s for plan in plans), default=0.0),
        "mib": round(max((plan.size for plan in plans), default=0) / 2**20, 1),
        "same_bytes": f"{same} of {len(TARGETS)}",
        "same_but_names": f"{same_but_names} of {len(TARGETS)}",
        "failed": failed,
    }


def nameless(plan: CompiledPlan) -> bytes:
    return re.sub(rb"__mye\d+", b"__mye", plan.read())


def presets(folder: Path) -> Iterator[ModelBundle]:
    """A bundle of every preset whose teachers are here."""
    from trainer.config import STUDENT_TEACHER
    from trainer.data import load_training_set
    from trainer.distill import load_teacher
    from trainer.export import BundleFacts, export_bundle
    from trainer.methods.student_teacher import StudentTeacher

    frames = load_training_set(PHOTOS, size_px=256, aspect="stretch", skip_bad=False).take(np.arange(8))
    for name, config in STUDENT_TEACHER.items():
        try:
            method = StudentTeacher(config, [load_teacher(teacher) for teacher in config.teachers], seed=1)
        except KizuError as error:
            print(f"compile_all: {name} left out: {error}", file=sys.stderr)
            continue
        method.prepare(frames[:4])
        # Few images: a cell a pixel at full width costs seconds an image, and a build does not see the numbers.
        method.fit_statistics(frames[4:6])
        spec = InputSpec(config.size_px, config.size_px, 3, max_batch=16)
        facts = BundleFacts(name, "student-teacher", name, spec, "0" * 64, True, {}, {})
        yield export_bundle(method, folder / name, facts, held_out=frames[6:7])


if __name__ == "__main__":
    main()
