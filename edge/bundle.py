"""ModelBundle: a model, how to feed it, what it must answer, and its thresholds, in one directory written once.

Owns the manifest's schema, opening, writing and the golden check; bytes on disk are `bundle_files`, what an ONNX file
may refer to is `model_file`, the engine that runs it is handed in. The layout is described in `docs/bundle.md`:

    bundle.json       Manifest: input, map geometry, tolerance, and {path: sha256, size} of every other file
    model.onnx        the graph (design: graph contract), no external data
    coarse.onnx       optional: the same graph with fewer cells, looked at first (Manifest.refine)
    golden/           frames.npy (K, h, w, C) uint8, maps.npy (K, h', w') float32, scores.npy (K,) float32
    calibration.json  ScoreCalibration: thresholds and the good scores they came from
    provenance.json   what made it: data digests, configuration, seed, versions, training curve
    report/           pictures and tables for people
    signature.json    optional: who vouches for all of the above (`signature`)

`model_id` is the SHA-256 of bundle.json, which lists the digest of everything else.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol, TypeVar, runtime_checkable

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.bundle_files import (
    array_bytes,
    files_below,
    parse_array,
    plain_name,
    read_once,
    sha256_hex,
    write_directory,
)
from edge.errors import BundleError, ParityError
from edge.model_file import require_self_contained
from edge.signature import MAX_SIGNATURE_BYTES, Digests, check_signature

SCHEMA_VERSION = 1

MANIFEST = "bundle.json"
SIGNATURE = "signature.json"
MODEL = "model.onnx"
COARSE = "coarse.onnx"
GOLDEN_FRAMES, GOLDEN_MAPS, GOLDEN_SCORES = "golden/frames.npy", "golden/maps.npy", "golden/scores.npy"
CALIBRATION = "calibration.json"
PROVENANCE = "provenance.json"
REPORT_FOLDER = "report/"

_MIB = 1 << 20
MAX_MANIFEST_BYTES = _MIB
MAX_FILE_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {
        MODEL: 512 * _MIB,
        GOLDEN_FRAMES: 256 * _MIB,
        GOLDEN_MAPS: 256 * _MIB,
        GOLDEN_SCORES: _MIB,
        CALIBRATION: 64 * _MIB,
        PROVENANCE: 64 * _MIB,
    }
)
"""The files that every bundle has, with the most bytes that are read of each."""
OPTIONAL_FILE_BYTES: Final[Mapping[str, int]] = MappingProxyType({COARSE: 512 * _MIB})
"""Those that only some have."""
MAX_REPORT_BYTES = 64 * _MIB
_FILE_BYTES: Final[Mapping[str, int]] = MappingProxyType({**MAX_FILE_BYTES, **OPTIONAL_FILE_BYTES})

_T = TypeVar("_T")


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the graph takes: `frames` uint8 (N <= max_batch, height, width, channels).

    `fit` is how a frame gets there: `resize` (the ROI scaled to height x width) or `tile` (the ROI as it is, cut into
    overlapping tiles of height x width whose maps are put together). `aspect` says what `resize` does with another
    aspect ratio: `stretch`, or `keep` (scaled to fit, the rest filled by reflection).
    `min_side_px` and `max_side_px` bound the frame's own sides, and with `tile` the first one the ROI's as well; a
    frame outside is refused as of another shape.
    """

    height: int
    width: int
    channels: Literal[1, 3]
    max_batch: int
    fit: Literal["resize", "tile"] = "resize"
    aspect: Literal["stretch", "keep"] = "stretch"
    min_side_px: int = 32
    max_side_px: int = 16384


