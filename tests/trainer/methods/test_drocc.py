"""DROCC on frames: what it learns from, what is exported, what is refused; a few steps on the shipped photographs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from edge.bundle import InputSpec, check_golden, open_bundle
from edge.engines.registry import open_engine
from edge.errors import CommandError, DataError, TrainingError
from edge.images import encode_png
from trainer.configs.drocc import DENSE, PAPER, PAPER_FRAMES, PRESETS, RECOMMENDED, DroccConfig
from trainer.data import load_training_set
from trainer.export import BundleFacts, export_bundle, to_onnx
from trainer.loop import run_training
from trainer.method import Batch, Frames
from trainer.methods.drocc import Drocc, DroccLf, random_patches
from trainer.negatives import BadPatches

PHOTOS = Path(__file__).parents[3] / "edge" / "demo" / "photos"
SIDE = 92
TINY = replace(DENSE, size_px=SIDE, crops=2, batch_size=4, ascent_steps=2, max_steps=4, min_steps=4)
TINY_GRID = replace(PAPER_FRAMES, size_px=SIDE, crops=2, batch_size=4, ascent_steps=2, max_steps=4, min_steps=4)
REFUSED_BY_TENSORRT = {"NonZero", "DFT", "If", "Loop", "Scan", "Resize", "TopK"}


@pytest.fixture(scope="module")
def photos() -> Frames:
    """Twelve of the shipped good parts (12, 92, 92, C)."""
    return load_training_set(PHOTOS, size_px=SIDE, aspect="stretch", skip_bad=False).frames[:12]


@pytest.fixture
def bad_folder(tmp_path: Path) -> Path:
    """Three color images with a bright square, and masks that say where."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 90, (SIDE, SIDE, 3), np.uint8)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[10 + number : 16, 70:76] = 255
        pixels[mask > 0] = 250
        (folder / f"{number}.png").write_bytes(encode_png(pixels))
        (folder / f"{number}_mask.png").write_bytes(encode_png(mask))
    return folder


def trained(config: DroccConfig, frames: Frames, kind: type[Drocc] = Drocc) -> Drocc:
    method = kind(config, seed=1)
    method.prepare(frames[:8])
    run_training(method, frames[:8], frames[8:], config.schedule(8), seed=1, identity={})
    method.fit_statistics(frames[8:])
    return method


def facts(method: Drocc, frames: Frames) -> BundleFacts:
    spec = InputSpec(height=frames.shape[1], width=frames.shape[2], channels=3, max_batch=4)
    provenance = {"method": method.describe()}
    return BundleFacts("tiny", method.name, method.config.preset, spec, "d" * 64, True, provenance)


