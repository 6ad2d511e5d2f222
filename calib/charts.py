"""Charts of a report as PNG pictures, by matplotlib, which only `kizu[report]` brings. Owns their looks.

The numbers come from whoever asks; light background and thin lines, since reports get printed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from edge.errors import CommandError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GOOD, BAD, LINE = "#2a6fb0", "#c2410c", "#111111"
_DPI: Final = 110
_BINS: Final = 40
_CROWDED: Final = 0.995
"""Scores beyond this share of the bad ones are drawn in the last bar: one extreme must not squeeze all others."""


def require_matplotlib() -> None:
    """Refuse to begin hours of work whose report could not be drawn.

    Raises:
        CommandError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CommandError(
            "a report is drawn by matplotlib, which is not installed: pip install 'kizu[report]'"
        ) from None


def score_histogram(good: Sequence[float], bad: Sequence[float], threshold: float) -> bytes:
    """Scores of good and bad parts with the threshold between them; `bad` may be empty."""
    shown = [*good, threshold, *([float(np.quantile(bad, _CROWDED))] if bad else [])]
    low, high = min(shown), max(shown)
    edges = np.linspace(low, high + 0.02 * max(high - low, 1e-9), _BINS + 1).tolist()
    figure, axes = _figure("image score", "parts")
    for scores, color, name in ((good, GOOD, "good"), (bad, BAD, "bad")):
        if scores:
            axes.hist(
                np.clip(scores, edges[0], edges[-1]), edges, color=color, alpha=0.65, label=f"{name} ({len(scores)})"
            )
    axes.axvline(threshold, color=LINE, linewidth=1.2, linestyle="--", label=f"threshold {threshold:.4g}")
    axes.legend(frameon=False)
    return _png(figure)


def roc_chart(
    false_rejects: NDArray[np.float64], caught: NDArray[np.float64], at: tuple[float, float], area: float
) -> bytes:
    """Share of bad parts caught over that of good parts rejected, with the bundle's threshold as a point `at`."""
    figure, axes = _figure("good parts rejected", "bad parts caught")
    axes.plot(false_rejects, caught, color=GOOD, linewidth=1.6, label=f"AUROC {area:.3f}")
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8)
    axes.plot(*at, "o", color=BAD, label=f"threshold: {at[0]:.1%} rejected, {at[1]:.1%} caught")
    axes.legend(frameon=False, loc="lower right")
    return _png(figure)


def pro_chart(false_positives: NDArray[np.float64], overlap: NDArray[np.float64], limit: float, area: float) -> bytes:
    """Mean share of a defect that is marked over the share of normal pixels marked, up to `limit`."""
    figure, axes = _figure("normal pixels marked", "mean share of a defect marked")
    axes.plot(false_positives, overlap, color=GOOD, linewidth=1.6, label=f"AU-PRO {limit:.2f}: {area:.3f}")
    axes.set_xlim(0, limit)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, loc="lower right")
    return _png(figure)


def curve_chart(steps: Sequence[float], losses: Mapping[str, Sequence[float]]) -> bytes:
    """Losses by name over training steps."""
    figure, axes = _figure("step", "loss")
    for (name, values), color in zip(losses.items(), (GOOD, BAD), strict=False):
        axes.plot(steps, values, color=color, linewidth=1.4, label=name)
    axes.legend(frameon=False)
    return _png(figure)


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(5.2, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No date and no version: the same numbers give the same bytes.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
