"""What a map costs with DROCC's two networks: core-milliseconds of a 256 x 256 px frame, by preset and stride.

``paper-frames`` computes every crop by itself, because its padding belongs to the crop; ``dense`` runs once.  OpenVINO,
one thread, fp32, untrained weights (the cost does not depend on them); CPU time, the best of several runs.

    python benchmarks/drocc_cost.py
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import replace

import numpy as np
import openvino

from edge.bundle import InputSpec
from trainer.configs.drocc import PRESETS
from trainer.export import to_onnx
from trainer.method import Frames
from trainer.methods.drocc import Drocc

SIDE = 256
RUNS = 5


def main() -> None:
    frames = np.random.default_rng(1).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    rows = []
    for preset, stride in (("dense", 8), ("dense", 4), ("paper-frames", 16), ("paper-frames", 8)):
        method = Drocc(replace(PRESETS[preset], stride=stride), seed=1)
        method.prepare(frames)
        method.statistics = {"mu": 0.0, "sigma": 1.0}
        model = to_onnx(method.deployed(3).eval(), InputSpec(SIDE, SIDE, 3, 1))
        cells = method.map_geometry(SIDE, SIDE).height
        spent = core_ms(model, frames[:1])
        row = {"preset": preset, "stride": stride, "cells": cells, "core_ms": round(spent, 1)}
        rows.append(row | {"core_us_a_cell": round(1000 * spent / cells**2, 1)})
    print(json.dumps({"benchmark": "drocc networks", "rows": rows, "machine": platform.machine()}))


def core_ms(model: bytes, frames: Frames) -> float:
    """CPU milliseconds of the process for one inference."""
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    request = core.compile_model(core.read_model(model), "CPU", options).create_infer_request()
    request.infer({0: frames})
    spent = []
    for _ in range(RUNS):
        start = time.process_time()
        request.infer({0: frames})
        spent.append(time.process_time() - start)
    return 1000 * min(spent)


if __name__ == "__main__":
    main()
