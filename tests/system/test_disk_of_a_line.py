"""A whole line whose log's file system becomes read-only or full: it says so, acknowledges nothing, and heals.

Real file systems: an ext4 that gives itself up (what the kernel does after an error of the disk) and a tmpfs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import pytest

from edge.bundle import ModelBundle
from edge.clock import SystemClock
from edge.demo.line import write_config
from edge.errors import SinkFull
from edge.sender import CameraSender
from edge.sinks import event_log
from edge.sinks.event_log import EventLog

HERE = Path(__file__).parent
GRAY = np.full((32, 32), 128, np.uint8)


def mount(*words: str | Path) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no permission to mount: {done.stderr.strip()}")


class Ext4:
    """An ext4 in a file. `spoil` is what the kernel does to one whose disk failed: read-only, whoever writes there."""

    said = "disk I/O error"

    def __init__(self, folder: Path) -> None:
        self.at, self._image = folder / "disk", folder / "image"
        self.at.mkdir()
        with self._image.open("wb") as file:
            file.truncate(64 * 1024 * 1024)
        try:
            subprocess.run(["mkfs.ext4", "-q", "-F", str(self._image)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no ext4 can be made here: {error}")
        mount("-o", "loop", self._image, self.at)

    def spoil(self) -> None:
        mount("-o", "remount,abort", self.at)

    def repair(self) -> None:
        self.close()
        mount("-o", "loop", self._image, self.at)

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.at)], check=True)


class Tmpfs:
    """A small tmpfs; `spoil` fills it to the last byte."""

    said = "full"

    def __init__(self, folder: Path) -> None:
        self.at = folder / "disk"
        self.at.mkdir()
        mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", self.at)

    def spoil(self) -> None:
        with (self.at / "ballast").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return

    def repair(self) -> None:
        (self.at / "ballast").unlink()

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.at)], check=True)


Disk = Ext4 | Tmpfs


@dataclass
class Line:
    """A daemon in a process whose log lies on `disk`, and a camera that never stops sending."""

    folder: Path
    disk: Disk
    config: Path
    plant: tuple[str, ...] = ()
    started: int = 0

    def __enter__(self) -> Self:
        self.acknowledged: set[tuple[int, int]] = set()
        self._over, self._pause, self._quiet = threading.Event(), threading.Event(), threading.Event()
        self._camera = threading.Thread(target=self._send)
        self._camera.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._camera.join(20)
        self.daemon.kill()
        self.daemon.wait(10)

    @property
    def log(self) -> Path:
        return self.disk.at / "events.sqlite"

    def start(self) -> None:
        self.started += 1
        self.output = self.folder / f"output-{self.started}"
        self.daemon = subprocess.Popen(
            [sys.executable, str(HERE / "line_daemon.py"), str(self.config), *self.plant],
            stdout=self.output.open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
        )

    def said(self, event: str) -> dict[str, Any] | None:
        """The daemon's own line about `event`, once it is there."""
        for line in self.output.read_text().split("\n")[:-1]:  # the last may not be there as a whole yet
            if f'"event":"{event}"' in line:
                found: dict[str, Any] = msgspec.json.decode(line)
                return found
        return None

    def until(self, what: str, done: Callable[[], object], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s\n{self.output.read_text()[-3000:]}"
            time.sleep(0.02)

    def spoil_between_commits(self) -> None:
        """Spoil the disk while the camera waits and nothing is being written, then let it go on.

        Linux says of the fsync that is under way when an ext4 is aborted by hand that it was done, and it was not: in 4
        of 40 tries of a program that does nothing but write and fsync. No log can keep a promise on that.
        """
        self._pause.set()
        self.until("the camera waits", self._quiet.is_set)
        self.disk.spoil()
        self._quiet.clear()
        self._pause.clear()

    def until_more_acknowledged(self, count: int = 30) -> None:
        wanted = len(self.acknowledged) + count
        self.until(f"{count} more are acknowledged", lambda: len(self.acknowledged) >= wanted)

    def logged(self) -> list[tuple[int, int]]:
        """What the repaired disk holds, in the log's order; the log must be sound."""
        with EventLog(self.log, SystemClock()) as log:
            log.verify()
            return [(event.camera_epoch, event.frame_sequence) for event, _ in log.read_since(0, 10**6)]

    def _send(self) -> None:
        with CameraSender(f"ipc://{self.folder}/frames", "cam", resend_after_s=0.5) as sender:
            out: set[tuple[int, int]] = set()
            while not self._over.is_set():
                if self._pause.is_set() and not out:
                    self._quiet.set()
                    time.sleep(0.01)
                    continue
                try:
                    if not self._pause.is_set():
                        frame = sender.send(GRAY, encoding="raw", timeout_s=0.1)
                        out.add((frame.epoch, frame.sequence))
                    else:
                        sender.drain(0.1)
                except SinkFull:
                    pass
                done = {one for one in out if one[1] not in sender._kept}
                out -= done
                self.acknowledged |= done


@pytest.fixture(params=[Ext4, Tmpfs], ids=["read-only", "full"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    made: Disk = request.param(tmp_path)
    yield made
    made.close()


@pytest.fixture
def line(disk: Disk, tiny_bundle: ModelBundle) -> Iterator[Line]:
    with tempfile.TemporaryDirectory(prefix="kizu-") as name:
        folder = Path(name)  # a short one: an ipc address has room for 107 bytes
        addresses = {f"{what}_address": f"ipc://{folder}/{what}" for what in ("frames", "events", "control")}
        log = {"path": str(disk.at / "events.sqlite")}
        config = write_config(
            folder / "line.toml", tiny_bundle.path, ["cam"], engine={"backend": "fake"}, log=log, **addresses
        )
        yield Line(folder, disk, config)


def is_ready(url: str) -> bool:
    """What a scrape says; nobody there is not ready either."""
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return 'kizu_state{state="ready"} 1.0' in page.read().decode()
    except OSError:
        return False


def test_a_lost_disk_stops_the_acknowledgements_and_a_repaired_one_brings_them_back(line: Line) -> None:
    """The daemon says why and ends with 1, so that systemd tries again; once repaired, everything is judged once."""
    line.start()
    with line:
        line.until("ready", lambda: line.said("ready"))
        url = (line.said("ready") or {})["metrics_url"]
        line.until_more_acknowledged()
        line.until("it is ready", lambda: is_ready(url))

        line.spoil_between_commits()
        line.until("it is not ready any more", lambda: not is_ready(url))
        line.until("the daemon ended", lambda: line.daemon.poll() is not None)
        told, at_the_end = line.said("event log failed"), len(line.acknowledged)
        if isinstance(line.disk, Tmpfs):
            line.disk.spoil()  # it has the room of the log's reserve again
        line.start()  # as systemd does
        line.until("it ended again", lambda: line.daemon.poll() is not None)
        refusal = line.output.read_text()

        assert told is not None and line.disk.said in told["error"] and "is acknowledged" in told["error"]
        assert line.daemon.returncode == 1 and "free or repair the disk" in refusal
        assert len(line.acknowledged) == at_the_end

        line.disk.repair()
        line.start()
        line.until_more_acknowledged()
        line.daemon.terminate()
        line.daemon.wait(30)
    logged = line.logged()

    assert line.acknowledged <= set(logged) and len(logged) == len(set(logged))


def test_a_daemon_that_goes_on_without_its_disk_is_caught(line: Line) -> None:
    """Control: planted, the log's failures are swallowed; the same account finds acknowledged frames missing."""
    line.plant = ("--plant", "goes-on")
    line.start()
    with line:
        line.until("ready", lambda: line.said("ready"))
        line.until_more_acknowledged()
        line.disk.spoil()
        line.until_more_acknowledged()
        line.daemon.kill()
        line.daemon.wait(10)
    line.disk.repair()

    assert not line.acknowledged <= set(line.logged())


@pytest.mark.parametrize("disk", [Ext4], indirect=True, ids=["read-only"])
def test_an_idle_log_notices_a_read_only_disk(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sends; the trouble is told before the first part of the morning is."""
    monkeypatch.setattr(event_log, "_PROBE_EVERY_S", 0.1)
    told, failed = list[str](), threading.Event()

    def on_failure(why: str) -> None:
        told.append(why)
        failed.set()

    with EventLog(disk.at / "events.sqlite", SystemClock(), on_failure=on_failure):
        disk.spoil()

        assert failed.wait(20) and "Read-only" in told[0]
