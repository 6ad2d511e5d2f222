"""What is promised about false rejects, and on which good parts it stands.

Owns the order of the work and the derived bundle. Which images count is `sample`, whose part they show `parts`, the
statistics are `threshold`, the scores come from `scoring`. A part's score is the highest of its frames: the promise is
about parts drawn like the sample, and a good part is rejected if any of its frames is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from calib.dataset import data_sha256
from calib.labels import open_labels, with_labels
from calib.parts import PartImage
from calib.progress import Advance, progress
from calib.promise import SCHEMA_VERSION, Certificate, Fit, promise_of, record_of, summary
from calib.request import MinArea, Request, flat_fields_of, notes_of, regions_of, require_cameras
from calib.sample import Sample, choose_bad, choose_sample, require_all_rows
from calib.scoring import Scored, score_parts
from calib.threshold import fit_threshold, require_parts, required_parts
from calib.zoning import fit_zones, require_zone_parts
from edge.bundle import (
    CameraThresholds,
    ModelBundle,
    ScoreCalibration,
    Zone,
    check_golden,
    derive_bundle,
)
from edge.config import EngineConfig
from edge.errors import CalibrationError
from edge.opening import DEFAULT_ENGINE, engine_words, looseness, open_on


@dataclass(frozen=True, slots=True, eq=False)
class Certified:
    """A certificate, the bundle that makes its promise, and by camera what the engine said of good and bad parts."""

    certificate: Certificate
    bundle: ModelBundle
    scored: dict[str, Scored]
    bad: dict[str, Scored]


def certify(
    source: ModelBundle,
    good: Path,
    out: Path,
    *,
    false_rejects: float,
    confidence: float,
    min_area_px: MinArea = None,
    engine: EngineConfig = DEFAULT_ENGINE,
    skip_bad: bool = False,
) -> Certificate:
    """Score the images in `good`, each another part, fit the threshold, write `source` with it as a bundle at `out`.

    Raises:
        CalibrationError, DataError, EngineError, ParityError: as `certify_parts`.
    """
    request = Request(
        false_rejects=false_rejects,
        confidence=confidence,
        min_area_px=min_area_px,
        engine=engine,
        skip_bad=skip_bad,
    )
    return certify_parts(source, good, out, request).certificate


def certify_parts(source: ModelBundle, good: Path, out: Path, request: Request) -> Certified:
    """Score the good parts in `good`, fit the thresholds and write `source` with them as a new bundle at `out`.

    Raises:
        CalibrationError: too few good parts; says how many are needed, before the engine runs where that can be known.
            Or all parts score the same.
        CommandError: zones or a line name other cameras than the pictures do.
        DataError: an image was in the training set, or cannot be inspected (without `skip_bad`).
        EngineError, ParityError: the engine failed, cannot be had (DeviceError: its GPU), or does not give the bundle's
            golden answers on this machine.
    """
    sample = choose_sample(source, good, request.grouping)
    if request.labels is not None:
        sample = with_labels(source, sample, open_labels(request.labels), request.grouping)
    bad = {} if request.bad is None else choose_bad(source, request.bad, sample, request.grouping)
    require_all_rows(request.grouping, [*sample.images, *bad])
    require_cameras(request, sample, bad)
    for camera in sample.cameras():
        _require_enough(request, camera, len({image.part for image in sample.of_camera(camera)}))
    draft = _draft(source, request, sample)
    engine_name, scored, wrong = _score(draft, sample, bad, request)
    fits = {camera: _fit(source, camera, scored[camera], request) for camera in scored}
    digest = data_sha256((image.name, digest) for one in scored.values() for image, digest in one.files.items())
    calibration = _calibration(source, draft, fits, request, engine_name, digest)
    promises = {
        camera: promise_of(source, fits[camera], scored[camera], wrong.get(camera), request.confidence)
        for camera in fits
    }
    whole = summary(promises)
    certificate = Certificate(
        **whole,
        schema_version=SCHEMA_VERSION,
        bundle=str(out),
        model_id="",
        source_model_id=source.model_id,
        engine=engine_name,
        data_sha256=digest,
        false_rejects=request.false_rejects,
        confidence=request.confidence,
        unit=request.grouping.unit,
        grouping=request.grouping.words,
        parts_for_a_tenth=required_parts(false_rejects=request.false_rejects / 10, confidence=request.confidence),
        duplicates=sample.duplicates,
        skipped={name: why for one in [*scored.values(), *wrong.values()] for name, why in one.skipped.items()},
        left_out=[part for one in scored.values() for part in one.left_out],
        spacing=len(sample.spacing),
        warnings=[*sample.warnings, *notes_of(request, whole["suspects"], scored)],
        cameras=promises if list(promises) != [""] else {},
    )
    record = record_of(certificate, scored, bad)
    derived = derive_bundle(source, out, calibration=calibration, provenance_extra={"score_calibration": record})
    return Certified(msgspec.structs.replace(certificate, model_id=derived.model_id), derived, scored, wrong)


def _require_enough(request: Request, camera: str, parts: int) -> None:
    asked = {"false_rejects": request.false_rejects, "confidence": request.confidence}
    try:
        if zones := len(request.zones.get(camera, ())):
            require_zone_parts(parts, zones, **asked)
        else:
            require_parts(parts, **asked)
    except CalibrationError as error:
        unit = "" if request.grouping.unit == "image" else f" (a part is {request.grouping.words})"
        raise CalibrationError(f"{f'camera {camera}: ' if camera else ''}{error}{unit}") from None


def _draft(source: ModelBundle, request: Request, sample: Sample) -> ModelBundle:
    """The source with the regions asked for, and zones that have no thresholds of their own yet; not on disk."""
    regions = regions_of(request, sample)
    flat_fields = flat_fields_of(request, sample)
    plain = msgspec.structs.replace(source.calibration, roi_xywh=None, zones=(), cameras={}, flat_field=None)
    table = {
        camera: CameraThresholds(
            threshold=plain.threshold,
            pixel_threshold=plain.pixel_threshold,
            min_area_px=plain.min_area_px,
            scores=plain.scores,
            roi_xywh=regions[camera],
            flat_field=flat_fields[camera],
            zones=tuple(msgspec.structs.replace(zone, offset=0.0) for zone in request.zones.get(camera, ())),
        )
        for camera in sample.cameras()
    }
    return replace(source, calibration=msgspec.structs.replace(plain, cameras=table))


def _score(
    draft: ModelBundle, sample: Sample, bad: dict[PartImage, str], request: Request
) -> tuple[str, dict[str, Scored], dict[str, Scored]]:
    """The engine's name, and by camera what it said of good and of bad parts; a bad part's camera must be known."""
    cameras = sample.cameras()
    scored: dict[str, Scored] = {}
    wrong: dict[str, Scored] = {}
    total = len(sample.images) + len(bad)
    # Dense everywhere: a score from a coarse look is never higher, so what is promised of these scores holds for the
    # line's, whatever gate follows from the new threshold.
    asked = msgspec.structs.replace(request.engine, refine=False)
    opened = open_on(draft, asked, max_batch=1)
    with opened as engine, progress("calibrate", total) as advance:
        engine.warmup()
        check_golden(draft, engine, require=True, loose=looseness(asked, engine))
        done = 0
        for camera in cameras:
            for into, images in (
                (scored, {image: sample.images[image] for image in sample.of_camera(camera)}),
                (wrong, {image: digest for image, digest in bad.items() if image.camera in (camera, "")}),
            ):
                if into is wrong and not images:
                    continue
                into[camera] = score_parts(
                    draft,
                    engine,
                    images,
                    camera,
                    skip_bad=request.skip_bad,
                    areas=request.min_area_px == "certify",
                    lowest=into is wrong,
                    advance=_after(advance, done, total),
                )
                done += len(images)
        return engine_words(asked, engine), scored, wrong


def _after(advance: Advance, done: int, total: int) -> Advance:
    return lambda count: advance(min(total, done + count))


def _fit(source: ModelBundle, camera: str, scored: Scored, request: Request) -> Fit:
    asked = {"false_rejects": request.false_rejects, "confidence": request.confidence}
    _require_enough(request, camera, len(scored.scores))
    _require_differences(source, camera, scored)
    zones = tuple(request.zones.get(camera, ()))
    if zones:
        zones = _sized(camera, zones, scored)
        fitted, zones, scores = fit_zones(scored, zones, **asked)
    else:
        scores = list(scored.scores.values())
        fitted = fit_threshold(scores, **asked)
    pixel_threshold = fitted.threshold
    min_area_px = source.calibration.min_area_px if request.min_area_px is None else request.min_area_px
    # With the maximum as image score, a part is rejected exactly when a pixel exceeds the threshold. Other reductions
    # have no such value; the same order statistic of the maps' peaks gives as few good parts a region.
    if source.manifest.map.reduction != "max":
        pixel_threshold = sorted(scored.peaks.values())[fitted.rank - 1]
    if min_area_px == "certify":
        # The source's pixel threshold was set before this sample was seen, so a part's largest region above it is a
        # score like any other, and the next larger area is exceeded as rarely as the threshold.
        pixel_threshold = source.calibration.pixel_threshold
        min_area_px = 1 + round(sorted(scored.areas.values())[fitted.rank - 1])
    return Fit(fitted, tuple(sorted(scores)), pixel_threshold, min_area_px, zones)


def _sized(camera: str, zones: tuple[Zone, ...], scored: Scored) -> tuple[Zone, ...]:
    """The zones, for frames of the sample's size: in a frame of another one they would lie elsewhere."""
    if len(scored.sizes) > 1:
        sizes = ", ".join(f"{width} x {height}" for height, width in sorted(scored.sizes)[:3])
        raise CalibrationError(
            f"{f'camera {camera}: ' if camera else ''}pictures of {len(scored.sizes)} sizes ({sizes} px), but zones "
            "are drawn in frame pixels; give pictures of one size"
        )
    (size,) = scored.sizes
    return tuple(msgspec.structs.replace(zone, frame_size=size) for zone in zones)


