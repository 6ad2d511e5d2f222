"""FCDD: formulas against brute force, confetti and its masks, and the whole way on real photographs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from edge.bundle import InputSpec, check_golden
from edge.engines.registry import open_engine
from edge.errors import CommandError, DataError, TrainingError
from edge.graph import lint
from edge.images import encode_png
from trainer.augment import Augment, augmented
from trainer.backbones import ResNet18, load_backbone
from trainer.confetti import with_confetti
from trainer.config import Schedule
from trainer.configs.fcdd import CONFETTI, PRESETS, RECOMMENDED, FcddConfig
from trainer.data import load_training_set
from trainer.export import BundleFacts, export_bundle
from trainer.fcdd_nets import Enlargement, FcddNet, Field, Network, ResNetLayer, paper_net, random_resnet, resnet_net
from trainer.fcdd_objective import fcdd_loss, pixel_loss, pseudo_huber
from trainer.heatmap import spreading
from trainer.loop import run_training
from trainer.method import Batch, Frames
from trainer.methods.fcdd import Fcdd

PHOTOS = Path(__file__).parents[3] / "edge" / "demo" / "photos"
SMALL = replace(CONFETTI, size_px=128, trunk="line", batch_size=4)


@pytest.fixture(scope="module")
def photos() -> Frames:
    return load_training_set(PHOTOS, size_px=128, aspect="stretch", skip_bad=False).take(np.arange(12))


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_the_pseudo_huber_map_is_the_papers() -> None:
    """A few values by hand; never negative."""
    values = torch.tensor([0.0, 1.0, -1.0, math.sqrt(3.0), 100.0])

    assert pseudo_huber(values).tolist() == pytest.approx([0.0, math.sqrt(2) - 1, math.sqrt(2) - 1, 1.0, 99.005], 1e-4)


def test_the_loss_is_equation_4_by_brute_force() -> None:
    """Two good images and an anomaly, term by term in Python."""
    maps = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) + 0.1
    bad = torch.tensor([0.0, 1.0, 0.0])
    means = [float(one.mean()) for one in maps]

    expected = (means[0] - math.log(1 - math.exp(-means[1])) + means[2]) / 3
    assert float(fcdd_loss(maps, bad)) == pytest.approx(expected, rel=1e-5)


def test_the_loss_with_masks_is_equation_5_by_brute_force() -> None:
    """The logarithm is left out for images without a flawed pixel."""
    spread = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1)) + 0.1
    masks = torch.zeros(2, 4, 4)
    masks[1, :2, 1] = 1
    good = [float(((1 - mask) * one).sum()) / 16 for one, mask in zip(spread, masks, strict=True)]
    inside = float((masks[1] * spread[1]).sum()) / 16

    expected = (good[0] + good[1] - math.log(1 - math.exp(-inside))) / 2
    assert float(pixel_loss(spread, masks)) == pytest.approx(expected, rel=1e-5)


def test_an_anomaly_that_looks_perfectly_good_costs_a_finite_much_and_pulls() -> None:
    """a near 0: log(1 - exp(-a)) would be log(0) in float32; the gradient must point away from zero."""
    maps = torch.full((1, 2, 2), 1e-12, requires_grad=True)

    loss = fcdd_loss(maps, torch.ones(1))
    loss.backward()  # type: ignore[no-untyped-call]

    assert math.isfinite(float(loss.detach())) and float(loss.detach()) > 20
    assert maps.grad is not None and bool((maps.grad < 0).all())


@pytest.mark.parametrize(("value", "term"), [(float("nan"), "good"), (float("inf"), "good")])
def test_a_term_that_is_no_number_is_named(value: float, term: str) -> None:
    """Before the step is taken, so that the checkpoint stays good."""
    with pytest.raises(TrainingError, match=f"{term} term became"):
        fcdd_loss(torch.full((1, 2, 2), value), torch.zeros(1))


@pytest.mark.parametrize("jump", [1, 2, 4, 8])
def test_the_two_products_are_the_papers_transposed_convolution(jump: int) -> None:
    """A fixed Gaussian of the field's size, peak 1, at every cell, cut to the frame: equal to 1e-5."""
    field, sigma, cells, side = 31, 6.0, 9, 8 * jump + 31
    taps = torch.exp(-0.5 * ((torch.arange(field) - (field - 1) / 2) / sigma) ** 2)
    coarse = torch.rand(1, 1, cells, cells, generator=torch.Generator().manual_seed(2))
    reference = torch.nn.functional.conv_transpose2d(coarse, torch.outer(taps, taps)[None, None], stride=jump)

    spread = spreading(cells, offset=(field - 1) / 2, jump=jump, field=field, sigma=sigma, at=np.arange(side))

    assert reference.shape[2:] == (side, side)
    torch.testing.assert_close(spread @ coarse[0, 0] @ spread.T, reference[0, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("field", "cells", "side", "network"), [(62, 8, 64, "vgg"), (22, 8, 32, "cnn32"), (16, 7, 28, "cnn28")]
)
def test_the_authors_kernel_for_an_even_field_is_theirs(field: int, cells: int, side: int, network: Network) -> None:
    """The Gaussian of one tap less with its middle tap split in two, transposed, cropped to the field's place."""
    sigma, seen = 5.0, paper_net(network, 0).field
    odd = torch.exp(-0.5 * ((torch.arange(field - 1) - (field - 2) // 2) / sigma) ** 2)
    middle = (field - 2) // 2
    taps = torch.cat([odd[:middle], odd[middle : middle + 1] / 2, odd[middle : middle + 1] / 2, odd[middle + 1 :]])
    coarse = torch.rand(1, 1, cells, cells, generator=torch.Generator().manual_seed(2))
    whole = torch.nn.functional.conv_transpose2d(coarse, torch.outer(taps, taps)[None, None], stride=seen.stride_px)
    crop = (field - 1) // 2 - math.floor(seen.start_px)
    at = np.arange(side)

    spread = spreading(
        seen.cells(side), offset=seen.start_px, jump=seen.stride_px, field=seen.size_px, sigma=sigma, at=at,
        kernel="authors",
    )  # fmt: skip

    assert (seen.size_px, seen.cells(side)) == (field, cells)
    torch.testing.assert_close(
        spread @ coarse[0, 0] @ spread.T, whole[0, 0, crop : crop + side, crop : crop + side], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("network", "side", "cells", "size", "stride"),
    [("cnn28", 28, 7, 16, 4), ("cnn32", 32, 8, 22, 4), ("vgg", 64, 8, 62, 8)],
)
def test_the_networks_have_the_published_fields(
    network: Network, side: int, cells: int, size: int, stride: int
) -> None:
    """Shapes against the network's own answer, and the field against what one answer's gradient reaches."""
    net = paper_net(network, 0).eval()
    frames = torch.zeros(1, 3 * size, 3 * size, 1, dtype=torch.uint8)

    assert net(frames[:, :side, :side]).shape == (1, cells, cells)
    assert (net.field.size_px, net.field.stride_px, net.field.cells(side)) == (size, stride, cells)
    middle = net.field.cells(3 * size) // 2
    center = net.field.start_px + middle * stride
    reached = _reach(net, 3 * size, middle)
    assert reached == (center - (size - 1) / 2, center + (size - 1) / 2)


def _reach(net: FcddNet, side: int, cell: int) -> tuple[int, int]:
    """First and last row whose pixels move one answer: a bound on the field from outside its arithmetic."""
    noise = torch.randint(0, 256, (1, side, side, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = net.normalize(noise).requires_grad_(True)
    for layer in net.trunk.modules():  # every pixel must count: averages let all through where maxima choose one
        if isinstance(layer, nn.LeakyReLU | nn.ReLU):
            layer.inplace = False
    swapped = nn.Sequential(*(
        nn.AvgPool2d(2) if isinstance(layer, nn.MaxPool2d)
        else nn.Identity() if isinstance(layer, nn.ReLU) else layer
        for layer in net.trunk
    ))  # fmt: skip
    return _moved_rows(net.head(swapped(pixels))[0, 0, cell, cell], pixels)


def _moved_rows(answer: torch.Tensor, pixels: torch.Tensor) -> tuple[int, int]:
    answer.backward()  # type: ignore[no-untyped-call]
    assert pixels.grad is not None
    rows = torch.nonzero(pixels.grad[0].abs().sum((0, 2)))[:, 0]
    return int(rows[0]), int(rows[-1])


@pytest.mark.parametrize(
    ("layer", "enlarge", "size", "stride"),
    [
        ("layer1", 1, 43, 4), ("layer2", 1, 99, 8), ("layer3", 1, 211, 16),
        ("layer1", 4, 12, 1), ("layer2", 2, 51, 4), ("layer2", 4, 26, 2), ("layer3", 4, 54, 4),
    ],
)  # fmt: skip
def test_a_residual_network_sees_what_its_longest_path_sees(
    layer: ResNetLayer, enlarge: int, size: int, stride: int
) -> None:
    """Field and centers against the pixels that move one answer, as they are and read through an enlargement."""
    side = 3 * size + (-3 * size) % 16
    net = resnet_net(_all_through(), layer, 0, 0, enlarge=enlarge, side_px=side).eval()
    field = net.field
    middle = field.cells(side) // 2
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0), requires_grad=True)
    averaged = [
        nn.Sequential(part.get_submodule("0"), nn.AvgPool2d(3, 2, 1)) if place == 0 else part
        for place, part in enumerate(net.trunk)
    ]

    answers = net.head(nn.Sequential(*averaged)(net.enlarge(pixels)))[0, 0]
    first, last = _moved_rows(answers[middle, middle], pixels)

    assert (field.size_px, field.stride_px, field.cells(side)) == (size, stride, len(answers))
    assert last - first + 1 == size
    center = field.start_px + middle * stride  # of an enlarged frame it may lie between two pixels
    assert abs((first + last) / 2 - center) < 0.5 and (enlarge > 1 or (first + last) / 2 == center)


def _all_through() -> ResNet18:
    """ResNet-18 with positive weights: no answer of a ReLU is cut off, so every pixel of the field counts."""
    net = ResNet18()
    for parameter in net.parameters():
        nn.init.uniform_(parameter, 0.01, 0.02)
    return net


def test_control_the_way_through_the_shortcuts_would_be_too_small_a_field() -> None:
    """Planted bug: the shortcuts' strides counted as well, as a walk over all layers would."""
    net = resnet_net(random_resnet(0), "layer2", 0, 0)
    walked = Field(tuple(
        (layer.kernel_size[0], layer.stride[0], layer.padding[0])  # type: ignore[misc]
        for layer in net.trunk.modules() if isinstance(layer, nn.Conv2d)
    ))  # fmt: skip

    assert (net.field.stride_px, net.field.size_px) == (8, 99)
    assert (walked.stride_px, walked.size_px) != (8, 99)


@pytest.mark.parametrize("factor", [2, 4])
def test_the_enlargement_is_the_bilinear_one_between_pixel_centers(factor: int) -> None:
    """Against torch's own, rims included."""
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    expected = nn.functional.interpolate(pixels, scale_factor=factor, mode="bilinear", align_corners=False)
    torch.testing.assert_close(Enlargement(32, factor)(pixels), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("preset", "side"), [("confetti-resnet", 128), ("cifar-resnet", 32)])
def test_imagenets_network_learns_where_it_is_not_frozen_and_is_built_for_a_line(
    photos: Frames, tmp_path: Path, preset: str, side: int
) -> None:
    """Its frozen parts are the shipped file's to the bit; its graph is run by OpenVINO and one that TensorRT takes."""
    small = np.stack([cv2.resize(one, (side, side), interpolation=cv2.INTER_AREA) for one in photos])
    config = replace(PRESETS[preset], size_px=side, photographs=str(PHOTOS / "train" / "good"), batch_size=4)
    method = Fcdd(config, seed=1)
    run_training(method, small[:8], small[8:], replace(config.schedule(8), steps=3), seed=1, identity={})
    method.fit_statistics(small[8:])
    facts = BundleFacts("fcdd", "fcdd", preset, InputSpec(side, side, 3, 4), "0" * 64, True, {})
    bundle = export_bundle(method, tmp_path / "bundle", facts, held_out=small[8:])

    shipped = load_backbone("resnet18").net
    names = ("conv1", "layer1", "layer2", "layer3")[: len(method.net.trunk)]
    for number, name in enumerate(names):
        own, theirs = (part.state_dict().values() for part in (method.net.trunk[number], getattr(shipped, name)))
        same = [torch.equal(one, other) for one, other in zip(own, theirs, strict=True)]
        assert same == [number < config.frozen] * len(same)
    assert config.frozen < len(method.net.trunk)
    assert not lint(bundle.model)
    with open_engine(bundle, backend="openvino") as engine:
        assert check_golden(bundle, engine).ok
        maps, _ = engine.infer(small[:2])
    assert maps.shape == (2, side // config.stride, side // config.stride)
    assert method.describe()["backbone"]["name"] == "resnet18"


def test_control_random_weights_are_of_the_same_shape_and_know_nothing(photos: Frames) -> None:
    """``weights=random``: other tensors from the same seed, another from another; no file is named."""
    control = replace(PRESETS["confetti-resnet"], weights="random", size_px=128)
    one, again, other = (Fcdd(control, seed=seed) for seed in (1, 1, 2))
    learned = Fcdd(PRESETS["confetti-resnet"], seed=1).net.trunk.state_dict()

    first = one.net.trunk.state_dict()
    assert {name: tensor.shape for name, tensor in first.items()} == {n: t.shape for n, t in learned.items()}
    assert torch.equal(first["0.0.weight"], again.net.trunk.state_dict()["0.0.weight"])
    assert not torch.equal(first["0.0.weight"], other.net.trunk.state_dict()["0.0.weight"])
    assert "backbone" not in one.describe()
    assert bool(torch.isfinite(one.net(torch.from_numpy(photos[:2]))).all())


def test_contrast_normalization_sees_the_same_part_at_another_exposure(photos: Frames, tmp_path: Path) -> None:
    """Gain and offset fall out, training images lie between 0 and 1, a black frame is no NaN, and the graph agrees."""
    config = FcddConfig("small", network="cnn28", normalization="contrast", size_px=64)
    small = np.ascontiguousarray(photos[:, ::2, ::2])
    method = Fcdd(config, seed=1)
    method.prepare(small)
    dim = torch.from_numpy((small[:1] // 4) * 2)
    bright = torch.from_numpy((small[:1] // 4) * 3 + 20)

    normalized = method.net.normalize(torch.from_numpy(small))
    assert (float(normalized.min()), float(normalized.max())) == pytest.approx((0.0, 1.0), abs=1e-6)
    torch.testing.assert_close(method.net.normalize(dim), method.net.normalize(bright), atol=1e-5, rtol=0)
    assert bool(torch.isfinite(method.net.normalize(torch.zeros_like(dim))).all())
    method.fit_statistics(small)
    facts = BundleFacts("fcdd", "fcdd", "small", InputSpec(64, 64, 3, 4), "0" * 64, True, {})
    bundle = export_bundle(method, tmp_path / "bundle", facts, held_out=small[8:])
    with open_engine(bundle, backend="openvino") as engine:
        assert check_golden(bundle, engine).ok


def test_control_a_gaussian_off_by_a_pixel_is_another_map() -> None:
    """Planted bug: the center of the field where its corner is."""
    right, wrong = (
        spreading(9, offset=offset, jump=4, field=31, sigma=6.0, at=np.arange(63)) for offset in (15.0, 16.0)
    )

    assert float((right - wrong).abs().max()) > 0.05


# --- confetti ---------------------------------------------------------------------------------------------------------


def test_confetti_changes_what_its_mask_says_and_nothing_far_from_it(photos: Frames) -> None:
    """Some of the image, not all of it; outside the mask at most a few gray levels."""
    for seed in range(20):
        image = photos[seed % len(photos)]
        changed, mask = with_confetti(image, np.random.default_rng(seed))

        difference = np.abs(changed.astype(int) - image).max(2)
        assert changed.shape == image.shape and changed.dtype == np.uint8
        assert 0 < mask.mean() < 0.95
        assert difference[~mask].max(initial=0) < 4 <= difference[mask].min()


def test_confetti_shows_on_black_as_well() -> None:
    """Dark blobs cannot darken black: the noise is inverted."""
    changed, mask = with_confetti(np.zeros((128, 128, 1), np.uint8), np.random.default_rng(3))

    assert changed.max() > 50 and mask.any()


def test_confetti_follows_from_its_seed(photos: Frames) -> None:
    """A resumed run draws it again."""
    one, other = (with_confetti(photos[0], np.random.default_rng(5))[0] for _ in range(2))

    np.testing.assert_array_equal(one, other)


# --- the method -------------------------------------------------------------------------------------------------------


@pytest.fixture
def flawed(tmp_path: Path, photos: Frames) -> Path:
    """Two flawed parts, each with the mask of 40 pixels."""
    mask = np.zeros((128, 128), np.uint8)
    mask[8:12, 20:30] = 255
    for place in range(2):
        (tmp_path / f"{place}.png").write_bytes(encode_png(photos[place]))
        (tmp_path / f"{place}_mask.png").write_bytes(encode_png(mask))
    return tmp_path


def test_flawed_parts_teach_with_their_masks(flawed: Path, photos: Frames) -> None:
    """Anomalies are those two alone here; the loss is the pixels', and moves the network."""
    method = Fcdd(replace(SMALL, bad=str(flawed), confetti=False, supervision="pixel"), seed=1)
    method.prepare(photos)
    frames, bad, masks = method.with_anomalies(photos, draw=5)

    assert {int(one.sum()) for one in masks} == {0, 40} and set(bad) == {0.0, 1.0}
    assert all((frame == photos[:2]).all((1, 2, 3)).any() for frame, is_bad in zip(frames, bad, strict=True) if is_bad)
    method.loss(Batch(torch.from_numpy(photos[:4]), np.arange(4), 5)).backward()  # type: ignore[no-untyped-call]
    assert method.describe()["bad"]["images"] == 2


def test_a_flawed_part_without_a_mask_counts_as_a_whole_or_is_refused(flawed: Path, photos: Frames) -> None:
    """Labels need none; learning from pixels does, and says which file is missing."""
    (flawed / "1_mask.png").unlink()
    Fcdd(replace(SMALL, bad=str(flawed)), seed=1).prepare(photos)

    with pytest.raises(DataError, match=r"no 1_mask\.png beside it"):
        Fcdd(replace(SMALL, bad=str(flawed), supervision="pixel"), seed=1).prepare(photos)


def test_photographs_stand_in_for_anomalies(photos: Frames) -> None:
    """Alone, with confetti off: every anomaly is a piece of one, and the same draw gives the same step."""
    method = Fcdd(replace(SMALL, photographs=str(PHOTOS / "train" / "good"), confetti=False), seed=1)

    frames, bad, masks = method.with_anomalies(photos, draw=2)
    again, _, _ = method.with_anomalies(photos, draw=2)

    assert 0 < bad.sum() < len(bad) and not masks.any()
    assert not any((frames[place] == photos[place]).all() for place in np.flatnonzero(bad))
    np.testing.assert_array_equal(frames, again)


def test_without_anomalies_it_says_where_to_get_them() -> None:
    """A map of zeros would be a perfect answer; the CIFAR preset has none of its own."""
    for config in (replace(SMALL, confetti=False), PRESETS["paper-cifar"]):
        with pytest.raises(CommandError, match=r"--photographs DIR.*--bad DIR.*confetti"):
            Fcdd(config, seed=1)


def test_constant_images_teach_nothing() -> None:
    """A lens cap left on."""
    with pytest.raises(DataError, match="constant"):
        Fcdd(SMALL, seed=1).prepare(np.full((8, 128, 128, 1), 7, np.uint8))


def test_a_network_that_says_the_same_of_everything_is_not_exported(photos: Frames) -> None:
    """All answers at zero: no threshold could be set on that."""
    method = Fcdd(SMALL, seed=1)
    torch.nn.init.zeros_(method.net.head.weight)
    torch.nn.init.zeros_(method.net.head.bias)  # type: ignore[arg-type]

    with pytest.raises(TrainingError, match="says the same of everything"):
        method.fit_statistics(photos)


def test_frames_smaller_than_the_network_sees_are_refused() -> None:
    """Before an image is read."""
    with pytest.raises(CommandError, match="sees 60 px"):
        Fcdd(replace(CONFETTI, size_px=48), seed=1)


def test_the_cifar_preset_learns_on_small_photographs_and_is_exported(photos: Frames, tmp_path: Path) -> None:
    """Batch norm, the authors' kernel, a cell a pixel, the mean as the score, in the line's engine."""
    small = np.stack([cv2.resize(one, (32, 32), interpolation=cv2.INTER_AREA) for one in photos])
    config = replace(PRESETS["paper-cifar"], photographs=str(PHOTOS / "train" / "good"), batch_size=4)
    assert isinstance(config, FcddConfig)
    method = Fcdd(config, seed=1)
    method.prepare(small)
    run_training(method, small[:8], small[8:], replace(config.schedule(8), steps=3), seed=1, identity={})
    method.fit_statistics(small[8:])
    facts = BundleFacts("fcdd", "fcdd", "paper-cifar", InputSpec(32, 32, 3, 4), "0" * 64, True, {})
    bundle = export_bundle(method, tmp_path / "bundle", facts, held_out=small[8:])

    with open_engine(bundle, backend="openvino") as engine:
        maps, scores = engine.infer(small[:2])
    assert maps.shape == (2, 32, 32)
    np.testing.assert_allclose(scores, maps.mean((1, 2)), rtol=1e-4, atol=1e-4)


def test_the_authors_stages_are_a_tenth_and_a_hundredth() -> None:
    """Epochs 400 and 500 of 600."""
    schedule = Schedule(steps=600, batch_size=1, learning_rate=1e-3, weight_decay=0.0, decay="tenths")

    assert [schedule.rate_at(step) for step in (0, 399, 400, 499, 500, 599)] == pytest.approx(
        [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5]
    )


@pytest.mark.parametrize("kind", ["light", "views"])
def test_augmentation_keeps_a_part_a_part(photos: Frames, kind: Augment) -> None:
    """The same draw, the same picture; brightness within a few percent, and only `views` moves anything."""
    one, again, other = (augmented(photos[0], kind, np.random.default_rng(seed)) for seed in (1, 1, 2))

    assert one.shape == photos[0].shape and one.dtype == np.uint8
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert abs(float(one.mean()) - float(photos[0].mean())) < 0.08 * float(photos[0].mean())


def test_frozen_layers_stay_as_the_teacher_has_them_and_the_others_move(photos: Frames) -> None:
    """Two convolutions are the teacher's to the bit after training."""
    method = Fcdd(SMALL, seed=1)
    before = [parameter.clone() for parameter in method.net.trunk.parameters()]
    schedule = replace(SMALL.schedule(len(photos)), steps=3)

    run_training(method, photos, photos, schedule, seed=1, identity={})

    moved = [not torch.equal(one, other) for one, other in zip(before, method.net.trunk.parameters(), strict=True)]
    assert moved == [False] * 4 + [True] * (len(moved) - 4)


@pytest.mark.parametrize("preset", ["confetti", "confetti-masks"])
def test_training_lowers_the_loss_and_the_bundle_marks_planted_confetti(
    photos: Frames, tmp_path: Path, preset: str
) -> None:
    """Forty steps on twelve photographs, exported, checked against torch, and run by OpenVINO."""
    config = replace(PRESETS[preset], size_px=128, trunk="line", batch_size=4)
    method = Fcdd(config, seed=1)
    outcome = run_training(method, photos[:8], photos[8:], replace(config.schedule(8), steps=40), seed=1, identity={})
    method.fit_statistics(photos[8:])
    facts = BundleFacts("fcdd", "fcdd", preset, InputSpec(128, 128, 3, 4), "0" * 64, True, {})
    bundle = export_bundle(method, tmp_path / "bundle", facts, held_out=photos[8:])

    with open_engine(bundle, backend="openvino") as engine:
        check_golden(bundle, engine, require=True)
        bad, mask = with_confetti(photos[9], np.random.default_rng(1))
        maps, _ = engine.infer(bad[None])
    cells = mask.reshape(32, 4, 32, 4).mean((1, 3))
    assert outcome.curve[-1].loss < outcome.curve[0].loss
    assert maps[0][cells > 0.5].mean() > maps[0][cells == 0].mean() + 0.5


def test_control_labels_drawn_at_random_teach_nothing(photos: Frames) -> None:
    """The planted control of the issue: the same images under shuffled labels do not get apart."""
    found = {}
    for labels in ("true", "random"):
        config = replace(SMALL, labels=labels)  # type: ignore[arg-type]
        method = Fcdd(config, seed=1)
        run_training(method, photos, photos, replace(config.schedule(12), steps=80), seed=1, identity={})
        with torch.no_grad():
            good = pseudo_huber(method.net(torch.from_numpy(photos))).mean()
            confetti = np.stack([with_confetti(one, np.random.default_rng(i))[0] for i, one in enumerate(photos)])
            found[labels] = float(pseudo_huber(method.net(torch.from_numpy(confetti))).mean() / good)

    assert found["true"] > 1.3 * found["random"]


def test_anomalies_follow_from_the_steps_own_draw(photos: Frames) -> None:
    """The same draw, the same loss; another, another."""
    method = Fcdd(SMALL, seed=1)
    frames = torch.from_numpy(photos[:4])

    same = [float(method.loss(Batch(frames, draw=7)).detach()) for _ in range(2)]

    assert same[0] == same[1] != float(method.loss(Batch(frames, draw=8)).detach())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anomaly_share": 0.0}, "without anomalies a map of zeros is perfect"),
        ({"anomaly_share": 1.0}, "without good images"),
        ({"sigma": 0.0}, "sigma must be a positive"),
        ({"stride": 0}, "stride = 0"),
        ({"supervision": "pixel", "photographs": "photos"}, "photographs have none"),
        ({"supervision": "pixel", "augment": "views"}, "moves images and not their masks"),
        ({"supervision": "pixel", "labels": "random"}, "supervision = pixel has none"),
        ({"normalization": "contrast"}, "know the fixed one only"),
        ({"weights": "imagenet"}, "patch takes teacher or random"),
        ({"network": "resnet"}, "resnet imagenet or random"),
        ({"enlarge": 2}, "above 1 only with network = resnet"),
        ({"network": "resnet", "weights": "imagenet", "enlarge": 3}, "expected one of 1, 2, 4"),
        ({"network": "resnet", "weights": "imagenet", "kernel": "authors", "stride": 1}, "fields of an even side"),
        ({"kernel": "authors"}, "a stride of 4 falls between"),
    ],
)
def test_settings_that_cannot_teach_are_refused(changes: dict[str, object], message: str) -> None:
    """Before an image is read."""
    with pytest.raises(CommandError, match=message):
        replace(CONFETTI, **changes)  # type: ignore[arg-type]


def test_a_missing_trunk_is_told_with_those_that_are_shipped() -> None:
    """As for student-teacher."""
    with pytest.raises(TrainingError, match="shipped: "):
        Fcdd(replace(SMALL, trunk="vgg11"), seed=1)


def test_the_recommended_preset_is_the_first() -> None:
    """`kizu train fcdd` alone takes that."""
    assert next(iter(PRESETS)) == RECOMMENDED
