"""CudaDevice: device memory, pinned memory, streams, events and our kernels on an NVIDIA GPU, by pycuda.

Imports pycuda only when a device is opened, and never `pycuda.autoinit`: which GPU and whose context is ours to say.
TensorRT uses the primary context of the device, so we do as well; several engines of one process then share it, each
with streams and memory of its own.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import DeviceError, EngineError

_BLOCK = 256
"""Threads of a block of our kernels; the register budget in the tests holds at this size."""

FATBIN = Path(__file__).with_name("kernels") / "kernels.fatbin"
"""Made by `make kernels`; only engines that launch our own kernels need it."""


def ordinal_of(device: str) -> int:
    """The number in "cuda" or "cuda:N".

    Raises:
        EngineError: that is no such device.
    """
    found = re.fullmatch(r"cuda(?::(\d{1,3}))?", device)
    if found is None:
        raise EngineError(f"device {device!r} is unknown to backend 'tensorrt'; expected 'cuda' or 'cuda:N'")
    return int(found[1] or 0)


def import_driver() -> Any:
    """`pycuda.driver`, initialized.

    Raises:
        DeviceError: pycuda or the driver is missing, or the driver is too old for it.
    """
    try:
        import pycuda.driver as driver
    except ImportError as missing:
        if "undefined symbol: cu" in str(missing):  # its libcuda is older than the one that pycuda was built against
            raise DeviceError(
                "driver",
                f"the NVIDIA driver is too old for this pycuda: {missing}; `kizu doctor` says which one it takes",
            ) from missing
        if "libcuda" in str(missing):
            raise DeviceError(
                "driver", f"no NVIDIA driver: {missing}; install it (nvidia-driver), or use backend 'openvino'"
            ) from missing
        raise DeviceError(
            "package", f"pycuda is not installed ({missing}); run `pip install 'kizu[gpu]'`, which needs nvcc and g++"
        ) from missing
    try:
        driver.init()
    except driver.Error as error:
        raise DeviceError("driver", f"the NVIDIA driver does not start: {error}; see `nvidia-smi`") from error
    return driver


def compute_capability(ordinal: int) -> str:
    """The compute capability of GPU `ordinal` as a target of `kizu compile`: `sm89`.

    Raises:
        DeviceError: no driver, or no such GPU.
    """
    driver = import_driver()
    count = driver.Device.count()
    if ordinal >= count:
        raise DeviceError("device", f"device cuda:{ordinal}: this machine has {count} NVIDIA GPUs, from cuda:0 on")
    major, minor = driver.Device(ordinal).compute_capability()
    return f"sm{major}{minor}"


class CudaDevice:
    """The GPU numbered `ordinal`, in its primary context; frees in `close` all that it gave out.

    Raises:
        DeviceError: no driver, no such GPU, or its context cannot be made.
    """

    def __init__(self, ordinal: int) -> None:
        self._driver = driver = import_driver()
        count = driver.Device.count()
        if ordinal >= count:
            raise DeviceError("device", f"device cuda:{ordinal}: this machine has {count} NVIDIA GPUs, from cuda:0 on")
        gpu = driver.Device(ordinal)
        self._name = str(gpu.name())
        self._context: Any = None
        self._thread = threading.local()
        with self._translated("context"):
            self._context = gpu.retain_primary_context()
        self._memory: list[Any] = []
        self._pinned: list[Any] = []
        self._made: list[Any] = []
        self._kernels: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return self._name

    def allocate(self, size: int) -> int:
        with self._translated(f"{size} bytes of device memory"):
            self._memory.append(self._driver.mem_alloc(size))
        return int(self._memory[-1])

    def pinned(self, size: int) -> NDArray[np.uint8]:
        with self._translated(f"{size} bytes of pinned memory"):
            array: NDArray[np.uint8] = self._driver.pagelocked_empty(size, np.uint8)
        self._pinned.append(array)
        return array

    def stream(self) -> Any:
        with self._translated("a stream"):
            # 1: CU_STREAM_NON_BLOCKING. The legacy default stream, which libraries may use, must not hold ours up.
            return self._kept(self._driver.Stream(flags=1))

    def event(self) -> Any:
        flags = self._driver.event_flags
        with self._translated("an event"):
            return self._kept(self._driver.Event(flags.DISABLE_TIMING))

    def upload(self, address: int, host: NDArray[np.uint8], stream: Any) -> None:
        with self._translated("a copy to the device"):
            self._driver.memcpy_htod_async(address, host, stream)

    def download(self, host: NDArray[np.uint8], address: int, stream: Any) -> None:
        with self._translated("a copy from the device"):
            self._driver.memcpy_dtoh_async(host, address, stream)

    def record(self, event: Any, stream: Any) -> None:
        with self._translated("an event"):
            event.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        with self._translated("an event"):
            stream.wait_for_event(event)

    def done(self, event: Any) -> bool:
        with self._translated("a batch"):
            return bool(event.query())

    def launch(self, kernel: str, cells: int, arguments: tuple[Any, ...], stream: Any) -> None:
        with self._translated(f"kernel {kernel}"):
            found = self._kernels.get(kernel) or self._kernel(kernel)
            found(*arguments, block=(_BLOCK, 1, 1), grid=(-(-cells // _BLOCK), 1), stream=stream)

    def require_kernels(self, without: str) -> None:
        """Refuse at the start what would fail at the first batch; `without` is the setting that needs no kernel.

        Raises:
            DeviceError: our kernels are not built here.
        """
        if not FATBIN.exists():
            raise DeviceError(
                "package", f"our kernels are not built ({FATBIN}); run `make kernels` (nvcc), or write {without}"
            )

    def close(self) -> None:
        with suppress(self._driver.Error):
            self._enter()
            self._context.synchronize()
        for free in self._frees():
            with suppress(self._driver.Error):
                free()
        self._made.clear()
        self._memory.clear()
        self._pinned.clear()
        self._kernels.clear()
        with suppress(self._driver.Error):
            self._context.pop()

    def _frees(self) -> Iterator[Callable[[], None]]:
        for block in self._memory:
            yield block.free
        for array in self._pinned:
            yield array.base.free

    def _kept(self, made: Any) -> Any:
        """Streams and events live until `close`: dropped earlier, they would be destroyed while they are in use."""
        self._made.append(made)
        return made

    def _kernel(self, name: str) -> Any:
        if "" not in self._kernels:  # the module; its name is no function's
            self._kernels[""] = self._driver.module_from_file(str(FATBIN))
        return self._kernels.setdefault(name, self._kernels[""].get_function(name))

    def _enter(self) -> None:
        """Make the context current in this thread: an engine is opened in one and used in another."""
        if self._context is not None and not getattr(self._thread, "inside", False):
            self._context.push()
            self._thread.inside = True

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """pycuda's errors as ours. Out of memory leaves the context whole; anything else may not."""
        driver = self._driver
        try:
            self._enter()
            yield
        except driver.MemoryError as error:
            raise DeviceError(
                "memory", f"{self._name}: no room for {what}: {error}; stop another process or lower batching.max_batch"
            ) from error
        except driver.Error as error:
            raise DeviceError("lost", f"{self._name}: {what} failed: {error}; see `nvidia-smi` and `dmesg`") from error
