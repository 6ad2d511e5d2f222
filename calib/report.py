"""The page that `kizu evaluate --report` leaves: figures, curves, what the threshold costs, the worst images.

Owns what is said and in which order; drawing is `charts` and `edge.heatmap`, HTML is `page`, figures are `evaluation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from calib.charts import pro_chart, roc_chart, score_histogram
from calib.dataset import read_stored_image
from calib.evaluation import Evaluation, Figures, Judged
from calib.metrics import PixelRanking, rank_pixels
from calib.page import Markup, Piece, note, page, picture, table
from calib.pixel_figures import MaskedMap, Rendered
from edge.bundle import ModelBundle
from edge.heatmap import panels
from edge.images import encode_png
from edge.stages.segment import Segment
from edge.types import Decision

WORST: Final = 6
"""Pictures of each kind of error; the page stays small enough to be sent."""

PRO_LIMIT: Final = 0.30
_PRO_POINTS: Final = 200


def report_page(found: Evaluation, judged: Sequence[Judged], bundle: ModelBundle) -> str:
    """The whole page as HTML, self-contained; the same evaluation gives the same text."""
    good = _scores(judged, good=True)
    bad = _scores(judged, good=False)
    return page(
        f"{bundle.manifest.name} on {Path(found.data).name}",
        [
            ("", [_summary(found), *(note(warning) for warning in found.warnings)]),
            ("Figures", [_figures_table(found)]),
            ("Scores and threshold", _score_pieces(found, good, bad)),
            ("Pixels", _pixel_pieces(found, judged)),
            ("Worst misses: bad parts that passed", _pictures(_misses(judged), bundle)),
            ("Worst false rejects: good parts that were rejected", _pictures(_false_rejects(judged), bundle)),
            ("Provenance", [_provenance(found, bundle)]),
        ],
    )


def roc_points(good: NDArray[np.float64], bad: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares of `good` and of `bad` above every threshold there is, from none to all."""
    cuts = np.unique(np.concatenate([good, bad]))[::-1]
    above = [1 - np.searchsorted(np.sort(one), cuts, side="right") / one.size for one in (good, bad)]
    return tuple(np.concatenate([[0.0], one, [1.0]]) for one in above)  # type: ignore[return-value]


