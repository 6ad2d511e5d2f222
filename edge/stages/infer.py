"""Model pixels -> AnomalyMap: where the map's cells lie in the frame, and batches that wait no longer than they may.

The engine that runs a batch is handed to the pipeline; nothing here starts a thread or blocks.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edge.bundle import InputSpec, MapGeometry
from edge.errors import EngineBusy, EngineError
from edge.protocols import Clock, Engine, Leveler, Ticket
from edge.stages.flatfield import level
from edge.types import AnomalyMap, ModelInput, Roi


def map_roi(roi: Roi, input: InputSpec, geometry: MapGeometry) -> Roi:
    """The rectangle of frame pixels that the map's cells tile; `roi` is the one that the model's pixels tile.

    A cell's center at pixel index i is i + 0.5 on the continuous axis (pixel i covers [i, i + 1)), so with stride s and
    offset o the cells tile model pixels from o + 0.5 - s / 2.
    """
    return _cells_roi(roi, input.height, input.width, geometry)


def to_map(model_input: ModelInput, scores: NDArray[np.float32], score: float, geometry: MapGeometry) -> AnomalyMap:
    """Make the AnomalyMap of one frame from the graph's answer: `scores` (h', w') and the image score, both raw.

    Raises:
        EngineError: another shape than the manifest's, or a value that is not finite.
    """
    name = "/".join(map(str, model_input.frame_id.key))
    if scores.shape != (geometry.height, geometry.width) or scores.dtype != np.float32:
        wanted = f"float32 ({geometry.height}, {geometry.width})"
        raise EngineError(f"frame {name}: the engine gave {scores.dtype} {scores.shape}, expected {wanted}")
    # A NaN reaches both the minimum and the maximum; two passes over a small map beat a boolean copy of it.
    if not (math.isfinite(score) and math.isfinite(scores.min()) and math.isfinite(scores.max())):
        raise EngineError(f"frame {name}: the engine gave scores that are not finite; run `kizu verify` on the bundle")
    height, width = model_input.pixels.shape[:2]
    roi = _cells_roi(model_input.roi, height, width, geometry)
    return AnomalyMap(model_input.frame_id, scores, float(score), roi, model_input.extent or model_input.roi)


def _cells_roi(roi: Roi, height: int, width: int, geometry: MapGeometry) -> Roi:
    scale_x, scale_y = roi.width / width, roi.height / height
    left = geometry.offset_x + 0.5 - geometry.stride / 2
    top = geometry.offset_y + 0.5 - geometry.stride / 2
    return Roi(
        x=roi.x + left * scale_x,
        y=roi.y + top * scale_y,
        width=geometry.width * geometry.stride * scale_x,
        height=geometry.height * geometry.stride * scale_y,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A closed batch of N `inputs`; `pixels` (N, h, w, C) uint8 is a view of the batcher's buffer until `release`."""

    inputs: tuple[ModelInput, ...]
    pixels: NDArray[np.uint8]
    buffer: int


def submit(engine: Engine, batch: Batch) -> Ticket:
    """Start `engine` on a batch; what of it is uneven yet is corrected by an engine that levels, and else here.

    Raises:
        EngineError: as `Engine.submit`.
    """
    uneven = tuple(item.uneven for item in batch.inputs)
    if not any(uneven):
        return engine.submit(batch.pixels)
    if engine.spec.levels:
        return cast(Leveler, engine).submit(batch.pixels, uneven)
    for pixels, one in zip(batch.pixels, uneven, strict=True):
        if one is not None:
            level(pixels, one)
    return engine.submit(batch.pixels)


class MicroBatcher:
    """Collects ModelInputs until there are `max_batch` of them or the first has waited `wait_ns`.

    Pixels are copied into `depth + 1` buffers made once: `depth` of them may be with the engine while one fills, so
    nothing is allocated per frame and nothing is written that an engine still reads. Give each buffer back by `release`
    when its batch was collected. Not thread-safe: one thread owns it.
    """

    def __init__(self, input: InputSpec, *, max_batch: int, wait_ns: int, depth: int, clock: Clock) -> None:
        if not 1 <= max_batch <= input.max_batch:
            raise ValueError(f"max_batch is {max_batch}, expected 1 to {input.max_batch}")
        if wait_ns < 0 or depth < 1:
            raise ValueError(f"wait_ns is {wait_ns} and depth {depth}, expected at least 0 and 1")
        shape = (max_batch, input.height, input.width, input.channels)
        self._buffers = [np.zeros(shape, np.uint8) for _ in range(depth + 1)]
        self._free = deque(range(depth + 1))
        self._filling: list[ModelInput] = []
        self._due_ns = 0
        self._max_batch = max_batch
        self._wait_ns = wait_ns
        self._clock = clock

    def __len__(self) -> int:
        """How many inputs wait in the open batch."""
        return len(self._filling)

    @property
    def can_add(self) -> bool:
        """Whether a buffer is free to fill."""
        return bool(self._free)

    @property
    def due_ns(self) -> int | None:
        """When the open batch must go, on the clock's monotonic time; None when it is empty."""
        return self._due_ns if self._filling else None

    def add(self, item: ModelInput) -> Batch | None:
        """Copy `item` into the open batch; return the batch if that filled it.

        Raises:
            EngineBusy: every buffer is with the engine; collect a batch and `release` it first.
            ValueError: the pixels have another shape than the model takes.
        """
        if not self._free:
            raise EngineBusy("every batch buffer is with the engine; collect one and release it first")
        buffer = self._buffers[self._free[0]]
        if item.pixels.shape != buffer.shape[1:]:
            raise ValueError(f"pixels are {item.pixels.shape}, the model takes {buffer.shape[1:]}")
        if not self._filling:
            self._due_ns = self._clock.monotonic_ns() + self._wait_ns
        np.copyto(buffer[len(self._filling)], item.pixels)
        self._filling.append(item)
        return self.flush() if len(self._filling) == self._max_batch else None

    def due(self) -> Batch | None:
        """Close and return the open batch if its first input has waited long enough."""
        if self._filling and self._clock.monotonic_ns() >= self._due_ns:
            return self.flush()
        return None

    def flush(self) -> Batch | None:
        """Close and return the open batch, whatever it holds; None when it is empty."""
        if not self._filling:
            return None
        index = self._free.popleft()
        batch = Batch(tuple(self._filling), self._buffers[index][: len(self._filling)], index)
        self._filling.clear()
        return batch

    def release(self, batch: Batch) -> None:
        """Take back the buffer of a batch that the engine is done with.

        Raises:
            ValueError: it was given back already.
        """
        if batch.buffer in self._free:
            raise ValueError(f"buffer {batch.buffer} was released twice")
        self._free.append(batch.buffer)
