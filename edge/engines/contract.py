"""What every backend does the same way: check the graph contract, check a batch, infer one alone, count the cores.

Owns the words of those refusals; running anything is the backends' matter.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from edge.bundle import Manifest
from edge.errors import EngineBusy, EngineError
from edge.protocols import EngineSpec, Ticket

INPUT = "frames"
MAP_OUTPUT = "anomaly_map"
SCORE_OUTPUT = "image_score"
INFER_TIMEOUT_S: Final = 120.0
"""For one batch alone, kernels that are made ready for it included."""


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output of a graph as a backend reports it: `dtype` in NumPy's words, None for a dynamic side."""

    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype} ({', '.join('N' if side is None else str(side) for side in self.shape)})"


def require_graph(inputs: Mapping[str, Port], outputs: Mapping[str, Port], manifest: Manifest, where: str) -> None:
    """Refuse a graph whose ports are not those of the graph contract with the manifest's sizes.

    Raises:
        EngineError: names the port, what it is and what was expected.
    """
    spec, cells = manifest.input, manifest.map
    frames = Port("uint8", (None, spec.height, spec.width, spec.channels))
    answers = {MAP_OUTPUT: Port("float32", (None, cells.height, cells.width)), SCORE_OUTPUT: Port("float32", (None,))}
    for kind, found, expected in (("inputs", inputs, {INPUT: frames}), ("outputs", outputs, answers)):
        if found.keys() != expected.keys():
            raise EngineError(
                f"{where}: the graph's {kind} are {sorted(found)}, expected {sorted(expected)}; export the bundle again"
            )
        for name, port in expected.items():
            if not _port_fits(found[name], port):
                raise EngineError(
                    f"{where}: the graph's {name} is {found[name]}, expected {port} as bundle.json says; "
                    "export the bundle again"
                )


def _port_fits(found: Port, expected: Port) -> bool:
    """N must be dynamic. A backend may not know the sides of an output; results are checked as they come."""
    if found.dtype != expected.dtype or len(found.shape) != len(expected.shape) or found.shape[0] is not None:
        return False
    return all(side in (None, wanted) for side, wanted in zip(found.shape[1:], expected.shape[1:], strict=True))


class InOrder(ABC):
    """What every engine does the same way: tell its `spec`, `infer`, be entered.

    A backend keeps its specification in `_spec` and what is in flight in `_out`, and brings the rest of `Engine`.
    """

    _spec: EngineSpec
    _out: Sized

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    @abstractmethod
    def submit(self, batch: NDArray[np.uint8]) -> Ticket: ...

    @abstractmethod
    def collect(self, timeout_s: float) -> tuple[Ticket, NDArray[np.float32], NDArray[np.float32]]: ...

    def infer(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`submit` and `collect` of one batch."""
        if self._out:
            raise busy(self._spec)
        self._submit_alone(batch)
        _, maps, scores = self.collect(INFER_TIMEOUT_S)
        return maps, scores

    def _submit_alone(self, batch: NDArray[np.uint8]) -> Ticket:
        """`submit` for `infer`, where that asks for more."""
        return self.submit(batch)

    def __enter__(self) -> Self:
        return self


def require_batch(batch: NDArray[np.uint8], spec: EngineSpec) -> None:
    """Refuse what `submit` cannot take.

    Raises:
        EngineError: another dtype, shape, order or more frames than `spec.max_batch`.
    """
    sides = (spec.height, spec.width, spec.channels)
    if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[1:] != sides or not 1 <= len(batch) <= spec.max_batch:
        raise EngineError(
            f"{spec.name}: a batch is uint8 (1 to {spec.max_batch}, {', '.join(map(str, sides))}), "
            f"got {batch.dtype} {batch.shape}"
        )
    if not batch.flags.c_contiguous:
        raise EngineError(f"{spec.name}: a batch must be C-contiguous; pass numpy.ascontiguousarray(batch)")


def require_answer(maps: NDArray[np.float32], scores: NDArray[np.float32], count: int, spec: EngineSpec) -> None:
    """Refuse results of another shape than the specification's.

    Raises:
        EngineError: the graph's results are not (N, h', w') and (N,).
    """
    expected = (count, spec.map_height, spec.map_width)
    if maps.shape != expected or scores.shape != (count,):
        raise EngineError(
            f"{spec.name}: the graph gave maps {maps.shape} and scores {scores.shape}, expected {expected} "
            f"and ({count},); export the bundle again"
        )


def busy(spec: EngineSpec) -> EngineBusy:
    """The error of a `submit` too many."""
    return EngineBusy(f"{spec.name}: {spec.depth} batches are in flight already, its depth; collect one first")


def nothing_out(spec: EngineSpec) -> EngineError:
    """The error of a `collect` without a `submit`."""
    return EngineError(f"{spec.name}: no batch is in flight; submit one first")


def closed(spec: EngineSpec) -> EngineError:
    """The error of using an engine after its `with` block."""
    return EngineError(f"{spec.name}: this engine is closed; open another with open_engine")


def usable_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """How many cores this process may use: its affinity, and the container's quota where one is set.

    A container limited by quota still sees every core of the host; one thread for each would be throttled.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cores
