"""The five losses of LRDAN, and which network minimizes which of them.

"Anomaly Detection by One Class Latent Regularized Networks", arXiv 2002.01607.  Owns the formulas and the terms of each
turn.  Leaves the networks to ``lrdan_nets``, the optimizers to ``loop``.

    L = w_i |x - G(x)|_1 + w_a L_adv + w_z |G_e(x) - G_e'(x')|_2 + w_c |G_e(x) - c|^2 + w_d L_dual,     x' = G(x)
    L_adv = min over G, max over D of  log D(x) + log(1 - D(x'));      L_dual = |x - D'(x)|_1 - k |x' - D'(x')|_1

Who minimizes what is not in the paper's formulas.  See ``Scheme``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from edge.errors import CommandError, TrainingError
from trainer.lrdan_nets import LrdanNets

Norms = Literal["mean", "sum"]
"""``sum``: norms as they are written, those of images for ``PAPER_SIDE`` px: an image of another size counts as one of
that size, or the weights would mean something else.  ``mean``: all per element, |.|_1 and |.|^2 over n, |.|_2 over
sqrt(n)."""

PAPER_SIDE = 32

Scheme = Literal["turns", "joint"]
"""``turns``: D, then D' with G held fixed, then G with D' held fixed.  ``joint``: D, then G and D' on one loss, as the
paper's sum reads: G is then paid for being hard to reconstruct."""

CENTER_MARGIN = 0.1
"""No entry of the center is nearer to zero (Deep SVDD: Ruff et al., ICML 2018, the authors' code)."""

