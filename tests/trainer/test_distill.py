"""Distillation: targets sit on the patch centers, losses are the formulas, a killed run resumes to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer import Typer
from typer.testing import CliRunner

import trainer.distill as distill_module
from edge.errors import CommandError, DataError, KizuError, TrainingError
from trainer.backbones import Backbone, FeatureLayer, LoadedBackbone, ResNet18
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.distill import Distillation, load_teacher
from trainer.distill_command import distill, working_path
from trainer.distill_config import DistillConfig, paper_schedule
from trainer.distill_losses import (
    correlation_loss,
    knowledge_loss,
    shifted_views,
    strangers,
    triplet_loss,
    varied_exposure,
)
from trainer.patch_nets import PROFILES, PatchNetSpec
from trainer.photographs import Photographs, ViewRecipe, cut_view, hold_out, read_photographs
from trainer.targets import MapTarget, PatchTarget
from trainer.teacher_card import make_card

TINY = PatchNetSpec(33, (4, 4, 4), 4)
TINY_17 = PatchNetSpec(17, (4, 4, 4), 4)
TINY_65 = PatchNetSpec(65, (4, 4, 4, 4), 4)
TINY_PDN = PatchNetSpec(33, (4, 4, 4), 4, "pdn")


class Ruler(Backbone):
    """A stand-in for P whose features tell each cell's own pixel index: channel 0 the column, channel 1 the row."""

    name = "ruler"
    layers = (FeatureLayer("fine", 2, 4, 3), FeatureLayer("coarse", 2, 8, 0))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        found = {}
        for layer in self.layers:
            columns = layer.origin + layer.stride * torch.arange(pixels.shape[3] // layer.stride)
            rows = layer.origin + layer.stride * torch.arange(pixels.shape[2] // layer.stride)
            grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1]).float()
            found[layer.name] = grid.expand(pixels.shape[0], -1, -1, -1)
        return found


class Mean(Backbone):
    """A stand-in for P: the mean pixel value around every cell, one channel."""

    name = "mean"
    layers = (FeatureLayer("only", 1, 4, 1),)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"only": nn.functional.avg_pool2d(pixels.mean(dim=1, keepdim=True), 4)}


@pytest.fixture(scope="module")
def photographs() -> Photographs:
    """Twelve synthetic pictures, 140 x 200, of smooth blobs and edges."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(12):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        images.append(np.asarray(cv2.resize(coarse, (200, 140), interpolation=cv2.INTER_CUBIC), dtype=np.uint8))
    return Photographs(tuple(f"{n}.png" for n in range(12)), tuple(images), "digest", ())


@pytest.fixture(scope="module")
def backbone() -> LoadedBackbone:
    """An untrained P: enough to learn something from."""
    torch.manual_seed(0)
    return LoadedBackbone(ResNet18().eval().requires_grad_(False), "random", "0" * 64, None)


def config(**changes: object) -> DistillConfig:
    base = DistillConfig(
        spec=TINY, magnify=1, steps=6, views=16, validation_views=8, validation_share=0.3, batch_views=4,
        warmup_steps=2, recipe=ViewRecipe(side_px=128, zoom_px=(128, 160)),
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("magnify", [1, 2])
@pytest.mark.parametrize("layer", ["fine", "coarse"])
def test_map_target_reads_p_at_the_exact_center_of_every_patch(magnify: int, layer: str) -> None:
    """P's cells tell their own place: the sampled value is the patch center's pixel index in the magnified view."""
    target = MapTarget(Ruler(), TINY, (layer,), magnify)

    sampled = target(torch.zeros(1, 96, 96, 3, dtype=torch.uint8))

    centers = 16 + 15.5 + 4 * torch.arange(9.0)  # margin, middle of the 32 px footprint, stride 4
    expected = magnify * centers + (magnify - 1) / 2
    torch.testing.assert_close(sampled[0, 0, 0], expected)
    torch.testing.assert_close(sampled[0, 1, :, 0], expected)


def test_a_center_half_a_pixel_off_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control for the test above: p / 2 instead of the footprint's middle shows."""
    monkeypatch.setattr(PatchNetSpec, "center", 16.0)

    sampled = MapTarget(Ruler(), TINY, ("fine",), 1)(torch.zeros(1, 96, 96, 3, dtype=torch.uint8))

    assert float(sampled[0, 0, 0, 0]) != pytest.approx(16 + 15.5)


