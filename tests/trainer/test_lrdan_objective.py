"""LRDAN's formulas: every loss by hand, who gets a gradient in whose turn, and a dual loss that runs away."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import trainer.lrdan_objective
from edge.errors import CommandError, TrainingError
from trainer.lrdan_nets import AutoEncoder, Discriminator, LrdanNets, LrdanSpec, to_signed
from trainer.lrdan_objective import (
    DUAL_MEMORY,
    Look,
    Objective,
    Terms,
    Weights,
    center_distance,
    dual_error,
    fool_loss,
    image_error,
    judge_loss,
    latent_center,
    latent_error,
    require_bounded,
)

SPEC = LrdanSpec(side=16, channels=1, width=16, latent=6)
RIVALS = Weights(rival=0.4)


def tensors(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_step(weights: Weights = RIVALS) -> tuple[LrdanNets, Look, Objective]:
    nets = LrdanNets(SPEC, seed=1)
    nets.center.copy_(tensors(6, 1, 1, seed=3))
    return nets, Look.at(nets, tensors(3, 1, 16, 16, seed=2).tanh()), Objective(weights)


# --- the five losses, by hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norms", "expected"), [("mean", (1.5 + 0.5) / 2), ("sum", 1024 * (1.5 + 0.5) / 2)])
def test_the_image_loss_is_the_mean_over_images_of_their_l1_distance(norms: str, expected: float) -> None:
    """Two images of four pixels, off by 0, 1, 2, 3 and by 2, 0, 0, 0; a sum is that of 32 x 32 such pixels."""
    images = torch.tensor([[0.0, 1.0, 2.0, 3.0], [2.0, 0.0, 0.0, 0.0]]).reshape(2, 1, 2, 2)

    assert float(image_error(images, torch.zeros_like(images), norms)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("norms", "expected"), [("mean", (5 / math.sqrt(2) + 0) / 2), ("sum", 2.5)])
def test_the_latent_loss_is_the_mean_over_images_of_their_l2_distance(norms: str, expected: float) -> None:
    """A difference of (3, 4) and none; not squared."""
    latents = torch.tensor([[3.0, 4.0], [7.0, 7.0]])

    found = latent_error(latents, torch.tensor([[0.0, 0.0], [7.0, 7.0]]), norms)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(expected)


def test_equal_latents_have_a_latent_loss_without_slope() -> None:
    """The slope of a square root at 0 is infinite; times 0 that would be NaN in every weight."""
    latents = torch.ones(2, 3, requires_grad=True)

    latent_error(latents, torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 3.0]])).backward()  # type: ignore[no-untyped-call]

    assert latents.grad is not None and latents.grad[0].tolist() == [0, 0, 0]
    assert latents.grad[1, 2] < 0


@pytest.mark.parametrize(("norms", "expected"), [("mean", (2.5 + 12.5) / 2), ("sum", (5 + 25) / 2)])
def test_the_center_loss_is_the_mean_squared_distance_to_c(norms: str, expected: float) -> None:
    """From c = (1, 1): (2, 3) is 5 away, (4, 5) is 25."""
    latents = torch.tensor([[2.0, 3.0], [4.0, 5.0]])

    assert float(center_distance(latents, torch.ones(2), norms)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("norms", "expected"), [("mean", 0.5 - 0.4 * 1.0), ("sum", 512 - 0.4 * 1024)])
def test_the_dual_loss_rewards_missing_generated_images(norms: str, expected: float) -> None:
    """Real pixels are missed by 0.5, generated ones by 1."""
    real, made = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)

    found = dual_error(real, real + 0.5, made, made - 1, 0.4, norms)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(expected)


def test_a_sum_over_an_image_of_the_papers_size_is_a_plain_sum_and_a_larger_image_counts_as_that() -> None:
    """At 256 px a plain sum would be 64 times larger, and the adversarial loss nothing beside it."""
    image = tensors(2, 3, 32, 32, seed=7)

    small = image_error(image, torch.zeros_like(image), "sum")
    large = image_error(image.repeat(1, 1, 8, 8), torch.zeros(2, 3, 256, 256), "sum")

    torch.testing.assert_close(small, image.abs().flatten(1).sum(1).mean())
    torch.testing.assert_close(large, small)


def test_a_cap_bounds_what_a_generated_image_can_earn() -> None:
    """Missed by 1.5 and by 0.2, with a cap of 0.5 they count 0.5 and 0.2, and the first pulls no more."""
    made = torch.zeros(2, 1, 2, 2)
    answers = torch.stack([torch.full((1, 2, 2), 1.5), torch.full((1, 2, 2), 0.2)]).requires_grad_()

    found = dual_error(made, made, made, answers, 0.4, "mean", cap=0.5)
    found.backward()  # type: ignore[no-untyped-call]

    assert float(found.detach()) == pytest.approx(-0.4 * 0.35)
    assert answers.grad is not None
    assert not answers.grad[0].any() and bool((answers.grad[1] < 0).all())
    assert float(dual_error(made, made, made, answers.detach(), 0.4, "mean")) == pytest.approx(-0.4 * 0.85)


def test_the_adversarial_losses_are_the_papers_logarithms() -> None:
    """D maximizes log D(x) + log(1 - D(x')); G minimizes -log D(x'), which points the same way and does not fade."""
    real, made = torch.tensor([1.2, -0.3]), torch.tensor([0.7, -2.0])

    def judged(logit: Tensor) -> float:
        return 1 / (1 + math.exp(-float(logit)))

    by_hand = sum(-math.log(judged(r)) - math.log(1 - judged(m)) for r, m in zip(real, made, strict=True)) / 2
    assert float(judge_loss(real, made)) == pytest.approx(by_hand, rel=1e-6)
    assert float(fool_loss(made)) == pytest.approx(sum(-math.log(judged(m)) for m in made) / 2, rel=1e-6)
    assert math.isfinite(float(judge_loss(torch.tensor([-500.0]), torch.tensor([500.0]))))


def test_the_center_keeps_away_from_zero() -> None:
    """Deep SVDD: an entry of 0 is met by weights of 0."""
    latents = torch.tensor([[1.0, 0.02, -0.04, 0.1, -0.3], [3.0, 0.06, -0.04, -0.1, -0.1]])

    torch.testing.assert_close(latent_center(latents), torch.tensor([2.0, 0.1, -0.1, 0.1, -0.2]))


def test_the_papers_weights_are_the_defaults_and_each_term_carries_its_own() -> None:
    """1, 5, 1, 0.05, 1 and k = 0.4: every term of every turn against the plain formulas."""
    nets, look, objective = a_step(Weights())
    auxiliary = nets.auxiliary
    with torch.no_grad():
        x, made, z = look.images, look.made, look.latents
        plain = {
            "image": image_error(x, nets.generator(x)),
            "latent": latent_error(nets.generator.encoder(x), auxiliary.encoder(made)),
            "center": 0.05 * center_distance(z, nets.center),
            "dual": image_error(x, auxiliary(x)) - 0.4 * image_error(made, auxiliary(made)),
            "D adversarial": 5 * judge_loss(nets.discriminator(x), nets.discriminator(made)),
            "adversarial": 5 * fool_loss(nets.discriminator(made)),
        }
        turns = [objective.discriminator(nets, look), objective.auxiliary(nets, look), objective.generator(nets, look)]
        joint = objective.joint(nets, look)

    found = [{name: float(value) for name, value in terms.items()} for terms in turns]
    expected = {name: float(value) for name, value in plain.items()}
    assert found[0] == pytest.approx({"adversarial": expected["D adversarial"]}, rel=1e-5)
    assert found[1] == pytest.approx({name: expected[name] for name in ("dual", "latent")}, rel=1e-5)
    names = ("image", "adversarial", "center", "latent")
    assert found[2] == pytest.approx({name: expected[name] for name in names}, rel=1e-5)
    assert {name: float(value) for name, value in joint.items()} == pytest.approx(
        {name: expected[name] for name in (*names, "dual")}, rel=1e-5
    )


def test_with_w_g_the_generator_also_wants_to_be_reconstructed() -> None:
    """ADAE: 0.4 |x' - D'(x')|_1 in its turn, and only there."""
    nets, look, objective = a_step(RIVALS)

    terms = objective.generator(nets, look)

    expected = 0.4 * image_error(look.made, nets.auxiliary(look.made))
    assert float(terms["rival"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert "rival" not in objective.auxiliary(nets, look)


# --- whose turn it is -------------------------------------------------------------------------------------------------

PARTS = {
    "G_e": "generator.encoder", "G_d": "generator.decoder", "G_e'": "auxiliary.encoder", "G_d'": "auxiliary.decoder",
    "D": "discriminator",
}  # fmt: skip


def reached(nets: LrdanNets, terms: Terms) -> set[str]:
    """The networks to which the gradient of ``terms`` flows."""
    nets.zero_grad(set_to_none=True)
    cast(Tensor, sum(terms.values())).backward(retain_graph=True)  # type: ignore[no-untyped-call]

    def any_slope(net: nn.Module) -> bool:
        return any(p.grad is not None and bool((p.grad != 0).any()) for p in net.parameters())

    return {name for name, path in PARTS.items() if any_slope(nets.get_submodule(path))}


def test_each_turn_pulls_at_what_its_optimizer_may_move_and_at_nothing_before_it() -> None:
    """D's turn reaches D alone, D' turn D' alone; G's passes through both, whose weights `Turn` keeps still."""
    nets, look, objective = a_step()

    assert reached(nets, objective.discriminator(nets, look)) == {"D"}
    assert reached(nets, objective.auxiliary(nets, look)) == {"G_e'", "G_d'"}
    assert {"G_e", "G_d"} <= reached(nets, objective.generator(nets, look))
    assert {"G_e", "G_d", "G_e'", "G_d'"} <= reached(nets, objective.joint(nets, look))


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("image", {"G_e", "G_d"}),
        ("adversarial", {"G_e", "G_d", "D"}),
        ("center", {"G_e"}),
        ("latent", {"G_e", "G_d", "G_e'"}),
        ("rival", {"G_e", "G_d", "G_e'", "G_d'"}),
    ],
)
def test_each_term_of_the_generator_flows_where_its_formula_leads(term: str, parts: set[str]) -> None:
    """The center loss concerns the encoder alone; the latent one goes through x' and the other encoder."""
    nets, look, objective = a_step()

    assert reached(nets, {term: objective.generator(nets, look)[term]}) == parts


def test_a_look_that_is_not_held_fixed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: without detaching, D' turn would push G toward images that are hard to reconstruct."""
    nets, look, objective = a_step()
    monkeypatch.setattr(trainer.lrdan_objective.Look, "fixed", lambda self: self)

    assert reached(nets, objective.auxiliary(nets, look)) == {"G_e", "G_d", "G_e'", "G_d'"}


# --- a dual loss that runs away ---------------------------------------------------------------------------------------


def follow(missed: float, spoiled: float, steps: int, nets: LrdanNets | None = None) -> None:
    """``steps`` in which D' misses good images by ``missed`` an element and generated ones by ``spoiled``."""
    nets = nets or LrdanNets(SPEC, seed=1)
    images = torch.zeros(2, 1, 16, 16)
    look = Look(images, torch.zeros(2, 6, 1, 1), images)
    for _ in range(steps):
        require_bounded(nets, look, images + missed, images + spoiled, blank=0.3)


def test_a_dual_term_that_runs_away_is_named_with_both_halves() -> None:
    """Good images are missed by more than one color would miss them, generated ones inverted."""
    with pytest.raises(TrainingError, match=r"dual term ran away.*misses good images by .* smaller k or w_d"):
        follow(missed=0.8, spoiled=1.7, steps=3 * DUAL_MEMORY)


@pytest.mark.parametrize(
    ("missed", "spoiled", "steps"),
    [(0.1, 1.9, 500), (0.9, 0.4, 500), (0.9, 1.7, 5)],
    ids=["what the loss is for", "nothing learned yet", "a few bad steps"],
)
def test_what_is_not_running_away_goes_on(missed: float, spoiled: float, steps: int) -> None:
    """Spoiling generated images while good ones come out well is the aim; so is not stopping at the first stumble."""
    follow(missed, spoiled, steps)


def test_auxiliary_training_without_anything_real_to_hold_on_to_runs_away_and_is_stopped() -> None:
    """The real thing: k = 0.99 and images on which G and x cannot be told apart end inverted, and the guard sees it."""
    nets = LrdanNets(replace(SPEC, side=16), seed=1)
    images = torch.where(tensors(8, 1, 16, 16, seed=4) > 0, 1.0, -1.0)
    look = Look(images, torch.zeros(8, 6, 1, 1), images)  # a perfect generator
    objective = Objective(Weights(dual=1.0, latent=0.0, k=0.99), blank=1.0)
    optimizer = torch.optim.Adam(nets.auxiliary.parameters(), lr=2e-3, betas=(0.5, 0.999))

    with pytest.raises(TrainingError, match="dual term ran away"):
        for _ in range(400):
            optimizer.zero_grad()
            # Planted: the real half forgotten, as it is when its gradient has faded in a saturated tanh.
            (-objective.weights.k * image_error(images, nets.auxiliary(images))).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            objective.auxiliary(nets, look)


# --- settings and networks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"k": 1.0}, "k = 1.0: from 1 on"),
        ({"dual": -1.0}, "weight dual"),
        ({"adversarial": math.nan}, "weight adversarial"),
        ({"image": 0.0}, "w_i = 0"),
        ({"cap": 0.0}, "cap must be above 0"),
    ],
)
def test_weights_that_cannot_teach_are_refused(weights: dict[str, float], message: str) -> None:
    """At k = 1 reconstructing nothing at all would be as good as anything."""
    with pytest.raises(CommandError, match=message):
        Weights(**weights)


