"""P itself as a teacher: read at the students' cells, reduced by a rotation, exported as it was trained with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge.bundle import InputSpec
from edge.errors import CommandError, TrainingError
from trainer.backbone_teacher import LAYERS, STUDENT, BackboneTeacher
from trainer.backbones import load_backbone
from trainer.config import DUO_STUDENTS, StudentTeacherConfig
from trainer.configs.fcdd import FcddConfig
from trainer.distill import load_teacher
from trainer.export import BundleFacts, export_bundle
from trainer.method import Frames
from trainer.methods.fcdd import Fcdd
from trainer.methods.student_teacher import StudentTeacher, with_its_teachers

SIDE = 96


def make_frames(count: int, channels: int = 1, seed: int = 8) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, channels), np.uint8)


def config(**settings: object) -> StudentTeacherConfig:
    return replace(DUO_STUDENTS, teachers=("line", "resnet18"), size_px=SIDE, center="none", **settings)  # type: ignore[arg-type]


def fitted(channels: int = 1, **settings: object) -> StudentTeacher:
    method = with_its_teachers(config(**settings), seed=1, device="cpu")
    method.prepare(make_frames(12, channels))
    method.fit_statistics(make_frames(4, channels, seed=9))
    return method


def teacher() -> BackboneTeacher:
    net = load_teacher("resnet18").net
    assert isinstance(net, BackboneTeacher)
    return net


def test_a_descriptor_is_the_rotated_features_at_its_pixel() -> None:
    """On P's own cells of both layers nothing is interpolated: T there is R [F_2; F_3], element by element."""
    pixels = torch.randn(1, 3, SIDE, SIDE)
    at = 16.0 * torch.arange(SIDE // 16)

    answer = teacher().at(at, at, (SIDE, SIDE))(pixels)

    features = teacher().backbone.features(pixels)
    stacked = torch.cat([features["layer2"][:, :, ::2, ::2], features["layer3"]], 1)
    expected = torch.einsum("dc,ncij->ndij", teacher().rotation, stacked)
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_between_cells_a_descriptor_is_interpolated_and_a_shift_is_caught() -> None:
    """Halfway between two cells of layer2 stands their mean; what was read one pixel beside it is something else."""
    pixels = torch.randn(1, 3, SIDE, SIDE)
    net = teacher()
    zeros = torch.zeros_like(net.projections[1].weight)
    net.projections[1].load_state_dict({"weight": zeros})  # layer2 alone

    at = torch.tensor([32.0, 36.0, 40.0, 37.0])
    first, between, second, beside = net.at(torch.tensor([40.0]), at, (SIDE, SIDE))(pixels)[0, :, 0].T

    torch.testing.assert_close(between, (first + second) / 2, rtol=1e-4, atol=1e-5)
    assert (beside - between).norm() > 0.01 * between.norm()


def test_the_rotation_keeps_lengths_and_is_the_same_every_time() -> None:
    """Rows are orthonormal, and it has one row for each dimension of the students' answers."""
    rotation = teacher().rotation

    widths = [load_backbone("resnet18").net.layer(name).channels for name in LAYERS]
    assert rotation.shape == (STUDENT.descriptor_dim, sum(widths))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(len(rotation)), rtol=0, atol=1e-5)
    torch.testing.assert_close(rotation, teacher().rotation, rtol=0, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_deployed_graph_says_what_the_scales_say(channels: int) -> None:
    """Gray or color: mu, sigma and the input's normalization are folded in or computed, and nothing is lost."""
    method = fitted(channels, metric="plain")
    frames = make_frames(2, channels, seed=10)

    maps, scores = method.deployed(channels)(torch.from_numpy(frames))

    fine, coarse = (
        (scale.maps(frames)["e"] - row["e"]["mu"]) / row["e"]["sigma"]
        for scale, row in zip(method.scales, method.statistics, strict=True)
    )
    onto = method.deployed(channels).onto[1]
    torch.testing.assert_close(maps, (fine + onto(coarse)) / 2, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scores, maps.amax((1, 2)))


def test_a_graph_that_forgets_to_normalize_for_p_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: P on raw gray values gives another map."""
    method = fitted(metric="plain")
    frames = torch.from_numpy(make_frames(2, seed=10))
    right = method.deployed(1)(frames)[0]

    broken = method.deployed(1)
    broken.scales[1].before_teacher.std.fill_(1.0)

    assert (broken(frames)[0] - right).abs().max() > 0.1


def test_the_export_gives_the_same_scores_and_passes_the_operator_rules(tmp_path: Path) -> None:
    """`kizu train` ends so: parity on held-out frames, the linter, and a bundle that names P and its digest."""
    method = fitted(metric="placed")
    facts = BundleFacts("b", "student-teacher", "test", InputSpec(SIDE, SIDE, 1, max_batch=4), "0" * 64, True, {})

    bundle = export_bundle(method, tmp_path / "b", facts, held_out=make_frames(4, seed=9))

    card = method.describe()["scales"][1]["teacher"]["card"]
    assert card["backbone"]["known_as"] is not None and "BSD" in card["license"]
    assert bundle.manifest.method == "student-teacher"


def test_only_students_learn_and_tiles_are_refused() -> None:
    """P keeps still; and since it pads every picture it is shown with zeros, a tile would get a rim of its own."""
    method = with_its_teachers(config(metric="plain"), seed=1, device="cpu")

    assert not any(parameter.requires_grad for parameter in method.scales[1].teacher_net.parameters())
    assert not method.local


def test_it_is_no_trunk_for_fcdd_and_unknown_names_list_it() -> None:
    """FCDD's `trunk` is a patch network; a name that is no teacher's is answered with those there are."""
    with pytest.raises(CommandError, match="not a patch network"):
        Fcdd(FcddConfig(preset="x", trunk="resnet18"), seed=1)
    with pytest.raises(TrainingError, match="resnet18"):
        load_teacher("resnet50")