class MapGeometry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the map's cells lie in model pixels.

    Cell (i, j) is centered at pixel index (`offset_y` + i * stride, `offset_x` + j * stride), where whole numbers are
    pixel centers. `reduction` is how the image score follows from the map. `rim_px` is how many model pixels at each
    side see padding inside the graph: cells centered there are right at a frame's own edge only, so tiles overlap by
    them. 0 is a graph without padding, whose cells see 2 * offset + 1 pixels each.
    """

    height: int
    width: int
    stride: float
    offset_y: float
    offset_x: float
    reduction: Literal["max", "mean", "top-q"] = "max"
    rim_px: int = 0


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a backend's map may be from the golden one: |a - b| <= absolute + relative * |b|."""

    absolute: float
    relative: float


class Refine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A coarse look first: `coarse.onnx` gives the cells of `map`, every k-th of the bundle's own, at a lower cost.

    A tile (with `fit` "resize" the frame) is computed densely only if its largest coarse cell is above the gate. The
    `margin` is the `rank`-th smallest distance from coarse to dense maximum over `tiles` held-out good tiles: with
    probability `confidence` at most the share `rate` of such tiles exceed it.
    """

    map: MapGeometry
    margin: float
    rate: float
    confidence: float
    tiles: int
    rank: int

    def gate(self, calibration: ScoreCalibration) -> float:
        """The coarse maximum above which a tile is computed densely, raw.

        Not a field: `kizu calibrate` moves the thresholds, and a tile with a cell above the lower one must not be
        missed unless its distance is beyond the margin.
        """
        return calibration.lowest() - self.margin


class FileDigest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """SHA-256 in hex and size in bytes of one file."""

    sha256: str
    size: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """bundle.json."""

    schema_version: int
    name: str
    method: str
    preset: str
    input: InputSpec
    map: MapGeometry
    tolerance: Tolerance
    created_ns: int
    files: dict[str, FileDigest]
    refine: Refine | None = None


Ring = tuple[tuple[float, float], ...]


class Zone(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Part of a camera's picture with a threshold of its own: the cells whose centers an odd number of rings hold.

    `rings_xy` are corners in frame pixels, for frames of `frame_size` (height, width), None for any. `offset` is added
    to the map there, so that one threshold serves every zone: the zone's own is that less `offset`.
    """

    name: str
    rings_xy: tuple[Ring, ...]
    offset: float = 0.0
    frame_size: tuple[int, int] | None = None


RoiXywh = tuple[int, int, int, int]


class CameraThresholds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One camera's line in the table of a calibration of several; the fields are those of `ScoreCalibration`."""

    threshold: float
    pixel_threshold: float
    min_area_px: int
    scores: tuple[float, ...]
    roi_xywh: RoiXywh | None = None
    zones: tuple[Zone, ...] = ()
    certified: bool = True
    flat_field: str | None = None


class ScoreCalibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """calibration.json: the thresholds, and what they stand on.

    `kind` is `provisional` (maximum of held-out good scores plus a margin; never certified) or `order-statistic`
    (certified: at most `false_rejects` of good parts are rejected, with probability `confidence`). `scores` are the
    good image scores, ascending; a part is rejected when its score is greater than `threshold`, a pixel belongs to a
    defect when its map value is greater than `pixel_threshold`. `statistics_shared` says that map statistics and
    threshold come from the same images. `data_sha256` is the digest of the good images used, `model_sha256` that of the
    model.onnx that scored them. A part is one `unit`: an image, the frames of one `part_id`, or `block` = [frames, gap]
    frames in a row; `scores` are then its maxima. Scores are those of `roi_xywh` (None: the whole frame) within
    `zones` (none: everywhere), of pictures corrected by `flat_field` (its `CameraCalibration.flat_field_id`; None: as
    the camera sends them). `cameras` replaces all of these for the cameras in it.
    """

    kind: Literal["provisional", "order-statistic"]
    certified: bool
    threshold: float
    pixel_threshold: float
    min_area_px: int
    scores: tuple[float, ...]
    engine: str
    data_sha256: str
    statistics_shared: bool = False
    false_rejects: float | None = None
    confidence: float | None = None
    margin: float | None = None
    model_sha256: str | None = None
    unit: Literal["image", "part", "block"] = "image"
    block: tuple[int, int] | None = None
    roi_xywh: RoiXywh | None = None
    zones: tuple[Zone, ...] = ()
    cameras: dict[str, CameraThresholds] = {}
    flat_field: str | None = None

    def of(self, camera: str) -> ScoreCalibration:
        """What holds for one camera; uncertified for one that is not in the table, if there is a table."""
        if not self.cameras:
            return self
        entry = self.cameras.get(camera)
        if entry is None:
            return msgspec.structs.replace(self, certified=False, cameras={})
        given = {name: getattr(entry, name) for name in entry.__struct_fields__}
        return msgspec.structs.replace(self, cameras={}, **{**given, "certified": self.certified and entry.certified})

    def lowest(self) -> float:
        """The lowest raw map value that matters anywhere: to an image, a pixel, a zone, a camera."""
        tables: list[ScoreCalibration | CameraThresholds] = [self, *self.cameras.values()]
        return min(min(t.threshold, t.pixel_threshold) - max([0.0, *(z.offset for z in t.zones)]) for t in tables)


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """A few model inputs with the answers of the exporting backend.

    `frames` (K, h, w, C) uint8, `maps` (K, h', w') and `scores` (K,) float32.
    """

    frames: NDArray[np.uint8]
    maps: NDArray[np.float32]
    scores: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class ModelBundle:
    """An opened bundle whose every byte was hashed; engines build from `model` and `coarse`, never from the path.

    `signed_by` is the public key (Z85) whose signature over this content was checked, None without a signature; whether
    that key is trusted is asked of a `signature.TrustStore`.
    """

    path: Path
    model_id: str
    manifest: Manifest
    model: bytes
    golden: Golden
    calibration: ScoreCalibration
    provenance: dict[str, Any]
    coarse: bytes | None = None
    signed_by: str | None = None


