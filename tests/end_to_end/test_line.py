"""The whole line: a real daemon as a process, real sockets, real photographs, a real log."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge import sockets, wire
from edge.bundle import ModelBundle
from edge.client import Subscriber
from edge.clock import SystemClock
from edge.demo.line import DaemonProcess, Photo, load_photos, write_config
from edge.errors import KizuError, SinkFull, SourceTimeout
from edge.events import DefectEvent
from edge.sender import CameraSender
from edge.sinks.event_log import EventLog

ROOT = Path(__file__).parents[2]
CAMERAS = ("left", "right")
Key = tuple[str, int, int]


@pytest.fixture(scope="module")
def photos() -> list[Photo]:
    return load_photos()


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., ModelBundle], tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """What the daemon runs; any bundle for color frames will do."""
    return make_bundle(tmp_path_factory.mktemp("line") / "bundle", channels=3)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: an ipc address has room for 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kizu-") as name:
        yield Path(name)


def logged(folder: Path) -> list[DefectEvent]:
    """Every event of the log, after its own checks of numbering and checksums."""
    log = EventLog(folder / "events.sqlite", SystemClock())
    try:
        log.verify()
        return [event for event, _ in log.read_since(0, 100_000)]
    finally:
        log.close()


def key(event: DefectEvent) -> Key:
    return event.camera, event.camera_epoch, event.frame_sequence


def samples(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def total(found: dict[str, float], name: str, **labels: str) -> float:
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(value for key, value in found.items() if key.startswith(name) and all(part in key for part in wanted))


def adds_up(found: dict[str, float]) -> bool:
    return all(
        total(found, "kizu_frames_received_total", camera=camera)
        == total(found, "kizu_verdicts_total", camera=camera) + total(found, "kizu_frames_in_flight", camera=camera)
        for camera in CAMERAS
    )


class Listener(threading.Thread):
    """Collects events until told to end."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.events: list[DefectEvent] = []
        self.subscriber = Subscriber(address)
        self.subscriber.wait_until_connected(20)
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.is_set():
            try:
                self.events.append(self.subscriber.receive(0.1)[0])
            except SourceTimeout:
                continue

    def finish(self, count: int) -> list[DefectEvent]:
        deadline = time.monotonic() + 20
        while len(self.events) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        self.over.set()
        self.join()
        self.subscriber.close()
        return self.events


def send(address: str, camera: str, photos: list[Photo], count: int, sent: list[Key]) -> None:
    with CameraSender(address, camera) as sender:
        for index in range(count):
            photo = photos[index % len(photos)]
            sent.append(sender.send_encoded(photo.data, photo.encoding, photo.width, photo.height, timeout_s=30).key)
        assert sender.drain(30) == 0


def hostile_messages(photo: Photo) -> list[list[bytes]]:
    """What a broken or evil peer may send, none of it nameable as a frame of an admitted connection."""
    header = b'{"type":"frame","version":1,"camera":"left","epoch":9,"sequence":0,"captured_ns":0,"encoding":"jpeg"}'
    hello = b'{"type":"hello","version":1,"camera":"%s","epoch":5}'
    return [
        [b""],
        [b"\xff" * 100_000],
        [b"{" * 4000],
        [b"null", photo.data],
        [header, photo.data],
        [b'{"type":"frame","version":1,"camera":"../etc","epoch":1,"sequence":1,"captured_ns":0}', b""],
        [b'{"type":"frame","version":99,"camera":"left","epoch":1,"sequence":1,"captured_ns":0}', b""],
        [hello % b"nobody"],
        [hello % b"left/"],
        [b'{"type":"bye","version":1}'],
        [header] * 50,
    ]


