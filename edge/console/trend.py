"""Trend: how many parts were rejected lately, and where good p-values lie; bins of fixed width, a fixed number of them.

Owns the bins. A part's time is given by the caller, on one monotonic clock, so a wall clock that is set moves nothing.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import msgspec

BIN_S: Final = 10
BINS: Final = 90
WINDOW_S: Final = BIN_S * BINS
_MAX_P_VALUES: Final = 256


class Bin(msgspec.Struct, frozen=True, array_like=True):
    """One bin for the page: bins since now, parts, rejected, inconclusive, quartiles of the p-values or None."""

    ago: int
    parts: int
    rejected: int
    inconclusive: int
    low: float | None
    median: float | None
    high: float | None


class _Open:
    __slots__ = ("inconclusive", "p_values", "parts", "rejected", "slot")

    def __init__(self, slot: int) -> None:
        self.slot, self.parts, self.rejected, self.inconclusive = slot, 0, 0, 0
        self.p_values: deque[float] = deque(maxlen=_MAX_P_VALUES)


class Trend:
    """The last WINDOW_S seconds. Times are seconds of one monotonic clock and may come out of order."""

    def __init__(self) -> None:
        self._bins: dict[int, _Open] = {}

    def add(self, at_s: float, decision: str, p_value: float | None) -> None:
        """Count a part."""
        slot = int(at_s // BIN_S)
        one = self._bins.get(slot)
        if one is None:
            one = self._bins[slot] = _Open(slot)
            if len(self._bins) > BINS:
                del self._bins[min(self._bins)]
        one.parts += 1
        one.rejected += decision == "reject"
        one.inconclusive += decision == "inconclusive"
        if p_value is not None:
            one.p_values.append(p_value)

    def bins(self, now_s: float) -> list[Bin]:
        """The bins that hold parts, oldest first."""
        present = int(now_s // BIN_S)
        return [_closed(self._bins[slot], present) for slot in sorted(self._bins) if 0 <= present - slot < BINS]


def _closed(one: _Open, present: int) -> Bin:
    low, median, high = _quartiles(sorted(one.p_values))
    return Bin(present - one.slot, one.parts, one.rejected, one.inconclusive, low, median, high)


def _quartiles(ascending: list[float]) -> tuple[float | None, float | None, float | None]:
    if not ascending:
        return None, None, None
    last = len(ascending) - 1
    low, median, high = (round(ascending[round(last * share)], 4) for share in (0.25, 0.5, 0.75))
    return low, median, high
