"""Each named option of the student-teacher method: what it computes, and that the exported module computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from edge.errors import CommandError
from trainer.autoencoder import AutoEncoder
from trainer.config import LINE, STUDENT_TEACHER, override
from trainer.distill import Teacher
from trainer.fdfe import densify
from trainer.method import Batch, Frames
from trainer.methods.student_teacher import StudentTeacher
from trainer.patch_nets import PatchNetSpec, build_patch_net
from trainer.student_scale import padded

SPECS = {
    17: PatchNetSpec(17, (4, 4, 4), 4),
    33: PatchNetSpec(33, (4, 4, 4), 4),
    65: PatchNetSpec(65, (4, 4, 4, 4), 4),
}
PDN = PatchNetSpec(33, (4, 4, 4), 4, family="pdn")


def make_teacher(spec: PatchNetSpec) -> Teacher:
    net = build_patch_net(spec, 50 + spec.patch).eval().requires_grad_(False)
    decoder = torch.randn(9, spec.descriptor_dim, generator=torch.Generator().manual_seed(4))
    return Teacher(f"p{spec.patch}", spec, net, decoder, torch.zeros(9), {}, str(spec.patch) * 32)


def make_frames(count: int, channels: int = 1, side: int = 96, seed: int = 8) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), np.uint8)


def fitted(specs: Sequence[PatchNetSpec] = (SPECS[33],), channels: int = 1, side: int = 96, **settings: Any) -> Any:
    """A method with these settings, its statistics fitted on held-out noise."""
    config = replace(LINE, teachers=tuple(f"p{spec.patch}" for spec in specs), size_px=side, **settings)
    method = StudentTeacher(config, [make_teacher(spec) for spec in specs], seed=1)
    method.prepare(make_frames(6, channels, side))
    method.fit_statistics(make_frames(4, channels, side, seed=9))
    return method


@torch.no_grad()
def by_the_scales(method: StudentTeacher, frames: Frames) -> list[torch.Tensor]:
    """Each scale's normalized score, from its raw maps and the fitted numbers."""
    found = []
    for scale, statistics in zip(method.scales, method.statistics, strict=True):
        maps = scale.maps(frames)
        parts = []
        for name, row in statistics.items():
            if "mu" in row:
                parts.append((maps[name] - row["mu"]) / row["sigma"])
            else:
                parts.append(0.1 * (maps[name] - row["q_a"]) / (row["q_b"] - row["q_a"]))
        found.append(torch.stack(parts).sum(0))
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "e only": {"score": "e"},
    "v only": {"score": "v"},
    "one student": {"students": 1, "score": "e"},
    "shared trunk": {"heads": "shared"},
    "decoded": {"metric": "decoded"},
    "one Gaussian": {"metric": "gaussian"},
    "a Gaussian a place": {"metric": "placed"},
    "the students' own answer": {"metric": "placed", "score": "e+s", "students": 1},
    "the teacher's own answer": {"metric": "placed", "score": "t", "students": 0},
    "all four": {"metric": "gaussian", "score": "e+v+s+t"},
    "quantiles": {"normalization": "quantile"},
    "zeros around": {"pad": "zero", "stride": 2},
    "reflected": {"pad": "reflect", "stride": 1, "form": "multipool"},
    "every 8 px": {"stride": 8},
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_deployed_module_computes_what_was_fitted(option: str, channels: int) -> None:
    """Folded weights, padding on raw pixels, constants instead of loops: the numbers stay."""
    method = fitted(channels=channels, **OPTIONS[option])
    frames = make_frames(3, channels, seed=5)

    maps, scores = method.deployed(channels)(torch.from_numpy(frames))

    torch.testing.assert_close(maps, by_the_scales(method, frames)[0], atol=3e-4, rtol=3e-4)
    torch.testing.assert_close(scores, maps.amax((1, 2)))
    geometry = method.map_geometry(96, 96)
    assert maps.shape == (3, geometry.height, geometry.width)


def test_options_make_a_difference() -> None:
    """Control for the comparison above: no option is without effect."""
    frames = torch.from_numpy(make_frames(1, seed=5))
    plain = fitted().deployed(1)(frames)[0]
    others = [fitted(**OPTIONS[name]).deployed(1)(frames)[0] for name in OPTIONS]

    assert all(one.shape != plain.shape or not torch.allclose(one, plain, atol=1e-3) for one in others)


