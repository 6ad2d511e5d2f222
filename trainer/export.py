"""torch -> ONNX under the graph contract -> bundle, with parity on real images or nothing at all.

Owns the conversion, the parity gate and the provisional threshold.  Leaves what the graph computes to the method, the
margin of a coarse graph to ``refine`` and the bundle's form to ``edge.bundle``.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from calib.collect import collect
from edge.bundle import (
    SCHEMA_VERSION,
    Golden,
    InputSpec,
    Manifest,
    ModelBundle,
    ScoreCalibration,
    Tolerance,
    check_golden,
    coarse_bundle,
    write_bundle,
)
from edge.engines.registry import Backend, open_engine
from edge.errors import ParityError, TrainingError
from edge.graph import require_buildable
from trainer.method import Frames, Method
from trainer.refine import RefineRequest, coarse_geometry, fit_refine, unfitted

OPSET = 17
GOLDEN_FRAMES = 4
MAX_BATCH = 16
"""N_max of the graph contract: what the bundle admits; the graph itself takes any N."""

MARGIN_SHARE = 0.1
"""Provisional margin: this share of the distance from the median held-out good score to the largest one.

It widens with the spread of the scores themselves, so it needs no unit.  It promises nothing: only `kizu calibrate`
does.
"""

TOLERANCE = Tolerance(absolute=1e-3, relative=1e-3)
"""Map values are in deviations of good pixels (about 1 in size)."""

PARITY_BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")
SCORING_BACKEND: Backend = "openvino"
"""The provisional threshold comes from the engine that the daemon runs by default, not from torch."""


@dataclass(frozen=True, slots=True, eq=False)
class BundleFacts:
    """What the bundle says beyond the model: names, input, and where everything came from.

    ``calibration_sha256`` is the digest of the held-out images behind the threshold; ``statistics_shared`` says that
    they also normalized the map.
    """

    name: str
    method: str
    preset: str
    input: InputSpec
    calibration_sha256: str
    statistics_shared: bool
    provenance: Mapping[str, Any]


def export_bundle(
    method: Method,
    path: Path,
    facts: BundleFacts,
    *,
    held_out: Frames,
    whole_images: Sequence[Path] | None = None,
    refine: RefineRequest | None = None,
    report: Callable[[ModelBundle], Mapping[str, bytes]] = lambda draft: {},
) -> ModelBundle:
    """Write the trained ``method`` as a bundle with a provisional threshold from ``held_out`` (n, h, w, C) uint8.

    With ``fit`` "tile" those are crops, and the threshold comes from the ``whole_images`` that they were cut from.
    With ``refine`` the bundle gets a coarse graph too, and its margin from ``held_out``. ``report`` makes the files
    below report/ of the bundle as it will be.

    Raises:
        CommandError, CalibrationError: the method cannot do what ``refine`` asks, or there are too few held-out tiles.
        ParityError: ONNX Runtime or OpenVINO disagrees with torch on the golden frames; nothing is written.
        EngineError: a backend is missing or refuses the graph; nothing is written.
        BundleError: ``path`` exists, or the method's maps cannot be put together from tiles.
        TrainingError: a held-out image scores NaN or infinite.
    """
    deployed = method.deployed(facts.input.channels).eval()
    geometry = method.map_geometry(facts.input.height, facts.input.width)
    looked, coarse = None, None
    if refine is not None:
        looked = unfitted(coarse_geometry(method, facts.input, refine), refine)
        coarse = to_onnx(method.deployed(facts.input.channels, stride=refine.stride_px).eval(), facts.input)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=facts.name,
        method=facts.method,
        preset=facts.preset,
        input=facts.input,
        map=geometry,
        tolerance=TOLERANCE,
        created_ns=0,
        files={},
        refine=looked,
    )
    draft = ModelBundle(
        path=path,
        model_id="not written yet",
        manifest=manifest,
        model=to_onnx(deployed, facts.input),
        golden=golden_answers(deployed, held_out[:GOLDEN_FRAMES]),
        calibration=provisional_calibration(np.zeros(1, np.float32), facts, engine="none"),
        provenance={},
        coarse=coarse,
    )
    parity = require_parity(draft)
    coarse_parity = {} if coarse is None else require_parity(coarse_bundle(draft))
    judged = engine_scores(draft, held_out) if whole_images is None else image_scores(draft, whole_images)
    scores, peaks, engine = judged
    # With the maximum as image score both thresholds cut at the same value; for other reductions the map needs its own.
    calibration = provisional_calibration(
        scores, facts, engine=engine, peaks=None if geometry.reduction == "max" else peaks
    )
    provenance = {**facts.provenance, "parity_max_abs": parity}
    if refine is not None:
        fitted = fit_refine(draft, held_out, refine, backend=SCORING_BACKEND)
        looked = fitted.refine
        provenance["refine"] = {"parity_max_abs": coarse_parity, **fitted.facts(calibration)}
    return write_bundle(
        path,
        name=facts.name,
        method=facts.method,
        preset=facts.preset,
        input=facts.input,
        map=geometry,
        tolerance=TOLERANCE,
        model=draft.model,
        golden=draft.golden,
        calibration=calibration,
        provenance=provenance,
        report=report(replace(draft, calibration=calibration, provenance=provenance)),
        coarse=coarse,
        refine=looked,
    )


def to_onnx(deployed: nn.Module, spec: InputSpec) -> bytes:
    """The module as ONNX: input ``frames`` (N, h, w, C) uint8, outputs ``anomaly_map`` and ``image_score``, N dynamic.

    torch's tracing exporter is used: the newer one needs the package onnxscript and gives these small graphs nothing.

    Raises:
        EngineError: TensorRT would refuse a node; names it and what to write instead.
    """
    example = torch.zeros((2, spec.height, spec.width, spec.channels), dtype=torch.uint8)
    names = ["frames", "anomaly_map", "image_score"]
    with warnings.catch_warnings(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        warnings.simplefilter("ignore")  # it announces its own deprecation on every call
        torch.onnx.export(
            deployed,
            (example,),
            file,
            input_names=names[:1],
            output_names=names[1:],
            dynamic_axes={name: {0: "N"} for name in names},
            opset_version=OPSET,
            dynamo=False,
        )
        model = onnx.load(file)
    model.producer_name, model.producer_version = "kizu", ""  # the torch version is in the provenance
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    # Here, so that no method can drift away from what a GPU's line can run.
    require_buildable(data, "the exported graph")
    return data


@torch.no_grad()
def golden_answers(deployed: nn.Module, frames: Frames) -> Golden:
    """``frames`` (K, h, w, C) with torch's own maps and scores, computed one by one in float32."""
    answers = [deployed(torch.from_numpy(frame[None].copy())) for frame in frames]
    maps = np.concatenate([m.numpy() for m, _ in answers]).astype(np.float32)
    scores = np.concatenate([s.numpy() for _, s in answers]).astype(np.float32)
    return Golden(np.ascontiguousarray(frames), maps, scores)


