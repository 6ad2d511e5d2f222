"""The whole GPU path, from a plan's bytes to maps: the real code of `tensorrt`, `cuda` and `streamed`.

Only the two foreign libraries are stood in for, by `fake_nvidia`. What no stand-in can say (that the plan computes what
the graph says, how fast, which bits the library finds wrong) is for the tests marked `gpu`.
"""

from __future__ import annotations

import builtins
import importlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from edge.bundle import ModelBundle, check_golden
from edge.clock import SystemClock
from edge.config import load_config
from edge.demo.line import write_config
from edge.engines import cuda, tensorrt
from edge.engines.device import Plan
from edge.engines.registry import open_engine
from edge.errors import DeviceError
from edge.inference import EngineRunner, Scored, Unjudged
from edge.line_stages import make_stages
from edge.metrics import Metrics
from edge.opening import EngineOpener, Plans
from edge.types import FlatMaps, Frame, FrameId, Reason, Uneven
from fake_nvidia import PLAN, FakeNvidia, install

Open = Callable[..., Any]


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch, tiny_bundle: ModelBundle, tmp_path: Path) -> Iterator[FakeNvidia]:
    """A machine with one GPU, both libraries, and our kernels built."""
    (tmp_path / "kernels.fatbin").write_bytes(b"fatbin")
    monkeypatch.setattr(cuda, "FATBIN", tmp_path / "kernels.fatbin")
    with install(monkeypatch, tiny_bundle) as machine:
        yield machine


@pytest.fixture
def open_it(tiny_bundle: ModelBundle, tmp_path: Path) -> Open:
    """The tiny bundle's engine, from a plan in a folder of its own."""
    plan = Plan(tmp_path / "plan.engine", PLAN)
    return lambda **options: open_engine(
        tiny_bundle, **{"backend": "tensorrt", "device": "cuda:0", "plan": plan, **options}
    )


def batch_of(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 1), dtype=np.uint8)


def field() -> FlatMaps:
    random = np.random.default_rng(1)
    gain = random.uniform(0.4, 4, (32, 32, 1)).astype(np.float32)
    return FlatMaps(gain, random.uniform(0, 30, gain.shape).astype(np.float32))


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns or raises, from a thread of its own."""
    done: list[Any] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:
            done.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if isinstance(done[0], Exception):
        raise done[0]
    return done[0]


def test_a_plan_gives_the_golden_answers(nvidia: FakeNvidia, open_it: Open, tiny_bundle: ModelBundle) -> None:
    """Every byte goes through pinned memory, three streams and a context of the library, and comes out as exported."""
    with open_it() as engine:
        engine.warmup()
        assert check_golden(tiny_bundle, engine, require=True).ok

    assert (engine.spec.version, engine.spec.device) == ("rtx-1.7.1.116", "cuda:0 NVIDIA Fake")


def test_each_slot_has_a_context_of_its_own_that_always_sees_the_same_addresses(
    nvidia: FakeNvidia, open_it: Open
) -> None:
    """A captured CUDA graph holds addresses: with others it would be captured again, or run on another's memory."""
    with open_it() as engine:
        engine.warmup()
        for index in range(10):
            engine.submit(batch_of(1 + index % 4))
            engine.collect(10.0)

    contexts = nvidia.trt.contexts
    assert len(contexts) == engine.spec.depth == 2
    assert all(context.config.cuda_graph_strategy == "whole graph" for context in contexts)
    assert all(len(context.ran) == 1 for context in contexts) and contexts[0].ran != contexts[1].ran


def test_kernels_are_made_ready_once_a_machine_and_not_once_a_start(
    nvidia: FakeNvidia, open_it: Open, tmp_path: Path
) -> None:
    """The runtime cache is there as soon as the engine is warm, so that a killed daemon finds it too."""
    killed = open_it()
    killed.warmup()
    assert nvidia.trt.compiled == [1, 2, 3, 4]
    kept = tmp_path / "plan.engine.runtime-cache"
    before = kept.stat().st_mtime_ns

    with open_it() as engine:
        engine.warmup()

    assert nvidia.trt.compiled == [1, 2, 3, 4] and kept.stat().st_mtime_ns == before  # read, and not written again
    killed.__exit__(None, None, None)