@pytest.mark.parametrize("config", [TINY, TINY_GRID], ids=["dense", "paper"])
def test_photographs_become_a_bundle_that_openvino_scores_as_torch_does(
    tmp_path: Path, photos: Frames, config: DroccConfig
) -> None:
    """Train, export, open, score: both networks through the whole chain."""
    method = trained(config, photos)
    export_bundle(method, tmp_path / "tiny", facts(method, photos), held_out=photos[8:])

    bundle = open_bundle(tmp_path / "tiny")

    with open_engine(bundle, backend="openvino") as engine:
        assert check_golden(bundle, engine, require=True).ok
        maps, scores = engine.infer(np.ascontiguousarray(photos[:3]))
    expected = method.deployed(3).eval()(torch.from_numpy(photos[:3]))[0].numpy()
    np.testing.assert_allclose(maps, expected, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(scores, maps.max((1, 2)), rtol=1e-6)
    assert maps.shape[1:] == (bundle.manifest.map.height, bundle.manifest.map.width)
    assert bundle.provenance["method"]["radius"] == pytest.approx((3 * config.patch_px**2) ** 0.5 / 4)


@pytest.mark.parametrize("config", [TINY, TINY_GRID], ids=["dense", "paper"])
def test_a_cell_of_the_map_is_the_networks_answer_to_the_patch_around_it(photos: Frames, config: DroccConfig) -> None:
    """The geometry in the manifest, checked on pixels."""
    method = trained(config, photos)
    frame = torch.from_numpy(photos[:1].copy())
    cells = method.deployed(3).eval()(frame)[0][0]
    geometry = method.map_geometry(SIDE, SIDE)
    method.net.eval()

    assert cells.shape == (geometry.height, geometry.width)
    for i, j in ((0, 0), (1, 2), (geometry.height - 1, geometry.width - 1)):
        y = round(geometry.offset_y + i * geometry.stride - (config.patch_px - 1) / 2)
        x = round(geometry.offset_x + j * geometry.stride - (config.patch_px - 1) / 2)
        with torch.no_grad():
            logit = method.net(method.normalized(frame[:, y : y + config.patch_px, x : x + config.patch_px]))
        expected = (-float(logit) - method.statistics["mu"]) / method.statistics["sigma"]
        assert float(cells[i, j]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("config", [TINY, TINY_GRID], ids=["dense", "paper"])
def test_the_graph_holds_nothing_of_the_adversary_and_nothing_that_tensorrt_refuses(
    photos: Frames, config: DroccConfig
) -> None:
    """One cast, convolutions, poolings, products; N dynamic."""
    method = trained(config, photos)

    graph = onnx.load_from_string(to_onnx(method.deployed(3).eval(), facts(method, photos).input)).graph

    assert not {node.op_type for node in graph.node} & (REFUSED_BY_TENSORRT | {"RandomNormalLike"})
    assert [node.op_type for node in graph.node if "frames" in node.input] == ["Cast"]
    assert all(
        attribute.i == 1 or set(attribute.ints) == {1}
        for node in graph.node if node.op_type == "MaxPool"
        for attribute in node.attribute if attribute.name == "dilations"
    )  # fmt: skip


def test_a_whole_crop_gives_one_answer(photos: Frames) -> None:
    """The paper's own setting: the frame is the crop, the map has one cell and equals the score."""
    small = np.ascontiguousarray(photos[:, :32, :32])
    method = trained(replace(PAPER, batch_size=4, ascent_steps=1, max_steps=2), small)

    maps, scores = method.deployed(3).eval()(torch.from_numpy(small[:2]))

    assert maps.shape == (2, 1, 1) and torch.equal(maps[:, 0, 0], scores)


def test_the_same_seed_and_draw_give_the_same_loss_and_the_held_out_loss_changes_nothing(photos: Frames) -> None:
    """What a resumed run rests on: patches and adversaries follow from the batch alone."""
    places = np.arange(4)
    one, two = Drocc(TINY, seed=3), Drocc(TINY, seed=3)
    for method in (one, two):
        method.prepare(photos)
    batch = Batch(torch.from_numpy(photos[:4]), places, draw=7)
    before = {name: value.clone() for name, value in one.net.state_dict().items()}
    with torch.no_grad():
        one.loss(Batch(torch.from_numpy(photos[:4])))  # as the learning curve asks

    assert all(torch.equal(value, before[name]) for name, value in one.net.state_dict().items())
    assert float(one.loss(batch).detach()) == float(two.loss(batch).detach())
    assert float(one.loss(replace(batch, draw=8)).detach()) != float(two.loss(batch).detach())


def test_patches_come_from_every_place_they_fit() -> None:
    """Uniform over the frame, the borders included; a frame of the patch's side is the patch."""
    frames = torch.arange(40 * 40, dtype=torch.int32).reshape(1, 40, 40, 1)

    patches = random_patches(frames, 36, 400, torch.Generator().manual_seed(1))

    corners = {(int(p[0, 0, 0]) // 40, int(p[0, 0, 0]) % 40) for p in patches}
    assert corners == {(y, x) for y in range(5) for x in range(5)}
    assert torch.equal(random_patches(frames, 40, 9, torch.Generator()), frames)


def test_limited_negatives_learn_what_a_known_flaw_is(photos: Frames, bad_folder: Path) -> None:
    """DROCC-LF ranks unseen patches with the known flaw above all good ones, and says where the flaw came from."""
    config = replace(TINY, bad=str(bad_folder), negatives=8, max_steps=25, min_steps=25)
    method = trained(config, photos, DroccLf)
    flawed = photos[9:12].copy()
    flawed[:, 40:46, 40:46] = 250

    maps = method.deployed(3).eval()(torch.from_numpy(np.concatenate([photos[9:12], flawed])))[0]

    assert method.config.objective(3).metric == "saliency"
    assert float((maps[3:] - maps[:3]).amax((1, 2)).min()) > 0
    assert method.describe()["bad"]["images"] == 3


def test_every_bad_patch_holds_a_flawed_pixel(bad_folder: Path) -> None:
    """Drawn around the mask; a patch beside it would teach that good is bad."""
    bad = BadPatches.read(bad_folder, SIDE, 36, 3)

    patches = bad.draw(60, torch.Generator().manual_seed(1))

    assert patches.shape == (60, 36, 36, 3)
    assert bool((patches.amax((1, 2, 3)) == 250).all())
    assert len({bytes(p.numpy().tobytes()) for p in patches}) > 30


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "1_mask.png").unlink(), "1_mask.png beside it"),
        (lambda folder: (folder / "1_mask.png").write_bytes(encode_png(np.zeros((SIDE, SIDE), np.uint8))), "is empty"),
        (lambda folder: (folder / "1_mask.png").write_bytes(encode_png(np.ones((9, 9), np.uint8))), "9 x 9 px"),
        (lambda folder: (folder / "1.png").write_bytes(b"no image"), "1.png"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "no image of a bad part"),
    ],
)
def test_a_folder_of_bad_parts_that_teaches_nothing_is_refused(bad_folder: Path, spoil: Any, message: str) -> None:
    """Before the training, with the file's name."""
    spoil(bad_folder)

    with pytest.raises(DataError, match=message):
        BadPatches.read(bad_folder, SIDE, 36, 3)


