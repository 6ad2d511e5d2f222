"""How well do bundles tell defects from good parts on the shared test images, beside PaDiM on the same images?

`--bundles DIR` holds one bundle a set, DIR/SET; with `--train` those that are missing are trained there first
(`kizu train METHOD`, the preset given, and the set's own options below; docs/benchmarks.md says which of them were
chosen when test figures were known).
Sets and bundles that are absent are skipped and named. Prints one JSON object: per set each figure with its 95 %
bootstrap interval, PaDiM's, and the difference; per defect kind our own; the means over all sets that were judged, and
what an image costs on this machine. `--untrained` is the control: the preset with teachers that never learned anything.
Run with `python benchmarks/accuracy.py --bundles DIR --train [--method fcdd] [--preset NAME] [--sets a,b] [-- MORE]`,
where what follows `--` goes to `kizu train`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from calib.evaluation import Evaluation, Figures, evaluate_bundle
from edge.bundle import ModelBundle, open_bundle
from edge.commands.engine_options import engine_of
from edge.engines.registry import BACKENDS, open_engine, require_backend

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
FIGURES = ("image_auroc", "pixel_auroc", "au_pro_30", "au_pro_05")

PADIM_SOURCE = (
    "../shared/anchors.md: PaDiM, ResNet-18 layer2 + layer3, one Gaussian per position, 256 x 256, same test images; "
    "interval 95 %"
)
# As printed there; no masks for elpv_mono, no interval for hazelnut_toy.
PADIM_ROWS = """
    set            image  interval   pixel  pro30  pro05
    magnetic_tile  0.804  0.77-0.84  0.706  0.752  0.589
    aitex_01       0.915  0.83-0.98  0.983  0.926  0.706
    aitex_02       0.750  0.65-0.84  0.977  0.876  0.688
    aitex_04       0.942  0.86-0.99  0.998  0.964  0.783
    hazelnut_toy   1.000  -          0.986  0.947  0.743
    elpv_mono      0.921  0.88-0.96  -      -      -
    deeppcb        0.623  0.53-0.71  0.877  0.548  0.187
"""


def padim() -> dict[str, dict[str, Any]]:
    """PaDiM's figures by set and figure; those that were not measured are left out."""
    table: dict[str, dict[str, Any]] = {}
    for line in PADIM_ROWS.strip().splitlines()[1:]:
        name, image, interval, *pixels = line.split()
        cells = dict(zip(FIGURES, (image, *pixels), strict=True))
        table[name] = {figure: float(cell) for figure, cell in cells.items() if cell != "-"}
        if interval != "-":
            table[name]["image_auroc_interval"] = [float(end) for end in interval.split("-")]
    return table


PADIM = padim()


# Images of one part or strip stay on one side of the held-out split; crops of many shapes keep their aspect.
AITEX_STRIP = ["--part-regex", r"^(\d+)_"]
TRAIN_OPTIONS = {
    "aitex_01": AITEX_STRIP,
    "aitex_02": AITEX_STRIP,
    "aitex_04": AITEX_STRIP,
    "magnetic_tile": ["--part-regex", r"num_(\d+)", "--aspect", "keep"],
}
# Another strip of cloth is a little unlike those learned from as a whole, and that is no flaw: what `center` is for.
STUDENT_TEACHER_OPTIONS = {name: ["--set", "center=median"] for name in TRAIN_OPTIONS if name.startswith("aitex")}


def train(name: str, data: Path, out: Path, method: str, preset: str | None, more: list[str]) -> None:
    """Train ``preset`` (None: the method's recommended one) on the set's good images, as a user would."""
    own = STUDENT_TEACHER_OPTIONS.get(name, []) if method == "student-teacher" else []
    command = [sys.executable, "-m", "edge.cli", "train", method, "--data", str(data), "--out", str(out)]
    command += [*([] if preset is None else ["--preset", preset]), *TRAIN_OPTIONS.get(name, []), *own, *more]
    print(f"accuracy: training {out}", file=sys.stderr)
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def beside_padim(name: str, result: Evaluation) -> dict[str, Any]:
    """One set's figures, PaDiM's, and ours minus theirs."""
    ours = _figures(result)
    difference = {
        figure: round(ours[figure] - PADIM[name][figure], 3)
        for figure in FIGURES
        if ours[figure] is not None and figure in PADIM[name]
    }
    return {
        "model_id": result.model_id,
        "method": result.method,
        "preset": result.preset,
        "engine": result.engine,
        "ours": ours,
        "padim": PADIM[name],
        "difference": difference,
        "kinds": {kind: _figures(figures) for kind, figures in result.kinds.items()},
        "warnings": result.warnings,
    }


