"""LRDAN: the turns that train it, the center, what is exported, what is refused; a few steps on shipped photographs."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trainer.lrdan_objective
from edge.bundle import InputSpec, check_golden
from edge.compile import compile_bundle
from edge.engines.registry import Backend, open_engine
from edge.errors import CommandError, DataError, TrainingError
from edge.graph import Precision, lint
from trainer.configs.lrdan import FRAMES, MNIST, PRESETS, RECOMMENDED, LrdanConfig
from trainer.data import load_training_set
from trainer.export import BundleFacts, export_bundle, to_onnx
from trainer.loop import run_training
from trainer.lrdan_nets import to_signed
from trainer.lrdan_objective import latent_center
from trainer.method import Adversarial, Batch, Frames
from trainer.methods.lrdan import Lrdan, blank_error

PHOTOS = Path(__file__).parents[3] / "edge" / "demo" / "photos"
TINY = replace(FRAMES, size_px=32, latent=16, batch_size=4, warmup_steps=2, min_steps=5, max_steps=5)


@pytest.fixture(scope="module")
def photos() -> Frames:
    """Twelve of the shipped good parts (12, 32, 32, 3)."""
    return load_training_set(PHOTOS, size_px=32, aspect="stretch", skip_bad=False).frames[:12]


def prepared(config: LrdanConfig, frames: Frames, seed: int = 1) -> Lrdan:
    method = Lrdan(config, seed=seed)
    method.prepare(frames[:8])
    return method


def trained(config: LrdanConfig, frames: Frames, **options: Any) -> Lrdan:
    method = prepared(config, frames)
    run_training(method, frames[:8], frames[8:], config.schedule(8), seed=1, identity={}, **options)
    if int(method.nets.seen) == config.max_steps:
        method.fit_statistics(frames[8:])
    return method


def weights(method: Lrdan) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in method.trainable.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The networks, by two parts of their name, in which a weight differs."""
    return {".".join(name.split(".")[:2]) for name in before if not torch.equal(before[name], after[name])}


# --- turns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "turns"),
    [
        ({}, ["discriminator", "auxiliary", "generator"]),
        ({"scheme": "joint"}, ["discriminator", "autoencoders"]),
        ({"w_a": 0.0}, ["auxiliary", "generator"]),
        ({"w_d": 0.0, "score": "a3"}, ["discriminator", "auxiliary", "generator"]),
        ({"w_d": 0.0, "w_z": 0.0, "score": "a3"}, ["discriminator", "generator"]),
    ],
)
def test_one_switch_says_who_minimizes_what_and_a_turn_without_a_term_is_left_out(
    photos: Frames, changes: dict[str, Any], turns: list[str]
) -> None:
    """Each setting of the loss ablation trains, and comes back from its checkpoint (below)."""
    method = prepared(replace(TINY, **changes), photos)

    assert isinstance(method, Adversarial)
    assert [turn.name for turn in method.turns()] == turns
    taken = [id(parameter) for turn in method.turns() for parameter in turn.parameters]
    assert len(taken) == len(set(taken)), "two optimizers would pull at one weight"


@pytest.mark.parametrize("name", ["discriminator", "auxiliary", "generator"])
def test_a_turn_moves_its_own_network_and_no_other(photos: Frames, name: str) -> None:
    """After the warm-up, through the loop's own step, with the other turns' rates at zero."""
    method = prepared(replace(TINY, warmup_steps=0), photos)
    turns = [replace(turn, rate=float(turn.name == name)) for turn in method.turns()]
    method.turns = lambda: tuple(turns)  # type: ignore[method-assign]
    before = weights(method)

    run_training(method, photos[:8], photos[8:], replace(TINY.schedule(8), steps=1), seed=1, identity={})

    parts = {"discriminator.layers"} if name == "discriminator" else {f"{name}.encoder", f"{name}.decoder"}
    assert moved(before, weights(method)) - {"center", "seen", "dual_errors"} == parts


def test_a_turn_that_is_given_another_network_as_well_is_noticed(photos: Frames) -> None:
    """Planted bug: the generator's optimizer also holds D'."""
    method = prepared(replace(TINY, warmup_steps=0), photos)
    *others, last = method.turns()
    both = replace(last, parameters=(*last.parameters, *method.nets.auxiliary.parameters()))
    method.turns = lambda: (*(replace(turn, rate=0.0) for turn in others), both)  # type: ignore[method-assign]
    before = weights(method)

    run_training(method, photos[:8], photos[8:], replace(TINY.schedule(8), steps=1), seed=1, identity={})

    assert "auxiliary.encoder" in moved(before, weights(method))


