"""Known bad parts, for methods that learn from a few of them.

Owns reading a folder of bad images with their masks, refusing those that are tested with, and drawing patches that
hold a flaw, or whole images with their masks.  Leaves decoding to ``edge.images`` and resizing to
``edge.stages.preprocess``, as for good images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.dataset import data_sha256, file_sha256
from edge.bundle import InputSpec
from edge.errors import DataError, ImageRefused
from edge.images import IMAGE_SUFFIXES, read_image
from edge.stages.preprocess import prepare
from trainer.method import Frames

MASK = "_mask.png"


@dataclass(frozen=True, slots=True, eq=False)
class BadPatches:
    """Bad images ``frames`` (n, size, size, C) uint8 and, for each, the pixels of its flaw (k, 2) as (row, column)."""

    frames: Frames
    flaws: tuple[NDArray[np.int64], ...]
    patch: int
    files: dict[str, str]
    """Name to the SHA-256 of its bytes, by which `kizu calibrate --bad` knows what was learned from."""

    @classmethod
    def read(cls, folder: str | Path, size_px: int, patch: int, channels: int) -> BadPatches:
        """All images of ``folder``; ``STEM_mask.png`` beside ``STEM.*`` is the flaw's mask, of the image's own size.

        Raises:
            DataError: no folder, no image, one that cannot be read, a mask that is empty or of another size, or a
                missing mask where patches are smaller than the images.
        """
        paths = bad_images(Path(folder))
        frames = np.stack([_frame(path, size_px, channels) for path in paths])
        flaws = tuple(_flaw(path, size_px, patch) for path in paths)
        return cls(frames, flaws, patch, {path.name: file_sha256(path) for path in paths})

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """``count`` patches (count, p, p, C) uint8, each holding a flawed pixel drawn uniformly from a random image."""
        chosen = torch.randint(len(self.frames), (count,), generator=random).tolist()
        return torch.stack([self._patch(place, random) for place in chosen])

    def draw_image(self, random: np.random.Generator) -> tuple[Frames, NDArray[np.bool_]]:
        """One whole image (size, size, C) with the mask (size, size) of its flaw."""
        place = int(random.integers(len(self.frames)))
        mask = np.zeros(self.frames.shape[1:3], np.bool_)
        mask[tuple(self.flaws[place].T)] = True
        return self.frames[place], mask

    def describe(self) -> dict[str, Any]:
        """How many images, their digest together, and each one's."""
        return {
            "images": len(self.frames),
            "sha256": data_sha256(self.files.items()),
            "files": sorted(self.files.values()),
        }

    def _patch(self, place: int, random: torch.Generator) -> Tensor:
        frame, flaw = self.frames[place], self.flaws[place]
        row, column = flaw[int(torch.randint(len(flaw), (1,), generator=random))]
        y, x = (self._start(int(at), side, random) for at, side in ((row, frame.shape[0]), (column, frame.shape[1])))
        return torch.from_numpy(frame[y : y + self.patch, x : x + self.patch].copy())

    def _start(self, at: int, side: int, random: torch.Generator) -> int:
        """A patch's first row (or column) such that it holds ``at`` and lies in the image."""
        low, high = max(0, at - self.patch + 1), min(at, side - self.patch)
        return low + int(torch.randint(high - low + 1, (1,), generator=random))


def bad_images(folder: Path) -> list[Path]:
    """The images in ``folder`` that are no masks, by name.

    Raises:
        DataError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise DataError(f"bad = {folder}: no such folder; give one of images of bad parts, never of those to test")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.endswith(MASK))
    if not paths:
        raise DataError(f"{folder}: no image of a bad part in it; expected {', '.join(sorted(IMAGE_SUFFIXES))}")
    return paths


def require_unseen(bad: Path, data: Path) -> None:
    """Refuse bad parts whose bytes are also in the test split of ``data`` or among its good images.

    ``data`` is a data set's root or its folder of good images.  Names count for nothing; a test image that was stored
    anew, in another format say, is not recognized.

    Raises:
        DataError: one is; names the pairs.
    """
    root = data.parent.parent if (data.parent.name, data.name) == ("train", "good") else data
    good = root / "train" / "good" if (root / "train" / "good").is_dir() else data
    digests = {file_sha256(path): path for path in bad_images(bad)}
    for place, pattern, what in (
        (root / "test", "*/*", "a figure measured on it later would be worth nothing"),
        (good, "*", "it cannot be good and bad"),
    ):
        files = sorted(path for path in place.glob(pattern) if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES)
        same = [(digests[digest].name, path) for path in files if (digest := file_sha256(path)) in digests]
        if same:
            name, path = same[0]
            raise DataError(
                f"--bad {bad}: {len(same)} of {len(digests)} images are in {place} too, {name} as {path.name}: {what}; "
                f"take {'it' if len(same) == 1 else 'them'} out of one of the two folders"
            )


def _frame(path: Path, size_px: int, channels: int) -> Frames:
    try:
        image = read_image(path)
    except ImageRefused as error:
        raise DataError(f"{error}; take it out of the folder of bad parts") from error
    if image.shape[2] == 3 and channels == 1:
        raise DataError(f"{path}: a color image, and the good images are gray; give bad parts of the same camera")
    # Prepared in its own channels, then gray repeated: the same order as for good images.
    kind: Literal[1, 3] = 1 if image.shape[2] == 1 else 3
    pixels, _ = prepare(image, InputSpec(height=size_px, width=size_px, channels=kind, max_batch=1), None)
    return np.repeat(pixels, 3, axis=2) if channels == 3 and kind == 1 else pixels


def _flaw(path: Path, size_px: int, patch: int) -> NDArray[np.int64]:
    file = path.with_name(path.stem + MASK)
    if not file.is_file():
        if patch == size_px:
            return np.array([[0, 0]], np.int64)  # the patch is the image
        raise DataError(
            f"{path}: no {file.name} beside it, which must say where the flaw is when patches of {patch} px are drawn "
            f"from images of {size_px} px"
        )
    try:
        mask, image = read_image(file)[:, :, 0], read_image(path)
    except ImageRefused as error:
        raise DataError(str(error)) from error
    if mask.shape != image.shape[:2]:
        raise DataError(
            f"{file}: {mask.shape[1]} x {mask.shape[0]} px, its image has {image.shape[1]} x {image.shape[0]}"
        )
    # Area averaging keeps a flaw of one pixel: anything above 0 counts.
    small = cv2.resize((mask > 0).astype(np.float32), (size_px, size_px), interpolation=cv2.INTER_AREA)
    found = np.argwhere(small > 0)
    if not len(found):
        raise DataError(f"{file}: the mask is empty; a bad part without a marked flaw teaches nothing")
    return found.astype(np.int64)
