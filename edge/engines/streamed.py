"""StreamedEngine: copy in, compute and copy out of different batches at the same time, on any `Device`.

Owns the schedule, the slots and their reuse, time limits and what follows from a failure. What runs a graph is a
`Program`, what holds memory a `Device`; neither is known here by name, so the schedule is tested without a GPU.

    slot 0   [copy in][ compute ][copy out]
    slot 1            [copy in]  [ compute ][copy out]
    slot 0                                 [copy in]  [ compute ] ...

Three streams, one for each kind of work; events make a batch's three steps follow each other, and nothing else does.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.engines.contract import INFER_TIMEOUT_S, InOrder, busy, closed, nothing_out, require_batch
from edge.engines.device import PLACE, BufferPlan, Device, Program
from edge.engines.device_fields import DeviceFields
from edge.errors import DeviceError, EngineError
from edge.masks import float32_floor
from edge.protocols import EngineSpec, Ticket
from edge.types import FlatMaps, Uneven

# Between two looks at an event: a sixteenth of what was waited so far. Some 60 looks for a batch of 10 ms, and no
# answer is noticed later than 6 % of its own time.
_SHORTEST_NAP_S = 20e-6
_LONGEST_NAP_S = 500e-6


@dataclass(slots=True, eq=False)
class _Slot:
    """One batch's memory on host and device, and the marks of its three steps."""

    index: int
    host: NDArray[np.uint8]
    address: int
    copied_in: Any
    computed: Any
    copied_out: Any


