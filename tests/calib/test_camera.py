"""Camera calibration against a camera that is known exactly: rendered boards and lines of known millimeters."""

from __future__ import annotations

import numpy as np
import pytest

from calib import camera as fitting
from calib.camera import Board, View, find_board, fit_flat_field, fit_lens, fit_plane, parse_board, stated_plane
from edge.camera import CameraCalibration, distorted, undistorted
from edge.errors import CalibrationError, CommandError
from edge.masks import RunLength
from edge.stages.measure import Measure
from edge.types import DefectRegion
from rendering import LENS, Pose, Renderer, chessboard, dark_regions, line

SIZE = (480, 640)
BOARD = Board("chessboard", 9, 7, 5.0)
POSES = [
    Pose((0, 0, 0), (-20, -15, 60)),
    Pose((25, 0, 5), (-28, -20, 62)),
    Pose((-25, 5, 0), (-14, -12, 60)),
    Pose((0, 28, -5), (-26, -12, 62)),
    Pose((5, -28, 0), (-16, -22, 58)),
    Pose((15, 15, 90), (18, -20, 58)),
    Pose((-15, 12, 45), (0, -30, 70)),
]
LYING = Pose((8, -6, 12), (-16, -18, 56))
"""How the camera looks at the parts: not squarely."""


@pytest.fixture(scope="module")
def render() -> Renderer:
    return Renderer(LENS, SIZE)


@pytest.fixture(scope="module")
def render_finely() -> Renderer:
    """Nine rays a pixel: none is ever covered by exactly a half, which would make every region a little larger."""
    return Renderer(LENS, SIZE, finer=3)


@pytest.fixture(scope="module")
def views(render: Renderer) -> list[View]:
    found = [find_board(render(chessboard(9, 7, 5.0), pose), BOARD, str(pose)) for pose in POSES]
    assert all(found)
    return [view for view in found if view is not None]


@pytest.fixture(scope="module")
def calibration(render: Renderer, views: list[View]) -> CameraCalibration:
    lens = fit_lens(views, SIZE)
    lying = find_board(render(chessboard(9, 7, 5.0), LYING), BOARD, "lying")
    assert lying is not None
    return CameraCalibration("id", SIZE, lens=lens, plane=fit_plane(lying, SIZE, lens))


def measure(image: np.ndarray, calibration: CameraCalibration) -> DefectRegion:
    """What the runtime says of the dark region in `image`."""
    mask = RunLength.from_mask(dark_regions(image))
    return Measure(calibration).measured(DefectRegion(mask.box_xyxy, mask.area_px, 1.0, mask)).region


LINES = [
    ((2.0, 2.0), (22.0, 2.0)),
    ((-6.0, -2.0), (42.0, -1.0)),
    ((-6.0, -4.0), (-5.0, 28.0)),
    ((42.0, 30.0), (20.0, 8.0)),
    ((38.0, -2.0), (44.0, 25.0)),
    ((12.0, 12.0), (17.0, 16.0)),
]
WIDTH_MM = 2.0


def errors(render: Renderer, calibration: CameraCalibration) -> list[float]:
    """By how much each line's length is measured wrongly, relative, and its area with it."""
    found = []
    for start, stop in LINES:
        region = measure(render(line(start, stop, WIDTH_MM), LYING), calibration)
        true = float(np.hypot(*np.subtract(stop, start)))
        assert region.length_mm is not None and region.area_mm2 is not None
        # The longest distance in a line with flat ends is its diagonal.
        found.append(
            max(abs(region.length_mm / np.hypot(true, WIDTH_MM) - 1), abs(region.area_mm2 / (WIDTH_MM * true) - 1))
        )
    return found


def test_lines_of_known_millimeters_are_measured_within_two_percent(
    render_finely: Renderer, calibration: CameraCalibration
) -> None:
    """Six lines of 6 to 48 mm anywhere in the frame, seen at an angle through a distorting lens: length and area."""
    assert max(errors(render_finely, calibration)) < 0.02


@pytest.mark.parametrize("without", ["lens", "angle"])
def test_a_calibration_that_leaves_something_out_is_noticed(
    render_finely: Renderer, calibration: CameraCalibration, without: str
) -> None:
    """Control: without the lens, or with one scale for the whole frame, some line is off by more than the 2 %."""
    scale = calibration.mm_per_px(320, 240)
    crippled = {
        "lens": CameraCalibration("id", SIZE, plane=calibration.plane),
        "angle": CameraCalibration("id", SIZE, lens=calibration.lens, plane=stated_plane(scale)),
    }[without]

    assert max(errors(render_finely, crippled)) > 0.02


def test_the_lens_is_found(views: list[View]) -> None:
    """Focal lengths and center to a few pixels, corners to a tenth of one."""
    lens = fit_lens(views, SIZE)

    np.testing.assert_allclose(lens.matrix, LENS.matrix, atol=3)
    assert lens.error_px < 0.1 and lens.views == len(POSES)
    corners = np.array([(5.0, 5.0), (635.0, 5.0), (5.0, 475.0), (635.0, 475.0)])
    np.testing.assert_allclose(undistorted(corners, lens), undistorted(corners, LENS), atol=3)


def test_the_origin_is_the_frames_corner(calibration: CameraCalibration) -> None:
    """Zones in mm are written by somebody who looks at the picture: x to the right from the top left, y down."""
    origin, right, below = calibration.to_mm(np.array([(0.0, 0.0), (640.0, 0.0), (0.0, 480.0)]))

    np.testing.assert_allclose(origin, 0, atol=1e-9)
    assert right[0] > 50 and abs(right[1]) < 1e-9 and below[1] > 30


