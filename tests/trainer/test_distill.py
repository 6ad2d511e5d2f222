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
from trainer.distill import (
    Distillation,
    DistillConfig,
    load_teacher,
)
from trainer.distill_command import distill, working_path
from trainer.distill_losses import correlation_loss, knowledge_loss, varied_exposure
from trainer.patch_nets import PROFILES, PatchNetSpec
from trainer.photographs import Photographs, ViewRecipe, cut_view, hold_out, read_photographs
from trainer.targets import MapTarget, PatchTarget
from trainer.teacher_card import make_card

TINY = PatchNetSpec(33, (4, 4, 4), 4)


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


def test_a_killed_run_resumes_to_the_same_weights(
    tmp_path: Path, photographs: Photographs, backbone: LoadedBackbone
) -> None:
    """Stopped after 3 of 6 steps and resumed by a new process's objects: bit for bit the undisturbed run."""
    whole = Distillation(config(), photographs, backbone)
    whole.run(tmp_path / "whole")

    stopped = Distillation(config(), photographs, backbone)
    assert not stopped.run(tmp_path / "c", stopped=lambda: stopped.step == 3)
    resumed = Distillation(config(), photographs, backbone)
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

    with pytest.raises(TrainingError, match="no teacher named 'door'; shipped: line"):
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
    ],
)
def test_the_command_refuses_what_it_cannot_do(tmp_path: Path, arguments: list[str], message: str) -> None:
    """Wrong options end before any work, with the next step in the message."""
    result = run_command(["--images", str(tmp_path), *arguments])

    assert isinstance(result, KizuError) and message in str(result)


def test_the_command_writes_teacher_and_card(
    tmp_path: Path, photographs: Photographs, backbone: LoadedBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps on twelve pictures; then the unfinished file of another run in the way is an error, not overwritten."""
    for name, image in zip(photographs.names, photographs.images, strict=True):
        cv2.imwrite(str(tmp_path / name), image)
    monkeypatch.setattr("trainer.backbones.load_backbone", lambda *_: backbone)
    monkeypatch.setattr("trainer.distill.DistillConfig", lambda **given: config(steps=given["steps"]))
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
