"""ConAD: formulas against brute force, the two turns, and the whole way on real photographs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

import trainer.methods.conad
from edge.bundle import InputSpec, check_golden
from edge.engines.registry import open_engine
from edge.errors import CommandError, DataError, TrainingError
from edge.graph import lint
from trainer.conad_graph import ConadGraph, pixels
from trainer.conad_losses import closeness, critic_terms, divergence, nll_maps, passing, winner_loss
from trainer.conad_nets import Critic, Generator
from trainer.configs.conad import CIFAR, FRAMES, PRESETS, RECOMMENDED, ConadConfig
from trainer.data import load_training_set
from trainer.export import BundleFacts, export_bundle, to_onnx
from trainer.loop import Outcome, run_training
from trainer.method import Adversarial, Batch, Frames
from trainer.methods.conad import Conad

PHOTOS = Path(__file__).parents[3] / "edge" / "demo" / "photos"
TINY = replace(
    FRAMES, size_px=64, widths=(8, 16, 16), critic_widths=(8, 8, 8), latent=16, heads=3, batch_size=4, min_steps=4,
    max_steps=4, learning_rate=1e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def photos() -> Frames:
    return load_training_set(PHOTOS, size_px=64, aspect="stretch", skip_bad=False).take(np.arange(20))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(config: ConadConfig, photos: Frames, **options: Any) -> tuple[Conad, Outcome]:
    method = Conad(config, seed=1)
    method.prepare(photos[:14])
    outcome = run_training(method, photos[:14], photos[14:], config.schedule(14), seed=1, identity={}, **options)
    return method, outcome


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
def test_the_likelihood_is_a_gaussians_by_brute_force(learned: bool) -> None:
    """Pixel by pixel against torch's own normal distribution, which has the constant that is left out here."""
    pictures, means = noise(2, 3, 4, 4, seed=1), noise(2, 5, 3, 4, 4, seed=2)
    log_sigma = noise(2, 5, 3, 4, 4, seed=3) if learned else math.log(0.3)
    sigma = torch.exp(torch.as_tensor(log_sigma)).expand_as(means)

    by_hand = -torch.distributions.Normal(means, sigma).log_prob(pictures[:, None]).sum(2)
    constant = 3 * 0.5 * math.log(2 * math.pi)

    torch.testing.assert_close(nll_maps(pictures, means, log_sigma), by_hand - constant)


def test_the_winner_is_chosen_for_each_image() -> None:
    """Equation 2 by hand: the first image is best explained by its second head, the second image by its first."""
    nll = torch.tensor([[5.0, 2.0, 9.0], [1.0, 4.0, 3.0]], requires_grad=True)

    loss = winner_loss(nll)
    (slope,) = torch.autograd.grad(loss, nll)

    assert float(loss.detach()) == pytest.approx((2 + 1) / 2)
    assert slope.tolist() == [[0, 0.5, 0], [0.5, 0, 0]]  # heads that lose learn nothing from the picture


def test_control_one_winner_for_the_batch_would_be_another_loss() -> None:
    """Planted bug, seen in public code: the head that is best on average for all images of a batch."""
    nll = torch.tensor([[5.0, 2.0, 9.0], [1.0, 4.0, 3.0]])

    assert float(nll.mean(0).min()) == pytest.approx(3.0) != float(winner_loss(nll))


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2 / 3])
def test_the_relaxed_loss_shares_by_epsilon(epsilon: float) -> None:
    """1 - epsilon for the winner, epsilon / (H - 1) for each other; at (H - 1) / H all heads are alike."""
    nll = noise(6, 3).abs()
    expected = 0.0
    for row in nll.tolist():
        best = row.index(min(row))
        expected += sum(value * (1 - epsilon if j == best else epsilon / 2) for j, value in enumerate(row)) / 6

    assert float(winner_loss(nll, epsilon)) == pytest.approx(expected, rel=1e-5)
    assert float(winner_loss(nll, 2 / 3)) == pytest.approx(float(nll.mean()), rel=1e-5)


def test_the_divergence_is_that_of_two_gaussians() -> None:
    """Against torch's own, summed over the code and averaged over images."""
    mean, log_variance = noise(4, 8, 1, 1, seed=1), noise(4, 8, 1, 1, seed=2)
    code = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance))
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))

    expected = torch.distributions.kl_divergence(code, prior).sum((1, 2, 3)).mean()

    torch.testing.assert_close(divergence(mean, log_variance), expected)


