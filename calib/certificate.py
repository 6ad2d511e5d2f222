"""What is promised about false rejects, and on which good parts it stands.

Owns which images may count, and the derived bundle. The statistics are `threshold`, the scores come from `collect`.
The promise is about parts drawn like the sample: several pictures of one part are not several parts, which nobody can
see in the files unless they have the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from calib.collect import collect
from calib.dataset import data_sha256, file_sha256, good_images
from calib.progress import progress
from calib.threshold import FittedThreshold, fit_threshold, require_parts, required_parts
from edge.bundle import ModelBundle, ScoreCalibration, check_golden, derive_bundle
from edge.engines.registry import Backend, open_engine
from edge.errors import DataError
from edge.types import Decision

SCHEMA_VERSION = 1

NAMED = 3
"""Files listed in a refusal; the others are counted."""


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """What `kizu calibrate --json` prints: the promise, what it stands on, and the bundle that makes it.

    `rank` counts from the smallest score; `parts` are the distinct good images used, `duplicates` maps a file left
    out to the one with the same bytes, `skipped` maps a bad file to its problem.
    """

    schema_version: int
    bundle: str
    model_id: str
    source_model_id: str
    engine: str
    false_rejects: float
    confidence: float
    certified_rate: float
    threshold: float
    pixel_threshold: float
    min_area_px: int
    rank: int
    parts: int
    allowed_exceedances: int
    parts_for_a_tenth: int
    previous_threshold: float
    rejected_before: int
    duplicates: dict[str, str]
    skipped: dict[str, str]
    warnings: list[str]


def certify(
    source: ModelBundle,
    good: Path,
    out: Path,
    *,
    false_rejects: float,
    confidence: float,
    min_area_px: int | None = None,
    backend: Backend = "openvino",
    skip_bad: bool = False,
) -> Certificate:
    """Score the images in `good`, fit the threshold and write `source` with it as a new bundle at `out`.

    Raises:
        CalibrationError: too few good parts; says how many are needed, before the engine runs where that can be known.
        DataError: an image was in the training set, or cannot be inspected (without `skip_bad`).
        EngineError, ParityError: the backend failed, or does not give the bundle's golden answers on this machine.
    """
    sample = choose_sample(source, good)
    require_parts(len(sample.paths), false_rejects=false_rejects, confidence=confidence)
    scored = _score(source, sample, backend, skip_bad)
    fitted = fit_threshold(scored.scores, false_rejects=false_rejects, confidence=confidence)
    promise = ScoreCalibration(
        kind="order-statistic",
        certified=True,
        threshold=fitted.threshold,
        pixel_threshold=_pixel_threshold(source, fitted, scored),
        min_area_px=source.calibration.min_area_px if min_area_px is None else min_area_px,
        scores=tuple(sorted(scored.scores)),
        engine=scored.engine,
        data_sha256=data_sha256((path.name, digest) for path, digest in scored.files.items()),
        false_rejects=false_rejects,
        confidence=confidence,
    )
    record = {
        "files": sorted(scored.files.values()),
        "certified_rate": fitted.certified_rate,
        "rank": fitted.rank,
        "duplicates": sample.duplicates,
        "skipped": scored.skipped,
        "warnings": sample.warnings,
    }
    derived = derive_bundle(source, out, calibration=promise, provenance_extra={"score_calibration": record})
    return Certificate(
        schema_version=SCHEMA_VERSION,
        bundle=str(out),
        model_id=derived.model_id,
        source_model_id=source.model_id,
        engine=scored.engine,
        false_rejects=false_rejects,
        confidence=confidence,
        certified_rate=fitted.certified_rate,
        threshold=promise.threshold,
        pixel_threshold=promise.pixel_threshold,
        min_area_px=promise.min_area_px,
        rank=fitted.rank,
        parts=fitted.n,
        allowed_exceedances=fitted.allowed_exceedances,
        parts_for_a_tenth=required_parts(false_rejects=false_rejects / 10, confidence=confidence),
        previous_threshold=source.calibration.threshold,
        rejected_before=scored.rejected_before,
        duplicates=sample.duplicates,
        skipped=scored.skipped,
        warnings=sample.warnings,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Distinct good images, path to file digest; `duplicates` maps a name left out to the name with the same bytes."""

    paths: dict[Path, str]
    duplicates: dict[str, str]
    warnings: list[str]


def choose_sample(source: ModelBundle, good: Path) -> Sample:
    """Return the files of the folder `good` that count: each content once, none that `source` was trained on.

    Raises:
        DataError: the folder is missing or empty, or an image was trained on, held out in training or quantized on.
    """
    first: dict[str, Path] = {}
    duplicates: dict[str, str] = {}
    for path in good_images(good):
        digest = file_sha256(path)
        if digest in first:
            duplicates[path.name] = first[digest].name
        else:
            first[digest] = path
    warnings = []
    quantization = source.provenance.get("quantization")
    known = [source.provenance.get(key) for key in ("training_files", "held_out_files")]
    known.append(quantization.get("files") if isinstance(quantization, dict) else None)
    seen = {digest for digests in known if isinstance(digests, list) for digest in digests}
    _refuse_seen(source, good, [path.name for digest, path in first.items() if digest in seen])
    if not isinstance(known[0], list):
        warnings.append(
            f"{source.path} does not say which images it was trained on (provenance has no `training_files`): "
            "make sure that none of these is among them, or the promise is void"
        )
    if duplicates:
        warnings.append(
            f"{len(duplicates)} files have the same bytes as another and are counted once: one part is one part"
        )
    return Sample({path: digest for digest, path in first.items()}, duplicates, warnings)


def _refuse_seen(source: ModelBundle, good: Path, names: list[str]) -> None:
    if not names:
        return
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    raise DataError(
        f"{good}: {', '.join(names[:NAMED])}{more} of the images that {source.path} was trained or quantized on; "
        "a model scores what it has seen too low to promise anything from it: give images of other good parts"
    )


@dataclass(slots=True, eq=False)
class _Scored:
    """What the engine said about the sample; `peaks` are the maps' largest values."""

    engine: str = ""
    scores: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    files: dict[Path, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    rejected_before: int = 0


def _score(source: ModelBundle, sample: Sample, backend: Backend, skip_bad: bool) -> _Scored:
    paths = list(sample.paths)
    scored = _Scored()
    # Dense everywhere: a score from a coarse look is never higher, so what is promised of these scores holds for the
    # line's, whatever gate follows from the new threshold.
    opened = open_engine(source, backend=backend, max_batch=1, refine=False)
    with opened as engine, progress("calibrate", len(paths)) as advance:
        engine.warmup()
        check_golden(source, engine, require=True)
        scored.engine = f"{engine.spec.name} {engine.spec.version} {engine.spec.device}"
        for answer in collect(source, engine, paths, skip_bad=skip_bad, advance=advance):
            if answer.anomaly_map is None:
                scored.skipped[answer.path.name] = answer.problem
                continue
            scored.scores.append(answer.anomaly_map.score)
            scored.peaks.append(float(answer.anomaly_map.scores.max()))
            scored.files[answer.path] = sample.paths[answer.path]
            scored.rejected_before += answer.verdict.decision is Decision.REJECT
    return scored


def _pixel_threshold(source: ModelBundle, fitted: FittedThreshold, scored: _Scored) -> float:
    # With the maximum as image score, a part is rejected exactly when a pixel exceeds the threshold. Other reductions
    # have no such value; the same order statistic of the maps' peaks gives as few good parts a region.
    if source.manifest.map.reduction == "max":
        return fitted.threshold
    return sorted(scored.peaks)[fitted.rank - 1]