@pytest.mark.parametrize("damage", [lambda data: data[:3], lambda data: b"", lambda data: b"elsewhere" + data])
def test_a_damaged_runtime_cache_costs_time_and_nothing_else(
    nvidia: FakeNvidia, open_it: Open, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """Cut, empty or another's: made anew, and there again for the next start."""
    kept = tmp_path / "plan.engine.runtime-cache"
    with open_it() as engine:
        engine.warmup()
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))

    with open_it() as engine:
        engine.warmup()

    assert nvidia.trt.compiled == [1, 2, 3, 4] * 2 and kept.read_bytes() == whole


def test_a_runtime_cache_that_cannot_be_kept_stops_nothing(
    nvidia: FakeNvidia, tiny_bundle: ModelBundle, tmp_path: Path
) -> None:
    """The folder is gone, as on a full disk: the line runs, and makes its kernels ready again next time."""
    plan = Plan(tmp_path / "gone" / "plan.engine", PLAN)

    with open_engine(tiny_bundle, backend="tensorrt", device="cuda:0", plan=plan) as engine:
        engine.warmup()
        assert engine.infer(batch_of(1))[0].shape == (1, 14, 14)


def test_an_engine_is_opened_used_and_closed_in_different_threads(nvidia: FakeNvidia, open_it: Open) -> None:
    """As the daemon does; the driver asks for its context in each of them. Everything is freed in the end."""
    engine = in_a_thread(open_it)
    expected = in_a_thread(lambda: engine.infer(batch_of(3)))[0]

    np.testing.assert_array_equal(engine.infer(batch_of(3))[0], expected)
    in_a_thread(lambda: engine.__exit__(None, None, None))
    assert nvidia.driver.held == set()


