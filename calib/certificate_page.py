"""The certificate as a page: what is promised in plain words, what it stands on, pictures, and a place to sign.

Owns the words and the pictures; HTML and escaping are `page`'s, every number comes from `certificate`. The page is made
beside the bundle and not in it: it names the bundle's `model_id`, which is a digest of everything inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

import msgspec
import numpy as np
from numpy.typing import NDArray

from calib.agreement import Agreement
from calib.agreement import table as agreement_table
from calib.certificate import Certified
from calib.dataset import read_stored_image
from calib.escapes import Escapes
from calib.page import BLANK, Markup, Piece, note, page, picture, table
from calib.promise import Certificate, Promise
from calib.scoring import Scored, Worst
from calib.threshold import percent
from edge.bundle import CameraThresholds, ModelBundle, ScoreCalibration
from edge.images import cv2, encode_png
from edge.stages.segment import render_map

SIDE_PX = 240
"""Longer side of a picture on the page."""

BARS = 48


def certificate_page(certified: Certified) -> str:
    """Return the HTML page of a certificate; the same certificate gives the same page."""
    certificate, bundle = certified.certificate, certified.bundle
    cameras = certificate.cameras or {"": certificate}
    sections: list[tuple[str, Sequence[Piece]]] = [
        ("", [f"Bundle {bundle.manifest.name}, {bundle.manifest.method}, {_when(bundle.manifest.created_ns)}."]),
        ("What is certified", _promise_in_words(certificate)),
        ("What it stands on", [_facts(certificate, certified)]),
    ]
    for camera, promise in cameras.items():
        title = f"Camera {camera}: " if camera else ""
        good, bad = certified.scored[camera], certified.bad.get(camera)
        sections.append((f"{title}Scores of good parts", [_numbers(promise), histogram(good, bad, promise)]))
        sections.append((f"{title}The good parts that score highest", _highest(good, promise)))
        sections.append((f"{title}Bad parts", _escapes(promise.escapes, bad, promise)))
    if (bits := _quantization(bundle)) is not None:
        sections.append(("Eight bits", bits))
    sections += [
        ("When it no longer holds", _limits(certificate)),
        ("Left out", _left_out(certificate)),
        ("Accepted by", [_signature()]),
    ]
    return page(f"Certificate: at most {percent(certificate.false_rejects)} of good parts rejected", sections)


def _when(created_ns: int) -> str:
    return f"{datetime.fromtimestamp(created_ns / 1e9, UTC):%Y-%m-%d %H:%M} UTC"


def _promise_in_words(certificate: Certificate) -> list[Piece]:
    whole = 1 / (1 - certificate.confidence)
    return [
        f"Of good parts like those in the sample, at most {percent(certificate.false_rejects)} will be rejected: about "
        f"{certificate.false_rejects * 10_000:.4g} in 10,000. This statement was made by a procedure that is right in "
        f"at least {percent(certificate.confidence)} of its uses, or wrong at most once in {whole:.3g}.",
        f"The bound that this sample reached is {percent(certificate.certified_rate)}.",
        "Nothing is promised about bad parts: how many of those pass depends on what is wrong with them.",
        *(note(warning) for warning in certificate.warnings),
    ]


def _facts(certificate: Certificate, certified: Certified) -> Markup:
    calibration = certified.bundle.calibration
    rows: dict[str, ScoreCalibration | CameraThresholds] = {**calibration.cameras} or {"all": calibration}
    return table(
        [
            ("good parts", f"{certificate.parts:,} in {certificate.images:,} pictures"),
            ("one part is", certificate.grouping),
            ("inspected", "; ".join(f"{name}: {_region(one.roi_xywh)}" for name, one in rows.items())),
            ("flat field", "; ".join(f"{name}: {one.flat_field or 'none'}" for name, one in rows.items())),
            ("engine", certificate.engine),
            ("for a tenth of the rate", f"{certificate.parts_for_a_tenth:,} good parts would be needed"),
            ("bundle", certificate.bundle),
            ("model_id", _code(certificate.model_id)),
            ("derived from", _code(certificate.source_model_id)),
            ("model.onnx SHA-256", _code(calibration.model_sha256 or "-")),
            ("digest of the good pictures", _code(certificate.data_sha256)),
        ]
    )


def _region(roi: tuple[int, int, int, int] | None) -> str:
    return "the whole frame" if roi is None else f"x {roi[0]}, y {roi[1]}, {roi[2]} x {roi[3]} px"


def _numbers(promise: Promise) -> Markup:
    rows = [
        ("threshold", f"{promise.threshold:.6g}: {promise.rule}; a part is rejected above it"),
        ("before", f"{promise.previous_threshold:.6g}, which rejects {promise.rejected_before} of these good parts"),
        ("pixels", f"marked above {promise.pixel_threshold:.6g}, in regions of at least {promise.min_area_px} px"),
    ]
    rows += [(f"zone {name}", f"threshold {value:.6g}") for name, value in promise.zones.items()]
    return table(rows)


def histogram(good: Scored, bad: Scored | None, promise: Promise) -> Markup:
    """Return a drawing of the good parts' scores with the threshold, and of bad parts' where there are some.

    What lies far above the threshold is drawn in the last bar.
    """
    scores = np.array(list(good.scores.values()))
    low = float(scores.min())
    high = max(float(scores.max()), promise.threshold) + max(0.5 * (promise.threshold - low), 1e-12)
    edges = np.linspace(low, high, BARS + 1)
    rows = [("good parts", "#3b6ea5", _counts(scores, edges))]
    if bad is not None and bad.scores:
        rows.append(("bad parts", "#b3261e", _counts(np.array(list(bad.scores.values())), edges)))
    return _drawn(rows, edges, promise.threshold)


def _counts(scores: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.histogram(np.clip(scores, edges[0], edges[-1]), edges)[0]


def _drawn(rows: Sequence[tuple[str, str, NDArray[np.intp]]], edges: NDArray[np.float64], threshold: float) -> Markup:
    width, height, left = 720, 120, 8
    step = (width - 2 * left) / BARS
    parts = []
    for place, (name, color, counts) in enumerate(rows):
        floor, top = (place + 1) * height, max(1, int(counts.max()))
        parts.append(f'<text x="{left}" y="{floor - height + 14}" font-size="12">{escape(name)}, at most {top}</text>')
        for bar, count in enumerate(counts.tolist()):
            if count:
                # Never thinner than a pixel: a single part must be seen beside thousands.
                tall = max(1.5, (height - 24) * count / top)
                parts.append(
                    f'<rect x="{left + bar * step:.1f}" y="{floor - tall:.1f}" width="{max(1.0, step - 1):.1f}" '
                    f'height="{tall:.1f}" fill="{color}"/>'
                )
    bottom = len(rows) * height
    at = left + (threshold - edges[0]) / (edges[-1] - edges[0]) * (width - 2 * left)
    parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{bottom}" stroke="#1a1a1a" stroke-dasharray="5 3"/>')
    parts += [
        f'<text x="{x:.1f}" y="{bottom + 16}" font-size="12" text-anchor="{anchor}">{escape(text)}</text>'
        for x, anchor, text in (
            (left, "start", f"{edges[0]:.4g}"),
            (at, "middle", f"threshold {threshold:.4g}"),
            (width - left, "end", f"{edges[-1]:.4g} and more"),
        )
    ]
    label = f"Scores by number of parts; threshold {threshold:.4g}"
    return Markup(
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {bottom + 22}" width="{width}" '
        f'font-family="sans-serif">{"".join(parts)}</svg>'
    )


def _highest(good: Scored, promise: Promise) -> list[Piece]:
    shown = good.shown()
    pieces: list[Piece] = [
        f"Pictures of the {len(shown)} highest of {promise.parts:,} parts, the map beside each. If one shows a flaw, "
        "it is a bad part: take its files out and calibrate again. No part was left out because of its score.",
    ]
    if promise.suspects:
        pieces.append(
            note(
                f"{len(promise.suspects)} of them stick out from the others and may be bad parts: "
                f"{', '.join(promise.suspects)}."
            )
        )
    return [*pieces, *(_picture(one, promise, one.image.part in promise.suspects) for one in shown)]


def _escapes(escapes: Escapes | None, bad: Scored | None, promise: Promise) -> list[Piece]:
    if escapes is None or bad is None:
        return ["No bad parts were given (--bad): how many of them would pass is not known."]
    kinds = [(kind, f"{escaped} of {parts}") for kind, (escaped, parts) in sorted(escapes.kinds.items())]
    return [
        f"{escapes.escaped} of {escapes.parts} bad parts pass. Of parts like these, at most {percent(escapes.bound)} "
        "do. They had no influence on the threshold.",
        *([table(kinds, header=("kind", "pass"))] if len(kinds) > 1 else []),
        "The bad parts that score lowest:",
        *(_picture(one, promise, one.image.part in escapes.names, "passes") for one in bad.shown()),
    ]


def _picture(one: Worst, promise: Promise, marked: bool, mark: str = "may be a bad part") -> Markup:
    name = one.image.name if one.image.name == one.image.part else f"{one.image.part}: {one.image.name}"
    caption = f"{name}, score {one.score:.5g}{f' ({mark})' if marked else ''}"
    return picture(part_png(one, promise.threshold), f"{name} and its anomaly map", caption)


def part_png(one: Worst, threshold: float) -> bytes:
    """Return a PNG (h, 2 w, 3): the picture, a box around its highest map value, and the map, red at `threshold`."""
    image = read_stored_image(one.image.path)
    height, width = image.shape[:2]
    scale = SIDE_PX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8).reshape(size[1], size[0], -1)
    shown = np.repeat(small, 3, axis=2) if small.shape[2] == 1 else small.copy()
    rendered = render_map(one.anomaly_map, (height, width))
    y, x = np.unravel_index(int(rendered.argmax()), rendered.shape)
    center = round(float(x) * scale), round(float(y) * scale)
    cv2.rectangle(shown, (center[0] - 10, center[1] - 10), (center[0] + 10, center[1] + 10), (255, 40, 40), 2)
    heat = _heat(np.asarray(cv2.resize(rendered, size, interpolation=cv2.INTER_AREA), np.float32), threshold)
    return encode_png(np.ascontiguousarray(np.concatenate([shown, heat], axis=1)))


def _heat(values: NDArray[np.float32], threshold: float) -> NDArray[np.uint8]:
    """(h, w, 3): black at the map's median, red at the threshold, white at twice as far."""
    middle = float(np.median(values))
    share = (values - middle) / max(threshold - middle, 1e-12)
    red = np.clip(share, 0, 1)
    rest = np.clip(share - 1, 0, 1)
    return np.asarray(255 * np.stack([red, rest, rest], axis=2), np.uint8)


