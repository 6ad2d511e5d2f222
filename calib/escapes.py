"""How many known bad parts would pass: counted beside the certificate, and of no influence on it.

Owns the count and its bound. A threshold picked on a few bad parts would find these and promise nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from calib.scoring import Scored
from calib.threshold import certified_rate
from edge.bundle import Zone


class Escapes(msgspec.Struct, frozen=True, kw_only=True):
    """`escaped` of `parts` bad parts score no higher than the threshold; with the certificate's confidence at most the
    share `bound` of parts like these would (Clopper and Pearson 1934, one-sided).

    `names` are the escaped ones, lowest first; `lowest` the lowest score, raw; `kinds` by folder: [escaped, parts].
    """

    parts: int
    escaped: int
    bound: float
    lowest: float
    names: list[str]
    kinds: dict[str, tuple[int, int]]


def count_escapes(bad: Scored, threshold: float, zones: Sequence[Zone], confidence: float) -> Escapes | None:
    """Return what `bad` parts do at `threshold`; None where none could be scored."""
    scores = {part: _score(bad, part, zones) for part in bad.scores}
    if not scores:
        return None
    names = sorted((part for part, score in scores.items() if score <= threshold), key=lambda part: scores[part])
    kinds: dict[str, tuple[int, int]] = {}
    kind_of = {image.part: image.path.parent.name for image in bad.files}
    for part in scores:
        escaped, parts = kinds.get(kind_of[part], (0, 0))
        kinds[kind_of[part]] = escaped + (part in names), parts + 1
    return Escapes(
        parts=len(scores),
        escaped=len(names),
        bound=certified_rate(len(names), len(scores), confidence=confidence),
        lowest=min(scores.values()),
        names=names,
        kinds=kinds,
    )


def _score(bad: Scored, part: str, zones: Sequence[Zone]) -> float:
    """With the zones' own thresholds, which were not known when the parts were scored."""
    if not zones:
        return bad.scores[part]
    offsets = np.array([zone.offset for zone in zones], np.float32)
    return float((bad.zones[part].astype(np.float32) + offsets).max())
