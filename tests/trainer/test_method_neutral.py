"""`kizu train` is the same command for every method: what it has no use for is told, before any image is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from edge.errors import CommandError
from trainer.config import STUDENT_TEACHER, override
from trainer.methods import METHODS
from trainer.presets import PRESETS, choose_preset
from trainer.train_command import train


def run(place: Path, method: str, *extra: str) -> Result:
    app = typer.Typer()
    app.command()(train)
    options = ["--data", str(place / "good"), "--out", str(place / "bundle"), "--size", "64", "--steps", "2"]
    return CliRunner().invoke(app, [method, *options, *extra])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("drocc", ["--teacher", "line"], "drocc has no use for it"),
        ("drocc", ["--photographs", "photos"], "drocc has no use for it"),
        ("fcdd", ["--set", "patience=x"], "patience"),
        ("drocc", ["--preset", "line"], "dense"),
        ("crocc", [], "drocc-lf"),
    ],
)
def test_what_a_method_lacks_or_cannot_use_is_told_before_the_images_are_read(
    tmp_path: Path, method: str, options: list[str], message: str
) -> None:
    """There is no folder of images here, and none of the messages is about that."""
    error = run(tmp_path, method, *options).exception

    assert isinstance(error, CommandError) and message in str(error)


def test_every_method_has_presets_that_take_the_common_settings() -> None:
    """A name on the command line without settings, or settings without a method, would be found by a user."""
    assert METHODS.keys() == PRESETS.keys()
    for method, presets in PRESETS.items():
        assert choose_preset(method, None) is next(iter(presets.values()))
        changed = override(choose_preset(method, None), ["size_px=128", "patience=3", "epochs=1", "min_steps=9"])
        schedule = changed.schedule(1)
        assert (changed.size_px, schedule.patience, schedule.steps) == (128, 3, 9)


def test_the_word_none_and_commas_are_read_by_the_fields_type() -> None:
    """No list of names of fields that a new method would have to be added to."""
    config = replace(STUDENT_TEACHER["line"], center="mean", stride=8)

    changed = override(config, ["center=none", "stride=none", "teachers=a,b"])

    assert (changed.center, changed.stride, changed.teachers) == ("none", None, ("a", "b"))