def _quantization(bundle: ModelBundle) -> list[Piece] | None:
    """What the gate found when the graph was rounded; the certificate itself was made through the rounded graph."""
    record = bundle.provenance.get("quantization")
    if not isinstance(record, dict):
        return None
    found = msgspec.convert(record["agreement"], Agreement)
    return [
        f"The graph computes in {record['precision']}. The scores above are the rounded graph's, and so is the "
        "threshold. Before it was accepted it judged the same frames as the graph that it came from:",
        Markup(f"<pre>{escape(agreement_table(found, str(record['precision'])))}</pre>"),
    ]


def _limits(certificate: Certificate) -> list[Piece]:
    bullets = [
        "another model, backend, precision, flat field, lens, lamp, position or region of interest: calibrate again",
        "parts that are not like the sample: another supplier, material or shift, if the sample had only one",
        "pictures of one part counted as several: the promise is about parts, and would be too good",
        "drift: the line watches the scores of live parts and voids the certificate in every verdict when they change",
    ]
    items = "".join(f"<li>{escape(bullet)}</li>" for bullet in bullets)
    unit = "every picture" if certificate.unit == "image" else "the highest of a part's pictures"
    return [Markup(f"<ul>{items}</ul>"), f"What was compared with the threshold is {unit}."]


def _left_out(certificate: Certificate) -> list[Piece]:
    rows = [(name, f"same bytes as {first}") for name, first in certificate.duplicates.items()]
    rows += list(certificate.skipped.items())
    rows += [(part, "a part with a picture that cannot be inspected") for part in certificate.left_out]
    if certificate.spacing:
        rows.append((f"{certificate.spacing} frames", "between two blocks, by the spacing asked for"))
    return [table(rows)] if rows else ["Nothing: every file in the folder counts."]


def _signature() -> Markup:
    return table([(what, BLANK) for what in ("Name", "Function", "Date", "Signature")])


def _code(text: str) -> Markup:
    return Markup(f"<code>{escape(text)}</code>")
