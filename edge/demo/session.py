"""One run of the simulated line: daemon, cameras and subscriber together, from first frame to final account.

Owns what happens in which order and that everything is ended again, whatever went wrong.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.client import Subscriber
from edge.demo.line import ConsoleProcess, DaemonProcess, FrameKey, Photo, SimulatedCamera, load_photos, write_config
from edge.errors import KizuError, SourceTimeout
from edge.events import DefectEvent

CAMERAS: Final = ("left", "right")
_READY_TIMEOUT_S: Final = 60.0
_LAST_WORDS_S: Final = 15.0


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """One event as it reached the subscriber, the photograph it is about, and the time since that was taken."""

    event: DefectEvent
    mask: NDArray[np.bool_] | None
    photo: Photo
    latency_s: float


class Summary(msgspec.Struct, frozen=True):
    """The account of a run; `lost` are frames whose verdict never reached the subscriber.

    Latency is from the camera's picture to the subscriber's event, so it includes the camera's wait for credit.
    """

    frames: int
    accept: int
    reject: int
    inconclusive: int
    lost: int
    fps: float
    latency_p50_ms: float
    latency_p99_ms: float


def run_session(
    bundle: Path, backend: str, seconds: float, fps: float, on_page: Callable[[str], None] | None = None
) -> Generator[Seen, None, Summary]:
    """Yield every event as it comes, for `seconds` from the cameras' start; then return the account.

    `fps` is each camera's rate. With `on_page` there is an operator's console too, and it is told the page's address.
    Closing the generator ends daemon, console and cameras at once.

    Raises:
        KizuError: a part of the line failed; with the daemon's last words.
    """
    photos = load_photos()
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="kizu-demo-")))
        config = write_config(
            folder / "line.toml", bundle, CAMERAS, engine={"backend": backend}, replay_address="tcp://127.0.0.1:*"
        )
        daemon = opened.enter_context(DaemonProcess(config))
        ready = daemon.wait_until_ready(_READY_TIMEOUT_S)
        subscriber = opened.enter_context(Subscriber(ready["events_address"], line="demo"))
        subscriber.wait_until_connected(10.0)
        if on_page is not None:
            on_page(opened.enter_context(ConsoleProcess(config, ready)).page)
        # Each camera starts elsewhere on the belt, so that the two do not show the same nut.
        cameras = [
            SimulatedCamera(ready["frames_address"], name, photos[index * 7 :] + photos[: index * 7], fps)
            for index, name in enumerate(CAMERAS)
        ]
        return (yield from _follow(daemon, subscriber, cameras, seconds))


def _follow(
    daemon: DaemonProcess, subscriber: Subscriber, cameras: Sequence[SimulatedCamera], seconds: float
) -> Generator[Seen, None, Summary]:
    heard: dict[FrameKey, Seen] = {}
    start = last = time.monotonic()
    for camera in cameras:
        camera.start()
    try:
        while not _is_over(cameras, heard, time.monotonic() - start - seconds, time.monotonic() - last):
            _check(daemon, cameras)
            if time.monotonic() - start >= seconds:
                for camera in cameras:
                    camera.stop()
            try:
                event, mask = subscriber.receive(0.1)
            except SourceTimeout:
                continue
            key = (event.camera, event.camera_epoch, event.frame_sequence)
            photo = _photo(cameras, key)
            if key in heard or photo is None:
                continue
            last = time.monotonic()
            heard[key] = Seen(event, mask, photo, max(0.0, time.time_ns() - event.captured_ns) / 1e9)
            yield heard[key]
        return _account(cameras, heard, last - start)
    finally:
        for camera in cameras:
            camera.stop()


def _photo(cameras: Sequence[SimulatedCamera], key: FrameKey) -> Photo | None:
    """The photograph that was sent as frame `key`; a camera notes it just after sending, so it may take a moment."""
    for _ in range(100):
        for camera in cameras:
            if key in camera.sent:
                return camera.sent[key]
        time.sleep(0.01)
    return None


def _is_over(cameras: Sequence[SimulatedCamera], heard: dict[FrameKey, Seen], late_s: float, silent_s: float) -> bool:
    if late_s < 0 or any(camera.is_alive() for camera in cameras):
        return False
    sent = sum(len(camera.sent) for camera in cameras)
    return len(heard) >= sent or min(late_s, silent_s) > _LAST_WORDS_S


def _check(daemon: DaemonProcess, cameras: Sequence[SimulatedCamera]) -> None:
    if not daemon.running:
        raise KizuError(f"the daemon ended before its time; its output:\n{daemon.output}")
    for camera in cameras:
        if camera.error is not None:
            raise KizuError(f"{camera.name}: {camera.error}; the daemon's output:\n{daemon.output}") from camera.error


def _account(cameras: Sequence[SimulatedCamera], heard: dict[FrameKey, Seen], active_s: float) -> Summary:
    sent = {key for camera in cameras for key in camera.sent}
    decisions = Counter(seen.event.decision for seen in heard.values())
    latencies_ms = sorted(seen.latency_s * 1e3 for seen in heard.values()) or [0.0]
    return Summary(
        frames=len(sent),
        accept=decisions["accept"],
        reject=decisions["reject"],
        inconclusive=decisions["inconclusive"],
        lost=len(sent - heard.keys()),
        fps=round(len(heard) / active_s, 2) if active_s > 0 else 0.0,
        latency_p50_ms=round(_percentile(latencies_ms, 0.50), 1),
        latency_p99_ms=round(_percentile(latencies_ms, 0.99), 1),
    )


def _percentile(ascending: Sequence[float], share: float) -> float:
    """Nearest rank."""
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]
