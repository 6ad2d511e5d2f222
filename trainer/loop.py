"""The training loop, in the order in which things happen; progress, interruption, resume.

Owns the optimizers, the order of the images, and when a run ends.  Leaves the loss to the method, the learning curve
and what a checkpoint holds to ``run_state``, and whoever watches to ``progress``.  A step of most methods is one step
of one Adam; adversarial methods take turns (``method.Turn``), each with its own.  A run that is stopped and resumed
gives the same weights as one that was not, bit for bit with the same number of threads: the order of images and the
learning rate follow from the step alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge.errors import CommandError, TrainingError
from trainer.config import Schedule
from trainer.method import Adversarial, Batch, Frames, Losses, Method, Turn
from trainer.progress import Reporter
from trainer.run_state import CurvePoint, RunState, read_run, restore_run, save_run

CHECKPOINT_EVERY_S = 30.0
CURVE_POINTS = 20
HELD_OUT_SAMPLE = 4
"""Held-out images whose loss is reported in the curve while it decides nothing; with patience it is all of them."""

REHEARSAL_STEPS = 5


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: ``finished`` is False when a signal stopped it and its checkpoint waits for `--resume`.

    ``best_step`` is the step whose weights were kept, where the schedule has patience.
    """

    finished: bool
    steps: int
    curve: tuple[CurvePoint, ...]
    elapsed_s: float
    best_step: int | None = None


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

    With ``schedule.patience`` the loss on ``held_out`` good images ends it earlier, and ``method`` is left with the
    weights of its lowest point.

    ``identity`` is what a checkpoint must agree with to be resumed (configuration, seed, data and teacher digests).
    ``stopped`` is asked after each step; when it says yes, the checkpoint is written and the run ends unfinished.

    Raises:
        TrainingError: a loss is not finite (the message names the turn and the term; the checkpoint on disk stays as
            it was), or the checkpoint belongs to another run or is damaged.
    """
    turns = turns_of(method)
    optimizers = _optimizers(turns, schedule)
    state = RunState()
    if resume and checkpoint is not None and checkpoint.is_file():
        state = restore_run(checkpoint, method.trainable, optimizers, schedule, identity)
    started = monotonic() - state.elapsed_s
    saved_at = monotonic()
    curve_every = max(1, schedule.steps // CURVE_POINTS)

    while not _done(state, schedule):
        # 1. Each turn in its order: one step of its Adam on the images that this step's number selects.
        loss, terms = _train_step(turns, optimizers, frames, schedule, state.step, seed)
        state.add(loss, terms)

        # 2. The learning curve; with patience, whether it was worth it.
        if state.step % curve_every == 0 or state.step == schedule.steps:
            state.add_point(_held_out_loss(method, held_out, schedule))
            if schedule.patience:
                state.judge(method.trainable)

        # 3. Tell whoever watches.
        if report is not None:
            report(state.step, schedule.steps, loss)

        # 4. Keep what was learned: now and then, and when asked to stop.
        stop = stopped() and not _done(state, schedule)
        if checkpoint is not None and (stop or monotonic() - saved_at >= CHECKPOINT_EVERY_S):
            state.elapsed_s = monotonic() - started
            save_run(checkpoint, method.trainable, optimizers, schedule, identity, state)
            saved_at = monotonic()
        if stop:
            break

    state.elapsed_s = monotonic() - started
    done = _done(state, schedule)
    if done and checkpoint is not None:
        # Export may still fail; without this the whole training would be lost with it.
        save_run(checkpoint, method.trainable, optimizers, schedule, identity, state)
    if done and state.best:
        method.trainable.load_state_dict(state.best)
    best_step = state.best_step if schedule.patience else None
    return Outcome(done, state.step, tuple(state.curve), state.elapsed_s, best_step)


def turns_of(method: Method) -> tuple[Turn, ...]:
    """The turns of a step: those that ``method`` names, or the only one of a method that names none."""
    if isinstance(method, Adversarial):
        return tuple(method.turns())
    return (Turn("training", tuple(method.trainable.parameters()), method.loss),)


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
    turns = turns_of(method)
    optimizers = _optimizers(turns, schedule)
    _train_step(turns, optimizers, frames, schedule, 0, seed)  # the first one pays for allocations
    start = monotonic()
    for step in range(1, 1 + REHEARSAL_STEPS):
        _train_step(turns, optimizers, frames, schedule, step, seed)
    step_s = max((monotonic() - start) / REHEARSAL_STEPS, 1e-6)
    method.trainable.load_state_dict(before)
    return replace(schedule, steps=max(1, int(minutes * 60 / step_s)))


def checkpoint_progress(checkpoint: Path) -> tuple[int, int]:
    """How far the interrupted run in ``checkpoint`` came, and how many steps it had planned.

    Raises:
        TrainingError: the file is damaged or no training checkpoint.
    """
    note = read_run(checkpoint).metadata
    return int(note["state"]["step"]), int(note["schedule"]["steps"])


def image_places(n: int, batch_size: int, step: int, seed: int) -> NDArray[np.int64]:
    """The ``batch_size`` places in 0..n-1 for step ``step``: every image once an epoch, each epoch shuffled anew."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return np.array([_epoch_order(n, position // n, seed)[position % n] for position in positions], np.int64)


