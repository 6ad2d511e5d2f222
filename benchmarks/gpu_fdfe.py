"""Multipool or dilated: which dense form is faster on this GPU, and what share of its matrix rate does it reach?

    python benchmarks/gpu_fdfe.py [--patches 33 65] [--batch 1] [--engine auto] [--seconds 2] [--rounds 3]

Teacher and three students of `paper-33` and `paper-65`, a descriptor for every pixel of 256 x 256, in bf16, the graph
alone on the device. The yardstick is this GPU's own bf16 product of two 8192 x 8192 matrices, in the same rounds.
Prints device and versions, then a JSON line a patch size: the faster form is `chosen`; goals for p = 33 are 35 % of
that rate and, on an H100, 300 frames per second. Needs torch. Without a GPU it says so and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final, Literal

import gpu_programs  # first: it finds the checkout
from gpu import DEMO, pictures
from gpu_graphs import SIDE_PX, Graph, dense_graph, flop_of
from gpu_programs import bare_fps, choose

from edge.bundle import open_bundle
from edge.errors import EngineError

FORMS: Final[tuple[Literal["multipool", "dilated"], ...]] = ("multipool", "dilated")
SIDE_OF_PRODUCT = 8192
SHARE_GOAL, FPS_GOAL = 0.35, 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", nargs="*", type=int, default=[33, 65], choices=(17, 33, 65))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--engine", choices=("auto", "tensorrt", "torch"), default="auto")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each form and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda:0")
    given = parser.parse_args()
    try:
        print(json.dumps({"benchmark": "gpu_fdfe"} | gpu_programs.versions(given.device)), flush=True)
    except EngineError as error:
        print(f"benchmarks/gpu_fdfe.py measures a GPU and there is none to measure: {error}", file=sys.stderr)
        return 1
    demo = open_bundle(DEMO)
    kind, why = choose(Graph("demo", demo), given.engine, given.device, "fp16")
    print(json.dumps({"engine": kind, "tensorrt_executed": kind == "tensorrt", "why_not": why}), flush=True)
    frames = pictures(demo)[:1]
    for patch in given.patches:
        graphs = {form: dense_graph(patch, form, frames) for form in FORMS}
        with tempfile.TemporaryDirectory() as folder:
            rounds = []
            for _ in range(given.rounds):
                one: dict[str, float] = {"product": product_rate(given.seconds)}
                for form, graph in graphs.items():
                    one[form] = bare_fps(graph, kind, given.device, "bf16", given.batch, Path(folder), given.seconds)
                rounds.append(one)
        print(json.dumps(report(patch, kind, given.batch, graphs, rounds)), flush=True)
    return 0


def product_rate(seconds: float) -> float:
    """TFLOP/s of this GPU's own bf16 product, by torch."""
    import torch

    left, right = (torch.randn(SIDE_OF_PRODUCT, SIDE_OF_PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def runs(count: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            torch.mm(left, right)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    runs(5)
    count = max(5, round(seconds / (runs(5) / 5)))
    return count * 2 * SIDE_OF_PRODUCT**3 / runs(count) / 1e12


def report(
    patch: int, kind: str, batch: int, graphs: dict[str, Graph], rounds: list[dict[str, float]]
) -> dict[str, Any]:
    """Medians over rounds, each ratio within its own round."""
    work = {form: flop_of(graph.module, SIDE_PX) / 1e12 for form, graph in graphs.items()}
    fps = {form: statistics.median(one[form] for one in rounds) for form in graphs}
    share = {form: statistics.median(one[form] * work[form] / one["product"] for one in rounds) for form in graphs}
    chosen = max(fps, key=lambda form: fps[form])
    return {
        "benchmark": "gpu_fdfe",
        "patch": patch,
        "engine": kind,
        "precision": "bf16",
        "batch": batch,
        "bf16_product_tflops": round(statistics.median(one["product"] for one in rounds), 1),
        "gflop_a_frame": {form: round(value * 1e3, 1) for form, value in work.items()},
        "fps": {form: round(value, 2) for form, value in fps.items()},
        "share_of_product": {form: round(value, 3) for form, value in share.items()},
        "multipool_over_dilated_fps": round(statistics.median(one["multipool"] / one["dilated"] for one in rounds), 3),
        "chosen": chosen,
        "goals": {"share_of_product": SHARE_GOAL, "fps_on_an_h100": FPS_GOAL} if patch == 33 else None,
    }


if __name__ == "__main__":
    sys.exit(main())
