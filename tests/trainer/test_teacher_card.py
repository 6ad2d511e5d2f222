"""Cards: a run is compared with the paper of its own family, and every departure has its sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trainer.distill_config import DistillConfig, configure
from trainer.patch_nets import PatchNetSpec
from trainer.teacher_card import deviations, thin


def listed(config: DistillConfig) -> str:
    return "\n".join(deviations(config, "resnet18"))


def test_the_papers_schedule_departs_only_where_it_must() -> None:
    """p = 17 as in the paper: what is left are P, photographs, the forms of the losses, and precision."""
    found = listed(configure("paper-17", "resnet18", {})).splitlines()

    assert [line.split()[0] for line in found] == ["the", "the", "the", "L_k", "L_c", "ever", "the", "the"]
    for word in ("linear", "layer3", "recalled", "sum", "signed", "ImageNet", "bfloat16", "half precision"):
        assert any(word in line for line in found)


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("paper-33", {}, "P sees the 32 x 32 px of each patch"),
    ("paper-65", {}, "P sees the 60 x 60 px of each patch"),
    ("paper-17", {"target": "map"}, "target mode map: P sees whole views"),
    ("paper-17", {"target": "map"}, "views of 160 px of images zoomed to 160 to 272 px"),
    ("paper-17", {"target": "map"}, "a batch is 6 views with a patch every 4 px, the paper's 64 single patches"),
    ("paper-17", {"target": "map"}, "learning rate 0.001, falling to zero along a cosine after 200 steps"),
    ("paper-17", {"learning_rate": 1e-3}, "learning rate 0.001, constant after 0 steps"),
    ("paper-17", {"rate": "cosine"}, "falling to zero"),
    ("paper-17", {"steps": 9}, "the run is 9 steps long, the paper's 50000 steps"),
    ("paper-17", {"minutes": 9.0}, "the run is 9 minutes long"),
    ("paper-17", {"batch_views": 8}, "a batch is 8 single patches, the paper's 64 single patches"),
    ("paper-17", {"weight_decay": 0.0}, "weight decay is 0, the paper's 1e-05"),
    ("paper-17", {"lambda_m": 1.0}, "L_k, L_m, L_c weigh 1, 1, 1; the paper has 1, 0, 1"),
    ("paper-17", {"lambda_m": 1.0}, "L_m has a margin of 1, shifts of up to 4 px"),
    ("paper-17", {"lambda_c": 0.0}, "L_k, L_m, L_c weigh 1, 0, 0"),
    ("paper-17", {"gray_share": 0.3}, "30% of the views are gray (10% in the reference)"),
    ("paper-17", {"magnify": 2}, "P sees the view magnified 2 times, the paper's 1 times"),
    ("paper-17", {"exposure": 0.2}, "exposure is varied (strength 0.2)"),
    ("paper-17", {"views": 5000}, "5000 views of the given photographs"),
    ("paper-17", {"layers": ("layer1", "layer2")}, "the target is resnet18's layer1 and layer2"),
    ("line", {}, "width is (32, 64, 64) and d = 32, the paper's is (128, 256, 256) and 128"),
    ("line", {"target": "patch"}, "a batch is 12 views with a patch every 32 px"),
    ("pdn-s", {"steps": 9}, "the run is 9 steps long, the paper's 60000 steps"),
    ("pdn-s", {"magnify": 1}, "P sees the view magnified 1 times, the paper's 2 times"),
    ("pdn-s", {"lambda_c": 1.0}, "L_k, L_m, L_c weigh 1, 0, 1; the paper has 1, 0, 0"),
    ("pdn-s", {"target": "patch"}, "EfficientAD shows P the whole image"),
]  # fmt: skip


@pytest.mark.parametrize(("profile", "given", "sentence"), CHANGES)
def test_each_departure_has_its_sentence(profile: str, given: dict[str, Any], sentence: str) -> None:
    """What is changed is named, with the paper's value beside it where it has one."""
    assert sentence in listed(configure(profile, "resnet18", given))


@pytest.mark.parametrize(("profile", "given", "sentence"), [change for change in CHANGES if change[1]])
def test_no_sentence_stands_without_its_departure(profile: str, given: dict[str, Any], sentence: str) -> None:
    """Control for the test above: the default configuration of the same profile does not say it."""
    assert sentence not in listed(configure(profile, "resnet18", {}))


def test_the_pdn_is_compared_with_efficientad() -> None:
    """Another P without its pooling, a decoder, no padding; nothing about the other paper's patches or L_c."""
    found = listed(configure("pdn-s", "resnet18", {}))

    for part in ("P is resnet18 (layer2 and layer3); EfficientAD takes", "linear decoder", "padding", "64 views"):
        assert part in found
    for foreign in ("LeakyReLU", "L_c", "512 numbers", "gray", "learning rate", "a batch is"):
        assert foreign not in found


def test_both_readings_of_the_papers_table_for_65_are_the_papers() -> None:
    """Its conv3 has 128 or 256 channels; neither is called a departure, another width is."""
    config = configure("paper-65", "resnet18", {})
    other = replace(config, spec=PatchNetSpec(65, (128, 128, 256, 256), 128))
    narrow = replace(config, spec=PatchNetSpec(65, (128, 128, 64, 256), 128))

    assert "width is" not in listed(config) and "width is" not in listed(other)
    assert "the paper's is (128, 128, 128, 256) or (128, 128, 256, 256) and 128" in listed(narrow)


def test_a_long_history_is_thinned_and_keeps_its_end() -> None:
    """A card shows the course, not every thousandth step; the last figures are what counts."""
    kept = thin([{"step": step} for step in range(100)])

    assert len(kept) <= 24 and kept[-1] == {"step": 99}