def test_bad_parts_go_to_the_method_that_uses_them() -> None:
    """drocc-lf without a folder and drocc with one are both misunderstandings."""
    with pytest.raises(CommandError, match="--bad DIR"):
        DroccLf(TINY, seed=1)
    with pytest.raises(CommandError, match="train drocc-lf"):
        Drocc(replace(TINY, bad="somewhere"), seed=1)


def test_a_radius_below_rounding_and_constant_images_are_refused(photos: Frames) -> None:
    """Such a shell holds nothing but good patches: the loss could only be won by saying the same of everything."""
    with pytest.raises(DataError, match="collapses"):
        Drocc(replace(TINY, radius=0.05), seed=1).prepare(photos)
    with pytest.raises(DataError, match="constant"):
        Drocc(TINY, seed=1).prepare(np.full_like(photos, 7))


def test_a_network_that_says_the_same_of_everything_is_not_deployed(photos: Frames) -> None:
    """The score could not be normalized, and would mean nothing."""
    method = Drocc(TINY, seed=1)
    method.prepare(photos)
    torch.nn.init.zeros_(list(method.net.parameters())[-1])

    with pytest.raises(TrainingError, match="the same of everything"):
        method.fit_statistics(photos[8:])


def test_nan_stops_the_training_and_names_the_term(photos: Frames) -> None:
    """Weights of a network that diverged."""
    method = Drocc(TINY, seed=1)
    method.prepare(photos)
    torch.nn.init.constant_(list(method.net.parameters())[-1], float("nan"))

    with pytest.raises(TrainingError, match=r"NaN|term"):
        run_training(method, photos[:8], photos[8:], TINY.schedule(8), seed=1, identity={})


@pytest.mark.parametrize(
    "changes",
    [{"radius": 0.0}, {"gamma": 0.5}, {"mu": 0.0}, {"stride": 0}, {"crops": 0}, {"size_px": 20},
     {"patch_px": 40}, {"ascent_steps": -1}, {"negatives": 0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    """At once, not after the training."""
    with pytest.raises(CommandError):
        replace(TINY, **changes)


def test_every_preset_is_json_and_the_recommended_one_exists() -> None:
    """Presets are what `--preset` knows."""
    assert RECOMMENDED in PRESETS
    for name, config in PRESETS.items():
        assert config.preset == name and config.to_json()["preset"] == name
        assert config.schedule(50).steps >= 1


def test_a_stride_that_is_no_multiple_is_refused(photos: Frames) -> None:
    """And one that is gives the same cells, fewer of them."""
    method = trained(TINY, photos)
    frame = torch.from_numpy(photos[:1].copy())

    every = method.deployed(3).eval()(frame)[0]
    fewer = method.deployed(3, stride=16).eval()(frame)[0]

    torch.testing.assert_close(fewer, every[:, ::2, ::2], atol=1e-4, rtol=1e-4)
    with pytest.raises(CommandError, match="every 12 px"):
        method.deployed(3, stride=12)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, photos: Frames) -> None:
    """Batch-norm statistics are part of what is kept; patches and adversaries are drawn again from the step."""
    whole = trained(TINY, photos)

    def run(count: list[int], *, resume: bool) -> tuple[Drocc, bool]:
        method = Drocc(TINY, seed=1)
        method.prepare(photos[:8])
        outcome = run_training(
            method, photos[:8], photos[8:], TINY.schedule(8), seed=1, identity={}, resume=resume,
            checkpoint=tmp_path / "run.safetensors", report=lambda step, steps, loss: count.append(step),
            stopped=lambda: len(count) == 2 and not resume,
        )  # fmt: skip
        return method, outcome.finished

    before: list[int] = []
    after: list[int] = []
    _, finished = run(before, resume=False)
    method, resumed = run(after, resume=True)

    assert (before, after, finished, resumed) == ([1, 2], [3, 4], False, True)
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, method.net.state_dict()[name]), name
