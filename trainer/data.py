"""Training sets: good images of one product, prepared exactly as the runtime prepares frames, split by physical part.

Owns finding, hashing, reading and refusing files, the crops of images that are not resized, and the held-out split.
Leaves decoding to ``edge.images``, resizing to ``edge.stages.preprocess`` and cutting to ``edge.stages.tile``, so that
training and inspection cannot differ in a pixel.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from calib.dataset import data_sha256, file_sha256
from calib.labels import Labeled
from edge.bundle import InputSpec
from edge.errors import DataError, ImageRefused
from edge.images import IMAGE_SUFFIXES, read_image
from edge.stages.preprocess import prepare
from edge.stages.tile import cut
from trainer.labeled import NO_CHANGES, LabelChanges, label_changes
from trainer.method import Frames

MIN_HELD_OUT = 6
MIN_TRAINING = 8
DISJOINT_FROM = 40
"""Held-out images from which map statistics and threshold come from disjoint halves."""

RAM_LIMIT_BYTES = 2 << 30
"""Prepared images beyond this live in an unnamed temporary file that the system pages in as needed."""

OVERLAP = 4
"""Crops overlap by at least one part in this many of their side: 64 of 256 px, where no shipped network sees more than
60, so whatever a cell can see in an image lies in one crop as a whole."""

Fit = Literal["resize", "tile"]


@dataclass(frozen=True, slots=True)
class BadFile:
    """A file in the training folder that is no admissible image, and why."""

    name: str
    problem: str


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSet:
    """Prepared good images: ``frames`` (n, h, w, C) uint8, C = 1 if every file is gray, else 3.

    ``names`` are relative to ``folder``, sorted; ``file_sha256`` belongs to each; ``data_sha256`` is the digest of all
    names with their file digests; ``crops`` is how many of the frames, in this order, each image gave: one where images
    are resized; ``skipped`` are the files left out by option; ``labels`` say which images come from elsewhere, last,
    and which are left out.  A place in the set is an image's, never a crop's.
    """

    folder: Path
    frames: Frames
    names: tuple[str, ...]
    file_sha256: tuple[str, ...]
    data_sha256: str
    crops: tuple[int, ...]
    skipped: tuple[BadFile, ...] = ()
    labels: LabelChanges = NO_CHANGES

    @property
    def channels(self) -> Literal[1, 3]:
        """1 gray or 3 RGB."""
        return 1 if self.frames.shape[3] == 1 else 3

    def take(self, places: NDArray[np.int64]) -> Frames:
        """All frames of the images at ``places`` (k, h, w, C), in memory or, if they are many, in a temporary file."""
        ends = np.cumsum(self.crops)
        rows = _room((sum(self.crops[place] for place in places), *self.frames.shape[1:]))
        filled = 0
        for place in places:
            count = self.crops[place]
            rows[filled : filled + count] = self.frames[ends[place] - count : ends[place]]
            filled += count
        return rows

    def paths(self, places: NDArray[np.int64]) -> list[Path]:
        """The files of the images at ``places``."""
        names = (self.names[place] for place in places)
        return [self.labels.added.get(name, self.folder / name) for name in names]


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Places in a training set, ascending: ``train`` is learned from, the other two never are.

    ``statistics`` normalizes the scores and ``threshold`` sets the provisional threshold; they are the same places when
    ``shared``, else no physical part is on both sides.
    """

    train: NDArray[np.int64]
    statistics: NDArray[np.int64]
    threshold: NDArray[np.int64]
    shared: bool


