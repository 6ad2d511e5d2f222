"""Which pictures show one part: what a promise counts is parts, and frames of one part are not exchangeable.

Owns how parts are recognized; which images may count at all is `sample`. Three ways, and no guess:

    an image            every file is a part of its own: one picture a part was taken
    a part              by a pattern over the file's path, or a table FILE.csv with the columns file, part and camera
    a block             N frames one after another, by name, stand for one part; GAP frames between two are left out

A block is for lines without part numbers, and for webs: frames next to each other are alike, so blocks are spaced by as
many frames as the likeness lasts. The last block counts only if it is whole: the maximum of fewer frames is lower.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from calib.dataset import good_images
from edge.errors import CommandError, DataError

Unit = Literal["image", "part", "block"]

NAMED = 3
"""Files listed in a refusal; the others are counted."""

COLUMNS = ("file", "part")
OPTIONAL_COLUMN = "camera"


@dataclass(frozen=True, slots=True)
class PartImage:
    """One file: `name` is its path within the folder with slashes, `part` whose picture it is, by which `camera`.

    `camera` is "" where cameras are not told apart.
    """

    path: Path
    name: str
    part: str
    camera: str = ""


@dataclass(frozen=True, slots=True)
class Grouping:
    """How files become parts; `block` and `gap` are frames, `rows` maps a file's name to (part, camera)."""

    unit: Unit = "image"
    pattern: re.Pattern[str] | None = None
    rows: Mapping[str, tuple[str, str]] | None = None
    block: int = 1
    gap: int = 0

    @property
    def words(self) -> str:
        """For people: what one part is."""
        if self.unit == "block":
            return f"a block of {self.block} frames by name, {self.gap} frames between two left out"
        if self.unit == "image":
            return "an image: every file is taken for another part"
        return f"by pattern {self.pattern.pattern}" if self.pattern is not None else "by a table of files"


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The images that count, by name, and the names of those that lie between blocks."""

    images: tuple[PartImage, ...]
    spacing: tuple[str, ...] = ()


def grouping_of(parts: Path | None = None, pattern: str | None = None, block: str | None = None) -> Grouping:
    """Return the grouping that the options `--parts`, `--part-pattern` and `--block` ask for.

    Raises:
        CommandError: more than one is given, or one of them is malformed.
        DataError: the table cannot be read.
    """
    given = [name for name, value in (("--parts", parts), ("--part-pattern", pattern), ("--block", block)) if value]
    if len(given) > 1:
        raise CommandError(f"{' and '.join(given)}: give one of them; each says which pictures show one part")
    if parts is not None:
        return Grouping("part", rows=read_table(parts))
    if pattern is not None:
        return Grouping("part", pattern=_compiled(pattern))
    return Grouping() if block is None else _blocks(block)


def find_parts(folder: Path, grouping: Grouping) -> Found:
    """Return the images in `folder`, each with its part.

    Raises:
        DataError: no folder or nothing in it, a folder where files are expected, or a file whose part is not known.
    """
    if grouping.unit == "part":
        return Found(tuple(_named_parts(folder, grouping)))
    paths = good_images(folder)
    if folders := [path.name for path in paths if path.is_dir()]:
        raise DataError(
            f"{folder} holds folders ({_few(folders)}); say which pictures show one part, such as a folder a part: "
            "--part-pattern '(?P<part>[^/]+)/.*'"
        )
    if grouping.unit == "image":
        return Found(tuple(PartImage(path, path.name, path.name) for path in paths))
    return _in_blocks(paths, grouping)


def read_table(path: Path) -> dict[str, tuple[str, str]]:
    """Return {file: (part, camera)} of a CSV with a header; camera is "" without such a column.

    Raises:
        DataError: it cannot be read, a column is missing or unknown, a cell is empty, or a file is named twice.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--parts {path}: {error}; expected a CSV file with the columns file,part[,camera]") from None
    columns = list(lines[0]) if lines else []
    if not lines or any(column not in columns for column in COLUMNS) or set(columns) - {*COLUMNS, OPTIONAL_COLUMN}:
        raise DataError(
            f"--parts {path}: columns {', '.join(map(str, columns)) or 'none'}; the first line must be file,part or "
            "file,part,camera, and one line a picture follows"
        )
    rows: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(lines, start=2):
        if not all(line.get(column) for column in columns):
            raise DataError(
                f"--parts {path}: line {number} has an empty cell; every picture needs {', '.join(columns)}"
            )
        if line["file"] in rows:
            raise DataError(f"--parts {path}: line {number} names {line['file']} again; one line a picture")
        rows[line["file"]] = line["part"], line.get(OPTIONAL_COLUMN) or ""
    return rows


def _named_parts(folder: Path, grouping: Grouping) -> Iterator[PartImage]:
    good_images(folder)  # for its refusals
    # Sorted as text: the order of files must not depend on the machine.
    found = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if not path.is_dir())
    rows = {name: _part_of(name, grouping) for name, _ in found}
    if unknown := [name for name, row in rows.items() if row is None]:
        where = "the pattern does not match them" if grouping.pattern is not None else "the table has no line for them"
        raise DataError(f"{folder}: {_few(unknown)}: {where}; every picture's part must be known, or take them out")
    for name, path in found:
        row = rows[name]
        assert row is not None
        yield PartImage(path, name, *row)


def _part_of(name: str, grouping: Grouping) -> tuple[str, str] | None:
    if grouping.rows is not None:
        return grouping.rows.get(name)
    assert grouping.pattern is not None
    match = grouping.pattern.fullmatch(name)
    if match is None:
        return None
    groups = match.groupdict()
    return groups["part"] or "", groups.get(OPTIONAL_COLUMN) or ""


def _in_blocks(paths: tuple[Path, ...], grouping: Grouping) -> Found:
    period, last = grouping.block + grouping.gap, len(paths) - grouping.block
    images: list[PartImage] = []
    spacing: list[str] = []
    for place, path in enumerate(paths):
        start = place - place % period
        if place - start < grouping.block and start <= last:
            images.append(PartImage(path, path.name, f"block {start // period + 1}"))
        else:
            spacing.append(path.name)
    if not images:
        raise DataError(
            f"--block {grouping.block}: {paths[0].parent} holds {len(paths)} frames, fewer than one block; "
            "give more, or a shorter block"
        )
    return Found(tuple(images), tuple(spacing))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise CommandError(f"--part-pattern {pattern!r}: {error}; expected a regular expression") from None
    if "part" not in compiled.groupindex or set(compiled.groupindex) - {"part", OPTIONAL_COLUMN}:
        raise CommandError(
            f"--part-pattern {pattern!r}: expected a group (?P<part>…), and (?P<camera>…) where there are several; it "
            "must match each file's whole path within the folder, such as '(?P<part>\\d+)_.*'"
        )
    return compiled


def _blocks(text: str) -> Grouping:
    match = re.fullmatch(r"(\d{1,7})(?::(\d{1,7}))?", text)
    block = int(match[1]) if match else 0
    if match is None or block < 1:
        raise CommandError(f"--block {text!r}: expected N or N:GAP in frames, such as 50 or 50:20")
    # Without a word about the gap, as much is left out as is taken: neighbors' likeness is not known to be shorter.
    return Grouping("block", block=block, gap=block if match[2] is None else int(match[2]))


def _few(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
