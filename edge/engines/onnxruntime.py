"""ONNX Runtime on the CPU: the portable fallback and the reference in parity tests.

Synchronous: `submit` does the work.
"""

from __future__ import annotations

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

try:
    import onnxruntime as ort
except ImportError as missing:
    raise EngineError(
        "backend 'onnxruntime' is not installed; run `pip install 'kizu[onnxruntime]'` or use backend 'openvino'"
    ) from missing

_DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}
# What ONNX Runtime raises: its own classes derive straight from Exception, its bindings raise the built-in ones.
_FAILURES = (
    ort.capi.onnxruntime_pybind11_state.Fail,
    ort.capi.onnxruntime_pybind11_state.InvalidArgument,
    ort.capi.onnxruntime_pybind11_state.InvalidGraph,
    ort.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    ort.capi.onnxruntime_pybind11_state.NotImplemented,
    ort.capi.onnxruntime_pybind11_state.NoModel,
    ort.capi.onnxruntime_pybind11_state.RuntimeException,
    ort.capi.onnxruntime_pybind11_state.EPFail,
    RuntimeError,
    ValueError,
    TypeError,
    MemoryError,
)


class OnnxRuntimeEngine(InOrder):
    """Runs a bundle's graph with one session over all cores; depth 1.

    The time limit of `collect` cannot be exceeded: by then the work is done.
    """

    def __init__(self, bundle: ModelBundle, *, max_batch: int, threads: int | None = None) -> None:
        where = f"bundle {bundle.path}"
        options = ort.SessionOptions()
        options.intra_op_num_threads = usable_cores() if threads is None else threads
        options.inter_op_num_threads = 1
        # Spinning threads take the cores that segmentation and the sockets need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Never guess: bytes that are ONNX and something else at once are read as what was verified.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.log_severity_level = 3  # errors only
        try:
            self._session = ort.InferenceSession(bundle.model, options, providers=["CPUExecutionProvider"])
        except _FAILURES as error:
            raise EngineError(f"{where}: ONNX Runtime {ort.__version__} refuses the model: {error}") from error
        manifest = bundle.manifest
        require_graph(_ports(self._session.get_inputs()), _ports(self._session.get_outputs()), manifest, where)
        self._spec = EngineSpec(
            name="onnxruntime",
            version=str(ort.__version__),
            device="cpu",
            height=manifest.input.height,
            width=manifest.input.width,
            channels=manifest.input.channels,
            map_height=manifest.map.height,
            map_width=manifest.map.width,
            max_batch=max_batch,
            depth=1,
        )
        self._next = 0
        self._out: list[tuple[NDArray[np.float32], NDArray[np.float32]] | EngineError] = []  # one at most
        self._closed = False

    def warmup(self) -> None:
        """Run one frame and the largest batch: memory for the sizes between is then there."""
        spec = self._spec
        for count in sorted({1, spec.max_batch}):
            self.infer(np.zeros((count, spec.height, spec.width, spec.channels), np.uint8))

    def submit(self, batch: NDArray[np.uint8]) -> Ticket:
        """Run `batch`; what fails is raised by `collect`."""
        if self._closed:
            raise closed(self._spec)
        require_batch(batch, self._spec)
        if self._out:
            raise busy(self._spec)
        try:
            maps, scores = self._session.run([MAP_OUTPUT, SCORE_OUTPUT], {INPUT: batch})
            require_answer(maps, scores, len(batch), self._spec)
            self._out.append((maps, scores))
        except EngineError as error:
            self._out.append(error)
        except _FAILURES as error:
            self._out.append(EngineError(f"onnxruntime: batch {self._next} failed: {error}"))
        ticket = Ticket(self._next)
        self._next += 1
        return ticket

    def collect(self, timeout_s: float) -> tuple[Ticket, NDArray[np.float32], NDArray[np.float32]]:
        """Hand out what `submit` computed."""
        if self._closed:
            raise closed(self._spec)
        if not self._out:
            raise nothing_out(self._spec)
        done = self._out.pop()
        if isinstance(done, EngineError):
            raise done
        return Ticket(self._next - 1), *done

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.clear()
        self._closed = True
        self.__dict__.pop("_session", None)  # frees the arena now, not when the last traceback dies


def _ports(nodes: list[Any]) -> dict[str, Port]:
    return {
        node.name: Port(
            _DTYPES.get(node.type, node.type), tuple(side if isinstance(side, int) else None for side in node.shape)
        )
        for node in nodes
    }
