"""Pictures of rejected parts for the page, read from the folder beside the event log; nothing is written there.

Owns finding a picture and making it small enough for a browser. No picture travels over the line's sockets, so a
console without that folder shows masks on empty frames.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Final, Literal

import numpy as np

from edge.errors import CommandError, ImageRefused
from edge.images import cv2, read_image
from edge.sinks.rejects import frame_path, rejects_folder
from edge.wire import NAME

Size = Literal["thumb", "full"]
SIDES: Final[dict[Size, int]] = {"thumb": 360, "full": 1600}
_QUALITY: Final[dict[Size, int]] = {"thumb": 80, "full": 92}
_KEPT: Final = 64
_MAX_DIGITS: Final = 19
_MAX_FILE_BYTES: Final = 256 * 1024 * 1024


def find_folder(log: Path) -> Path:
    """The folder of pictures for `--log`: an event log's file, the folder that it lies in, or the pictures' own.

    Raises:
        CommandError: there is none, or more than one.
        OSError: the folder may not be read.
    """
    if log.is_file():
        return rejects_folder(log)
    if not log.is_dir():
        raise CommandError(f"--log {log}: no such file or folder; give the folder of the line's log.path")
    if log.suffix == ".rejects":
        return log
    # The folder of pictures comes with the first reject; the log is there from the line's first start.
    found = sorted({*log.glob("*.rejects"), *(rejects_folder(path) for path in log.iterdir() if _is_database(path))})
    if len(found) != 1:
        names = ", ".join(path.stem for path in found) or "none"
        raise CommandError(f"--log {log}: expected one event log in it, found {names}; name the log's file")
    return found[0]


def _is_database(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


class Pictures:
    """Finds and scales; thread-safe."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, Size], bytes] = OrderedDict()

    @property
    def available(self) -> bool:
        """Whether there is a folder at all."""
        return self._folder is not None

    def path(self, event_id: str) -> Path | None:
        """The file of event CAMERA/EPOCH/SEQUENCE; None for another form, or where it is not kept."""
        parts = event_id.split("/")
        if self._folder is None or len(parts) != 3 or not NAME.fullmatch(parts[0]):
            return None
        if not all(part.isascii() and part.isdecimal() and len(part) <= _MAX_DIGITS for part in parts[1:]):
            return None
        file = frame_path(self._folder, parts[0], int(parts[1]), int(parts[2]))
        return file if file.is_file() else None

    def original(self, event_id: str) -> bytes | None:
        """The file's bytes, lossless; None where it is not kept (any more)."""
        file = self.path(event_id)
        try:
            return None if file is None or file.stat().st_size > _MAX_FILE_BYTES else file.read_bytes()
        except OSError:
            return None

    def scaled(self, event_id: str, size: Size) -> bytes | None:
        """JPEG of at most SIDES[size] px on a side; None where the picture is not kept or cannot be read."""
        with self._lock:
            if (event_id, size) in self._kept:
                self._kept.move_to_end((event_id, size))
                return self._kept[event_id, size]
        file = self.path(event_id)
        if file is None:
            return None
        try:
            data = _jpeg(file, size)
        except ImageRefused:
            return None
        with self._lock:
            self._kept[event_id, size] = data
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return data


def _jpeg(file: Path, size: Size) -> bytes:
    image = read_image(file)
    step = max(1.0, max(image.shape[:2]) / SIDES[size])
    if step > 1.0:
        width, height = (max(1, round(side / step)) for side in (image.shape[1], image.shape[0]))
        image = np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    if image.ndim == 3 and image.shape[2] == 3:
        image = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), np.uint8)
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY[size]])[1].tobytes())