@pytest.mark.parametrize(
    ("spec", "sampling", "first", "grid"),
    [
        (TINY_17, 4, 8.0, 12),
        (TINY_PDN, None, 16.0, 8),
        (TINY, 6, 15.5, 6),
        (TINY, 8, 15.5, 4),
        (TINY_65, None, 29.5, 1),
    ],
)
def test_targets_sit_on_the_centers_of_every_family_and_sampling(
    spec: PatchNetSpec, sampling: int | None, first: float, grid: int
) -> None:
    """Corners lie at multiples of the sampling distance, centers half a footprint further."""
    target = MapTarget(Ruler(), spec, ("fine",), 1, sampling_px=sampling)

    sampled = target(torch.zeros(1, 96, 96, 3, dtype=torch.uint8))

    expected = 16 + first + (sampling or spec.stride) * torch.arange(float(grid))
    torch.testing.assert_close(sampled[0, 0, 0], expected)
    torch.testing.assert_close(sampled[0, 1, :, 0], expected)


@pytest.mark.parametrize(("spec", "sampling"), [(TINY_17, 4), (TINY, 6), (TINY, 8), (TINY_PDN, 2), (TINY_65, None)])
def test_descriptors_lie_where_their_targets_do(
    spec: PatchNetSpec, sampling: int | None, photographs: Photographs, backbone: LoadedBackbone
) -> None:
    """As many as the target has, and each the network on the patch whose corner is a multiple of the distance."""
    run = Distillation(config(spec=spec, sampling_px=sampling, recipe=ViewRecipe(160)), photographs, backbone)
    pixels = torch.randint(0, 256, (1, 96, 96, 3), generator=torch.Generator().manual_seed(0)).float()

    described = run._describe(pixels)

    last = described.shape[2] - 1
    corner = last * (sampling or spec.stride)
    patch = pixels[:, corner : corner + spec.footprint, : spec.footprint]
    alone = run.net(run.normalization(patch))[0, :, 0, 0]
    assert last == run.target(torch.zeros(1, 160, 160, 3, dtype=torch.uint8)).shape[2] - 1  # its margin is 32 px
    torch.testing.assert_close(described[0, :, last, 0], alone, rtol=5e-2, atol=5e-2)


