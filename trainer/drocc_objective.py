"""What DROCC and DROCC-LF minimize over a batch of normalized samples, and the saliency that DROCC-LF measures by.

    DROCC     mean_i l(f(x_i), 1)   + mu mean_i max_{x~ in N(x_i)} l(f(x~), -1)                     (paper, equation 1)
    DROCC-LF  mean_i l(f(x_i), y_i) + mu mean_{i: y_i = 1} max_{x~ in N_Sigma(x_i)} l(f(x~), -1)    (paper, section 4)

l is the logistic loss.  lambda ||theta||^2 is the optimizer's weight decay.  Owns the terms and which one failed.
Leaves the search to ``shell_search``, the networks to ``drocc_nets``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge.errors import TrainingError
from trainer.shell_search import Ascent, Shell, worst_in_shell

BatchNorm = Literal["joint", "apart"]
Metric = Literal["euclidean", "saliency"]


@dataclass(frozen=True, slots=True)
class Objective:
    """``mu`` weighs the adversarial term; ``metric`` saliency is DROCC-LF.

    ``batch_norm``: ``joint`` is our choice, samples and their adversaries in one batch and the search by the running
    statistics, so the network trained is the one deployed.  ``apart`` is the authors' code: the network stays in
    training mode throughout, each pass has statistics of its own, and what it runs with later comes nearly all from
    the m passes over adversaries.
    """

    shell: Shell
    ascent: Ascent
    mu: float = 1.0
    metric: Metric = "euclidean"
    batch_norm: BatchNorm = "joint"


def drocc_loss(
    net: nn.Module, x: Tensor, objective: Objective, random: torch.Generator, *,
    label: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The scalar loss of samples ``x`` (B, ...), ``label`` (B,) 1 normal and 0 anomalous (None: all normal).

    ``net`` maps (B, ...) to (B, 1) and keeps the mode it is in.

    Raises:
        TrainingError: a term is NaN or infinite; the message says which.
    """
    label = torch.ones(len(x), device=x.device) if label is None else label.float()
    normal = x[label > 0.5]
    if not len(normal):
        return _finite("cross-entropy", F.binary_cross_entropy_with_logits(_logit(net, x), label))
    found = adversaries(net, normal, objective, random)
    if objective.batch_norm == "joint":
        together = _logit(net, torch.cat([x, found]))
        answers, worst = together[: len(x)], together[len(x) :]
    else:
        answers, worst = _logit(net, x), _logit(net, found)
    plain = _finite("cross-entropy", F.binary_cross_entropy_with_logits(answers, label))
    return plain + objective.mu * _finite("adversarial", F.softplus(worst).mean())


def adversaries(net: nn.Module, x: Tensor, objective: Objective, random: torch.Generator) -> Tensor:
    """For each normal sample (B, ...) the point of its shell that the network takes for most normal; detached."""
    with _searching(net, keep_mode=objective.batch_norm == "apart"):
        weights = saliency(net, x) if objective.metric == "saliency" else None

        def anomalous(point: Tensor) -> Tensor:  # l(f, -1): what algorithm 1 climbs
            return F.softplus(_logit(net, point))

        return worst_in_shell(anomalous, x, objective.shell, objective.ascent, random, weights)


def saliency(net: nn.Module, x: Tensor) -> Tensor:
    """sigma_j = |d f / d x_j| (B, ...), at every sample divided by its mean; detached.

    The mean of 1 keeps the radius comparable with the Euclidean one (authors' code).  Recomputed for every batch, as
    in the authors' code; the paper says every epoch.

    Raises:
        TrainingError: the answer depends on no input any more, or not by finite numbers.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(net(point).sum(), point)
    size = gradient.abs()
    mean = size.reshape(len(x), -1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
    if not bool((torch.isfinite(mean) & (mean > 0)).all()):
        raise TrainingError(
            "the saliency is 0 or not finite: the network's answer no longer depends on its input; "
            "train with a lower learning rate"
        )
    return size / mean


@contextmanager
def _searching(net: nn.Module, *, keep_mode: bool) -> Iterator[None]:
    """No gradients toward parameters (a third of the cost), and running statistics left alone unless told to."""
    training = net.training
    wanted = [parameter.requires_grad for parameter in net.parameters()]
    net.requires_grad_(False)
    if not keep_mode:
        net.eval()
    try:
        yield
    finally:
        net.train(training)
        for parameter, needs in zip(net.parameters(), wanted, strict=True):
            parameter.requires_grad_(needs)


def _logit(net: nn.Module, x: Tensor) -> Tensor:
    answer: Tensor = net(x)
    return answer[:, 0].float()  # bfloat16 autocast keeps 8 bits: losses are taken in float32


def _finite(term: str, value: Tensor) -> Tensor:
    if not math.isfinite(float(value.detach())):
        raise TrainingError(
            f"the {term} term of DROCC's loss became {float(value.detach())}; "
            "train with a lower learning rate or a smaller radius"
        )
    return value