def require_parity(draft: ModelBundle) -> dict[str, float]:
    """Largest difference from torch by backend, over the golden frames' maps and scores, by the draft's own graph.

    Raises:
        ParityError: a backend is farther away than the tolerance.
    """
    gaps: dict[str, float] = {}
    for backend in PARITY_BACKENDS:
        with open_engine(draft, backend=backend, streams=1, max_batch=1, refine=False) as engine:
            check = check_golden(draft, engine)
        if not check.ok:
            raise ParityError(
                f"{backend} is up to {check.max_abs:.3g} away from torch on {check.frames} golden frames, "
                f"{check.max_rel_of_tolerance:.3g} times the tolerance ({TOLERANCE.absolute:g} absolute + "
                f"{TOLERANCE.relative:g} relative); {draft.path} was not written. The training is kept: "
                "try another version of that backend or of torch, then add --resume"
            )
        gaps[backend] = check.max_abs
    return gaps


Judged = tuple[NDArray[np.float32], NDArray[np.float32], str]
"""Image scores (n,), the largest value of each map (n,), and what computed them."""


def engine_scores(draft: ModelBundle, frames: Frames) -> Judged:
    """``frames`` through the exported graph.

    Raises:
        TrainingError: a score is not finite.
    """
    with open_engine(draft, backend=SCORING_BACKEND, streams=1, max_batch=1, refine=False) as engine:
        answers = [engine.infer(np.ascontiguousarray(frame[None])) for frame in frames]
        name = f"{engine.spec.name} {engine.spec.version} {engine.spec.device}"
    scores = np.concatenate([scores for _, scores in answers])
    peaks = np.array([maps.max() for maps, _ in answers], np.float32)
    if not (np.isfinite(scores).all() and np.isfinite(peaks).all()):
        raise TrainingError("a held-out good image scores NaN or infinite; train again at a lower learning rate")
    return scores, peaks, name


def image_scores(draft: ModelBundle, paths: Sequence[Path]) -> Judged:
    """Whole images at native resolution, as the line will score them."""
    # Dense everywhere: the gate follows from this threshold, and a score from a coarse look is never higher.
    with open_engine(draft, backend=SCORING_BACKEND, streams=1, max_batch=1, refine=False) as engine:
        found = [one.anomaly_map for one in collect(draft, engine, paths) if one.anomaly_map is not None]
        scores = np.array([one.score for one in found], np.float32)
        peaks = np.array([one.scores.max() for one in found], np.float32)
        return scores, peaks, f"{engine.spec.name} {engine.spec.version} {engine.spec.device}"


def provisional_calibration(
    scores: NDArray[np.float32], facts: BundleFacts, *, engine: str, peaks: NDArray[np.float32] | None = None
) -> ScoreCalibration:
    """Threshold = largest held-out good score + ``MARGIN_SHARE`` of its distance to the median; never certified.

    The pixels' threshold is the same, or with ``peaks`` follows from them in the same way.
    """
    threshold, margin = _above(scores)
    pixel_threshold = threshold if peaks is None else _above(peaks)[0]
    return ScoreCalibration(
        kind="provisional",
        certified=False,
        threshold=threshold,
        pixel_threshold=pixel_threshold,
        min_area_px=1,
        scores=tuple(sorted(float(score) for score in scores)),
        engine=engine,
        data_sha256=facts.calibration_sha256,
        statistics_shared=facts.statistics_shared,
        margin=margin,
    )


def _above(scores: NDArray[np.float32]) -> tuple[float, float]:
    """A threshold above all ``scores``, and its distance from the largest of them."""
    largest = float(scores.max())
    margin = MARGIN_SHARE * (largest - float(np.median(scores)))
    if not math.isfinite(largest + margin):
        raise TrainingError(f"the provisional threshold became {largest + margin}")
    return largest + margin, margin