@pytest.mark.parametrize(("side", "stages"), [(32, 5), (256, 8), (64, 6)])
def test_the_networks_end_in_one_vector_and_come_back_to_the_image(side: int, stages: int) -> None:
    """Five halvings for the paper's 32 px, eight for frames; tanh keeps the answer in -1 to 1."""
    spec = LrdanSpec(side, 3)
    net = AutoEncoder(spec).eval()

    with torch.no_grad():
        images = tensors(1, 3, side, side, seed=5)
        latents, answer = net.encoder(images), net(100 * images)

    assert spec.stages == stages
    assert latents.shape == (1, spec.latent, 1, 1) and answer.shape == images.shape
    assert float(answer.abs().max()) <= 1
    assert Discriminator(spec)(images).shape == (1,)


def test_a_latent_grid_keeps_places_apart() -> None:
    """Four halvings of 64 px: 4 x 4 vectors, and a judge that looks at each."""
    spec = LrdanSpec(64, 1, latent=8, grid=4)
    nets = LrdanNets(spec, seed=1)

    look = Look.at(nets, tensors(2, 1, 64, 64, seed=8))

    assert spec.stages == 4 and look.latents.shape == (2, 8, 4, 4) and look.made.shape == look.images.shape
    assert nets.discriminator(look.images).shape == (2,) and nets.center.shape == (8, 4, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"side": 28}, "such as 32"), ({"side": 2}, "at least twice"), ({"width": 20}, "a multiple of 16")],
)
def test_sizes_that_do_not_halve_are_refused_with_one_that_does(wrong: dict[str, int], message: str) -> None:
    """28 px is MNIST as it comes."""
    with pytest.raises(CommandError, match=message):
        replace(SPEC, **wrong)


def test_an_image_gets_the_same_answer_in_any_company() -> None:
    """No statistics over the batch: what was trained on real and generated images together is what is deployed."""
    nets = LrdanNets(SPEC, seed=1)
    images = tensors(4, 1, 16, 16, seed=6)

    together, alone = nets.auxiliary(images)[:1], nets.auxiliary(images[:1])
    torch.testing.assert_close(together, alone)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in nets.modules())


def test_gray_levels_become_the_range_of_the_decoders() -> None:
    """0 is -1, 255 is 1."""
    frames = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 1, 3, 1)

    torch.testing.assert_close(to_signed(frames).flatten(), torch.tensor([-1.0, 1.0, -0.6]))
