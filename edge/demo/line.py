"""The simulated line: a daemon in a process of its own, and cameras that send photographs to it over real sockets.

Owns starting, stopping and what was sent; showing it is `commands.demo`'s. Tests and benchmarks run their daemons
through here as well, so that what they measure is what a user gets.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from edge import images
from edge.errors import BundleError, DataError, KizuError
from edge.sender import CameraSender

FrameKey = tuple[str, int, int]

PHOTOS: Final = Path(__file__).parent / "photos"
BUNDLE: Final = Path(__file__).parent / "bundle"
_ENCODINGS: Final = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png"}


@dataclass(frozen=True, slots=True, eq=False)
class Photo:
    """An encoded picture as it lies on disk; `good` is what a person says about it."""

    path: Path
    data: bytes
    encoding: str
    width: int
    height: int
    good: bool


def load_photos(folder: Path = PHOTOS) -> list[Photo]:
    """The photographs below `folder` (test/good, test/KIND), two good ones to each defective one, in a fixed order.

    Raises:
        DataError: there are none.
    """
    paths = sorted(path for path in folder.glob("test/*/*") if path.suffix in _ENCODINGS)
    good = [_photo(path, True) for path in paths if path.parent.name == "good"]
    bad = [_photo(path, False) for path in paths if path.parent.name != "good"]
    if not good or not bad:
        raise DataError(f"{folder} has no test/good and test/KIND photographs; install kizu again")
    belt: list[Photo] = []
    for index, defective in enumerate(bad):
        belt += [good[2 * index % len(good)], good[(2 * index + 1) % len(good)], defective]
    return belt


def _photo(path: Path, good: bool) -> Photo:
    data = path.read_bytes()
    header = images.sniff(data)
    return Photo(path, data, _ENCODINGS[path.suffix], header.width, header.height, good)


def write_config(path: Path, bundle: Path, cameras: Sequence[str], /, **tables: Mapping[str, object] | object) -> Path:
    """Write a daemon's TOML file with addresses on loopback that the system chooses; `tables` add or replace keys.

    Raises:
        BundleError: there is no bundle.
    """
    if not (bundle / "bundle.json").is_file():
        raise BundleError(
            f"bundle {bundle} does not exist; name one with --bundle, or train one with `kizu train student-teacher`"
        )
    content: dict[str, object] = {
        "line": "demo",
        "bundle": str(bundle.absolute()),
        "frames_address": "tcp://127.0.0.1:*",
        "events_address": "tcp://127.0.0.1:*",
        "log": {"path": "events.sqlite"},
        "metrics": {"port": 0},
        "cameras": [{"name": name} for name in cameras],
        **tables,
    }
    path.write_text(_toml(content), encoding="utf-8")
    return path


def _toml(content: Mapping[str, object]) -> str:
    """Enough TOML for `write_config`: JSON spells scalars and arrays of them the same way."""
    scalars = [f"{key} = {json.dumps(value)}" for key, value in content.items() if not _is_table(value)]
    tables: list[str] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            tables += [f"[{key}]", _toml(value)]
        elif _is_table(value):
            assert isinstance(value, list)
            for item in value:
                tables += [f"[[{key}]]", _toml(item)]
    return "\n".join([*scalars, *tables])


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and bool(value) and isinstance(value[0], Mapping))


class DaemonProcess:
    """`kizu run CONFIG` as a child process; leaving the context ends it, in order if it can be.

    `ready` is its ready line once `wait_until_ready` returned; `lines` are its last log lines.
    """

    def __init__(self, config: Path, *, environment: Mapping[str, str] | None = None) -> None:
        self.ready: dict[str, Any] = {}
        self.lines: deque[str] = deque(maxlen=200)
        self._found: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edge.cli", "run", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=None if environment is None else dict(environment),
            # Ctrl-C is for us; we tell the child when its time has come.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="daemon-output", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    def wait_until_ready(self, timeout_s: float) -> dict[str, Any]:
        """Return the fields of its ready line.

        Raises:
            KizuError: it ended, or said nothing within `timeout_s`; with its last words.
        """
        try:
            found = self._found.get(timeout=timeout_s)
        except Empty:
            raise KizuError(f"the daemon was not ready within {timeout_s} s; its output:\n{self.output}") from None
        if found is None:
            self._process.wait()
            raise KizuError(f"the daemon ended with {self._process.returncode}; its output:\n{self.output}")
        self.ready = found
        return found

    @property
    def output(self) -> str:
        """Its last lines."""
        return "\n".join(self.lines)

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM, then SIGKILL after `timeout_s`; return its exit status."""
        if self.running:
            self._process.terminate()
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """SIGKILL; return its exit status."""
        self._process.kill()
        return self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._reader.join(2.0)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.lines.append(line.rstrip("\n"))
                if '"ready"' in line:
                    self._note(line)
        self._found.put(None)

    def _note(self, line: str) -> None:
        try:
            fields = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.MsgspecError:
            return  # words of a library that happen to contain ours
        if fields.get("event") == "ready":
            self._found.put(fields)


class ConsoleProcess:
    """`kizu console` as a child process for the daemon of `config`, whose ready line is `ready`; `page` is its address.

    Raises:
        KizuError: it ended instead of serving; with its words.
    """

    def __init__(self, config: Path, ready: Mapping[str, Any], *options: str) -> None:
        sockets = [ready["events_address"], *(["--replay", ready["replay_address"]] if ready["replay_address"] else [])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edge.cli", "console", *sockets, "--config", str(config), "--port", "0", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        told = self._process.stdout.readline()
        if "http://" not in told:
            self._process.wait()
            raise KizuError(f"the console ended with {self._process.returncode}: {told}{self._process.stdout.read()}")
        self.page = told.split()[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class SimulatedCamera(threading.Thread):
    """Sends photographs round and round at `fps` until stopped, then waits until all are acknowledged.

    Slower where the daemon is: credits hold it back. `sent` maps each frame to its photograph, `error` says what ended
    it too early, `unacknowledged` what was left.
    """

    def __init__(self, address: str, name: str, photos: Sequence[Photo], fps: float) -> None:
        super().__init__(name=f"camera-{name}", daemon=True)
        self.sent: dict[FrameKey, Photo] = {}
        self.unacknowledged = 0
        self.error: KizuError | None = None
        self._address = address
        self._camera = name
        self._photos = photos
        self._interval_s = 1.0 / fps
        self._over = threading.Event()

    def stop(self) -> None:
        """Take no more pictures; `join` waits for the last acknowledgements."""
        self._over.set()

    def run(self) -> None:
        """The thread's work."""
        try:
            with CameraSender(self._address, self._camera) as sender:
                self._take_pictures(sender)
                self.unacknowledged = sender.drain(15.0)
        except KizuError as error:
            self.error = error

    def _take_pictures(self, sender: CameraSender) -> None:
        due = time.monotonic()
        while not self._over.is_set():
            photo = self._photos[len(self.sent) % len(self._photos)]
            frame = sender.send_encoded(photo.data, photo.encoding, photo.width, photo.height, timeout_s=15.0)
            self.sent[frame.key] = photo
            # A picture that waited for credit does not make the next ones hurry.
            due = max(due + self._interval_s, time.monotonic())
            while (wait_s := due - time.monotonic()) > 0 and not self._over.is_set():
                sender.pump(min(wait_s, 0.05))