def test_control_a_context_that_is_not_made_current_is_noticed(
    nvidia: FakeNvidia, open_it: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: only the thread that opened the engine has the context."""
    engine = open_it()
    monkeypatch.setattr(cuda.CudaDevice, "_enter", lambda device: None)

    with pytest.raises(DeviceError, match="not current in this thread"):
        in_a_thread(lambda: engine.infer(batch_of(1)))
    monkeypatch.undo()


def test_several_engines_share_a_gpu_and_close_apart(nvidia: FakeNvidia, open_it: Open) -> None:
    """One primary context, streams and memory of their own; closing one frees its own memory and stops no other."""
    one, two = open_it(), open_it()
    both = len(nvidia.driver.held)
    one.submit(batch_of(2))
    two.submit(batch_of(3))
    one.collect(10.0)

    one.__exit__(None, None, None)

    assert two.collect(10.0)[1].shape == (3, 14, 14) and len(nvidia.driver.held) == both / 2
    two.__exit__(None, None, None)
    assert nvidia.driver.held == set()


def full(machine: FakeNvidia, options: dict[str, Any]) -> None:
    machine.driver.gpu._free = 10_000


def full_of_fields(machine: FakeNvidia, options: dict[str, Any]) -> None:
    machine.driver.gpu._free = 22_000
    options["fields"] = [field()]


def no_contexts(machine: FakeNvidia, options: dict[str, Any]) -> None:
    machine.trt.contexts_fit = 1


def foreign(machine: FakeNvidia, options: dict[str, Any]) -> None:
    options["plan"] = Plan(Path("cache/elsewhere.plan"), b"ftrt from elsewhere")


def loadable_nowhere(machine: FakeNvidia, options: dict[str, Any]) -> None:
    """The data center's TensorRT cannot be asked beforehand."""
    foreign(machine, options)
    del machine.trt.Runtime.get_engine_validity


def gone(machine: FakeNvidia, options: dict[str, Any]) -> None:
    machine.driver.gpu.lose("unspecified launch failure")


def old_driver(machine: FakeNvidia, options: dict[str, Any]) -> None:
    machine.driver._init_fails = "cuInit failed: system has unsupported display driver / cuda driver combination"


def another_gpu(machine: FakeNvidia, options: dict[str, Any]) -> None:
    options["device"] = "cuda:1"


def no_kernels(machine: FakeNvidia, options: dict[str, Any]) -> None:
    cuda.FATBIN.unlink()
    options["fields"] = [field()]


def no_kernels_for_masks(machine: FakeNvidia, options: dict[str, Any]) -> None:
    cuda.FATBIN.unlink()
    options["quiet_below"] = 1.0


@pytest.mark.parametrize(
    ("wrong", "reason", "words"),
    [
        (full, "memory", "no room for .* bytes of device memory.*lower batching.max_batch"),
        (full_of_fields, "memory", "no room for 8192 bytes"),
        (no_contexts, "memory", "no room for 2 execution contexts"),
        (foreign, "engine", "elsewhere.plan .*MALFORMED_ENGINE.*kizu compile"),
        (loadable_nowhere, "engine", "elsewhere.plan: TensorRT rtx-1.7.1.116 cannot load it"),
        (gone, "lost", "unspecified launch failure; see `nvidia-smi`"),
        (old_driver, "driver", "does not start: .*driver combination"),
        (another_gpu, "device", "cuda:1: this machine has 1 NVIDIA GPUs"),
        (no_kernels, "package", r'make kernels.*engine.flat_field = "host"'),
        (no_kernels_for_masks, "package", r'make kernels.*engine.maps = "all"'),
    ],
)
def test_what_cannot_be_opened_has_a_reason_a_next_step_and_leaves_nothing(
    nvidia: FakeNvidia, open_it: Open, wrong: Callable[[FakeNvidia, dict[str, Any]], None], reason: str, words: str
) -> None:
    """One word for the counter, and no memory held: the daemon tries again, or the CPU goes on beside other engines."""
    options: dict[str, Any] = {}
    wrong(nvidia, options)

    with pytest.raises(DeviceError, match=words) as refused:
        open_it(**options)
    assert refused.value.reason == reason and nvidia.driver.held == set()


@pytest.mark.parametrize(
    ("says", "reason", "words"),
    [
        ("libcuda.so.1: cannot open shared object file: No such file or directory", "driver", "no NVIDIA driver"),
        ("_driver.cpython-312-x86_64-linux-gnu.so: undefined symbol: cuArrayCreate_v2", "driver", "driver is too old"),
        ("No module named 'pycuda'", "package", r"pip install 'kizu\[gpu\]'"),
    ],
)
def test_what_pycudas_import_says_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, says: str, reason: str, words: str
) -> None:
    """Its own words, seen with no libcuda, with one that lacks a function, and without the package."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("pycuda"):
            raise ImportError(says)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)

    with pytest.raises(DeviceError, match=words) as missing:
        cuda.import_driver()
    assert missing.value.reason == reason


def refuse_to_enqueue(machine: FakeNvidia) -> None:
    machine.trt.enqueues = False


def lose(machine: FakeNvidia) -> None:
    machine.driver.gpu.lose("Xid 79: GPU has fallen off the bus")


@pytest.mark.parametrize("happens", [refuse_to_enqueue, lose])
def test_a_gpu_that_fails_while_it_runs_is_lost_until_the_engine_is_opened_again(
    nvidia: FakeNvidia, open_it: Open, happens: Callable[[FakeNvidia], None]
) -> None:
    """A context after such an error cannot be trusted: every call says so, and closing still frees what it can."""
    engine = open_it()
    engine.infer(batch_of(1))
    happens(nvidia)

    for _ in range(2):
        with pytest.raises(DeviceError) as lost:
            engine.infer(batch_of(1))
        assert lost.value.reason == "lost"
    engine.__exit__(None, None, None)


def test_both_of_our_kernels_run_and_are_loaded_once(
    nvidia: FakeNvidia, open_it: Open, tiny_bundle: ModelBundle
) -> None:
    """Flat field before the graph, mask after it; the maps are those of the plain way."""
    from edge.stages.flatfield import level

    pixels, maps = batch_of(2), field()
    corrected = pixels.copy()
    level(corrected[1], Uneven(maps, 0, 0))
    with open_it() as plain:
        expected, _ = plain.infer(corrected)

    with open_it(fields=[maps], quiet_below=-1.0) as engine:
        engine.warmup()
        engine.submit(pixels, [None, Uneven(maps, 0, 0)])
        _, found, _ = engine.collect(10.0)

    np.testing.assert_array_equal(found, expected)
    assert len(nvidia.driver.loaded) == 1


def frames(count: int) -> SimpleQueue[Frame | None]:
    queue: SimpleQueue[Frame | None] = SimpleQueue()
    for index in range(count):
        queue.put(Frame(FrameId("cam", 1, index, 0), batch_of(1, index)[0]))
    queue.put(None)
    return queue


@pytest.mark.parametrize("on_failure", ["cpu", "refuse"])
def test_a_gpu_lost_on_a_running_line_costs_what_was_in_it_and_is_told_and_counted(
    nvidia: FakeNvidia, tiny_bundle: ModelBundle, tmp_path: Path, on_failure: str
) -> None:
    """Those in the engine are INCONCLUSIVE(engine); then the CPU judges, or every frame is INCONCLUSIVE until it opens.

    It is opened again at once, not after three batches: a lost device answers none.
    """
    engine_table = {"backend": "tensorrt", "device": "cuda:0", "on_gpu_failure": on_failure}
    path = write_config(tmp_path / "line.toml", tiny_bundle.path, ["cam"], engine=engine_table)
    config, clock, registry, told = load_config(path), SystemClock(), CollectorRegistry(), list[str]()
    value = registry.get_sample_value
    metrics = Metrics(registry, ["cam"], clock)
    opener = EngineOpener(
        config,
        tiny_bundle,
        plans_of=lambda bundle, asked: Plans(Plan(tmp_path / "plan.engine", PLAN)),
        on_fallback=lambda reason, why: metrics.fall_back(reason),
    )
    answers: list[Scored | Unjudged] = []
    first = opener.open()
    assert opener.fallback is None

    def hand_over(answer: Scored | Unjudged) -> None:
        answers.append(answer)
        if len(answers) == 3:
            lose(nvidia)

    EngineRunner(
        first, opener.open, make_stages(config, tiny_bundle, path), metrics, clock, 1, 0, hand_over,
        lambda text, fields: told.append(text),
    ).run(frames(20))  # fmt: skip

    scored = sum(len(one.frames) for one in answers if isinstance(one, Scored))
    reasons = {one.reason for one in answers if isinstance(one, Unjudged)}
    assert len(answers) == 20 and reasons == {Reason.ENGINE} and told.count("engine failed a batch") == 1
    assert value("kizu_engine_reopens_total") == 1
    if on_failure == "cpu":
        assert scored >= 20 - first.spec.depth and opener.fallback == "lost"
        assert value("kizu_engine_fallbacks_total", {"reason": "lost"}) == 1
    else:
        assert scored == 3 and "no engine: every frame is INCONCLUSIVE until it opens again" in told
        assert value("kizu_engine_fallbacks_total", {"reason": "lost"}) == 0


def test_the_stand_in_offers_nothing_that_pycuda_does_not() -> None:
    """Where the real one can be imported: every name that `cuda` uses is there, so the stand-in flatters nobody."""
    try:
        driver = importlib.import_module("pycuda.driver")
    except ImportError as missing:
        pytest.skip(f"pycuda cannot be imported here: {missing}")
    calls = "init mem_alloc pagelocked_empty memcpy_htod_async memcpy_dtoh_async module_from_file"
    members = {
        driver: f"{calls} Error MemoryError LaunchError LogicError",
        driver.Device: "count name compute_capability retain_primary_context",
        driver.Stream: "handle wait_for_event",
        driver.Event: "record query",
        driver.Context: "push pop synchronize",
        driver.DeviceAllocation: "free __int__",
        driver.PagelockedHostAllocation: "free",
        driver.event_flags: "DISABLE_TIMING",
    }

    assert [name for owner, words in members.items() for name in words.split() if not hasattr(owner, name)] == []


def test_tensorrts_own_words_for_a_plan_that_it_cannot_run() -> None:
    """The library itself, which answers without a GPU: bytes that are no plan are an engine's fault."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))

    for data in (b"x", np.random.default_rng(0).bytes(5000)):
        with pytest.raises(DeviceError, match="MALFORMED_ENGINE") as refused:
            tensorrt.require_valid(trt, runtime, Plan(Path("elsewhere.plan"), data), "NVIDIA L4")
        assert refused.value.reason == "engine"


def test_tensorrts_own_words_where_its_driver_is_missing(tiny_bundle: ModelBundle, tmp_path: Path) -> None:
    """A whole plan of its own, and no driver that it could ask: not the plan's fault, so nobody compiles in vain."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("a driver is loaded here")
    from edge.compile import compile_bundle

    compiled = compile_bundle(tiny_bundle, targets=["sm89"], precision="fp32", cache=tmp_path)
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))

    with pytest.raises(DeviceError, match="is the driver too old") as refused:
        tensorrt.require_valid(trt, runtime, Plan(compiled.path, compiled.read()), "NVIDIA L4")
    assert refused.value.reason == "driver"
