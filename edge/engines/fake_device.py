"""A GPU that is none: runs what is put into its streams late and out of turn, and refuses what could go wrong on a GPU.

Owns the check of order. Every access to memory is noted with its place in every stream (vector clocks, as in a race
detector: Fidge 1988, Mattern 1989), so two accesses that nothing puts in order are an error whenever they are enqueued,
not only when they happen to collide. Computing is a function of the host's; `onnx_program` makes one of a bundle.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundle import ModelBundle
from edge.engines.contract import INPUT, MAP_OUTPUT, SCORE_OUTPUT
from edge.engines.device import PLACE, Stream
from edge.errors import DeviceError, EngineError
from edge.protocols import EngineSpec

_POISON = 0xFF
"""Four of these bytes are a NaN: what is read before it was copied cannot pass for an answer."""

Clock = dict[int, int]
Compute = Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""frames (N, h, w, C) uint8 -> maps (N, h', w') and scores (N,), both float32."""


class Hazard(AssertionError):
    """A schedule that would be wrong on a GPU: a fault of ours, so no KizuError that anyone could recover from."""


@dataclass(slots=True, eq=False)
class FakeStream:
    """Operations that wait, and what the next one comes after."""

    handle: int
    clock: Clock = field(default_factory=dict)
    waiting: deque[Callable[[], bool]] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class FakeEvent:
    """How often it was recorded and reached, and what its last record came after."""

    recorded: int = 0
    reached: int = 0
    clock: Clock = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Access:
    start: int
    stop: int
    writes: bool
    stream: int
    time: int
    what: str


