"""FCDD's losses (Liznerski et al., ICLR 2021, section 3): the pseudo-Huber map, and what it is to be on good and bad.

Owns the formulas; which images are bad is the method's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge.errors import TrainingError

_TINY = 1e-31
"""Added inside the logarithm, as in the authors' code."""


def pseudo_huber(answers: Tensor) -> Tensor:
    """A = sqrt(phi^2 + 1) - 1, element by element; never negative."""
    return torch.sqrt(answers**2 + 1) - 1


def fcdd_loss(maps: Tensor, bad: Tensor) -> Tensor:
    """The mean over images of (1 - y) a - y log(1 - exp(-a)), a the mean of the map (equation 4).

    ``maps`` (n, u, v) are A, ``bad`` (n,) is y, 1 for anomalies.  log(1 - exp(-a)) is taken as log(-expm1(-a)): the
    difference itself would lose all digits where a is small, which is where an anomaly looks good.

    Raises:
        TrainingError: a term is not finite; names it.
    """
    mean = maps.flatten(1).mean(1)
    good_term = ((1 - bad) * mean).mean()
    bad_term = -(bad * torch.log(-torch.expm1(-mean) + _TINY)).mean()
    return _finite(good=good_term, bad=bad_term)


def pixel_loss(spread: Tensor, masks: Tensor) -> Tensor:
    """The semi-supervised loss with masks (equation 5): spread maps A' (n, h, w), masks (n, h, w), 1 where anomalous.

    The mean of A' over good pixels, and for images that have any bad one -log(1 - exp(-mean of A' over those)), both as
    shares of all pixels.

    Raises:
        TrainingError: a term is not finite; names it.
    """
    pixels = masks[0].numel()
    good_term = ((1 - masks) * spread).flatten(1).sum(1).mean() / pixels
    inside = (masks * spread).flatten(1).sum(1) / pixels
    has_bad = (masks.flatten(1).amax(1) > 0).float()
    bad_term = -(has_bad * torch.log(-torch.expm1(-inside) + _TINY)).mean()
    return _finite(good=good_term, bad=bad_term)


def _finite(**terms: Tensor) -> Tensor:
    for name, term in terms.items():
        if not bool(torch.isfinite(term)):
            raise TrainingError(
                f"FCDD's {name} term became {float(term):.4g}; train at a lower learning rate, or look for images that "
                "are broken"
            )
    return torch.stack(list(terms.values())).sum()
