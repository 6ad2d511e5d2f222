"""CameraCalibration: what is known of one camera, in a directory written once: flat field, lens, millimeters.

Owns the file's schema, opening and writing it, and the way from a frame's pixels to the inspected plane. Fitting is for
whoever has the pictures of the board; the flat field is applied by `stages.flatfield`, and regions are measured by
`stages.measure`.

    camera.json   CameraFile: frame size, lens, plane, and {name: sha256, size} of the arrays
    gain.npy      (H, W, C) float32: what a pixel is multiplied by after its dark value is taken off
    dark.npy      (H, W, C) float32: what a pixel reads without light, in gray levels

Frames are never remapped. The lens is applied to the few points of a region's outline, exactly and in microseconds;
remapping would cost milliseconds for every frame and blur the pixels that the model was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge.bundle import FileDigest
from edge.bundle_files import array_bytes, files_below, parse_array, read_once, sha256_hex, write_directory
from edge.errors import BundleError, ConfigError

SCHEMA_VERSION: Final = 1
FILE: Final = "camera.json"
GAIN: Final = "gain.npy"
DARK: Final = "dark.npy"
MAX_GAIN: Final = 8.0
"""A pixel that gets less than an eighth of the light has nothing to amplify."""

_MAX_JSON_BYTES: Final = 1024 * 1024
_MAX_ARRAY_BYTES: Final = 1024 * 1024 * 1024
_ITERATIONS: Final = 30
_SETTLED: Final = 1e-12

_Side = Annotated[int, Meta(ge=1, le=16384)]


class Lens(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pinhole with Brown's distortion, as OpenCV writes it: `matrix` is (fx, fy, cx, cy) in pixels, whole numbers
    being pixel centers; `distortion` is (k1, k2, p1, p2, k3). `error_px` is the root mean square of what the board's
    corners missed their places by, over `views` pictures."""

    matrix: tuple[float, float, float, float]
    distortion: tuple[float, float, float, float, float]
    error_px: float
    views: int