def test_the_decoded_metric_is_the_distance_in_features_of_p() -> None:
    """|| D sigma r ||^2 with the decoder D, written out."""
    method = fitted(metric="decoded")
    scale, frames = method.scales[0], make_frames(2, seed=5)
    residual = next(scale.vectors(frames, "e"))
    features = torch.einsum("cd,ndij->ncij", scale.teacher.decoder_weight * scale.sigma, residual)

    torch.testing.assert_close(scale.maps(frames)["e"], (features**2).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("patch", "offset"), [(17, 0.0), (33, -0.5), (65, -2.5)])
def test_padded_maps_have_a_cell_for_each_pixel_and_say_where_it_looks(patch: int, offset: float) -> None:
    """The floor in pooling moves what p = 33 and 65 see to the upper left of the pixel by 0.5 and 2.5 px."""
    method = StudentTeacher(replace(LINE, pad="zero", stride=1, size_px=96), [make_teacher(SPECS[patch])], seed=1)

    geometry = method.map_geometry(96, 80)

    assert (geometry.height, geometry.width, geometry.stride) == (96, 80, 1.0)
    assert geometry.offset_y == geometry.offset_x == offset
    assert geometry.rim_px == patch - 1


@pytest.mark.parametrize("pad", ["zero", "reflect"])
def test_padding_centers_every_patch_on_its_pixel(pad: Any) -> None:
    """The descriptor of pixel (y, x) is the network on the p x p patch around it, borders included."""
    spec = SPECS[33]
    net, image = build_patch_net(spec, 3).eval(), torch.randn(1, 3, 40, 44)
    around = padded(image, 33, pad)

    dense = densify(net, 33)(around)

    assert dense.shape == (1, 4, 40, 44) and torch.equal(around[:, :, 16:56, 16:60], image)
    for y, x in ((0, 0), (39, 43), (17, 20)):
        alone = net(around[:, :, y : y + 33, x : x + 33])
        torch.testing.assert_close(dense[:, :, y, x], alone[:, :, 0, 0], rtol=1e-4, atol=1e-5)


def test_the_multiscale_score_is_the_unweighted_mean_over_receptive_fields() -> None:
    """Paper, section 3.4; with padding every scale has a cell for each pixel."""
    method = fitted([SPECS[17], SPECS[33], SPECS[65]], pad="zero", stride=4)
    frames = make_frames(2, seed=5)

    maps, _ = method.deployed(1)(torch.from_numpy(frames))

    expected = torch.stack(by_the_scales(method, frames)).mean(0)
    torch.testing.assert_close(maps, expected, atol=3e-4, rtol=3e-4)
    assert method.map_geometry(96, 96).offset_y == pytest.approx((0 - 0.5 - 2.5) / 3)


def test_scales_on_different_grids_are_laid_over_each_other_by_their_centers() -> None:
    """p = 65 every 8 px from 29.5 onto p = 33 every 4 px from 15.5, bilinear between, the nearest outside."""
    method = fitted([SPECS[65], SPECS[33]])
    frames = make_frames(2, seed=5)
    coarse, fine = by_the_scales(method, frames)
    geometry = method.map_geometry(96, 96)
    position = np.clip((15.5 + 4 * np.arange(fine.shape[2]) - 29.5) / 8, 0, coarse.shape[2] - 1)

    maps, _ = method.deployed(1)(torch.from_numpy(frames))

    by_column = np.array([np.interp(position, np.arange(coarse.shape[2]), row) for row in coarse[1].numpy()])
    laid = np.array([np.interp(position, np.arange(coarse.shape[1]), column) for column in by_column.T]).T
    np.testing.assert_allclose(maps[1].numpy(), (fine[1].numpy() + laid) / 2, atol=3e-4, rtol=3e-4)
    assert (geometry.stride, geometry.offset_x) == (4.0, 15.5)


def test_a_coarser_map_is_every_nth_cell_of_the_fine_one() -> None:
    """What a first look at a frame relies on."""
    method = fitted(stride=2)
    frames = torch.from_numpy(make_frames(1, seed=5))

    fine, coarse = (method.deployed(1, stride=stride)(frames)[0] for stride in (None, 8))

    rows, columns = coarse.shape[1:]
    torch.testing.assert_close(coarse, fine[:, ::4, ::4][:, :rows, :columns], atol=2e-4, rtol=2e-4)
    assert method.map_geometry(96, 96, stride=8).stride == 8.0


