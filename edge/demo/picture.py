"""The contact sheet of a demo run: photographs with their masks and verdicts, as one picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge import images
from edge.demo.session import Seen
from edge.errors import CommandError

SUFFIXES: Final = (".png", ".jpg")
COLORS_RGB: Final = {"accept": (40, 160, 60), "reject": (205, 40, 40), "inconclusive": (200, 140, 0)}
_SIDE: Final = 256
_CAPTION: Final = 34
_COLUMNS: Final = 4
_GAP: Final = 8


def choose(seen: Iterable[Seen], count: int = 2 * _COLUMNS) -> list[Seen]:
    """Up to `count` different photographs, half of them rejected ones where there are enough, in the order seen."""
    first: dict[Path, Seen] = {}
    for one in seen:
        first.setdefault(one.photo.path, one)
    rejected = [one for one in first.values() if one.event.decision == "reject"]
    others = [one for one in first.values() if one.event.decision != "reject"]
    kept = {id(one) for one in rejected[: max(count // 2, count - len(others))]}
    kept |= {id(one) for one in others[: count - len(kept)]}
    return [one for one in first.values() if id(one) in kept]


def write_sheet(path: Path, seen: Sequence[Seen]) -> None:
    """Write the tiles of `seen` in rows of four, as PNG or JPEG by the name's ending.

    Raises:
        CommandError: another ending, nothing to show, or the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise CommandError(f"--picture {path}: the name must end in one of {', '.join(SUFFIXES)}")
    if not seen:
        raise CommandError(f"--picture {path}: no verdict came, so there is nothing to show; give more --seconds")
    done, data = images.cv2.imencode(path.suffix, _sheet(seen)[:, :, ::-1])
    if not done:
        raise CommandError(f"--picture {path}: OpenCV could not encode it; try the other ending")
    try:
        images.write_atomically(path, data.tobytes())
    except OSError as error:
        raise CommandError(f"--picture {path}: {error.strerror}; choose a folder that can be written") from None


def _sheet(seen: Sequence[Seen]) -> NDArray[np.uint8]:
    tiles = [_tile(one) for one in seen]
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    height, width = _SIDE + _CAPTION, _SIDE
    sheet = np.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), 250, np.uint8)
    for index, tile in enumerate(tiles):
        y = _GAP + index // columns * (height + _GAP)
        x = _GAP + index % columns * (width + _GAP)
        sheet[y : y + height, x : x + width] = tile
    return sheet


def _tile(one: Seen) -> NDArray[np.uint8]:
    """(_SIDE + _CAPTION, _SIDE, 3) RGB: the photograph, its mask tinted and outlined, and the verdict below."""
    cv2: Any = images.cv2
    color = COLORS_RGB[one.event.decision]
    picture = images.decode_image(one.photo.data, channels=3)
    if one.mask is not None:
        picture = picture.copy()
        picture[one.mask] = (picture[one.mask] * 0.55 + np.array(COLORS_RGB["reject"]) * 0.45).astype(np.uint8)
        outlines, _ = cv2.findContours(one.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outlines, -1, (255, 255, 255), 3)
        cv2.drawContours(picture, outlines, -1, COLORS_RGB["reject"], 2)
    tile = np.full((_SIDE + _CAPTION, _SIDE, 3), color, np.uint8)
    tile[:_SIDE] = cv2.resize(picture, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    text = one.event.decision.upper()
    if one.event.score is not None and one.event.threshold is not None:
        text += f"  {one.event.score:.2f} / {one.event.threshold:.2f}"
    cv2.putText(tile, text, (8, _SIDE + 22), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
    return tile
