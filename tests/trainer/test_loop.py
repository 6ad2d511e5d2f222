"""The training loop: repeatable, resumable, interruptible, and never silent about a loss that is no number."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import trainer.loop
import trainer.run_state
from edge.errors import CommandError, TrainingError
from trainer.config import LINE, Schedule
from trainer.distill import Teacher
from trainer.loop import Outcome, checkpoint_progress, image_places, plan_steps, run_training
from trainer.method import Batch, Frames
from trainer.methods.student_teacher import StudentTeacher
from trainer.patch_nets import PatchNetSpec, build_patch_net
from trainer.progress import TerminalReporter, stop_on_signals

SCHEDULE = Schedule(steps=12, batch_size=2, learning_rate=1e-3, weight_decay=1e-5, decay="cosine")
TINY = PatchNetSpec(patch=33, widths=(4, 4, 4), descriptor_dim=4)
IDENTITY = {"seed": 3, "data_sha256": "abc"}


@pytest.fixture(scope="module")
def frames() -> Frames:
    noise = np.random.default_rng(5).integers(0, 60, (14, 64, 64, 1))
    return (noise + 20 * np.arange(64).reshape(1, 1, 64, 1) % 150).astype(np.uint8)


def tiny_method(frames: Frames, seed: int = 3) -> StudentTeacher:
    net = build_patch_net(TINY, 77).eval().requires_grad_(False)
    teacher = Teacher("tiny", TINY, net, torch.zeros(1, 4), torch.zeros(1), {}, "0" * 64)
    config = replace(LINE, teachers=("tiny",), size_px=64)
    method = StudentTeacher(config, [teacher], seed=seed)
    method.prepare(frames[:9])
    return method


def train(
    frames: Frames, method: StudentTeacher | None = None, *, checkpoint: Path | None = None, resume: bool = False,
    stop_after: int | None = None, schedule: Schedule = SCHEDULE,
) -> tuple[dict[str, Tensor], Outcome]:  # fmt: skip
    method = method or tiny_method(frames)
    left = iter(range(stop_after or 1_000_000, 0, -1))
    outcome = run_training(
        method, frames[:9], frames[9:], schedule, seed=3, identity=IDENTITY, checkpoint=checkpoint, resume=resume,
        stopped=lambda: next(left) == 1,
    )  # fmt: skip
    return {name: tensor.clone() for name, tensor in method.trainable.state_dict().items()}, outcome


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(frames: Frames) -> None:
    """A bundle can be made again from its provenance."""
    one, again, other = train(frames), train(frames), train(frames, tiny_method(frames, seed=4))

    assert same(one[0], again[0])
    assert one[1].curve == again[1].curve
    assert not same(one[0], other[0])


def test_training_lowers_the_loss(frames: Frames) -> None:
    """The one thing it is for."""
    curve = train(frames, schedule=replace(SCHEDULE, steps=60))[1].curve

    assert curve[-1].held_out_loss < 0.8 * curve[0].held_out_loss


@pytest.mark.parametrize("stop_after", [1, 5, 11])
def test_a_stopped_and_resumed_run_equals_one_that_was_not(frames: Frames, tmp_path: Path, stop_after: int) -> None:
    """Ctrl-C costs nothing: weights and curve are the same bit for bit."""
    whole, outcome = train(frames)
    path = tmp_path / "run.safetensors"

    stopped = train(frames, checkpoint=path, stop_after=stop_after)[1]
    resumed, ended = train(frames, checkpoint=path, resume=True)

    assert (stopped.finished, stopped.steps, ended.finished) == (False, stop_after, True)
    assert same(whole, resumed)
    assert outcome.curve == ended.curve


def test_a_resume_that_forgets_the_optimizer_is_caught(
    frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: the comparison above notices when Adam's moments are lost."""
    whole, path = train(frames)[0], tmp_path / "run.safetensors"
    train(frames, checkpoint=path, stop_after=5)
    monkeypatch.setattr(trainer.run_state, "restore_optimizer", lambda *_: None)

    resumed, _ = train(frames, checkpoint=path, resume=True)

    assert not same(whole, resumed)