def test_patch_target_shows_p_the_one_patch_of_a_small_view() -> None:
    """The paper's way: a view of p px is one patch; P sees all of it that the network sees."""
    views = torch.randint(0, 256, (3, 33, 33, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    full = PatchTarget(Mean(), TINY, ("only",), magnify=1)(views)

    expected = views[:, :32, :32].float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(full[:, 0, 0, 0], expected, rtol=1e-2, atol=0.0)
    assert full.shape == (3, 1, 1, 1)


def test_patch_target_shows_p_each_patch_alone() -> None:
    """The paper's mode: one vector per patch, the pooled features of that patch and of nothing around it."""
    views = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    target = PatchTarget(Mean(), TINY, ("only",), magnify=1, step=4)

    full = target(views)

    known = torch.isfinite(full[0, 0])
    assert full.shape == (2, 1, 9, 9) and known.nonzero().tolist() == [[2, 2], [2, 6], [6, 2], [6, 6]]
    patch = views[1, 8:40, 24:56].float().mean()
    assert float(full[1, 0, 2, 6]) == pytest.approx(float(patch), rel=1e-2)


def test_knowledge_loss_is_the_mean_squared_difference() -> None:
    """The expanded square equals the plain one, in value and in gradient."""
    torch.manual_seed(0)
    decoder, descriptors = nn.Conv2d(4, 9, 1), torch.randn(3, 4, 25).bfloat16().float().requires_grad_(True)
    target = torch.randn(3, 9, 25).bfloat16()
    plain = (decoder(descriptors.view(3, 4, 5, 5)).flatten(2) - target.float()).square().mean()
    expected = torch.autograd.grad(plain, [descriptors, decoder.weight])

    loss = knowledge_loss(descriptors, decoder, target)

    torch.testing.assert_close(loss, plain, rtol=1e-3, atol=0.0)
    for ours, theirs in zip(torch.autograd.grad(loss, [descriptors, decoder.weight]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-3)


def test_correlation_loss_sees_dimensions_that_say_the_same() -> None:
    """Independent dimensions cost nothing, a copy of one (or its negative) costs."""
    torch.manual_seed(0)
    independent = torch.randn(2, 3, 5000)
    copied = independent.clone()
    copied[:, 2] = -3.0 * copied[:, 0] + 1.0

    assert float(correlation_loss(independent)) < 1e-3
    assert float(correlation_loss(copied)) == pytest.approx(2 / 6, rel=0.01)  # 2 of 6 off-diagonal entries are 1


def test_triplet_loss_on_numbers_worked_out_by_hand() -> None:
    """max(0, 1 + d_plus - d_minus): apart enough, too near, and the negative nearer to p+ than to p."""
    anchor = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])  # (1, 2, 3): three triplets in the plane
    positive = torch.tensor([[[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]]])
    negative = torch.tensor([[[0.0, 0.0, 3.0], [3.0, 1.0, 0.0]]])
    # d_plus 1, 1, 4; d_minus min(9, 10) = 9, min(1, 2) = 1, min(9, 1) = 1

    assert float(triplet_loss(anchor, positive, negative, 1.0)) == pytest.approx((0.0 + 1.0 + 4.0) / 3)
    assert float(triplet_loss(anchor, positive, negative, 0.0)) == pytest.approx((0.0 + 0.0 + 3.0) / 3)


def brute_force_triplets(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float) -> float:
    costs = []
    for n in range(anchor.shape[0]):
        for i in range(anchor.shape[2]):
            p, plus, minus = (x[n, :, i].double().numpy() for x in (anchor, positive, negative))
            near, far = ((p - plus) ** 2).sum(), min(((p - minus) ** 2).sum(), ((plus - minus) ** 2).sum())
            costs.append(max(0.0, margin + near - far))
    return float(np.mean(costs))


def test_triplet_loss_is_the_mean_over_all_triplets() -> None:
    """The formula in a loop over views and positions gives the same number."""
    torch.manual_seed(0)
    triplets = [torch.randn(3, 5, 7) for _ in range(3)]

    assert float(triplet_loss(*triplets, 2.0)) == pytest.approx(brute_force_triplets(*triplets, 2.0), rel=1e-5)


def test_a_triplet_loss_without_its_second_distance_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control for the test above: d_minus from p alone gives another number."""
    torch.manual_seed(0)
    triplets = [torch.randn(3, 5, 7) for _ in range(3)]
    monkeypatch.setattr(torch, "minimum", lambda from_anchor, from_positive: from_anchor)

    assert float(triplet_loss(*triplets, 2.0)) != pytest.approx(brute_force_triplets(*triplets, 2.0), rel=1e-3)


def test_a_positive_is_the_same_view_a_little_shifted_and_noisy() -> None:
    """Views that tell their own place: rows and columns move by at most the room, each view by its own, plus noise."""
    ramp = torch.arange(48.0)
    pixels = (2.0 * ramp.view(1, 48, 1, 1) + 1.5 * ramp.view(1, 1, 48, 1)).expand(32, 48, 48, 3).contiguous() + 40.0

    moved = shifted_views(pixels, 8, torch.Generator().manual_seed(0))

    rest = moved - pixels[:, 8:40, 8:40]  # 2 dy + 1.5 dx, and noise of 25.5
    steps = rest.mean(dim=(1, 2, 3))
    assert moved.shape == (32, 32, 32, 3) and len(set(steps.round().tolist())) > 16
    assert 14.0 < float(steps.abs().max()) < 8 * 3.5 + 2.0
    assert float((rest - steps.view(-1, 1, 1, 1)).std()) == pytest.approx(25.5, rel=0.02)


def test_a_stranger_is_never_of_the_same_view() -> None:
    """Descriptors that tell their view: whatever is drawn, p- comes from another one, and from other places."""
    told = torch.arange(3.0).view(3, 1, 1).expand(3, 2, 9)
    places = torch.arange(9.0).expand(3, 2, 9)

    for seed in range(20):
        assert bool((strangers(told, torch.Generator().manual_seed(seed)) != told).all())
    assert not torch.equal(strangers(places, torch.Generator().manual_seed(0)), places)


def test_exposure_is_varied_per_view_and_stays_in_range() -> None:
    """Each view gets its own gain; strength 0 changes nothing."""
    pixels = torch.full((4, 3, 3, 3), 100.0)
    generator = torch.Generator().manual_seed(0)

    varied = varied_exposure(pixels, 0.3, generator)

    assert len(set(varied[:, 0, 0, 0].tolist())) == 4
    assert float(varied.min()) >= 0.0 and float(varied.max()) <= 255.0
    torch.testing.assert_close(varied_exposure(pixels, 0.0, generator), pixels)


def test_a_view_is_decided_by_its_number(photographs: Photographs) -> None:
    """The same seed and number give the same pixels; another number other pixels; gray views are gray."""
    recipe = ViewRecipe(side_px=64, zoom_px=(64, 200), gray_share=1.0)
    first, again, other = (cut_view(photographs, [0, 1, 2], recipe, 1, number) for number in (5, 5, 6))

    assert first.shape == (64, 64, 3) and np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(first[..., 0], first[..., 2])


def test_a_square_zoom_shows_the_share_of_the_picture_that_it_should(photographs: Photographs) -> None:
    """The paper's views: both sides of a 140 x 200 picture zoomed to the same side, here 70 px, then cut to 35."""
    rows, columns = np.meshgrid(np.arange(140), np.arange(200), indexing="ij")
    ramp = np.stack([rows, columns, columns], axis=-1).astype(np.uint8)
    pictures = replace(photographs, images=(ramp,), names=("ramp.png",))
    recipe = ViewRecipe(35, (70, 70), gray_share=0.0, square=True)

    view = cut_view(pictures, [0], recipe, 0, 0).astype(int)

    assert np.ptp(view[..., 0]) == pytest.approx(70, abs=3)  # half of the rows
    assert np.ptp(view[..., 1]) == pytest.approx(100, abs=4)  # half of the columns


def test_held_out_photographs_stay_held_out_when_others_join(photographs: Photographs) -> None:
    """A photograph's side depends on its name alone."""
    kept, held = hold_out(photographs, 0.3)
    fewer = replace(photographs, names=photographs.names[:9], images=photographs.images[:9])

    assert sorted(kept + held) == list(range(12))
    assert hold_out(fewer, 0.3)[1] == [index for index in held if index < 9]
    with pytest.raises(DataError, match="cannot be split"):
        hold_out(photographs, 0.0)


def test_files_that_are_no_images_are_named_then_refused_or_skipped(tmp_path: Path, photographs: Photographs) -> None:
    """A broken JPEG, an empty file and a stamp-sized picture are each named with the reason."""
    cv2.imwrite(str(tmp_path / "good.png"), photographs.images[0])
    cv2.imwrite(str(tmp_path / "stamp.png"), photographs.images[0][:20, :20])
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    (tmp_path / "empty.png").touch()

    with pytest.raises(DataError, match=r"broken.jpg \(.*empty.png \(empty file\), stamp.png \(20 x 20 px.*--skip-bad"):
        read_photographs(tmp_path)
    found = read_photographs(tmp_path, skip_bad=True)
    assert found.names == ("good.png",) and len(found.skipped) == 3
    with pytest.raises(DataError, match="no such folder"):
        read_photographs(tmp_path / "gone")


def test_distillation_learns_what_p_says_of_unseen_pictures(
    tmp_path: Path, photographs: Photographs, backbone: LoadedBackbone
) -> None:
    """After 150 small steps the held-out error is well below the mean predictor's, and dimensions are not copies."""
    run = Distillation(config(steps=150, views=32, learning_rate=1e-2, layers=("layer1",)), photographs, backbone)

    assert run.run(tmp_path / "c", validate_every=75)

    assert run.history[-1]["validation"] < 0.9
    assert run.history[-1]["correlation"] < 0.2


@pytest.mark.parametrize("spec", [TINY_17, TINY, TINY_65, TINY_PDN], ids=lambda spec: f"{spec.family}-{spec.patch}")
@pytest.mark.parametrize("lambda_m", [0.0, 1.0])
def test_the_papers_schedule_runs_on_single_patches(
    tmp_path: Path, photographs: Photographs, backbone: LoadedBackbone, monkeypatch: pytest.MonkeyPatch,
    spec: PatchNetSpec, lambda_m: float,
) -> None:  # fmt: skip
    """Two steps of every shape, with and without L_m: patches cut anew, P asked for each of them at every step."""
    monkeypatch.setattr("trainer.target_cache.STATISTICS_PATCHES", 64)
    run = Distillation(paper_like(spec, lambda_m), photographs, backbone)

    assert run.run(tmp_path / "c")

    assert run.target.mode == "patch" and ("triplet" in run.history[-1]) == (lambda_m > 0)
    batches, validation = run._prepare(tmp_path, lambda progress: None, lambda: False)
    views, targets = batches.draw(0, 8, np.random.default_rng(0))
    side = spec.patch + 2 * run.config.room_px
    assert (views.shape, targets.shape) == ((8, side, side, 3), (8, 256, 1, 1))
    assert len(validation.views) == 8
    assert not torch.equal(views, batches.draw(1, 8, np.random.default_rng(0))[0])


def paper_like(spec: PatchNetSpec, lambda_m: float) -> DistillConfig:
    """The paper's schedule but for its size."""
    small = replace(
        paper_schedule(spec), steps=2, batch_views=8, validation_views=8, validation_share=0.3, lambda_m=lambda_m
    )
    return replace(small, recipe=replace(small.recipe, side_px=spec.patch + 2 * small.room_px))


def test_metric_learning_alone_pulls_shifted_patches_together(
    tmp_path: Path, photographs: Photographs, backbone: LoadedBackbone
) -> None:
    """Without L_k the descriptors learn from L_m, and the decoder still tells how much of P they hold."""
    run = Distillation(
        config(steps=60, lambda_k=0.0, lambda_m=1.0, learning_rate=1e-2, layers=("layer1",)), photographs, backbone
    )

    run.run(tmp_path / "c", validate_every=5)

    course = [row["triplet"] for row in run.history]
    assert np.mean(course[-4:]) < 0.8 * np.mean(course[:2])
    assert 0.0 < run.history[-1]["validation"] < 1.1


def test_a_constant_rate_stays_and_a_cosine_falls(photographs: Photographs, backbone: LoadedBackbone) -> None:
    """The paper states no decay and no warm-up."""
    constant = Distillation(config(rate="constant", warmup_steps=0), photographs, backbone)
    cosine = Distillation(config(), photographs, backbone)

    rates = []
    for step in range(6):
        constant.step = cosine.step = step
        rates.append((constant.learning_rate(), cosine.learning_rate()))

    assert {rate for rate, _ in rates} == {2e-3}
    assert rates[0][1] == pytest.approx(1e-3) and rates[5][1] < 0.1 * rates[1][1]


@pytest.mark.parametrize("changes", [{}, {"views": 0}, {"lambda_m": 1.0, "exposure": 0.2}])
def test_a_killed_run_resumes_to_the_same_weights(
    tmp_path: Path, photographs: Photographs, backbone: LoadedBackbone, changes: dict[str, object]
) -> None:
    """Stopped after 3 of 6 steps and resumed by a new process's objects: bit for bit the undisturbed run."""
    whole = Distillation(config(**changes), photographs, backbone)
    whole.run(tmp_path / "whole")

    stopped = Distillation(config(**changes), photographs, backbone)
    assert not stopped.run(tmp_path / "c", stopped=lambda: stopped.step == 3)
    resumed = Distillation(config(**changes), photographs, backbone)
    resumed.resume(tmp_path / "c")

    assert resumed.step == 3
    assert resumed.run(tmp_path / "c")
    for name, tensor in whole.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], tensor)