@pytest.mark.parametrize("changes", [{}, {"scheme": "joint"}, {"w_d": 0.0, "score": "a3"}, {"w_g": 0.4}])
@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_stopped_run_goes_on_to_the_same_weights(
    photos: Frames, tmp_path: Path, changes: dict[str, Any], stop_after: int
) -> None:
    """Within the warm-up and after it: the center and the count of steps are in the checkpoint."""
    config, path = replace(TINY, **changes), tmp_path / "run.safetensors"
    whole = weights(trained(config, photos))
    asked = iter(range(stop_after, 0, -1))

    trained(config, photos, checkpoint=path, stopped=lambda: next(asked) == 1)
    resumed = weights(trained(config, photos, checkpoint=path, resume=True))

    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_center_that_a_resume_computes_anew_is_noticed(
    photos: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: were it no part of the checkpoint, it would be that of the network at the time of the resume."""
    path, asked = tmp_path / "run.safetensors", iter(range(3, 0, -1))
    whole = weights(trained(TINY, photos))
    trained(TINY, photos, checkpoint=path, stopped=lambda: next(asked) == 1)
    fix, resumed = Lrdan._fix_center, prepared(TINY, photos)
    look = Lrdan._look

    def anew(self: Lrdan, batch: Batch) -> Any:
        if int(self.nets.seen) == 3 and self._looked is None:
            fix(self)
        return look(self, batch)

    monkeypatch.setattr(Lrdan, "_look", anew)
    schedule = TINY.schedule(8)
    run_training(resumed, photos[:8], photos[8:], schedule, seed=1, identity={}, checkpoint=path, resume=True)

    assert not torch.equal(whole["center"], weights(resumed)["center"])


def test_the_center_is_the_mean_latent_at_the_end_of_the_warm_up(photos: Frames) -> None:
    """Of all training images, and then it stays."""
    asked = iter(range(TINY.warmup_steps, 0, -1))
    method = trained(TINY, photos, stopped=lambda: next(asked) == 1)
    with torch.no_grad():
        expected = latent_center(method.nets.generator.encoder(to_signed(torch.from_numpy(photos[:8]))))
    assert not method.nets.center.any(), "there is none before"

    after = trained(TINY, photos)

    torch.testing.assert_close(after.nets.center, expected)
    assert method.describe()["warmed_up"] is False and after.describe()["warmed_up"] is True


def test_the_warm_up_teaches_reconstruction_and_nothing_else(photos: Frames) -> None:
    """No adversary pulls at a generator that has no image yet, and nothing is spoiled on purpose."""
    method = prepared(TINY, photos)
    _, auxiliary, generator = method.turns()
    batch = Batch(torch.from_numpy(photos[:4]), np.arange(4))

    with torch.no_grad():
        early = auxiliary.loss(batch), generator.loss(batch)
        method.nets.seen.fill_(TINY.warmup_steps)
        late = auxiliary.loss(batch), generator.loss(batch)

    assert [sorted(terms) for terms in early] == [["dual", "latent"], ["image", "latent"]]
    assert sorted(late[1]) == ["adversarial", "center", "image", "latent"]
    assert float(early[0]["dual"]) > float(late[0]["dual"])  # type: ignore[index]


def test_held_out_images_change_nothing(photos: Frames) -> None:
    """The learning curve looks at them; neither the warm-up nor the guard counts those looks."""
    method = prepared(TINY, photos)
    before = weights(method)

    losses = [method.loss(Batch(torch.from_numpy(photos[8:]))) for _ in range(2)]

    assert moved(before, weights(method)) == set()
    assert float(losses[0]) == float(losses[1])  # type: ignore[arg-type]


# --- what is deployed -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(photos: Frames) -> Lrdan:
    return trained(TINY, photos)


def by_hand(method: Lrdan, score: str, frames: Frames) -> np.ndarray:
    """The map from the networks themselves, in the paper's words."""
    nets = method.nets
    with torch.no_grad():
        x = to_signed(torch.from_numpy(frames))
        answer = {"a1": nets.auxiliary, "a2": lambda one: nets.auxiliary(nets.generator(one)), "a3": nets.generator}
        left = (x - answer[score](x)).abs().mean(1).numpy()  # type: ignore[operator]
    return np.asarray((left - method.statistics["mu"]) / method.statistics["sigma"])


@pytest.mark.parametrize("score", ["a1", "a2", "a3"])
def test_openvino_and_onnx_runtime_give_the_map_of_the_formula(
    learned: Lrdan, photos: Frames, tmp_path: Path, score: Any
) -> None:
    """Three scores behind one switch, the same weights; the image's score is the mean of its map."""
    method = prepared(replace(TINY, score=score), photos)
    method.nets.load_state_dict(learned.nets.state_dict())
    method.fit_statistics(photos[8:])
    facts = BundleFacts("tiny", "lrdan", "frames", InputSpec(32, 32, 3, 4), "0" * 64, True, {})
    bundle = export_bundle(method, tmp_path / "bundle", facts, held_out=photos[8:])

    expected = by_hand(method, score, photos[8:])
    backends: tuple[Backend, ...] = ("openvino", "onnxruntime")
    for backend in backends:
        with open_engine(bundle, backend=backend) as engine:
            check_golden(bundle, engine, require=True)
            maps, scores = engine.infer(photos[8:])
        np.testing.assert_allclose(maps, expected, atol=1e-3)
        np.testing.assert_allclose(scores, expected.mean((1, 2)), atol=1e-3)
    assert bundle.manifest.map.reduction == "mean"


def test_an_images_score_can_be_the_mean_of_its_worst_share(learned: Lrdan, photos: Frames, tmp_path: Path) -> None:
    """A small flaw in a large frame goes under in the mean; the pixels' threshold follows from the maps' peaks."""
    method = prepared(replace(TINY, pool="top", share=0.05), photos)
    method.nets.load_state_dict(learned.nets.state_dict())
    method.fit_statistics(photos[8:])
    facts = BundleFacts("tiny", "lrdan", "frames", InputSpec(32, 32, 3, 4), "0" * 64, True, {})
    bundle = export_bundle(method, tmp_path / "bundle", facts, held_out=photos[8:])

    largest = np.sort(by_hand(method, "a1", photos[8:]).reshape(4, -1), axis=1)[:, -52:]  # ceil(0.05 * 1024)
    with open_engine(bundle, backend="openvino") as engine:
        _, scores = engine.infer(photos[8:])
    np.testing.assert_allclose(scores, largest.mean(1), atol=1e-3)
    assert bundle.manifest.map.reduction == "top-q"
    assert bundle.calibration.pixel_threshold > bundle.calibration.threshold


def test_a_graph_of_another_score_is_noticed(learned: Lrdan, photos: Frames) -> None:
    """Planted bug: A1 deployed where A3 was asked for."""
    with torch.no_grad():
        maps = learned.deployed(3)(torch.from_numpy(photos[8:]))[0].numpy()

    assert np.abs(maps - by_hand(learned, "a1", photos[8:])).max() < 1e-3
    assert np.abs(maps - by_hand(learned, "a3", photos[8:])).max() > 0.1


@pytest.mark.parametrize("score", ["a1", "a2", "a3"])
def test_tensorrt_would_take_the_graph_of_every_score(learned: Lrdan, photos: Frames, score: Any) -> None:
    """And nothing of the discriminator or the center is in it."""
    method = prepared(replace(TINY, score=score), photos)
    method.statistics = learned.statistics

    graph = to_onnx(method.deployed(3), InputSpec(32, 32, 3, 4))

    auto_encoder = sum(parameter.numel() for parameter in method.nets.auxiliary.parameters())
    assert lint(graph) == ()
    assert len(graph) < 4 * auto_encoder * (2 if score == "a2" else 1) + 60_000


@pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT for RTX is not installed: pip install 'kizu[tensorrt-rtx]'",
)
def test_the_recommended_preset_builds_for_tensorrt_at_every_precision(tmp_path: Path) -> None:
    """Eight stages of 256 px, untrained: a build does not see what weights mean."""
    frames = load_training_set(PHOTOS, size_px=256, aspect="stretch", skip_bad=False).take(np.arange(6))
    method = prepared(FRAMES, frames)
    method.fit_statistics(frames[4:])
    facts = BundleFacts("frames", "lrdan", "frames", InputSpec(256, 256, 3, 16), "0" * 64, True, {})
    bundle = export_bundle(method, tmp_path / "frames", facts, held_out=frames[4:])

    precisions: tuple[Precision, ...] = ("fp16", "bf16", "fp32")
    built = [
        compile_bundle(bundle, targets=["sm89"], precision=precision, cache=tmp_path / "engines")
        for precision in precisions
    ]

    assert all(one.fresh and one.size > 100_000 for one in built)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_images_of_another_size_are_refused_before_training(photos: Frames) -> None:
    """An auto-encoder with a latent vector knows one size."""
    with pytest.raises(DataError, match=r"30 x 32 px and the networks of size_px = 32.*resize the images"):
        Lrdan(TINY, seed=1).prepare(photos[:, :, :30])


