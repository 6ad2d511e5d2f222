"""A bundle in eight bits: quantized on good frames, its threshold fitted again, accepted only if verdicts agree.

Owns the order of the steps, the refitted threshold and the refusal. The graph is `int8`'s, the figures `agreement`'s.

Frames that the model was trained on serve for the activations' ranges only: they score too low for a threshold. What is
promised about false rejects is lost with the old graph: the new threshold is provisional; `kizu calibrate` certifies
it through the quantized graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from calib.agreement import Agreement, Compared, Limits, complaints, table
from calib.collect import collect
from calib.dataset import data_sha256, file_sha256, good_images, read_test_set
from calib.int8 import Activations, Layer, Quantized, chosen_layers, find_ranges, observe, quantize_graph
from calib.progress import progress
from calib.ranges import Finder, QuantizedPrecision
from calib.threshold import fit_threshold, required_parts
from edge.bundle import Golden, ModelBundle, ScoreCalibration, Tolerance, check_golden, derive_bundle
from edge.config import EngineConfig
from edge.engines.registry import Backend, open_engine
from edge.errors import CalibrationError, CommandError, DataError, ParityError
from edge.graph import quantized_types
from edge.opening import DEFAULT_ENGINE, engine_words, looseness, open_on

SCHEMA_VERSION = 1
REFERENCE: Backend = "onnxruntime"
PARITY: dict[QuantizedPrecision, tuple[Backend, ...]] = {"int8": ("onnxruntime", "openvino"), "fp8": ("onnxruntime",)}
"""Backends that must agree. OpenVINO 2026.4 runs fp8 slower than fp32 on a CPU and with another rounding."""
PARITY_SHARE = 0.1
"""How far backends may be apart, in standard deviations of the golden maps: where a float32 sum lies halfway between
two levels, another order of additions rounds it the other way, and the next layers carry that on. 0.054 was seen (demo
bundle, int8, ONNX Runtime against OpenVINO)."""
DEFAULT_LIMITS = Limits(min_agreement=0.95, max_auroc_drop=0.01)
LEAST_GOOD = 6
"""Good frames that a provisional threshold needs, as in training."""
MARGIN_SHARE = 0.1
"""Of the distance from median to largest good score, for a source whose own margin says nothing."""
NAMED_LAYERS = 3
MOVED_SHARE = 0.1
"""Of the source's threshold: a larger change by the choice of good images alone is pointed out."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. At most `frames` good frames give the ranges; `keep` are layers that stay float32.

    `bad` is a folder of bad parts, `data` a test set with both; at most one of them. `engine` is what compares the two;
    TensorRT runs the source in fp32.
    """

    precision: QuantizedPrecision
    finder: Finder = "mse"
    keep: tuple[str, ...] = ()
    frames: int = 32
    weight_bits: int = 8
    engine: EngineConfig = DEFAULT_ENGINE
    limits: Limits = DEFAULT_LIMITS
    bad: Path | None = None
    data: Path | None = None


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """What `kizu quantize --json` prints, and what the bundle's provenance keeps as `quantization`.

    `files` are the digests of the good images that ranges or threshold stand on: `kizu calibrate` refuses them.
    `ranges` is T by layer; `parity_max_abs` the largest distance of each backend from the reference's golden maps.
    """

    schema_version: int
    source_model_id: str
    precision: str
    finder: str
    weight_bits: int
    ranges: dict[str, float]
    kept: list[str]
    files: list[str]
    range_frames: int
    threshold_frames: int
    threshold_rule: str
    source_threshold: float
    engine: str
    parity_max_abs: dict[str, float]
    agreement: Agreement
    limits: Limits
    warnings: list[str]


def quantize_bundle(source: ModelBundle, good: Path, out: Path, request: Request) -> tuple[ModelBundle, Quantization]:
    """Write `source` in eight bits at `out`, if what it then says agrees with what it said.

    Raises:
        CommandError: the bundle cannot be quantized, or a layer to keep is unknown.
        DataError, CalibrationError: frames cannot be used, are too few, or verdicts do not agree within the
            limits; then names the layers that hurt most.
        ParityError: two backends disagree about the quantized graph.
        EngineError: onnx or a backend is missing, or fails.
    """
    _require_quantizable(source)
    layers = chosen_layers(source.model, request.precision, request.keep)
    sample = _sample(source, good)
    with open_engine(source, backend=REFERENCE, streams=1, max_batch=1, refine=False) as reference:
        check_golden(source, reference, require=True)
    frames = _spread([*sample.trained, *sample.unseen], request.frames)
    with progress("activations", len(frames)) as advance:
        seen = observe(source, layers, frames, advance)
    ranges = find_ranges(layers, seen, request.finder, request.precision)
    quantized = quantize_graph(source.model, layers, ranges, request.precision, seen.means, request.weight_bits)
    draft = draft_bundle(source, quantized)
    parity = require_parity(draft, request.precision)
    compared, engine_name = compare(source, draft, sample, request)
    facts = engine_name, sample.digest(), source.manifest.map.reduction
    calibration, rule = refit(source.calibration, compared, *facts)
    # The same rule on the same frames before quantization: another sample moves the threshold by itself, and that is no
    # fault of the eight bits.
    unquantized, _ = refit(source.calibration, compared.unquantized(), *facts)
    found = compared.agreement(unquantized.threshold, calibration.threshold)
    if wrong := complaints(found, request.limits):
        raise CalibrationError(_refusal(source, request, wrong, layer_errors(source, layers, ranges, seen, request)))
    record = Quantization(
        schema_version=SCHEMA_VERSION,
        source_model_id=source.model_id,
        precision=request.precision,
        finder=request.finder,
        weight_bits=request.weight_bits,
        ranges=quantized.ranges,
        kept=list(request.keep),
        files=sorted({**sample.trained, **sample.unseen}.values()),
        range_frames=len(frames),
        threshold_frames=len(sample.unseen),
        threshold_rule=rule,
        engine=engine_name,
        parity_max_abs=parity,
        agreement=found,
        limits=request.limits,
        source_threshold=source.calibration.threshold,
        warnings=_warnings(source, sample, found),
    )
    written = derive_bundle(
        source,
        out,
        calibration=calibration,
        provenance_extra={"quantization": msgspec.to_builtins(record), "score_calibration": None},
        model=draft.model,
        golden=draft.golden,
        tolerance=draft.manifest.tolerance,
        report_extra={"quantization.txt": (table(found, request.precision) + "\n").encode()},
    )
    return written, record


def draft_bundle(source: ModelBundle, quantized: Quantized) -> ModelBundle:
    """`source` with the quantized graph and the reference engine's answers to the golden frames; not on disk."""
    draft = replace(source, model=quantized.model)
    with open_engine(draft, backend=REFERENCE, streams=1, max_batch=1, refine=False) as engine:
        answers = [engine.infer(source.golden.frames[place : place + 1]) for place in range(len(source.golden.frames))]
    maps, scores = (np.concatenate(one) for one in zip(*answers, strict=True))
    absolute = max(source.manifest.tolerance.absolute, PARITY_SHARE * float(maps.std()))
    tolerance = Tolerance(absolute=absolute, relative=source.manifest.tolerance.relative)
    manifest = msgspec.structs.replace(source.manifest, tolerance=tolerance)
    return replace(draft, manifest=manifest, golden=Golden(source.golden.frames, maps, scores))