def test_resume_refuses_a_run_of_another_kind(
    tmp_path: Path, photographs: Photographs, backbone: LoadedBackbone
) -> None:
    """Other settings, other photographs, another P, or a finished teacher: named, never silently mixed."""
    run = Distillation(config(), photographs, backbone)
    run.save(tmp_path / "c")
    run.publish(tmp_path / "t.safetensors")

    others = {
        "its config differs": Distillation(config(seed=2), photographs, backbone),
        "its photographs differs": Distillation(config(), replace(photographs, digest="x"), backbone),
        "its backbone_sha256 differs": Distillation(config(), photographs, replace(backbone, sha256="x")),
    }
    for message, other in others.items():
        with pytest.raises(TrainingError, match=message):
            other.resume(tmp_path / "c")
    with pytest.raises(TrainingError, match="its kind differs"):
        run.resume(tmp_path / "t.safetensors")


def test_views_too_small_for_a_patch_are_refused(photographs: Photographs, backbone: LoadedBackbone) -> None:
    """Before any work, with the sizes."""
    small = config(spec=TINY_65, recipe=ViewRecipe(96, (96, 160)))

    with pytest.raises(TrainingError, match=r"view of 96 px less a margin of 32 px .* no patch of 65 px"):
        Distillation(small, photographs, backbone)


