"""OpenVINO on the CPU: the default backend. Owns the infer requests and which of them may be used again."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle import ModelBundle
from edge.engines.contract import (
    INPUT,
    MAP_OUTPUT,
    SCORE_OUTPUT,
    InOrder,
    Port,
    busy,
    closed,
    nothing_out,
    require_answer,
    require_batch,
    require_graph,
    usable_cores,
)
from edge.errors import EngineError
from edge.protocols import EngineSpec, Ticket

# `import openvino` reports itself to its maker: a forked process, an HTTP request, files in the home folder (2026.4,
# openvino_telemetry). A line's daemon talks to nobody it was not told to; without that module the package takes a stub.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
try:
    import openvino as ov
except ImportError as missing:
    raise EngineError(
        "backend 'openvino' is not installed; run `pip install kizu` again or use backend 'onnxruntime'"
    ) from missing

# OpenVINO's own errors reach Python as RuntimeError; its bindings raise the others for wrong arguments.
_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, MemoryError)


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """One started batch, a request for each frame; `batch` keeps the pixels alive that the requests read."""

    ticket: Ticket
    requests: tuple[Any, ...]
    batch: NDArray[np.uint8]


class OpenVinoEngine(InOrder):
    """Runs a bundle's graph in fp32 on `streams` streams of usable cores / streams threads each; depth = streams.

    A batch is run as single frames spread over the streams. Batches do not make a CPU faster (`line`, Zen 5: 203 GFLOP
    a core-second frame by frame, 206 in fours), but each stream keeps its largest batch's activations for good: 146 MB
    resident in all with single frames, 373 MB with batches of 4, 747 MB with 8.
    """

    def __init__(self, bundle: ModelBundle, *, streams: int, max_batch: int, threads: int | None = None) -> None:
        where = f"bundle {bundle.path}"
        manifest = bundle.manifest
        try:
            core = _core()
            model = core.read_model(bundle.model)
            inputs = {port.any_name: _port(port) for port in model.inputs}
            outputs = {port.any_name: _port(port) for port in model.outputs}
        except _FAILURES as error:
            raise EngineError(f"{where}: OpenVINO {ov.__version__} refuses the model: {error}") from error
        require_graph(inputs, outputs, manifest, where)
        spec = manifest.input
        try:
            model.reshape({INPUT: [1, spec.height, spec.width, spec.channels]})
            self._compiled = core.compile_model(model, "CPU", cpu_options(streams, threads or usable_cores()))
            # A request owns its input and output only; OpenVINO queues those that find no stream free.
            self._idle: deque[Any] = deque(self._compiled.create_infer_request() for _ in range(streams * max_batch))
        except _FAILURES as error:
            raise EngineError(f"{where}: OpenVINO {ov.__version__} cannot compile the model: {error}") from error
        self._spec = EngineSpec(
            name="openvino",
            version=str(ov.__version__),
            device="cpu",
            height=spec.height,
            width=spec.width,
            channels=spec.channels,
            map_height=manifest.map.height,
            map_width=manifest.map.width,
            max_batch=max_batch,
            depth=streams,
        )
        self._out: deque[_Flight] = deque()
        self._overdue: list[_Flight] = []
        self._next = 0
        self._closed = False

    @property
    def precision(self) -> str:
        """The arithmetic that the compiled model really uses, as OpenVINO reports it."""
        return str(self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())

    def warmup(self) -> None:
        """Run one frame for each stream, those included that ran already: the golden ones are as good.

        Kernels are made when the model is compiled, and a stream's memory costs its first frame 6 ms of 50 (`line`,
        measured); running every request of every batch cost 390 ms of both cores and saved nothing.
        """
        if self._closed:
            raise closed(self._spec)
        spec = self._spec
        frame = np.zeros((1, spec.height, spec.width, spec.channels), np.uint8)
        for _ in range(self._next, spec.depth):
            self.infer(frame)

    def submit(self, batch: NDArray[np.uint8]) -> Ticket:
        """Start every frame of `batch`."""
        if self._closed:
            raise closed(self._spec)
        require_batch(batch, self._spec)
        if len(self._out) >= self._spec.depth:
            raise busy(self._spec)
        self._take_back_overdue()
        count = len(batch)
        if len(self._idle) < count:
            raise EngineError(
                f"openvino: {len(self._overdue)} batches that were given up still run; "
                "the machine is overloaded or the backend hangs: restart the daemon"
            )
        # No copy, except of a read-only batch: OpenVINO shares writable memory only.
        pixels = batch if batch.flags.writeable else batch.copy()
        flight = _Flight(Ticket(self._next), tuple(self._idle.popleft() for _ in range(count)), pixels)
        try:
            for index, request in enumerate(flight.requests):
                request.set_tensor(INPUT, ov.Tensor(pixels[index : index + 1], shared_memory=True))
                request.start_async()
        except _FAILURES as error:
            self._overdue.append(flight)
            raise EngineError(f"openvino: batch {flight.ticket} could not be started: {error}") from error
        self._next += 1
        self._out.append(flight)
        return flight.ticket

    def collect(self, timeout_s: float) -> tuple[Ticket, NDArray[np.float32], NDArray[np.float32]]:
        """Wait for the oldest batch; the results are copies and stay as they are."""
        if self._closed:
            raise closed(self._spec)
        if not self._out:
            raise nothing_out(self._spec)
        flight = self._out.popleft()
        spec = self._spec
        maps = np.empty((len(flight.requests), spec.map_height, spec.map_width), np.float32)
        scores = np.empty(len(flight.requests), np.float32)
        deadline = time.monotonic() + timeout_s
        try:
            for index, request in enumerate(flight.requests):
                if not request.wait_for(max(0, math.ceil((deadline - time.monotonic()) * 1000))):
                    raise EngineError(f"openvino: batch {flight.ticket} was not ready within {timeout_s} s")
                one_map, one_score = request.get_tensor(MAP_OUTPUT).data, request.get_tensor(SCORE_OUTPUT).data
                require_answer(one_map, one_score, 1, spec)
                maps[index], scores[index] = one_map[0], one_score[0]
        except EngineError:
            self._overdue.append(flight)
            raise
        except _FAILURES as error:
            self._overdue.append(flight)
            raise EngineError(f"openvino: batch {flight.ticket} failed: {error}") from error
        self._idle.extend(flight.requests)
        return flight.ticket, maps, scores

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        # Until a request has ended it reads its batch; freeing that under it would be a fault in native code.
        for flight in (*self._out, *self._overdue):
            for request in flight.requests:
                _end(request)
        self._out.clear()
        self._overdue.clear()
        self._idle.clear()
        self.__dict__.pop("_compiled", None)

    def _take_back_overdue(self) -> None:
        """Requests of batches that failed or came too late are used again only once they have ended."""
        still_running = []
        for flight in self._overdue:
            if all(_ended(request) for request in flight.requests):
                self._idle.extend(flight.requests)
            else:
                still_running.append(flight)
        self._overdue = still_running


@lru_cache(maxsize=1)
def _core() -> Any:
    """OpenVINO's core, one for the process and never freed.

    On CPUs with AMX the plugin replaces the signal stack of the thread that makes the first core and frees it on the
    one that drops the last, the daemon's inference thread. The main thread's next signal then ended in a segmentation
    fault (2026.4; `tests/edge/engines/test_openvino_signals.py`).
    """
    return ov.Core()


def cpu_options(streams: int, cores: int) -> dict[str, Any]:
    """OpenVINO's properties for `streams` streams that share `cores` cores."""
    return {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": max(streams, cores - cores % streams),
        # Left to itself OpenVINO computes fp32 graphs in bf16 wherever the CPU can: 4e-3 instead of 1e-6 relative error
        # on `line` maps (measured on Zen 5), and other verdicts on another machine. Precision lives in the graph.
        "INFERENCE_PRECISION_HINT": "f32",
        "EXECUTION_MODE_HINT": "ACCURACY",
        # The daemon's other threads need these cores too, and two daemons would pin themselves to the same ones.
        "ENABLE_CPU_PINNING": False,
    }


def _port(port: Any) -> Port:
    shape = port.partial_shape
    sides = tuple(int(side.get_length()) if side.is_static else None for side in shape) if shape.rank.is_static else ()
    return Port({"u8": "uint8", "f32": "float32"}.get(port.element_type.get_type_name(), str(port.element_type)), sides)


def _ended(request: Any) -> bool:
    try:
        return bool(request.wait_for(0))
    except _FAILURES:  # it failed, so it ended; its ticket was already answered with an error
        return True


def _end(request: Any) -> None:
    try:
        request.cancel()
        request.wait()
    except _FAILURES:  # cancellation itself is reported as a failure
        return
