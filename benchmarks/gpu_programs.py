"""What runs a graph in the benchmarks on a GPU: TensorRT, or torch under CUDA graphs where TensorRT refuses the GPU.

Both run under the very schedule of the line's engine, `StreamedEngine` on `CudaDevice`.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests" / "helpers", ROOT / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from gpu_graphs import Graph  # noqa: E402

from edge.bundle import Manifest  # noqa: E402
from edge.engines.cuda import CudaDevice, ordinal_of  # noqa: E402
from edge.engines.device import BufferPlan, Plan, Program, Stream  # noqa: E402
from edge.engines.streamed import StreamedEngine  # noqa: E402
from edge.engines.tensorrt import TensorRtProgram, import_tensorrt, require_valid, spec_of, version_of  # noqa: E402
from edge.errors import EngineError  # noqa: E402
from edge.graph import at_precision  # noqa: E402
from tensorrt_plans import build_plan  # noqa: E402

Kind = Literal["tensorrt", "torch"]
Precision = Literal["fp32", "fp16", "bf16"]


class TorchProgram:
    """A module under CUDA graphs, one for each slot and batch size, on the memory that the schedule gives.

    Convolutions in fp16 or bf16 by autocast, what lies between teacher and students in fp32 as in the exported graph.
    """

    def __init__(self, module: Any, manifest: Manifest, precision: Precision) -> None:
        import torch

        self._torch = torch
        self._dtype = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        # A copy: the caller's stays in fp32. Weights are cast here, or autocast would do it again for every batch.
        self._module = copy.deepcopy(module).to("cuda", memory_format=torch.channels_last).eval()
        for layer in self._module.modules():
            if self._dtype is not None and isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                layer.to(self._dtype)
        self._manifest = manifest
        self._graphs: dict[tuple[int, ...], Any] = {}
        torch.backends.cudnn.benchmark = True

    def enqueue(self, slot: int, count: int, frames: int, maps: int, scores: int, stream: Stream) -> None:
        """Replay the graph of these addresses in `stream`; captured when they come for the first time."""
        torch, key = self._torch, (slot, count, frames, maps, scores)
        if key not in self._graphs:
            self._graphs[key] = self._capture(count, frames, maps, scores)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.handle)):
            self._graphs[key].replay()

    def close(self) -> None:
        """Drop the graphs and the module's copy."""
        self._torch.cuda.synchronize()
        self._graphs.clear()
        self._module = None

    def _capture(self, count: int, frames: int, maps: int, scores: int) -> Any:
        torch, taken, cells = self._torch, self._manifest.input, self._manifest.map
        pixels = self._view(frames, (count, taken.height, taken.width, taken.channels), "|u1")
        answer, score = self._view(maps, (count, cells.height, cells.width), "<f4"), self._view(scores, (count,), "<f4")

        def run() -> None:
            with torch.no_grad(), torch.autocast("cuda", self._dtype, enabled=self._dtype is not None):
                found, peaks = self._module(pixels)
            answer.copy_(found)
            score.copy_(peaks)

        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):  # cuDNN chooses its kernels, which cannot be captured
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        torch.cuda.synchronize()
        return graph

    def _view(self, address: int, shape: tuple[int, ...], kind: str) -> Any:
        class Memory:
            __cuda_array_interface__ = {"shape": shape, "typestr": kind, "data": (address, False), "version": 2}  # noqa: RUF012

        return self._torch.as_tensor(Memory(), device="cuda")


@contextmanager
def program_of(
    graph: Graph, kind: Kind, gpu: CudaDevice, precision: Precision, slots: int, plans: Path
) -> Iterator[Program]:
    """The graph ready to run on `gpu`; plans are built once, into the folder `plans`.

    Raises:
        EngineError: TensorRT does not run it here, or there is no module for torch.
    """
    if kind == "torch":
        if graph.module is None:
            raise EngineError(f"{graph.name} was opened from a bundle, and torch has no module of it")
        program: Program = TorchProgram(graph.module, graph.bundle.manifest, precision)
    else:
        trt = import_tensorrt()
        path = plans / f"{graph.bundle.model_id}-{precision}.plan"
        if not path.exists():
            build_plan(replace(graph.bundle, model=at_precision(graph.bundle.model, precision)), path)
        runtime, plan = trt.Runtime(trt.Logger(trt.Logger.ERROR)), Plan.read(path)
        require_valid(trt, runtime, plan, gpu.name)
        program = TensorRtProgram(trt, runtime, plan, graph.bundle.manifest, slots=slots)
    try:
        yield program
    finally:
        program.close()


@contextmanager
def engine_of(
    graph: Graph, kind: Kind, device: str, precision: Precision, batch: int, plans: Path
) -> Iterator[StreamedEngine]:
    """The line's schedule over it, for batches of `batch`."""
    gpu = CudaDevice(ordinal_of(device))
    try:
        spec = spec_of(graph.bundle.manifest, kind, f"{device} {gpu.name}", batch)
        with (
            program_of(graph, kind, gpu, precision, spec.depth, plans) as program,
            StreamedEngine(spec, gpu, program) as engine,
        ):
            yield engine
    finally:
        gpu.close()  # by the engine already, if there was one: nothing is left to free then


def bare_fps(
    graph: Graph, kind: Kind, device: str, precision: Precision, batch: int, plans: Path, seconds: float
) -> float:
    """Frames per second of the graph alone: one slot, inputs on the device, nothing copied."""
    gpu = CudaDevice(ordinal_of(device))
    try:
        with program_of(graph, kind, gpu, precision, 1, plans) as program:
            layout = BufferPlan.of(spec_of(graph.bundle.manifest, "", "", batch))
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

            runs(5)
            count = max(5, round(seconds / (runs(5) / 5)))
            return count * batch / runs(count)
    finally:
        gpu.close()


def versions(device: str) -> dict[str, Any]:
    """The GPU and everything whose version decides a time.

    Raises:
        DeviceError: there is no GPU, no driver or no pycuda.
    """
    import importlib.metadata

    from edge.engines.cuda import compute_capability, import_driver

    gpu = CudaDevice(ordinal_of(device))
    found: dict[str, Any] = {"gpu": gpu.name, "compute_capability": compute_capability(ordinal_of(device))}
    gpu.close()
    found["driver_cuda"] = import_driver().get_driver_version()
    found["python"] = sys.version.split()[0]
    for package in ("pycuda", "torch", "numpy", "onnx", "onnxruntime"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    try:
        found["tensorrt"] = version_of(import_tensorrt())
    except EngineError:
        found["tensorrt"] = None
    return found


def choose(graph: Graph, asked: Kind | Literal["auto"], device: str, precision: Precision) -> tuple[Kind, str | None]:
    """What runs here, and why it is not TensorRT; None where it is, or was not asked for.

    Raises:
        EngineError: TensorRT was asked for and does not run here.
    """
    if asked == "torch":
        return "torch", "torch was asked for"
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            engine_of(graph, "tensorrt", device, precision, 1, Path(folder)) as engine,
        ):
            engine.infer(graph.bundle.golden.frames[:1])
        return "tensorrt", None
    except (EngineError, ValueError) as error:  # ValueError: it built no plan
        if asked == "tensorrt":
            raise
        return cast(Kind, "torch"), str(error)[:500]
