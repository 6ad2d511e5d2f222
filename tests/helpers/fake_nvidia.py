"""pycuda's driver and TensorRT-RTX as far as the GPU path uses them, over the fake device; what calls them is real.

Each is strict where the real one is: a call needs the context current in its own thread, freed memory is gone, an
engine takes its own bytes only. `install` puts them where `import` finds them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundle import ModelBundle
from edge.engines.fake_device import Compute, FakeDevice, onnx_compute
from edge.errors import DeviceError

PLAN = b"ftrt, a plan as the fake runtime takes it"


class Error(Exception):
    """pycuda.driver.Error."""


class OutOfMemory(Error):
    """pycuda.driver.MemoryError."""


class LaunchError(Error):
    """pycuda.driver.LaunchError: what runs on the device failed, and with it the context."""


class LogicError(Error):
    """pycuda.driver.LogicError: a call that could never work."""


class FakeDriver(ModuleType):
    """`pycuda.driver` of a machine with one GPU; `init_fails` is what the driver says at the start."""

    Error, MemoryError, LaunchError, LogicError = Error, OutOfMemory, LaunchError, LogicError
    event_flags = SimpleNamespace(DISABLE_TIMING=2)

    def __init__(self, *, memory: int = 1 << 28, seed: int = 0, init_fails: str | None = None) -> None:
        super().__init__("pycuda.driver")
        self.gpu = FakeDevice(memory=memory, seed=seed)
        self.streams: dict[int, Any] = {}
        self.held: set[int] = set()
        """Addresses of device and pinned memory that was not freed."""
        self.loaded: list[str] = []
        self._init_fails = init_fails
        self._current = threading.local()
        driver = self

        class Device:
            """The GPU numbered `ordinal`."""

            def __init__(self, ordinal: int) -> None:
                self.ordinal = ordinal

            @staticmethod
            def count() -> int:
                return 1

            def name(self) -> str:
                return "NVIDIA Fake"

            def compute_capability(self) -> tuple[int, int]:
                return 8, 9

            def retain_primary_context(self) -> Any:
                return SimpleNamespace(
                    push=driver.push, pop=driver.pop, synchronize=lambda: driver.within(lambda: None)
                )

        class Stream:
            def __init__(self, flags: int) -> None:
                assert flags == 1, "the legacy default stream holds every other up"
                self.fake = driver.within(driver.gpu.stream)
                self.handle = self.fake.handle
                driver.streams[self.handle] = self.fake

            def wait_for_event(self, event: Any) -> None:
                driver.within(lambda: driver.gpu.wait(self.fake, event.fake))

        class Event:
            def __init__(self, flags: int) -> None:
                self.fake = driver.within(driver.gpu.event)

            def record(self, stream: Any) -> None:
                driver.within(lambda: driver.gpu.record(self.fake, stream.fake))

            def query(self) -> bool:
                return bool(driver.within(lambda: driver.gpu.done(self.fake)))

        self.Device, self.Stream, self.Event = Device, Stream, Event

    def init(self) -> None:
        if self._init_fails is not None:
            raise LogicError(self._init_fails)

    def push(self) -> None:
        self._current.depth = getattr(self._current, "depth", 0) + 1

    def pop(self) -> None:
        if not getattr(self._current, "depth", 0):
            raise LogicError("cuCtxPopCurrent failed: invalid device context")
        self._current.depth -= 1

    def within(self, work: Callable[[], Any]) -> Any:
        """Run `work` as the driver would: only with the context current in this thread, and with its own errors."""
        if not getattr(self._current, "depth", 0):
            raise LogicError("invalid device context: it is not current in this thread")
        try:
            return work()
        except DeviceError as error:
            raise (OutOfMemory if error.reason == "memory" else LaunchError)(str(error)) from None

    def mem_alloc(self, size: int) -> Any:
        return _Memory(self, self.within(lambda: self.gpu.allocate(size)), size)

    def pagelocked_empty(self, size: int, dtype: Any) -> NDArray[np.uint8]:
        pinned = _Pinned(self, self.within(lambda: self.gpu.pinned(size)))
        return np.asarray(pinned)

    def memcpy_htod_async(self, address: int, host: NDArray[np.uint8], stream: Any) -> None:
        self.within(lambda: self.gpu.upload(address, host, stream.fake))

    def memcpy_dtoh_async(self, host: NDArray[np.uint8], address: int, stream: Any) -> None:
        self.within(lambda: self.gpu.download(host, address, stream.fake))

    def module_from_file(self, path: str) -> Any:
        self.loaded.append(path)

        def get_function(name: str) -> Callable[..., None]:
            def launch(*arguments: Any, block: tuple[int, ...], grid: tuple[int, ...], stream: Any) -> None:
                assert block == (256, 1, 1) and grid[1:] == (1,)
                given = {"threshold_pack": self._packed, "flat_field": lambda values: values[2]}[name](arguments)
                assert (grid[0] - 1) * 256 < given <= grid[0] * 256
                self.within(lambda: self.gpu.launch(name, int(given), arguments, stream.fake))

            return launch

        return SimpleNamespace(get_function=get_function)

    @staticmethod
    def _packed(values: tuple[Any, ...]) -> int:
        return int(values[3]) * -(-int(values[4]) // 8)


class _Memory:
    def __init__(self, driver: FakeDriver, address: int, size: int) -> None:
        self._driver, self._address, self._size = driver, address, size
        driver.held.add(address)

    def __int__(self) -> int:
        return self._address

    def free(self) -> None:
        def give_back() -> None:
            self._driver.gpu._free += self._size
            del self._driver.gpu._blocks[self._address]

        self._driver.held.remove(self._address)
        self._driver.within(give_back)


class _Pinned:
    """What `array.base` of pinned memory is."""

    def __init__(self, driver: FakeDriver, memory: NDArray[np.uint8]) -> None:
        self._driver, self._memory = driver, memory
        self.__array_interface__ = memory.__array_interface__
        self._place = int(memory.__array_interface__["data"][0])
        driver.held.add(self._place)

    def free(self) -> None:
        self._driver.held.remove(self._place)


class Validity(Enum):
    """EngineValidity."""

    VALID = 0
    INVALID = 2


class Diagnostics(Enum):
    """EngineInvalidityDiagnostics, with the real one's bits."""

    VERSION_MISMATCH = 1
    MALFORMED_ENGINE = 64

    def __int__(self) -> int:
        return int(self.value)


