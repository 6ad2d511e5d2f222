"""Formulas of ConAD: likelihood, winner, divergence, and what critic and generator want of each other.

Nguyen et al., "Anomaly Detection With Multiple-Hypotheses Predictions", ICML 2019 (arXiv 1810.13292).  Owns values
only, on tensors of any origin; no network is called here.  Equation numbers are those of the version sent to ICLR 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def nll_maps(pictures: Tensor, means: Tensor, log_sigma: Tensor | float) -> Tensor:
    """-log p_j(x|z) of every pixel under every head, without its constant: (n, H, h, w).

    ``pictures`` (n, C, h, w), ``means`` (n, H, C, h, w), ``log_sigma`` of the means' shape or one number.
    """
    deviation = torch.as_tensor(log_sigma, dtype=means.dtype, device=means.device)
    scaled = (pictures[:, None] - means) * torch.exp(-deviation)
    return (0.5 * scaled.square() + deviation).sum(2)


def winner_loss(nll: Tensor, relaxation: float = 0.0) -> Tensor:
    """Equation 2, the mean over images of the best head's NLL, from the NLL (n, H) of whole images.

    ``relaxation`` epsilon is the relaxed variant (Rupprecht et al. 2017): weight 1 - epsilon for the winner and
    epsilon / (H - 1) for each of the others.
    """
    best = nll.amin(1)
    if relaxation == 0 or nll.shape[1] == 1:
        return best.mean()
    others = (nll.sum(1) - best) / (nll.shape[1] - 1)
    return ((1 - relaxation) * best + relaxation * others).mean()


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(q(z|x) || N(0, I)), the sum over z's numbers and the mean over images."""
    each = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return each.flatten(1).sum(1).mean()


def critic_terms(real: Tensor, prior: Tensor, posterior: Tensor, winner: Tensor) -> dict[str, Tensor]:
    """L_D of section 3 as cross-entropies: real pictures are 1, each group of made ones 0 and averaged by itself.

    Averaged, because a sum over heads would grow with H.  ``real`` (n,), ``prior`` and ``posterior`` (n, H) logits;
    ``winner`` (n,) says which of the posterior hypotheses are the best guesses.
    """
    return {
        "real": softplus(-real).mean(),
        "prior": softplus(prior).mean(),
        "posterior": softplus(posterior).mean(),
        "winner": softplus(_best(posterior, winner)).mean(),
    }


def passing(prior: Tensor, posterior: Tensor, winner: Tensor) -> Tensor:
    """What the generator wants of the critic, non-saturating: the same made pictures, to be taken for real."""
    return softplus(-prior).mean() + softplus(-posterior).mean() + softplus(-_best(posterior, winner)).mean()


def closeness(own: Tensor, others: Tensor) -> Tensor:
    """Salimans et al. 2016, equation 7: sum over ``others`` (..., m, B, C) of exp(-|own - other|_1), (..., k, B).

    ``own`` is (..., k, B, C); a picture that is among the others is as close to itself as can be, which gives 1.
    """
    distance = (own[..., :, None, :, :] - others[..., None, :, :, :]).abs().sum(-1)
    return torch.exp(-distance).sum(-2)


def _best(logits: Tensor, winner: Tensor) -> Tensor:
    return logits.gather(1, winner[:, None])[:, 0]
