"""Three thousand connections that are no cameras, while a real one sends: not one of its frames is lost or refused."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest

from edge.bundle import ModelBundle
from edge.demo.line import DaemonProcess, write_config
from edge.errors import SinkFull
from edge.keys import ClientKeys
from edge.sender import CameraSender
from peers import KeyRing

CONNECTIONS = 3_000
IDLE = 300
FRAMES = 150
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01"
_NULL = _GREETING + b"NULL".ljust(20, b"\0") + bytes(32)
_CURVE = _GREETING + b"CURVE".ljust(20, b"\0") + bytes(32)
_READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"

Words = Callable[[random.Random], bytes]
JUNK: list[Words] = [
    lambda source: b"",
    lambda source: b"GET / HTTP/1.1\r\nHost: line\r\n\r\n",
    lambda source: source.randbytes(source.randint(1, 300)),
    lambda source: _GREETING[: source.randint(1, 12)],
    lambda source: _NULL + source.randbytes(100),
    lambda source: _NULL + _READY + b"\x02" + struct.pack(">Q", 1 << 62) + b"x" * 100,  # a part of 4 exabytes
    lambda source: _NULL + _READY + b"\x00\x05hello" * 50,  # parts, well formed, that mean nothing
    lambda source: _CURVE + b"\x04\xc8\x05HELLO\x01\x00" + source.randbytes(192),
    lambda source: _CURVE + b"\x06" + struct.pack(">Q", 1 << 40),
]


def knock(port: int, words: bytes, answer: bool) -> None:
    """One connection; the daemon may end it whenever it likes."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
            peer.sendall(words)
            if answer:
                peer.recv(64)
    except OSError:
        return  # reset: we were thrown out while we spoke


def batter(port: int, seed: int) -> None:
    """CONNECTIONS junk connections, eight at a time, while IDLE others stand there and say nothing."""
    source = random.Random(seed)
    with ExitStack() as idle:
        for _ in range(IDLE):
            idle.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        with ThreadPoolExecutor(8) as pool:
            for number in range(CONNECTIONS - IDLE):
                pool.submit(knock, port, JUNK[number % len(JUNK)](source), number % 2 == 0)


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def until(what: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := what()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return done


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "keys"])
def test_three_thousand_junk_connections_do_not_hurt_a_camera(
    tmp_path: Path, tiny_bundle: ModelBundle, secured: bool
) -> None:
    """Every frame gets its verdict; afterwards the daemon has its descriptors and its memory back."""
    keys: ClientKeys | None = None
    changes: dict[str, object] = {"engine": {"backend": "fake"}}
    if secured:
        ring = KeyRing(tmp_path)
        keys = ring.admit("cam", "camera")
        changes["security"] = {"secret_key": str(ring.secret), "peers": str(ring.peers)}
    config = write_config(tmp_path / "line.toml", tiny_bundle.path, ["cam"], **changes)
    with DaemonProcess(config) as line:
        ready = line.wait_until_ready(60)
        process, url = psutil.Process(line.pid), ready["metrics_url"]
        with CameraSender(ready["frames_address"], "cam", keys=keys) as camera:
            image = np.zeros((64, 64), np.uint8)
            camera.send(image, encoding="raw", timeout_s=20)
            assert camera.drain(20) == 0
            descriptors, memory = process.num_fds(), process.memory_info().rss
            enemy = threading.Thread(target=batter, args=(int(ready["frames_address"].rpartition(":")[2]), 5))
            enemy.start()
            sent = 1
            while enemy.is_alive() or sent < FRAMES:
                camera.send(image, encoding="raw", timeout_s=20)
                sent += 1
            enemy.join()
            assert camera.drain(20) == 0

        assert (camera.acknowledged, metric(url, "kizu_verdicts_total")) == (sent, sent)
        # Counted by the socket's monitor, which on a busy machine is behind.
        assert until(lambda: metric(url, 'kizu_connections_total{socket="frames",step="accepted"}') >= CONNECTIONS)
        assert metric(url, "kizu_connections_refused_total") > CONNECTIONS / 9
        # The camera has gone as well, and an idle peer has two seconds.
        assert until(lambda: process.num_fds() <= descriptors + 2), (process.num_fds(), descriptors)
        assert process.memory_info().rss - memory < 64 << 20


def test_without_credit_a_camera_would_notice(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    """Control: a daemon that does not answer loses the same camera's patience, so an answered frame means something."""
    config = write_config(tmp_path / "line.toml", tiny_bundle.path, ["cam"], engine={"backend": "fake"})
    with DaemonProcess(config) as line:
        address = line.wait_until_ready(60)["frames_address"]
        psutil.Process(line.pid).suspend()
        tasks = list(Path(f"/proc/{line.pid}/task").glob("*/stat"))
        assert until(lambda: {task.read_text().rpartition(") ")[2][0] for task in tasks} == {"T"})
        try:
            with CameraSender(address, "cam") as camera, pytest.raises(SinkFull):
                camera.send(np.zeros((64, 64), np.uint8), encoding="raw", timeout_s=1)
        finally:
            psutil.Process(line.pid).resume()