class FakeDevice:
    """A device of `memory` bytes. `seed` picks which stream goes on at each look; `lose` breaks it for good.

    Raises:
        Hazard: memory in use is used again without an event between, or lies outside of what was allocated.
    """

    def __init__(self, *, memory: int = 1 << 30, seed: int = 0) -> None:
        self._free = memory
        self._random = random.Random(seed)
        self._blocks: dict[int, NDArray[np.uint8]] = {}
        self._next_address = 1 << 12
        self._streams: list[FakeStream] = []
        self._accesses: list[_Access] = []
        self._host: Clock = {}
        self._lost: str | None = None
        self._closed = False
        self.trace: list[str] = []
        """What ran, in the order in which it ran."""

    @property
    def name(self) -> str:
        return "fake"

    def allocate(self, size: int) -> int:
        self._require_alive()
        if size > self._free:
            raise DeviceError("memory", f"fake device: {size} bytes asked for, {self._free} are free")
        self._free -= size
        address = self._next_address
        # Never adjacent: a write beyond a block's end hits nothing and is noticed.
        self._next_address += -(-size // 4096) * 4096 + 4096
        self._blocks[address] = np.full(size, _POISON, np.uint8)
        return address

    def pinned(self, size: int) -> NDArray[np.uint8]:
        self._require_alive()
        return np.full(size, _POISON, np.uint8)

    def stream(self) -> FakeStream:
        self._streams.append(FakeStream(len(self._streams) + 1))
        return self._streams[-1]

    def event(self) -> FakeEvent:
        return FakeEvent()

    def upload(self, address: int, host: NDArray[np.uint8], stream: Any) -> None:
        before = host.tobytes()

        def copy() -> bool:
            if host.tobytes() != before:
                raise Hazard("pinned memory was written to while its upload waited")
            self.view(address, len(host))[:] = host
            return True

        place = _place(host)
        self.run(stream, [(place, len(host))], [(address, len(host))], copy, "upload")

    def download(self, host: NDArray[np.uint8], address: int, stream: Any) -> None:
        def copy() -> bool:
            host[:] = self.view(address, len(host))
            return True

        self.run(stream, [(address, len(host))], [(_place(host), len(host))], copy, "download")
        host[:] = _POISON

    def record(self, event: Any, stream: Any) -> None:
        self._require_alive()
        event.recorded += 1
        number, event.clock = event.recorded, dict(stream.clock)

        def reach() -> bool:
            event.reached = max(event.reached, number)
            return True

        stream.waiting.append(reach)

    def wait(self, stream: Any, event: Any) -> None:
        self._require_alive()
        number = event.recorded
        _merge(stream.clock, event.clock)
        stream.waiting.append(lambda: event.reached >= number)

    def done(self, event: Any) -> bool:
        self._require_alive()
        if event.reached < event.recorded:
            self._step()
        if event.reached < event.recorded:
            return False
        _merge(self._host, event.clock)
        self._accesses = [access for access in self._accesses if self._host.get(access.stream, 0) < access.time]
        return True

    def launch(self, kernel: str, cells: int, arguments: tuple[Any, ...], stream: Any) -> None:
        """Both of our kernels, as their comments in kernels.cu say."""
        values = [argument.item() for argument in arguments]
        if kernel == "threshold_pack":
            self._threshold_pack(stream, cells, *values)
        elif kernel == "flat_field":
            self._flat_field(stream, *values)
        else:
            raise EngineError(f"fake device: there is no kernel {kernel!r} here; kernels run on a GPU only")

    def _threshold_pack(
        self, stream: FakeStream, cells: int, source: int, target: int, limit: float, rows: int, width: int
    ) -> None:
        size = rows * width * 4

        def work() -> bool:
            values = self.view(source, size).view(np.float32).reshape(rows, width)
            self.view(target, cells)[:] = np.packbits(~(values <= limit), axis=1).reshape(-1)
            return True

        self.run(stream, [(source, size)], [(target, cells)], work, "threshold_pack")

    def _flat_field(
        self, stream: FakeStream, frames: int, places: int, size: int, height: int, width: int, channels: int
    ) -> None:
        frame = height * width * channels
        table = (places, size // frame * PLACE.itemsize)

        def work() -> bool:
            for index, place in enumerate(self.view(*table).view(PLACE)):
                if place["maps"]:
                    pixels = self.view(frames + index * frame, frame).reshape(height, width, channels)
                    pixels[:] = _leveled(pixels, place, self._maps_of(place))
            return True

        self.run(stream, [table, (frames, size)], [(frames, size)], work, "flat_field")

    def _maps_of(self, place: Any) -> NDArray[np.float32]:
        """The dark values and the gains (2, H, W, C) at a place."""
        shape = (2, int(place["height"]), int(place["width"]), int(place["channels"]))
        maps = self.view(int(place["maps"]), 4 * int(np.prod(shape))).view(np.float32).reshape(shape)
        if not np.isfinite(maps).all():
            raise Hazard("flat_field reads a flat field that was not copied yet")
        return maps

    def run(
        self,
        stream: FakeStream,
        reads: list[tuple[int, int]],
        writes: list[tuple[int, int]],
        work: Callable[[], bool],
        what: str,
    ) -> None:
        """Put `work` into `stream`; it uses memory at the (address, bytes) given.

        Raises:
            Hazard: something that is not known to be over uses the same memory, and one of the two writes.
        """
        self._require_alive()
        _merge(stream.clock, self._host)
        now = stream.clock.get(stream.handle, 0) + 1
        stream.clock[stream.handle] = now
        used = [(place, False) for place in reads] + [(place, True) for place in writes]
        new = [
            _Access(start, start + size, writing, stream.handle, now, what) for (start, size), writing in used if size
        ]
        for access in new:
            self._require_order(access, stream.clock)
        self._accesses += new

        def traced() -> bool:
            self.trace.append(what)
            return work()

        stream.waiting.append(traced)

    def view(self, address: int, size: int) -> NDArray[np.uint8]:
        """The memory (size,) at `address`."""
        for start, block in self._blocks.items():
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        raise Hazard(f"{size} bytes at {address:#x} were not allocated")

    def lose(self, why: str = "unspecified launch failure") -> None:
        """From now on everything fails, as after an illegal access or a pulled card."""
        self._lost = why

    def close(self) -> None:
        while self._lost is None and any(stream.waiting for stream in self._streams):
            self._step()
        self._blocks.clear()
        self._closed = True

    def _require_order(self, new: _Access, clock: Clock) -> None:
        for old in self._accesses:
            overlap = old.start < new.stop and new.start < old.stop
            if overlap and (old.writes or new.writes) and clock.get(old.stream, 0) < old.time:
                raise Hazard(
                    f"{new.what} in stream {new.stream} uses memory of {old.what} in stream {old.stream}, "
                    "and no event puts one behind the other"
                )

    def _step(self) -> None:
        """One operation of one stream that can go on, by lot."""
        ready = [stream for stream in self._streams if stream.waiting]
        self._random.shuffle(ready)
        for stream in ready:
            if stream.waiting[0]():
                stream.waiting.popleft()
                return
        if ready:
            raise Hazard("every stream waits for an event that never comes")

    def _require_alive(self) -> None:
        if self._closed:
            raise Hazard("used after close")
        if self._lost is not None:
            raise DeviceError("lost", f"fake device: {self._lost}")


class FakeProgram:
    """Runs `compute` on the host, in a stream of `device`; `fail_at` are the calls whose enqueueing fails."""

    def __init__(self, device: FakeDevice, spec: EngineSpec, compute: Compute, *, fail_at: frozenset[int]) -> None:
        self._device = device
        self._spec = spec
        self._compute = compute
        self._fail_at = fail_at
        self._calls = 0

    def enqueue(self, slot: int, count: int, frames: int, maps: int, scores: int, stream: Stream) -> None:
        self._calls += 1
        if self._calls - 1 in self._fail_at:
            raise DeviceError("device", f"fake device: call {self._calls - 1} fails, as it was told to")
        spec = self._spec
        pixels, cells = spec.height * spec.width * spec.channels * count, spec.map_height * spec.map_width * 4 * count

        def work() -> bool:
            batch = self._device.view(frames, pixels).reshape(count, spec.height, spec.width, spec.channels)
            answer, score = self._compute(batch.copy())
            self._device.view(maps, cells)[:] = answer.reshape(-1).view(np.uint8)
            self._device.view(scores, 4 * count)[:] = score.view(np.uint8)
            return True

        assert isinstance(stream, FakeStream)
        self._device.run(stream, [(frames, pixels)], [(maps, cells), (scores, 4 * count)], work, "compute")

    def close(self) -> None:
        """Nothing to free."""


def onnx_compute(bundle: ModelBundle) -> Compute:
    """The bundle's own graph by ONNX Runtime on one thread.

    Raises:
        EngineError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as missing:
        raise EngineError("the fake device computes by onnxruntime; run `pip install 'kizu[onnxruntime]'`") from missing
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(bundle.model, options, providers=["CPUExecutionProvider"])

    def compute(frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        maps, scores = session.run([MAP_OUTPUT, SCORE_OUTPUT], {INPUT: frames})
        return np.ascontiguousarray(maps), np.ascontiguousarray(scores)

    return compute


def _leveled(pixels: NDArray[np.uint8], place: Any, maps: NDArray[np.float32]) -> NDArray[np.uint8]:
    """What `flat_field` makes of a frame (h, w, C), in NumPy: padding by reflection is written out."""
    (height, width), (rows, columns) = pixels.shape[:2], maps.shape[1:3]
    top, left = int(place["top"]), int(place["left"])
    before, after = (max(0, -top), max(0, -left)), (max(0, top + height - rows), max(0, left + width - columns))
    sides = ((0, 0), (before[0], after[0]), (before[1], after[1]), (0, 0))
    y, x = top + before[0], left + before[1]
    dark, gain = np.pad(maps, sides, "reflect")[:, y : y + height, x : x + width]
    return np.asarray(np.clip(np.rint((pixels.astype(np.float32) - dark) * gain), 0, 255), np.uint8)


def _place(host: NDArray[np.uint8]) -> int:
    """Where host memory lies; device addresses of the fake are far below it."""
    return int(host.__array_interface__["data"][0])


def _merge(into: Clock, other: Clock) -> None:
    for stream, time in other.items():
        into[stream] = max(into.get(stream, 0), time)
