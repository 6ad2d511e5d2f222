"""The training loop, in the order in which things happen; progress, interruption, resume.

Owns the optimizer, the order of the images, the learning curve and the checkpoints.  Leaves the loss to the method and
the file form to ``checkpoint``.  A run that is stopped and resumed gives the same weights as one that was not, bit
for bit with the same number of threads: the order of images and the learning rate follow from the step alone.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from edge.errors import CommandError, TrainingError
from trainer.checkpoint import (
    load_checkpoint,
    module_tensors,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
    save_checkpoint,
)  # fmt: skip
from trainer.config import Schedule
from trainer.method import Batch, Frames, Method

CHECKPOINT_EVERY_S = 30.0
CURVE_POINTS = 20
HELD_OUT_SAMPLE = 4
"""Held-out images whose loss is reported in the curve; it decides nothing, so a few are enough."""

REHEARSAL_STEPS = 5


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """After ``step`` steps: mean training loss since the point before, and the loss on a few held-out images."""

    step: int
    loss: float
    held_out_loss: float


@dataclass(slots=True)
class TrainingState:
    """What, beside the weights and the optimizer, a resumed run must know."""

    step: int = 0
    curve: list[CurvePoint] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_count: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: ``finished`` is False when a signal stopped it and its checkpoint waits for `--resume`."""

    finished: bool
    steps: int
    curve: tuple[CurvePoint, ...]
    elapsed_s: float


class Reporter(Protocol):
    """Told about every step; shows as much of it as the place allows."""

    def __call__(self, step: int, steps: int, loss: float) -> None: ...


