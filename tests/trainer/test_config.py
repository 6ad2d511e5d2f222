"""What can be configured for training, and what is refused."""

from __future__ import annotations

import pytest

from edge.errors import CommandError
from trainer.config import LINE, TRIO, Schedule
from trainer.presets import PRESETS, choose_preset


def test_without_a_preset_the_recommended_one_is_taken() -> None:
    """`kizu train student-teacher` alone is what a newcomer types."""
    assert choose_preset("student-teacher", None) is TRIO


def test_unknown_names_are_refused_with_the_names_there_are() -> None:
    """A typo must not train something else."""
    with pytest.raises(CommandError, match="student-teacher"):
        choose_preset("student-techer", None)
    with pytest.raises(CommandError, match="line"):
        choose_preset("student-teacher", "lime")


def test_every_preset_is_known_by_its_own_name() -> None:
    """The name goes into the bundle, so it must be the one that was asked for."""
    assert all(preset.preset == name for presets in PRESETS.values() for name, preset in presets.items())


def test_a_cosine_schedule_falls_from_the_full_rate_to_nearly_zero() -> None:
    """The paper keeps the rate; the line preset decays it."""
    cosine = Schedule(steps=100, batch_size=1, learning_rate=1e-3, weight_decay=0.0, decay="cosine")
    constant = Schedule(steps=100, batch_size=1, learning_rate=1e-3, weight_decay=0.0, decay="constant")

    assert cosine.rate_at(0) == 1e-3
    assert cosine.rate_at(50) == pytest.approx(5e-4)
    assert cosine.rate_at(99) < 1e-6
    assert constant.rate_at(99) == 1e-3


def test_small_sets_get_enough_steps_and_large_ones_no_more_than_the_limit() -> None:
    """Twenty images would else see a few hundred steps, ten thousand would take hours."""
    steps = [LINE.schedule(images).steps for images in (10, 100, 160, 10_000)]

    assert steps == [LINE.min_steps, LINE.epochs * 100, LINE.epochs * 160, LINE.max_steps]


@pytest.mark.parametrize(
    ("steps", "batch_size", "rate"), [(0, 1, 1e-3), (1, 0, 1e-3), (1, 1, 0.0), (1, 1, float("nan"))]
)
def test_a_schedule_that_cannot_train_is_refused(steps: int, batch_size: int, rate: float) -> None:
    """Zero steps would write an untrained bundle."""
    with pytest.raises(CommandError):
        Schedule(steps=steps, batch_size=batch_size, learning_rate=rate, weight_decay=0.0, decay="constant")
