"""The page that `kizu train` leaves in the bundle as report/training.html: what was learned, and how good parts score.

Owns what is said. Bad parts are none of its matter, since training sees none: `kizu evaluate --report` judges.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

from calib.charts import curve_chart, score_histogram
from calib.page import Piece, note, page, picture, table
from edge.bundle import ModelBundle
from edge.heatmap import panels
from edge.images import encode_png
from edge.stages.infer import map_roi
from edge.stages.segment import Segment
from edge.types import AnomalyMap, FrameId, Roi
from trainer.run_state import CurvePoint

FILE: Final = "training.html"


def training_page(bundle: ModelBundle, curve: Sequence[CurvePoint]) -> str:
    """The whole page as HTML of a bundle that is about to be written; the same training gives the same text."""
    calibration = bundle.calibration
    return page(
        f"Training of {bundle.manifest.name}",
        [
            ("", [f"{bundle.manifest.method}, preset {bundle.manifest.preset}.", note(_promise(bundle))]),
            ("Learning", _learning(curve)),
            (
                "Scores of good parts set aside",
                [
                    picture(
                        score_histogram(calibration.scores, [], calibration.threshold), "histogram of image scores"
                    ),
                    f"{len(calibration.scores)} good images that were not learned from; the threshold is the largest "
                    "of their scores and a margin.",
                ],
            ),
            ("Good parts set aside, with their maps", _golden(bundle)),
            ("Provenance", [table(_facts(bundle))]),
        ],
    )


def _promise(bundle: ModelBundle) -> str:
    return (
        "The threshold is provisional: nothing is promised about false rejects yet. `kizu calibrate` certifies it on "
        "other good parts."
        if not bundle.calibration.certified
        else "The threshold is certified."
    )


def _learning(curve: Sequence[CurvePoint]) -> list[Piece]:
    if not curve:
        return ["Nothing was trained: this preset measures parts by what its teachers say of good ones."]
    losses = {
        "training images": [point.loss for point in curve],
        "a few images set aside": [point.held_out_loss for point in curve],
    }
    return [picture(curve_chart([point.step for point in curve], losses), "learning curve")]


def _golden(bundle: ModelBundle) -> list[Piece]:
    """The golden frames, as the model sees them."""
    pieces: list[Piece] = ["The image as the model sees it, the map over it, and what would be marked: nothing."]
    spec, calibration = bundle.manifest.input, bundle.calibration
    whole = Roi(0, 0, spec.width, spec.height)
    segment = Segment(calibration.pixel_threshold, max(1, calibration.min_area_px))
    golden = bundle.golden
    for index, (frame, scores, score) in enumerate(zip(golden.frames, golden.maps, golden.scores, strict=True)):
        frame_id = FrameId(camera="golden", epoch=0, sequence=index, captured_ns=0)
        anomaly_map = AnomalyMap(frame_id, scores, float(score), map_roi(whole, spec, bundle.manifest.map), whole)
        drawn = panels(
            frame, anomaly_map, segment(anomaly_map, frame.shape[:2]), calibration.pixel_threshold, max_side_px=256
        )
        name = f"golden frame {index}"
        pieces.append(picture(encode_png(drawn), f"{name} with its map", f"{name}: score {float(score):.4g}"))
    return pieces


def _facts(bundle: ModelBundle) -> list[tuple[str, str]]:
    return [
        (key, value if isinstance(value, str) else json.dumps(value, sort_keys=True))
        for key, value in bundle.provenance.items()
        # Digests of every file and the curve's numbers are in provenance.json, for programs.
        if key not in ("training_files", "held_out_files", "training")
    ]
