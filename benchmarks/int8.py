"""What int8 costs and saves: core-milliseconds a frame against float32, AUROC and verdicts, on the same machine.

    python benchmarks/int8.py BUNDLE --data DIR [--ranges percentile,mse,entropy] [--weight-bits 8]

Quantizes BUNDLE for each range finder on DIR/train/good (limits wide open: the figures are what is asked for) and
prints one JSON object. Times are CPU time of all threads of the process, single frames through OpenVINO and ONNX
Runtime, float32 and int8 interleaved, medians over the rounds; ratios are float32 over int8. The environment variable
ONEDNN_MAX_CPU_ISA (AVX512_CORE_VNNI, AVX2) limits OpenVINO to what other CPUs have.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from calib.agreement import Limits  # noqa: E402
from calib.quantize import Request, quantize_bundle  # noqa: E402
from calib.ranges import Finder  # noqa: E402
from edge.bundle import ModelBundle, open_bundle  # noqa: E402
from edge.engines.registry import Backend, open_engine  # noqa: E402
from edge.protocols import Engine  # noqa: E402

BACKENDS: tuple[Backend, ...] = ("openvino", "onnxruntime")
FLAGS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--ranges", default="percentile,mse,entropy")
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--frames", type=int, default=8, help="frames of each measurement")
    options = parser.parse_args()
    source = open_bundle(options.bundle)
    finders: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        small = source
        for finder in options.ranges.split(","):
            small, finders[finder] = quantized(source, options.data, finder, Path(folder) / finder, options.weight_bits)
        times = measure(source, small, options.rounds, options.frames)
    print(json.dumps({"bundle": source.manifest.preset, "cpu": cpu(), "finders": finders, **times}, indent=2))


def quantized(
    source: ModelBundle, data: Path, finder: Finder, out: Path, bits: int
) -> tuple[ModelBundle, dict[str, Any]]:
    """The int8 bundle and what it agrees on."""
    request = Request(precision="int8", finder=finder, weight_bits=bits, limits=Limits(0.0, 1.0), data=data)
    bundle, record = quantize_bundle(source, data / "train" / "good", out, request)
    return bundle, {
        **msgspec.to_builtins(record.agreement),
        "weight_bits": bits,
        "layers": len(record.ranges),
        "parity_max_abs": record.parity_max_abs,
    }


def measure(source: ModelBundle, small: ModelBundle, rounds: int, frames: int) -> dict[str, Any]:
    """Core-milliseconds a frame by backend and precision; see the module's docstring."""
    pixels = source.golden.frames
    with ExitStack() as stack:
        engines: dict[tuple[str, str], Engine] = {
            (backend, name): stack.enter_context(open_engine(bundle, backend=backend, max_batch=1))
            for backend in BACKENDS
            for name, bundle in (("fp32", source), ("int8", small))
        }
        spent: dict[tuple[str, str], list[float]] = {key: [] for key in engines}
        for engine in engines.values():
            engine.warmup()
        for _ in range(rounds):
            for key, engine in engines.items():
                started = time.process_time()
                for place in range(frames):
                    at = place % len(pixels)
                    engine.infer(np.ascontiguousarray(pixels[at : at + 1]))
                spent[key].append(1000 * (time.process_time() - started) / frames)
    medians = {key: statistics.median(values) for key, values in spent.items()}
    return {
        "core_ms": {backend: {name: medians[backend, name] for name in ("fp32", "int8")} for backend in BACKENDS},
        "ratio": {backend: medians[backend, "fp32"] / medians[backend, "int8"] for backend in BACKENDS},
        "isa_limit": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "load_average": os.getloadavg()[0],
    }


def cpu() -> dict[str, Any]:
    """Its name, and which of the instructions that matter to int8 it has."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    lines = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    known = fields.get("flags", "").split()
    return {"name": fields.get("model name", "?"), "has": [flag for flag in FLAGS if flag in known]}


if __name__ == "__main__":
    main()
