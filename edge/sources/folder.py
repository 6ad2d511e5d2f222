"""A folder of images as a camera: name order, a stated rate.

Owns the pacing; what makes an image admissible is in `images`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from edge.errors import DataError, EndOfStream, ImageRefused, SourceBroken, SourceTimeout
from edge.images import IMAGE_SUFFIXES, read_image
from edge.protocols import Clock
from edge.types import Frame, FrameId, Unreadable

EPOCH_BITS = 53
"""A random epoch's bits: JavaScript reads it exactly."""


class FolderSource:
    """Reads the images of `folder` (and, if `recursive`, of the folders below) as frames of `camera`.

    `folder` may also be one image file, which is then the only frame.
    `fps` None gives them as fast as they are asked for; `loop` starts over at the end; `channels` as in `read_image`.
    The list of files is made once. A file that is no admissible image becomes Unreadable and takes its sequence number:
    it is never skipped in silence.

    Raises:
        DataError: no such folder, or no image in it.
        ValueError: `fps` is not positive.
    """

    def __init__(
        self,
        folder: Path,
        camera: str,
        *,
        clock: Clock,
        fps: float | None = None,
        loop: bool = False,
        recursive: bool = False,
        channels: int | None = None,
        epoch: int | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if fps is not None and not fps > 0:
            raise ValueError(f"fps is {fps}, expected a positive number")
        self.files = _images_in(folder, recursive)
        self._camera = camera
        self._clock = clock
        self._period_ns = 0 if fps is None else round(1e9 / fps)
        self._loop = loop
        self._channels = channels
        self._epoch = secrets.randbits(EPOCH_BITS) if epoch is None else epoch
        self._sleep = sleep
        self._sequence = 0
        self._due_ns: int | None = None
        self._closed = False

    def read(self, timeout_s: float) -> Frame | Unreadable:
        """The next image when it is due.

        Raises:
            SourceTimeout: it is not due within `timeout_s`.
            EndOfStream: all were given and `loop` is off.
            SourceBroken: the source was closed.
        """
        if self._closed:
            raise SourceBroken("the folder source was closed; open a new one")
        if self._sequence >= len(self.files) and not self._loop:
            raise EndOfStream(f"all {len(self.files)} images were read")
        self._wait(timeout_s)
        path = self.files[self._sequence % len(self.files)]
        frame_id = FrameId(self._camera, self._epoch, self._sequence, self._clock.wall_ns())
        self._sequence += 1
        received_ns = self._clock.monotonic_ns()
        try:
            return Frame(frame_id, read_image(path, self._channels), received_ns)
        except ImageRefused as error:
            return Unreadable(frame_id, error.reason, str(error), received_ns)

    def _wait(self, timeout_s: float) -> None:
        """Sleep until the next image is due; a reader that fell behind is not flooded with what it missed."""
        now = self._clock.monotonic_ns()
        due = now if self._due_ns is None else self._due_ns
        if due - now > timeout_s * 1e9:
            self._sleep(max(timeout_s, 0.0))
            raise SourceTimeout(f"the next image is due in {(due - now) / 1e9:.3f} s, more than {timeout_s} s")
        if due > now:
            self._sleep((due - now) / 1e9)
        self._due_ns = max(due, now) + self._period_ns

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True


def _images_in(folder: Path, recursive: bool) -> tuple[Path, ...]:
    """Image files by name, found by their suffix."""
    if folder.is_file() and folder.suffix.lower() in IMAGE_SUFFIXES:
        return (folder,)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with {', '.join(sorted(IMAGE_SUFFIXES))} files")
    inside = folder.rglob("*") if recursive else folder.iterdir()
    files = tuple(sorted(path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()))
    if not files:
        raise DataError(f"{folder}: no image in it; expected {', '.join(sorted(IMAGE_SUFFIXES))} files")
    return files
