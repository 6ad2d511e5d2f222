"""Fits what `edge.camera` holds from pictures: flat field, lens, and the inspected plane in millimeters.

Owns finding boards and the fits, with what each must reach; which files and what is written is `camera_command`'s.

The lens is OpenCV's calibration (Zhang, A flexible new technique for camera calibration, 2000) with k1, k2, p1, p2; k3
is left at 0, which an ordinary lens does not need and few pictures cannot hold. The plane is one more picture, of the
board lying where the parts lie: a homography from undistorted pixels to the board's millimeters, so a camera that looks
at an angle is no special case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from edge.camera import MAX_GAIN, Lens, Plane, project, undistorted
from edge.errors import CalibrationError, CommandError
from edge.images import cv2

MIN_VIEWS: Final = 5
MIN_SPREAD: Final = 0.5
"""The share of the frame's width and height that the corners of all views must span."""
MAX_ERROR_PX: Final = 0.5
MIN_CORNERS: Final = 12
SATURATED: Final = 250.0

Points = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Board:
    """A printed board: chessboard with `columns` x `rows` inner corners, or ChArUco with so many squares.

    `square_mm` is a square's side, `marker_mm` a ChArUco marker's; `dictionary` is OpenCV's name of the markers.
    """

    kind: Literal["chessboard", "charuco"]
    columns: int
    rows: int
    square_mm: float
    marker_mm: float = 0.0
    dictionary: str = "DICT_4X4_50"


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """The corners found in one picture: in frame pixels (pixel i covers [i, i + 1)) and on the board in mm, (n, 2)."""

    name: str
    pixels: Points
    board_mm: Points


def parse_board(text: str) -> Board:
    """`chessboard:9x6:2.5`, or `charuco:7x5:4:3[:DICT_5X5_100]`: squares, square and marker in mm.

    Raises:
        CommandError: anything else.
    """
    kind, *rest = text.split(":")
    try:
        columns, rows = map(int, rest[0].lower().split("x"))
        sizes = [float(value) for value in rest[1:3]]
        if kind == "chessboard" and len(rest) == 2 and min(columns, rows) >= 3 and sizes[0] > 0:
            return Board("chessboard", columns, rows, sizes[0])
        if kind == "charuco" and len(rest) in (3, 4) and min(columns, rows) >= 3 and sizes[0] > sizes[1] > 0:
            board = Board("charuco", columns, rows, sizes[0], sizes[1], *rest[3:])
            if hasattr(cv2.aruco, board.dictionary):
                return board
    except (IndexError, ValueError):
        pass
    raise CommandError(
        f"--board {text}: expected chessboard:COLUMNSxROWS:SQUARE_MM, counting inner corners (chessboard:9x6:2.5), or "
        "charuco:COLUMNSxROWS:SQUARE_MM:MARKER_MM[:DICTIONARY], counting squares (charuco:7x5:4:3:DICT_4X4_50)"
    )


def find_board(image: NDArray[np.uint8], board: Board, name: str = "") -> View | None:
    """The board's corners in `image` (H, W, C) uint8; None where it cannot be seen, wholly if it is a chessboard."""
    color = image.shape[2] == 3
    gray = np.ascontiguousarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if color else image[:, :, 0], np.uint8)
    found = _chessboard(gray, board) if board.kind == "chessboard" else _charuco(gray, board)
    if found is None:
        return None
    pixels, board_mm = found
    # OpenCV's whole numbers are pixel centers; ours lie half a pixel from where a pixel begins.
    return View(name, np.asarray(pixels, np.float64).reshape(-1, 2) + 0.5, board_mm)