def require_parity(draft: ModelBundle, precision: QuantizedPrecision) -> dict[str, float]:
    """Largest difference of each backend from the reference on the golden frames.

    Raises:
        ParityError: beyond the draft's tolerance.
    """
    gaps = {}
    for backend in PARITY[precision]:
        with open_engine(draft, backend=backend, streams=1, max_batch=1, refine=False) as engine:
            check = check_golden(draft, engine)
        if not check.ok:
            raise ParityError(
                f"{backend} is up to {check.max_abs:.3g} from {REFERENCE} on the quantized golden frames, "
                f"{check.max_rel_of_tolerance:.3g} times the tolerance; nothing was written; on x86 without VNNI "
                "use --weight-bits 7; else keep the deepest network in float32 (in preset trio, ResNet-18 is --keep "
                "'/scales.2/teacher/*'), try another range finder (--ranges) or another version of that backend"
            )
        gaps[str(backend)] = check.max_abs
    return gaps


def compare(source: ModelBundle, draft: ModelBundle, sample: Sample, request: Request) -> tuple[Compared, str]:
    """Both models on the unseen good frames and the labeled ones, each frame through both engines in turn."""
    labeled = [(path, False) for path in sample.unseen] + _labeled(request, sample)
    paths = [path for path, _ in labeled]
    compared = Compared()
    whole = msgspec.structs.replace(request.engine, refine=False, precision="fp32")
    rounded = msgspec.structs.replace(whole, precision=request.precision)
    with (
        open_on(source, whole, max_batch=1) as before,
        open_on(draft, rounded, max_batch=1) as after,
        progress("compare", len(paths)) as advance,
    ):
        before.warmup()
        after.warmup()
        check_golden(source, before, require=True, loose=looseness(whole, before))
        check_golden(draft, after, require=True, loose=looseness(rounded, after))
        answers = zip(collect(source, before, paths, advance=advance), collect(draft, after, paths), strict=True)
        for (path, bad), (one, other) in zip(labeled, answers, strict=True):
            assert one.anomaly_map is not None and other.anomaly_map is not None  # bad files are refused, not skipped
            scores = one.anomaly_map.score, other.anomaly_map.score
            compared.add(
                f"{path.parent.name}/{path.name}", bad, scores, (one.anomaly_map.scores, other.anomaly_map.scores)
            )
        return compared, engine_words(rounded, after)