class StreamedEngine(InOrder):
    """An Engine over a device and a program; `spec.depth` slots. Owns both and closes them.

    A slot is used again only once its last step is known to be over, also when its batch was given up as late. After
    a `lost` device every call raises; the engine can then only be closed and another one opened.

    With `quiet_below`, a batch that was submitted brings back masks and scores, and maps only of frames with a cell
    above it, or one that is no number; the map of any other frame reads as `quiet_below` everywhere. `infer` always
    brings the map. With `fields`, which stay on the device, it is a `Leveler`: a batch's uneven frames are corrected
    there, in place, between their copy and the graph. `keep` is called once all is warm and when it closes, to keep
    what the program has made ready.
    """

    def __init__(
        self,
        spec: EngineSpec,
        device: Device,
        program: Program,
        *,
        quiet_below: float | None = None,
        fields: Sequence[FlatMaps] = (),
        keep: Callable[[], None] = lambda: None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._spec = replace(spec, levels=bool(fields))
        self._device = device
        self._program = program
        # Rounded down as in `stages.segment`: a cell is above the limit there if and only if it is above this one here.
        self._quiet_below = None if quiet_below is None else float32_floor(quiet_below)
        self._keep = keep
        self._monotonic = monotonic
        self._sleep = sleep
        self._plan = BufferPlan.of(spec)
        self._streams = (device.stream(), device.stream(), device.stream())
        self._idle: deque[_Slot] = deque(self._slot(index) for index in range(spec.depth))
        self._out: deque[tuple[Ticket, _Slot, int, bool]] = deque()
        self._overdue: list[_Slot] = []
        self._next = 0
        self._lost: DeviceError | None = None
        self._closed = False
        self._fields = DeviceFields(device, spec, fields, self._put)

    def warmup(self) -> None:
        """Run every batch size in every slot: kernels are compiled and graphs captured for each."""
        spec, place = self._spec, self._fields.any_place
        for count in range(1, spec.max_batch + 1):
            uneven = () if place is None else (place,) * count
            for _ in range(spec.depth):
                self.submit(np.zeros((count, spec.height, spec.width, spec.channels), np.uint8), uneven)
                self.collect(INFER_TIMEOUT_S)
        self._keep_made()  # now: a daemon that is killed does not come to closing

    def submit(self, batch: NDArray[np.uint8], uneven: Sequence[Uneven | None] = ()) -> Ticket:
        """Copy `batch` into pinned memory and start its three steps; `batch` is free again on return."""
        return self._submit(batch, uneven, whole=self._quiet_below is None)

    def _submit(self, batch: NDArray[np.uint8], uneven: Sequence[Uneven | None] = (), *, whole: bool) -> Ticket:
        self._require_open()
        require_batch(batch, self._spec)
        places = self._fields.places(uneven, len(batch)) if any(uneven) else None
        if len(self._out) >= self._spec.depth:
            raise busy(self._spec)
        self._take_back_overdue()
        if not self._idle:
            raise EngineError(f"{self._spec.name}: a batch that came too late still runs; try again later")
        slot, count = self._idle.popleft(), len(batch)
        try:
            self._start(slot, batch, places, whole=whole)
        except EngineError as error:
            self._note(error)
            self._fence(slot)
            raise
        ticket = Ticket(self._next)
        self._next += 1
        self._out.append((ticket, slot, count, whole))
        return ticket

    def collect(self, timeout_s: float) -> tuple[Ticket, NDArray[np.float32], NDArray[np.float32]]:
        """Wait for the oldest batch and copy its answer out of pinned memory."""
        self._require_open()
        if not self._out:
            raise nothing_out(self._spec)
        ticket, slot, count, whole = self._out.popleft()
        until = self._monotonic() + timeout_s
        try:
            in_time = self._reached(slot.copied_out, until)
            if in_time and not whole:
                in_time = self._fetch_flawed(slot, count, until)
        except EngineError as error:
            self._overdue.append(slot)
            self._note(error)
            raise
        if not in_time:
            self._overdue.append(slot)
            raise EngineError(f"{self._spec.name}: batch {ticket} was not ready within {timeout_s} s")
        maps, scores = self._answer(slot, count)
        if not whole:
            maps[~self._flawed(slot, count)] = self._quiet_below
        self._idle.append(slot)
        return ticket, maps, scores

    def _submit_alone(self, batch: NDArray[np.uint8]) -> Ticket:
        """With its whole maps."""
        return self._submit(batch, whole=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._closed:
            return
        self._closed = True
        self._keep_made()
        self._program.close()
        self._device.close()
        self._out.clear()
        self._overdue.clear()
        self._idle.clear()

    def _keep_made(self) -> None:
        with suppress(EngineError):  # it only saves time, at the next start
            self._keep()

    def _slot(self, index: int) -> _Slot:
        device, size = self._device, self._plan.size
        return _Slot(index, device.pinned(size), device.allocate(size), device.event(), device.event(), device.event())

    def _start(self, slot: _Slot, batch: NDArray[np.uint8], places: NDArray[np.uint8] | None, *, whole: bool) -> None:
        device, plan, count = self._device, self._plan, len(batch)
        copy_in, compute, copy_out = self._streams
        frames = slot.host[: plan.frame * count]
        np.copyto(frames, batch.reshape(-1))
        device.upload(slot.address, frames, copy_in)
        if places is not None:
            table = slot.host[plan.places_at : plan.places_at + PLACE.itemsize * count]
            np.copyto(table, places)
            device.upload(slot.address + plan.places_at, table, copy_in)
        device.record(slot.copied_in, copy_in)
        device.wait(compute, slot.copied_in)
        if places is not None:
            self._fields.level(slot.address, slot.address + plan.places_at, count, compute)
        maps, scores = slot.address + plan.maps_at, slot.address + plan.scores_at
        self._program.enqueue(slot.index, count, slot.address, maps, scores, compute)
        if not whole:
            self._mark_flawed(slot, count, compute)
        device.record(slot.computed, compute)
        device.wait(copy_out, slot.computed)
        first, size = (plan.maps_at, plan.map) if whole else (plan.masks_at, plan.mask)
        device.download(slot.host[first : first + size * count], slot.address + first, copy_out)
        device.download(slot.host[plan.scores_at : plan.scores_at + 4 * count], scores, copy_out)
        device.record(slot.copied_out, copy_out)

    def _put(self, address: int, data: NDArray[np.uint8]) -> None:
        """Copy `data` to `address` before anything runs, piece by piece through a slot's pinned memory."""
        slot, copy_in = self._idle[0], self._streams[0]
        for at in range(0, len(data), len(slot.host)):
            piece = slot.host[: len(data) - at]
            np.copyto(piece, data[at : at + len(piece)])
            self._device.upload(address + at, piece, copy_in)
            self._device.record(slot.copied_in, copy_in)
            if not self._reached(slot.copied_in, self._monotonic() + INFER_TIMEOUT_S):
                raise DeviceError(
                    "lost", f"{self._spec.name}: {len(piece)} bytes were not copied in {INFER_TIMEOUT_S} s"
                )

    def _answer(self, slot: _Slot, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Copies: the slot is used again while the caller looks at them."""
        plan, spec = self._plan, self._spec
        maps = slot.host[plan.maps_at : plan.maps_at + plan.map * count].view(np.float32)
        scores = slot.host[plan.scores_at : plan.scores_at + 4 * count].view(np.float32)
        return maps.reshape(count, spec.map_height, spec.map_width).copy(), scores.copy()

    def _mark_flawed(self, slot: _Slot, count: int, stream: Any) -> None:
        spec, plan = self._spec, self._plan
        self._device.launch(
            "threshold_pack",
            plan.mask * count,
            (
                np.uint64(slot.address + plan.maps_at), np.uint64(slot.address + plan.masks_at),
                np.float32(self._quiet_below), np.uint32(spec.map_height * count), np.uint32(spec.map_width),
            ),
            stream,
        )  # fmt: skip

    def _flawed(self, slot: _Slot, count: int) -> NDArray[np.bool_]:
        """(count,) whether a frame has a bit set in its mask."""
        plan = self._plan
        masks = slot.host[plan.masks_at : plan.masks_at + plan.mask * count].reshape(count, plan.mask)
        return np.asarray(masks.any(axis=1), np.bool_)

    def _fetch_flawed(self, slot: _Slot, count: int, until: float) -> bool:
        """Copy the maps of flawed frames back too; False if that took longer than `until`."""
        device, plan = self._device, self._plan
        flawed = np.flatnonzero(self._flawed(slot, count))
        if not len(flawed):
            return True
        copy_out = self._streams[2]
        for index in flawed.tolist():
            start = plan.maps_at + plan.map * index
            device.download(slot.host[start : start + plan.map], slot.address + start, copy_out)
        device.record(slot.copied_out, copy_out)
        return self._reached(slot.copied_out, until)

    def _reached(self, event: Any, until: float) -> bool:
        started = self._monotonic()
        while not self._device.done(event):
            now = self._monotonic()
            if now >= until:
                return False
            waited = now - started
            self._sleep(min(_LONGEST_NAP_S, max(_SHORTEST_NAP_S, waited / 16)))
        return True

    def _fence(self, slot: _Slot) -> None:
        """Put the slot's last mark behind those steps of a failed batch that are on their way."""
        device = self._device
        copy_in, compute, copy_out = self._streams
        try:
            for mark, stream in ((slot.copied_in, copy_in), (slot.computed, compute)):
                device.record(mark, stream)
                device.wait(copy_out, mark)
            device.record(slot.copied_out, copy_out)
        except EngineError as error:
            self._note(DeviceError("lost", str(error)))
            return
        self._overdue.append(slot)

    def _take_back_overdue(self) -> None:
        """Slots of batches that failed or came too late are used again only once nothing of theirs runs."""
        still: list[_Slot] = []
        for slot in self._overdue:
            (self._idle if self._device.done(slot.copied_out) else still).append(slot)
        self._overdue = still

    def _note(self, error: EngineError) -> None:
        if isinstance(error, DeviceError) and error.reason == "lost":
            self._lost = error

    def _require_open(self) -> None:
        if self._closed:
            raise closed(self._spec)
        if self._lost is not None:
            raise DeviceError("lost", f"{self._spec.name}: {self._lost}; this engine must be opened again")
