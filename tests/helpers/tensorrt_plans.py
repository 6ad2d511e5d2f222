"""A plan for the GPU of this machine, built directly from a bundle's graph: for tests and benchmarks on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge.bundle import ModelBundle
from edge.engines.tensorrt import import_tensorrt
from edge.errors import DeviceError


def build_plan(bundle: ModelBundle, path: Path) -> Path:
    """Write the strongly typed engine of `bundle`, for batches of 1 to its largest, to `path`."""
    trt = import_tensorrt()
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse(bundle.model):
        raise ValueError([parser.get_error(index).desc() for index in range(parser.num_errors)])
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    spec = bundle.manifest.input
    shapes = [(count, spec.height, spec.width, spec.channels) for count in (1, spec.max_batch, spec.max_batch)]
    profile.set_shape("frames", *shapes)
    config.add_optimization_profile(profile)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise ValueError("TensorRT built no engine; its log says why")
    path.write_bytes(bytes(data))
    return path


@contextmanager
def where_the_gpu_is_known() -> Iterator[None]:
    """Skip, in the library's own words, on a GPU that this TensorRT does not run on: that is no fault of ours.

    TensorRT for RTX 1.7 builds for no sm90 (H100).
    """
    import pytest  # benchmarks use the rest of this file

    try:
        yield
    except DeviceError as error:
        if "UNSUPPORTED_CC" not in str(error) and "unknown to tensorrt_rtx" not in str(error):
            raise
        pytest.skip(f"TensorRT was not executed: {error}")
