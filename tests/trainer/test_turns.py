"""Turns: networks that learn against each other share one loop, each with its own loss and its own Adam."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trainer.loop
import trainer.run_state
from edge.errors import CommandError, TrainingError
from trainer.checkpoint import load_checkpoint
from trainer.config import Schedule
from trainer.loop import Outcome, image_places, plan_steps, run_training
from trainer.method import Batch, Losses, Method, Turn

SCHEDULE = Schedule(steps=12, batch_size=3, learning_rate=1e-2, weight_decay=0.0, decay="constant")
FRAMES = np.random.default_rng(1).integers(0, 256, (14, 4, 4, 1), np.uint8)
BETAS = (0.5, 0.9)


@dataclass(eq=False)
class Duel:
    """A critic that tells pictures from a maker's, and a maker that wants to pass: the smallest method with two turns.

    From ``nan_at`` or ``bad_gradient_at`` on the maker's loss, or only its slope, is no number; the held-out loss falls
    until ``overfits_after`` steps and rises from there.
    """

    nan_at: int = 10**9
    bad_gradient_at: int = 10**9
    overfits_after: int = 10**9
    order: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(7)
        self.trainable = nn.ModuleDict({"critic": nn.Linear(16, 1), "maker": nn.Linear(2, 16)})

    def turns(self) -> tuple[Turn, ...]:
        critic, maker = (tuple(self.trainable[name].parameters()) for name in ("critic", "maker"))
        return (Turn("critic", critic, self.critic_loss, rate=2.0), Turn("maker", maker, self.maker_loss, betas=BETAS))

    def critic_loss(self, batch: Batch) -> Losses:
        self.order.append(f"critic {batch.draw}")
        made, real = self.made(batch).detach(), batch.frames.flatten(1).float() / 255
        critic = self.trainable["critic"]
        return {
            "real": nn.functional.softplus(-critic(real)).mean(),
            "fake": nn.functional.softplus(critic(made)).mean(),
        }

    def maker_loss(self, batch: Batch) -> Losses:
        self.order.append(f"maker {batch.draw}")
        made, step = self.made(batch), len(self.order) // 2
        away = (made - batch.frames.flatten(1).float() / 255).square().mean()
        if step >= self.nan_at:
            away = away * float("nan")
        if step >= self.bad_gradient_at:
            away = away + (made.sum() * 0).sqrt()  # the value is 0, the slope 0 / 0
        return {"picture": away, "passing": nn.functional.softplus(-self.trainable["critic"](made)).mean()}

    def loss(self, batch: Batch) -> Losses:
        assert not torch.is_grad_enabled()
        return torch.tensor(abs(len(self.order) // 2 - self.overfits_after) * float(len(batch.frames)))

    def made(self, batch: Batch) -> Tensor:
        noise = torch.randn(len(batch.frames), 2, generator=torch.Generator().manual_seed(batch.draw))
        return cast(Tensor, self.trainable["maker"](noise))


def train(
    duel: Duel, *, checkpoint: Path | None = None, resume: bool = False, stop_after: int = 10**6,
    schedule: Schedule = SCHEDULE,
) -> tuple[dict[str, Tensor], Outcome]:  # fmt: skip
    asked = iter(range(stop_after, 0, -1))
    outcome = run_training(
        cast(Method, duel), FRAMES[:9], FRAMES[9:], schedule, seed=3, identity={"seed": 3}, checkpoint=checkpoint,
        resume=resume, stopped=lambda: next(asked) == 1,
    )  # fmt: skip
    return {name: tensor.clone() for name, tensor in duel.trainable.state_dict().items()}, outcome


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def by_hand(frozen_critic: bool = True) -> dict[str, Tensor]:
    """The same training written out: two Adams, the critic first, its gradients cleared before its own turn."""
    duel = Duel()
    critic, maker = duel.trainable["critic"], duel.trainable["maker"]
    first = torch.optim.Adam(critic.parameters(), lr=2e-2)
    second = torch.optim.Adam(maker.parameters(), lr=1e-2, betas=BETAS)
    for step in range(SCHEDULE.steps):
        draw = int(np.random.default_rng([3, 0xD4A3, step]).integers(2**62))
        places = image_places(9, 3, step, seed=3)
        batch = Batch(torch.from_numpy(FRAMES[places]), places, draw)
        for optimizer, loss in ((first, duel.critic_loss), (second, duel.maker_loss)):
            if frozen_critic:
                first.zero_grad()
            second.zero_grad()
            terms = loss(batch)
            assert isinstance(terms, dict)
            sum(terms.values()).backward()
            optimizer.step()
    return duel.trainable.state_dict()


def test_two_turns_are_two_adams_in_the_stated_order() -> None:
    """The loop does what the paper's pseudo-code says, bit for bit, each Adam with its own rate and betas."""
    assert same(train(Duel())[0], by_hand())


