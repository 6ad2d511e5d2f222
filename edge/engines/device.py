"""Device: the little that an engine needs of a GPU, and the plan of the buffers that it takes there.

`cuda` is the real one, `fake_device` one that computes on the host and checks the order of everything; `streamed` is
the schedule that both run. Nothing here imports a driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.errors import DeviceError
from edge.protocols import EngineSpec

_ALIGNMENT = 256
"""Bytes; what cudaMalloc promises, so that one allocation can be cut up without any part losing it."""

PLACE = np.dtype(
    [("maps", "<u8"), ("top", "<i4"), ("left", "<i4"), ("height", "<i4"), ("width", "<i4"), ("channels", "<i4"),
     ("unused", "<i4")]
)  # fmt: skip
"""`Place` of kernels.cu: where a frame lies in the flat field at address `maps`, 0 for a frame that needs none."""


class Stream(Protocol):
    """A queue of the device: what is in one runs in order, what is in two runs as it likes."""

    @property
    def handle(self) -> int:
        """The CUstream, for libraries that enqueue by themselves."""
        ...


class Device(Protocol):
    """One GPU, or the fake. One thread owns it. Every call but `allocate` and `close` returns at once.

    Methods raise DeviceError with reason `memory` where there is no room and `lost` where the device or its context
    failed; after `lost` nothing on it works any more and it can only be closed.
    """

    @property
    def name(self) -> str: ...

    def allocate(self, size: int) -> int:
        """`size` bytes of device memory; their address."""
        ...

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """`size` bytes of host memory that the device copies from and to by itself."""
        ...

    def stream(self) -> Stream: ...

    def event(self) -> Any:
        """A mark to be put into streams by `record`."""
        ...

    def upload(self, address: int, host: NDArray[np.uint8], stream: Any) -> None:
        """Copy pinned `host` (bytes,) to `address`; it must not change until that is done."""
        ...

    def download(self, host: NDArray[np.uint8], address: int, stream: Any) -> None:
        """Copy from `address` to pinned `host` (bytes,); nothing may look at it until that is done."""
        ...

    def record(self, event: Any, stream: Any) -> None:
        """Put `event` behind what is in `stream` now."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """What is put into `stream` from now on runs after `event`."""
        ...

    def done(self, event: Any) -> bool:
        """Whether `event` has been reached; does not wait."""
        ...

    def launch(self, kernel: str, cells: int, arguments: tuple[Any, ...], stream: Any) -> None:
        """Run one of our own kernels, a thread for each of `cells`."""
        ...

    def close(self) -> None:
        """Wait for what runs, then free everything; never raises, also not on a lost device."""
        ...


class Program(Protocol):
    """A graph that can be put into a stream."""

    def enqueue(self, slot: int, count: int, frames: int, maps: int, scores: int, stream: Any) -> None:
        """Run `count` frames at address `frames`, writing maps and scores; `slot` always comes with the same addresses.

        Raises:
            DeviceError: it could not be enqueued.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled engine: its bytes, and the path they were read from, for messages and for what is kept beside it.

    Whoever checked the bytes hands over those very bytes: a path could hold others by the time it is read again.
    """

    path: Path
    data: bytes

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan in a file that nobody has checked.

        Raises:
            DeviceError: the file cannot be read or is empty.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DeviceError("engine", f"engine {path}: {error.strerror}; run `kizu compile` again") from None
        if not data:
            raise DeviceError("engine", f"engine {path} is empty; remove it and run `kizu compile` again")
        return cls(path, data)


@dataclass(frozen=True, slots=True)
class BufferPlan:
    """Where frames, maps, scores and masks of one slot lie in its one block, in bytes; the same on host and device.

    frames (N, h, w, C) uint8 from 0, maps (N, h', w') float32 from `maps_at`, scores (N,) float32 from `scores_at`,
    masks (N, h', ceil(w' / 8)) uint8 from `masks_at`, a bit for each cell; places (N,) PLACE from `places_at`. Flat
    fields are the batches' in common and have blocks of their own.
    """

    frame: int
    map: int
    mask: int
    maps_at: int
    scores_at: int
    masks_at: int
    places_at: int
    size: int

    @classmethod
    def of(cls, spec: EngineSpec) -> BufferPlan:
        """The plan for `spec.max_batch` frames."""
        frame = spec.height * spec.width * spec.channels
        cells = spec.map_height * spec.map_width * 4
        maps_at = _aligned(frame * spec.max_batch)
        mask = spec.map_height * -(-spec.map_width // 8)
        scores_at = _aligned(maps_at + cells * spec.max_batch)
        masks_at = _aligned(scores_at + 4 * spec.max_batch)
        places_at = _aligned(masks_at + mask * spec.max_batch)
        size = _aligned(places_at + PLACE.itemsize * spec.max_batch)
        return cls(frame, cells, mask, maps_at, scores_at, masks_at, places_at, size)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
