"""`open_engine`: the one way from an opened bundle to a running engine; loads one backend and no other."""

from __future__ import annotations

from typing import Literal, cast, get_args

from edge.bundle import ModelBundle
from edge.errors import EngineError, KizuError
from edge.protocols import Engine

Backend = Literal["openvino", "onnxruntime", "fake"]

BACKENDS: tuple[str, ...] = get_args(Backend)


def require_backend(name: str, error: type[KizuError] = EngineError) -> Backend:
    """Return `name` as a backend's name.

    Raises:
        error: there is no such backend; the message lists those there are.
    """
    if name not in BACKENDS:
        raise error(f"backend {name!r} is unknown; expected one of {', '.join(BACKENDS)}")
    return cast(Backend, name)


def require_device(backend: str, device: str, error: type[KizuError] = EngineError) -> None:
    """Refuse a device that `backend` does not know.

    Raises:
        error: there is no such device; the message lists those there are.
    """
    if device != "cpu":
        raise error(f"device {device!r} is unknown to backend {backend!r}; expected 'cpu'")


def open_engine(
    bundle: ModelBundle,
    *,
    backend: Backend = "openvino",
    device: str = "cpu",
    streams: int = 2,
    max_batch: int | None = None,
) -> Engine:
    """Build the engine that runs `bundle`; use it as a context manager.

    `streams` is how many batches run side by side where the backend can (OpenVINO). `max_batch` (1 to the bundle's own)
    is the largest batch that will be submitted.

    Raises:
        EngineError: unknown backend or device, the backend's package is missing, the graph breaks the graph contract,
            or the backend refuses the model.
    """
    require_backend(backend)
    largest = bundle.manifest.input.max_batch
    batch = largest if max_batch is None else max_batch
    if not 1 <= batch <= largest:
        raise EngineError(f"max_batch is {batch}; bundle {bundle.path} was exported for 1 to {largest}")
    if streams < 1:
        raise EngineError(f"streams is {streams}; expected 1 or more")
    require_device(backend, device)
    if backend == "openvino":
        from edge.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(bundle, streams=streams, max_batch=batch)
    if backend == "onnxruntime":
        from edge.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(bundle, max_batch=batch)
    from edge.engines.fake import FakeEngine, spec_of

    return FakeEngine(spec_of(bundle.manifest, max_batch=batch))