@pytest.mark.parametrize(("settings", "stride"), [({}, 6), ({"center": "median"}, 8), ({"metric": "placed"}, 8)])
def test_a_stride_that_the_map_does_not_have_is_refused(settings: dict[str, Any], stride: int) -> None:
    """The message says which strides there are, and what stands in the way."""
    method = fitted(**settings)

    with pytest.raises(CommandError, match=f"cannot be evaluated every {stride} px"):
        method.deployed(1, stride=stride)


def test_hard_features_and_the_penalty_change_what_is_minimized(tmp_path: Path) -> None:
    """L_hard looks at the worst values only; the penalty adds the mean square of the answer to a photograph."""
    for number in range(3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), make_frames(1, 3, 80, seed=number)[0])
    batch = Batch(torch.from_numpy(make_frames(1, seed=5)), draw=7)
    settings: dict[str, Any] = {"students": 1, "score": "e", "loss": "hard"}
    plain, hard = fitted(students=1, score="e"), fitted(**settings)
    punished = fitted(**settings, penalty=1.0, photographs=str(tmp_path))

    losses = [float(method.loss(batch).detach()) for method in (plain, hard, punished)]

    assert losses[1] != losses[0] and losses[2] > losses[1]
    assert losses[2] == float(punished.loss(batch).detach()), "the same draw shows the same photograph"


def test_the_penalty_without_photographs_is_refused() -> None:
    """Before anything is read or trained."""
    with pytest.raises(CommandError, match="--photographs DIR"):
        StudentTeacher(replace(LINE, penalty=1.0), [make_teacher(SPECS[33])], seed=1)


def test_varied_exposure_is_seen_by_students_and_teacher_alike() -> None:
    """The cached answers of the teacher belong to unchanged pixels and must not be used."""
    method = fitted(exposure=0.3)
    batch = Batch(torch.from_numpy(make_frames(6)[:1]), np.array([0]), draw=3)

    first, again = (float(method.loss(batch).detach()) for _ in range(2))

    assert first == again
    assert first != float(method.loss(replace(batch, draw=4)).detach())


def test_the_auto_encoder_has_the_papers_size() -> None:
    """1,096,320 parameters with 384 channels; 56 x 56 for 256 px without padding (EfficientAD, table 8)."""
    net = AutoEncoder(384, 56).eval()

    assert sum(parameter.numel() for parameter in net.parameters()) == 1_096_320
    assert net(torch.zeros(1, 3, 256, 256)).shape == (1, 384, 56, 56)


def test_efficientad_trains_and_deploys_all_three_networks(tmp_path: Path) -> None:
    """Half of the score is how the student misses the teacher, half how it foretells the auto-encoder."""
    cv2.imwrite(str(tmp_path / "photo.png"), make_frames(1, 3, 300)[0])
    config = replace(STUDENT_TEACHER["efficientad-s"], photographs=str(tmp_path))
    method = StudentTeacher(config, [make_teacher(PDN)], seed=1)
    frames = make_frames(3, 1, 256)
    method.prepare(frames)
    loss = method.loss(Batch(torch.from_numpy(frames[:1]), np.array([0]), draw=1))
    loss.backward()  # type: ignore[no-untyped-call]
    method.fit_statistics(frames[1:])

    maps, _ = method.deployed(1)(torch.from_numpy(frames[:2]))

    assert all(parameter.grad is not None for parameter in method.trainable.parameters())
    assert maps.shape == (2, 56, 56) and not method.local
    raw = method.scales[0].maps(frames[:2])
    halves = [
        0.5 * 0.1 * (raw[name] - row["q_a"]) / (row["q_b"] - row["q_a"]) for name, row in method.statistics[0].items()
    ]
    torch.testing.assert_close(maps, halves[0] + halves[1], atol=3e-3, rtol=3e-4)


def test_settings_are_read_by_their_type_and_refused_by_name() -> None:
    """`--set` reaches every field; a typo lists what there is."""
    changed = override(LINE, ["students=1", "score=e", "teachers=a,b", "pad=none", "stride=none", "penalty=0.5"])

    assert (changed.students, changed.teachers, changed.pad, changed.stride) == (1, ("a", "b"), "none", None)
    for setting, message in (
        ("studnets=1", "expected KEY=VALUE with a KEY of teachers"),
        ("students=many", "--set students=many"),
        ("score=e+x", "a sum of different terms of e, v, s and t"),
        ("students=1", "needs 2 students"),
        ("students=0", "needs 2 students"),
        ("autoencoder=true", "images of 256 px"),
    ):
        with pytest.raises(CommandError, match=message):
            override(LINE, [setting])
