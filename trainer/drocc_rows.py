"""DROCC and DROCC-LF on rows of numbers: fit on good rows, score others.

Goyal et al., ICML 2020, tables 2 and 10: features standardized by the training rows, one hidden layer of 128 units,
Adam.  Owns the standardization, the short training loop and the refusals.  Leaves
the loss to ``drocc_objective``.  There is no bundle for rows: the runtime inspects frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edge.errors import CommandError, DataError
from trainer.drocc_nets import VectorNet
from trainer.drocc_objective import Objective, drocc_loss
from trainer.shell_search import Ascent, Shell

Rows = NDArray[np.float64]
"""(n, d): a sample a row, a feature a column."""


@dataclass(frozen=True, slots=True)
class RowsConfig:
    """``radius`` in units of standardized features, the paper's 2.5 to 16 for its tables, sqrt(d) / 2 to begin with.

    Raises:
        CommandError: a value is out of range.
    """

    radius: float
    gamma: float = 2.0  # paper: 2 in general
    mu: float = 1.0  # paper
    ascent_steps: int = 50  # the authors' code
    ascent_step: float = 0.01  # paper, table 10
    learning_rate: float = 1e-3  # paper, table 10
    epochs: int = 100
    batch_size: int = 256
    hidden: int = 128  # paper

    def __post_init__(self) -> None:
        self.objective(limited_negatives=False)
        if min(self.epochs, self.batch_size, self.hidden) < 1 or not 0 < self.learning_rate < float("inf"):
            raise CommandError(
                f"epochs {self.epochs}, batch_size {self.batch_size}, hidden {self.hidden} must be at least 1 and "
                f"learning_rate {self.learning_rate} above 0"
            )

    def objective(self, limited_negatives: bool) -> Objective:
        """DROCC's objective, or DROCC-LF's."""
        return Objective(
            Shell(self.radius, self.gamma), Ascent(self.ascent_steps, self.ascent_step), self.mu,
            "saliency" if limited_negatives else "euclidean",
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class RowsModel:
    """A fitted network with the standardization of its rows: ``mean`` and ``std`` (d,)."""

    net: VectorNet
    mean: Rows
    std: Rows

    @torch.no_grad()
    def scores(self, rows: Rows) -> NDArray[np.float64]:
        """Anomaly scores (n,) of ``rows`` (n, d): -f, higher is more anomalous.

        Raises:
            DataError: another number of features, or values that are not finite.
        """
        _require_rows(rows, len(self.mean))
        x = torch.from_numpy((rows - self.mean) / self.std).float()
        found: NDArray[np.float64] = -self.net(x)[:, 0].double().numpy()
        return found


def fit_rows(good: Rows, config: RowsConfig, *, seed: int, bad: Rows | None = None) -> RowsModel:
    """Learn from ``good`` rows (n, d) and, for DROCC-LF, a few ``bad`` ones (k, d).

    Raises:
        DataError: too few rows, values that are not finite, or a feature that never varies.
        TrainingError: the loss is not finite, or the network stopped looking at its input.
    """
    _require_rows(good, None)
    if len(good) < 2:
        raise DataError(f"{len(good)} good rows; at least 2 are needed, and some hundreds to learn anything")
    mean, std = good.mean(0), good.std(0)
    if not (std > 0).all():
        raise DataError(f"feature {int(np.argmin(std))} is the same in every good row; leave the column out")
    rows, label = good, np.ones(len(good), np.float32)
    if bad is not None:
        _require_rows(bad, good.shape[1])
        rows, label = np.concatenate([good, bad]), np.concatenate([label, np.zeros(len(bad), np.float32)])
    model = RowsModel(VectorNet(good.shape[1], seed=seed, hidden=config.hidden), mean, std)
    x, y = torch.from_numpy((rows - mean) / std).float(), torch.from_numpy(label)
    objective, random = config.objective(bad is not None), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.net.parameters(), config.learning_rate)
    for _ in range(config.epochs):
        for places in torch.randperm(len(x), generator=random).split(config.batch_size):  # type: ignore[no-untyped-call]
            optimizer.zero_grad(set_to_none=True)
            drocc_loss(model.net, x[places], objective, random, label=y[places]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model


def _require_rows(rows: Rows, features: int | None) -> None:
    if rows.ndim != 2 or not len(rows) or (features is not None and rows.shape[1] != features):
        expected = "(n, d)" if features is None else f"(n, {features})"
        raise DataError(f"rows of shape {rows.shape}; expected {expected}, a sample a row")
    if not np.isfinite(rows).all():
        row, column = np.argwhere(~np.isfinite(rows))[0]
        raise DataError(f"row {row}, feature {column} is {rows[row, column]}; fill or leave out missing values first")
