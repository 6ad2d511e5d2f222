"""What does fast dense feature extraction buy?  p = 33 at full width, 256 x 256, in one backend (OpenVINO, fp32).

Three graphs of one network (random weights, which cost the same): patch by patch in batches, multipool and dilated.
Patch by patch is timed on a sample of the 65,536 patches.  The yardstick is the machine's own matrix rate, the better
of NumPy's and OpenVINO's product in the same rounds.  Rates are per core-second: a busy machine slows all alike.
Prints one JSON object; ratios are medians over interleaved rounds.

    python benchmarks/fdfe.py [--patch 33] [--rounds 5] [--threads N]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from engine import numpy_product, openvino_product
from torch import nn

from edge.engines.contract import usable_cores
from edge.engines.openvino import cpu_options, ov
from trainer.fdfe import densify
from trainer.patch_nets import PROFILES, build_patch_net
from trainer.student_scale import Around

SIDE_PX = 256
PATCHES_A_BATCH = 64


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds on the clock, and seconds of all cores together."""

    wall_s: float
    core_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, default=33, choices=(17, 33, 65))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=4, help="patch batches a round")
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    spec = PROFILES[f"paper-{options.patch}"]
    net = build_patch_net(spec, 1).eval()
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, 3, SIDE_PX, SIDE_PX), np.float32)
    patches = rng.standard_normal((PATCHES_A_BATCH, 3, spec.patch, spec.patch), np.float32)

    dense = {form: Around(densify(net, spec.patch, 1, form), "zero").eval() for form in ("multipool", "dilated")}
    graphs = {
        "patches": compiled(net, patches, options.threads),
        **{form: compiled(one, image, options.threads) for form, one in dense.items()},
    }
    padded_px = SIDE_PX + spec.patch - 1
    flops = {
        "patches": 2 * spec.macs(spec.patch, spec.patch) * SIDE_PX**2,
        **{form: 2 * macs_run(one, image) for form, one in dense.items()},
    }
    products = {"numpy": numpy_product(), "openvino": openvino_product()}

    def one_round() -> dict[str, Spent]:
        spent = {name: timed(product) for name, product in products.items()}
        some = timed(lambda: [graphs["patches"](patches) for _ in range(options.batches)])
        every = SIDE_PX**2 / (options.batches * PATCHES_A_BATCH)  # all patches of one image
        spent["patches"] = Spent(some.wall_s * every, some.core_s * every)
        return spent | {form: timed(lambda form=form: graphs[form](image)) for form in dense}

    one_round()
    rounds = [one_round() for _ in range(options.rounds)]

    def median(pick: Callable[[dict[str, Spent]], float]) -> float:
        return round(statistics.median(pick(one) for one in rounds), 4)

    work = {name: product() for name, product in products.items()}  # GFLOP
    sgemm = max(median(lambda one, name=name: work[name] / one[name].core_s) for name in products)
    rate = {name: median(lambda one, name=name: flops[name] / 1e9 / one[name].core_s) for name in flops}
    report = {
        "benchmark": "fdfe",
        "patch": spec.patch,
        "image_px": SIDE_PX,
        "padded_px": padded_px,
        "backend": f"openvino {ov.__version__}, f32, {options.threads} threads",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "sgemm_gflops_per_core": round(sgemm, 1),
        "gflop_an_image": {name: round(value / 1e9, 1) for name, value in flops.items()},
        "seconds_an_image": {name: median(lambda one, name=name: one[name].wall_s) for name in flops},
        "share_of_sgemm": {name: round(value / sgemm, 3) for name, value in rate.items()},
        "flop_ratio": {form: round(flops["patches"] / flops[form], 1) for form in dense},
        "speedup": {form: median(lambda one, form=form: one["patches"].core_s / one[form].core_s) for form in dense},
        "dilated_over_multipool_time": median(lambda one: one["dilated"].core_s / one["multipool"].core_s),
        "max_abs_difference": difference(net, dense["multipool"], spec.patch),
    }
    print(json.dumps(report))


def compiled(net: nn.Module, example: np.ndarray[Any, Any], threads: int) -> Callable[[Any], Any]:
    """``net`` as OpenVINO runs it in the daemon, on one stream of all ``threads``."""
    buffer = io.BytesIO()
    torch.onnx.export(net, (torch.from_numpy(example),), buffer, opset_version=17, dynamo=False, verbose=False)
    core = ov.Core()
    request = core.compile_model(
        core.read_model(buffer.getvalue()), "CPU", cpu_options(1, threads)
    ).create_infer_request()
    return lambda batch: request.infer([batch])


def macs_run(net: nn.Module, image: np.ndarray[Any, Any]) -> int:
    """Multiply-adds of all convolutions as this graph runs them, counted by running it."""
    total = 0
    conv2d = torch.nn.functional.conv2d

    def counting(x: torch.Tensor, weight: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        nonlocal total
        answer = conv2d(x, weight, *arguments, **keywords)
        total += answer.numel() * weight[0].numel()
        return answer

    torch.nn.functional.conv2d = counting
    try:
        with torch.inference_mode():
            net(torch.from_numpy(image))
    finally:
        torch.nn.functional.conv2d = conv2d
    return total


@torch.inference_mode()
def difference(net: nn.Module, dense: Around, patch: int) -> float:
    """Largest difference between dense and patch by patch over 200 random pixels and the corners of one image."""
    image = torch.randn(1, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(3))
    around = torch.nn.functional.pad(image, (patch // 2, (patch - 1) // 2, patch // 2, (patch - 1) // 2))
    rng = np.random.default_rng(1)
    places = [(0, 0), (0, SIDE_PX - 1), (SIDE_PX - 1, 0), (SIDE_PX - 1, SIDE_PX - 1)]
    places += [(int(y), int(x)) for y, x in rng.integers(0, SIDE_PX, (200, 2))]
    alone = torch.cat([net(around[:, :, y : y + patch, x : x + patch]) for y, x in places]).flatten(1)
    answer = dense(image)[0]
    together = torch.stack([answer[:, y, x] for y, x in places])
    return float((alone - together).abs().max())


def timed(work: Callable[[], Any]) -> Spent:
    wall, core = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - wall, time.process_time() - core)


if __name__ == "__main__":
    main()