def test_the_critics_terms_are_cross_entropies_averaged_group_by_group() -> None:
    """-log p of real pictures; -log(1 - p) of the three kinds of made ones, each group's mean by itself."""
    real, prior, posterior, winner = (
        noise(4, seed=1),
        noise(4, 3, seed=2),
        noise(4, 3, seed=3),
        torch.tensor([0, 2, 1, 1]),
    )
    p = {
        name: torch.sigmoid(one).tolist() for name, one in (("real", real), ("prior", prior), ("posterior", posterior))
    }

    terms = critic_terms(real, prior, posterior, winner)

    made = {
        "prior": [value for row in p["prior"] for value in row],
        "posterior": [value for row in p["posterior"] for value in row],
        "winner": [row[j] for row, j in zip(p["posterior"], winner.tolist(), strict=True)],
    }
    assert float(terms.pop("real")) == pytest.approx(-sum(map(math.log, p["real"])) / 4, rel=1e-5)
    assert terms.keys() == made.keys()
    for name, values in made.items():
        assert float(terms[name]) == pytest.approx(-sum(math.log(1 - v) for v in values) / len(values), rel=1e-5)


def test_more_heads_do_not_make_the_critic_louder() -> None:
    """Control of the averaging: the same logits eight times over are the same loss; summed over heads they were 8 x."""
    real, one, first = noise(4, seed=1), noise(4, 1, seed=2), torch.zeros(4, dtype=torch.int64)

    few, many = (critic_terms(real, one.repeat(1, h), one.repeat(1, h), first) for h in (1, 8))
    summed = torch.nn.functional.softplus(one.repeat(1, 8)).sum() / 4

    for name, value in few.items():
        torch.testing.assert_close(many[name], value)
    assert float(summed) == pytest.approx(8 * float(few["prior"]), rel=1e-5)


def test_the_generator_wants_every_made_picture_taken_for_real() -> None:
    """Non-saturating: -log p over the same three groups."""
    prior, posterior, winner = noise(2, 3, seed=2), noise(2, 3, seed=3), torch.tensor([0, 2])
    p, q = torch.sigmoid(prior), torch.sigmoid(posterior)
    expected = -(p.log().mean() + q.log().mean() + (q[0, 0].log() + q[1, 2].log()) / 2)

    torch.testing.assert_close(passing(prior, posterior, winner), expected)


def test_closeness_is_minibatch_discrimination_by_brute_force() -> None:
    """Salimans et al. 2016: for each picture and kernel the sum of exp(-L1) over the others of its own group only."""
    kernels = noise(2, 3, 4, 5) * 0.3
    expected = torch.zeros(2, 3, 4)
    for image in range(2):
        for i in range(3):
            for j in range(3):
                for b in range(4):
                    distance = sum(abs(float(x)) for x in kernels[image, i, b] - kernels[image, j, b])
                    expected[image, i, b] += math.exp(-distance) if i != j else 0.0

    torch.testing.assert_close(closeness(kernels, kernels) - 1, expected)


def test_the_critic_sees_hypotheses_of_one_input_and_real_pictures_of_several() -> None:
    """A change of another input's hypotheses changes nothing; one of the same input's does."""
    spec = TINY.spec(1)
    torch.manual_seed(1)
    critic = Critic(spec, discriminate=True)
    made = noise(2, 3, 1, 64, 64) * 0.1
    before = critic.of_hypotheses(made)
    others, own = made.clone(), made.clone()
    others[1] = others[0, :1]
    own[0, 1] = own[0, 2]

    assert torch.equal(critic.of_hypotheses(others)[0], before[0])
    assert not torch.equal(critic.of_hypotheses(own)[0, 2], before[0, 2])
    real = noise(4, 1, 64, 64) * 0.1
    moved = real.clone()
    moved[1] += 0.05
    changed = critic.of_pictures(real) != critic.of_pictures(moved)
    assert changed.tolist() == [True, True, False, True]  # groups of three, running on across the batch's end


def test_without_hypothesis_discrimination_every_picture_is_judged_alone() -> None:
    """The switch: the same picture has the same logit among any others."""
    critic = Critic(TINY.spec(1), discriminate=False)
    made = noise(1, 3, 1, 64, 64)

    together, alone = critic.of_hypotheses(made)[0], critic.of_pictures(made[0])

    torch.testing.assert_close(together, alone)


