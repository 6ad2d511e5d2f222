"""Training configurations: one frozen dataclass per method, one named preset per recommended setting.

Owns what can be set and why each default is what it is.  Leaves what the settings do to ``methods`` and ``loop``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from edge.errors import CommandError

Decay = Literal["constant", "cosine", "drop", "tenths"]
Center = Literal["none", "mean", "median"]
Pad = Literal["none", "zero", "reflect"]

STUDENTS_NEEDED: Mapping[str, int] = MappingProxyType({"e": 1, "v": 2, "s": 1, "t": 0})
"""The terms of a score, and how many students each takes."""

AUTOENCODER_SIDE_PX = 256
"""EfficientAD's auto-encoder is a table of sizes for images of this side (table 8 there)."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast: what ``loop`` needs to know, the same for every method.

    ``steps`` batches of ``batch_size`` images; Adam with ``learning_rate`` and ``weight_decay``; ``decay`` is
    ``constant`` (paper), ``cosine`` (from the full rate to zero over ``steps``), ``drop`` (a tenth of the rate after
    95 % of the steps: EfficientAD, 66,500 of 70,000) or ``tenths`` (a tenth after 2/3, a hundredth after 5/6: FCDD,
    400 and 500 of 600 epochs).  ``patience`` points of the learning curve without a lower loss on the held-out good
    images end the training, and the best weights are kept; 0 is never (every paper here).

    Raises:
        CommandError: a value is out of range.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    decay: Decay
    patience: int = 0

    def __post_init__(self) -> None:
        if self.patience < 0:
            raise CommandError(f"patience counts points of the learning curve, 0 is off; got {self.patience}")
        if self.steps < 1 or self.batch_size < 1:
            raise CommandError(f"steps and batch size must be at least 1, got {self.steps} and {self.batch_size}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise CommandError(f"the learning rate must be a positive number, got {self.learning_rate}")

    def rate_at(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        if self.decay == "constant":
            return self.learning_rate
        if self.decay == "drop":
            return self.learning_rate * (0.1 if step >= 0.95 * self.steps else 1.0)
        if self.decay == "tenths":
            return self.learning_rate * 0.1 ** ((6 * step >= 4 * self.steps) + (6 * step >= 5 * self.steps))
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Paced(Protocol):
    """The settings that a schedule is made of; every method's configuration has them."""

    @property
    def epochs(self) -> int: ...

    @property
    def min_steps(self) -> int: ...

    @property
    def max_steps(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def decay(self) -> Decay: ...

    @property
    def patience(self) -> int: ...


def schedule_of(settings: Paced, images: int) -> Schedule:
    """``epochs`` passes over ``images``, but no less than ``min_steps`` and no more than ``max_steps`` batches."""
    steps = math.ceil(settings.epochs * images / settings.batch_size)
    return Schedule(
        steps=min(max(steps, settings.min_steps), settings.max_steps),
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        decay=settings.decay,
        patience=settings.patience,
    )


# Paper: Adam, 1e-4, weight decay 1e-5, batches of one image, 100 epochs, constant rate.
PAPER_WEIGHT_DECAY = 1e-5


class MethodConfig(Protocol):
    """What training needs of every method's settings: a frozen dataclass, of which `--set` changes single fields."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def preset(self) -> str: ...

    @property
    def size_px(self) -> int: ...

    def schedule(self, images: int) -> Schedule: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class StudentTeacherConfig:
    """Settings of ``methods.student_teacher`` (Uninformed Students, CVPR 2020); every default is the paper's.

    What is trained: ``teachers`` are shipped teachers' names or files, one for each scale; ``students`` is M, each of
    its teacher's architecture; ``size_px`` the side of the square model input; ``pad`` what surrounds the image before
    the networks, so that there is a descriptor for every pixel (``none``: only where the whole footprint lies inside).
    ``train_stride`` px lie between the positions that are learned from, ``stride`` px between the cells of the deployed
    map (None: each teacher's own stride); ``form`` is the dense form of ``fdfe`` that is exported.

    How long: ``epochs``, but no less than ``min_steps`` and no more than ``max_steps`` batches; the other fields are
    those of ``Schedule``.  ``precision`` is that of training; what is exported is always float32.

    Named options, all off unless a preset or ``--set`` turns them on:

    * ``loss="hard"`` learns from the largest 0.1 % of the errors only, ``penalty`` weighs the students' answers to
      everyday photographs, ``autoencoder`` adds EfficientAD's third network, ``normalization="quantile"`` its score
      normalization (Batzner et al. 2024).
    * ``heads="shared"``: the students are one trunk with M last layers.
    * ``exposure`` varies gain, gamma and offset of what students and teacher see while training.
    * ``score`` says which maps are summed: e and v are the paper's; s and t are how unusual the students' and the
      teacher's own answer is among good parts, measured by a Gaussian.  With ``score="t"`` no student is needed.
    * ``metric``: how far the students miss the teacher is measured in the space of the decoded features of P
      (``decoded``), or in units of how far they miss it on good images, in every direction of the descriptor space
      (``gaussian``), and at every place of the image as far as good images speak for that (``placed``).
    * ``center`` subtracts from each map its own ``median`` or ``mean``, so that a part as a whole a little unlike those
      learned from (another strip of cloth, another exposure) is no flaw.  A flaw that covers half of a part is lost
      with the median; with the mean each flaw loses by its size.
    * ``maps="planted"`` leaves out those of the maps of ``score`` and of the scales without which flaws planted into
      held-out good images are told better; what is left is exported alone.

    Raises:
        CommandError: settings that contradict each other.
    """

    preset: str
    teachers: tuple[str, ...]
    epochs: int = 100
    min_steps: int = 1
    max_steps: int = 1_000_000
    learning_rate: float = 1e-4
    decay: Decay = "constant"
    students: int = 3  # paper: M = 3 on MVTec AD
    size_px: int = 256  # paper: images zoomed to 256 x 256, no crop
    batch_size: int = 1  # paper
    weight_decay: float = PAPER_WEIGHT_DECAY  # paper
    pad: Pad = "none"
    stride: int | None = None
    train_stride: int | None = None
    form: Literal["dilated", "multipool"] = "dilated"
    precision: Literal["fp32", "bf16"] = "fp32"
    loss: Literal["mse", "hard"] = "mse"
    penalty: float = 0.0
    photographs: str | None = None
    autoencoder: bool = False
    heads: Literal["separate", "shared"] = "separate"
    exposure: float = 0.0
    score: str = "e+v"
    metric: Literal["plain", "decoded", "gaussian", "placed"] = "plain"
    normalization: Literal["gauss", "quantile"] = "gauss"
    center: Center = "none"  # paper: none
    maps: Literal["all", "planted"] = "all"  # paper: all
    patience: int = 0

    def __post_init__(self) -> None:
        if not self.teachers:
            raise CommandError("teachers: give at least one")
        if self.students < 0:
            raise CommandError(f"students cannot be {self.students}")
        if len(set(self.terms)) < len(self.terms) or not set(self.terms) <= STUDENTS_NEEDED.keys():
            raise CommandError(f"score {self.score!r}: expected a sum of different terms of e, v, s and t, such as e+v")
        if self.students < (needed := max(STUDENTS_NEEDED[term] for term in self.terms)):
            raise CommandError(f"score {self.score!r} needs {needed} students at least, not {self.students}")
        if self.students == 0 and (self.penalty > 0 or self.autoencoder):
            raise CommandError("penalty and autoencoder are for students, and students = 0")
        for name, stride in (("stride", self.stride), ("train_stride", self.train_stride)):
            if stride is not None and stride < 1:
                raise CommandError(f"{name} must be at least 1 px, got {stride}")
        if self.maps == "planted" and self.autoencoder:
            raise CommandError("maps = planted: the auto-encoder's map belongs to the student's; say maps = all")
        if self.autoencoder and (len(self.teachers), self.students, self.size_px) != (1, 1, AUTOENCODER_SIDE_PX):
            raise CommandError(
                f"autoencoder is defined for one teacher, one student and images of {AUTOENCODER_SIDE_PX} px "
                "(EfficientAD, table 8)"
            )

    @property
    def terms(self) -> tuple[str, ...]:
        """The maps that are summed: of e, v, s and t."""
        return tuple(self.score.split("+"))

    def schedule(self, images: int) -> Schedule:
        """The schedule for a training set of ``images``."""
        return schedule_of(self, images)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form for checkpoints and provenance."""
        return asdict(self) | {"teachers": list(self.teachers)}


AnyConfig = TypeVar("AnyConfig", bound=MethodConfig)


def override(config: AnyConfig, settings: Sequence[str]) -> AnyConfig:
    """``config`` with ``KEY=VALUE`` settings; values are read by the field's type, ``none`` is None, lists by commas.

    Raises:
        CommandError: no such key, or a value that it does not take; the message says what there is.
    """
    hints = get_type_hints(type(config))
    known = [f.name for f in fields(config) if f.name != "preset"]
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise CommandError(f"--set {setting}: expected KEY=VALUE with a KEY of {', '.join(known)}")
        # Where the word none is among a setting's choices, it is that word.
        is_none = value.lower() == "none" and "none" not in get_args(hints[key])
        given: Any = None if is_none else value.split(",") if get_origin(hints[key]) is tuple else value
        try:
            changes[key] = msgspec.convert(given, hints[key], strict=False)
        except msgspec.ValidationError as error:
            raise CommandError(f"--set {setting}: {error}") from error
    return replace(config, **changes)


LINE = StudentTeacherConfig(
    preset="line",
    teachers=("line",),
    epochs=25,
    min_steps=1200,
    max_steps=4000,
    learning_rate=1e-3,
    decay="cosine",
)
"""The paper's method on the quarter-width teacher, sized for two CPU cores.

Deviations from the paper, chosen by the loss on held-out good images (never by test images):

* learning rate 1e-3 with a cosine to zero instead of a constant 1e-4.  hazelnut_toy, 300 steps, a random teacher:
  held-out loss 36.2 at 1e-4, 18.0 at 5e-4, 14.0 at 1e-3, 13.0 at 3e-3; with a distilled teacher 16.2 at 1e-3 and
  15.5 at 3e-3, but synthetic defects were told from held-out good images no better (AUROC 0.741 and 0.736).  On the
  fabric aitex_02, 800 steps, the higher rate loses: 37.2 at 1e-3, 52.5 at 3e-3.
* 25 epochs, at least 1,200 and at most 4,000 steps, instead of 100 epochs: a step of three students costs 0.14 core-s
  on AVX-512, so 28 images take about 1.5 minutes on two idle cores and 200 images about 5.

bf16 autocast would take 0.066 s instead of 0.116 s a step (one thread, AVX-512 BF16), but then the weights would depend
on what the CPU supports; everything here is float32.
"""

DUO = replace(LINE, preset="duo", teachers=("line", "line-65"), students=0, score="t", metric="placed", center="median")
"""Two receptive fields, the teachers' own answers measured against good parts, no students: learned in seconds.

Chosen with the help of defects planted into held-out good images (benchmarks/options.py); how far test figures were
known by then is said in docs/benchmarks.md, which has both tables.  p = 65 sees what a solar cell or a magnet's rim is
as a whole.  How much of the metric is common to all places is chosen for every product by the likelihood of its
held-out good images.  Nothing is trained.  Where parts are not aligned and no two look alike (deeppcb), a student is
worth its time: ``duo-students``.

A teacher of half the width (``half-65``, distilled a third as long) was no better beyond the noise of the planted
defects, 0.791 against 0.775, and costs twice as much.
"""

DUO_STUDENTS = replace(DUO, preset="duo-students", students=1, score="e", min_steps=1500, max_steps=1500)
"""``duo`` with the paper's question, how far a student misses each teacher.

The miss is measured against how far the students miss on good parts, at every place.  Of the variants tried on defects
planted into held-out good images under varied exposure it found the most (mean image AUROC of four sets: small defects
0.672 against ``duo``'s 0.646, large ones 0.934 against 0.855); the gain is where parts are not aligned (deeppcb).
"""

TRIO_TEACHERS = replace(DUO, preset="trio-teachers", teachers=("line", "line-65", "resnet18"))
"""``duo`` with ResNet-18 itself as a third teacher: learned in seconds, 41 core-ms an image instead of 18.

On defects planted into held-out good images of five sets, under varied exposure: small ones 0.700 against ``duo``'s
0.684 (image AUROC), large ones 0.883 against 0.884.
"""

TRIO = replace(DUO_STUDENTS, preset="trio", teachers=TRIO_TEACHERS.teachers, score="e+t", maps="planted")
"""The recommended preset: three teachers, a student each, and of the six maps those that the product needs.

Which they are is chosen for every product by flaws planted into its own held-out good images (``map_choice``).  Of the
shared sets, most keep all six; boards of which no two are alike keep one, what the student of ``line`` misses, at a
third of the cost.  Judged on test images once, afterwards: best in both means of docs/benchmarks.md's table.
"""

LINE_FAST = replace(LINE, preset="line-fast", teachers=("line-fast",), students=1, score="e")
"""Half the widths and one student: a sixth of ``line``'s cost."""


def _paper(patch: int) -> StudentTeacherConfig:
    """The paper's settings for one receptive field: full width, a descriptor for every pixel, zeros around the image.

    FDFE pads with zeros (Bailer et al. 2017, section 3); that this method does the same is our reading.  Learning from
    every fourth pixel instead of every one is the same objective on a sixteenth of the positions (``tests/trainer/
    test_fdfe.py``); on a GPU ``--set train_stride=1`` takes them all.
    """
    return StudentTeacherConfig(
        preset=f"paper-{patch}", teachers=(f"paper-{patch}",), pad="zero", stride=1, train_stride=4
    )


PAPER_MULTISCALE = replace(_paper(17), preset="paper-multiscale", teachers=("paper-17", "paper-33", "paper-65"))
"""All three receptive fields, unweighted mean of the normalized scores (paper, section 3.4: L = 3)."""

EFFICIENTAD_S = StudentTeacherConfig(
    preset="efficientad-s",
    teachers=("pdn-s",),
    students=1,
    score="e",
    loss="hard",
    penalty=1.0,
    autoencoder=True,
    normalization="quantile",
    epochs=1,
    min_steps=70_000,
    max_steps=70_000,
    decay="drop",
)
"""EfficientAD-S (Batzner et al., WACV 2024, algorithm 1): 70,000 steps of one image, Adam 1e-4.

Its penalty looks at a folder of everyday photographs, which must be given (``--photographs DIR``).
"""

_PAPER = (*map(_paper, (17, 33, 65)), PAPER_MULTISCALE)
_STUDENT_TEACHER = (TRIO, TRIO_TEACHERS, DUO_STUDENTS, DUO, LINE, LINE_FAST, *_PAPER, EFFICIENTAD_S)

STUDENT_TEACHER: Mapping[str, StudentTeacherConfig] = MappingProxyType(
    {preset.preset: preset for preset in _STUDENT_TEACHER}
)
"""Preset name -> configuration; the first is the recommended one."""
