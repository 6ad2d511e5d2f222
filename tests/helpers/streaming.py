"""The engine of the GPU path on the fake device, running a bundle's own graph."""

from __future__ import annotations

from typing import Any

from edge.bundle import ModelBundle
from edge.engines.fake_device import FakeDevice, FakeProgram, onnx_compute
from edge.engines.streamed import StreamedEngine
from edge.engines.tensorrt import spec_of


def streamed_engine(
    bundle: ModelBundle,
    *,
    depth: int = 2,
    kind: type[StreamedEngine] = StreamedEngine,
    fail_at: frozenset[int] = frozenset(),
    seed: int = 0,
    memory: int = 1 << 30,
    **options: Any,
) -> tuple[StreamedEngine, FakeDevice]:
    """An engine of `kind` and its device; `fail_at` are the batches that cannot be enqueued."""
    device = FakeDevice(seed=seed, memory=memory)
    spec = spec_of(bundle.manifest, "0", "fake device", bundle.manifest.input.max_batch, depth)
    program = FakeProgram(device, spec, onnx_compute(bundle), fail_at=fail_at)
    return kind(spec, device, program, **options), device