def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(
    tmp_path: Path, photographs: Photographs, backbone: LoadedBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is not a number is an error in words; nothing poisoned is saved."""
    run = Distillation(config(), photographs, backbone)
    run.save(tmp_path / "c")
    monkeypatch.setattr(distill_module, "knowledge_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))

    with pytest.raises(TrainingError, match="diverged at step 1"):
        run.run(tmp_path / "c")
    assert load_checkpoint(tmp_path / "c").metadata["step"] == 0


def test_p_runs_once_for_a_kept_cache_and_again_for_another_recipe(
    tmp_path: Path, photographs: Photographs, backbone: LoadedBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder prepared for exactly this run is reused; any change of what it depends on prepares it anew."""
    asked: list[int] = []
    cut: Callable[..., np.ndarray] = cut_view

    def counted(*given: object) -> np.ndarray:
        asked.append(1)
        return cut(*given)

    monkeypatch.setattr("trainer.target_cache.cut_view", counted)
    costs = []
    for changes in ({}, {}, {"magnify": 2}):
        asked.clear()
        Distillation(config(steps=1, **changes), photographs, backbone, cache=tmp_path / "cache").run(tmp_path / "c")
        costs.append(len(asked))

    assert costs == [64 + 16 + 8, 64, 64 + 16 + 8]  # 64 views for the statistics, then training and validation


def test_a_published_teacher_is_read_back_with_its_decoder(
    tmp_path: Path, photographs: Photographs, backbone: LoadedBackbone
) -> None:
    """Network and decoder survive; the network is frozen and the card names every deviation."""
    run = Distillation(config(), photographs, backbone)
    run.run(tmp_path / "c")
    digest = run.publish(tmp_path / "t.safetensors")

    teacher = load_teacher(tmp_path / "t.safetensors")

    assert (teacher.name, teacher.spec, teacher.sha256) == ("t", TINY, digest)
    assert teacher.decoder_weight.shape == (192, 4) and teacher.decoder_bias.shape == (192,)
    assert not teacher.net.training and not any(p.requires_grad for p in teacher.net.parameters())
    pixels = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(teacher.net(pixels), run.net(pixels))
    card = make_card(run)
    assert card["finished"] and card["steps"] == 6 and any("mode map" in line for line in card["deviations"])


@pytest.mark.parametrize("profile", ["line", "paper-33", "pdn-s"])
def test_half_precision_halves_the_file_and_hardly_moves_a_descriptor(
    tmp_path: Path, photographs: Photographs, backbone: LoadedBackbone, profile: str
) -> None:
    """fp16 on disk, fp32 in memory: descriptors within a hundredth; the file is half as large."""
    whole, half = (
        Distillation(config(spec=PROFILES[profile], half=half), photographs, backbone) for half in (False, True)
    )
    whole.publish(tmp_path / "whole.safetensors")
    half.publish(tmp_path / "half.safetensors")
    first, second = (load_teacher(tmp_path / f"{name}.safetensors") for name in ("whole", "half"))
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    expected, found = first.net(pixels), second.net(pixels)

    assert {parameter.dtype for parameter in second.net.parameters()} == {torch.float32}
    assert second.decoder_weight.dtype == torch.float32
    assert 0.0 < float((found - expected).norm() / expected.norm()) < 1e-2
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] / sizes[1] == pytest.approx(0.5, abs=0.01)