def means(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each figure's mean over the judged sets that have it, ours and PaDiM's on the same sets."""
    table: dict[str, dict[str, float]] = {}
    for figure in FIGURES:
        rows = [row for row in found.values() if row["ours"][figure] is not None and figure in row["padim"]]
        if rows:
            table[figure] = {
                who: round(statistics.mean(row[who][figure] for row in rows), 4) for who in ("ours", "padim")
            } | {"sets": len(rows)}
    return table


def core_ms(bundle: ModelBundle, backend: str, frames: int = 24) -> float:
    """Core-milliseconds that the engine takes for a frame; a busy machine counts little."""
    spec = bundle.manifest.input
    batch = np.random.default_rng(0).integers(0, 256, (1, spec.height, spec.width, spec.channels), dtype=np.uint8)
    with open_engine(bundle, backend=require_backend(backend), max_batch=1) as engine:
        engine.warmup()
        start = time.process_time()
        for _ in range(frames):
            engine.infer(batch)
        return round(1000 * (time.process_time() - start) / frames, 1)


def untrained_teachers(preset: str, folder: Path) -> str:
    """Teachers of the preset's shapes with random weights, written beside the bundles; their files, by commas."""
    import torch

    from trainer.checkpoint import module_tensors, save_checkpoint
    from trainer.config import STUDENT_TEACHER
    from trainer.distill import load_teacher
    from trainer.patch_nets import build_patch_net

    files = []
    for name in STUDENT_TEACHER[preset].teachers:
        spec = load_teacher(name).spec
        tensors = module_tensors("net", build_patch_net(spec, 12345))
        tensors |= {"decoder.weight": torch.zeros(1, spec.descriptor_dim), "decoder.bias": torch.zeros(1)}
        file = folder.resolve() / f"untrained-{name}.safetensors"
        save_checkpoint(file, tensors, {"kind": "teacher", "spec": spec.to_json()})
        files.append(str(file))
    return ",".join(files)


def _figures(figures: Figures) -> dict[str, Any]:
    rounded = {name: getattr(figures, name) for name in FIGURES}
    return {
        "good": figures.good,
        "defective": figures.defective,
        **{name: None if value is None else round(value, 4) for name, value in rounded.items()},
        "intervals": {name: [round(end, 3) for end in ends] for name, ends in figures.intervals.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundles", type=Path, required=True, help="folder with one bundle a set, named as the set")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the sets; default ../shared/data")
    parser.add_argument("--sets", default=",".join(PADIM), help="which, separated by commas; default all")
    parser.add_argument("--train", action="store_true", help="train missing bundles first, up to 10 minutes each")
    parser.add_argument("--method", default="student-teacher", help="what --train trains; default student-teacher")
    parser.add_argument("--preset", help="its preset; default: the recommended one")
    parser.add_argument("--untrained", action="store_true", help="with --train: random teachers, as a control")
    parser.add_argument("--backend", default="openvino", choices=BACKENDS)
    parser.add_argument("more", nargs="*", help="after --: further options of kizu train")
    options = parser.parse_args()
    chosen = options.sets.split(",")
    if options.untrained and options.method != "student-teacher":
        parser.error("--untrained is about teachers, which only student-teacher has; see the method's own control")
    if unknown := sorted(set(chosen) - PADIM.keys()):
        parser.error(f"--sets: unknown {', '.join(unknown)}; there are {', '.join(PADIM)}")

    preset = options.preset or ("duo" if options.untrained else None)
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name in chosen:
        data, bundle = options.data / name, options.bundles / name
        if not data.is_dir():
            skipped[name] = "the data set is not there"
            continue
        if not bundle.exists() and options.train:
            options.bundles.mkdir(parents=True, exist_ok=True)
            control = ["--teacher", untrained_teachers(preset or "duo", options.bundles)] if options.untrained else []
            train(name, data, bundle.resolve(), options.method, preset, [*options.more, *control])
        if not bundle.exists():
            skipped[name] = "no bundle; --train makes it"
            continue
        result = evaluate_bundle(open_bundle(bundle), data, through=engine_of(options.backend))
        found[name] = beside_padim(name, result) | {"core_ms": core_ms(open_bundle(bundle), options.backend)}
    report = {
        "benchmark": "accuracy",
        "padim_source": PADIM_SOURCE,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "train_options": options.more,
        "means": means(found),
        "sets": found,
        "skipped": skipped,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
