"""Which maps are summed: one that drowns the others is left out, one that helps or does no harm stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edge.bundle import MapGeometry
from edge.errors import CommandError
from trainer import map_choice
from trainer.config import EFFICIENTAD_S, LINE
from trainer.distill import Teacher
from trainer.map_choice import at_cells, choose, trials
from trainer.method import Frames
from trainer.methods.student_teacher import StudentTeacher
from trainer.patch_nets import PatchNetSpec, build_patch_net

SEES, BLIND, ALSO = (0, "e"), (1, "t"), (2, "e")
GOOD, FLAWED, SIDE = 40, 120, 12


def maps_of(count: int, *, flaw: bool, seed: int) -> dict[tuple[int, str], Tensor]:
    """SEES and ALSO have noise of 1 and a flaw of 4 in one cell; BLIND is noise of 6 whatever it is shown."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, count, SIDE, SIDE, generator=generator)
    drawn[1] *= 6
    if flaw:
        drawn[0, :, 5, 5] += 4
        drawn[2, :, 5, 5] += 4
    return {SEES: drawn[0], BLIND: drawn[1], ALSO: drawn[2]}


def chosen(*keys: tuple[int, str]) -> tuple[list[tuple[int, str]], dict[str, float]]:
    where = np.zeros((FLAWED, SIDE, SIDE), np.bool_)
    where[:, 5, 5] = True
    good = maps_of(GOOD, flaw=False, seed=1)
    flawed = {size: maps_of(FLAWED, flaw=True, seed=seed) for seed, size in enumerate(("small", "large"), 2)}
    return choose(
        {key: good[key] for key in keys},
        {size: {key: maps[key] for key in keys} for size, maps in flawed.items()},
        dict.fromkeys(flawed, where),
        lambda maps: maps,
    )


def test_a_map_that_drowns_the_others_is_left_out() -> None:
    """The loud one goes, the two that see the flaw stay, and flaws are told better than with all three."""
    kept, told = chosen(SEES, BLIND, ALSO)

    assert kept == [SEES, ALSO]
    assert told["chosen"] > told["all"] + 0.1


def test_without_a_reason_nothing_is_left_out() -> None:
    """Two maps that both see the flaw are better together; and of a single one there is nothing to leave."""
    assert chosen(SEES, ALSO)[0] == [SEES, ALSO]
    assert chosen(BLIND)[0] == [BLIND]


def test_the_control_that_asks_for_no_reason_throws_good_maps_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a gain that a loss satisfies, one map is all that is left."""
    monkeypatch.setattr(map_choice, "GAIN", -1.0)

    assert len(chosen(SEES, ALSO)[0]) == 1


def test_flaws_are_looked_up_at_the_pixel_under_each_cell() -> None:
    """A flaw at row 10, column 22 lies under cell (2, 5) of a grid every 4 px from 2; a moved grid misses it."""
    where = np.zeros((1, 32, 32), np.bool_)
    where[0, 10, 22] = True
    grid = MapGeometry(height=7, width=7, stride=4.0, offset_y=2.0, offset_x=2.0, reduction="max", rim_px=0)
    moved = MapGeometry(height=7, width=6, stride=4.0, offset_y=2.0, offset_x=3.4, reduction="max", rim_px=0)

    assert np.argwhere(at_cells(where, grid)[0]).tolist() == [[2, 5]]
    assert not at_cells(where, moved).any()


def test_trials_repeat_for_a_seed_and_cover_every_picture() -> None:
    """Three flaws of each size in each of at most forty pictures, the same ones every time."""
    pictures = np.random.default_rng(0).integers(60, 200, (45, 64, 64, 1), np.uint8)

    good, flawed = trials(pictures, 7)
    again, others = trials(pictures, 7)[1], trials(pictures, 8)[1]

    assert len(good) == map_choice.MAX_PICTURES
    for size, trial in flawed.items():
        assert len(trial.flawed) == map_choice.PLANTINGS * map_choice.MAX_PICTURES
        assert trial.where.any((1, 2)).all()
        assert np.array_equal(trial.flawed, again[size].flawed)
        assert not np.array_equal(trial.flawed, others[size].flawed)


def make_method(monkeypatch: pytest.MonkeyPatch, keep: list[tuple[int, str]]) -> tuple[StudentTeacher, Frames]:
    """Two scales on different grids, e and t of each, of which ``keep`` are chosen."""
    monkeypatch.setattr("trainer.methods.student_teacher.choose", lambda *_: (keep, {"all": 0.5, "chosen": 0.9}))
    specs = (PatchNetSpec(33, (4, 4, 4), 4), PatchNetSpec(65, (4, 4, 4, 4), 4))
    teachers = [
        Teacher(f"p{spec.patch}", spec, build_patch_net(spec, spec.patch).eval().requires_grad_(False),
                torch.zeros(9, 4), torch.zeros(9), {}, "0" * 64)
        for spec in specs
    ]  # fmt: skip
    config = replace(
        LINE, teachers=("p33", "p65"), students=1, score="e+t", metric="placed", maps="planted", size_px=96
    )
    method = StudentTeacher(config, teachers, seed=1)
    frames = np.random.default_rng(3).integers(0, 256, (8, 96, 96, 1), np.uint8)
    method.prepare(frames)
    method.fit_statistics(frames[:4])
    return method, frames


def test_what_is_not_chosen_is_not_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only t of the coarse scale: one scale, no student, the coarse grid, and provenance says what was kept."""
    method, frames = make_method(monkeypatch, [(1, "t")])

    graph: Any = method.deployed(1)
    maps, scores = graph(torch.from_numpy(frames[:2]))

    row = method.statistics[1]["t"]
    expected = (method.scales[1].maps(frames[:2])["t"] - row["mu"]) / row["sigma"]
    geometry = method.map_geometry(96, 96)
    assert len(graph.scales) == 1 and len(graph.scales[0].students) == 0
    assert maps.shape[1:] == (geometry.height, geometry.width) and geometry.offset_y == method.scales[1].spec.center
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scores, maps.amax((1, 2)))
    assert method.describe()["choice"] == {"kept": ["t of p65"], "told": {"all": 0.5, "chosen": 0.9}}


def test_all_that_is_chosen_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every map kept gives the graph of ``maps=all``."""
    keys = [(0, "t"), (0, "e"), (1, "t"), (1, "e")]
    method, frames = make_method(monkeypatch, keys)

    maps, _ = method.deployed(1)(torch.from_numpy(frames[:2]))

    plain = StudentTeacher(replace(method.config, maps="all"), [scale.teacher for scale in method.scales], seed=1)
    plain.prepare(frames)
    plain.fit_statistics(frames[:4])
    torch.testing.assert_close(maps, plain.deployed(1)(torch.from_numpy(frames[:2]))[0], rtol=0, atol=0)


def test_the_choice_does_not_go_with_an_auto_encoder() -> None:
    """Its map is half of EfficientAD's score and cannot be left out."""
    with pytest.raises(CommandError, match="maps = planted"):
        replace(EFFICIENTAD_S, maps="planted")
