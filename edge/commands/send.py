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

from edge.errors import CommandError, DataError, EndOfStream, SinkError, SinkFull, SourceTimeout, WireError

if TYPE_CHECKING:
    from edge.protocols import Clock, Source
    from edge.sender import CameraSender
    from edge.types import Frame

ENCODINGS: Final = ("png", "jpeg", "raw")
_REPORT_S: Final = 60.0


def send(
    source: Annotated[
        str, typer.Argument(help="Folder of images, image, video file, URL, or number of a camera device.")
    ],
    camera: Annotated[str, typer.Option(help="Name of the camera, as in the daemon's configuration.")],
    to: Annotated[str, typer.Option(help="The daemon's address, e.g. tcp://127.0.0.1:5550.")],
    fps: Annotated[float | None, typer.Option(help="Frames per second; default: as fast as they are admitted.")] = None,
    encoding: Annotated[str, typer.Option(help="png, jpeg or raw.")] = "png",
    loop: Annotated[bool, typer.Option("--loop", help="Start over at the end of a folder or file.")] = False,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after this many frames.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the daemon before giving up.")] = 30.0,
    give_up_after: Annotated[
        float, typer.Option(min=0.0, help="Seconds for which a lost stream or device is opened again; 0: not at all.")
    ] = 86_400.0,
    key: Annotated[
        Path | None, typer.Option(help="The camera's secret key file, from `kizu keys camera NAME`.")
    ] = None,
    server_key: Annotated[Path | None, typer.Option(help="The daemon's public key file, to go with --key.")] = None,
    plain_off_host: Annotated[
        bool, typer.Option("--plain-off-host", help="Send unencrypted to another host, on a network that is yours.")
    ] = False,
) -> None:
    """Send pictures as a camera does, and again what the daemon did not acknowledge.

    Raises:
        CommandError: an option cannot be used.
        DataError: the folder is missing or empty, or no file in it is a picture.
        SinkError: the daemon admitted nothing for `timeout` seconds, or never acknowledged some frames.
    """
    from edge.clock import SystemClock
    from edge.keys import client_keys
    from edge.sender import CameraSender

    _check_options(camera, fps, encoding, timeout)
    clock = SystemClock()
    pictures = open_source(source, camera, clock, give_up_after)
    keys = client_keys(key, server_key)
    with pictures, CameraSender(to, camera, clock=clock, plain_off_host=plain_off_host, keys=keys) as sender:
        job = _Job(sender, clock, cast(Literal["png", "jpeg", "raw"], encoding), fps, count, timeout)
        try:
            job.send_all(pictures)
            # A source that gives nothing would be opened again and again without end.
            while loop and job.taken and not job.done:
                with open_source(source, camera, clock) as again:
                    job.send_all(again)
        except KeyboardInterrupt:
            print("stopping: waiting for acknowledgements", file=sys.stderr)
        except SinkFull:
            job.conclude(sender.left)
            raise
        left = sender.drain(timeout)
        job.conclude(left)
        if left:
            raise SinkError(f"{left} frames were never acknowledged by {to} within {timeout} s; see the daemon's log")
        if job.skipped and not job.taken:
            raise DataError(f"{source}: none of its {job.skipped} files is a picture that can be sent; see above")


def _check_options(camera: str, fps: float | None, encoding: str, timeout: float) -> None:
    from edge.wire import check_name

    try:
        check_name(camera, "--camera")
    except WireError as error:
        raise CommandError(str(error)) from None
    if encoding not in ENCODINGS:
        raise CommandError(f"--encoding {encoding}: expected one of {', '.join(ENCODINGS)}")
    if fps is not None and not 1e-3 <= fps <= 1e6:
        raise CommandError(f"--fps {fps}: expected a number of frames per second from 0.001 to 1000000")
    if not 0 < timeout <= 1e6:
        raise CommandError(f"--timeout {timeout}: expected a number of seconds above 0, at most 1000000")


def open_source(target: str, camera: str, clock: Clock, give_up_after_s: float = 0.0) -> Source:
    """A folder or a picture, or else what OpenCV opens: a device number, a URL or a video file.

    A URL or device that is lost is opened again for `give_up_after_s`.

    Raises:
        DataError: the folder holds no image.
        CommandError: there is no such file.
    """
    from edge.images import IMAGE_SUFFIXES
    from edge.sources.folder import FolderSource
    from edge.sources.reconnect import ReconnectingSource
    from edge.sources.video import VideoSource

    # As a "video" a picture would pass OpenCV unguarded: a truncated one would be sent as if it were whole.
    if Path(target).is_dir() or (Path(target).is_file() and Path(target).suffix.lower() in IMAGE_SUFFIXES):
        return FolderSource(Path(target), camera, clock=clock, recursive=True)
    if not target.isdigit() and "://" not in target and not Path(target).exists():
        raise CommandError(f"{target}: no such folder or file; expected DIR, VIDEO, URL or the number of a device")
    if give_up_after_s > 0 and (target.isdigit() or "://" in target):
        return ReconnectingSource(
            lambda: VideoSource(target, camera, clock=clock),
            clock=clock,
            give_up_after_s=give_up_after_s,
            on_event=lambda text: print(f"{target}: {text}", file=sys.stderr, flush=True),
        )
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
    told: set[str] = field(default_factory=set)
    in_touch: bool = True
    line: _ProgressLine = field(default_factory=lambda: _ProgressLine(sys.stderr))

    @property
    def done(self) -> bool:
        return self.count is not None and self.taken >= self.count

    def send_all(self, pictures: Source) -> None:
        from edge.types import Unreadable

        live = bool(getattr(pictures, "live", False))
        while not self.done:
            self._say_if_lost()
            try:
                picture = pictures.read(0.1)
            except SourceTimeout:
                self.sender.pump()
                continue
            except EndOfStream:
                return
            if isinstance(picture, Unreadable):
                self.skipped += 1
                if picture.detail not in self.told:  # once, not once in each round of --loop
                    self.told.add(picture.detail)
                    self.line.say(f"skipped: {picture.detail}")
            elif not live or self.clock.monotonic_ns() >= self.due_ns:
                # A live picture that comes before its time is left out: the device, not we, sets the pace.
                self._send(picture)

    def _say_if_lost(self) -> None:
        if self.taken and self.sender.in_touch != self.in_touch:
            self.in_touch = self.sender.in_touch
            lost = "no word from the daemon; what is unacknowledged will be sent again"
            self.line.say("the daemon is back" if self.in_touch else lost)

    def conclude(self, left: int) -> None:
        """The last line on stdout: what became of the frames."""
        self.line.close()
        sender = self.sender
        typer.echo(f"sent {sender.sent}, resent {sender.resent}, acknowledged {sender.acknowledged}, left {left}")

    def _send(self, frame: Frame) -> None:
        now_ns = self.clock.monotonic_ns()
        while now_ns < self.due_ns:
            # `pump` returns at the first credit, so this may go round several times.
            self.sender.pump((self.due_ns - now_ns) / 1e9)
            now_ns = self.clock.monotonic_ns()
        if self.fps is not None:
            self.due_ns = max(self.due_ns, now_ns - round(1e9 / self.fps)) + round(1e9 / self.fps)
        captured_ns = frame.id.captured_ns
        self.sender.send(frame.image, encoding=self.encoding, captured_ns=captured_ns, timeout_s=self.timeout_s)
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
