"""Flat fields in device memory, and which of them corrects which frame of a batch.

Owns their layout there and the kernel's table of places. The schedule it is part of is `streamed`'s; the kernel, which
gives the very bytes of `stages.flatfield`, is in `kernels/kernels.cu`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.engines.device import PLACE, Device
from edge.errors import EngineError
from edge.protocols import EngineSpec
from edge.types import FlatMaps, Uneven


class DeviceFields:
    """Keeps `fields` on `device` from now on, one block each: dark values, then gains; `put` copies bytes there.

    Raises:
        DeviceError: there is no room for them.
        EngineError: a batch is too large for the kernel's counter.
    """

    def __init__(
        self,
        device: Device,
        spec: EngineSpec,
        fields: Sequence[FlatMaps],
        put: Callable[[int, NDArray[np.uint8]], None],
    ) -> None:
        self._device = device
        self._spec = spec
        self._frame = spec.height * spec.width * spec.channels
        if fields and self._frame * spec.max_batch >= 1 << 32:
            raise EngineError(
                f"{spec.name}: {spec.max_batch} frames are too many bytes for the flat field on the device; lower "
                'batching.max_batch or write engine.flat_field = "host"'
            )
        self._at: dict[FlatMaps, int] = {}
        for maps in dict.fromkeys(fields):
            address = device.allocate(2 * maps.gain.nbytes)
            put(address, _bytes_of(maps.dark))
            put(address + maps.dark.nbytes, _bytes_of(maps.gain))
            self._at[maps] = address

    @property
    def any_place(self) -> Uneven | None:
        """A place in the first field, for a warm-up; None without one."""
        return next((Uneven(maps, 0, 0) for maps in self._at), None)

    def places(self, uneven: Sequence[Uneven | None], count: int) -> NDArray[np.uint8]:
        """The kernel's table for `count` frames, as bytes.

        Raises:
            EngineError: not one for each frame, or a flat field that is not here.
        """
        if len(uneven) != count:
            raise EngineError(f"{self._spec.name}: {len(uneven)} flat fields for {count} frames; give one for each")
        table = np.zeros(count, PLACE)
        for index, one in enumerate(uneven):
            if one is not None:
                table[index] = self._place(one)
        return table.view(np.uint8)

    def level(self, frames: int, places: int, count: int, stream: Any) -> None:
        """Correct `count` frames at address `frames` in place, each by its entry of the table at `places`."""
        spec, size = self._spec, self._frame * count
        sides = (np.uint32(spec.height), np.uint32(spec.width), np.uint32(spec.channels))
        self._device.launch("flat_field", size, (np.uint64(frames), np.uint64(places), np.uint32(size), *sides), stream)

    def _place(self, one: Uneven) -> tuple[int, ...]:
        address = self._at.get(one.maps)
        if address is None:
            raise EngineError(f"{self._spec.name}: a frame's flat field is not one that this engine was opened with")
        return (address, one.top, one.left, *one.maps.gain.shape, 0)


def _bytes_of(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
