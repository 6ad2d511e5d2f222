"""How far a quantized model agrees with the one it came from: scores, verdicts and maps on the same frames.

Owns the figures and the gate. Which frames, and what is done after a refusal, is `quantize`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from calib.metrics import image_auroc


class Limits(msgspec.Struct, frozen=True):
    """What a quantized bundle may lose: least share of equal verdicts, largest fall of the image AUROC."""

    min_agreement: float
    max_auroc_drop: float


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """Before against after, on `good` + `bad` frames, each with the threshold that one rule gives on the good ones.

    `verdicts` is the share of frames with the same verdict; `flipped` names the others. `map_error` is the root mean
    square difference of the good frames' maps over the standard deviation of those before, `map_error_bad` that of the
    bad ones, whose activations leave the range of good frames and are clipped. AUROCs are null without bad frames,
    `score_correlation` (Pearson) where scores do not vary.
    """

    good: int
    bad: int
    verdicts: float
    flipped: list[str]
    score_correlation: float | None
    map_error: float
    map_error_bad: float | None
    auroc_before: float | None
    auroc_after: float | None
    threshold_before: float
    threshold_after: float
    rejected_good_before: int
    rejected_good_after: int
    missed_bad_before: int
    missed_bad_after: int


@dataclass(slots=True, eq=False)
class _MapSums:
    cells: int = 0
    total: float = 0.0
    squares: float = 0.0
    difference: float = 0.0

    def add(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> None:
        self.cells += before.size
        self.total += float(before.sum())
        self.squares += float((before**2).sum())
        self.difference += float(((after - before) ** 2).sum())

    @property
    def error(self) -> float:
        """Root mean square difference over the standard deviation before; infinite if only the latter is zero."""
        if self.difference == 0.0:
            return 0.0
        spread = self.squares / self.cells - (self.total / self.cells) ** 2
        return float(np.sqrt(self.difference / self.cells / spread)) if spread > 0 else float("inf")


@dataclass(slots=True, eq=False)
class Compared:
    """Scores of both models, frame by frame, and the sums that the map error needs."""

    names: list[str] = field(default_factory=list)
    bad: list[bool] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    peaks_before: list[float] = field(default_factory=list)
    _good: _MapSums = field(default_factory=_MapSums)
    _bad: _MapSums = field(default_factory=_MapSums)

    def add(
        self,
        name: str,
        bad: bool,
        scores: tuple[float, float],
        maps: tuple[NDArray[np.float32], NDArray[np.float32]],
    ) -> None:
        """Add one frame; `scores` and `maps` are (before, after)."""
        before, after = (one.astype(np.float64) for one in maps)
        self.names.append(name)
        self.bad.append(bad)
        self.before.append(scores[0])
        self.after.append(scores[1])
        self.peaks.append(float(after.max()))
        self.peaks_before.append(float(before.max()))
        (self._bad if bad else self._good).add(before, after)

    def unquantized(self) -> Compared:
        """The model before, compared with itself."""
        same = Compared()
        for name, bad, score, peak in zip(self.names, self.bad, self.before, self.peaks_before, strict=True):
            same.names.append(name)
            same.bad.append(bad)
            same.before.append(score)
            same.after.append(score)
            same.peaks.append(peak)
            same.peaks_before.append(peak)
        return same

    def good_after(self) -> list[float]:
        """The quantized model's scores of the good frames."""
        return [score for score, bad in zip(self.after, self.bad, strict=True) if not bad]

    @property
    def map_error(self) -> float:
        """Of the good frames."""
        return self._good.error

    def agreement(self, threshold_before: float, threshold_after: float) -> Agreement:
        """The figures with these thresholds."""
        bad = np.array(self.bad, bool)
        before, after = np.array(self.before), np.array(self.after)
        rejected = before > threshold_before, after > threshold_after
        flipped = rejected[0] != rejected[1]
        aurocs = [image_auroc(s[~bad], s[bad]) if 0 < bad.sum() < len(bad) else None for s in (before, after)]
        return Agreement(
            good=int((~bad).sum()),
            bad=int(bad.sum()),
            verdicts=float(1.0 - flipped.mean()),
            flipped=[name for name, other in zip(self.names, flipped, strict=True) if other],
            score_correlation=_correlation(before, after),
            map_error=self.map_error,
            map_error_bad=self._bad.error if bad.any() else None,
            auroc_before=aurocs[0],
            auroc_after=aurocs[1],
            threshold_before=threshold_before,
            threshold_after=threshold_after,
            rejected_good_before=int((rejected[0] & ~bad).sum()),
            rejected_good_after=int((rejected[1] & ~bad).sum()),
            missed_bad_before=int((~rejected[0] & bad).sum()),
            missed_bad_after=int((~rejected[1] & bad).sum()),
        )


def complaints(found: Agreement, limits: Limits) -> list[str]:
    """What the gate holds against `found`; empty if it passes."""
    wrong = []
    if found.verdicts < limits.min_agreement:
        wrong.append(
            f"{len(found.flipped)} of {found.good + found.bad} frames get another verdict: agreement "
            f"{found.verdicts:.4f}, at least {limits.min_agreement:g} is asked (--min-agreement)"
        )
    if found.auroc_before is not None and found.auroc_after is not None:
        drop = found.auroc_before - found.auroc_after
        if drop > limits.max_auroc_drop:
            wrong.append(
                f"AUROC falls from {found.auroc_before:.4f} to {found.auroc_after:.4f}, by {drop:.4f}; "
                f"{limits.max_auroc_drop:g} is allowed (--max-auroc-drop)"
            )
    return wrong


def table(found: Agreement, precision: str) -> str:
    """The figures as text, before beside after."""
    rows: list[tuple[str, str, str]] = [
        ("", "before", precision),
        ("threshold", f"{found.threshold_before:.6g}", f"{found.threshold_after:.6g}"),
        ("good rejected", *_of(found.rejected_good_before, found.rejected_good_after, found.good)),
    ]
    if found.bad:
        rows.append(("bad missed", *_of(found.missed_bad_before, found.missed_bad_after, found.bad)))
    if found.auroc_before is not None and found.auroc_after is not None:
        rows.append(("image AUROC", f"{found.auroc_before:.4f}", f"{found.auroc_after:.4f}"))
    lines = [f"{name:<18}{before:>14}{after:>14}" for name, before, after in rows]
    correlation = "-" if found.score_correlation is None else f"{found.score_correlation:.5f}"
    lines += [
        f"{'same verdict':<18}{100 * found.verdicts:>13.2f}%",
        f"{'score correlation':<18}{correlation:>14}",
        f"{'map error, good':<18}{100 * found.map_error:>13.2f}%  of the maps' standard deviation",
    ]
    if found.map_error_bad is not None:
        lines.append(f"{'map error, bad':<18}{100 * found.map_error_bad:>13.2f}%")
    if not found.bad:
        lines.append("no bad frames given (--data or --bad): whether defects are still found is not known")
    return "\n".join(lines)


def _of(before: int, after: int, total: int) -> tuple[str, str]:
    return f"{before} of {total}", f"{after} of {total}"


def _correlation(before: NDArray[np.float64], after: NDArray[np.float64]) -> float | None:
    if len(before) < 2 or before.std() == 0 or after.std() == 0:
        return None
    return float(np.corrcoef(before, after)[0, 1])
