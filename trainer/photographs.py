"""Everyday photographs as an endless, repeatable supply of square views for distillation.

Owns reading a folder of photographs, its digest, the held-out split, and how view number k is cut: zoom, place,
flip, gray.  Leaves what P says about a view to ``targets``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from edge.errors import DataError

Image = NDArray[np.uint8]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MIN_SIDE_PX = 33
MAX_PIXELS = 64_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Photographs:
    """Decoded photographs (H, W, 3) uint8 RGB with their names, and one SHA-256 over all names and bytes."""

    names: tuple[str, ...]
    images: tuple[Image, ...]
    digest: str
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, slots=True)
class ViewRecipe:
    """How views are cut: side in px, range of the zoomed image's side in px, share of gray views.

    ``square`` is the paper's way: the image is zoomed to a square of a random side of 4p to 16p px, all sides as
    likely, and a crop of p px is one patch.  Otherwise a crop holds many patches, the aspect ratio stays, ``zoom_px``
    is of the short side and starts at the crop's own, and all ratios of zoom are as likely.
    """

    side_px: int = 192
    zoom_px: tuple[int, int] = (192, 528)
    gray_share: float = 0.3
    square: bool = False


def read_photographs(folder: Path | str, *, skip_bad: bool = False) -> Photographs:
    """Decode every image below ``folder``, in the order of their relative names.

    Raises:
        DataError: no folder, no images, or (unless ``skip_bad``) files that are not usable images, all of them named.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder of photographs; give --images DIR with at least a few hundred images")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    names: list[str] = []
    images: list[Image] = []
    bad: list[str] = []
    digest = hashlib.sha256()
    for path in paths:
        name = path.relative_to(root).as_posix()
        payload = path.read_bytes()
        try:
            images.append(_decode(payload))
        except ValueError as error:
            bad.append(f"{name} ({error})")
            continue
        names.append(name)
        digest.update(f"{name}\0{len(payload)}\0".encode())
        digest.update(payload)
    if bad and not skip_bad:
        listed = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise DataError(f"{root}: not usable as photographs: {listed}; remove them or pass --skip-bad-images")
    if not images:
        raise DataError(f"{root}: no images found (looked for {', '.join(SUFFIXES)})")
    return Photographs(tuple(names), tuple(images), digest.hexdigest(), tuple(bad))


def hold_out(photographs: Photographs, share: float) -> tuple[list[int], list[int]]:
    """Indices for training and for validation; a photograph's side depends on its name alone, not on the others.

    Raises:
        DataError: one side would be empty.
    """
    draws = [int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in photographs.names]
    held = [index for index, draw in enumerate(draws) if draw < share]
    kept = [index for index, draw in enumerate(draws) if draw >= share]
    if not held or not kept:
        raise DataError(f"{len(photographs)} photographs cannot be split with a share of {share}; give more")
    return kept, held


def cut_view(photographs: Photographs, chosen: list[int], recipe: ViewRecipe, seed: int, number: int) -> Image:
    """View ``number`` of the supply ``seed``: (side, side, 3) uint8 RGB; the same numbers give the same pixels."""
    rng = np.random.default_rng((seed, number))
    image = photographs.images[chosen[int(rng.integers(len(chosen)))]]
    height, width = image.shape[:2]
    tall, wide = _source_px(recipe, height, width, rng)
    top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
    cropped = image[top : top + tall, left : left + wide]
    shrinking = tall * wide > recipe.side_px**2
    view = cv2.resize(
        cropped, (recipe.side_px, recipe.side_px), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    )
    if rng.random() < 0.5:
        view = cv2.flip(view, 1)
    if rng.random() < recipe.gray_share:
        view = cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.ascontiguousarray(view, dtype=np.uint8)


def _source_px(recipe: ViewRecipe, height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
    """Height and width of the crop in px of the image that it is cut from; never more than there is.

    Cropping first and zooming the crop alone costs a hundredth of zooming the whole image for one patch.
    """
    low, high = recipe.zoom_px
    if recipe.square:
        zoomed_px = float(rng.uniform(low, high))
        sides = (round(recipe.side_px * side / zoomed_px) for side in (height, width))
        tall, wide = (min(max(side, 1), most) for side, most in zip(sides, (height, width), strict=True))
        return tall, wide
    short_px = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    source = min(round(recipe.side_px * min(height, width) / short_px), height, width)
    return source, source


def _decode(payload: bytes) -> Image:
    if not payload:
        raise ValueError("empty file")
    image = cv2.imdecode(np.frombuffer(payload, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("not a readable image")
    if min(image.shape[:2]) < MIN_SIDE_PX:
        raise ValueError(f"{image.shape[1]} x {image.shape[0]} px, the smallest useful side is {MIN_SIDE_PX}")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)
