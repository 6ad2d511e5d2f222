"""Method: what the training loop and the exporter need from a paper's method, with the shapes.

Owns the seam only.  Each implementation is one file in ``methods``; ``loop`` drives it, ``export`` deploys it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from edge.bundle import MapGeometry

Frames = NDArray[np.uint8]
"""Prepared images (n, h, w, C) uint8, C = 1 gray or 3 RGB, exactly what the runtime feeds the graph."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Images of one step: ``frames`` (B, h, w, C) uint8; ``index`` (B,) their places among those given to ``prepare``.

    ``index`` is None for images outside the training set; a method must not look those up in anything it cached.
    Whatever a method draws at random for the step follows from ``draw``, so that a resumed run draws it again.
    """

    frames: Tensor
    index: NDArray[np.int64] | None = None
    draw: int = 0


Losses = Tensor | Mapping[str, Tensor]
"""A loss: one scalar, or several named ones whose sum is meant; each already multiplied by its weight."""


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One network's part of a step: its own loss, and its own Adam over its own parameters.

    ``loss`` sees the same batch as the step's other turns; its gradient reaches ``parameters`` only, so that a
    discriminator keeps still while the generator learns from it.  ``rate`` multiplies the schedule's learning rate;
    ``betas`` are Adam's.  Turns that draw at random from the same ``Batch.draw`` draw the same, unless they add
    something of their own to it.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    loss: Callable[[Batch], Losses]
    rate: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)


@runtime_checkable
class Adversarial(Protocol):
    """What a method has beside ``Method`` if a step is more than one step of one Adam."""

    def turns(self) -> Sequence[Turn]:
        """The turns of a step in their order, the last one that of what is deployed; asked for after ``prepare``."""
        ...


class Method(Protocol):
    """One way to learn what good parts look like.

    The order of calls is ``prepare`` (once), ``loss`` (every step), ``fit_statistics`` (once, after training),
    ``deployed``.  A method whose step has several turns is ``Adversarial`` too.  Everything except ``trainable`` must
    follow from the constructor's arguments and ``prepare``, so that a resumed run restores ``trainable`` and nothing
    else.
    """

    @property
    def name(self) -> str: ...

    @property
    def trainable(self) -> nn.Module:
        """The parameters that the loop updates, checkpoints and restores."""
        ...

    def prepare(self, frames: Frames) -> None:
        """Compute what is fixed during training from the training images (n, h, w, C); deterministic.

        Raises:
            DataError: the images cannot teach anything (all constant).
        """
        ...

    def loss(self, batch: Batch) -> Losses:
        """What training minimizes, with its gradient toward ``trainable``; if there are ``turns``, those are instead.

        Of held-out images it goes into the learning curve, and with ``Schedule.patience`` decides when to stop.
        """
        ...

    def fit_statistics(self, frames: Frames) -> None:
        """Fit the score normalization on held-out good images (n, h, w, C), after training.

        Raises:
            TrainingError: the scores do not vary, so nothing can be normalized.
        """
        ...

    def deployed(self, channels: int, *, stride: int | None = None) -> nn.Module:
        """The graph contract as a module: uint8 (N, h, w, channels) -> float32 maps (N, h', w'), scores (N,).

        ``stride`` is None for the configured one, or a multiple of it: the same map at fewer places.

        Raises:
            CommandError: the method cannot be deployed at that stride.
        """
        ...

    def map_geometry(self, height_px: int, width_px: int, *, stride: int | None = None) -> MapGeometry:
        """Where the cells of the deployed map lie for an input of this size."""
        ...

    @property
    def local(self) -> bool:
        """Whether a cell depends on its receptive field alone, so that maps of tiles can be put together."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-ready facts for provenance: teacher digest, fitted statistics."""
        ...


class Maker(Protocol):
    """Makes a method from its settings; reads what those name, so that what is missing is told before the images.

    Raises:
        CommandError, TrainingError, DataError: the settings contradict each other, or name what is not there.
    """

    def __call__(self, config: Any, *, seed: int, device: str) -> Method: ...