def pro_points(ranking: PixelRanking, limit: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The PRO curve at evenly spaced shares of normal pixels up to `limit`, (p,) each."""
    shares = np.linspace(0, limit, _PRO_POINTS)
    places = np.clip(ranking.normal.size - 1 - np.round(shares * ranking.normal.size).astype(np.int64), 0, None)
    cuts = ranking.normal[places]
    summed = np.concatenate([[0.0], np.cumsum(ranking.overlap)])
    above = summed[-1] - summed[np.searchsorted(ranking.defect, cuts, side="right")]
    return shares, above / ranking.components


def _scores(judged: Sequence[Judged], *, good: bool) -> list[float]:
    return [
        one.answer.verdict.score for one in judged if one.image.is_good == good and one.answer.verdict.score is not None
    ]


def _summary(found: Evaluation) -> str:
    kind = "certified" if found.certified else f"{found.threshold_kind}, not certified"
    parts = [
        f"At its threshold of {found.threshold:.4g} ({kind}) the model rejected {found.false_rejects} of {found.good} "
        f"good parts and let {found.escapes} of {found.defective} bad ones pass."
    ]
    if found.inconclusive:
        parts.append(f"{found.inconclusive} images could not be judged and are in no figure.")
    return " ".join(parts)


def _figures_table(found: Evaluation) -> Markup:
    header = ["", "good + bad", "image AUROC", "pixel AUROC", "AU-PRO 0.30", "AU-PRO 0.05", "rejected", "passed"]
    rows = [_figures_row("all", found), *(_figures_row(kind, one) for kind, one in found.kinds.items())]
    return table(rows, header)


def _figures_row(name: str, one: Figures) -> list[Piece]:
    cells = [_with_interval(one, key) for key in ("image_auroc", "pixel_auroc", "au_pro_30", "au_pro_05")]
    return [name, f"{one.good} + {one.defective}", *cells, str(one.false_rejects), str(one.escapes)]


def _with_interval(one: Figures, key: str) -> str:
    value = getattr(one, key)
    if value is None:
        return "–"
    if key not in one.intervals:
        return f"{value:.3f}"
    low, high = one.intervals[key]
    return f"{value:.3f} ({low:.2f} to {high:.2f})"


def _score_pieces(found: Evaluation, good: list[float], bad: list[float]) -> list[Piece]:
    if not good:
        return ["No good part was scored."]
    pieces: list[Piece] = [picture(score_histogram(good, bad, found.threshold), "histogram of image scores")]
    if bad and found.image_auroc is not None:
        at = (found.false_rejects / found.good, 1 - found.escapes / found.defective)
        x, y = roc_points(np.array(good), np.array(bad))
        pieces.append(picture(roc_chart(x, y, at, found.image_auroc), "ROC curve"))
        pieces.append(_costs(np.array(good), np.array(bad)))
    return pieces


def _costs(good: NDArray[np.float64], bad: NDArray[np.float64]) -> Markup:
    """What other thresholds would have cost on this set; to be looked at, not to choose by."""
    rows = []
    for allowed in (0, 0.01, 0.02, 0.05, 0.10):
        cut = float(np.sort(good)[::-1][min(int(allowed * good.size), good.size - 1)])
        rejected, passed = int((good > cut).sum()), int((bad <= cut).sum())
        rows.append([f"{cut:.4g}", f"{rejected} of {good.size} ({rejected / good.size:.1%})",
                     f"{passed} of {bad.size} ({passed / bad.size:.1%})"])  # fmt: skip
    return table(rows, ["threshold", "good parts rejected", "bad parts passed"])


def _pixel_pieces(found: Evaluation, judged: Sequence[Judged]) -> list[Piece]:
    if found.au_pro_30 is None:
        return ["No masks: nothing is said about pixels."]
    maps = [
        MaskedMap(one.answer.anomaly_map, one.answer.verdict.frame_size, one.image.kind, one.image.is_good, one.mask)
        for one in judged
        if one.answer.anomaly_map is not None and (one.image.is_good or one.mask is not None)
    ]
    ranking = rank_pixels(Rendered(maps), [one.mask for one in maps])
    return [picture(pro_chart(*pro_points(ranking, PRO_LIMIT), PRO_LIMIT, found.au_pro_30), "PRO curve")]


def _misses(judged: Sequence[Judged]) -> list[Judged]:
    """Bad parts that passed, those that scored lowest first."""
    return _ordered(judged, good=False, decision=Decision.ACCEPT, highest_first=False)


def _false_rejects(judged: Sequence[Judged]) -> list[Judged]:
    """Good parts that were rejected, those that scored highest first."""
    return _ordered(judged, good=True, decision=Decision.REJECT, highest_first=True)


def _ordered(judged: Sequence[Judged], *, good: bool, decision: Decision, highest_first: bool) -> list[Judged]:
    chosen = [one for one in judged if one.image.is_good == good and one.answer.verdict.decision is decision]
    return sorted(chosen, key=lambda one: one.answer.verdict.score or 0.0, reverse=highest_first)


def _pictures(chosen: Sequence[Judged], bundle: ModelBundle) -> list[Piece]:
    if not chosen:
        return ["None."]
    pieces: list[Piece] = [
        f"The photograph, the map over it, and what was marked (red); known defects are outlined in green. "
        f"{min(len(chosen), WORST)} of {len(chosen)}."
    ]
    segment = Segment(bundle.calibration.pixel_threshold, max(1, bundle.calibration.min_area_px))
    for one in chosen[:WORST]:
        answer = one.answer
        regions = () if answer.anomaly_map is None else segment(answer.anomaly_map, answer.verdict.frame_size)
        drawn = panels(
            read_stored_image(one.image.path), answer.anomaly_map, regions, bundle.calibration.pixel_threshold,
            truth=one.mask,
        )  # fmt: skip
        score = answer.verdict.score
        caption = f"{one.image.name}: score {score:.4g}" if score is not None else one.image.name
        pieces.append(picture(encode_png(drawn), f"{one.image.name} with its map and regions", caption))
    return pieces


def _provenance(found: Evaluation, bundle: ModelBundle) -> Markup:
    calibration = bundle.calibration
    return table(
        [
            ("bundle", found.bundle),
            ("model_id", found.model_id),
            ("method, preset", f"{found.method}, {found.preset or 'none'}"),
            ("engine", found.engine),
            ("data", f"{found.data}, {len(found.images)} images"),
            ("digest of the data", found.data_sha256),
            ("threshold set by", calibration.engine),
            ("digest of the data behind the threshold", calibration.data_sha256),
            ("trained by", str(bundle.provenance.get("command", "not recorded"))),
            ("versions", _versions(bundle)),
        ]
    )


def _versions(bundle: ModelBundle) -> str:
    versions = bundle.provenance.get("versions")
    return msgspec.json.encode(versions).decode() if isinstance(versions, dict) else "not recorded"
