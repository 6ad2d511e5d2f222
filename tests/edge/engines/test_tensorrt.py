"""TensorRT without a GPU: what is refused and in which words, and a runtime cache that is whole or not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge.bundle import ModelBundle
from edge.engines import tensorrt
from edge.engines.cuda import ordinal_of
from edge.engines.device import Plan
from edge.errors import DeviceError, EngineError


class Cache:
    """A runtime cache that takes only what `whole` holds, as the library does."""

    whole = b"kernels" * 10

    def __init__(self) -> None:
        self.data = b""

    def deserialize(self, data: bytes) -> bool:
        if data != self.whole:
            raise RuntimeError("bad cache")
        self.data = data
        return True


def test_a_whole_cache_is_read_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    """What a line wrote is there for the next start."""
    path = tmp_path / "plan.runtime-cache"
    assert tensorrt.read_cache(path, Cache).data == b""

    tensorrt.write_whole(path, Cache.whole)

    assert tensorrt.read_cache(path, Cache).data == Cache.whole
    assert os.listdir(tmp_path) == [path.name]


def test_a_truncated_cache_is_removed_and_made_anew(tmp_path: Path) -> None:
    """It only saves time, so losing it is no failure; using half of it could be."""
    path = tmp_path / "plan.runtime-cache"
    path.write_bytes(Cache.whole[:-1])

    assert tensorrt.read_cache(path, Cache).data == b"" and not path.exists()


def test_a_cache_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    """The folder is gone: the error names the file, and nothing is left half-written."""
    with pytest.raises(EngineError, match=r"gone/plan.runtime-cache: No such file"):
        tensorrt.write_whole(tmp_path / "gone" / "plan.runtime-cache", b"1")


@pytest.mark.parametrize(
    ("bits", "reason", "words"),
    [
        ({"VERSION_MISMATCH"}, "engine", "damaged or from elsewhere"),
        ({"UNSUPPORTED_CC"}, "engine", "kizu compile"),
        ({"MALFORMED_ENGINE"}, "engine", "MALFORMED_ENGINE"),
        ({"OLD_CUDA_DRIVER"}, "driver", "driver is too old"),
        ({"INSUFFICIENT_GPU_MEMORY", "CUDA_ERROR"}, "memory", "the GPU is full"),
        ({"CUDA_ERROR"}, "driver", "nvidia-smi"),
        (set(), "driver", "is the driver too old"),
    ],
)
def test_what_the_library_finds_wrong_becomes_a_reason_and_a_next_step(bits: set[str], reason: str, words: str) -> None:
    """Each diagnostic has one word for the counter, and names plan, device and version."""
    error = tensorrt.refusal(bits, Path("cache/door.plan"), "rtx-1.7", "NVIDIA L4")

    assert error.reason == reason and words in str(error)
    assert "cache/door.plan" in str(error) and "NVIDIA L4" in str(error) and "rtx-1.7" in str(error)


def test_every_diagnostic_of_the_installed_library_is_known() -> None:
    """A new one should be given its own words; so far these seven."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

    known = {"VERSION_MISMATCH", "UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME"}
    assert set(trt.EngineInvalidityDiagnostics.__members__) == known | {
        "INSUFFICIENT_GPU_MEMORY",
        "MALFORMED_ENGINE",
        "CUDA_ERROR",
    }


@pytest.mark.parametrize("content", [None, b""], ids=["missing", "empty"])
def test_a_plan_that_is_not_there_is_an_engine_error(tmp_path: Path, content: bytes | None) -> None:
    """Before any driver is asked."""
    plan = tmp_path / "door.plan"
    if content is not None:
        plan.write_bytes(content)

    with pytest.raises(DeviceError, match=r"door.plan.*kizu compile") as refused:
        Plan.read(plan)
    assert refused.value.reason == "engine"


@pytest.mark.parametrize(("device", "number"), [("cuda", 0), ("cuda:0", 0), ("cuda:12", 12)])
def test_a_device_is_cuda_and_a_number(device: str, number: int) -> None:
    """The first GPU where no number is given."""
    assert ordinal_of(device) == number


@pytest.mark.parametrize("device", ["cpu", "cuda:", "cuda:-1", "gpu", "CUDA:0"])
def test_another_device_is_refused(device: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(EngineError, match="cuda:N"):
        ordinal_of(device)


def test_the_modules_load_neither_a_driver_nor_tensorrt() -> None:
    """Lazy: importing them costs nothing and works on any machine; never pycuda.autoinit."""
    script = (
        "import sys, edge.engines.cuda, edge.engines.tensorrt, edge.engines.registry\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('pycuda', 'tensorrt', 'tensorrt_rtx', 'onnxruntime')])"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)

    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.gpu
def test_a_compiled_plan_gives_the_golden_answers(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    """The whole way on the device, in fp32 (TF32 off is not promised): within 1e-2 of the largest cell; then again."""
    from edge.engines.registry import open_engine
    from tensorrt_plans import build_plan, where_the_gpu_is_known

    plan = build_plan(tiny_bundle, tmp_path / "tiny.plan")
    with where_the_gpu_is_known():
        opened = open_engine(tiny_bundle, backend="tensorrt", device="cuda:0", plan=Plan.read(plan))
    with opened as engine:
        print(engine.spec)
        engine.warmup()
        golden = tiny_bundle.golden
        maps, scores = engine.infer(golden.frames)
        again, _ = engine.infer(golden.frames)

    assert np.abs(maps - golden.maps).max() <= 1e-2 * np.abs(golden.maps).max()
    assert again.tobytes() == maps.tobytes() and scores.shape == (len(maps),)
    assert plan.with_name("tiny.plan.runtime-cache").exists() or "rtx" not in engine.spec.version


@pytest.mark.gpu
def test_a_plan_from_elsewhere_is_refused_by_name(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    """Random bytes under the right name."""
    from edge.engines.registry import open_engine

    plan = tmp_path / "tiny.plan"
    plan.write_bytes(np.random.default_rng(0).bytes(5000))

    with pytest.raises(DeviceError, match=r"tiny.plan") as refused:
        open_engine(tiny_bundle, backend="tensorrt", device="cuda:0", plan=Plan.read(plan))
    assert refused.value.reason == "engine"