def fit_lens(views: Sequence[View], size: tuple[int, int], *, max_error_px: float = MAX_ERROR_PX) -> Lens:
    """The lens that sees all `views` as they are, for frames of `size` (height, width).

    Raises:
        CalibrationError: too few views, too small a part of the frame, all of them parallel, or an error above
            `max_error_px`.
    """
    if len(views) < MIN_VIEWS:
        raise CalibrationError(
            f"the board was found in {len(views)} pictures, a lens needs at least {MIN_VIEWS}: take more, with the "
            "board tilted to all sides and reaching into the frame's corners"
        )
    _require_spread(views, size)
    height, width = size
    error, matrix, distortion, _, _ = cv2.calibrateCamera(
        [np.column_stack((view.board_mm, np.zeros(len(view.board_mm)))).astype(np.float32) for view in views],
        [(view.pixels - 0.5).astype(np.float32) for view in views],
        (width, height),
        np.eye(3),
        np.zeros(5),
        flags=cv2.CALIB_FIX_K3,
    )
    if not (math.isfinite(error) and error <= max_error_px):
        raise CalibrationError(
            f"the board's corners miss their places by {error:.3g} px (root mean square), at most {max_error_px:g} is "
            "accepted: is the board flat, its size right, the focus fixed, every picture sharp?"
        )
    k1, k2, p1, p2, k3 = np.ravel(distortion)[:5].tolist()
    (fx, _, cx), (_, fy, cy), _ = np.asarray(matrix).tolist()
    return Lens((fx, fy, cx, cy), (k1, k2, p1, p2, k3), float(error), len(views))


def fit_plane(view: View, size: tuple[int, int], lens: Lens | None, *, max_error_px: float = MAX_ERROR_PX) -> Plane:
    """The plane in which the board lay when `view` was taken, for frames of `size` (height, width).

    Raises:
        CalibrationError: the corners miss their places by more than `max_error_px`.
    """
    straight = undistorted(view.pixels, lens)
    homography, _ = cv2.findHomography(straight, view.board_mm)
    if homography is None:
        raise CalibrationError(f"{view.name}: the board's corners lie on a line; take the picture again")
    homography = _from_corner(np.asarray(homography, np.float64), size, lens)
    error_mm = float(np.sqrt(((_like(project(homography, straight), view.board_mm)) ** 2).sum(axis=1).mean()))
    scale = _scale_at(homography, straight.mean(axis=0))
    if error_mm / scale > max_error_px:
        raise CalibrationError(
            f"{view.name}: the board's corners miss their places by {error_mm / scale:.3g} px, at most "
            f"{max_error_px:g} is accepted"
            + ("" if lens is not None else ": without --views the lens's distortion is not known; give them")
        )
    a, b, c, d, e, f, g, h, i = homography.ravel().tolist()
    return Plane((a, b, c, d, e, f, g, h, i), error_mm)


def stated_plane(mm_per_px: float) -> Plane:
    """A plane seen squarely, of which the scale is known otherwise.

    Raises:
        CommandError: the scale is not positive.
    """
    if not 0 < mm_per_px < 1e6:
        raise CommandError(f"--mm-per-px {mm_per_px}: expected millimeters per pixel, above 0")
    return Plane((mm_per_px, 0.0, 0.0, 0.0, mm_per_px, 0.0, 0.0, 0.0, 1.0))