def refit(
    before: ScoreCalibration, compared: Compared, engine: str, digest: str, reduction: str
) -> tuple[ScoreCalibration, str]:
    """The threshold by the source's own rule on the quantized scores of the unseen good frames, and the rule in words.

    A certified source's order statistic where there are enough frames for it. The result certifies nothing either way:
    ranges and threshold come from the same frames.
    """
    chosen = [place for place, bad in enumerate(compared.bad) if not bad][: len(compared.good_after())]
    scores = [compared.after[place] for place in chosen]
    margin, rank = 0.0, len(scores)
    if _order_statistic_possible(before, len(scores)):
        assert before.false_rejects is not None and before.confidence is not None
        fitted = fit_threshold(scores, false_rejects=before.false_rejects, confidence=before.confidence)
        threshold, rank = fitted.threshold, fitted.rank
        rule = f"number {rank} of {len(scores)} scores, ascending, as the source's certificate would have it"
    else:
        share = margin_share(before)
        margin = share * (max(scores) - float(np.median(scores)))
        threshold = max(scores) + margin
        rule = f"largest of {len(scores)} good scores and {share:.3g} of its distance to their median"
    peaks = sorted(compared.peaks[place] for place in chosen)
    return ScoreCalibration(
        kind="provisional",
        certified=False,
        threshold=threshold,
        # With the maximum as image score the two are one; else the same rank of the maps' peaks.
        pixel_threshold=threshold if reduction == "max" else peaks[rank - 1] + margin,
        min_area_px=before.min_area_px,
        scores=tuple(sorted(scores)),
        engine=engine,
        data_sha256=digest,
        statistics_shared=before.statistics_shared,
        margin=margin,
        roi_xywh=before.roi_xywh,
        flat_field=before.flat_field,
        zones=before.zones,
    ), rule


def margin_share(before: ScoreCalibration) -> float:
    """The share of the distance from median to largest score that the source's provisional threshold lies above it."""
    scores = before.scores
    spread = scores[-1] - float(np.median(scores)) if scores else 0.0
    if before.kind != "provisional" or spread <= 0:
        return MARGIN_SHARE
    return max(0.0, (before.threshold - scores[-1]) / spread)


