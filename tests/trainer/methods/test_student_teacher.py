"""The student-teacher method against its equations, written out by hand here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import trainer.student_graph as graph
import trainer.student_scale as module
from edge.errors import DataError, TrainingError
from trainer.config import LINE
from trainer.distill import Teacher
from trainer.method import Batch, Frames
from trainer.methods import METHODS
from trainer.methods.student_teacher import StudentTeacher, with_its_teachers
from trainer.patch_nets import PROFILES, InputNormalization, PatchNetSpec, build_patch_net
from trainer.student_scale import student_errors

TINY = PatchNetSpec(patch=33, widths=(4, 4, 4), descriptor_dim=4)


def make_frames(count: int, channels: int = 1) -> Frames:
    return np.random.default_rng(8).integers(0, 256, (count, 64, 64, channels), np.uint8)


def make_method(channels: int = 1, seed: int = 1) -> StudentTeacher:
    net = build_patch_net(TINY, 50).eval().requires_grad_(False)
    net.last_conv.bias.data += torch.arange(4.0)  # type: ignore[union-attr]
    teacher = Teacher("tiny", TINY, net, torch.zeros(1, 4), torch.zeros(1), {}, "0" * 64)
    config = replace(LINE, teachers=("tiny",), size_px=64)
    method = StudentTeacher(config, [teacher], seed=seed)
    method.prepare(make_frames(6, channels))
    return method


@torch.no_grad()
def by_the_book(method: StudentTeacher, frames: Frames) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """e, v, T' and the students' answers in float64, as the paper prints them."""
    pixels = InputNormalization()(torch.from_numpy(frames))
    scale = method.scales[0]
    mu, sigma = (x.double().view(1, -1, 1, 1) for x in (scale.mu, scale.sigma))
    target = (scale.teacher_net(pixels).double() - mu) / sigma
    answers = [student(pixels).double() for student in method.scales[0].nets]
    mean = torch.stack(answers).mean(0)
    e = ((mean - target) ** 2).sum(1)
    v = torch.stack([(answer**2).sum(1) for answer in answers]).mean(0) - (mean**2).sum(1)
    return e, v, target, answers


def test_the_method_is_known_by_its_name() -> None:
    """The registry, the class and the bundle use one word."""
    assert METHODS["student-teacher"] is with_its_teachers
    assert StudentTeacher.name == "student-teacher"


def test_the_normalized_teacher_has_mean_zero_and_deviation_one_over_the_training_set() -> None:
    """mu and sigma are per channel, over all positions of all training images."""
    method = make_method()

    target = by_the_book(method, make_frames(6))[2]

    zeros = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(target.mean((0, 2, 3)), zeros, atol=1e-5, rtol=0)
    torch.testing.assert_close(target.std((0, 2, 3), correction=0), zeros + 1, atol=1e-5, rtol=0)


def test_the_loss_is_the_sum_over_students_of_the_mean_squared_distance() -> None:
    """Paper, section 3.2; the batch's images come from anywhere, cached or not."""
    method, frames = make_method(), make_frames(6)
    _, _, target, answers = by_the_book(method, frames[[4, 1]])
    expected = sum(float(((answer - target) ** 2).sum(1).mean()) for answer in answers)

    cached = method.loss(Batch(torch.from_numpy(frames[[4, 1]]), np.array([4, 1])))
    computed = method.loss(Batch(torch.from_numpy(frames[[4, 1]])))

    assert float(cached.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(computed.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_set_too_large_for_the_cache_trains_on_the_same_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache saves time and changes nothing."""
    frames, index = make_frames(6), np.array([2, 3])
    cached = make_method().loss(Batch(torch.from_numpy(frames[index]), index))
    monkeypatch.setattr(module, "TARGET_CACHE_BYTES", 0)

    computed = make_method().loss(Batch(torch.from_numpy(frames[index]), index))

    torch.testing.assert_close(cached, computed)


def test_only_the_students_learn() -> None:
    """A teacher that moves toward its students makes every error zero."""
    method, frames = make_method(), make_frames(6)

    method.loss(Batch(torch.from_numpy(frames[:2]), np.array([0, 1]))).backward()  # type: ignore[no-untyped-call]

    assert all(parameter.grad is not None for parameter in method.trainable.parameters())
    assert all(parameter.grad is None for parameter in method.scales[0].teacher_net.parameters())


def test_students_differ_from_each_other_and_from_those_of_the_next_seed() -> None:
    """v measures their disagreement; three equal students never disagree."""
    weights = [student.layers[0].weight for seed in (1, 2) for student in make_method(seed=seed).scales[0].nets]  # type: ignore

    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


@pytest.mark.parametrize("channels", [1, 3])
def test_the_deployed_graph_is_the_paper_s_score_on_raw_pixels(channels: int) -> None:
    """Folding the normalizations into the convolutions changes nothing but the cost."""
    method, frames = make_method(channels), make_frames(6, channels)
    method.fit_statistics(frames[3:])
    e, v, *_ = by_the_book(method, frames[:3])
    held_e, held_v, *_ = by_the_book(method, frames[3:])
    expected = (e - held_e.mean()) / held_e.std(correction=0) + (v - held_v.mean()) / held_v.std(correction=0)

    maps, scores = method.deployed(channels)(torch.from_numpy(frames[:3]))

    assert maps.shape == (3, 9, 9) and maps.dtype == torch.float32
    torch.testing.assert_close(maps.double(), expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(scores, maps.flatten(1).max(1).values)


def test_centering_takes_each_maps_own_mean_away_and_nothing_else() -> None:
    """The option `center="mean"`: a part that is a little unlike the others all over is not a flaw."""
    method, frames = make_method(), make_frames(6)
    method.fit_statistics(frames[3:])
    plain, _ = method.deployed(1)(torch.from_numpy(frames[:3]))
    method.config = replace(method.config, center="mean")

    maps, scores = method.deployed(1)(torch.from_numpy(frames[:3]))

    torch.testing.assert_close(maps, plain - plain.mean((1, 2), keepdim=True), atol=1e-4, rtol=1e-4)
    method.config = replace(method.config, center="median")
    middle = plain.flatten(1).median(1).values.view(-1, 1, 1)
    torch.testing.assert_close(
        method.deployed(1)(torch.from_numpy(frames[:3]))[0], plain - middle, atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(scores, maps.flatten(1).max(1).values)


def test_a_graph_that_forgets_to_fold_sigma_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug for the comparison above."""
    method, frames = make_method(), make_frames(6)
    method.fit_statistics(frames[3:])
    right = method.deployed(1)(torch.from_numpy(frames[:3]))[0]
    monkeypatch.setattr(graph, "standardize_output", lambda *_: None)

    wrong = method.deployed(1)(torch.from_numpy(frames[:3]))[0]

    assert not torch.allclose(right, wrong, atol=2e-4, rtol=2e-4)


def test_deploying_leaves_the_teacher_and_the_students_as_they_were() -> None:
    """Export copies; a resumed training must not find folded weights."""
    method, frames = make_method(), make_frames(6)
    before = by_the_book(method, frames)
    method.fit_statistics(frames)

    method.deployed(1)

    after = by_the_book(method, frames)
    assert torch.equal(before[2], after[2]) and torch.equal(before[3][0], after[3][0])


def test_v_keeps_its_digits_where_the_printed_difference_loses_them() -> None:
    """Large answers that nearly agree: the difference of sums is mostly rounding, the centered form is not."""
    common = 1000 * torch.randn(1, 8, 5, 5, generator=torch.Generator().manual_seed(1))
    students = [common + torch.full_like(common, offset) for offset in (-0.5, 0.0, 0.5)]
    exact = torch.stack([s.double() for s in students]).var(0, correction=0).sum(1)

    v = student_errors(common, students, {})["v"]

    torch.testing.assert_close(v.double(), exact, rtol=1e-2, atol=0)


def test_the_line_map_has_57_cells_a_side_centered_at_15_5() -> None:
    """Design: p = 33, stride 4, valid convolutions; no cell sees anything but real pixels."""
    net = build_patch_net(PROFILES["line"], 1)
    teacher = Teacher("line", PROFILES["line"], net, torch.zeros(1, 32), torch.zeros(1), {}, "")

    geometry = StudentTeacher(LINE, [teacher], seed=1).map_geometry(256, 256)

    assert (geometry.height, geometry.width, geometry.stride) == (57, 57, 4.0)
    assert geometry.offset_y == geometry.offset_x == 15.5
    assert 15.5 + 56 * 4 + 16 <= 256


def test_blank_pictures_are_refused() -> None:
    """A lens cap on the camera teaches nothing; dividing by a zero deviation would give NaN later."""
    method = make_method()

    with pytest.raises(DataError, match="blank"):
        method.prepare(np.full((8, 64, 64, 1), 128, np.uint8))


def test_scores_that_do_not_vary_are_refused() -> None:
    """Equal students never disagree: v is zero everywhere and cannot be normalized."""
    method = make_method()
    first, *others = method.scales[0].nets
    for student in others:
        student.load_state_dict(first.state_dict())

    with pytest.raises(TrainingError, match="score v"):
        method.fit_statistics(make_frames(6))
