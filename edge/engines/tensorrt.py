"""TensorRT on an NVIDIA GPU: loads a compiled plan, and runs it by the schedule of `streamed`.

One module for `tensorrt_rtx` 1.7 and `tensorrt` 10 / 11: whichever is installed. Builds nothing: the plan is a file
that `compile` made, and its path comes from the daemon. Only the calls that both flavors share are used, and what
TensorRT-RTX has beyond them: the runtime cache, so that kernels are made ready once per machine, and CUDA graphs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from edge.bundle import Manifest, ModelBundle
from edge.engines.contract import INPUT, MAP_OUTPUT, SCORE_OUTPUT, Port, require_graph
from edge.engines.device import Plan, Stream
from edge.engines.streamed import StreamedEngine
from edge.errors import DeviceError, EngineError
from edge.protocols import EngineSpec
from edge.types import FlatMaps

FLAVORS = ("tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt")
"""Import names, in the order they are tried; the two wheels of TensorRT-RTX alone import as the second."""

_DEPTH = 2


def import_tensorrt() -> Any:
    """The TensorRT module that is installed.

    Raises:
        DeviceError: none is; names the extras.
    """
    for name in FLAVORS:
        try:
            return import_module(name)
        except ImportError:
            continue
    raise DeviceError(
        "package",
        "backend 'tensorrt' needs TensorRT, which is not installed; run `pip install 'kizu[tensorrt-rtx,gpu]'` on "
        "x86-64, or `pip install 'kizu[tensorrt,gpu]'` where JetPack or the data center brings its own",
    )


def open_tensorrt(
    bundle: ModelBundle,
    plan: Plan,
    *,
    device: str,
    max_batch: int,
    quiet_below: float | None = None,
    fields: Sequence[FlatMaps] = (),
) -> StreamedEngine:
    """The engine that runs `plan`, compiled from `bundle`, on the GPU `device` ("cuda:0"); see `StreamedEngine`.

    Raises:
        DeviceError: a package, the driver or the GPU is missing; the plan is not for this library, driver or GPU, is
            damaged, or does not fit into its memory.
        EngineError: the plan's ports are not those of the bundle's manifest.
    """
    from edge.engines.cuda import CudaDevice, ordinal_of

    number = ordinal_of(device)
    trt = import_tensorrt()
    with ExitStack() as opened:
        gpu = CudaDevice(number)  # before TensorRT touches the driver: its words about a missing one are no help
        opened.callback(gpu.close)
        if quiet_below is not None:
            gpu.require_kernels('engine.maps = "all"')
        if fields:
            gpu.require_kernels('engine.flat_field = "host"')
        runtime = trt.Runtime(_logger(trt))
        require_valid(trt, runtime, plan, gpu.name)
        program = TensorRtProgram(trt, runtime, plan, bundle.manifest, slots=_DEPTH)
        opened.callback(program.close)
        spec = spec_of(bundle.manifest, version_of(trt), f"{device} {gpu.name}", max_batch)
        engine = StreamedEngine(spec, gpu, program, quiet_below=quiet_below, fields=fields, keep=program.keep_cache)
        opened.pop_all()  # both are the engine's to close from here on
        return engine


def version_of(trt: Any) -> str:
    """Flavor and version as one word: `rtx-1.7.1.116` or `10.13.0`."""
    return f"{'rtx-' if 'rtx' in trt.__name__ else ''}{trt.__version__}"


def spec_of(manifest: Manifest, version: str, device: str, max_batch: int, depth: int = _DEPTH) -> EngineSpec:
    """The specification with the sizes of a bundle."""
    taken, cells = manifest.input, manifest.map
    return EngineSpec(
        name="tensorrt",
        version=version,
        device=device,
        height=taken.height,
        width=taken.width,
        channels=taken.channels,
        map_height=cells.height,
        map_width=cells.width,
        max_batch=max_batch,
        depth=depth,
    )


def require_valid(trt: Any, runtime: Any, plan: Plan, device: str) -> None:
    """Ask the library whether `plan` can run here, where it has that question; TensorRT 10 and 11 find out on loading.

    Raises:
        DeviceError: it cannot; says what does not fit.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, bits = runtime.get_engine_validity(plan.data)
    if validity == trt.EngineValidity.INVALID:
        names = {name for name, bit in trt.EngineInvalidityDiagnostics.__members__.items() if int(bits) & int(bit)}
        raise refusal(names, plan.path, version_of(trt), device)


def refusal(names: set[str], plan: Path, version: str, device: str) -> DeviceError:
    """What the library's diagnostics mean for whoever has to act; `names` are of EngineInvalidityDiagnostics."""
    found = f"engine {plan} cannot run on {device} with TensorRT {version} ({', '.join(sorted(names)) or 'no reason'})"
    if "INSUFFICIENT_GPU_MEMORY" in names:
        return DeviceError("memory", f"{found}: the GPU is full; stop another process or compile for a smaller batch")
    if names & {"OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME"}:
        return DeviceError("driver", f"{found}: the driver is too old; install a newer one, `kizu doctor` shows which")
    if "CUDA_ERROR" in names:
        return DeviceError("driver", f"{found}: CUDA answers with an error; see `nvidia-smi` and `kizu doctor`")
    if not names:  # so with TensorRT-RTX 1.7 where its own CUDA cannot ask the GPU; a bad plan has a name (seen)
        return DeviceError(
            "driver", f"{found}: it could not ask the GPU; is the driver too old? `kizu doctor` shows it"
        )
    return DeviceError("engine", f"{found}: it is damaged or from elsewhere; remove it and run `kizu compile` again")


