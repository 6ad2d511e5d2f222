"""Folders of images for acceptance: MVTec AD test sets and plain folders of good parts. Owns which file is what.

    DIR/test/good/*                          defect-free
    DIR/test/KIND/*                          defective
    DIR/ground_truth/KIND/STEM_mask.png      optional; of its image's size, 0 where normal, else defective

Every entry counts: a file that is no image is not passed over in silence, it is refused by whoever reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.errors import DataError, ImageRefused
from edge.images import IMAGE_SUFFIXES, read_image

GOOD = "good"


@dataclass(frozen=True, slots=True)
class LabeledImage:
    """One test image: `name` is its path within the data folder with slashes, `kind` the defect's or `good`.

    `mask_path` is None for good images and where there is no ground truth.
    """

    path: Path
    name: str
    kind: str
    mask_path: Path | None = None

    @property
    def is_good(self) -> bool:
        """Whether it shows a defect-free part."""
        return self.kind == GOOD


def read_test_set(data: Path) -> tuple[LabeledImage, ...]:
    """Return what is in `data/test`, good images first, then kind by kind, each by name.

    Raises:
        DataError: there is no such folder or nothing in it, a file lies beside the kinds' folders, or two images of a
        kind
            have one stem and so would share a mask.
    """
    test = data / "test"
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; expected one that holds test/good and test/KIND")
    if not test.is_dir():
        raise DataError(
            f"{data}: no folder `test` in it; expected test/good, test/KIND and ground_truth/KIND/STEM_mask.png"
        )
    entries = sorted(test.iterdir(), key=lambda path: (path.name != GOOD, path.name))
    if loose := [path.name for path in entries if not path.is_dir()]:
        raise DataError(
            f"{test}: {_few(loose)} lies beside the folders; put it into test/good or test/KIND, or take it out"
        )
    images = tuple(image for kind in entries for image in _read_kind(data, kind))
    if not images:
        raise DataError(f"{test}: no image in it; expected good parts in {test / GOOD} and defective ones in test/KIND")
    return images


def read_mask(image: LabeledImage, frame_size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """Return the ground truth (H, W) of `image`, true where defective, or None where there is none.

    Raises:
        DataError: the mask cannot be read, or is not of `frame_size` (height, width).
    """
    if image.mask_path is None:
        return None
    try:
        pixels = read_image(image.mask_path, channels=1)[:, :, 0]
    except ImageRefused as error:
        raise DataError(f"mask of {image.path}: {error}") from error
    if pixels.shape != frame_size:
        raise DataError(
            f"{image.mask_path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, but its image {image.path} is "
            f"{frame_size[1]} x {frame_size[0]}; a mask must have its image's size"
        )
    return pixels > 0


def good_images(folder: Path) -> tuple[Path, ...]:
    """Return the entries of a plain folder of good images, by name.

    Raises:
        DataError: no such folder, nothing in it, or it is a data set's root.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give a folder with images of good parts")
    if (folder / "train").is_dir() or (folder / "test").is_dir():
        raise DataError(
            f"{folder} is the root of a data set; "
            f"give the folder of good parts itself, such as {folder / 'test' / GOOD}"
        )
    paths = tuple(sorted(folder.iterdir(), key=lambda path: path.name))
    if not paths:
        raise DataError(f"{folder}: nothing in it; expected good parts as {', '.join(sorted(IMAGE_SUFFIXES))}")
    return paths


def read_stored_image(path: Path) -> NDArray[np.uint8]:
    """Return the image as stored, (H, W, 1 or 3) uint8, exactly as a camera made from this folder would send it.

    Raises:
        ImageRefused: it is no file, no image, damaged or too large; the message names it.
    """
    if not path.is_file() or path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ImageRefused("format", f"{path}: not an image file; expected {', '.join(sorted(IMAGE_SUFFIXES))}")
    return read_image(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hex, or of its name if it cannot be read (who decodes it will say so)."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return hashlib.sha256(f"unreadable {path.name}".encode()).hexdigest()


def data_sha256(named_digests: Iterable[tuple[str, str]]) -> str:
    """Return the digest of a set of (name, file digest), by name: that of the text `sha256sum` prints for them."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(named_digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def _read_kind(data: Path, folder: Path) -> list[LabeledImage]:
    kind, seen, images = folder.name, dict[str, Path](), list[LabeledImage]()
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.stem in seen:
            raise DataError(f"{path} and {seen[path.stem]} have one stem and would share a mask; rename one")
        seen[path.stem] = path
        mask = data / "ground_truth" / kind / f"{path.stem}_mask.png"
        has_mask = kind != GOOD and mask.is_file()
        images.append(LabeledImage(path, f"test/{kind}/{path.name}", kind, mask if has_mask else None))
    return images


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
