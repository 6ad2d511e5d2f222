"""`open_engine`: the one way from an opened bundle to a running engine; loads one backend and no other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal, cast, get_args

from edge.bundle import ModelBundle, cells_between, coarse_bundle
from edge.engines.device import Plan
from edge.engines.refine import OnTiles, RefineEngine
from edge.errors import DeviceError, EngineError, KizuError
from edge.protocols import Engine
from edge.types import FlatMaps

Backend = Literal["openvino", "onnxruntime", "tensorrt", "fake"]

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
    if backend == "tensorrt":
        from edge.engines.cuda import ordinal_of

        try:
            ordinal_of(device)
        except EngineError as wrong:
            raise error(str(wrong)) from None
    elif device != "cpu":
        raise error(f"device {device!r} is unknown to backend {backend!r}; expected 'cpu'")


def open_engine(
    bundle: ModelBundle,
    *,
    backend: Backend = "openvino",
    device: str = "cpu",
    streams: int = 2,
    max_batch: int | None = None,
    refine: bool = True,
    on_tiles: OnTiles = lambda seen, refined: None,
    plan: Plan | None = None,
    coarse_plan: Plan | None = None,
    quiet_below: float | None = None,
    fields: Sequence[FlatMaps] = (),
) -> Engine:
    """Build the engine that runs `bundle`; use it as a context manager.

    `streams` is how many batches run side by side where the backend can (OpenVINO). `max_batch` (1 to the bundle's own)
    is the largest batch that will be submitted. A bundle with a coarse graph is looked at with it first, and `on_tiles`
    told of it; without `refine` it is computed densely everywhere. The fake computes no network, so it has no coarse
    one. `plan` is what TensorRT runs, compiled from the bundle's graph, `coarse_plan` from its coarse one; without that
    TensorRT computes densely everywhere. With `quiet_below` it copies back no map that stays below it, see
    `StreamedEngine`; an engine that looks coarsely first, or at tiles, needs every map. `fields` are the flat fields
    that TensorRT is to apply itself; other engines know none, and `stages.infer.submit` does it for them.

    Raises:
        EngineError: unknown backend or device, the backend's package is missing, the graph breaks the graph contract,
            or the backend refuses the model.
        DeviceError: the GPU cannot run the plan; its `reason` says why.
    """
    require_backend(backend)
    largest = bundle.manifest.input.max_batch
    batch = largest if max_batch is None else max_batch
    if not 1 <= batch <= largest:
        raise EngineError(f"max_batch is {batch}; bundle {bundle.path} was exported for 1 to {largest}")
    if streams < 1:
        raise EngineError(f"streams is {streams}; expected 1 or more")
    require_device(backend, device)
    asked = bundle.manifest.refine
    if not refine or asked is None or backend == "fake" or (backend == "tensorrt" and coarse_plan is None):
        return _open(
            bundle, backend, device, streams, batch, plan, fields,
            quiet_below if bundle.manifest.input.fit != "tile" else None,
        )  # fmt: skip
    with ExitStack() as opened:
        dense = opened.enter_context(_open(bundle, backend, device, streams, batch, plan, fields))
        coarse = opened.enter_context(
            _open(coarse_bundle(bundle), backend, device, streams, batch, coarse_plan, fields)
        )
        opened.pop_all()  # both are the refining engine's to close from here on
    gate, every = asked.gate(bundle.calibration), cells_between(bundle.manifest, asked)
    return RefineEngine(dense, coarse, gate=gate, every=every, on_tiles=on_tiles)


def _open(
    bundle: ModelBundle, backend: Backend, device: str, streams: int, batch: int, plan: Plan | None,
    fields: Sequence[FlatMaps], quiet_below: float | None = None,
) -> Engine:  # fmt: skip
    if backend == "tensorrt":
        from edge.engines.tensorrt import open_tensorrt

        if plan is None:
            raise DeviceError(
                "engine",
                f"backend 'tensorrt' runs a compiled plan and got none for bundle {bundle.path}; "
                "run `kizu compile BUNDLE --backend tensorrt` and `kizu run`",
            )
        return open_tensorrt(bundle, plan, device=device, max_batch=batch, quiet_below=quiet_below, fields=fields)
    if backend == "openvino":
        from edge.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(bundle, streams=streams, max_batch=batch)
    if backend == "onnxruntime":
        from edge.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(bundle, max_batch=batch)
    from edge.engines.fake import FakeEngine, spec_of

    return FakeEngine(spec_of(bundle.manifest, max_batch=batch))
