"""Training configurations: one frozen dataclass per method, one named preset per recommended setting.

Owns what can be set and why each default is what it is.  Leaves what the settings do to ``methods`` and ``loop``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

from edge.errors import CommandError


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast: what ``loop`` needs to know, the same for every method.

    ``steps`` batches of ``batch_size`` images; Adam with ``learning_rate`` and ``weight_decay``; ``decay`` is
    ``constant`` (paper) or ``cosine`` (from the full rate to zero over ``steps``).

    Raises:
        CommandError: a value is out of range.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    decay: Literal["constant", "cosine"]

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise CommandError(f"steps and batch size must be at least 1, got {self.steps} and {self.batch_size}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise CommandError(f"the learning rate must be a positive number, got {self.learning_rate}")

    def rate_at(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        if self.decay == "constant":
            return self.learning_rate
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))


# Paper: Adam, 1e-4, weight decay 1e-5, batches of one image, 100 epochs, constant rate.
PAPER_WEIGHT_DECAY = 1e-5


@dataclass(frozen=True, slots=True)
class StudentTeacherConfig:
    """Settings of ``methods.student_teacher`` (Uninformed Students, CVPR 2020).

    ``teacher`` is a shipped teacher's name or a file; ``students`` is M; ``size_px`` the side of the square model
    input.  The students take the teacher's architecture and are trained for ``epochs``, but no less than
    ``min_steps`` and no more than ``max_steps`` batches.  ``center="image"`` subtracts from each map its own mean, so
    that a part as a whole a little unlike those learned from (another strip of cloth, another exposure) is no flaw;
    flaws that cover most of a part lose by it.  The other fields are those of ``Schedule``.
    """

    preset: str
    teacher: str
    epochs: int
    min_steps: int
    max_steps: int
    learning_rate: float
    decay: Literal["constant", "cosine"]
    students: int = 3  # paper: M = 3 on MVTec AD
    size_px: int = 256  # paper: images zoomed to 256 x 256, no crop
    batch_size: int = 1  # paper
    weight_decay: float = PAPER_WEIGHT_DECAY  # paper
    center: Literal["none", "image"] = "none"  # paper: none

    def schedule(self, images: int) -> Schedule:
        """The schedule for a training set of ``images``."""
        steps = math.ceil(self.epochs * images / self.batch_size)
        return Schedule(
            steps=min(max(steps, self.min_steps), self.max_steps),
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            decay=self.decay,
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form for checkpoints and provenance."""
        return asdict(self)


LINE = StudentTeacherConfig(
    preset="line", teacher="line", epochs=25, min_steps=1200, max_steps=4000, learning_rate=1e-3, decay="cosine"
)
"""The recommended preset: the paper's method on the quarter-width teacher, sized for two CPU cores.

Deviations from the paper, chosen by the loss on held-out good images (never by test images):

* learning rate 1e-3 with a cosine to zero instead of a constant 1e-4.  hazelnut_toy, 300 steps, a random teacher:
  held-out loss 36.2 at 1e-4, 18.0 at 5e-4, 14.0 at 1e-3, 13.0 at 3e-3; with a distilled teacher 16.2 at 1e-3 and
  15.5 at 3e-3, but synthetic defects were told from held-out good images no better (AUROC 0.741 and 0.736).  On the
  fabric aitex_02, 800 steps, the higher rate loses: 37.2 at 1e-3, 52.5 at 3e-3.
* 25 epochs, at least 1,200 and at most 4,000 steps, instead of 100 epochs: a step of three students costs 0.14 core-s
  on AVX-512, so 28 images take about 1.5 minutes on two idle cores and 200 images about 5.

bf16 autocast would take 0.066 s instead of 0.116 s a step (one thread, AVX-512 BF16), but then the weights would depend
on what the CPU supports; everything here is float32.
"""

PRESETS: Mapping[str, Mapping[str, StudentTeacherConfig]] = MappingProxyType(
    {"student-teacher": MappingProxyType({"line": LINE})}
)
"""Method name -> preset name -> configuration; the first preset of a method is its recommended one."""


def choose_preset(method: str, preset: str | None) -> StudentTeacherConfig:
    """The configuration of ``preset`` (None: the method's recommended one).

    Raises:
        CommandError: no such method or preset; the message lists those there are.
    """
    if method not in PRESETS:
        raise CommandError(f"unknown method {method!r}; choose one of {', '.join(PRESETS)}")
    presets = PRESETS[method]
    name = next(iter(presets)) if preset is None else preset
    if name not in presets:
        raise CommandError(f"{method} has no preset {name!r}; choose one of {', '.join(presets)}")
    return presets[name]