def fit_flat_field(
    flat: Sequence[NDArray[np.uint8]], dark: Sequence[NDArray[np.uint8]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Gain and dark value of every pixel (H, W, C) float32, from pictures of an even target and of no light at all.

    Without dark pictures the dark value is 0. Each channel keeps its mean, so a color stays what it is.

    Raises:
        CalibrationError: no flat picture, sizes differ, the flat ones are saturated, or a pixel has hardly any light.
    """
    if not flat:
        raise CalibrationError("a flat field needs pictures of an even, evenly lit target; give a folder of them")
    shapes = {image.shape for image in (*flat, *dark)}
    if len(shapes) > 1:
        raise CalibrationError(
            f"flat and dark pictures are of different shapes: {sorted(shapes)}; one camera, one size"
        )
    mean = np.mean(np.stack(flat), axis=0, dtype=np.float64)
    black = np.mean(np.stack(dark), axis=0, dtype=np.float64) if dark else np.zeros_like(mean)
    if (share := float((mean >= SATURATED).mean())) > 0:
        raise CalibrationError(
            f"{share:.2%} of the flat pictures' values are at or near 255: what is saturated says nothing about "
            "the light; expose so that the brightest pixel stays below 250"
        )
    light = mean - black
    level = light.mean(axis=(0, 1))
    with np.errstate(divide="ignore"):
        gain = level / np.maximum(light, 0)
    if weak := int((gain > MAX_GAIN).sum()):
        y, x, _ = np.unravel_index(int(np.argmax(gain)), gain.shape)
        raise CalibrationError(
            f"{weak} pixels get less than 1/{MAX_GAIN:g} of the mean light, the darkest at ({x}, {y}): that is a dead "
            "pixel, dirt or a shadow, not uneven light; clean the target and the lens, or light it better"
        )
    return np.asarray(gain, np.float32), np.asarray(black, np.float32)


# --- boards -----------------------------------------------------------------------------------------------------------

_Found = tuple[NDArray[np.float32], Points]


def _chessboard(gray: NDArray[np.uint8], board: Board) -> _Found | None:
    flags = cv2.CALIB_CB_ACCURACY | cv2.CALIB_CB_EXHAUSTIVE
    there, corners = cv2.findChessboardCornersSB(gray, (board.columns, board.rows), flags=flags)
    if not there:
        return None
    columns, rows = np.meshgrid(np.arange(board.columns), np.arange(board.rows))
    places = np.stack((columns.ravel(), rows.ravel()), axis=1) * board.square_mm
    return np.asarray(corners, np.float32), np.asarray(places, np.float64)


def _charuco(gray: NDArray[np.uint8], board: Board) -> _Found | None:
    dictionary = cv2.aruco.getPredefinedDictionary(getattr(cv2.aruco, board.dictionary))
    size = (board.columns, board.rows)
    printed = cv2.aruco.CharucoBoard(size, board.square_mm, board.marker_mm, dictionary)
    corners, ids, _, _ = cv2.aruco.CharucoDetector(printed).detectBoard(gray)
    if corners is None or ids is None or len(ids) < MIN_CORNERS:
        return None
    places = np.asarray(printed.getChessboardCorners(), np.float64)[:, :2]
    return np.asarray(corners, np.float32), np.asarray(places[np.ravel(ids)], np.float64)


def _require_spread(views: Sequence[View], size: tuple[int, int]) -> None:
    every = np.concatenate([view.pixels for view in views])
    spans = np.ptp(every, axis=0) / (size[1], size[0])
    if spans.min() < MIN_SPREAD:
        raise CalibrationError(
            f"all pictures together show the board in {spans[0]:.0%} of the frame's width and {spans[1]:.0%} of its "
            f"height, at least {MIN_SPREAD:.0%} of both are needed: hold it into the corners too"
        )


def _from_corner(homography: Points, size: tuple[int, int], lens: Lens | None) -> Points:
    """The same plane with (0, 0) mm at the frame's top left corner and x along its top edge, y down."""
    height, width = size
    seen = undistorted(np.array([(0.0, 0.0), (width, 0.0), (0.0, height)]), lens)
    origin, right, below = project(homography, seen)
    x = (right - origin) / np.hypot(*(right - origin))
    y = np.array((-x[1], x[0]))
    if y @ (below - origin) < 0:  # the board's axes are the mirror image of the frame's
        y = -y
    turned = np.stack((x, y))
    move = np.eye(3)
    move[:2, :2], move[:2, 2] = turned, -turned @ origin
    moved = move @ homography
    return np.asarray(moved / moved[2, 2])


def _like(measured: Points, wanted: Points) -> Points:
    """What is left of `measured` - `wanted` after the best rotation, reflection and shift (Kabsch, 1976)."""
    one, other = measured - measured.mean(axis=0), wanted - wanted.mean(axis=0)
    u, _, v = np.linalg.svd(one.T @ other)
    return np.asarray(one @ (u @ v) - other)


def _scale_at(homography: Points, point: Points) -> float:
    """Millimeters a pixel at `point`."""
    near = project(homography, point + np.array([(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]))
    (a, b), (c, d) = near[1] - near[0], near[2] - near[0]
    return math.sqrt(abs(a * d - b * c))
