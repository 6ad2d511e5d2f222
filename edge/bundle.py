"""ModelBundle: a model, how to feed it, what it must answer, and its thresholds, in one directory written once.

Owns the manifest's schema, hashing, opening and writing. The layout is described in `docs/bundle.md`:

    bundle.json       Manifest: input, map geometry, tolerance, and {path: sha256, size} of every other file
    model.onnx        the graph (design: graph contract), no external data
    golden/           frames.npy (K, h, w, C) uint8, maps.npy (K, h', w') float32, scores.npy (K,) float32
    calibration.json  ScoreCalibration: thresholds and the good scores they came from
    provenance.json   what made it: data digests, configuration, seed, versions, training curve
    report/           pictures and tables for people

`model_id` is the SHA-256 of bundle.json, which lists the digest of everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

SCHEMA_VERSION = 1


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the graph takes: `frames` uint8 (N <= max_batch, height, width, channels).

    `fit` is how a frame gets there: `resize` (the ROI scaled to height x width) or `tile`. `aspect` says what `resize`
    does with another aspect ratio: `stretch`, or `keep` (scaled to fit, the rest filled by reflection).
    `min_side_px` and `max_side_px` bound the frame's own sides; a frame outside is refused as of another shape.
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
    pixel centers. `reduction` is how the image score follows from the map.
    """

    height: int
    width: int
    stride: float
    offset_y: float
    offset_x: float
    reduction: Literal["max", "mean", "top-q"] = "max"


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a backend's map may be from the golden one: |a - b| <= absolute + relative * |b|."""

    absolute: float
    relative: float


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


class ScoreCalibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """calibration.json: the thresholds, and what they stand on.

    `kind` is `provisional` (maximum of held-out good scores plus a margin; never certified) or `order-statistic`
    (certified: at most `false_rejects` of good parts are rejected, with probability `confidence`). `scores` are the good
    image scores, ascending; a part is rejected when its score is greater than `threshold`, a pixel belongs to a defect when
    its map value is greater than `pixel_threshold`. `statistics_shared` says that map statistics and threshold come from
    the same images. `data_sha256` is the digest of the good images used.
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


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """A few model inputs with the answers of the exporting backend: frames (K, h, w, C) uint8, maps (K, h', w') and scores (K,) float32."""

    frames: NDArray[np.uint8]
    maps: NDArray[np.float32]
    scores: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class ModelBundle:
    """An opened bundle whose every byte was hashed; engines build from `model`, never from the path."""

    path: Path
    model_id: str
    manifest: Manifest
    model: bytes
    golden: Golden
    calibration: ScoreCalibration
    provenance: dict[str, Any]
