"""`kizu camera` and `kizu correct`: from folders of pictures to a calibration that the runtime opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calib.camera_command import camera
from calib.correct_command import correct
from edge.camera import DARK, FILE, GAIN, CameraCalibration, Lens, open_camera, write_camera
from edge.errors import CalibrationError, CommandError, ConfigError, DataError
from edge.images import encode_png, read_image
from edge.stages.flatfield import flat_field_of
from rendering import Pose, Renderer, chessboard

Invoke = Callable[..., Any]
SIZE = (240, 320)
SMALL = Lens((260.0, 258.0, 161.0, 118.0), (-0.15, 0.03, 0.0, 0.0, 0.0), 0.0, 0)
POSES = [
    Pose((0, 0, 0), (-20, -15, 65)),
    Pose((25, 0, 5), (-28, -20, 66)),
    Pose((-25, 5, 0), (-14, -12, 66)),
    Pose((0, 28, -5), (-26, -12, 68)),
    Pose((5, -28, 0), (-16, -22, 62)),
]


def save(folder: Path, pictures: list[NDArray[np.uint8]]) -> Path:
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        (folder / f"{index:02}.png").write_bytes(encode_png(picture))
    return folder


@pytest.fixture(scope="module")
def board_pictures() -> list[NDArray[np.uint8]]:
    render = Renderer(SMALL, SIZE, finer=3)
    return [render(chessboard(9, 7, 5.0), pose) for pose in POSES]


def shaded(level: float, number: int = 4) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(int(level))
    rows, columns = np.mgrid[0 : SIZE[0], 0 : SIZE[1]]
    light = (1 - ((rows - 120) ** 2 + (columns - 160) ** 2) / 80_000)[:, :, None]
    return [
        np.clip(np.rint(8 + level * light + rng.normal(0, 1, light.shape)), 0, 255).astype(np.uint8)
        for _ in range(number)
    ]


def test_one_command_makes_the_whole_calibration(
    tmp_path: Path, invoke: Invoke, board_pictures: list[NDArray[np.uint8]]
) -> None:
    """Lens from five tilted views, scale from the board lying there, flat field; the runtime opens what was written."""
    views, flat, dark = (
        save(tmp_path / name, pictures)
        for name, pictures in (("views", board_pictures), ("flat", shaded(150)), ("dark", shaded(0)))
    )
    out = tmp_path / "left.camera"

    result = invoke(
        camera, "--out", out, "--board", "chessboard:9x7:5", "--views", views, "--plane", views / "00.png",
        "--flat", flat, "--dark", dark, "--json",
    )  # fmt: skip

    facts, opened = json.loads(result.stdout), open_camera(out)
    assert facts["calibration_id"] == opened.id and opened.size == SIZE
    assert facts["lens"]["error_px"] < 0.2 and facts["lens"]["without_board"] == []
    assert facts["scale"]["mm_per_px"] == pytest.approx(65 / 260, rel=0.01)
    flattened = np.mean([flat_field_of(opened)(image) for image in shaded(100, 8)], axis=0)
    assert flattened.std() < 1


def test_a_scale_alone_needs_only_a_picture_for_its_size(tmp_path: Path, invoke: Invoke) -> None:
    """The common case: a camera that looks squarely through a good lens."""
    like = save(tmp_path / "any", shaded(100, 1)) / "00.png"

    invoke(camera, "--out", tmp_path / "c", "--mm-per-px", "0.05", "--like", like)

    opened = open_camera(tmp_path / "c")
    np.testing.assert_allclose(opened.to_mm(np.array([(100.0, 40.0)])), [(5.0, 2.0)])
    assert opened.gain is None and opened.lens is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing to calibrate"),
        (["--views", "v"], "--board goes together"),
        (["--board", "chessboard:9x7:5", "--flat", "f"], "--board goes together"),
        (["--mm-per-px", "0.1", "--plane", "p", "--board", "chessboard:9x7:5"], "both say the scale"),
        (["--mm-per-px", "0.1"], "give any picture of it with --like"),
        (["--mm-per-px", "-1"], "expected millimeters per pixel"),
        (["--mm-per-px", "0.1", "--dark", "d"], "--dark says nothing without --flat"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, invoke: Invoke, options: list[str], words: str
) -> None:
    """Before any picture is read."""
    with pytest.raises(CommandError, match=words):
        invoke(camera, "--out", tmp_path / "c", *options)

    assert not (tmp_path / "c").exists()


def test_pictures_of_two_sizes_are_refused(
    tmp_path: Path, invoke: Invoke, board_pictures: list[NDArray[np.uint8]]
) -> None:
    """A calibration is for one camera at one size; the odd one is named."""
    views = save(tmp_path / "views", [*board_pictures, board_pictures[0][:200]])

    with pytest.raises(DataError, match=r"05.png is 320 x 200 px, the pictures before it 320 x 240"):
        invoke(camera, "--out", tmp_path / "c", "--board", "chessboard:9x7:5", "--views", views)


def test_a_picture_without_the_board_is_named(
    tmp_path: Path, invoke: Invoke, board_pictures: list[NDArray[np.uint8]]
) -> None:
    """Among the views it is passed over and told; as the plane it is refused."""
    views = save(tmp_path / "views", [*board_pictures, shaded(100, 1)[0]])
    given = ["--board", "chessboard:9x7:5", "--views", views]

    result = invoke(camera, "--out", tmp_path / "c", *given)

    assert "no board seen in 05.png" in result.stdout
    with pytest.raises(CalibrationError, match=r"05.png: the board chessboard of 9 x 7 is not seen"):
        invoke(camera, "--out", tmp_path / "d", *given, "--plane", views / "05.png")


def test_correct_applies_what_the_daemon_applies(tmp_path: Path, invoke: Invoke) -> None:
    """Recorded pictures, subfolders kept; masks are copied, for they are no pictures of light."""
    flat = save(tmp_path / "flat", shaded(150))
    invoke(camera, "--out", tmp_path / "c", "--flat", flat)
    raw = shaded(90, 1)[0]
    save(tmp_path / "data" / "train" / "good", [raw])
    save(tmp_path / "data" / "ground_truth" / "hole", [raw])

    invoke(correct, tmp_path / "c", "--images", tmp_path / "data", "--out", tmp_path / "even")

    known = flat_field_of(open_camera(tmp_path / "c"))
    assert known is not None
    np.testing.assert_array_equal(read_image(tmp_path / "even" / "train" / "good" / "00.png"), known(raw))
    np.testing.assert_array_equal(read_image(tmp_path / "even" / "ground_truth" / "hole" / "00.png"), raw)


def test_correct_refuses_what_it_cannot_correct(tmp_path: Path, invoke: Invoke) -> None:
    """A calibration without a flat field, a picture of another size, an output that exists."""
    like = save(tmp_path / "any", shaded(100, 1))
    invoke(camera, "--out", tmp_path / "scale", "--mm-per-px", "0.05", "--like", like / "00.png")
    invoke(camera, "--out", tmp_path / "flat", "--flat", like)
    other = save(tmp_path / "other", [np.zeros((8, 8, 1), np.uint8)])

    with pytest.raises(CommandError, match="has no flat field"):
        invoke(correct, tmp_path / "scale", "--images", like, "--out", tmp_path / "x")
    with pytest.raises(DataError, match=r"00.png: frame of 8 x 8 px"):
        invoke(correct, tmp_path / "flat", "--images", other, "--out", tmp_path / "x")
    with pytest.raises(CommandError, match="exists already"):
        invoke(correct, tmp_path / "flat", "--images", like, "--out", like)


# --- the directory ----------------------------------------------------------------------------------------------------


def written(path: Path) -> CameraCalibration:
    ones = np.ones((4, 6, 1), np.float32)
    return write_camera(path, size=(4, 6), gain=ones, dark=ones * 0)


def test_a_changed_calibration_is_refused(tmp_path: Path) -> None:
    """One bit of a gain, a missing file, a file too many, another schema, no JSON: each names the place."""
    changes: list[tuple[Callable[[Path], object], str]] = [
        (lambda c: (c / GAIN).write_bytes((c / GAIN).read_bytes()[:-1] + b"\1"), "gain.npy was changed"),
        (lambda c: (c / DARK).unlink(), "do not agree"),
        (lambda c: (c / "more").write_bytes(b""), "do not agree"),
        (lambda c: (c / FILE).write_text("{}"), "is not as expected"),
        (lambda c: (c / FILE).write_text((c / FILE).read_text().replace('n": 1', 'n": 2')), "has schema 2"),
        (lambda c: (c / FILE).unlink(), "cannot be read"),
    ]
    for index, (change, words) in enumerate(changes):
        written(tmp_path / str(index))
        change(tmp_path / str(index))

        with pytest.raises(ConfigError, match=words):
            open_camera(tmp_path / str(index))


def test_any_damage_is_refused_or_read_but_never_a_crash(tmp_path: Path) -> None:
    """Bytes changed anywhere in any file: a message, or (a digit of the description) another calibration."""
    known, rng = written(tmp_path / "c"), np.random.default_rng(3)
    for file in sorted((tmp_path / "c").iterdir()):
        whole = file.read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
            file.write_bytes(data)
            try:
                assert data == whole or open_camera(tmp_path / "c").id != known.id
            except ConfigError:
                assert data != whole
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("gain", "dark", "words"),
    [(0.0, 0.0, "gains from 0"), (9.0, 0.0, "at most 8"), (np.nan, 0.0, "gains"), (1.0, 300.0, "dark values"),
     (1.0, -1.0, "dark values")],
)  # fmt: skip
def test_a_flat_field_that_cannot_be_is_never_written(tmp_path: Path, gain: float, dark: float, words: str) -> None:
    """What the daemon would have to refuse at the next start."""
    ones = np.ones((4, 6, 1), np.float32)

    with pytest.raises(ConfigError, match=words):
        write_camera(tmp_path / "c", size=(4, 6), gain=ones * np.float32(gain), dark=ones * np.float32(dark))

    assert not (tmp_path / "c").exists()