def _require_differences(source: ModelBundle, camera: str, scored: Scored) -> None:
    found = set(scored.scores.values())
    if len(found) == 1 and len(scored.scores) > 1:
        raise CalibrationError(
            f"{f'camera {camera}: ' if camera else ''}all {len(scored.scores)} good parts score {found.pop():.6g}: the "
            f"model does not see them (a covered lens, a region without parts, a broken graph), so nothing can be "
            f"promised; look at the pictures and run `kizu verify {source.path}`"
        )


def _calibration(
    source: ModelBundle, draft: ModelBundle, fits: dict[str, Fit], request: Request, engine: str, digest: str
) -> ScoreCalibration:
    table = {
        camera: CameraThresholds(
            threshold=fit.fitted.threshold,
            pixel_threshold=fit.pixel_threshold,
            min_area_px=fit.min_area_px,
            scores=fit.scores,
            roi_xywh=draft.calibration.cameras[camera].roi_xywh,
            flat_field=draft.calibration.cameras[camera].flat_field,
            zones=fit.zones,
        )
        for camera, fit in fits.items()
    }
    alone = table[""] if list(table) == [""] else None
    return ScoreCalibration(
        kind="order-statistic",
        certified=True,
        # For a camera that is not in the table nothing is promised; it gets the most lenient thresholds.
        threshold=max(one.threshold for one in table.values()),
        pixel_threshold=max(one.pixel_threshold for one in table.values()),
        min_area_px=max(one.min_area_px for one in table.values()),
        scores=alone.scores if alone else (),
        engine=engine,
        data_sha256=digest,
        false_rejects=request.false_rejects,
        confidence=request.confidence,
        model_sha256=source.manifest.files["model.onnx"].sha256,
        unit=request.grouping.unit,
        block=(request.grouping.block, request.grouping.gap) if request.grouping.unit == "block" else None,
        roi_xywh=alone.roi_xywh if alone else None,
        flat_field=alone.flat_field if alone else None,
        zones=alone.zones if alone else (),
        cameras={} if alone else table,
    )