class Runner(Protocol):
    """The one method of `protocols.Engine` that the golden check needs."""

    def infer(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...


@runtime_checkable
class Refining(Protocol):
    """An engine that looks with one graph and computes with another: the golden check wants each by itself."""

    @property
    def coarse(self) -> Runner: ...

    @property
    def dense(self) -> Runner: ...


@dataclass(frozen=True, slots=True)
class GoldenCheck:
    """How far an engine is from the bundle's expected answers, over maps and image scores of all golden frames.

    `max_abs` is the largest |a - b|, raw; `max_rel_of_tolerance` the largest |a - b| / (absolute + relative * |b|):
    above 1 the bundle's tolerance is exceeded. `ok` says that it is not, and that everything was finite.
    """

    frames: int
    max_abs: float
    max_rel_of_tolerance: float
    ok: bool


def open_bundle(path: Path | str) -> ModelBundle:
    """Read, hash and parse the bundle at `path`: each file once, and only the bytes that were hashed are used.

    Raises:
        BundleError: a file is missing, changed, unknown, too large or malformed, or the schema is another one.
    """
    directory = Path(path)
    present = files_below(directory)
    if MANIFEST not in present:
        raise BundleError(f"{directory} is no bundle: it has no {MANIFEST}; `kizu train` writes bundles")
    manifest_bytes = read_once(directory / MANIFEST, MAX_MANIFEST_BYTES)
    manifest = _parse_manifest(manifest_bytes, directory)
    _require_same_names(directory, present, manifest)
    content: dict[str, bytes] = {}
    for name in sorted(manifest.files):
        data = _read_file(directory, name, manifest)
        if not name.startswith(REPORT_FOLDER):  # reports are verified, not kept
            content[name] = data
    bundle = _assemble(directory, manifest_bytes, manifest, content)
    if SIGNATURE not in present:
        return bundle
    signature = read_once(directory / SIGNATURE, MAX_SIGNATURE_BYTES)
    files = _digests(manifest_bytes, manifest)
    return replace(bundle, signed_by=check_signature(signature, files, str(directory / SIGNATURE)))


def digests_of(bundle: ModelBundle) -> Digests:
    """{file: (sha256, size)} of all that a signature of the bundle vouches for, as the bundle was opened.

    Raises:
        BundleError: the manifest on disk is another one by now.
    """
    manifest_bytes = read_once(bundle.path / MANIFEST, MAX_MANIFEST_BYTES)
    if sha256_hex(manifest_bytes) != bundle.model_id:
        raise BundleError(f"{bundle.path / MANIFEST} changed while the bundle was open; run the command again")
    return _digests(manifest_bytes, bundle.manifest)


def _digests(manifest_bytes: bytes, manifest: Manifest) -> Digests:
    listed = {name: (digest.sha256, digest.size) for name, digest in manifest.files.items()}
    return {**listed, MANIFEST: (sha256_hex(manifest_bytes), len(manifest_bytes))}


def write_bundle(
    path: Path | str,
    *,
    name: str,
    method: str,
    preset: str,
    input: InputSpec,
    map: MapGeometry,
    tolerance: Tolerance,
    model: bytes,
    golden: Golden,
    calibration: ScoreCalibration,
    provenance: Mapping[str, Any],
    report: Mapping[str, bytes] = MappingProxyType({}),
    created_ns: int | None = None,
    coarse: bytes | None = None,
    refine: Refine | None = None,
) -> ModelBundle:
    """Write a new bundle at `path`, complete or not at all, and return it opened.

    `report` maps names below report/ to contents; `coarse` and `refine` go together. The same arguments give the same
    `model_id`; `created_ns` (Unix, part of the identity) defaults to SOURCE_DATE_EPOCH where that is set, else to now.

    Raises:
        BundleError: `path` exists, or the content would not be accepted by `open_bundle`.
    """
    content = {
        MODEL: bytes(model),
        GOLDEN_FRAMES: array_bytes(golden.frames),
        GOLDEN_MAPS: array_bytes(golden.maps),
        GOLDEN_SCORES: array_bytes(golden.scores),
        CALIBRATION: canonical_json(calibration),
        PROVENANCE: canonical_json(dict(provenance)),
    }
    if coarse is not None:
        content[COARSE] = bytes(coarse)
    content.update({REPORT_FOLDER + name: bytes(data) for name, data in report.items()})
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        method=method,
        preset=preset,
        input=input,
        map=map,
        tolerance=tolerance,
        created_ns=_now_ns() if created_ns is None else created_ns,
        files={name: FileDigest(sha256_hex(data), len(data)) for name, data in content.items()},
        refine=refine,
    )
    manifest_bytes = canonical_json(manifest)
    target = Path(path)
    # Everything that open_bundle checks is checked on these very bytes first: what cannot be opened is not written.
    bundle = _assemble(target, manifest_bytes, _parse_manifest(manifest_bytes, target), content)
    write_directory(target, {**content, MANIFEST: manifest_bytes})
    return bundle


def derive_bundle(
    source: ModelBundle,
    path: Path | str,
    *,
    calibration: ScoreCalibration,
    provenance_extra: Mapping[str, Any],
    created_ns: int | None = None,
    model: bytes | None = None,
    golden: Golden | None = None,
    tolerance: Tolerance | None = None,
    report_extra: Mapping[str, bytes] = MappingProxyType({}),
) -> ModelBundle:
    """Write `source` again with another calibration; provenance gains `provenance_extra` and `derived_from`.

    Another `model` comes with its own `golden` answers and `tolerance`; `report_extra` is added to the report.

    `derived_from` lists the model_ids of all ancestors, the direct one last. A signature is not carried over.

    Raises:
        BundleError: `path` exists, `source` changed on disk since it was opened, or the calibration is malformed.
    """
    manifest = source.manifest
    report = {
        name.removeprefix(REPORT_FOLDER): _read_file(source.path, name, manifest)
        for name in manifest.files
        if name.startswith(REPORT_FOLDER)
    }
    ancestors = [*source.provenance.get("derived_from", []), source.model_id]
    return write_bundle(
        path,
        name=manifest.name,
        method=manifest.method,
        preset=manifest.preset,
        input=manifest.input,
        map=manifest.map,
        tolerance=tolerance or manifest.tolerance,
        model=model or source.model,
        golden=golden or source.golden,
        calibration=calibration,
        provenance={**source.provenance, **provenance_extra, "derived_from": ancestors},
        report={**report, **report_extra},
        created_ns=created_ns,
        coarse=source.coarse,
        refine=manifest.refine,
    )