def load_training_set(
    data: Path,
    *,
    size_px: int,
    aspect: Literal["stretch", "keep"],
    skip_bad: bool,
    fit: Fit = "resize",
    labels: Labeled | None = None,
) -> TrainingSet:
    """Read the good images of ``data``: ``data/train/good`` (MVTec AD layout), or ``data`` itself.

    With ``fit`` "resize" each becomes one frame of ``size_px`` x ``size_px``; with "tile" it keeps its resolution and
    is covered by overlapping crops of that size.  Every file counts: one that is not an image, or is damaged, is
    refused by name, or left out with ``skip_bad``.  ``labels`` add false rejects that are not in the folder and take
    out, by content, what they call real defects.

    Raises:
        DataError: no such folder, no image in it, or bad files without ``skip_bad``; names the first few.
    """
    folder = find_good_folder(data)
    paths = {path.name: path for path in sorted(folder.iterdir(), key=lambda path: path.name)}
    changes = label_changes(paths, labels)
    paths = {name: path for name, path in paths.items() if name not in changes.defects} | dict(changes.added)
    store = _FrameStore(len(paths), size_px)
    names: list[str] = []
    digests: list[str] = []
    crops: list[int] = []
    bad: list[BadFile] = []
    for name, path in paths.items():
        try:
            frames = _read_prepared(path, size_px, aspect, fit)
        except ImageRefused as error:
            bad.append(BadFile(name, str(error).removeprefix(f"{path}: ")))
            continue
        store.add(frames)
        names.append(name)
        digests.append(file_sha256(path))
        crops.append(len(frames))
    if bad and not skip_bad:
        raise DataError(_bad_files_message(folder, bad, len(paths)))
    if not names:
        raise DataError(
            f"{folder}: no usable image among {len(paths)} entries; expected good parts as "
            f"{', '.join(sorted(IMAGE_SUFFIXES))} there, or in {data}/train/good"
        )
    return TrainingSet(
        folder,
        store.frames(),
        tuple(names),
        tuple(digests),
        data_sha256(zip(names, digests, strict=True)),
        tuple(crops),
        tuple(bad),
        changes,
    )


def digest_of(found: TrainingSet, places: NDArray[np.int64]) -> str:
    """SHA-256 over the names and file digests of the images at ``places``."""
    return data_sha256((found.names[i], found.file_sha256[i]) for i in places)


def find_good_folder(data: Path) -> Path:
    """``data/train/good`` if ``data`` has a ``train`` folder, else ``data``.

    Raises:
        DataError: the folder does not exist.
    """
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; give a folder of good images, or one that holds train/good")
    if not (data / "train").is_dir():
        return data
    if not (data / "train" / "good").is_dir():
        raise DataError(f"{data / 'train'}: expected the folder `good` in it (MVTec AD layout: train/good, test/KIND)")
    return data / "train" / "good"


def split_by_part(
    names: Sequence[str],
    file_sha256: Sequence[str],
    *,
    share: float,
    seed: int,
    part_regex: str | None = None,
    parts: Mapping[str, str] | None = None,
) -> Split:
    """Set ``share`` of the images aside, at least ``MIN_HELD_OUT``, keeping all images of one physical part together.

    The part of an image is what ``part_regex`` finds in its name (the first group if it has one); without it each file
    is a part of its own; ``parts`` says it for names that it has.  Files with the same bytes always count as one part.
    The same arguments give the same split.

    Raises:
        DataError: too few images or parts, a wrong regular expression, or a name in which it finds nothing.
    """
    if not 0 < share <= 0.5:
        raise DataError(f"the held-out share must be above 0 and at most 0.5, got {share}; the default is 0.2")
    need = MIN_HELD_OUT + MIN_TRAINING
    if len(names) < need:
        raise DataError(
            f"{len(names)} good images are too few: training needs at least {need} "
            f"({MIN_TRAINING} to learn from, {MIN_HELD_OUT} set aside); add good images"
        )
    groups = _parts(_part_names(names, part_regex, parts or {}), file_sha256)
    order = np.random.default_rng(seed).permutation(len(groups))
    wanted = max(MIN_HELD_OUT, round(share * len(names)))
    held: list[list[int]] = []
    for place in order:
        if sum(map(len, held)) >= wanted:
            break
        held.append(groups[place])
    train = np.array(sorted(set(range(len(names))) - {i for part in held for i in part}), np.int64)
    if len(train) < MIN_TRAINING:
        raise DataError(
            f"{len(groups)} physical parts among {len(names)} images leave {len(train)} images to learn from, "
            f"{MIN_TRAINING} are needed; add parts, or check --part-regex {part_regex!r}"
        )
    return _halves(train, held)


def _halves(train: NDArray[np.int64], held: list[list[int]]) -> Split:
    together = np.array(sorted(i for part in held for i in part), np.int64)
    first: list[int] = []
    while held and len(first) < len(together) // 2:
        first += held.pop()
    second = [i for part in held for i in part]
    if len(together) < DISJOINT_FROM or min(len(first), len(second)) < MIN_HELD_OUT:
        return Split(train, together, together, shared=True)
    return Split(train, np.array(sorted(first), np.int64), np.array(sorted(second), np.int64), shared=False)


