"""Which pictures show one part: said by pattern, table or block, and never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from calib.parts import Grouping, find_parts, grouping_of, read_table
from edge.errors import CommandError, DataError


def folder_of(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / "good" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "good" / name).write_bytes(name.encode())
    return tmp_path / "good"


def parts_of(folder: Path, grouping: Grouping) -> dict[str, tuple[str, str]]:
    return {image.name: (image.camera, image.part) for image in find_parts(folder, grouping).images}


def test_every_file_is_a_part_unless_something_else_is_said(tmp_path: Path) -> None:
    """As one who takes one picture a part expects; a folder in it is refused with the option that is missing."""
    folder = folder_of(tmp_path, "b.png", "a.png")
    assert parts_of(folder, Grouping()) == {"a.png": ("", "a.png"), "b.png": ("", "b.png")}

    folder_of(tmp_path, "7/c.png")
    with pytest.raises(DataError, match="--part-pattern"):
        find_parts(folder, Grouping())


def test_a_pattern_reads_part_and_camera_from_the_path(tmp_path: Path) -> None:
    """A folder a part, or a number in the name."""
    folder = folder_of(tmp_path, "7/left_0.png", "7/right_0.png", "8/left_0.png")

    by_folder = parts_of(folder, grouping_of(pattern="(?P<part>[^/]+)/.*"))
    by_both = parts_of(folder, grouping_of(pattern=r"(?P<part>\d+)/(?P<camera>left|right)_.*"))

    assert [part for _, part in by_folder.values()] == ["7", "7", "8"]
    assert by_both["7/right_0.png"] == ("right", "7")


def test_a_file_that_the_pattern_does_not_match_is_refused_by_name(tmp_path: Path) -> None:
    """It would be a part of unknown number."""
    folder = folder_of(tmp_path, "7_a.png", "readme.png")

    with pytest.raises(DataError, match=r"readme\.png.*pattern"):
        find_parts(folder, grouping_of(pattern=r"(?P<part>\d+)_.*"))


def test_a_table_names_the_part_of_every_file(tmp_path: Path) -> None:
    """Columns in any order; a file without a line is refused."""
    folder = folder_of(tmp_path, "a.png", "b.png")
    table = tmp_path / "parts.csv"
    table.write_text("part,file,camera\n12,a.png,left\n12,b.png,right\n")
    assert parts_of(folder, grouping_of(table)) == {"a.png": ("left", "12"), "b.png": ("right", "12")}

    table.write_text("file,part\na.png,12\n")
    with pytest.raises(DataError, match=r"b\.png.*no line"):
        find_parts(folder, grouping_of(table))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "columns none"),
        ("name,number\na.png,1\n", "columns name, number"),
        ("file,part,size\na.png,1,2\n", "columns file, part, size"),
        ("file,part\na.png,\n", "line 2 has an empty cell"),
        ("file,part\na.png\n", "line 2 has an empty cell"),
        ("file,part\na.png,1\na.png,2\n", "line 3 names a.png again"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    """A part that is not what the table's author meant would void the promise."""
    (tmp_path / "parts.csv").write_text(text)

    with pytest.raises(DataError, match=complaint):
        read_table(tmp_path / "parts.csv")


def test_blocks_are_whole_and_spaced(tmp_path: Path) -> None:
    """Three frames, two left out, three frames; the last two are no whole block."""
    folder = folder_of(tmp_path, *(f"{place:02}.png" for place in range(12)))

    found = find_parts(folder, grouping_of(block="3:2"))

    assert [image.part for image in found.images] == ["block 1"] * 3 + ["block 2"] * 3
    assert found.spacing == ("03.png", "04.png", "08.png", "09.png", "10.png", "11.png")
    assert grouping_of(block="3").gap == 3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"block": "0"}, "--block '0'"),
        ({"block": "a"}, "--block 'a'"),
        ({"block": "3", "pattern": "(?P<part>.*)"}, "--part-pattern and --block"),
        ({"pattern": "("}, "regular expression"),
        ({"pattern": "(.*)"}, r"\(\?P<part>"),
        ({"pattern": "(?P<part>.)(?P<day>.*)"}, r"\(\?P<part>"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(options: dict[str, str], complaint: str) -> None:
    """Two ways at once, a block of nothing, a pattern without a part."""
    with pytest.raises(CommandError, match=complaint):
        grouping_of(**options)  # type: ignore[arg-type]


def test_fewer_frames_than_a_block_are_refused(tmp_path: Path) -> None:
    """There is no part at all."""
    with pytest.raises(DataError, match="fewer than one block"):
        find_parts(folder_of(tmp_path, "a.png"), grouping_of(block="2"))