class Plane(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The inspected plane: `to_mm` is a 3 x 3 homography, by rows, from undistorted pixels to millimeters.

    (0, 0) mm is seen at the frame's top left corner, and x runs along its top edge. `error_mm` is the root mean square
    of what the board's corners missed, None where the scale was simply stated.
    """

    to_mm: tuple[float, float, float, float, float, float, float, float, float]
    error_mm: float | None = None


class CameraFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """camera.json; `made_from` says for people which pictures it stands on."""

    schema_version: int
    height: _Side
    width: _Side
    files: dict[str, FileDigest]
    lens: Lens | None = None
    plane: Plane | None = None
    made_from: dict[str, Any] = {}


@dataclass(frozen=True, slots=True, eq=False)
class CameraCalibration:
    """An opened calibration for frames of `size` (height, width); `id` is the SHA-256 of its camera.json.

    `gain` and `dark` (H, W, C) float32 go together; None leaves frames as they are. Without `plane` nothing is known
    in millimeters.
    """

    id: str
    size: tuple[int, int]
    gain: NDArray[np.float32] | None = None
    dark: NDArray[np.float32] | None = None
    lens: Lens | None = None
    plane: Plane | None = None

    @property
    def flat_field_id(self) -> str | None:
        """SHA-256 of the flat field's values, None without one: two calibrations with one id correct alike."""
        if self.gain is None or self.dark is None:
            return None
        return sha256_hex(np.ascontiguousarray(self.gain).tobytes() + np.ascontiguousarray(self.dark).tobytes())

    @property
    def has_scale(self) -> bool:
        """Whether `to_mm` can be asked."""
        return self.plane is not None

    def to_mm(self, points_xy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points of the frame, (n, 2) in pixels where pixel i covers [i, i + 1), as (n, 2) mm in the inspected plane.

        Raises:
            ValueError: the calibration knows no plane.
        """
        if self.plane is None:
            raise ValueError("this camera's calibration says nothing of millimeters")
        return project(np.reshape(self.plane.to_mm, (3, 3)), undistorted(points_xy, self.lens))

    def mm_per_px(self, x: float, y: float) -> float:
        """The side in mm of a square as large as the pixel at (x, y): the root of its area."""
        corners = np.array([(x - 0.5, y - 0.5), (x + 0.5, y - 0.5), (x + 0.5, y + 0.5), (x - 0.5, y + 0.5)])
        return math.sqrt(abs(polygon_area(self.to_mm(corners))))


def undistorted(points_xy: NDArray[np.float64], lens: Lens | None) -> NDArray[np.float64]:
    """Where points (n, 2) of the frame would be without the lens's distortion; in the same pixel coordinates.

    Newton's method on Brown's model (Brown, Close-range camera calibration, 1971), from the distorted point on: a few
    steps, for OpenCV's five plain substitutions are still off by tenths of a pixel in a strongly distorted corner.
    """
    points = np.asarray(points_xy, np.float64).reshape(-1, 2)
    if lens is None:
        return points
    fx, fy, cx, cy = lens.matrix
    target = (points - 0.5 - (cx, cy)) / (fx, fy)
    found = target.copy()
    for _ in range(_ITERATIONS):
        seen, slope = _distorted(found, lens.distortion)
        miss = seen - target
        if not miss.size or float(np.abs(miss).max()) < _SETTLED:
            break
        (a, b), (c, d) = slope
        determinant = a * d - b * c
        step = np.stack((d * miss[:, 0] - b * miss[:, 1], a * miss[:, 1] - c * miss[:, 0]), axis=1)
        found -= step / determinant[:, None]
    return found * (fx, fy) + (cx, cy) + 0.5


def distorted(points_xy: NDArray[np.float64], lens: Lens | None) -> NDArray[np.float64]:
    """The inverse of `undistorted`."""
    points = np.asarray(points_xy, np.float64).reshape(-1, 2)
    if lens is None:
        return points
    fx, fy, cx, cy = lens.matrix
    seen, _ = _distorted((points - 0.5 - (cx, cy)) / (fx, fy), lens.distortion)
    return seen * (fx, fy) + (cx, cy) + 0.5


_Slope = tuple[tuple[NDArray[np.float64], NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]


def _distorted(
    points: NDArray[np.float64], distortion: tuple[float, float, float, float, float]
) -> tuple[NDArray[np.float64], _Slope]:
    """Brown's model on normalized points (n, 2), and its Jacobian."""
    k1, k2, p1, p2, k3 = distortion
    x, y = points[:, 0], points[:, 1]
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
    growth = k1 + r2 * (2 * k2 + r2 * 3 * k3)  # d radial / d r2
    seen = np.stack(
        (
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        ),
        axis=1,
    )
    across = 2 * x * y * growth + 2 * p1 * x + 2 * p2 * y
    slope = (
        (radial + 2 * x * x * growth + 2 * p1 * y + 6 * p2 * x, across),
        (across, radial + 2 * y * y * growth + 6 * p1 * y + 2 * p2 * x),
    )
    return seen, slope


def project(homography: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (n, 2) through a 3 x 3 homography."""
    homogeneous = points @ homography[:, :2].T + homography[:, 2]
    return np.asarray(homogeneous[:, :2] / homogeneous[:, 2:])


def polygon_area(corners: NDArray[np.float64]) -> float:
    """The signed area of a polygon (n, 2); the sign is its sense of rotation."""
    x, y = corners[:, 0], corners[:, 1]
    return float(0.5 * np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))


# --- the directory ----------------------------------------------------------------------------------------------------


def open_camera(directory: Path) -> CameraCalibration:
    """Read the calibration at `directory`; every byte is as its camera.json says.

    Raises:
        ConfigError: it is missing, changed, of another schema, or says what cannot be.
    """
    try:
        data = read_once(directory / FILE, _MAX_JSON_BYTES)
        described = msgspec.json.decode(data, type=CameraFile)
        _require_same_names(directory, described)
        arrays = {name: _array(directory, name, described) for name in described.files}
    except BundleError as error:
        raise ConfigError(f"camera calibration: {error}; `kizu camera` makes one") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"camera calibration {directory / FILE} is not as expected: {error}; make it again") from None
    _require_sane(directory, described, arrays)
    return CameraCalibration(
        id=sha256_hex(data),
        size=(described.height, described.width),
        gain=arrays.get(GAIN),
        dark=arrays.get(DARK),
        lens=described.lens,
        plane=described.plane,
    )


def write_camera(
    directory: Path,
    *,
    size: tuple[int, int],
    gain: NDArray[np.float32] | None = None,
    dark: NDArray[np.float32] | None = None,
    lens: Lens | None = None,
    plane: Plane | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> CameraCalibration:
    """Write a calibration and open it again.

    Raises:
        ConfigError: the directory exists, cannot be written, or what it would say cannot be.
    """
    arrays = {name: array for name, array in ((GAIN, gain), (DARK, dark)) if array is not None}
    files = {name: array_bytes(array) for name, array in arrays.items()}
    described = CameraFile(
        schema_version=SCHEMA_VERSION,
        height=size[0],
        width=size[1],
        files={name: FileDigest(sha256_hex(data), len(data)) for name, data in files.items()},
        lens=lens,
        plane=plane,
        made_from=dict(made_from or {}),
    )
    _require_sane(directory, described, arrays)
    text = msgspec.json.format(msgspec.json.encode(described), indent=2) + b"\n"
    try:
        write_directory(directory, {FILE: text, **files})
    except BundleError as error:
        raise ConfigError(f"camera calibration: {error}") from None
    return open_camera(directory)


def _require_same_names(directory: Path, described: CameraFile) -> None:
    wrong = sorted((files_below(directory) - {FILE}) ^ described.files.keys())
    if described.schema_version != SCHEMA_VERSION:
        raise BundleError(
            f"{directory / FILE} has schema {described.schema_version}, this kizu reads {SCHEMA_VERSION}; make it again"
        )
    if wrong or described.files.keys() - {GAIN, DARK}:
        raise BundleError(f"{directory}: {wrong or sorted(described.files)} and {FILE} do not agree; copy it again")


def _array(directory: Path, name: str, described: CameraFile) -> NDArray[np.float32]:
    data = read_once(directory / name, _MAX_ARRAY_BYTES)
    if sha256_hex(data) != described.files[name].sha256:
        raise BundleError(f"{directory / name} was changed: its content is not what {FILE} lists; copy it again")
    shape = (described.height, described.width, None)
    return np.asarray(parse_array(data, np.dtype("<f4"), shape, str(directory / name)))


def _require_sane(directory: Path, described: CameraFile, arrays: Mapping[str, NDArray[np.float32]]) -> None:
    gain, dark = arrays.get(GAIN), arrays.get(DARK)
    wrong = None
    if (gain is None) != (dark is None):
        wrong = f"{GAIN} and {DARK} go together"
    elif gain is not None and dark is not None:
        wrong = _wrong_arrays(gain, dark, (described.height, described.width))
    if described.lens is not None and wrong is None:
        values = (*described.lens.matrix, *described.lens.distortion)
        if not (all(map(math.isfinite, values)) and min(described.lens.matrix[:2]) > 0):
            wrong = f"a lens of {values}"
    if described.plane is not None and wrong is None:
        matrix = np.reshape(described.plane.to_mm, (3, 3))
        if not (np.isfinite(matrix).all() and abs(np.linalg.det(matrix)) > 0):
            wrong = f"a plane of {described.plane.to_mm}"
    if wrong is not None:
        raise ConfigError(f"camera calibration {directory}: {wrong} cannot be; make it again with `kizu camera`")


def _wrong_arrays(gain: NDArray[np.float32], dark: NDArray[np.float32], size: tuple[int, int]) -> str | None:
    if gain.shape != dark.shape or gain.shape[:2] != size or gain.ndim != 3 or gain.shape[2] not in (1, 3):
        return f"gain of {gain.shape} and dark of {dark.shape} for frames of {size}"
    if not (np.isfinite(gain).all() and gain.min() > 0 and gain.max() <= MAX_GAIN):
        return f"gains from {gain.min():g} to {gain.max():g} (expected above 0, at most {MAX_GAIN:g})"
    if not (np.isfinite(dark).all() and dark.min() >= 0 and dark.max() < 255):
        return f"dark values from {dark.min():g} to {dark.max():g} (expected 0 to 255)"
    return None