def _parts(part_names: Sequence[str], file_sha256: Sequence[str]) -> list[list[int]]:
    """Places grouped by part; two groups with a file in common (same bytes) become one."""
    group_of: dict[str, int] = {}
    members: dict[int, list[int]] = defaultdict(list)
    for place, (part, digest) in enumerate(zip(part_names, file_sha256, strict=True)):
        keys = (f"part {part}", f"file {digest}")
        homes = sorted({group_of[key] for key in keys if key in group_of})
        home = homes[0] if homes else place
        for other in homes[1:]:
            members[home] += members.pop(other)
            group_of |= {key: home for key, group in group_of.items() if group == other}
        members[home].append(place)
        group_of |= dict.fromkeys(keys, home)
    return [sorted(members[home]) for home in sorted(members)]


def _part_names(names: Sequence[str], part_regex: str | None, known: Mapping[str, str]) -> list[str]:
    if part_regex is None:
        return [known.get(name, name) for name in names]
    try:
        pattern = re.compile(part_regex)
    except re.error as error:
        raise DataError(f"--part-regex {part_regex!r} is not a regular expression: {error}") from error
    found = {name: pattern.search(name) for name in names if name not in known}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        raise DataError(
            f"--part-regex {part_regex!r} finds no part in {len(missing)} of {len(names)} names "
            f"({', '.join(missing[:3])}); every image must name its part"
        )
    group = 1 if pattern.groups else 0
    parts = {**{name: match.group(group) or "" for name, match in found.items() if match is not None}, **known}
    return [parts[name] for name in names]


def _read_prepared(path: Path, size_px: int, aspect: Literal["stretch", "keep"], fit: Fit) -> list[Frames]:
    """One image as the graph will see it, each (size_px, size_px, C) uint8: itself, or its crops as views of it."""
    if not path.is_file():
        raise ImageRefused("format", "not a file; images of good parts lie directly in the folder")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ImageRefused("format", f"not an image file; expected {', '.join(sorted(IMAGE_SUFFIXES))}")
    image = read_image(path)
    channels: Literal[1, 3] = 1 if image.shape[2] == 1 else 3
    spec = InputSpec(height=size_px, width=size_px, channels=channels, max_batch=1, fit=fit, aspect=aspect)
    pixels, _ = prepare(image, spec, None)
    if fit == "resize":
        return [pixels]
    down, across = (crop_starts(side, size_px) for side in pixels.shape[:2])
    return [cut(pixels, y, x, size_px, size_px) for y in down for x in across]


def crop_starts(side_px: int, size_px: int) -> list[int]:
    """Where crops of ``size_px`` start along a side: from edge to edge, evenly, overlapping by 1 / ``OVERLAP``."""
    room = max(0, side_px - size_px)
    steps = math.ceil(room / (size_px - size_px // OVERLAP))
    return [round(room * step / max(steps, 1)) for step in range(steps + 1)]


class _FrameStore:
    """Room for the frames of ``images`` images; turns to RGB when the first color image comes among gray ones."""

    def __init__(self, images: int, size_px: int) -> None:
        self._images_left, self._size_px, self._filled = images, size_px, 0
        self._rows: Frames | None = None

    def add(self, frames: Sequence[Frames]) -> None:
        """Copy the frames of the next image."""
        rows, channels = self._rows, frames[0].shape[2]
        if rows is None or rows.shape[3] < channels or len(rows) < self._filled + len(frames):
            # As if all that are still to come were like this one: exact where one camera took them all.
            count = self._filled + len(frames) * self._images_left
            wider = _room((count, self._size_px, self._size_px, max(channels, 1 if rows is None else rows.shape[3])))
            if rows is not None:
                wider[: self._filled] = rows[: self._filled]  # gray broadcasts to the three colors
            self._rows = rows = wider
        for frame in frames:
            rows[self._filled] = frame
            self._filled += 1
        self._images_left -= 1

    def frames(self) -> Frames:
        return np.empty((0, 0, 0, 1), np.uint8) if self._rows is None else self._rows[: self._filled]


def _room(shape: tuple[int, ...]) -> Frames:
    need = math.prod(shape)
    if need <= RAM_LIMIT_BYTES:
        return np.empty(shape, np.uint8)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if need > free:  # writing a mapped file on a full disk would end the process by a signal, without a word
        raise DataError(
            f"{shape[0]} prepared images take {need / 1e9:.1f} GB and {tempfile.gettempdir()} has {free / 1e9:.1f} GB "
            "free; set TMPDIR to a folder with more room, or train on fewer images"
        )
    return np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=shape)


def _bad_files_message(folder: Path, bad: Sequence[BadFile], count: int) -> str:
    shown = "\n".join(f"  {file.name}: {file.problem}" for file in bad[:5])
    more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
    return (
        f"{folder}: {len(bad)} of {count} entries are not usable images:\n{shown}{more}\n"
        "take them out, or leave them out of training with --skip-bad-images"
    )