def run_training(
    method: Method,
    frames: Frames,
    held_out: Frames,
    schedule: Schedule,
    *,
    seed: int,
    identity: dict[str, Any],
    checkpoint: Path | None = None,
    resume: bool = False,
    report: Reporter | None = None,
    stopped: Callable[[], bool] = lambda: False,
    monotonic: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Train ``method`` on ``frames`` (n, h, w, C) uint8 for ``schedule.steps`` steps.

    ``identity`` is what a checkpoint must agree with to be resumed (configuration, seed, data and teacher digests).
    ``stopped`` is asked after each step; when it says yes, the checkpoint is written and the run ends unfinished.

    Raises:
        TrainingError: the loss is not finite, or the checkpoint belongs to another run or is damaged.
    """
    optimizer = _optimizer(method, schedule)
    state = TrainingState()
    if resume and checkpoint is not None and checkpoint.is_file():
        state = _restore(checkpoint, method, optimizer, schedule, identity)
    started = monotonic() - state.elapsed_s
    saved_at = monotonic()
    curve_every = max(1, schedule.steps // CURVE_POINTS)

    while state.step < schedule.steps:
        # 1. One step of Adam on the images that this step's number selects.
        loss = _train_step(method, optimizer, frames, schedule, state.step, seed)
        state.step += 1
        state.loss_sum, state.loss_count = state.loss_sum + loss, state.loss_count + 1

        # 2. The learning curve.
        if state.step % curve_every == 0 or state.step == schedule.steps:
            _add_curve_point(state, method, held_out)

        # 3. Tell whoever watches.
        if report is not None:
            report(state.step, schedule.steps, loss)

        # 4. Keep what was learned: now and then, and when asked to stop.
        stop = stopped() and state.step < schedule.steps
        if checkpoint is not None and (stop or monotonic() - saved_at >= CHECKPOINT_EVERY_S):
            state.elapsed_s = monotonic() - started
            _save(checkpoint, method, optimizer, schedule, identity, state)
            saved_at = monotonic()
        if stop:
            break

    state.elapsed_s = monotonic() - started
    if state.step == schedule.steps and checkpoint is not None:
        # Export may still fail; without this the whole training would be lost with it.
        _save(checkpoint, method, optimizer, schedule, identity, state)
    return Outcome(state.step == schedule.steps, state.step, tuple(state.curve), state.elapsed_s)


def plan_steps(
    method: Method, frames: Frames, schedule: Schedule, *, minutes: float, seed: int,
    monotonic: Callable[[], float] = time.monotonic,
) -> Schedule:  # fmt: skip
    """``schedule`` with as many steps as fit into ``minutes``, by timing a few steps and then undoing them.

    The number is fixed before training starts, so the rate's decay and `--resume` do not depend on the clock, and
    `--steps` with that number repeats the run.

    Raises:
        CommandError: ``minutes`` is not positive.
    """
    if not minutes > 0:
        raise CommandError(f"--minutes must be above 0, got {minutes}")
    before = {name: tensor.detach().clone() for name, tensor in method.trainable.state_dict().items()}
    optimizer = _optimizer(method, schedule)
    _train_step(method, optimizer, frames, schedule, 0, seed)  # the first one pays for allocations
    start = monotonic()
    for step in range(1, 1 + REHEARSAL_STEPS):
        _train_step(method, optimizer, frames, schedule, step, seed)
    step_s = max((monotonic() - start) / REHEARSAL_STEPS, 1e-6)
    method.trainable.load_state_dict(before)
    return replace(schedule, steps=max(1, int(minutes * 60 / step_s)))


def checkpoint_progress(checkpoint: Path) -> tuple[int, int]:
    """How far the interrupted run in ``checkpoint`` came, and how many steps it had planned.

    Raises:
        TrainingError: the file is damaged or no training checkpoint.
    """
    note = _metadata(checkpoint)
    return int(note["state"]["step"]), int(note["schedule"]["steps"])


def image_places(n: int, batch_size: int, step: int, seed: int) -> NDArray[np.int64]:
    """The ``batch_size`` places in 0..n-1 for step ``step``: every image once an epoch, each epoch shuffled anew."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return np.array([_epoch_order(n, position // n, seed)[position % n] for position in positions], np.int64)


class TerminalReporter:
    """A progress bar with the time left on a terminal, one line a minute elsewhere; a context manager."""

    def __init__(self, title: str, *, start_step: int = 0, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._title, self._start_step, self._monotonic = title, start_step, monotonic
        self._started = self._last_line = monotonic()
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
        )  # fmt: skip
        self._bar = Progress(*columns) if sys.stderr.isatty() and sys.stdout.isatty() else None

    def __call__(self, step: int, steps: int, loss: float) -> None:
        if self._bar is not None:
            if not self._bar.task_ids:
                self._bar.add_task(self._title, total=steps, completed=self._start_step, loss=loss)
            self._bar.update(self._bar.task_ids[0], completed=step, loss=loss)
            return
        now = self._monotonic()
        if now - self._last_line >= 60 or step == steps:
            self._last_line = now
            left_s = (now - self._started) / max(step - self._start_step, 1) * (steps - step)
            print(f"{self._title}: step {step} of {steps}, loss {loss:.3f}, {left_s / 60:.1f} min left", flush=True)

    def __enter__(self) -> TerminalReporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a question that the loop asks after each step; a second one interrupts.

    A KeyboardInterrupt in the middle of an optimizer step would leave weights of two different steps.
    """
    asked = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _optimizer(method: Method, schedule: Schedule) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        method.trainable.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )


def _train_step(
    method: Method, optimizer: torch.optim.Optimizer, frames: Frames, schedule: Schedule, step: int, seed: int
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate_at(step)
    places = image_places(len(frames), schedule.batch_size, step, seed)
    optimizer.zero_grad(set_to_none=True)
    draw = int(np.random.default_rng([seed, 0xD4A3, step]).integers(2**62))
    loss = method.loss(Batch(torch.from_numpy(frames[places]), places, draw))
    value = float(loss.detach())
    if not math.isfinite(value):
        # Before the step is taken: the checkpoint on disk stays good.
        raise TrainingError(
            f"the loss became {value} at step {step + 1} of {schedule.steps}, "
            f"learning rate {schedule.rate_at(step):.2g}; "
            "train with a lower learning rate, or look for images unlike the others"
        )
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return value


@torch.no_grad()
def _add_curve_point(state: TrainingState, method: Method, held_out: Frames) -> None:
    sample = torch.from_numpy(np.ascontiguousarray(held_out[:HELD_OUT_SAMPLE]))
    value = float(method.loss(Batch(sample)))
    state.curve.append(CurvePoint(state.step, state.loss_sum / state.loss_count, value))
    state.loss_sum, state.loss_count = 0.0, 0


@lru_cache(maxsize=4)
def _epoch_order(n: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(n)


def _save(
    path: Path, method: Method, optimizer: torch.optim.Optimizer, schedule: Schedule, identity: dict[str, Any],
    state: TrainingState,
) -> None:  # fmt: skip
    tensors = module_tensors("trainable", method.trainable) | optimizer_tensors("optimizer", optimizer)
    note = {"kind": "training", "identity": identity, "schedule": asdict(schedule), "state": asdict(state)}
    save_checkpoint(path, tensors, note)


def _restore(
    path: Path, method: Method, optimizer: torch.optim.Optimizer, schedule: Schedule, identity: dict[str, Any]
) -> TrainingState:
    note = _metadata(path)
    theirs, ours = note["identity"] | note["schedule"], identity | asdict(schedule)
    other = sorted(key for key in theirs | ours if theirs.get(key) != ours.get(key))
    if other:
        key = other[0]
        raise TrainingError(
            f"{path}: this checkpoint belongs to another run: {', '.join(other)} differ "
            f"({key} was {theirs.get(key)!r}, now {ours.get(key)!r}); run with the same data and options, "
            "or delete the file to start anew"
        )
    checkpoint = load_checkpoint(path)
    restore_module(checkpoint, "trainable", method.trainable)
    restore_optimizer(checkpoint, "optimizer", optimizer)
    state = TrainingState(**note["state"])
    state.curve = [CurvePoint(**point) for point in note["state"]["curve"]]
    return state


def _metadata(path: Path) -> dict[str, Any]:
    note = load_checkpoint(path).metadata
    if note.get("kind") != "training":
        kind = note.get("kind")
        raise TrainingError(f"{path}: a checkpoint of kind {kind!r}, expected one of `kizu train`; delete it")
    return note
