"""Where to clip activations before they are rounded to eight bits: percentile, least squared error, least entropy lost.

Owns the histogram of magnitudes and the finders. Which tensors are looked at and what becomes of a range is `int8`.
All is symmetric: a range T means [-T, T], and zero is represented exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from edge.errors import CalibrationError

QuantizedPrecision = Literal["int8", "fp8"]
Finder = Literal["percentile", "entropy", "mse"]

LARGEST: Final[Mapping[QuantizedPrecision, float]] = MappingProxyType({"int8": 127.0, "fp8": 448.0})
"""The largest magnitude that each can hold before scaling; int8 leaves -128 out to be symmetric."""

BINS: Final = 4096
PERCENTILE: Final = 99.99
_SMALLEST_TOP: Final = 2.0**-20
_CANDIDATES: Final = 256


class Magnitudes:
    """A histogram of |x| over any number of arrays in one pass: its top doubles whenever a larger value comes.

    `counts` (BINS,) int64, equally wide bins from 0 to `top`, `peak` the largest |x| seen.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.top = _SMALLEST_TOP
        self.peak = 0.0

    def add(self, values: NDArray[np.float32], where: str) -> None:
        """Count `values`.

        Raises:
            CalibrationError: one is not finite; names `where`.
        """
        sizes = np.abs(values).ravel()
        peak = float(sizes.max(initial=0.0))
        if not np.isfinite(peak):
            raise CalibrationError(f"{where} becomes NaN or infinite on a good frame; run `kizu verify` on the bundle")
        while peak > self.top:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
            self.top *= 2
        self.peak = max(self.peak, peak)
        # A power of two divided by another: the product is exact, so merged bins hold what wider ones would have.
        bins = np.minimum((sizes * np.float32(BINS / self.top)).astype(np.int32), BINS - 1)
        self.counts += np.bincount(bins, minlength=BINS)

    @property
    def width(self) -> float:
        """Of one bin."""
        return self.top / BINS

    @property
    def centers(self) -> NDArray[np.float64]:
        """The middle of each bin."""
        return np.asarray((np.arange(BINS) + 0.5) * self.width, np.float64)

    @property
    def used(self) -> int:
        """How many bins there are up to the last that is not empty."""
        filled = np.flatnonzero(self.counts)
        return int(filled[-1]) + 1 if filled.size else 0


def rounded(values: NDArray[Any], limit: float, precision: QuantizedPrecision) -> NDArray[np.float64]:
    """`values` as they are after quantization with the range [-limit, limit]."""
    largest = LARGEST[precision]
    step = limit / largest
    scaled = np.clip(np.asarray(values, np.float64) / step, -largest, largest)
    return np.asarray((np.rint(scaled) if precision == "int8" else _to_e4m3(scaled)) * step, np.float64)


def _to_e4m3(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest numbers with a 3-bit mantissa and exponents from -6 (below that, multiples of 2^-9)."""
    _, exponent = np.frexp(values)
    step = np.exp2(np.maximum(exponent - 1, -6) - 3.0)
    return np.asarray(np.rint(values / step) * step, np.float64)


def find_range(found: Magnitudes, finder: Finder, precision: QuantizedPrecision) -> float:
    """Return T > 0 for the tensor whose magnitudes were seen; 1 for one that was zero throughout."""
    if found.peak == 0.0:
        return 1.0
    # No value beyond the largest seen deserves a level.
    return min(FINDERS[finder](found, precision), found.peak)


def by_percentile(found: Magnitudes, precision: QuantizedPrecision) -> float:
    """The upper edge of the first bin up to which `PERCENTILE` of all values lie."""
    total = np.cumsum(found.counts)
    return float(np.searchsorted(total, total[-1] * (PERCENTILE / 100)) + 1) * found.width


def by_mse(found: Magnitudes, precision: QuantizedPrecision) -> float:
    """The T of the least mean squared difference between values before and after quantization."""
    centers, counts = found.centers, found.counts
    return _least(found, lambda limit: float(counts @ (rounded(centers, limit, precision) - centers) ** 2))


def by_entropy(found: Magnitudes, precision: QuantizedPrecision) -> float:
    """The T of the least Kullback-Leibler divergence from the clipped values' distribution to the quantized one.

    Bins that fall to one level share its probability equally, empty ones apart; what is clipped counts as the last bin
    in the first distribution and not in the second, which makes clipping cost something. Values below half an int8 step
    of the largest seen are left out: behind a leaky ReLU half of all lie there, and no range but a tiny one would tell
    them apart. Source: S. Migacz, 8-bit inference with TensorRT (GTC 2017), which leaves out zeros.
    """
    return _least(found, lambda limit: divergence(found, limit, precision))


def divergence(found: Magnitudes, limit: float, precision: QuantizedPrecision) -> float:
    """The Kullback-Leibler divergence that `by_entropy` makes least, in nats; infinite where nothing is left."""
    kept = max(1, round(limit / found.width))
    inside = found.counts[:kept].astype(np.float64)
    inside[: found.used // 254] = 0.0
    whole = inside.copy()
    whole[-1] += found.counts[kept:].sum()
    levels = rounded(found.centers[:kept], limit, precision)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(levels)) + 1])
    sizes = np.diff(np.concatenate([starts, [kept]]))
    filled = inside > 0
    share = np.add.reduceat(inside, starts) / np.maximum(np.add.reduceat(filled.astype(np.float64), starts), 1)
    spread = np.where(filled, np.repeat(share, sizes), 0.0)
    if spread.sum() == 0:
        return float("inf")
    p, q = whole / whole.sum(), spread / spread.sum()
    # An empty last bin that only clipped values fill: a small probability in place of an infinite divergence.
    q = np.maximum(q, 1e-9)
    there = p > 0
    return float(np.sum(p[there] * np.log(p[there] / q[there])))


FINDERS: Final[Mapping[Finder, Callable[[Magnitudes, QuantizedPrecision], float]]] = MappingProxyType(
    {"percentile": by_percentile, "entropy": by_entropy, "mse": by_mse}
)


def candidates(found: Magnitudes) -> NDArray[np.float64]:
    """The ranges that are tried: bin edges from an eighth of the largest value seen, at most `_CANDIDATES`."""
    edges = np.unique(np.linspace(max(1, found.used // 8), found.used, _CANDIDATES).round())
    return np.asarray(edges * found.width, np.float64)


def _least(found: Magnitudes, loss: Callable[[float], float]) -> float:
    tried = candidates(found)
    return float(tried[int(np.argmin([loss(float(limit)) for limit in tried]))])