def test_a_critic_that_keeps_the_makers_gradient_would_be_noticed() -> None:
    """Planted bug: without clearing, the critic's next step contains what the maker wanted from it."""
    assert not same(train(Duel())[0], by_hand(frozen_critic=False))


def test_all_turns_of_a_step_see_the_same_batch() -> None:
    """What one turn draws at random the other can draw again."""
    duel = Duel()

    train(duel)

    assert duel.order[0::2] == [name.replace("maker", "critic") for name in duel.order[1::2]]
    assert len(set(duel.order)) == 2 * SCHEDULE.steps


def test_the_curve_keeps_every_named_term_and_the_last_turns_sum() -> None:
    """A balance that is lost shows in the terms long before it shows in the maps."""
    point = train(Duel())[1].curve[0]

    assert list(point.terms) == ["critic.real", "critic.fake", "maker.picture", "maker.passing"]
    assert point.loss == pytest.approx(point.terms["maker.picture"] + point.terms["maker.passing"])


@pytest.mark.parametrize("stop_after", [1, 7])
def test_a_stopped_duel_goes_on_as_if_it_had_not_been(tmp_path: Path, stop_after: int) -> None:
    """Weights and both Adams come back; the file says whose moments are whose."""
    whole, outcome = train(Duel())
    path = tmp_path / "run.safetensors"

    train(Duel(), checkpoint=path, stop_after=stop_after)
    names = {name.split(".")[0] for name in load_checkpoint(path).tensors}
    resumed, ended = train(Duel(), checkpoint=path, resume=True)

    assert names == {"trainable", "optimizer-critic", "optimizer-maker"}
    assert same(whole, resumed) and outcome.curve == ended.curve


@pytest.mark.parametrize("forgotten", ["optimizer-critic", "optimizer-maker"])
def test_a_resume_that_forgets_either_adam_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """Planted bug for the test above."""
    whole, path, restore = train(Duel())[0], tmp_path / "run.safetensors", trainer.run_state.restore_optimizer
    train(Duel(), checkpoint=path, stop_after=7)
    monkeypatch.setattr(
        trainer.run_state, "restore_optimizer",
        lambda file, name, optimizer: None if name == forgotten else restore(file, name, optimizer),
    )  # fmt: skip

    assert not same(whole, train(Duel(), checkpoint=path, resume=True)[0])


def test_a_network_with_frozen_layers_can_be_resumed(tmp_path: Path) -> None:
    """Adam keeps nothing for weights that never move, as the front half of FCDD's trunk: that is no damage."""

    def frozen() -> Duel:
        duel = Duel()
        duel.trainable["maker"].weight.requires_grad_(False)
        return duel

    whole, path = train(frozen())[0], tmp_path / "run.safetensors"
    train(frozen(), checkpoint=path, stop_after=5)

    assert same(whole, train(frozen(), checkpoint=path, resume=True)[0])


def test_a_term_that_is_no_number_stops_the_run_and_is_named(tmp_path: Path) -> None:
    """With five losses, "the loss became nan" helps nobody; and what was good before stays on disk."""
    path = tmp_path / "run.safetensors"
    train(Duel(), checkpoint=path, stop_after=5)
    before = path.read_bytes()

    with pytest.raises(TrainingError, match=r"the term picture of the maker's loss became nan at step 8 of 12"):
        train(Duel(nan_at=3), checkpoint=path, resume=True)  # three steps after those five
    assert path.read_bytes() == before