# --- the two turns ----------------------------------------------------------------------------------------------------


def test_heads_differ_from_the_start_and_share_everything_else() -> None:
    """Heads that start alike stay alike; only the last layer grows with H."""
    torch.manual_seed(1)
    few, many = Generator(TINY.spec(1)), Generator(replace(TINY, heads=12, batch_size=12).spec(1))
    means, _ = few.decode(noise(1, 16, 1, 1))

    assert float((means[0, 0] - means[0, 1]).detach().abs().max()) > 0.01
    sizes = [{name: p.numel() for name, p in net.named_parameters()} for net in (few, many)]
    assert {name for name in sizes[0] if sizes[0][name] != sizes[1][name]} == {"heads.weight", "heads.bias"}


def test_heads_that_lose_learn_from_the_critic_only(photos: Frames) -> None:
    """Section 2 and 4 of the reference: without the critic a losing head gets no gradient, with it every head does."""
    slopes = {}
    for weight in (0.0, 1.0):
        method = Conad(replace(TINY, adversarial=weight), seed=1)
        method.prepare(photos)
        batch = Batch(torch.from_numpy(photos[:1]), np.array([0]), 5)
        cast(Tensor, sum(method.generator_loss(batch).values())).backward()
        grad = method.net.heads.weight.grad
        assert grad is not None
        slopes[weight] = grad.reshape(3, -1).abs().amax(1) > 0

    assert slopes[0.0].sum() == 1 and slopes[1.0].all()


def test_training_is_a_critics_turn_and_a_generators(photos: Frames) -> None:
    """Every term of both is in the curve, and both networks move."""
    assert isinstance(Conad(TINY, seed=1), Adversarial)
    method, outcome = trained(TINY, photos)
    fresh = Conad(TINY, seed=1)
    fresh.prepare(photos)

    assert list(outcome.curve[-1].terms) == [
        "critic.real", "critic.prior", "critic.posterior", "critic.winner",
        "generator.winner", "generator.divergence", "generator.adversarial",
    ]  # fmt: skip
    for name, parameter in fresh.trainable.named_parameters():
        assert not torch.equal(parameter, method.trainable.get_parameter(name)), name


def test_training_lowers_the_winners_nll(photos: Frames) -> None:
    """The one thing that the map stands on."""
    curve = trained(replace(TINY, min_steps=60, max_steps=60), photos)[1].curve

    assert curve[-1].held_out_loss < 0.7 * curve[0].held_out_loss


def test_both_turns_of_a_step_see_the_same_made_pictures(photos: Frames) -> None:
    """Made once: what the critic judges is, but for its gradient, what the generator is judged by."""
    method = Conad(TINY, seed=1)
    method.prepare(photos)
    batch = Batch(torch.from_numpy(photos[:4]), np.arange(4), 9)

    first, again = method._made(batch), method._made(batch)
    method.generator_loss(batch)

    assert first is again
    assert torch.equal(method._made(replace(batch)).posterior, first.posterior)  # the same draw, drawn again


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variance", ["fixed", "learned"])
def test_every_switch_trains(photos: Frames, variance: str, precision: str) -> None:
    """A few steps of each combination stay finite and give a graph."""
    config = replace(TINY, variance=variance, precision=precision, grid=variance == "learned", relaxation=0.1)  # type: ignore[arg-type]
    method, outcome = trained(config, photos)
    method.fit_statistics(photos[14:])

    maps, scores = method.deployed(3)(torch.from_numpy(photos[14:16]))

    assert outcome.finished and maps.shape == (2, 16, 16) and scores.shape == (2,)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, photos: Frames) -> None:
    """Batch-norm statistics and two Adams are kept; noise is drawn again from the step."""
    path, asked = tmp_path / "run.safetensors", iter([False, True, False])
    whole = trained(TINY, photos)[0].trainable.state_dict()

    trained(TINY, photos, checkpoint=path, stopped=lambda: next(asked))
    resumed = trained(TINY, photos, checkpoint=path, resume=True)[0].trainable.state_dict()

    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# --- the graph --------------------------------------------------------------------------------------------------------