def test_three_teachers_of_the_papers_width_are_small_enough_to_ship(
    tmp_path: Path, photographs: Photographs, backbone: LoadedBackbone
) -> None:
    """p = 17, 33 and 65 in half precision, decoders included: under 20 MB together."""
    total = 0
    for patch in (17, 33, 65):
        shape = paper_schedule(PROFILES[f"paper-{patch}"])
        Distillation(shape, photographs, backbone).publish(tmp_path / "t.safetensors")
        total += (tmp_path / "t.safetensors").stat().st_size

    assert 10e6 < total < 20e6


def test_the_shipped_teacher_loads_and_describes() -> None:
    """`line` is package data: 64 x 64 descriptors of 32 numbers for a padded 256 px image, each of them alive."""
    teacher = load_teacher("line")
    torch.manual_seed(0)

    descriptors = teacher.net(torch.randn(1, 3, 284, 284))

    assert teacher.spec == PROFILES["line"] and descriptors.shape == (1, 32, 64, 64)
    assert float(descriptors.std(dim=(0, 2, 3)).min()) > 1e-3
    assert teacher.card["sha256"] == teacher.sha256


def test_what_is_not_a_teacher_is_refused(tmp_path: Path) -> None:
    """An unknown name lists what is shipped; another checkpoint says what it is."""
    save_checkpoint(tmp_path / "s.safetensors", {"a": torch.zeros(1)}, {"kind": "students"})

    with pytest.raises(TrainingError, match=r"no teacher named 'door'; shipped: .*line.*; check the name"):
        load_teacher("door")
    with pytest.raises(TrainingError, match="kind 'students', not a teacher"):
        load_teacher(tmp_path / "s.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "t.pt"], "say t.safetensors"),
        (["--out", "t.safetensors", "--profile", "wide"], "unknown; choose one of line"),
        (["--out", "t.safetensors", "--steps", "3", "--minutes", "1"], "give one of them"),
        (["--out", "t.safetensors", "--backbone", "vgg"], "choose one of resnet18, efficientnet-lite0"),
        (["--out", "t.safetensors", "--rate", "linear"], "choose cosine or constant"),
        (["--out", "t.safetensors", "--lambda-k", "0", "--lambda-c", "0"], "one above it"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(tmp_path: Path, arguments: list[str], message: str) -> None:
    """Wrong options end before any work, with the next step in the message."""
    result = run_command(["--images", str(tmp_path), *arguments])

    assert isinstance(result, KizuError) and message in str(result)


def test_every_option_reaches_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not given stays None, so that the profile's default holds."""
    seen: list[dict[str, object]] = []

    def caught(profile: str, backbone: str, given: dict[str, object]) -> DistillConfig:
        seen.append({name: value for name, value in given.items() if value is not None})
        raise CommandError("enough")

    monkeypatch.setattr("trainer.distill_config.configure", caught)
    base = ["--images", str(tmp_path), "--out", "t.safetensors"]
    run_command(base)
    run_command([
        *base, "--target", "patch", "--layers", "a,b", "--magnify", "2", "--minutes", "3", "--seed", "4",
        "--views", "0", "--batch", "5", "--sampling", "6", "--learning-rate", "0.1", "--rate", "constant",
        "--lambda-k", "2", "--lambda-m", "3", "--lambda-c", "4", "--exposure", "0.5", "--gray", "0.6", "--half",
    ])  # fmt: skip

    assert seen[0] == {"seed": 1}
    assert seen[1] == {
        "target": "patch", "layers": ("a", "b"), "magnify": 2, "minutes": 3.0, "seed": 4, "views": 0, "batch_views": 5,
        "sampling_px": 6, "learning_rate": 0.1, "rate": "constant", "lambda_k": 2.0, "lambda_m": 3.0, "lambda_c": 4.0,
        "exposure": 0.5, "gray_share": 0.6, "half": True,
    }  # fmt: skip


def test_the_command_writes_teacher_and_card(
    tmp_path: Path, photographs: Photographs, backbone: LoadedBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps on twelve pictures; then the unfinished file of another run in the way is an error, not overwritten."""
    for name, image in zip(photographs.names, photographs.images, strict=True):
        cv2.imwrite(str(tmp_path / name), image)
    monkeypatch.setattr("trainer.backbones.load_backbone", lambda *_: backbone)
    monkeypatch.setattr("trainer.distill_config.configure", lambda *given: config(steps=given[2]["steps"]))
    out = tmp_path / "out" / "t.safetensors"

    assert run_command(["--images", str(tmp_path), "--out", str(out), "--steps", "2"]) is None

    assert load_teacher(out).card["steps"] == 2
    assert sorted(path.name for path in out.parent.iterdir()) == ["t.json", "t.safetensors"]
    working_path(out).touch()
    assert isinstance(run_command(["--images", str(tmp_path), "--out", str(out), "--steps", "2"]), CommandError)


def run_command(arguments: list[str]) -> BaseException | None:
    """Run `kizu distill` in this process and return what it raised, if anything."""
    app = Typer()
    app.command()(distill)
    return CliRunner().invoke(app, arguments).exception
