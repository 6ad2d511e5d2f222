"""What is particular to OpenVINO: true fp32, streams, and a batch that is too late."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.bundle import ModelBundle
from edge.engines.openvino import OpenVinoEngine, cpu_options
from edge.errors import EngineError


class NeverReady:
    """An infer request that runs until it is told to end."""

    def __init__(self) -> None:
        self.ended = False

    def set_tensor(self, *_: Any) -> None: ...
    def start_async(self) -> None: ...
    def cancel(self) -> None:
        self.ended = True

    def wait(self) -> None: ...
    def wait_for(self, timeout_ms: int) -> bool:
        return self.ended


def open_tiny(bundle: ModelBundle, **options: Any) -> OpenVinoEngine:
    return OpenVinoEngine(bundle, **{"streams": 2, "max_batch": 4, "threads": 2, **options})


def test_the_arithmetic_is_fp32_whatever_the_processor_offers(tiny_bundle: ModelBundle) -> None:
    """OpenVINO computes in bf16 on processors that can, unless it is told not to."""
    with open_tiny(tiny_bundle) as engine:
        assert engine.precision == "f32"


@pytest.mark.parametrize(("before", "frames"), [(0, 2), (1, 1), (4, 0)])
def test_warming_up_runs_one_frame_a_stream_and_no_more(tiny_bundle: ModelBundle, before: int, frames: int) -> None:
    """Frames that ran already count, so that a swap whose golden frames were checked costs the line no burst."""
    with open_tiny(tiny_bundle) as engine:
        spec = engine.spec
        for _ in range(before):
            engine.infer(np.zeros((1, spec.height, spec.width, spec.channels), np.uint8))
        engine.warmup()

        assert engine._next == before + frames


def test_control_without_the_hint_a_capable_processor_would_use_bf16(
    tiny_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above has teeth wherever the processor knows bf16."""
    import openvino

    import edge.engines.openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bf16 arithmetic, so fp32 is all it can do")
    loose = {key: value for key, value in cpu_options(1, 1).items() if "PRECISION" not in key and "MODE" not in key}
    monkeypatch.setattr(edge.engines.openvino, "cpu_options", lambda *_: loose)

    with open_tiny(tiny_bundle) as engine:
        assert engine.precision == "bf16"


@pytest.mark.parametrize(("streams", "cores", "threads"), [(2, 2, 2), (1, 2, 2), (2, 5, 4), (4, 2, 4), (3, 16, 15)])
def test_streams_share_the_cores_evenly(streams: int, cores: int, threads: int) -> None:
    """Every stream has the same number of threads, at least one."""
    options = cpu_options(streams, cores)

    assert (options["NUM_STREAMS"], options["INFERENCE_NUM_THREADS"]) == (streams, threads)


def test_depth_is_the_number_of_streams(tiny_bundle: ModelBundle) -> None:
    """One batch in flight for each stream keeps every core at work."""
    for streams in (1, 3):
        with open_tiny(tiny_bundle, streams=streams) as engine:
            assert engine.spec.depth == streams


def test_a_batch_that_is_too_late_is_an_error_and_its_stream_comes_back(tiny_bundle: ModelBundle) -> None:
    """The ticket is consumed; the stream works again once the late batch has ended, and is not used before."""
    batch = np.zeros((1, 32, 32, 1), np.uint8)
    with open_tiny(tiny_bundle, streams=1, max_batch=1) as engine:
        stuck = NeverReady()
        healthy = engine._idle.popleft()
        engine._idle.append(stuck)
        engine.submit(batch)

        with pytest.raises(EngineError, match=r"not ready within 0\.01 s"):
            engine.collect(0.01)
        with pytest.raises(EngineError, match="no batch is in flight"):
            engine.collect(0.01)
        with pytest.raises(EngineError, match="given up"):
            engine.submit(batch)
        engine._idle.append(healthy)
        engine.infer(batch)
        stuck.ended = True
        engine._take_back_overdue()

        assert list(engine._idle) == [healthy, stuck]


def test_a_model_that_openvino_cannot_read_is_named(make_bundle: Callable[..., ModelBundle], tmp_path: Path) -> None:
    """A graph of an operator that does not exist: EngineError with the bundle's path, no foreign exception."""
    from onnx import TensorProto, helper

    node = helper.make_node("NoSuchOperator", ["frames"], ["anomaly_map"], domain="nowhere")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("frames", TensorProto.UINT8, ["N", 32, 32, 1])],
        [helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["N", 14, 14])],
    )
    golden = make_bundle(tmp_path / "good").golden
    bundle = make_bundle(tmp_path / "bad", model=helper.make_model(graph).SerializeToString(), golden=golden)

    with pytest.raises(EngineError, match=r"bad.*OpenVINO"):
        open_tiny(bundle)


QUIET = """
import multiprocessing, socket, sys
def refuse(*_, **__):
    raise SystemExit("something tried to reach the network")
multiprocessing.Process.start = socket.create_connection = refuse
{first}
import edge.engines.openvino
sys.exit(3 if "openvino_telemetry.main" in sys.modules else 0)
"""


@pytest.mark.parametrize(("first", "status"), [("", 0), ("import openvino", 3)])
def test_opening_the_backend_reports_to_nobody(first: str, status: int, tmp_path: Path) -> None:
    """OpenVINO's package phones home when it is imported; ours must not let it. Control: the plain import does."""
    if not any(found.name == "openvino-telemetry" for found in metadata.distributions()):
        pytest.skip("this OpenVINO comes without its telemetry")
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("CI", None)  # where it would keep quiet by itself

    done = subprocess.run([sys.executable, "-c", QUIET.format(first=first)], env=environment, timeout=60, check=False)

    assert done.returncode == status
    assert status != 0 or list(tmp_path.iterdir()) == []