def _done(state: RunState, schedule: Schedule) -> bool:
    return state.step >= schedule.steps or (schedule.patience > 0 and state.waited >= schedule.patience)


def _optimizers(turns: Sequence[Turn], schedule: Schedule) -> dict[str, torch.optim.Optimizer]:
    return {
        turn.name: torch.optim.Adam(
            _learning(turn), lr=schedule.learning_rate * turn.rate, betas=turn.betas, weight_decay=schedule.weight_decay
        )
        for turn in turns
    }


def _learning(turn: Turn) -> list[torch.nn.Parameter]:
    """The turn's parameters without frozen ones, for which Adam would keep nothing that a resume could restore."""
    return [parameter for parameter in turn.parameters if parameter.requires_grad]


def _train_step(
    turns: Sequence[Turn], optimizers: dict[str, torch.optim.Optimizer], frames: Frames, schedule: Schedule,
    step: int, seed: int,
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """One step of every turn; the last turn's loss, and the named terms of all."""
    places = image_places(len(frames), schedule.batch_size, step, seed)
    draw = int(np.random.default_rng([seed, 0xD4A3, step]).integers(2**62))
    batch = Batch(torch.from_numpy(frames[places]), places, draw)
    loss, shown = 0.0, {}
    for turn in turns:
        terms = _terms(turn, optimizers[turn.name], batch, schedule, step)
        loss = sum(terms.values())
        for name, value in terms.items():
            if name:
                shown[name if len(turns) == 1 else f"{turn.name}.{name}"] = value
    return loss, shown


def _terms(
    turn: Turn, optimizer: torch.optim.Optimizer, batch: Batch, schedule: Schedule, step: int
) -> dict[str, float]:
    """Step ``turn``'s Adam once; the terms of its loss, a loss without names as ``""``."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate_at(step) * turn.rate
    optimizer.zero_grad(set_to_none=True)
    losses = _named(turn.loss(batch))
    values = {name: float(term.detach()) for name, term in losses.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            # Before the step is taken: the checkpoint on disk stays good.
            raise TrainingError(
                f"{_called(turn, name)} became {value} at step {step + 1} of {schedule.steps}, "
                f"learning rate {optimizer.param_groups[0]['lr']:.2g}; "
                "train with a lower learning rate, or look for images unlike the others"
            )
    # Toward this turn's parameters only: the other networks' gradients would cost time and be thrown away.
    reduce(torch.add, losses.values()).backward(inputs=_learning(turn))  # type: ignore[no-untyped-call]
    optimizer.step()
    return values


def _named(losses: Losses) -> dict[str, torch.Tensor]:
    return {"": losses} if isinstance(losses, torch.Tensor) else dict(losses)


def _called(turn: Turn, term: str) -> str:
    return "the loss" if not term else f"the term {term} of the {turn.name}'s loss"


@torch.no_grad()
def _held_out_loss(method: Method, held_out: Frames, schedule: Schedule) -> float:
    """The mean loss over held-out images; over the first few where nothing depends on it."""
    if not schedule.patience:
        return _loss_of(method, held_out[:HELD_OUT_SAMPLE])
    size = schedule.batch_size
    parts = [held_out[start : start + size] for start in range(0, len(held_out), size)]
    return sum(_loss_of(method, part) * len(part) for part in parts) / len(held_out)


def _loss_of(method: Method, frames: Frames) -> float:
    losses = method.loss(Batch(torch.from_numpy(np.ascontiguousarray(frames))))
    return sum(float(term) for term in _named(losses).values())


@lru_cache(maxsize=4)
def _epoch_order(n: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(n)
