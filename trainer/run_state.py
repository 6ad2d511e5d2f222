"""RunState: how far a training run has come, and the form in which a checkpoint keeps it.

Owns the learning curve, the best weights so far, and what of a run is written and read back.  Leaves what a step does
to ``loop`` and the file to ``checkpoint``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge.errors import TrainingError
from trainer.checkpoint import (
    Checkpoint,
    load_checkpoint,
    module_tensors,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
    save_checkpoint,
)  # fmt: skip
from trainer.config import Schedule

Optimizers = Mapping[str, torch.optim.Optimizer]
"""Turn name -> its Adam, in the order of the turns."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """After ``step`` steps: mean training loss since the point before, and the loss on held-out good images.

    With several turns ``loss`` is the last one's.  ``terms`` are the means of all named terms, ``TURN.TERM`` where
    there are several turns.
    """

    step: int
    loss: float
    held_out_loss: float
    terms: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class RunState:
    """What, beside the weights and the optimizers, a resumed run must know.

    ``best_loss`` is the lowest held-out loss so far, of ``best_step``; ``waited`` counts curve points since.  They and
    ``best`` are kept only where the schedule has patience.
    """

    step: int = 0
    curve: list[CurvePoint] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_count: int = 0
    elapsed_s: float = 0.0
    term_sums: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    best_loss: float | None = None
    waited: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)

    def add(self, loss: float, terms: Mapping[str, float]) -> None:
        """One more step was made, with this loss and these named terms."""
        self.step += 1
        self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
        for name, value in terms.items():
            self.term_sums[name] = self.term_sums.get(name, 0.0) + value

    def add_point(self, held_out_loss: float) -> None:
        """Close a point of the curve.

        Raises:
            TrainingError: the held-out loss is not finite.
        """
        if not math.isfinite(held_out_loss):
            raise TrainingError(
                f"the loss of the held-out good images became {held_out_loss} after {self.step} steps; train with a "
                "lower learning rate, or look for images unlike the others"
            )
        terms = {name: value / self.loss_count for name, value in self.term_sums.items()}
        self.curve.append(CurvePoint(self.step, self.loss_sum / self.loss_count, held_out_loss, terms))
        self.loss_sum, self.loss_count, self.term_sums = 0.0, 0, {}

    def judge(self, trainable: nn.Module) -> None:
        """Remember ``trainable`` if its held-out loss, the curve's last, is the lowest so far."""
        point = self.curve[-1]
        if self.best_loss is not None and point.held_out_loss >= self.best_loss:
            self.waited += 1
            return
        self.best_step, self.best_loss, self.waited = point.step, point.held_out_loss, 0
        self.best = {name: tensor.detach().clone() for name, tensor in trainable.state_dict().items()}


def save_run(
    path: Path, trainable: nn.Module, optimizers: Optimizers, schedule: Schedule, identity: dict[str, Any],
    state: RunState,
) -> None:  # fmt: skip
    """Write the checkpoint, unless there is something in it that is no number.

    Raises:
        TrainingError: a weight is not finite; the file that was there stays.
    """
    if broken := _broken(trainable):
        raise TrainingError(
            f"{len(broken)} of the weights, {broken[0]} first, became infinite or no number by step {state.step}; "
            f"{path} is what it was before; train with a lower learning rate"
        )
    tensors = module_tensors("trainable", trainable)
    for name, optimizer in optimizers.items():
        tensors |= optimizer_tensors(_prefix(name, optimizers), optimizer)
    tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
    note = {"kind": "training", "identity": identity, "schedule": asdict(schedule), "state": _facts(state)}
    save_checkpoint(path, tensors, note)


def restore_run(
    path: Path, trainable: nn.Module, optimizers: Optimizers, schedule: Schedule, identity: dict[str, Any]
) -> RunState:
    """Load what ``save_run`` wrote into ``trainable`` and ``optimizers``.

    Raises:
        TrainingError: the file is damaged, or belongs to another run; the message says what differs.
    """
    checkpoint = read_run(path)
    note = checkpoint.metadata
    theirs, ours = note["identity"] | note["schedule"], identity | asdict(schedule)
    other = sorted(key for key in theirs | ours if theirs.get(key) != ours.get(key))
    if other:
        key = other[0]
        raise TrainingError(
            f"{path}: this checkpoint belongs to another run: {', '.join(other)} differ "
            f"({key} was {theirs.get(key)!r}, now {ours.get(key)!r}); run with the same data and options, "
            "or delete the file to start anew"
        )
    restore_module(checkpoint, "trainable", trainable)
    for name, optimizer in optimizers.items():
        restore_optimizer(checkpoint, _prefix(name, optimizers), optimizer)
    state = RunState(**note["state"], best=checkpoint.group("best"))
    state.curve = [CurvePoint(**point) for point in note["state"]["curve"]]
    return state


def read_run(path: Path) -> Checkpoint:
    """The checkpoint in ``path``.

    Raises:
        TrainingError: the file is damaged or no training checkpoint.
    """
    checkpoint = load_checkpoint(path)
    kind = checkpoint.metadata.get("kind")
    if kind != "training":
        raise TrainingError(f"{path}: a checkpoint of kind {kind!r}, expected one of `kizu train`; delete it")
    return checkpoint


def _broken(trainable: nn.Module) -> list[str]:
    return [name for name, tensor in trainable.state_dict().items() if not torch.isfinite(tensor).all()]


def _prefix(turn: str, optimizers: Optimizers) -> str:
    """A single optimizer is plain ``optimizer``, as it was before there were turns."""
    return "optimizer" if len(optimizers) == 1 else f"optimizer-{turn}"


def _facts(state: RunState) -> dict[str, Any]:
    found = {name: getattr(state, name) for name in RunState.__dataclass_fields__ if name != "best"}
    return found | {"curve": [asdict(point) for point in state.curve]}