@dataclass
class Kernels:
    """A runtime cache: the batch sizes whose kernels are ready."""

    ready: set[int] = field(default_factory=set)

    def deserialize(self, data: bytes) -> bool:
        if not data.startswith(b"kernels "):
            return False
        self.ready = set(data[8:])
        return True

    def serialize(self) -> bytes:
        return b"kernels " + bytes(sorted(self.ready))


class FakeTensorRt(ModuleType):
    """`tensorrt_rtx` running `compute` on the driver's GPU; notes what it compiled and where it ran."""

    EngineValidity, EngineInvalidityDiagnostics = Validity, Diagnostics
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph", DISABLED="disabled")
    uint8, float32 = "DataType.UINT8", "DataType.FLOAT"

    def __init__(self, driver: FakeDriver, bundle: ModelBundle, compute: Compute) -> None:
        super().__init__("tensorrt_rtx")
        self.__version__ = "1.7.1.116"
        self.compiled: list[int] = []
        """Batch sizes for which kernels had to be made ready."""
        self.contexts: list[Any] = []
        self.contexts_fit = 1 << 30
        self.enqueues = True
        trt = self

        class Logger:
            ERROR = 1

            def __init__(self, severity: int) -> None: ...

        class Runtime:
            def __init__(self, logger: Any) -> None: ...

            def get_engine_validity(self, data: bytes) -> tuple[Validity, int]:
                return (Validity.VALID, 0) if data == PLAN else (Validity.INVALID, int(Diagnostics.MALFORMED_ENGINE))

            def deserialize_cuda_engine(self, data: bytes) -> Any:
                return Engine() if data == PLAN else None

        class Engine:
            num_io_tensors = 3
            device_memory_size_v2 = 12345
            _names = ("frames", "anomaly_map", "image_score")

            def get_tensor_name(self, index: int) -> str:
                return self._names[index]

            def get_tensor_mode(self, name: str) -> Any:
                return SimpleNamespace(name="INPUT" if name == "frames" else "OUTPUT")

            def get_tensor_dtype(self, name: str) -> str:
                return trt.uint8 if name == "frames" else trt.float32

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                taken, cells = bundle.manifest.input, bundle.manifest.map
                sides = {"frames": (taken.height, taken.width, taken.channels)}
                return (-1, *(sides | {"anomaly_map": (cells.height, cells.width), "image_score": ()})[name])

            def create_runtime_config(self) -> Any:
                config = SimpleNamespace(create_runtime_cache=Kernels, cache=None, cuda_graph_strategy=None)
                config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
                return config

            def create_execution_context(self, config: Any) -> Any:
                if len(trt.contexts) >= trt.contexts_fit:
                    return None
                trt.contexts.append(Context(config))
                return trt.contexts[-1]

        class Context:
            def __init__(self, config: Any) -> None:
                self.config = config
                self.addresses: dict[str, int] = {}
                self.ran: set[tuple[int, ...]] = set()
                """(frames, maps, scores) of every run."""
                self._count = 0

            def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
                self._count = shape[0]
                return shape[0] <= bundle.manifest.input.max_batch

            def set_tensor_address(self, name: str, address: int) -> bool:
                self.addresses[name] = address
                return True

            def execute_async_v3(self, handle: int) -> bool:
                if not trt.enqueues:
                    return False
                if self._count not in self.config.cache.ready:
                    trt.compiled.append(self._count)
                    self.config.cache.ready.add(self._count)
                taken, cells, count = bundle.manifest.input, bundle.manifest.map, self._count
                shape = (count, taken.height, taken.width, taken.channels)
                frames, maps, scores = (self.addresses[name] for name in Engine._names)
                self.ran.add((frames, maps, scores))
                sizes = (int(np.prod(shape)), 4 * count * cells.height * cells.width, 4 * count)

                def work() -> bool:
                    view = driver.gpu.view
                    answer, score = compute(view(frames, sizes[0]).reshape(shape).copy())
                    view(maps, sizes[1])[:] = answer.reshape(-1).view(np.uint8)
                    view(scores, sizes[2])[:] = score.view(np.uint8)
                    return True

                try:
                    reads, writes = [(frames, sizes[0])], [(maps, sizes[1]), (scores, sizes[2])]
                    driver.gpu.run(driver.streams[handle], reads, writes, work, "compute")
                except DeviceError:  # the library logs it and says no
                    return False
                return True

        self.Logger, self.Runtime = Logger, Runtime


@dataclass(frozen=True)
class FakeNvidia:
    """A machine with a GPU, as the two libraries see it."""

    driver: FakeDriver
    trt: FakeTensorRt


@contextmanager
def install(monkeypatch: pytest.MonkeyPatch, bundle: ModelBundle, **options: Any) -> Iterator[FakeNvidia]:
    """Have `import` find both for the time being; `options` are FakeDriver's."""
    driver = FakeDriver(**options)
    trt = FakeTensorRt(driver, bundle, onnx_compute(bundle))
    package = ModuleType("pycuda")
    package.driver = driver  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        for name, module in (("pycuda", package), ("pycuda.driver", driver), ("tensorrt_rtx", trt)):
            patched.setitem(sys.modules, name, module)
        yield FakeNvidia(driver, trt)
