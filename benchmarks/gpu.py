"""How fast is a bundle on the GPU of this machine, and is the pipeline as fast as the bare engine?

    python benchmarks/gpu.py [BUNDLE ...] [--seconds 3] [--device cuda:0]

Prints one JSON object with a row for each bundle and batch: frames per second with the schedule's copies overlapping,
frames per second of the engine alone (inputs on the device), their ratio (goal 0.9), p50 and p99 of a batch's way
through, and the largest difference of the golden maps from ONNX's on the CPU, relative. Builds its plans itself, at the
precision of the graph. Without a GPU it says so on standard error and exits with 1: it never reports a number.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests" / "helpers"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from edge.bundle import ModelBundle, open_bundle  # noqa: E402
from edge.engines.cuda import CudaDevice, ordinal_of  # noqa: E402
from edge.engines.device import BufferPlan, Plan  # noqa: E402
from edge.engines.registry import open_engine  # noqa: E402
from edge.engines.tensorrt import TensorRtProgram, import_tensorrt, spec_of, version_of  # noqa: E402
from edge.errors import EngineError  # noqa: E402
from tensorrt_plans import build_plan  # noqa: E402


def through_the_schedule(bundle: ModelBundle, plan: Path, device: str, batch: int, seconds: float) -> dict[str, Any]:
    """Frames per second and latency with as many batches in flight as the engine keeps."""
    with open_engine(bundle, backend="tensorrt", device=device, max_batch=batch, plan=Plan.read(plan)) as engine:
        engine.warmup()
        golden = bundle.golden
        maps = np.concatenate(
            [engine.infer(golden.frames[at : at + batch])[0] for at in range(0, len(golden.maps), batch)]
        )
        pixels = np.repeat(golden.frames[:1], batch, axis=0)
        began: deque[float] = deque()
        taken: list[float] = []
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            if len(began) == engine.spec.depth:
                engine.collect(10.0)
                taken.append(time.perf_counter() - began.popleft())
            began.append(time.perf_counter())
            engine.submit(pixels)
        while began:
            engine.collect(10.0)
            taken.append(time.perf_counter() - began.popleft())
        elapsed = time.perf_counter() - started
    p50, p99 = np.percentile(taken, [50, 99]) * 1e3
    parity = float(np.abs(maps - golden.maps).max() / np.abs(golden.maps).max())
    return {"fps": len(taken) * batch / elapsed, "p50_ms": float(p50), "p99_ms": float(p99), "parity_rel": parity}


def bare(bundle: ModelBundle, plan: Path, device: str, batch: int, seconds: float) -> float:
    """Frames per second of the engine alone, on one slot, nothing copied."""
    trt = import_tensorrt()
    gpu = CudaDevice(ordinal_of(device))
    try:
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        program = TensorRtProgram(trt, runtime, Plan.read(plan), bundle.manifest, slots=1)
        layout = BufferPlan.of(spec_of(bundle.manifest, "", "", batch))
        stream, done, address = gpu.stream(), gpu.event(), gpu.allocate(layout.size)
        places = (address, address + layout.maps_at, address + layout.scores_at)

        def runs(count: int) -> float:
            started = time.perf_counter()
            for _ in range(count):
                program.enqueue(0, batch, *places, stream)
            gpu.record(done, stream)
            while not gpu.done(done):
                pass
            return time.perf_counter() - started

        runs(20)
        count = max(20, round(seconds / (runs(20) / 20)))
        elapsed = runs(count)
        program.close()
        return count * batch / elapsed
    finally:
        gpu.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path, default=[ROOT / "edge" / "demo" / "bundle"])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--device", default="cuda:0")
    given = parser.parse_args()
    try:
        gpu = CudaDevice(ordinal_of(given.device))
        name, version = gpu.name, version_of(import_tensorrt())
        gpu.close()
    except EngineError as error:
        print(f"benchmarks/gpu.py measures a GPU and there is none to measure: {error}", file=sys.stderr)
        return 1
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for path in given.bundles:
            bundle = open_bundle(path)
            plan = build_plan(bundle, Path(folder) / f"{bundle.model_id}.plan")
            for batch in sorted({1, min(8, bundle.manifest.input.max_batch)}):
                row = through_the_schedule(bundle, plan, given.device, batch, given.seconds)
                alone = bare(bundle, plan, given.device, batch, given.seconds)
                row |= {"bare_fps": alone, "pipeline_of_bare": row["fps"] / alone}
                shown = {key: round(value, 4) for key, value in row.items()}
                rows.append({"model": bundle.manifest.name, "preset": bundle.manifest.preset, "batch": batch, **shown})
    print(json.dumps({"benchmark": "gpu", "gpu": name, "tensorrt": version, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