def test_constant_images_are_refused(photos: Frames) -> None:
    """There is nothing to reconstruct in them."""
    with pytest.raises(DataError, match="constant"):
        Lrdan(TINY, seed=1).prepare(np.full_like(photos, 7))


def test_nan_stops_the_training_and_names_turn_and_term(photos: Frames, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the step is taken."""
    monkeypatch.setattr(
        trainer.lrdan_objective, "center_distance", lambda *_: torch.tensor(float("nan"), requires_grad=True)
    )

    with pytest.raises(TrainingError, match=r"term center of the generator's loss became nan at step 3 of 5"):
        trained(TINY, photos)


def test_a_dual_term_that_runs_away_stops_the_training_and_keeps_the_checkpoint(
    photos: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard's memory is in the checkpoint, so a resume does not start it anew."""
    path, asked = tmp_path / "run.safetensors", iter(range(3, 0, -1))
    trained(TINY, photos, checkpoint=path, stopped=lambda: next(asked) == 1)
    before = path.read_bytes()
    restored = prepared(TINY, photos)
    monkeypatch.setattr(trainer.lrdan_objective, "DUAL_MEMORY", 1)
    # Planted: an auxiliary auto-encoder that answers far beyond anything an image can be.
    restored.nets.auxiliary.decoder.register_forward_hook(lambda _, __, answer: answer - 1.9)

    with pytest.raises(TrainingError, match="dual term ran away"):
        schedule = TINY.schedule(8)
        run_training(restored, photos[:8], photos[8:], schedule, seed=1, identity={}, checkpoint=path, resume=True)

    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size_px": 28}, "such as 32"),
        ({"w_d": 0.0}, "score = a1 looks through the auxiliary"),
        ({"w_g": 0.4, "scheme": "joint"}, "w_g is for scheme = turns"),
        ({"k": 1.5}, "k = 1.5"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"share": 0.0}, "share = 0.0"),
        ({"beta1": 1.0}, "beta1"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    """Before an image is read."""
    with pytest.raises(CommandError, match=message):
        replace(TINY, **changes)


def test_a_coarser_look_is_refused_and_tiles_are_none_of_its(learned: Lrdan) -> None:
    """Every pixel depends on the whole image."""
    assert learned.local is False
    with pytest.raises(CommandError, match="cannot be evaluated every 4 px"):
        learned.deployed(3, stride=4)
    with pytest.raises(TrainingError, match="trained on 3 channels"):
        learned.deployed(1)


def test_an_auto_encoder_that_leaves_the_same_everywhere_is_not_deployed(photos: Frames) -> None:
    """All weights zero, all pixels one gray."""
    method = prepared(TINY, photos)
    for parameter in method.nets.parameters():
        torch.nn.init.zeros_(parameter)

    with pytest.raises(TrainingError, match="that is no map"):
        method.fit_statistics(np.full_like(photos, 9))


def test_the_error_of_a_single_color_is_measured_as_the_losses_are() -> None:
    """Half black, half white: gray misses by 1 an element."""
    frames = np.zeros((2, 4, 4, 1), np.uint8)
    frames[:, :2] = 255

    assert blank_error(frames) == 1.0


def test_every_preset_is_json_and_the_recommended_one_is_the_first() -> None:
    """`kizu train lrdan` alone takes that; the paper's weights are in all of them."""
    assert next(iter(PRESETS)) == RECOMMENDED
    for name, config in PRESETS.items():
        assert config.to_json()["preset"] == name
        paper = (config.w_i, config.w_a, config.w_z, config.w_c, config.w_d, config.k)
        assert paper == (1, 5, 1, 0.05, 1, 0.4)
    assert MNIST.spec(1).stages == 5
