"""How fast is a line on the GPU of this machine, how near to the bare engine, and how near to the CPU's maps?

    python benchmarks/gpu.py [BUNDLE ...] [--only PRESET ...] [--precision fp16] [--engine auto] [--seconds 3]

Prints device and versions, then a JSON line for each graph (the bundles, the demo's by default, and `line`, `paper-33`,
`paper-multiscale` untrained, where torch can make them) and batch (1 and 8), then one with the goals:

    fps, p50_ms, p99_ms     the line's own schedule, copies overlapping; latency of a batch from submit to maps
    bare_fps                the graph alone, inputs on the device; `pipeline_of_bare` is their ratio, goal 0.9
    parity_rel              the golden maps' largest difference from fp32 on the CPU, of their largest value; goal 1e-2
    host_core_ms            CPU time of this process for a frame, driver calls and waiting included

TensorRT runs the graphs. Where it refuses this GPU the line says `"tensorrt_executed": false` and why, and torch under
CUDA graphs runs them by the same schedule. Without a GPU it says so and exits with 1: it never reports a number.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_programs  # first: it finds the checkout
import numpy as np
from gpu_graphs import PRESETS, SIDE_PX, Graph, preset_graph
from gpu_programs import ROOT, Kind, Precision, bare_fps, choose, engine_of
from numpy.typing import NDArray

from edge.bundle import ModelBundle, open_bundle
from edge.engines.streamed import StreamedEngine
from edge.errors import EngineError

DEMO = ROOT / "edge" / "demo" / "bundle"
PARITY_GOAL, PIPELINE_GOAL = 1e-2, 0.9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path, default=[DEMO])
    parser.add_argument("--only", nargs="*", default=PRESETS, metavar="PRESET", help="of the untrained ones")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp16")
    parser.add_argument("--engine", choices=("auto", "tensorrt", "torch"), default="auto")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    parser.add_argument("--device", default="cuda:0")
    given = parser.parse_args()
    try:
        print(json.dumps({"benchmark": "gpu"} | gpu_programs.versions(given.device)), flush=True)
    except EngineError as error:
        print(f"benchmarks/gpu.py measures a GPU and there is none to measure: {error}", file=sys.stderr)
        return 1
    opened = [Graph(bundle.manifest.name, bundle) for bundle in map(open_bundle, given.bundles)]
    kind, why = choose(opened[0], given.engine, given.device, given.precision)
    print(json.dumps({"engine": kind, "tensorrt_executed": kind == "tensorrt", "why_not": why}), flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for graph in graphs(opened if kind == "tensorrt" else [], given.only):
            for batch in sorted({1, min(8, graph.bundle.manifest.input.max_batch)}):
                rows.append(row(graph, kind, given.device, given.precision, batch, Path(folder), given.seconds))
                print(json.dumps(rows[-1]), flush=True)
    if not rows:
        print("benchmarks/gpu.py: TensorRT does not run here and torch is not installed", file=sys.stderr)
        return 1
    print(json.dumps(goals(rows, given.precision)))
    return 0


def graphs(opened: list[Graph], presets: list[str]) -> Iterator[Graph]:
    """One at a time: the paper's take seconds on a CPU for their golden answers."""
    yield from opened
    try:
        import torch
    except ImportError:
        print(f"benchmarks/gpu.py: no torch, so {', '.join(presets)} are left out", file=sys.stderr)
        return
    where = "cuda" if torch.cuda.is_available() else "cpu"
    for preset in presets:
        yield preset_graph(preset, pictures(open_bundle(DEMO)), where)


def pictures(bundle: ModelBundle) -> NDArray[np.uint8]:
    """(4, 256, 256, 3): the demo's golden frames, and noise on them, so that no two are alike."""
    frames = np.resize(bundle.golden.frames, (4, SIDE_PX, SIDE_PX, 3)).astype(np.int16)
    noise = np.random.default_rng(0).integers(-8, 9, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def row(
    graph: Graph, kind: Kind, device: str, precision: Precision, batch: int, plans: Path, seconds: float
) -> dict[str, Any]:
    """One graph at one batch."""
    with engine_of(graph, kind, device, precision, batch, plans) as engine:
        found = {"parity_rel": parity(graph.bundle, engine, batch)}
        found |= through_the_schedule(engine, graph.bundle.golden.frames, batch, seconds)
    alone = bare_fps(graph, kind, device, precision, batch, plans, seconds)
    found |= {"bare_fps": alone, "pipeline_of_bare": found["fps"] / alone}
    shown = {key: round(value, 5) for key, value in found.items()}
    return {"graph": graph.name, "engine": kind, "precision": precision, "batch": batch, **shown}


def parity(bundle: ModelBundle, engine: StreamedEngine, batch: int) -> float:
    """The largest difference from the golden maps, as a share of their largest value; every batch is full."""
    golden = bundle.golden
    worst = 0.0
    for at in range(0, len(golden.maps), batch):
        places = np.minimum(np.arange(at, at + batch), len(golden.maps) - 1)
        maps, _ = engine.infer(np.ascontiguousarray(golden.frames[places]))
        worst = max(worst, float(np.abs(maps - golden.maps[places]).max()))
    return worst / float(np.abs(golden.maps).max())


def through_the_schedule(
    engine: StreamedEngine, frames: NDArray[np.uint8], batch: int, seconds: float
) -> dict[str, float]:
    """Frames per second, latency and the host's CPU time, with as many batches in flight as the engine keeps."""
    pixels = np.repeat(frames[:1], batch, axis=0)
    for _ in range(2 * engine.spec.depth):
        engine.infer(pixels)
    began: deque[float] = deque()
    taken: list[float] = []

    def take() -> None:
        engine.collect(30.0)
        taken.append(time.perf_counter() - began.popleft())

    started, spent = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        if len(began) == engine.spec.depth:
            take()
        began.append(time.perf_counter())
        engine.submit(pixels)
    while began:
        take()
    elapsed, spent = time.perf_counter() - started, time.process_time() - spent
    p50, p99 = np.percentile(taken, [50, 99]) * 1e3
    count = len(taken) * batch
    return {
        "fps": count / elapsed, "p50_ms": float(p50), "p99_ms": float(p99), "host_core_ms": spent * 1e3 / count,
    }  # fmt: skip


def goals(rows: list[dict[str, Any]], precision: Precision) -> dict[str, Any]:
    """The worst of the ratios that have a goal."""
    return {
        "benchmark": "gpu",
        "precision": precision,
        "worst_parity_rel": max(one["parity_rel"] for one in rows),
        "parity_goal": PARITY_GOAL,
        "worst_pipeline_of_bare": min(one["pipeline_of_bare"] for one in rows),
        "pipeline_goal": PIPELINE_GOAL,
    }


if __name__ == "__main__":
    sys.exit(main())
