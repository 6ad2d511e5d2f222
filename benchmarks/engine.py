"""Does the engine run `line` at the machine's own matrix-product rate?

    python benchmarks/engine.py [BUNDLE] [--rounds 9] [--frames 16]

Prints one JSON object. Everything is measured in one run, interleaved, medians over the rounds. The bound is the
better of two fp32 matrix products of 1024 x 1024, one thread each: NumPy's BLAS and OpenVINO's MatMul.

Ratios are of GFLOP per *core-second* (CPU time of all threads): on a machine whose cores are shared with other work,
wall time measures the neighbors. `fps` is wall time all the same, and worth what the machine's load was worth.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.line_graph import INPUT, MAP, flops, line_model  # noqa: E402
from edge.bundle import Golden, ModelBundle, ScoreCalibration, Tolerance, open_bundle, write_bundle  # noqa: E402
from edge.engines.contract import usable_cores  # noqa: E402
from edge.engines.onnxruntime import OnnxRuntimeEngine  # noqa: E402
from edge.engines.openvino import OpenVinoEngine, cpu_options  # noqa: E402
from edge.protocols import Engine  # noqa: E402

SIDE = 1024  # of the matrices: 4 MB each, large enough for either library's best blocking
SHIPPED = ROOT / "edge" / "demo" / "bundle"

Task = Callable[[], float]
"""Does some work and returns its GFLOP."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, default=SHIPPED if (SHIPPED / "bundle.json").exists() else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--frames", type=int, default=16, help="frames of each measurement")
    options = parser.parse_args()
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":  # read once, when NumPy is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    with tempfile.TemporaryDirectory() as folder:
        bundle = open_bundle(options.bundle) if options.bundle else _random_bundle(Path(folder) / "line")
        print(json.dumps(measure(bundle, options.rounds, options.frames), indent=2))


def measure(bundle: ModelBundle, rounds: int, frames: int) -> dict[str, Any]:
    """Run every task `rounds` times, interleaved; see the module's docstring."""
    cores = usable_cores()
    frame_gflop = flops(bundle.model) / 1e9
    engines: dict[str, Engine] = {
        f"openvino_{cores}x1": OpenVinoEngine(bundle, streams=cores, max_batch=1),
        f"openvino_1x{cores}": OpenVinoEngine(bundle, streams=1, max_batch=1),
        "onnxruntime": OnnxRuntimeEngine(bundle, max_batch=1),
    }
    tasks: dict[str, Task] = {"numpy_sgemm": numpy_product(), "openvino_sgemm": openvino_product()}
    for name, engine in engines.items():
        engine.warmup()
        tasks[name] = _stream(engine, bundle, frames, frame_gflop)
    wall: dict[str, list[float]] = {name: [] for name in tasks}
    core: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            wall_start, core_start = time.perf_counter(), time.process_time()
            gflop = task()
            wall[name].append(gflop / (time.perf_counter() - wall_start))
            core[name].append(gflop / (time.process_time() - core_start))
    rate = {name: statistics.median(values) for name, values in core.items()}
    bound = max(rate["numpy_sgemm"], rate["openvino_sgemm"])
    return {
        "bundle": bundle.manifest.name,
        "gflop_per_frame": frame_gflop,
        "cores": cores,
        "load_average": os.getloadavg()[0],
        "sgemm_gflops_per_core": {name: rate[name] for name in ("numpy_sgemm", "openvino_sgemm")},
        "engines": {
            name: {
                "fps": statistics.median(wall[name]) / frame_gflop,
                "gflops": statistics.median(wall[name]),
                "gflops_per_core": rate[name],
                "fps_if_alone": rate[name] * cores / frame_gflop,
                "ratio_to_sgemm": rate[name] / bound,
            }
            for name in engines
        },
        "ratio": rate[f"openvino_{cores}x1"] / bound,
        "target": 0.9,
    }


def _stream(engine: Engine, bundle: ModelBundle, frames: int, frame_gflop: float) -> Task:
    """Single frames through the engine with all its depth in use."""
    spec = engine.spec
    pixels = np.random.default_rng(0).integers(0, 256, (1, spec.height, spec.width, spec.channels), dtype=np.uint8)

    def run() -> float:
        out: deque[Any] = deque()
        for _ in range(frames):
            if len(out) == spec.depth:
                engine.collect(60.0)
                out.popleft()
            out.append(engine.submit(pixels))
        for _ in out:
            engine.collect(60.0)
        return frames * frame_gflop

    return run


def numpy_product(times: int = 16) -> Task:
    left, right = (np.random.default_rng(seed).random((SIDE, SIDE), np.float32) for seed in (0, 1))
    result = np.empty_like(left)

    def run() -> float:
        for _ in range(times):
            np.matmul(left, right, out=result)
        return times * 2 * SIDE**3 / 1e9

    return run


def openvino_product(times: int = 16) -> Task:
    import openvino as ov
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.random.default_rng(1).random((SIDE, SIDE), np.float32), "b")
    sides = [SIDE, SIDE]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, sides)],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, sides)],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    core = ov.Core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", cpu_options(1, 1))
    request = compiled.create_infer_request()
    request.set_tensor("a", ov.Tensor(np.random.default_rng(0).random((SIDE, SIDE), np.float32)))

    def run() -> float:
        for _ in range(times):
            request.start_async()
            request.wait()
        return times * 2 * SIDE**3 / 1e9

    return run


def _random_bundle(path: Path) -> ModelBundle:
    """A bundle of the random-weights `line` graph; its golden answers are of no use and of the right shape."""
    frames = np.zeros((1, INPUT.height, INPUT.width, INPUT.channels), np.uint8)
    return write_bundle(
        path,
        name="line, random weights",
        method="student-teacher",
        preset="line",
        input=INPUT,
        map=MAP,
        tolerance=Tolerance(absolute=1e-3, relative=1e-3),
        model=line_model(),
        golden=Golden(frames, np.zeros((1, MAP.height, MAP.width), np.float32), np.zeros(1, np.float32)),
        calibration=ScoreCalibration("provisional", False, 0.0, 0.0, 1, (), "none", "none"),
        provenance={"made_by": "benchmarks/engine.py"},
    )


if __name__ == "__main__":
    main()