def test_a_killed_run_goes_on_from_its_last_periodic_checkpoint(
    frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut gives no warning; what was saved before it is enough."""
    whole, path = train(frames)[0], tmp_path / "run.safetensors"
    monkeypatch.setattr(trainer.loop, "CHECKPOINT_EVERY_S", 0.0)

    def cut(step: int, steps: int, loss: float) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(
            tiny_method(frames), frames[:9], frames[9:], SCHEDULE,
            seed=3, identity=IDENTITY, checkpoint=path, report=cut,
        )  # fmt: skip

    assert checkpoint_progress(path) == (6, 12)
    assert same(whole, train(frames, checkpoint=path, resume=True)[0])


def test_a_checkpoint_of_another_run_is_refused(frames: Frames, tmp_path: Path) -> None:
    """Other data under the same name must not be mixed into what was learned."""
    path = tmp_path / "run.safetensors"
    train(frames, checkpoint=path, stop_after=5)

    with pytest.raises(TrainingError, match=r"learning_rate was 0\.001, now 0\.01"):
        train(frames, checkpoint=path, resume=True, schedule=replace(SCHEDULE, learning_rate=0.01))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TrainingError, match="safetensors"):
        train(frames, checkpoint=path, resume=True)


def test_a_loss_that_is_no_number_stops_training_and_keeps_the_checkpoint(frames: Frames, tmp_path: Path) -> None:
    """A diverged run must not overwrite what was still good, nor end as a bundle."""

    class Diverging(StudentTeacher):
        calls = 0

        def loss(self, batch: Batch) -> Tensor:
            self.calls += 1
            return super().loss(batch) * (float("nan") if self.calls > 8 else 1.0)

    method, path = tiny_method(frames), tmp_path / "run.safetensors"
    train(frames, checkpoint=path, stop_after=5)
    before = path.read_bytes()
    method.__class__ = Diverging

    with pytest.raises(TrainingError, match="loss became nan at step"):
        train(frames, method, checkpoint=path, resume=True)
    assert path.read_bytes() == before


def test_every_image_is_seen_once_an_epoch() -> None:
    """Batches run on across epochs; no image is favored, and epochs differ."""
    places = np.concatenate([image_places(9, 2, step, seed=1) for step in range(9)])

    assert sorted(places[:9]) == sorted(places[9:]) == list(range(9))
    assert list(places[:9]) != list(places[9:])


def test_minutes_become_steps_and_the_rehearsal_leaves_no_trace(frames: Frames) -> None:
    """`--minutes` times a few steps, fixes the number, and trains as `--steps` with that number would."""
    method, ticks = tiny_method(frames), iter([100.0, 110.0])

    planned = plan_steps(method, frames[:9], SCHEDULE, minutes=1.0, seed=3, monotonic=lambda: next(ticks))

    assert planned == replace(SCHEDULE, steps=30)  # 2 s a step
    assert same(train(frames, method)[0], train(frames)[0])
    with pytest.raises(CommandError, match="--minutes"):
        plan_steps(method, frames[:9], SCHEDULE, minutes=0.0, seed=3)


def test_the_first_signal_asks_and_the_second_interrupts() -> None:
    """The first Ctrl-C lets the step finish; whoever is in a hurry presses it again."""
    with stop_on_signals() as stopped:
        before = stopped()
        os.kill(os.getpid(), signal.SIGINT)
        after = stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()  # delivered at the latest here

    assert (before, after) == (False, True)


def test_away_from_a_terminal_there_is_one_line_a_minute(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Logs of a build server should not fill with bars."""
    now = [0.0]
    clock: Callable[[], float] = lambda: now[0]  # noqa: E731
    with TerminalReporter("training", monotonic=clock) as report:
        for step in range(1, 101):
            now[0] = float(3 * step)
            report(step, 100, 0.5)

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0] == "training: step 20 of 100, loss 0.500, 4.0 min left"
