"""What decides a teacher: the configuration of a distillation, and its default values for every profile.

Owns the values and where each comes from.  Leaves what is done with them to ``distill``, and the sentences about
where a run departs from its reference to ``teacher_card``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from edge.errors import TrainingError
from trainer.patch_nets import PROFILES, PatchNetSpec
from trainer.photographs import ViewRecipe

Rate = Literal["cosine", "constant"]


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """Everything that decides the result besides photographs and P; goes into checkpoint and card.

    ``steps`` or ``minutes`` is the length of the run, the other one None.  ``views`` are prepared before training,
    and P is asked once for each of them; 0 cuts every batch anew and asks P at every step.  ``batch_views`` counts
    views, each of which holds one patch or many.  ``sampling_px`` is the distance of the patches in a view, None
    the network's own stride (4 px if that is 1, see ``stride_px``).  ``rate`` says whether the learning rate stays
    or falls to zero along half a cosine.  ``margin`` is delta of L_m, in squared descriptor units.  ``half`` stores
    the teacher in half precision.

    Raises:
        TrainingError: the rate is unknown, a loss weight is negative, L_m has no other view in the batch, or fewer
            views are prepared than make a batch.
    """

    spec: PatchNetSpec = PROFILES["line"]
    target: str = "map"
    layers: tuple[str, ...] = ("layer1", "layer2")
    magnify: int = 1
    seed: int = 1
    steps: int | None = 20_000
    minutes: float | None = None
    views: int = 8_000
    validation_views: int = 256
    validation_share: float = 0.06
    batch_views: int = 12
    sampling_px: int | None = None
    learning_rate: float = 2e-3
    rate: Rate = "cosine"
    warmup_steps: int = 200
    weight_decay: float = 1e-5
    lambda_k: float = 1.0
    lambda_m: float = 0.0
    lambda_c: float = 1.0
    # The paper's delta is in no text that could be reached; 1 is torch's TripletMarginLoss.
    margin: float = 1.0
    exposure: float = 0.0
    half: bool = False
    recipe: ViewRecipe = field(default_factory=ViewRecipe)

    def __post_init__(self) -> None:
        if self.rate not in get_args(Rate):
            raise TrainingError(f"unknown course of the learning rate {self.rate!r}; choose cosine or constant")
        weights = (self.lambda_k, self.lambda_m, self.lambda_c)
        if min(weights) < 0.0 or max(weights) == 0.0:
            raise TrainingError(f"the weights of L_k, L_m, L_c are {weights}; give none below 0 and one above it")
        if self.lambda_m > 0.0 and self.batch_views < 2:
            raise TrainingError("L_m compares with patches of another view; give a batch of at least 2 views")
        if 0 < self.views < self.batch_views:
            raise TrainingError(
                f"{self.views} views do not fill a batch of {self.batch_views}; prepare more, or 0 to cut them anew"
            )

    @property
    def stride_px(self) -> int:
        """Distance in px between the patches of a view: all positions of a stride-1 network say much the same, and
        training on every one of them costs 16 times as much as on every fourth in each direction.
        """
        return self.sampling_px or (self.spec.stride if self.spec.stride > 1 else 4)

    @property
    def room_px(self) -> int:
        """How far L_m shifts a patch at most, in each direction: (p - 1) / 4 px; 0 without L_m."""
        return (self.spec.patch - 1) // 4 if self.lambda_m > 0.0 else 0

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form, as recorded in checkpoints and cards."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def paper_schedule(spec: PatchNetSpec) -> DistillConfig:
    """Bergmann et al. 2020: one patch at a time, as stated where a text could be reached."""
    return DistillConfig(
        spec=spec,
        target="patch",  # section 3.1: P and the teacher see the same patch
        layers=("layer3",),  # ours: where our ResNet-18 ends; the paper takes the 512 numbers of its last stage
        steps=50_000,  # stated, as are Adam, learning rate, weight decay and batch
        batch_views=64,
        learning_rate=2e-4,
        weight_decay=1e-5,
        rate="constant",  # no decay and no warm-up is stated
        warmup_steps=0,
        views=0,  # every patch is a new one
        validation_views=2_048,  # ours: of one patch each
        lambda_k=1.0, lambda_m=0.0, lambda_c=1.0,  # stated for MVTec AD
        sampling_px=spec.stride,  # a view is one patch, there is nothing to skip
        half=True,  # ours
        recipe=ViewRecipe(spec.patch, (4 * spec.patch, 16 * spec.patch), gray_share=0.1, square=True),  # recalled
    )  # fmt: skip


def efficientad_schedule(spec: PatchNetSpec) -> DistillConfig:
    """Batzner et al. 2023, algorithm 3, as far as a P other than WideResNet-101-2 can follow it."""
    return DistillConfig(
        spec=spec,
        target="map",  # P sees the whole image
        layers=("layer2", "layer3"),  # stated, of WideResNet-101-2; ours have 128 + 256 = 384 channels
        magnify=2,  # P sees 512 px where the network sees 256
        steps=60_000,  # stated, as are Adam, learning rate, weight decay, batch and the share of gray images
        batch_views=16,
        learning_rate=1e-4,
        weight_decay=1e-5,
        rate="constant",
        warmup_steps=0,
        views=0,  # ours: 1.8 MB of features a view are dearer to keep than to ask for again
        lambda_k=1.0, lambda_m=0.0, lambda_c=0.0,  # the mean squared error alone
        half=True,  # ours
        # Ours: stated is 256 x 256 of the whole image; a thousand photographs need the variety of other zooms.
        recipe=ViewRecipe(256, (256, 512), gray_share=0.1),
    )  # fmt: skip


# Side of a view, range of its zoom up to the paper's 16p, and views in a batch, by p; all ours.  Beside the margin a
# view should hold some hundred patches; one of a stride-1 network costs as much as ten of the others.
_WHOLE_VIEWS: Mapping[int, tuple[int, tuple[int, int], int]] = MappingProxyType(
    {17: (160, (160, 272), 6), 33: (192, (192, 528), 12), 65: (256, (256, 1040), 12)}
)


def whole_view_schedule(spec: PatchNetSpec) -> DistillConfig:
    """Ours, for a CPU: P sees whole views once and every position is a patch, thousands in a batch.

    The learning rate is 10x the paper's (5x at its full width) and falls to zero along a cosine, because a batch
    here holds 7,500 patches where the paper's holds 64.  Loss weights and weight decay are the paper's.
    """
    side_px, zoom_px, batch_views = _WHOLE_VIEWS[spec.patch]
    return DistillConfig(
        spec=spec,
        batch_views=batch_views,
        learning_rate=1e-3 if max(spec.widths) > 64 else 2e-3,
        exposure=0.2,
        half=max(spec.widths) > 64,  # the narrow ones are small enough as they are
        recipe=ViewRecipe(side_px, zoom_px),
    )


_SCHEDULES = MappingProxyType(
    {
        "line": whole_view_schedule, "line-fast": whole_view_schedule,
        "line-17": whole_view_schedule, "line-65": whole_view_schedule, "half-65": whole_view_schedule,
        "paper-17": paper_schedule, "paper-33": paper_schedule, "paper-65": paper_schedule,
        "pdn-s": efficientad_schedule,
    }
)  # fmt: skip

# Which of another P's layers stand where ResNet-18's do: the same strides, and its very last stage for the deepest.
_LITE0_LAYERS = MappingProxyType({"layer1": "block2", "layer2": "block4", "layer3": "block10"})


def configure(profile: str, backbone: str, given: Mapping[str, Any]) -> DistillConfig:
    """The default configuration of ``profile``, with those values of ``given`` that are not None.

    ``given`` holds fields of ``DistillConfig``, and ``gray_share``, that of the recipe.  Asking the paper's profiles
    for target ``map`` changes their schedule to that of whole views; minutes replace the default's steps.

    Raises:
        TrainingError: no such profile, or values that cannot go together.
    """
    if profile not in PROFILES:
        raise TrainingError(f"profile {profile}: unknown; choose one of {', '.join(PROFILES)}")
    asked = {name: value for name, value in given.items() if value is not None}
    default = _SCHEDULES[profile](PROFILES[profile])
    if default.target == "patch" and asked.get("target") == "map":
        default = whole_view_schedule(default.spec)
    if backbone == "efficientnet-lite0":
        single = default.layers == ("layer3",)  # the pooled vector of the last stage
        default = replace(default, layers=("head",) if single else tuple(_LITE0_LAYERS[x] for x in default.layers))
    gray_share = asked.pop("gray_share", default.recipe.gray_share)
    if "minutes" in asked:
        asked["steps"] = None
    config = replace(default, **asked, recipe=replace(default.recipe, gray_share=gray_share))
    if config.recipe.side_px == config.spec.patch:  # a view of one patch, and what L_m may shift it by
        wider = config.spec.patch + 2 * config.room_px
        config = replace(config, recipe=replace(config.recipe, side_px=wider))
    return config