def coarse_bundle(bundle: ModelBundle) -> ModelBundle:
    """The coarse graph of a bundle with `refine` as a bundle of its own, for engines and the golden check; not on disk.

    Its cells are some of the dense graph's, so its golden answers are there already; errors name its file.

    Raises:
        BundleError: the bundle has no coarse graph.
    """
    manifest = bundle.manifest
    if manifest.refine is None or bundle.coarse is None:
        raise BundleError(f"bundle {bundle.path} has no {COARSE}; `kizu train --refine` makes one")
    every = cells_between(manifest, manifest.refine)
    golden = bundle.golden
    maps = np.ascontiguousarray(golden.maps[:, ::every, ::every])
    return replace(
        bundle,
        path=bundle.path / COARSE,
        manifest=msgspec.structs.replace(manifest, map=manifest.refine.map, refine=None),
        model=bundle.coarse,
        golden=Golden(golden.frames, maps, maps.max(axis=(1, 2))),
        coarse=None,
    )


def cells_between(manifest: Manifest, refine: Refine) -> int:
    """k: every k-th cell of the dense map, counted from the first along both axes, is a coarse one."""
    return round(refine.map.stride / manifest.map.stride)


def check_golden(
    bundle: ModelBundle,
    engine: Runner | Refining,
    *,
    require: bool = False,
    loose: float = 0.0,
    before_each: Callable[[], None] = lambda: None,
) -> GoldenCheck:
    """Run the bundle's golden frames one by one and compare maps and scores with the expected ones.

    They are the dense graph's. Of an engine that looks coarsely first, both graphs are checked, each in all its cells.
    `loose` is for engines of lower precision: that share of the largest expected value is admitted as well.
    `before_each` is called before each frame, for a caller that does not want to take all of the machine.

    Raises:
        ParityError: only with `require`, when the tolerance is exceeded.
        EngineError: the engine failed.
    """
    if isinstance(engine, Refining):
        dense = check_golden(bundle, engine.dense, require=require, loose=loose, before_each=before_each)
        looked = coarse_bundle(bundle)
        coarse = check_golden(looked, engine.coarse, require=require, loose=loose, before_each=before_each)
        return GoldenCheck(
            frames=dense.frames,
            max_abs=float(np.maximum(dense.max_abs, coarse.max_abs)),
            max_rel_of_tolerance=float(np.maximum(dense.max_rel_of_tolerance, coarse.max_rel_of_tolerance)),
            ok=dense.ok and coarse.ok,
        )
    tolerance, golden = bundle.manifest.tolerance, bundle.golden
    admitted = tolerance.absolute + loose * float(np.abs(golden.maps).max(initial=0.0))
    max_abs = max_share = 0.0
    for index in range(len(golden.frames)):
        # One frame a batch: every engine takes that, whatever its largest batch.
        before_each()
        maps, scores = engine.infer(golden.frames[index : index + 1])
        for found, expected in ((maps[0], golden.maps[index]), (scores[:1], golden.scores[index : index + 1])):
            if found.shape != expected.shape:
                raise ParityError(
                    f"bundle {bundle.path}: golden frame {index} gave {found.shape}, expected {expected.shape}"
                )
            gap = np.abs(found.astype(np.float64) - expected)
            share = gap / (admitted + tolerance.relative * np.abs(expected.astype(np.float64)))
            # not `max`, which would lose a NaN
            max_abs = float(np.maximum(max_abs, gap.max()))
            max_share = float(np.maximum(max_share, share.max()))
    check = GoldenCheck(len(golden.frames), max_abs, max_share, ok=bool(max_share <= 1.0))
    if require and not check.ok:
        raise ParityError(
            f"bundle {bundle.path}: this engine is up to {max_abs:.3g} from the golden frames, {max_share:.3g} times "
            f"the tolerance ({admitted:g} + {tolerance.relative:g} * |expected|); "
            "compare with `kizu verify BUNDLE --backend onnxruntime`"
        )
    return check