def brute_force(method: Conad, frame: np.ndarray) -> tuple[np.ndarray, float]:
    """Map and score with an argmin and a sort."""
    config, net = method.config, method.net.eval()
    with torch.no_grad():
        picture = pixels(torch.from_numpy(frame[None]))
        means, _ = net.decode(net.encode(picture)[0])
        nll = 0.5 * ((picture[:, None] - means) / config.sigma).square().sum(2) + 3 * math.log(config.sigma)
        cells = avg_pool2d(nll[:, int(nll[0].sum((1, 2)).argmin())], config.stride)[0].double().numpy()
    cells = (cells - method.statistics["mu"]) / method.statistics["sigma"]
    worst = np.sort(cells.ravel())[::-1][: math.ceil(config.top_share * cells.size)]
    return cells, float(cells.mean() if config.score == "sum" else worst.mean())


@pytest.mark.parametrize("score", ["top", "sum"])
def test_the_graph_is_the_winners_map_and_the_top_tenth_by_an_argmin_and_a_sort(photos: Frames, score: str) -> None:
    """Neither operator is in the exported graph; the values are theirs."""
    method, _ = trained(replace(TINY, score=score, min_steps=20, max_steps=20), photos)  # type: ignore[arg-type]
    method.fit_statistics(photos[14:])
    deployed = method.deployed(3)

    for frame in photos[:6]:
        maps, scores = deployed(torch.from_numpy(frame[None].copy()))
        cells, expected = brute_force(method, frame)
        np.testing.assert_allclose(maps[0].numpy(), cells, atol=1e-4, rtol=1e-4)
        assert float(scores) == pytest.approx(expected, abs=1e-4)


def test_one_head_is_chosen_for_all_pixels() -> None:
    """By hand: the second head is best in sum, and its map is given even where the first is better."""
    maps = torch.tensor([[[[0.0, 9.0]], [[3.0, 3.0]]]])

    chosen = ConadGraph.chosen(maps)

    assert chosen.tolist() == [[[3.0, 3.0]]]
    assert maps.amin(1).tolist() == [[[0.0, 3.0]]]  # control: the best head of each pixel is another map


def test_heads_that_are_equally_good_are_averaged_not_added() -> None:
    """A tie must not double the map."""
    maps = torch.tensor([[[[1.0, 3.0]], [[3.0, 1.0]], [[9.0, 9.0]]]])

    assert ConadGraph.chosen(maps).tolist() == [[[2.0, 2.0]]]


@pytest.mark.parametrize("score", ["top", "sum"])
def test_the_bundle_answers_as_torch_does_and_has_two_thresholds(photos: Frames, tmp_path: Path, score: str) -> None:
    """The export's own gate on both backends; no image or pixel of the held-out parts is beyond its threshold."""
    method, _ = trained(replace(TINY, score=score), photos)  # type: ignore[arg-type]
    method.fit_statistics(photos[14:])
    facts = BundleFacts("conad", "conad", "frames", InputSpec(64, 64, 3, 4), "0" * 64, True, {})

    bundle = export_bundle(method, tmp_path / "bundle", facts, held_out=photos[14:])

    assert bundle.manifest.map.reduction == ("top-q" if score == "top" else "mean")
    for backend in ("openvino", "onnxruntime"):
        with open_engine(bundle, backend=backend) as engine:  # type: ignore[arg-type]
            check_golden(bundle, engine, require=True)
            maps, scores = engine.infer(photos[14:18])
    assert maps.max() <= bundle.calibration.pixel_threshold
    assert scores.max() <= bundle.calibration.threshold < bundle.calibration.pixel_threshold


@pytest.mark.parametrize("config", [TINY, replace(TINY, variance="learned", sigma=0.1), replace(TINY, grid=True)])
def test_the_graph_is_what_tensorrt_builds(photos: Frames, config: ConadConfig) -> None:
    """No random node, no TopK, no ArgMin; `to_onnx` itself refuses what the linter finds."""
    method, _ = trained(config, photos)
    method.fit_statistics(photos[14:])

    model = to_onnx(method.deployed(3).eval(), InputSpec(64, 64, 3, 4))

    assert lint(model) == ()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size_px": 100}, "multiple of 8"),
        ({"widths": ()}, "widths"),
        ({"critic_widths": (8, 0)}, "critic_widths"),
        ({"heads": 0}, "heads = 0"),
        ({"heads": 5}, "batch_size=5 or more"),
        ({"sigma": 0.0}, "sigma must be"),
        ({"variance": "learned", "sigma": 1.5}, "between sigma and 1"),
        ({"relaxation": 0.9}, "winner takes all"),
        ({"adversarial": -1.0}, "weights"),
        ({"top_share": 0.0}, "shares"),
        ({"stride": 7}, "must divide"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_what_can(changes: dict[str, Any], message: str) -> None:
    """Before an image is read."""
    with pytest.raises(CommandError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda frames: frames[:, :48], r"64 x 64 px, and \[48, 64\] were given"),
        (lambda frames: frames * 0 + 7, "constant"),
        (lambda frames: frames[:2], "there are 2 images"),
    ],
)
def test_images_that_cannot_teach_are_refused(photos: Frames, spoil: Callable[[Frames], Frames], message: str) -> None:
    """Another size, all the same, or too few for a group of hypothesis discrimination."""
    with pytest.raises(DataError, match=message):
        Conad(TINY, seed=1).prepare(spoil(photos))