class TensorRtProgram:
    """A deserialized plan with an execution context for each slot, so that captured CUDA graphs keep their addresses.

    The runtime cache of TensorRT-RTX is read from beside the plan; `keep_cache` writes it there.
    """

    def __init__(self, trt: Any, runtime: Any, plan: Plan, manifest: Manifest, *, slots: int) -> None:
        self._cache_path = plan.path.with_name(plan.path.name + ".runtime-cache")
        self._cache: Any = None
        self._kept = b""
        self._runtime = runtime
        self._engine = runtime.deserialize_cuda_engine(plan.data)
        if self._engine is None:
            raise DeviceError(
                "engine",
                f"engine {plan.path}: TensorRT {version_of(trt)} cannot load it: it is damaged, from elsewhere, or the "
                "GPU is full; remove it and run `kizu compile` again",
            )
        ports = ports_of(trt, self._engine)
        require_graph(ports["INPUT"], ports["OUTPUT"], manifest, f"engine {plan.path}")
        self._frame = (manifest.input.height, manifest.input.width, manifest.input.channels)
        self._contexts = [self._context(trt) for _ in range(slots)]
        if None in self._contexts:
            raise DeviceError(
                "memory",
                f"engine {plan.path}: no room for {slots} execution contexts of {self._engine.device_memory_size_v2} "
                "bytes; stop another process on this GPU or compile for a smaller batch",
            )
        self._shaped = [(0, 0, 0, 0)] * slots

    def enqueue(self, slot: int, count: int, frames: int, maps: int, scores: int, stream: Stream) -> None:
        """Put one run into `stream`; shapes and addresses are set only when they change."""
        context, now = self._contexts[slot], (count, frames, maps, scores)
        if self._shaped[slot] != now:
            taken = context.set_input_shape(INPUT, (count, *self._frame))
            for name, address in ((INPUT, frames), (MAP_OUTPUT, maps), (SCORE_OUTPUT, scores)):
                taken = context.set_tensor_address(name, address) and taken
            if not taken:
                raise DeviceError(
                    "engine", f"tensorrt: {count} frames do not fit the engine's shapes; compile it again"
                )
            self._shaped[slot] = now
        if not context.execute_async_v3(stream.handle):
            raise DeviceError("lost", f"tensorrt: {count} frames could not be enqueued; the log has TensorRT's words")

    def keep_cache(self) -> None:
        """Write the runtime cache beside the plan, whole or not at all, if there is more in it than was read.

        Raises:
            EngineError: it cannot be written.
        """
        if self._cache is None:
            return
        data = self._cache.serialize()
        if data is not None and bytes(data) != self._kept:
            write_whole(self._cache_path, bytes(data))
            self._kept = bytes(data)

    def close(self) -> None:
        """Free contexts before their engine, and that before its runtime."""
        self._contexts.clear()
        self._cache = self._engine = self._runtime = None

    def _context(self, trt: Any) -> Any:
        if not hasattr(self._engine, "create_runtime_config") or not hasattr(trt, "CudaGraphStrategy"):
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        if self._cache is None:
            self._cache = read_cache(self._cache_path, config.create_runtime_cache)
            self._kept = bytes(self._cache.serialize() or b"")
        config.set_runtime_cache(self._cache)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(config)


def ports_of(trt: Any, engine: Any) -> dict[str, dict[str, Port]]:
    """Inputs and outputs of a deserialized engine, by TensorIOMode's names, with None for a dynamic side."""
    found: dict[str, dict[str, Port]] = {"INPUT": {}, "OUTPUT": {}}
    dtypes = {trt.uint8: "uint8", trt.float32: "float32"}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        sides = tuple(None if side < 0 else int(side) for side in engine.get_tensor_shape(name))
        dtype = engine.get_tensor_dtype(name)
        found[engine.get_tensor_mode(name).name][name] = Port(dtypes.get(dtype, str(dtype)), sides)
    return found


def read_cache(path: Path, create: Callable[[], Any]) -> Any:
    """A runtime cache with what `path` holds; an empty one where that is missing or the library does not take it.

    A cache only saves time, so a damaged one is removed and made anew. A half-read one is never used.
    """
    cache = create()
    try:
        data = path.read_bytes()
    except OSError:
        return cache
    try:
        if data and cache.deserialize(data):
            return cache
    except (RuntimeError, ValueError, TypeError):  # what the bindings raise on bytes that are no cache
        pass
    with suppress(OSError):
        path.unlink()
    return create()


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old bytes or the new, never a part.

    Raises:
        EngineError: the disk is full or the folder is not ours to write.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError as error:
        raise EngineError(f"runtime cache {path}: {error.strerror}; kernels will be compiled again next time") from None


def _logger(trt: Any) -> Any:
    """TensorRT's own words, errors only, on standard error: journald keeps them beside the daemon's."""
    return trt.Logger(trt.Logger.ERROR)
