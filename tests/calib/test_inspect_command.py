"""`kizu inspect BUNDLE IMAGE|DIR`: map, mask and verdict of a file at once, as the line would judge it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from calib.inspect_command import inspect, preview
from edge.bundle import ModelBundle
from edge.errors import CommandError
from edge.images import read_image

Invoke = Callable[..., Any]


@pytest.fixture
def run(invoke: Invoke, make_fake_bundle: Callable[..., ModelBundle], tmp_path: Path) -> Callable[..., Any]:
    """Inspect with the fake engine, which sees light spots."""
    calibration = msgspec.structs.replace(
        make_fake_bundle(tmp_path / "high").calibration, threshold=0.5, pixel_threshold=0.5
    )
    bundle = make_fake_bundle(tmp_path / "bundle", calibration=calibration).path
    return lambda *given: invoke(inspect, bundle, *given, "--backend", "fake")


def test_each_image_gets_a_line_and_a_picture(run: Invoke, test_folder: Path, tmp_path: Path) -> None:
    """Photograph, map and regions side by side; two files of one name do not overwrite each other."""
    out = tmp_path / "pictures"

    lines = run(test_folder / "test" / "hole", test_folder / "test" / "stain" / "000.png", "--out", out).stdout

    assert lines.count("REJECT") == 5 and "000.png" in lines and f"6 images; pictures in {out}" in lines
    written = sorted(out.iterdir())
    assert written[0].name == "0000-000.png" and written[-1].name == "0005-000.png"
    picture = read_image(written[0], channels=3)
    height, width = picture.shape[:2]
    side = (width - 8) // 3
    photo, marked = picture[:, :side], picture[:, -side:]
    red = (marked[..., 0] > 200) & (marked[..., 1] < 60)
    # The hole is rows 20 to 39, columns 30 to 49 of a picture of 64 x 96.
    rows, columns = np.nonzero(red)
    assert height == 64 and abs(rows.min() - 20) <= 3 and abs(columns.max() - 49) <= 3
    assert not ((photo[..., 0] > 200) & (photo[..., 1] < 60)).any()


def test_json_has_one_object_a_line_with_regions(run: Invoke, test_folder: Path) -> None:
    """For programs: decision, score, boxes."""
    output = run(test_folder / "test" / "hole", "--json").stdout
    rows = [json.loads(line) for line in output.splitlines()]

    assert [row["decision"] for row in rows] == ["reject"] * 5
    x0, y0, x1, y1 = rows[0]["regions"][0]["box_xyxy"]
    assert (x0 + x1) / 2 == pytest.approx(40, abs=3) and (y0 + y1) / 2 == pytest.approx(30, abs=3)


def test_a_file_that_is_no_image_is_inconclusive_and_the_next_one_follows(run: Invoke, test_folder: Path) -> None:
    """As on the line: the answer says why, and nothing stops."""
    (test_folder / "test" / "hole" / "000.png").write_bytes(b"no picture")

    lines = run(test_folder / "test" / "hole").stdout.splitlines()

    assert lines[0].startswith("INCONCLUSIVE") and "000.png" in lines[0]
    assert sum(line.startswith("REJECT") for line in lines) == 4


def test_a_picture_can_be_drawn_into_the_terminal(run: Invoke, test_folder: Path) -> None:
    """Half blocks in 24-bit color."""
    assert "▀" in run(test_folder / "test" / "hole" / "000.png", "--show").stdout
    lines = preview(np.zeros((50, 96, 3), np.uint8)).splitlines()
    assert len(lines) == 25 and lines[0].count("▀") == 96


def test_what_cannot_be_inspected_is_refused_with_the_next_step(run: Invoke, tmp_path: Path) -> None:
    """Nothing there, an empty folder, pictures of nothing, a folder that is a file."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for given, message in (
        ([tmp_path / "gone.png"], "no such file or folder"),
        ([tmp_path / "empty"], "no image in it"),
        (["--out", tmp_path / "o"], "name some"),
        ([tmp_path / "file", "--out", tmp_path / "file" / "x"], "give a folder that can be written"),
    ):
        with pytest.raises(CommandError, match=message):
            run(*given)
