"""`kizu send DIR|VIDEO|URL|DEVICE`: a camera made of a folder, a file, a stream or a device.

Owns the rate and what is told to the person in front of it; the protocol is `sender`'s.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, TextIO, cast

import typer

from edge.errors import CommandError, EndOfStream, SinkError, SinkFull, SourceTimeout

if TYPE_CHECKING:
    from edge.protocols import Clock, Source
    from edge.sender import CameraSender
    from edge.types import Frame

ENCODINGS: Final = ("png", "jpeg", "raw")
_REPORT_S: Final = 60.0


def send(
    source: Annotated[str, typer.Argument(help="Folder of images, video file, URL, or number of a camera device.")],
    camera: Annotated[str, typer.Option(help="Name of the camera, as in the daemon's configuration.")],
    to: Annotated[str, typer.Option(help="The daemon's address, e.g. tcp://127.0.0.1:5550.")],
    fps: Annotated[float | None, typer.Option(help="Frames per second; default: as fast as they are admitted.")] = None,
    encoding: Annotated[str, typer.Option(help="png, jpeg or raw.")] = "png",
    loop: Annotated[bool, typer.Option("--loop", help="Start over at the end of a folder or file.")] = False,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after this many frames.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the daemon before giving up.")] = 30.0,
    plain_off_host: Annotated[
        bool, typer.Option("--plain-off-host", help="Send unencrypted to another host, on a network that is yours.")
    ] = False,
) -> None:
    """Send pictures as a camera does, and again what the daemon did not acknowledge.

    Raises:
        CommandError: an option cannot be used.
        DataError: the folder is missing or empty.
        SinkError: the daemon admitted nothing for `timeout` seconds, or never acknowledged some frames.
    """
    from edge.clock import SystemClock
    from edge.sender import CameraSender

    if encoding not in ENCODINGS:
        raise CommandError(f"--encoding {encoding}: expected one of {', '.join(ENCODINGS)}")
    if fps is not None and not fps > 0:
        raise CommandError(f"--fps {fps}: expected a positive number")
    clock = SystemClock()
    pictures = open_source(source, camera, clock)
    with pictures, CameraSender(to, camera, clock=clock, plain_off_host=plain_off_host) as sender:
        job = _Job(sender, clock, cast(Literal["png", "jpeg", "raw"], encoding), fps, count, timeout)
        try:
            job.send_all(pictures)
            # A source that gives nothing would be opened again and again without end.
            while loop and job.taken and not job.done:
                with open_source(source, camera, clock) as again:
                    job.send_all(again)
        except KeyboardInterrupt:
            print("stopping: waiting for acknowledgements", file=sys.stderr)
        left = sender.drain(timeout)
        job.line.close()
        typer.echo(f"sent {sender.sent}, resent {sender.resent}, acknowledged {sender.acknowledged}, left {left}")
        if left:
            raise SinkError(f"{left} frames were never acknowledged by {to} within {timeout} s; see the daemon's log")


def open_source(target: str, camera: str, clock: Clock) -> Source:
    """A folder, or else what OpenCV opens: a device number, a URL or a file.

    Raises:
        DataError: the folder holds no image.
        CommandError: there is no such file.
    """
    from edge.sources.folder import FolderSource
    from edge.sources.video import VideoSource

    if Path(target).is_dir():
        return FolderSource(Path(target), camera, clock=clock, recursive=True)
    if not target.isdigit() and "://" not in target and not Path(target).exists():
        raise CommandError(f"{target}: no such folder or file; expected DIR, VIDEO, URL or the number of a device")
    return VideoSource(target, camera, clock=clock)


@dataclass(slots=True)
class _Job:
    """Frames at a rate until the source or the count ends; credits are taken while waiting."""

    sender: CameraSender
    clock: Clock
    encoding: Literal["png", "jpeg", "raw"]
    fps: float | None
    count: int | None
    timeout_s: float
    taken: int = 0
    skipped: int = 0
    due_ns: int = 0
    line: _ProgressLine = field(default_factory=lambda: _ProgressLine(sys.stderr))

    @property
    def done(self) -> bool:
        return self.count is not None and self.taken >= self.count

    def send_all(self, pictures: Source) -> None:
        from edge.types import Unreadable

        live = bool(getattr(pictures, "live", False))
        while not self.done:
            try:
                picture = pictures.read(0.1)
            except SourceTimeout:
                self.sender.pump()
                continue
            except EndOfStream:
                return
            if isinstance(picture, Unreadable):
                self.skipped += 1
                self.line.say(f"skipped: {picture.detail}")
            elif not live or self.clock.monotonic_ns() >= self.due_ns:
                # A live picture that comes before its time is left out: the device, not we, sets the pace.
                self._send(picture)

    def _send(self, frame: Frame) -> None:
        now_ns = self.clock.monotonic_ns()
        while now_ns < self.due_ns:
            # `pump` returns at the first credit, so this may go round several times.
            self.sender.pump((self.due_ns - now_ns) / 1e9)
            now_ns = self.clock.monotonic_ns()
        if self.fps is not None:
            self.due_ns = max(self.due_ns, now_ns - round(1e9 / self.fps)) + round(1e9 / self.fps)
        captured_ns = frame.id.captured_ns
        try:
            self.sender.send(frame.image, encoding=self.encoding, captured_ns=captured_ns, timeout_s=self.timeout_s)
        except SinkFull as full:
            raise SinkError(str(full)) from None
        self.taken += 1
        self.line.show(f"sent {self.taken}, acknowledged {self.sender.acknowledged}, skipped {self.skipped}")


class _ProgressLine:
    """One line that rewrites itself on a terminal; one line a minute elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._shown_s = time.monotonic()

    def show(self, text: str) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s < (0.1 if self._terminal else _REPORT_S):
            return
        self._shown_s = now_s
        self._stream.write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        self._stream.write(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")

    def close(self) -> None:
        if self._terminal:
            self._stream.write("\r\x1b[K")