def test_weights_that_are_no_numbers_never_replace_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slope of 0 / 0 spoils the weights while every loss of the step was finite."""
    path = tmp_path / "run.safetensors"
    train(Duel(), checkpoint=path, stop_after=5)
    before = path.read_bytes()
    monkeypatch.setattr(trainer.loop, "CHECKPOINT_EVERY_S", 0.0)

    with pytest.raises(TrainingError, match=r"maker\.weight first, became infinite or no number by step 8"):
        train(Duel(bad_gradient_at=3), checkpoint=path, resume=True)
    kept = path.read_bytes()

    assert kept != before  # steps 6 and 7 were good
    assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(path).tensors.values())


def test_without_the_look_at_the_weights_the_checkpoint_would_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control for the test above: the same run with that look taken away ends with a file of no use."""
    path = tmp_path / "run.safetensors"
    monkeypatch.setattr(trainer.loop, "CHECKPOINT_EVERY_S", 0.0)
    monkeypatch.setattr(trainer.run_state, "_broken", lambda trainable: [])

    with pytest.raises(TrainingError, match="became nan"):
        train(Duel(bad_gradient_at=3), checkpoint=path)

    assert not all(torch.isfinite(tensor).all() for tensor in load_checkpoint(path).tensors.values())


PATIENT = replace(SCHEDULE, steps=40, patience=3)  # a point of the curve every second step


def test_patience_stops_at_the_held_out_images_and_keeps_the_best_weights() -> None:
    """After step 10 the held-out loss rises: three points later it ends, with the weights of step 10."""
    stopped, outcome = train(Duel(overfits_after=10), schedule=PATIENT)
    at_ten, _ = train(Duel(), schedule=replace(SCHEDULE, steps=10))
    without, ran_on = train(Duel(overfits_after=10), schedule=replace(PATIENT, patience=0))

    assert (outcome.finished, outcome.steps, outcome.best_step) == (True, 16, 10)
    assert same(stopped, at_ten) and not same(without, at_ten)
    assert (ran_on.steps, ran_on.best_step) == (40, None)


@pytest.mark.parametrize("stop_after", [3, 12, 15])
def test_patience_survives_an_interruption(tmp_path: Path, stop_after: int) -> None:
    """Before, and after the best point: what was best and how long it has waited are in the checkpoint."""
    whole, outcome = train(Duel(overfits_after=10), schedule=PATIENT)
    path = tmp_path / "run.safetensors"

    train(Duel(overfits_after=10), checkpoint=path, stop_after=stop_after, schedule=PATIENT)
    again = Duel(overfits_after=10, order=["before"] * 2 * stop_after)
    resumed, ended = train(again, checkpoint=path, resume=True, schedule=PATIENT)
    exported_again, _ = train(Duel(overfits_after=10), checkpoint=path, resume=True, schedule=PATIENT)

    assert (ended.steps, ended.best_step) == (outcome.steps, outcome.best_step)
    assert same(whole, resumed)
    assert same(whole, exported_again)  # the export failed after a whole run: nothing is trained on, the same is kept


def test_a_held_out_loss_that_is_no_number_stops_the_run() -> None:
    """It could neither be drawn nor compared."""
    with pytest.raises(TrainingError, match="held-out good images became nan"):
        train(Duel(overfits_after=cast(int, float("nan"))), schedule=PATIENT)


def test_a_rehearsal_of_a_duel_leaves_no_trace() -> None:
    """`--minutes` times the steps of both networks, and puts both back."""
    duel, ticks = Duel(), iter([100.0, 110.0])

    planned = plan_steps(
        cast(Method, duel), FRAMES[:9], SCHEDULE, minutes=1.0, seed=3, monotonic=lambda: next(ticks)
    )  # fmt: skip

    assert planned.steps == 30
    assert same(train(duel)[0], train(Duel())[0])


def test_patience_counts_points() -> None:
    """A negative number is a misunderstanding."""
    with pytest.raises(CommandError, match="patience"):
        replace(SCHEDULE, patience=-1)
