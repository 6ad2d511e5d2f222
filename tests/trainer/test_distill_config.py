"""Defaults of distillation: each profile has the schedule of its source, options override it one by one."""

from __future__ import annotations

from typing import Any

import pytest

from edge.errors import TrainingError
from trainer.distill_config import DistillConfig, configure
from trainer.patch_nets import PROFILES, PatchNetSpec


def asked(profile: str, **given: Any) -> DistillConfig:
    return configure(profile, "resnet18", given)


@pytest.mark.parametrize("patch", [17, 33, 65])
def test_the_papers_profiles_have_the_papers_schedule(patch: int) -> None:
    """50 000 batches of 64 new patches, a tenth of them gray, Adam at a constant 2e-4, decay 1e-5, lambdas 1, 0, 1."""
    config = asked(f"paper-{patch}")

    assert (config.target, config.steps, config.batch_views, config.views) == ("patch", 50_000, 64, 0)
    assert (config.learning_rate, config.rate, config.weight_decay) == (2e-4, "constant", 1e-5)
    assert (config.lambda_k, config.lambda_m, config.lambda_c) == (1.0, 0.0, 1.0)
    assert (config.recipe.side_px, config.recipe.zoom_px) == (patch, (4 * patch, 16 * patch))
    assert (config.recipe.gray_share, config.recipe.square, config.exposure) == (0.1, True, 0.0)


def test_the_pdn_has_efficientads_schedule() -> None:
    """60 000 batches of 16 views, a tenth of them gray, a constant 1e-4, P magnified twice, L_k alone."""
    config = asked("pdn-s")

    assert (config.target, config.steps, config.batch_views, config.magnify) == ("map", 60_000, 16, 2)
    assert (config.learning_rate, config.rate, config.weight_decay) == (1e-4, "constant", 1e-5)
    assert (config.lambda_k, config.lambda_m, config.lambda_c) == (1.0, 0.0, 0.0)
    assert (config.recipe.gray_share, config.exposure) == (0.1, 0.0)


def test_line_is_distilled_as_the_shipped_one_was() -> None:
    """The values of trainer/assets/line.json, but for its length in minutes."""
    config = asked("line")

    assert config == DistillConfig(exposure=0.2)
    assert (config.steps, config.views, config.batch_views, config.learning_rate) == (20_000, 8_000, 12, 2e-3)
    assert (config.recipe.side_px, config.recipe.zoom_px, config.recipe.gray_share) == (192, (192, 528), 0.3)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_can_be_distilled(profile: str) -> None:
    """Each has a schedule of its own shape; full widths are stored in half precision, narrow ones as they are."""
    config = asked(profile)

    assert config.spec == PROFILES[profile]
    assert config.half == (not profile.startswith("line"))


def test_the_papers_profiles_in_map_mode_learn_from_whole_views() -> None:
    """64 whole views of 33 px make no sense: the mode brings the views, batch and rate that belong to it."""
    config = asked("paper-33", target="map", minutes=60.0)

    assert (config.target, config.batch_views, config.rate, config.recipe.side_px) == ("map", 12, "cosine", 192)
    assert (config.steps, config.minutes, config.half) == (None, 60.0, True)


def test_line_in_patch_mode_keeps_its_views() -> None:
    """P then sees every eighth patch of them alone, as before there were other schedules."""
    assert asked("line", target="patch") == DistillConfig(exposure=0.2, target="patch")


def test_what_is_given_overrides_the_default_and_none_does_not() -> None:
    """One option changes one value."""
    config = asked("paper-17", learning_rate=1e-3, lambda_c=0.0, gray_share=0.5, half=False, steps=None)

    assert (config.learning_rate, config.lambda_c, config.recipe.gray_share, config.half) == (1e-3, 0.0, 0.5, False)
    assert (config.steps, config.batch_views) == (50_000, 64)


@pytest.mark.parametrize(("patch", "room"), [(17, 4), (33, 8), (65, 16)])
def test_metric_learning_makes_room_for_its_shift(patch: int, room: int) -> None:
    """A view of one patch is cut larger by the (p - 1) / 4 px that p+ may be moved."""
    config = asked(f"paper-{patch}", lambda_m=1.0)

    assert (config.room_px, config.recipe.side_px) == (room, patch + 2 * room)
    assert asked(f"paper-{patch}").room_px == 0


@pytest.mark.parametrize(("profile", "layers"), [("line", ("block2", "block4")), ("pdn-s", ("block4", "block10")),
                                                 ("paper-33", ("head",))])  # fmt: skip
def test_another_p_has_its_own_layers(profile: str, layers: tuple[str, ...]) -> None:
    """Of the same strides, and the very last stage where the paper takes it; what is asked for is taken."""
    assert configure(profile, "efficientnet-lite0", {}).layers == layers
    assert configure(profile, "efficientnet-lite0", {"layers": ("block7",)}).layers == ("block7",)


@pytest.mark.parametrize(("profile", "stride"), [("line", 4), ("line-65", 8), ("line-17", 4), ("pdn-s", 4)])
def test_a_network_of_stride_one_is_sampled_every_four_px(profile: str, stride: int) -> None:
    """The others at their own stride, unless another one is asked for."""
    assert asked(profile).stride_px == stride
    assert asked(profile, sampling_px=6).stride_px == 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": "linear"}, "choose cosine or constant"),
        ({"lambda_c": -1.0}, "none below 0"),
        ({"lambda_k": 0.0, "lambda_c": 0.0}, "one above it"),
        ({"lambda_m": 1.0, "batch_views": 1}, "at least 2 views"),
        ({"views": 8, "batch_views": 12}, "8 views do not fill a batch of 12"),
    ],
)
def test_values_that_cannot_go_together_are_refused(given: dict[str, Any], message: str) -> None:
    """Before any photograph is read, with what to give instead."""
    with pytest.raises(TrainingError, match=message):
        asked("line", **given)


def test_the_configuration_tells_its_architecture() -> None:
    """Cards and checkpoints record the spec; the PDN's family is part of it."""
    assert asked("pdn-s").to_json()["spec"]["family"] == "pdn"
    assert DistillConfig(spec=PatchNetSpec(17, (1, 1, 1), 1)).to_json()["spec"]["patch"] == 17