def canonical_json(value: Any) -> bytes:
    """The one JSON text of `value`: keys sorted, two spaces of indent, a newline at the end."""
    try:
        return msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=2) + b"\n"
    except (TypeError, ValueError) as error:
        raise BundleError(f"cannot be written as JSON: {error}") from error


def _now_ns() -> int:
    """Creation time; repeatable by https://reproducible-builds.org/specs/source-date-epoch/."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        return time.time_ns()
    if not epoch.isdecimal():
        raise BundleError(f"SOURCE_DATE_EPOCH is {epoch!r}, expected whole seconds since 1970; unset it or correct it")
    return int(epoch) * 1_000_000_000


def _parse_manifest(data: bytes, directory: Path) -> Manifest:
    where = directory / MANIFEST
    schema = _parse_json(data, _SchemaOnly, where).schema_version
    if schema != SCHEMA_VERSION:
        step = "upgrade kizu" if schema > SCHEMA_VERSION else "make the bundle again with this kizu"
        raise BundleError(f"{where} has schema version {schema}, this kizu reads {SCHEMA_VERSION}; {step}")
    manifest = _parse_json(data, Manifest, where)
    for name, digest in manifest.files.items():
        _require_file_entry(where, name, digest)
    if missing := sorted(MAX_FILE_BYTES.keys() - manifest.files.keys()):
        raise BundleError(f"{where} does not list {missing[0]}, which every bundle has; make the bundle again")
    _require_sane_geometry(where, manifest)
    _require_sane_refine(where, manifest)
    return manifest


class _SchemaOnly(msgspec.Struct):
    schema_version: int


def _require_file_entry(where: Path, name: str, digest: FileDigest) -> None:
    if not plain_name(name):
        raise BundleError(f"{where} lists {name!r}; expected a plain relative path inside the bundle")
    if name not in _FILE_BYTES and not name.startswith(REPORT_FOLDER):
        raise BundleError(f"{where} lists {name!r}, which is no file of a bundle of schema {SCHEMA_VERSION}")
    limit = _FILE_BYTES.get(name, MAX_REPORT_BYTES)
    if not 0 <= digest.size <= limit:
        raise BundleError(f"{where} gives {name} {digest.size} bytes; from 0 to {limit} are admitted")


def _require_sane_geometry(where: Path, manifest: Manifest) -> None:
    spec, cells, tolerance = manifest.input, manifest.map, manifest.tolerance
    wrong = None
    if not (1 <= spec.height <= 16384 and 1 <= spec.width <= 16384 and 1 <= spec.max_batch <= 1024):
        wrong = f"input {spec.height} x {spec.width}, batch {spec.max_batch}"
    elif not (1 <= cells.height <= 16384 and 1 <= cells.width <= 16384):
        wrong = f"map {cells.height} x {cells.width}"
    elif not (cells.stride > 0 and math.isfinite(cells.stride + cells.offset_y + cells.offset_x)):
        wrong = f"map stride {cells.stride}, offsets {cells.offset_y} and {cells.offset_x}"
    elif not 0 <= cells.rim_px <= 16384:
        wrong = f"map rim of {cells.rim_px} px"
    elif spec.fit == "tile" and (cells.stride != int(cells.stride) or cells.reduction == "top-q"):
        # One grid for all tiles; and the best q of a whole map are not among those of its tiles' scores.
        wrong = f"fit 'tile' (whole strides, reduction max or mean) with stride {cells.stride}, {cells.reduction!r}"
    elif not (1 <= spec.min_side_px <= spec.max_side_px):
        wrong = f"frame sides from {spec.min_side_px} to {spec.max_side_px} px"
    elif not (0 < tolerance.absolute < math.inf and 0 <= tolerance.relative < math.inf):
        wrong = f"tolerance {tolerance.absolute} + {tolerance.relative} * |expected|"
    if wrong is not None:
        raise BundleError(f"{where}: {wrong} cannot be; make the bundle again")


def _require_sane_refine(where: Path, manifest: Manifest) -> None:
    """`refine` and coarse.onnx go together, and the coarse cells are some of the dense ones."""
    refine, dense = manifest.refine, manifest.map
    if refine is None:
        if COARSE in manifest.files:
            raise BundleError(f"{where} lists {COARSE} but does not say how it is used (refine); make the bundle again")
        return
    if COARSE not in manifest.files:
        raise BundleError(f"{where} says refine but does not list {COARSE}; make the bundle again")
    coarse, every = refine.map, refine.map.stride / dense.stride
    wrong = None
    if not (math.isfinite(every) and every == int(every) and every >= 2):
        wrong = f"a coarse stride of {coarse.stride} over a dense one of {dense.stride} (expected a multiple)"
    elif dense.reduction != "max":
        # Nothing is known of a mean from every k-th cell; and of the maximum only that it is no less.
        wrong = f"refine with a map whose reduction is {dense.reduction!r} (expected max)"
    elif coarse != _every_kth(dense, int(every)):
        wrong = f"a coarse map {coarse} with every {int(every)}th cell of a dense map {dense}"
    elif not (0 <= refine.margin < math.inf and 0 < refine.rate < 1 and 0 < refine.confidence < 1):
        wrong = f"a margin of {refine.margin} for a rate of {refine.rate} with confidence {refine.confidence}"
    elif not 1 <= refine.rank <= refine.tiles:
        wrong = f"the margin of rank {refine.rank} among {refine.tiles} tiles"
    if wrong is not None:
        raise BundleError(f"{where}: refine: {wrong} cannot be; make the bundle again")


def _every_kth(dense: MapGeometry, every: int) -> MapGeometry:
    sides = {"height": -(-dense.height // every), "width": -(-dense.width // every)}
    return msgspec.structs.replace(dense, stride=dense.stride * every, **sides)


def _require_same_names(directory: Path, present: set[str], manifest: Manifest) -> None:
    known = manifest.files.keys() | {MANIFEST}
    if missing := sorted(known - present):
        raise BundleError(f"bundle {directory} lacks {missing[0]}, which {MANIFEST} lists; copy the bundle again")
    if extra := sorted(present - known - {SIGNATURE}):
        raise BundleError(f"bundle {directory} holds {extra[0]!r}, which {MANIFEST} does not list; remove it")


def _read_file(directory: Path, name: str, manifest: Manifest) -> bytes:
    """Read one listed file; no directory on its way may be a link (`files_below` lists a linked one as a file)."""
    expected = manifest.files[name]
    data = read_once(directory / name, _FILE_BYTES.get(name, MAX_REPORT_BYTES))
    if len(data) != expected.size or sha256_hex(data) != expected.sha256:
        how = "its content" if len(data) == expected.size else f"its {len(data)} bytes in place of {expected.size}"
        raise BundleError(
            f"{directory / name} was changed: {how} is not what {MANIFEST} lists; "
            f"copy the bundle again, then run `kizu verify {directory}`"
        )
    return data


def _assemble(directory: Path, manifest_bytes: bytes, manifest: Manifest, content: Mapping[str, bytes]) -> ModelBundle:
    """Parse verified bytes."""
    for name in (MODEL, COARSE):
        if name in content:
            require_self_contained(content[name], str(directory / name))
    provenance = _parse_json(content[PROVENANCE], dict[str, Any], directory / PROVENANCE)
    calibration = _parse_json(content[CALIBRATION], ScoreCalibration, directory / CALIBRATION)
    _require_sane_calibration(directory / CALIBRATION, calibration)
    if calibration.model_sha256 not in (None, manifest.files[MODEL].sha256):
        raise BundleError(
            f"{directory / CALIBRATION} is the certificate of another model (scored by model.onnx "
            f"{calibration.model_sha256}, this one is {manifest.files[MODEL].sha256}); run `kizu calibrate` on this "
            "bundle"
        )
    return ModelBundle(
        path=directory,
        model_id=sha256_hex(manifest_bytes),
        manifest=manifest,
        model=content[MODEL],
        golden=_parse_golden(directory, manifest, content),
        calibration=calibration,
        provenance=provenance,
        coarse=content.get(COARSE),
    )


def _parse_golden(directory: Path, manifest: Manifest, content: Mapping[str, bytes]) -> Golden:
    spec, cells = manifest.input, manifest.map
    u8, f32 = np.dtype(np.uint8), np.dtype("<f4")
    frames_at = str(directory / GOLDEN_FRAMES)
    frames = parse_array(content[GOLDEN_FRAMES], u8, (None, spec.height, spec.width, spec.channels), frames_at)
    count = len(frames)
    maps_shape = (count, cells.height, cells.width)
    maps = parse_array(content[GOLDEN_MAPS], f32, maps_shape, str(directory / GOLDEN_MAPS))
    scores = parse_array(content[GOLDEN_SCORES], f32, (count,), str(directory / GOLDEN_SCORES))
    if not (np.isfinite(maps).all() and np.isfinite(scores).all()):
        raise BundleError(f"{directory / GOLDEN_MAPS}: expected answers are not all finite; make the bundle again")
    return Golden(frames, maps, scores)


def _require_sane_calibration(where: Path, calibration: ScoreCalibration) -> None:
    if (calibration.block is None) == (calibration.unit == "block") or min(calibration.block or (1, 0)) < 0:
        raise BundleError(f"{where}: unit {calibration.unit!r} with block {calibration.block}; make the bundle again")
    tables: list[ScoreCalibration | CameraThresholds] = [calibration, *calibration.cameras.values()]
    for table in tables:
        _require_sane_table(where, table)


def _require_sane_table(where: Path, table: ScoreCalibration | CameraThresholds) -> None:
    rings = [ring for zone in table.zones for ring in zone.rings_xy]
    places = [*(zone.offset for zone in table.zones), *(value for ring in rings for point in ring for value in point)]
    if not all(math.isfinite(value) for value in (table.threshold, table.pixel_threshold, *table.scores, *places)):
        raise BundleError(f"{where}: thresholds, scores and zones must be finite; make the bundle again")
    if any(low > high for low, high in itertools.pairwise(table.scores)):
        raise BundleError(f"{where}: scores must be ascending; make the bundle again")
    if table.min_area_px < 0:
        raise BundleError(f"{where}: min_area_px is {table.min_area_px}, expected 0 or more")
    if not all(zone.rings_xy for zone in table.zones) or any(len(ring) < 3 for ring in rings):
        raise BundleError(f"{where}: a zone needs rings of at least three corners; make the bundle again")
    if table.roi_xywh is not None and (min(table.roi_xywh[:2]) < 0 or min(table.roi_xywh[2:]) < 1):
        raise BundleError(f"{where}: roi_xywh is {table.roi_xywh}; make the bundle again")


def _parse_json(data: bytes, kind: type[_T], where: Path) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise BundleError(f"{where} is not as expected: {error}; make the bundle again or copy it again") from error
