"""RejectRing: the frames of rejected parts, lossless, in a folder beside the event log; the oldest make room.

Owns the folder, its two bounds and the thread that encodes. A frame here is for people and for `kizu rescore`; the
promise is about events, so a frame that finds no room in the queue is counted and not waited for.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from edge import images
from edge.errors import ConfigError, KizuError
from edge.types import FrameId

_WAITING: Final = 8


def rejects_folder(log_path: Path) -> Path:
    """Where the frames of the log at `log_path` lie."""
    return Path(f"{log_path}.rejects")


def frame_path(folder: Path, camera: str, epoch: int, sequence: int) -> Path:
    """The file of one frame; all three parts are checked names and numbers."""
    return folder / f"{camera}-{epoch}-{sequence}.png"


class RejectRing:
    """Keeps at most `max_count` frames and `max_bytes`; `put` returns at once.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: Path, *, max_bytes: int, max_count: int) -> None:
        self.kept = 0
        """Frames written since the start."""
        self.dropped = 0
        """Frames not kept: the queue was full, or the disk refused."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_count = max_count
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            files = sorted((file.stat().st_mtime_ns, file, file.stat().st_size) for file in folder.glob("*.png"))
        except OSError as error:
            raise ConfigError(
                f"folder {folder} of rejected frames: {error.strerror}; choose another log.path"
            ) from None
        self._files: deque[tuple[Path, int]] = deque((file, size) for _, file, size in files)
        self._bytes = sum(size for _, size in self._files)
        self._queue: queue.Queue[tuple[FrameId, NDArray[np.uint8]] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="rejects", daemon=True)
        self._thread.start()

    @property
    def size_bytes(self) -> int:
        """What the kept frames take."""
        return self._bytes

    def put(self, frame_id: FrameId, image: NDArray[np.uint8]) -> None:
        """Keep `image` (H, W, C) uint8 if there is time for it; never waits."""
        try:
            self._queue.put_nowait((frame_id, image))
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what waits, then stop."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            frame_id, image = item
            try:
                self._write(frame_path(self._folder, *frame_id.key), images.encode_png(image))
            except (OSError, KizuError):
                self.dropped += 1

    def _write(self, file: Path, data: bytes) -> None:
        while self._files and (len(self._files) >= self._max_count or self._bytes + len(data) > self._max_bytes):
            oldest, size = self._files.popleft()
            oldest.unlink(missing_ok=True)
            self._bytes -= size
        if self._max_count == 0 or len(data) > self._max_bytes:
            self.dropped += 1
            return
        images.write_atomically(file, data)
        self._files.append((file, len(data)))
        self._bytes += len(data)
        self.kept += 1
