"""Video through OpenCV: a file, a camera device or a URL. Owns the reader thread that puts a time limit on reads.

OpenCV's reads cannot be interrupted, so they happen on a thread of their own behind a bounded queue. Reconnecting, and
a decoder in a process of its own, are left to whoever opens the source again.
"""

from __future__ import annotations

import queue
import secrets
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from edge.errors import EndOfStream, SourceBroken, SourceError, SourceTimeout
from edge.images import MAX_IMAGE_PIXELS, cv2
from edge.protocols import Clock
from edge.types import Frame, FrameId

EPOCH_BITS = 53
"""A random epoch's bits: JavaScript reads it exactly."""

CLOSE_TIMEOUT_S = 2.0
"""How long closing waits for a read in progress; a reader that hangs longer is left behind as a daemon thread."""

_Item = tuple[NDArray[np.uint8], int, int] | SourceError


class VideoSource:
    """Frames of `target`: a file, a device index (0, "0") or a URL, as RGB or, with `channels` 1, gray.

    At most `queue_size` frames wait. A file's reader waits for room, so every frame is delivered. A device or URL goes
    on whether or not anyone reads: the oldest waiting frame makes room and `dropped` counts it. Sequence numbers are
    given at delivery, without gaps.
    """

    def __init__(
        self,
        target: str | int,
        camera: str,
        *,
        clock: Clock,
        channels: Literal[1, 3] = 3,
        queue_size: int = 2,
        open_timeout_s: float = 10.0,
        epoch: int | None = None,
    ) -> None:
        if queue_size < 1:
            raise ValueError(f"queue_size is {queue_size}, expected at least 1")
        self._target = int(target) if isinstance(target, str) and target.isdigit() else target
        self.live = isinstance(self._target, int) or "://" in self._target
        self.dropped = 0
        self._camera = camera
        self._clock = clock
        self._channels = channels
        self._open_timeout_s = open_timeout_s
        self._epoch = secrets.randbits(EPOCH_BITS) if epoch is None else epoch
        self._sequence = 0
        self._items: queue.Queue[_Item] = queue.Queue(queue_size)
        self._ended: SourceError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"video-{camera}", daemon=True)

    def read(self, timeout_s: float) -> Frame:
        """The next frame, opening the video at the first call.

        Raises:
            SourceTimeout: none came in time.
            EndOfStream: a file was read to its end.
            SourceBroken: it could not be opened, broke off, or was closed.
        """
        if self._stop.is_set():
            raise SourceBroken(f"{self._target}: the video source was closed; open a new one")
        if self._ended is not None:
            raise self._ended
        if self._thread.ident is None:
            self._thread.start()
        try:
            item = self._items.get(timeout=max(timeout_s, 0.0)) if timeout_s > 0 else self._items.get_nowait()
        except queue.Empty:
            raise SourceTimeout(f"{self._target}: no frame within {timeout_s} s") from None
        if isinstance(item, SourceError):
            self._ended = item
            raise item
        image, captured_ns, received_ns = item
        frame = Frame(FrameId(self._camera, self._epoch, self._sequence, captured_ns), image, received_ns)
        self._sequence += 1
        return frame

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    # --- the reader thread ---

    def _run(self) -> None:
        capture: cv2.VideoCapture | None = None
        try:
            capture = self._open()
            self._put(self._pump(capture))
        except SourceError as error:
            self._put(error)
        except Exception as error:  # a thread's top: whatever OpenCV throws, the reader must learn that it is over
            self._put(SourceBroken(f"{self._target}: {type(error).__name__}: {error}"))
        finally:
            if capture is not None:
                capture.release()

    def _open(self) -> cv2.VideoCapture:
        if not self.live and not Path(str(self._target)).exists():
            raise SourceBroken(f"{self._target}: no such file; expected a video file, a device index or a URL")
        if self.live and isinstance(self._target, str):
            limit_ms = round(self._open_timeout_s * 1000)
            limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit_ms]
            capture = cv2.VideoCapture(self._target, cv2.CAP_FFMPEG, limits)
        else:
            capture = cv2.VideoCapture(self._target)
        width, height = capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
        if not capture.isOpened():
            raise SourceBroken(f"{self._target}: OpenCV cannot open it as a video; is it one, and is it reachable?")
        if width * height > MAX_IMAGE_PIXELS:
            raise SourceBroken(f"{self._target}: {width:.0f} x {height:.0f} px, admitted are {MAX_IMAGE_PIXELS} pixels")
        return capture

    def _pump(self, capture: cv2.VideoCapture) -> SourceError:
        """Read until the end or until closed; returns what ended it."""
        expected = 0 if self.live else int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        count = 0
        while not self._stop.is_set():
            ok, picture = capture.read()
            if not ok:
                return self._end(count, expected)
            captured_ns, received_ns = self._clock.wall_ns(), self._clock.monotonic_ns()
            self._put((self._admit(picture), captured_ns, received_ns))
            count += 1
        return SourceBroken(f"{self._target}: closed")

    def _end(self, count: int, expected: int) -> SourceError:
        if self.live:
            return SourceBroken(f"{self._target}: the stream broke off after {count} frames")
        # Containers estimate their length, so a few frames may be missing; a file cut in two is not at its end.
        if count == 0 or count < expected - max(2, expected // 50):
            return SourceBroken(f"{self._target}: breaks off after {count} of {expected} frames; is the file whole?")
        return EndOfStream(f"{self._target}: all {count} frames were read")

    def _admit(self, picture: NDArray[Any]) -> NDArray[np.uint8]:
        """OpenCV's BGR or gray -> (H, W, 1 or 3)."""
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (1,), (3,)):
            raise SourceBroken(f"{self._target}: {picture.shape} {picture.dtype} frames, expected 8-bit gray or color")
        gray = picture.ndim == 2 or picture.shape[2] == 1
        if gray:
            converted = picture if self._channels == 1 else cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
        else:
            converted = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY if self._channels == 1 else cv2.COLOR_BGR2RGB)
        return np.ascontiguousarray(converted, np.uint8).reshape(*picture.shape[:2], self._channels)

    def _put(self, item: _Item) -> None:
        """Queue `item`: wait for room, or, for a frame of a live video, make it."""
        while not self._stop.is_set():
            try:
                self._items.put(item, block=not self._makes_room(item), timeout=0.1)
                return
            except queue.Full:
                if self._makes_room(item):
                    self._drop_oldest()

    def _makes_room(self, item: _Item) -> bool:
        return self.live and not isinstance(item, SourceError)

    def _drop_oldest(self) -> None:
        try:
            self._items.get_nowait()
            self.dropped += 1
        except queue.Empty:  # the reader was faster
            pass