def nameable_nonsense(camera: str, epoch: int, photo: Photo) -> list[list[Any]]:
    """Frames that can be named but not looked at: each must come out INCONCLUSIVE."""

    def header(sequence: int, encoding: str, width: int, height: int) -> bytes:
        named = wire.FrameHeader(1, camera, epoch, sequence, 0, encoding, width, height)
        return bytes(wire.pack_frame(named, b"")[0])

    return [
        [header(0, "jpeg", photo.width, photo.height), photo.data[: len(photo.data) // 2]],
        [header(1, "mono8", 100, 100), b"short"],
        [header(2, "mono8", -5, 10), b"x" * 50],
        [header(3, "mono8", 2**31, 2**31), b"x"],
        [header(4, "png", 8, 8), b"\x89PNG\r\n\x1a\n" + b"\0" * 20],
        [header(5, "smell", 8, 8), b"x" * 64],
        [header(6, "mono8", 16, 16), b"x" * 256],  # readable, but smaller than the bundle takes
    ]


def test_every_frame_has_one_verdict_in_log_events_and_metrics_whatever_else_is_sent(
    folder: Path, bundle: ModelBundle, photos: list[Photo]
) -> None:
    """Two honest cameras, a hostile peer and one that sends nonsense under its own name, all at once."""
    config = write_config(folder / "line.toml", bundle.path, (*CAMERAS, "noise"))
    sent: list[Key] = []
    with DaemonProcess(config) as daemon:
        ready = daemon.wait_until_ready(60)
        listener = Listener(ready["events_address"])
        address = ready["frames_address"]
        cameras = [threading.Thread(target=send, args=(address, name, photos, 40, sent)) for name in CAMERAS]
        for camera in cameras:
            camera.start()
        evil, noise = sockets.dealer(address, hwm=1000), sockets.dealer(address, hwm=1000)
        noise.send_multipart(wire.pack_hello("noise", 77))
        for message in nameable_nonsense("noise", 77, photos[0]):
            noise.send_multipart(message)
        scrapes = []
        while any(camera.is_alive() for camera in cameras):
            for message in hostile_messages(photos[0]):
                evil.send_multipart(message)
            scrapes.append(samples(ready["metrics_url"]))
            time.sleep(0.02)
        events = listener.finish(87)
        found = samples(ready["metrics_url"])
        for socket in (evil, noise):
            socket.close(linger=0)
        status = daemon.stop()

    rows = logged(folder)
    honest = [event for event in rows if event.camera in CAMERAS]
    nonsense = {event.frame_sequence: (event.decision, event.reason) for event in rows if event.camera == "noise"}
    assert status == 0, daemon.output
    assert sorted(map(key, honest)) == sorted(sent) and len(set(sent)) == 80
    assert {event.reason for event in honest} == {"score"}
    assert nonsense == dict.fromkeys(range(6), ("inconclusive", "unreadable")) | {6: ("inconclusive", "shape")}
    assert [event.log_sequence for event in events] == list(range(1, 88)) and listener.subscriber.lost == 0
    assert Counter(map(key, events)) == Counter(map(key, rows))
    assert total(found, "kizu_verdicts_total") == total(found, "kizu_frames_received_total") == 87
    assert total(found, "kizu_messages_refused_total") >= len(hostile_messages(photos[0]))
    assert all(adds_up(scrape) for scrape in [*scrapes, found])
    # What a hostile peer calls itself becomes no label: the cameras are the configured ones.
    assert {name[1] for series in found if (name := re.search(r'camera="([^"]*)"', series))} == {*CAMERAS, "noise"}


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_daemon_that_ends_in_the_middle_loses_nothing_and_judges_nothing_twice(
    folder: Path, bundle: ModelBundle, photos: list[Photo], end: str
) -> None:
    """SIGTERM or SIGKILL mid-stream: what was acknowledged is in the log, the rest is sent again to the next daemon."""
    config = write_config(
        folder / "line.toml", bundle.path, CAMERAS, frames_address=f"ipc://{folder}/frames", engine={"backend": "fake"}
    )
    keys: list[Key] = []
    with CameraSender(f"ipc://{folder}/frames", "left", resend_after_s=0.5) as sender:

        def take(count: int) -> None:
            for _ in range(count):
                photo = photos[len(keys) % len(photos)]
                keys.append(
                    sender.send_encoded(photo.data, photo.encoding, photo.width, photo.height, timeout_s=30).key
                )

        with DaemonProcess(config) as daemon:
            daemon.wait_until_ready(60)
            take(40)
            getattr(daemon, end)()
            with pytest.raises(SinkFull):
                while True:
                    photo = photos[0]
                    keys.append(
                        sender.send_encoded(photo.data, photo.encoding, photo.width, photo.height, timeout_s=0.3).key
                    )
            acknowledged = sender.acknowledged
        before = {key(event) for event in logged(folder)}
        with DaemonProcess(config) as daemon:
            ready = daemon.wait_until_ready(60)
            take(20)
            assert sender.drain(30) == 0
            found = samples(ready["metrics_url"])
            daemon.stop()

    after = Counter(key(event) for event in logged(folder))
    assert acknowledged <= len(before)
    assert set(keys[:acknowledged]) <= before
    assert after == Counter(keys)
    assert total(found, "kizu_verdicts_total") == len(keys) - len(before)


def test_frames_in_flight_at_sigterm_are_judged_and_acknowledged(
    folder: Path, bundle: ModelBundle, photos: list[Photo]
) -> None:
    """The stop is orderly: exit status 0, and the cameras heard about everything that was logged."""
    config = write_config(folder / "line.toml", bundle.path, CAMERAS)
    with DaemonProcess(config) as daemon:
        ready = daemon.wait_until_ready(60)
        with CameraSender(ready["frames_address"], "left") as sender:
            for photo in photos[:8]:
                sender.send_encoded(photo.data, photo.encoding, photo.width, photo.height, timeout_s=30)
            stopping = threading.Thread(target=daemon.stop)
            stopping.start()
            while stopping.is_alive():
                sender.pump(0.02)
            sender.pump(0.1)
            acknowledged = sender.acknowledged

    assert len(logged(folder)) == acknowledged
    assert any('"stopped"' in line and '"failure":null' in line for line in daemon.lines)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bundle": "nowhere"}, "bundle"),
        ({"window": "8"}, "window"),
        ({"speed": 3}, "speed: unknown key"),
        ({"frames_address": "tcp://0.0.0.0:5550"}, "plain_off_host"),
        ({"batching": {"max_batch": 99}}, "batching.max_batch is 99"),
    ],
)
def test_a_daemon_that_cannot_start_ends_with_2_and_the_next_step(
    folder: Path, bundle: ModelBundle, change: dict[str, object], words: str
) -> None:
    """On stderr, in one message, without a traceback."""
    config = write_config(folder / "line.toml", bundle.path, CAMERAS, **change)

    with DaemonProcess(config) as daemon, pytest.raises(KizuError, match="ended with 2") as ended:
        daemon.wait_until_ready(60)

    assert words in str(ended.value)
    assert "Traceback" not in str(ended.value)