def test_images_of_another_size_are_refused_wherever_they_come_from(photos: Frames) -> None:
    """Not by an error about matrices."""
    method, _ = trained(TINY, photos)

    with pytest.raises(DataError, match="48"):
        method.loss(Batch(torch.from_numpy(photos[:2, :48])))
    with pytest.raises(DataError, match="48"):
        method.fit_statistics(photos[:2, :48])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("critic.answer.bias", "the term real of the critic's loss became nan at step 1"),
        ("generator.log_variance.bias", "the term prior of the critic's loss became nan at step 1"),
    ],
)
def test_a_loss_that_is_no_number_names_its_turn_and_term(photos: Frames, part: str, message: str) -> None:
    """The first that was seen; nothing was learned from it. Batch norm carries a code's nan to its neighbors."""
    method = Conad(TINY, seed=1)
    method.prepare(photos)
    torch.nn.init.constant_(method.trainable.get_parameter(part), math.nan)

    with pytest.raises(TrainingError, match=message):
        run_training(method, photos[:14], photos[14:], TINY.schedule(14), seed=1, identity={})


def test_a_term_of_the_generator_is_named_as_well(photos: Frames, monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic does not see the divergence."""
    monkeypatch.setattr(trainer.methods.conad, "divergence", lambda mean, log_variance: mean.sum() * math.inf)

    with pytest.raises(TrainingError, match=r"term divergence of the generator's loss became (nan|inf|-inf)"):
        trained(TINY, photos)


def test_heads_that_collapsed_are_told(photos: Frames) -> None:
    """Planted: all heads are made the first one. With one head there is nothing to collapse."""
    method, _ = trained(TINY, photos)
    heads = method.net.heads
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(parameter[:3].repeat(3, *(1 for _ in parameter.shape[1:])))

    with pytest.raises(TrainingError, match="hypotheses have collapsed"):
        method.fit_statistics(photos[14:])
    single, _ = trained(replace(TINY, heads=1), photos)
    single.fit_statistics(photos[14:])
    assert single.statistics["winners"] == [6]


def test_a_map_that_says_the_same_of_everything_is_told(photos: Frames) -> None:
    """Held-out images that are all gray, and a network that gives exactly that."""
    method, _ = trained(replace(TINY, heads=1), photos)
    torch.nn.init.zeros_(method.net.heads.weight)
    torch.nn.init.zeros_(cast(Tensor, method.net.heads.bias))

    with pytest.raises(TrainingError, match="the same of everything"):
        method.fit_statistics(np.full((4, 64, 64, 3), 128, np.uint8))


def test_a_graph_for_other_channels_or_another_stride_is_refused(photos: Frames) -> None:
    """A cell follows from the whole picture, so there is no coarser look."""
    method, _ = trained(TINY, photos)
    method.fit_statistics(photos[14:])

    assert not method.local
    with pytest.raises(TrainingError, match="3 channels, asked for a graph of 1"):
        method.deployed(1)
    with pytest.raises(CommandError, match="every 8 px"):
        method.deployed(3, stride=8)


def test_presets_are_json_and_the_recommended_one_is_the_first() -> None:
    """`kizu train conad` alone takes that."""
    assert next(iter(PRESETS)) == RECOMMENDED
    assert (CIFAR.heads, CIFAR.size_px, CIFAR.score, FRAMES.score) == (8, 32, "sum", "top")
    for name, config in PRESETS.items():
        assert config.preset == name and config.to_json()["widths"] == list(config.widths)
