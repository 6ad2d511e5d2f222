"""Good parts that may be bad ones: named and shown, never left out.

Owns the rule. A bad part among the good ones raises the threshold above itself and lets its like pass, and only a
person can say whether it is bad. Leaving it out by a rule would make the promise a promise about parts that pass the
rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

EXPECTED_BELOW = 0.01
"""A part is suspect if fewer than this many parts as high are expected in the whole sample."""

LEAST_PARTS = 20
"""Fewer say nothing about a tail."""


def find_suspects(scores: Mapping[str, float]) -> dict[str, float]:
    """Return {part: how many parts that high are expected}, highest first, for those that stick out.

    The quarter of highest scores is compared with an exponential tail of the same median: a good part as high as x is
    expected n / 4 * 2 ** -((x - upper quartile) / (median of that quarter - upper quartile)) times. The median, so that
    bad parts cannot hide each other. Scores with a heavier tail than that give a suspect now and then; that costs a
    look.
    """
    if len(scores) < LEAST_PARTS:
        return {}
    values = np.array(list(scores.values()))
    quartile, middle = np.quantile(values, [0.75, 0.875])
    step = float(middle - quartile)
    if step <= 0:
        return {}
    expected = {
        part: len(values) / 4 * math.exp2(-min(1000.0, (score - quartile) / step)) for part, score in scores.items()
    }
    found = {part: count for part, count in expected.items() if count < EXPECTED_BELOW}
    return dict(sorted(found.items(), key=lambda item: item[1]))