def test_a_changed_bundle_is_refused(folder: Path, make_bundle: Callable[..., ModelBundle]) -> None:
    """One byte of the model: the daemon names the file and ends with 2."""
    changed = make_bundle(folder / "bundle", channels=3)
    model = changed.path / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"\x01")
    config = write_config(folder / "line.toml", changed.path, CAMERAS)

    with DaemonProcess(config) as daemon, pytest.raises(KizuError, match=r"ended with 2[^$]*model\.onnx was changed"):
        daemon.wait_until_ready(60)


def test_what_another_daemon_holds_is_named(folder: Path, bundle: ModelBundle) -> None:
    """Port in use, log in use: exit status 2, and which key or address it is."""
    engine = {"backend": "fake"}
    with DaemonProcess(write_config(folder / "one.toml", bundle.path, CAMERAS, engine=engine)) as first:
        ready = first.wait_until_ready(60)
        port = int(ready["metrics_url"].split(":")[2].split("/")[0])
        other: dict[str, object] = {"log": {"path": "other.sqlite"}}
        cases: list[tuple[dict[str, object], str]] = [
            ({**other, "metrics": {"port": port}}, "metrics.port"),
            ({**other, "frames_address": ready["frames_address"]}, ready["frames_address"]),
            ({**other, "events_address": ready["events_address"]}, ready["events_address"]),
            ({}, "open in another process"),
        ]
        for changes, words in cases:
            second = write_config(folder / "two.toml", bundle.path, CAMERAS, engine=engine, **changes)
            with DaemonProcess(second) as daemon, pytest.raises(KizuError, match="ended with 2") as ended:
                daemon.wait_until_ready(60)
            assert words in str(ended.value)


def test_memory_does_not_grow_with_frames(folder: Path, bundle: ModelBundle, photos: list[Photo]) -> None:
    """A short form of benchmarks/memory.py: after a warm-up, thousands of frames leave nothing behind."""
    import psutil

    config = write_config(folder / "line.toml", bundle.path, CAMERAS, engine={"backend": "fake"})
    pixels = b"\x80" * (64 * 64 * 3)
    with DaemonProcess(config) as daemon:
        ready = daemon.wait_until_ready(60)
        process = psutil.Process(daemon.pid)
        resident = []
        with CameraSender(ready["frames_address"], "left") as sender:
            for _ in range(2):
                for _ in range(2500):
                    sender.send_encoded(pixels, "rgb8", 64, 64, timeout_s=30)
                assert sender.drain(30) == 0
                resident.append(process.memory_info().rss)

    assert resident[1] < resident[0] * 1.05


def test_the_demo_loses_nothing_and_its_last_line_is_the_account(bundle: ModelBundle) -> None:
    """`kizu demo --json`, as a stranger types it; verdicts go to stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "edge.cli", "demo", "--seconds", "2", "--json", "--bundle", str(bundle.path)],
        cwd=ROOT, capture_output=True, text=True, timeout=90,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    account = json.loads(line)
    assert list(account) == [
        "frames", "accept", "reject", "inconclusive", "lost", "fps", "latency_p50_ms", "latency_p99_ms",
    ]  # fmt: skip
    assert account["frames"] == account["accept"] + account["reject"] >= 8
    assert (account["lost"], account["inconclusive"]) == (0, 0)
    assert "ACCEPT" in done.stderr or "REJECT" in done.stderr


def test_a_terminated_demo_leaves_no_daemon_behind(bundle: ModelBundle, folder: Path) -> None:
    """SIGTERM while verdicts come: the daemon is ended with the demo."""
    import psutil

    demo = subprocess.Popen(
        [sys.executable, "-m", "edge.cli", "demo", "--seconds", "60", "--bundle", str(bundle.path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(folder)},
    )  # fmt: skip
    assert demo.stdout is not None
    for line in demo.stdout:
        if "ACCEPT" in line or "REJECT" in line:
            break
    children = psutil.Process(demo.pid).children(recursive=True)
    demo.terminate()
    demo.stdout.close()

    assert demo.wait(30) == 143
    assert children and psutil.wait_procs(children, 10)[1] == []
    assert list(folder.iterdir()) == []