DUAL_MEMORY = 50
"""Steps over which the two halves of the dual loss are followed."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The paper's weights and k.

    ``rival`` is our w_g, by which G also minimizes |x' - D'(x')|_1 (ADAE: k w_d); ``cap`` our bound of what a generated
    image counts in the dual loss, an element.

    Raises:
        CommandError: a weight is negative or no number, or k is not below 1.
    """

    image: float = 1.0
    adversarial: float = 5.0
    latent: float = 1.0
    center: float = 0.05
    dual: float = 1.0
    rival: float = 0.0
    k: float = 0.4
    cap: float = math.inf

    def __post_init__(self) -> None:
        for name in ("image", "adversarial", "latent", "center", "dual", "rival", "k"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise CommandError(f"the weight {name} must be a number of at least 0, got {value}")
        if not self.cap > 0:
            raise CommandError(f"the dual loss's cap must be above 0, got {self.cap}; w_d = 0 switches the loss off")
        if self.k >= 1:
            raise CommandError(
                f"k = {self.k}: from 1 on the auxiliary auto-encoder gains by reconstructing nothing, since a spoiled "
                "generated image counts for more than a real one; give k below 1 (paper: 0.4)"
            )
        if self.image == 0:
            raise CommandError("w_i = 0: the generator would not learn to reconstruct anything")

    def warming_up(self) -> Weights:
        """What counts for the auto-encoders before there is a center: that they reconstruct, alike."""
        return replace(self, adversarial=0.0, center=0.0, rival=0.0, k=0.0)


Terms = dict[str, Tensor]
"""Weighted scalar terms by name; a turn minimizes their sum. None at all: the turn has nothing to do."""


def image_error(images: Tensor, answers: Tensor, norms: Norms = "mean") -> Tensor:
    """E |x - y|_1 over images (N, C, h, w), a scalar."""
    return _each_error(images, answers, norms).mean()


def latent_error(latents: Tensor, others: Tensor, norms: Norms = "mean") -> Tensor:
    """E |z - z'|_2 over latents (N, ...), a scalar; its gradient at z = z' is 0, not NaN."""
    squares = (latents.float() - others.float()).flatten(1).square()
    total = squares.mean(1) if norms == "mean" else squares.sum(1)
    # sqrt has an infinite slope at 0: equal latents would give 0 * inf.
    return torch.where(total > 0, total, 1.0).sqrt().mul((total > 0).float()).mean()


def center_distance(latents: Tensor, center: Tensor, norms: Norms = "mean") -> Tensor:
    """1/n sum |z_i - c|^2 over latents (N, ...), a scalar."""
    squares = (latents.float() - center).flatten(1).square()
    return (squares.mean(1) if norms == "mean" else squares.sum(1)).mean()


def dual_error(
    images: Tensor,
    answers: Tensor,
    made: Tensor,
    made_answers: Tensor,
    k: float,
    norms: Norms = "mean",
    cap: float = math.inf,
) -> Tensor:
    """|x - D'(x)|_1 - k |x' - D'(x')|_1, a scalar that may be negative.

    A generated image missed by more than ``cap`` an element counts as missed by that, and pushes no further.
    """
    spoiled = _each_error(made, made_answers, norms).clamp(max=cap * _elements(made, norms))
    return image_error(images, answers, norms) - k * spoiled.mean()


def _each_error(images: Tensor, answers: Tensor, norms: Norms) -> Tensor:
    """|x - y|_1 of each image (N,), in float32 whatever the networks computed in."""
    return (images.float() - answers.float()).abs().flatten(1).mean(1) * _elements(images, norms)


def _elements(images: Tensor, norms: Norms) -> int:
    """For how many elements the mean over those of an image stands."""
    return 1 if norms == "mean" else images.shape[1] * PAPER_SIDE**2


def judge_loss(real: Tensor, made: Tensor) -> Tensor:
    """What D minimizes: -E log D(x) - E log(1 - D(x')) from logits (N,)."""
    return F.softplus(-real.float()).mean() + F.softplus(made.float()).mean()


def fool_loss(made: Tensor) -> Tensor:
    """What G minimizes: -E log D(x') from logits (N,), the form that does not saturate."""
    return F.softplus(-made.float()).mean()


def latent_center(latents: Tensor) -> Tensor:
    """Mean of latents (N, ...), entries nearer to zero than ``CENTER_MARGIN`` moved out to it; zeros count as positive.

    An entry at zero could be met by weights of zero (Ruff et al., proposition 1).
    """
    mean = latents.mean(0)
    return torch.where(mean.abs() < CENTER_MARGIN, torch.where(mean < 0, -CENTER_MARGIN, CENTER_MARGIN), mean)


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What one step shows every turn: ``images`` x (N, C, s, s), ``latents`` G_e(x) and ``made`` x' = G(x)."""

    images: Tensor
    latents: Tensor
    made: Tensor

    @classmethod
    def at(cls, nets: LrdanNets, images: Tensor) -> Look:
        """G's answers to ``images``, with their gradient."""
        latents = nets.generator.encoder(images)
        return cls(images, latents, nets.generator.decoder(latents))

    def fixed(self) -> Look:
        """The same values; no gradient reaches G."""
        return Look(self.images, self.latents.detach(), self.made.detach())


@dataclass(frozen=True, slots=True)
class Objective:
    """The terms of each turn.

    ``blank`` is the error per element, in -1 to 1, of answering every training image with one color, or None where
    that is not known; see ``require_bounded``.
    """

    weights: Weights
    norms: Norms = "mean"
    blank: float | None = None

    def discriminator(self, nets: LrdanNets, look: Look) -> Terms:
        """D's turn: the adversarial loss, the generated images held fixed."""
        if not self.weights.adversarial:
            return {}
        real, made = nets.discriminator(torch.cat([look.images, look.made.detach()])).chunk(2)
        return {"adversarial": self.weights.adversarial * judge_loss(real, made)}

    def auxiliary(self, nets: LrdanNets, look: Look) -> Terms:
        """The turn of D': dual and latent loss, everything of G held fixed."""
        return self._dual_and_latent(nets, look.fixed())

    def generator(self, nets: LrdanNets, look: Look) -> Terms:
        """G's turn: image, adversarial, latent and center loss, and the rival one where it has a weight."""
        terms = self._generator_alone(nets, look)
        if self.weights.latent or self.weights.rival:
            others = nets.auxiliary.encoder(look.made)
        if self.weights.latent:
            terms["latent"] = self.weights.latent * latent_error(look.latents, others, self.norms)
        if self.weights.rival:
            again = nets.auxiliary.decoder(others)
            terms["rival"] = self.weights.rival * image_error(look.made, again, self.norms)
        return terms

    def joint(self, nets: LrdanNets, look: Look) -> Terms:
        """Scheme ``joint``: the paper's sum for G and D' at once, all gradients flowing."""
        return self._generator_alone(nets, look) | self._dual_and_latent(nets, look)

    def _generator_alone(self, nets: LrdanNets, look: Look) -> Terms:
        weights, terms = self.weights, Terms()
        if weights.image:
            terms["image"] = weights.image * image_error(look.images, look.made, self.norms)
        if weights.adversarial:
            terms["adversarial"] = weights.adversarial * fool_loss(nets.discriminator(look.made))
        if weights.center:
            terms["center"] = weights.center * center_distance(look.latents, nets.center, self.norms)
        return terms

    def _dual_and_latent(self, nets: LrdanNets, look: Look) -> Terms:
        weights, terms = self.weights, Terms()
        if weights.dual:
            both = nets.auxiliary.encoder(torch.cat([look.images, look.made]))
            real, made = nets.auxiliary.decoder(both).chunk(2)
            require_bounded(nets, look, real, made, self.blank)
            terms["dual"] = weights.dual * dual_error(
                look.images, real, look.made, made, weights.k, self.norms, weights.cap
            )
            others = both.chunk(2)[1]
        elif weights.latent:
            others = nets.auxiliary.encoder(look.made)
        if weights.latent:
            terms["latent"] = weights.latent * latent_error(look.latents, others, self.norms)
        return terms


def require_bounded(nets: LrdanNets, look: Look, real: Tensor, made: Tensor, blank: float | None) -> None:
    """Follow both halves of the dual loss, and refuse it once it has run away.

    -k |x' - D'(x')|_1 has no lower bound of its own; the decoders' tanh gives it one, so it never becomes infinite.
    What is seen instead, over ``DUAL_MEMORY`` steps: D' does worse on generated images than plain gray would, which is
    what it is paid for, and worse on good ones than the best single color, which it should not.  Its tanh is then
    saturated, and there is no way back.

    Raises:
        TrainingError: that has happened.
    """
    with torch.no_grad():
        now = torch.stack([image_error(look.images, real), image_error(look.made, made)])
        nets.dual_errors.lerp_(now, 1 / DUAL_MEMORY)
    missed, spoiled = nets.dual_errors.tolist()
    if blank is not None and missed > blank and spoiled > 1:
        raise TrainingError(
            f"the dual term ran away: the auxiliary auto-encoder misses good images by {missed:.3g} an element, where "
            f"a single color would miss them by {blank:.3g}, and generated ones by {spoiled:.3g} of at most 2; "
            "train with a smaller k or w_d, with w_g, or at a lower learning rate"
        )