def test_undistorting_undoes_the_distortion_everywhere() -> None:
    """To a millionth of a pixel, far corners included."""
    points = np.random.default_rng(0).uniform((0, 0), (640, 480), (500, 2))

    np.testing.assert_allclose(distorted(undistorted(points, LENS), LENS), points, atol=1e-6)


def test_a_charuco_board_may_be_seen_in_part() -> None:
    """What reaches into the frame's corners is what a lens needs most."""
    board = parse_board("charuco:9x7:5:3.6:DICT_4X4_50")
    cv2 = fitting.cv2
    printed = cv2.aruco.CharucoBoard((9, 7), 5.0, 3.6, cv2.aruco.getPredefinedDictionary(cv2.aruco.DICT_4X4_50))
    image = printed.generateImage((900, 700))
    whole = find_board(np.ascontiguousarray(image)[:, :, None], board)
    part = find_board(np.ascontiguousarray(image[:, 300:])[:, :, None], board)

    assert whole is not None and len(whole.pixels) == 8 * 6
    assert part is not None and 12 <= len(part.pixels) < 8 * 6
    plane = fit_plane(whole, (700, 900), None)
    assert plane.error_mm is not None and plane.error_mm < 0.02
    np.testing.assert_allclose(np.diag(np.reshape(plane.to_mm, (3, 3)))[:2], 0.05, rtol=0.002)


def test_a_wrong_board_is_refused_by_its_error(views: list[View]) -> None:
    """Corners that are not where the board says: half of one picture is printed 4 % larger."""
    bent = View(views[0].name, views[0].pixels, views[0].board_mm * np.where(views[0].board_mm > 20, 1.04, 1.0))

    with pytest.raises(CalibrationError, match=r"miss their places by .* at most 0.05 is accepted"):
        fit_lens([bent, *views[1:]], SIZE, max_error_px=0.05)


def test_too_few_or_too_small_views_are_refused(views: list[View]) -> None:
    """A lens that was seen in the middle only is a guess in the corners."""
    middle = [View(view.name, 320 + (view.pixels - (320, 240)) / 4, view.board_mm) for view in views]

    with pytest.raises(CalibrationError, match="found in 4 pictures, a lens needs at least 5"):
        fit_lens(views[:4], SIZE)
    with pytest.raises(CalibrationError, match="of the frame's width"):
        fit_lens(middle, SIZE)


def test_a_distorted_plane_without_its_lens_is_refused(render: Renderer) -> None:
    """A homography cannot bend: the corners tell."""
    lying = find_board(render(chessboard(9, 7, 5.0), Pose((0, 0, 0), (-20, -15, 50))), BOARD, "lying.png")
    assert lying is not None

    with pytest.raises(CalibrationError, match=r"lying.png: .*without --views"):
        fit_plane(lying, SIZE, None)


def test_no_board_is_no_view() -> None:
    """Noise is not taken for corners."""
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 1), dtype=np.uint8)

    assert find_board(noise, BOARD) is None
    assert find_board(noise, parse_board("charuco:7x5:4:3")) is None


@pytest.mark.parametrize(
    "text",
    ["", "chessboard", "chessboard:9x6", "chessboard:9x6:0", "chessboard:2x2:5", "chessboard:9x:1", "charuco:7x5:3:4",
     "charuco:7x5:4:3:DICT_NONE", "dots:3x3:1"],
)  # fmt: skip
def test_a_board_that_cannot_be_is_refused(text: str) -> None:
    """The message shows both forms."""
    with pytest.raises(CommandError, match=r"chessboard:9x6:2.5.*charuco:7x5:4:3"):
        parse_board(text)


# --- flat field -------------------------------------------------------------------------------------------------------


def uneven(level: float, seed: int, number: int = 8) -> list[np.ndarray]:
    """Pictures of an even target of `level` under light that falls off to the corners, with noise and a dark offset."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:60, 0:80]
    light = 1 - ((rows - 30) ** 2 + (columns - 40) ** 2) / 6000
    seen = 12 + level * light[:, :, None]
    return [np.clip(np.rint(seen + rng.normal(0, 1, seen.shape)), 0, 255).astype(np.uint8) for _ in range(number)]


def test_a_flat_field_makes_another_level_even() -> None:
    """Fitted at one brightness, it holds at another: residual unevenness far below what was there."""
    from edge.stages.flatfield import FlatField

    gain, dark = fit_flat_field(uneven(180, 1), uneven(0, 2))
    other = np.mean([FlatField(gain, dark)(image) for image in uneven(90, 3, 16)], axis=0)

    assert np.ptp(np.mean(uneven(90, 3, 16), axis=0)) > 30
    assert other.std() < 0.6 and np.ptp(other) < 5


@pytest.mark.parametrize(
    ("flat", "dark", "words"),
    [
        ([], [], "needs pictures of an even"),
        ([np.full((4, 4, 1), 255, np.uint8)], [], "at or near 255"),
        ([np.full((4, 4, 1), 90, np.uint8)], [np.zeros((4, 5, 1), np.uint8)], "different shapes"),
        ([np.where(np.eye(8)[:, :, None] * np.eye(8)[3][:, None, None] > 0, 1, 200).astype(np.uint8)], [],
         r"1 pixels get less than 1/8 .*at \(3, 3\)"),
    ],
)  # fmt: skip
def test_a_flat_field_that_nothing_can_follow_from_is_refused(
    flat: list[np.ndarray], dark: list[np.ndarray], words: str
) -> None:
    """A saturated or shadowed target would write its own picture into every frame."""
    with pytest.raises(CalibrationError, match=words):
        fit_flat_field(flat, dark)