def layer_errors(
    source: ModelBundle, layers: Sequence[Layer], ranges: dict[str, float], seen: Activations, request: Request
) -> dict[str, float]:
    """Map error on a golden frame with one layer quantized at a time, by layer, largest first."""
    frame, expected = source.golden.frames[:1], source.golden.maps[0]
    errors = {}
    for layer in layers:
        alone = quantize_graph(source.model, [layer], ranges, request.precision, seen.means, request.weight_bits)
        draft = replace(source, model=alone.model)
        with open_engine(draft, backend=REFERENCE, streams=1, max_batch=1, refine=False) as engine:
            maps, scores = engine.infer(frame)
        compared = Compared()
        compared.add(layer.name, False, (float(source.golden.scores[0]), float(scores[0])), (expected, maps[0]))
        errors[layer.name] = compared.map_error
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Distinct good frames by path with their digest: those that were trained on, and the others."""

    trained: dict[Path, str]
    unseen: dict[Path, str]

    def digest(self) -> str:
        """Of the frames behind the threshold."""
        return data_sha256((path.name, digest) for path, digest in self.unseen.items())


def _sample(source: ModelBundle, good: Path) -> Sample:
    """Held-out images of training may set the threshold again: it is the same rule on the same images."""
    known = source.provenance.get("training_files")
    trained_on = set(known) if isinstance(known, list) else set()
    first: dict[str, Path] = {}
    for path in good_images(good):
        first.setdefault(file_sha256(path), path)
    sides: tuple[dict[Path, str], dict[Path, str]] = ({}, {})
    for digest, path in first.items():
        sides[digest not in trained_on][path] = digest
    if len(sides[1]) < LEAST_GOOD:
        raise CalibrationError(
            f"{good}: {len(sides[1])} images that the model was not trained on ({len(sides[0])} that it was); the "
            f"threshold needs at least {LEAST_GOOD}: add images of other good parts, or those held out in training"
        )
    return Sample(*sides)


def _labeled(request: Request, sample: Sample) -> list[tuple[Path, bool]]:
    if request.data is not None and request.bad is not None:
        raise CommandError("--data and --bad: give one of them; --data is a test set that holds bad parts already")
    if request.data is not None:
        known = set(sample.unseen.values()) | set(sample.trained.values())
        images = read_test_set(request.data)
        return [
            (image.path, not image.is_good)
            for image in images
            if not image.is_good or file_sha256(image.path) not in known
        ]
    if request.bad is not None:
        if not request.bad.is_dir() or not any(request.bad.iterdir()):
            raise DataError(f"--bad {request.bad}: no folder with images of bad parts")
        return [(path, True) for path in sorted(request.bad.iterdir())]
    return []


def _require_quantizable(source: ModelBundle) -> None:
    if source.coarse is not None:
        raise CommandError(
            f"{source.path} looks with coarse.onnx first, and its margin was fitted on that graph in float32; "
            "quantize a bundle that was trained without --refine"
        )
    if source.calibration.cameras:
        raise CommandError(
            f"{source.path} is certified for the cameras {', '.join(source.calibration.cameras)}, and a folder of "
            "images does not say which one took them; quantize the bundle that it was derived from, then run "
            "`kizu calibrate`"
        )
    if types := quantized_types(source.model):
        raise CommandError(f"{source.path} is {types[0]} already; quantize the bundle that it was derived from")


def _order_statistic_possible(before: ScoreCalibration, parts: int) -> bool:
    if before.kind != "order-statistic" or before.false_rejects is None or before.confidence is None:
        return False
    if before.unit != "image":  # the images here are not grouped into parts
        return False
    return parts >= required_parts(false_rejects=before.false_rejects, confidence=before.confidence)


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of `paths`, evenly over all."""
    if len(paths) <= count:
        return list(paths)
    return [paths[round(place)] for place in np.linspace(0, len(paths) - 1, count)]


def _warnings(source: ModelBundle, sample: Sample, found: Agreement) -> list[str]:
    notes = []
    if source.calibration.certified:
        notes.append(
            "the source's certificate does not hold for the quantized graph; certify the new threshold with "
            "`kizu calibrate`"
        )
    if not isinstance(source.provenance.get("training_files"), list):
        notes.append(
            f"{source.path} does not say which images it was trained on: make sure that they are not among these, or "
            "the threshold is too low"
        )
    known = source.calibration.threshold
    if abs(found.threshold_before - known) > MOVED_SHARE * abs(known):
        notes.append(
            f"these good images move the threshold by themselves: {source.path} has {known:.6g}, its own rule gives "
            f"{found.threshold_before:.6g} on these in float32; look at the highest-scoring ones first"
        )
    if not found.bad:
        notes.append("no bad frames were given: that defects are still found was not checked (--data or --bad)")
    return notes


def _refusal(source: ModelBundle, request: Request, wrong: Sequence[str], errors: dict[str, float]) -> str:
    worst = list(errors.items())[:NAMED_LAYERS]
    listed = "\n".join(f"  {name}: {100 * error:.3g}%" for name, error in worst)
    others = " or ".join(name for name in ("percentile", "entropy", "mse") if name != request.finder)
    return (
        f"{source.path} in {request.precision} was refused, nothing was written: {'; '.join(wrong)}\n"
        f"map error with one layer quantized alone, the largest:\n{listed}\n"
        f"try --ranges {others}, leave a layer out with --keep '{worst[0][0]}', or give more good frames (--frames)"
    )
