"""A bundle judged on a labeled test set: every figure, for the whole set and for each defect kind.

Owns the figures' schema. `docs/evaluation.md` describes the JSON; figures and intervals themselves are computed in
`metrics` and `intervals`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from calib.collect import Collected, collect
from calib.dataset import LabeledImage, data_sha256, file_sha256, read_mask, read_test_set
from calib.intervals import image_auroc_interval, rate_interval
from calib.metrics import image_auroc
from calib.pixel_figures import MaskedMap, PixelFigures
from calib.progress import progress
from edge.bundle import ModelBundle, ScoreCalibration, check_golden
from edge.config import EngineConfig
from edge.engines.refine import RefineEngine
from edge.errors import CommandError
from edge.images import write_tiff_float32
from edge.opening import DEFAULT_ENGINE, engine_words, looseness, open_on
from edge.stages.segment import render_map
from edge.types import Decision

SCHEMA_VERSION = 1


class ImageRow(msgspec.Struct, frozen=True):
    """One image's answer: `path` within the data folder, raw `score` (null if it could not be scored), the verdict."""

    path: str
    kind: str
    score: float | None
    decision: str
    reason: str


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of some defective images against all good ones; null where undefined.

    `good` and `defective` count scored images, `inconclusive` those that could not be scored and are in no figure;
    `with_mask` counts defective images whose pixels enter the pixel figures. `intervals` maps a figure's name to its
    95 % interval [low, high]: by bootstrap for areas, exact for rates.
    """

    good: int
    defective: int
    inconclusive: int
    with_mask: int
    image_auroc: float | None
    pixel_auroc: float | None
    au_pro_30: float | None
    au_pro_05: float | None
    false_rejects: int
    escapes: int
    false_reject_rate: float | None
    escape_rate: float | None
    intervals: dict[str, tuple[float, float]]


class Evaluation(Figures, frozen=True, kw_only=True):
    """What `kizu evaluate --json` writes: the whole set's figures, those of each kind, and every image.

    `tiles` counts those that the bundle's coarse graph looked at, `tiles_refined` those of them that were computed
    densely; null without a coarse graph.
    """

    schema_version: int
    bundle: str
    model_id: str
    method: str
    preset: str
    engine: str
    data: str
    data_sha256: str
    threshold: float
    threshold_kind: str
    certified: bool
    warnings: list[str]
    kinds: dict[str, Figures]
    images: list[ImageRow]
    tiles: int | None = None
    tiles_refined: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """A labeled image with its answer, and its ground truth (H, W) where there is one."""

    image: LabeledImage
    answer: Collected
    mask: NDArray[np.bool_] | None = None

    @property
    def scored(self) -> bool:
        """Whether it has a score."""
        return self.answer.verdict.score is not None

    def row(self) -> ImageRow:
        """Its line in the JSON."""
        verdict = self.answer.verdict
        return ImageRow(self.image.name, self.image.kind, verdict.score, verdict.decision.value, verdict.reason.value)


def evaluate_bundle(
    bundle: ModelBundle,
    data: Path,
    *,
    through: EngineConfig = DEFAULT_ENGINE,
    maps: Path | None = None,
    skip_bad: bool = False,
    refine: bool = True,
    camera: str | None = None,
    on_judged: Callable[[Sequence[Judged]], None] = lambda judged: None,
) -> Evaluation:
    """Score the test set in `data` with `bundle` and return every figure; write a map per image into `maps` if given.

    `through` says which engine. Without `refine`, dense everywhere also where the bundle has a coarse graph. `camera`
    is whose pictures these are, where the bundle's calibration tells cameras apart. `on_judged` gets every image with
    its answer, for whoever wants to draw them.

    Raises:
        CommandError: the camera must be named, or is not in the calibration; or `maps` of a bundle that gives one
            number an image.
        DataError: the folder, an image or a mask cannot be used.
        EngineError: the engine failed, or cannot be had (DeviceError: its GPU).
        ParityError: it does not give the bundle's golden answers on this machine.
    """
    bundle = replace(bundle, calibration=calibration_for(bundle, camera))
    if maps is not None and _one_number(bundle):
        raise CommandError(
            f"--maps {maps}: {bundle.path} ({bundle.manifest.method}, {bundle.manifest.preset}) gives one number an "
            "image and no map; leave --maps out, or train a preset that looks at patches of the image"
        )
    images = read_test_set(data)
    digests = [file_sha256(image.path) for image in images]
    judged = []
    asked = msgspec.structs.replace(through, refine=refine)
    opened = open_on(bundle, asked, max_batch=1)
    with opened as engine, progress("evaluate", len(images)) as advance:
        engine.warmup()
        check_golden(bundle, engine, require=True, loose=looseness(asked, engine))
        answers = collect(bundle, engine, [image.path for image in images], skip_bad=skip_bad, advance=advance)
        for image, answer in zip(images, answers, strict=True):
            scored = answer.anomaly_map is not None
            # Here and not after the last image: a wrong mask should not cost the whole pass.
            judged.append(Judged(image, answer, read_mask(image, answer.verdict.frame_size) if scored else None))
            if maps is not None and scored:
                _write_map(maps, judged[-1])
        name = engine_words(asked, engine)
        refined = (engine.tiles, engine.tiles_refined) if isinstance(engine, RefineEngine) else (None, None)
    on_judged(judged)
    good = [digest for digest, image in zip(digests, images, strict=True) if image.is_good]
    digest = data_sha256(zip((image.name for image in images), digests, strict=True))
    found = judge(bundle, judged, engine=name, data=str(data), digest=digest, warnings=_bundle_notes(bundle, good))
    return msgspec.structs.replace(found, tiles=refined[0], tiles_refined=refined[1])


def calibration_for(bundle: ModelBundle, camera: str | None) -> ScoreCalibration:
    """Return what holds for pictures of `camera`, None where cameras are not told apart.

    Raises:
        CommandError: the bundle tells them apart and this one is not named, or not known; or it does not and one is.
    """
    known = bundle.calibration.cameras
    if known and camera not in known:
        raise CommandError(
            f"{bundle.path} is calibrated for the cameras {', '.join(known)}"
            f"{'' if camera is None else f', not for {camera!r}'}; say with --camera whose pictures these are"
        )
    if camera is not None and not known:
        raise CommandError(f"--camera {camera}: {bundle.path} has one calibration for all cameras; leave it out")
    return bundle.calibration if camera is None else bundle.calibration.of(camera)


def judge(
    bundle: ModelBundle, judged: Sequence[Judged], *, engine: str, data: str, digest: str, warnings: Sequence[str] = ()
) -> Evaluation:
    """Compute every figure of `judged`; `digest` is that of the data, `warnings` are put before those found here."""
    pixels = PixelFigures(
        [
            MaskedMap(
                one.answer.anomaly_map, one.answer.verdict.frame_size, one.image.kind, one.image.is_good, one.mask
            )
            for one in judged
            if one.answer.anomaly_map is not None and (one.image.is_good or one.mask is not None)
        ]
    )
    kinds = sorted({one.image.kind for one in judged if not one.image.is_good})
    calibration = bundle.calibration
    whole = _figures(judged, pixels, kinds)
    return Evaluation(
        **{name: getattr(whole, name) for name in Figures.__struct_fields__},
        schema_version=SCHEMA_VERSION,
        bundle=str(bundle.path),
        model_id=bundle.model_id,
        method=bundle.manifest.method,
        preset=bundle.manifest.preset,
        engine=engine,
        data=data,
        data_sha256=digest,
        threshold=calibration.threshold,
        threshold_kind=calibration.kind,
        certified=calibration.certified,
        warnings=[*warnings, *_data_notes(judged)],
        kinds={kind: _figures(judged, pixels, [kind]) for kind in kinds},
        images=[one.row() for one in judged],
    )


def _figures(judged: Sequence[Judged], pixels: PixelFigures, kinds: Sequence[str]) -> Figures:
    chosen = [one for one in judged if one.image.is_good or one.image.kind in kinds]
    scored = [one for one in chosen if one.scored]
    good = [one.answer.verdict for one in scored if one.image.is_good]
    bad = [one.answer.verdict for one in scored if not one.image.is_good]
    values, intervals = pixels.figures(kinds)
    if good and bad:
        good_scores, bad_scores = ([v.score for v in side if v.score is not None] for side in (good, bad))
        values["image_auroc"] = image_auroc(good_scores, bad_scores)
        intervals["image_auroc"] = image_auroc_interval(good_scores, bad_scores)
    false_rejects = sum(verdict.decision is Decision.REJECT for verdict in good)
    escapes = sum(verdict.decision is Decision.ACCEPT for verdict in bad)
    for name, hits, trials in (("false_reject_rate", false_rejects, len(good)), ("escape_rate", escapes, len(bad))):
        if trials:
            values[name] = hits / trials
            intervals[name] = rate_interval(hits, trials)
    return Figures(
        good=len(good),
        defective=len(bad),
        inconclusive=len(chosen) - len(scored),
        with_mask=pixels.count(kinds),
        image_auroc=values.get("image_auroc"),
        pixel_auroc=values.get("pixel_auroc"),
        au_pro_30=values.get("au_pro_30"),
        au_pro_05=values.get("au_pro_05"),
        false_rejects=false_rejects,
        escapes=escapes,
        false_reject_rate=values.get("false_reject_rate"),
        escape_rate=values.get("escape_rate"),
        intervals={name: (ends.low, ends.high) for name, ends in intervals.items()},
    )


def _data_notes(judged: Sequence[Judged]) -> list[str]:
    notes = []
    bad = [one for one in judged if not one.image.is_good]
    if not bad:
        notes.append("no defective image: AUROC, AU-PRO and the escape rate are undefined")
    if len(bad) == len(judged):
        notes.append("no good image: AUROC and the false-reject rate are undefined, pixel figures have no intervals")
    without = sum(one.image.mask_path is None for one in bad)
    if bad and without == len(bad):
        notes.append("no defective image has a mask: pixel AUROC and AU-PRO are undefined")
    elif without:
        notes.append(
            f"{without} of {len(bad)} defective images have no mask and are left out of pixel AUROC and AU-PRO"
        )
    if skipped := sum(not one.scored for one in judged):
        notes.append(f"{skipped} of {len(judged)} images are INCONCLUSIVE and left out of every figure")
    return notes


def _bundle_notes(bundle: ModelBundle, good_digests: Sequence[str]) -> list[str]:
    notes = []
    if not bundle.calibration.certified:
        notes.append(
            f"the threshold of {bundle.path} is provisional: nothing is promised about false rejects; "
            f"certify it with `kizu calibrate {bundle.path} --good DIR --false-rejects RATE --out BUNDLE`"
        )
    if _one_number(bundle):
        notes.append("this bundle gives one number an image and no map: pixel figures only say how it ranks images")
    certificate = bundle.provenance.get("score_calibration")
    for use, known in (
        ("trained on", bundle.provenance.get("training_files")),
        ("used to set the threshold", certificate.get("files") if isinstance(certificate, dict) else None),
    ):
        seen = len(set(known).intersection(good_digests)) if isinstance(known, list) else 0
        if seen:
            notes.append(f"{seen} of the good test images were {use}: the figures flatter the bundle")
    return notes


def _one_number(bundle: ModelBundle) -> bool:
    """Whether its map is a single cell and every picture is judged whole: tiles would make a map of many."""
    manifest = bundle.manifest
    return (manifest.map.height, manifest.map.width) == (1, 1) and manifest.input.fit == "resize"


def _write_map(folder: Path, judged: Judged) -> None:
    answer = judged.answer
    assert answer.anomaly_map is not None  # the caller writes maps of scored images only
    target = (folder / judged.image.name).with_suffix(".tiff")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_tiff_float32(target, render_map(answer.anomaly_map, answer.verdict.frame_size))
