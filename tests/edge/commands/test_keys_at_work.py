"""`kizu send` and `kizu watch` with keys, against a daemon's own sockets."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edge import cli, daemon
from edge.bundle import ModelBundle
from edge.client import Subscriber
from edge.config import load_config
from edge.daemon import Ready, StopRequest
from edge.demo.line import write_config
from edge.errors import SourceTimeout
from edge.images import encode_png
from edge.keys import make_pair
from edge.sender import CameraSender
from peers import KeyRing


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path)


@pytest.fixture
def line(tmp_path: Path, ring: KeyRing, tiny_bundle: ModelBundle) -> Iterator[Ready]:
    """A daemon with keys, in a thread."""
    security = {"secret_key": str(ring.secret), "peers": str(ring.peers)}
    path = write_config(
        tmp_path / "line.toml", tiny_bundle.path, ["cam"], engine={"backend": "fake"}, security=security
    )
    stop, started, found = StopRequest(), threading.Event(), []

    def on_ready(ready: Ready) -> None:
        found.append(ready)
        started.set()

    thread = threading.Thread(target=lambda: daemon.serve(load_config(path), path, stop, on_ready=on_ready))
    thread.start()
    assert started.wait(60)
    yield found[0]
    stop.set()
    thread.join(30)


def kizu(*words: object) -> tuple[int, str]:
    arguments = [str(word) for word in words]
    done = CliRunner().invoke(cli.build(arguments), arguments)
    return done.exit_code, done.output


def test_a_camera_and_a_subscriber_with_keys_work_as_without(line: Ready, ring: KeyRing, tmp_path: Path) -> None:
    """Two options more, and nobody else on the wire."""
    ring.admit("cam", "camera")
    ring.admit("dash", "subscribe")
    (tmp_path / "one.png").write_bytes(encode_png(np.full((64, 64), 99, np.uint8)))
    # A process of its own: the runner of the other command takes this one's output away.
    watch = [sys.executable, "-m", "edge.cli", "watch", line.events_address, "--json", "--count", "1",
             "--key", str(ring.folder / "camera-dash.key"), "--server-key", str(ring.public)]  # fmt: skip
    watcher = subprocess.Popen(watch, stdout=subprocess.PIPE, text=True)

    # A watcher misses what was published before it came in; another frame follows until it has heard one.
    deadline = time.monotonic() + 60
    while watcher.poll() is None and time.monotonic() < deadline:
        code, out = kizu("send", tmp_path / "one.png", "--camera", "cam", "--to", line.frames_address,
                         "--key", ring.folder / "camera-cam.key", "--server-key", ring.public)  # fmt: skip
        assert code == 0 and "acknowledged 1, left 0" in out, out
    heard, _ = watcher.communicate(timeout=20)

    assert watcher.returncode == 0 and json.loads(heard)["camera"] == "cam"


def test_a_camera_that_is_not_on_the_list_is_told_what_to_check(line: Ready, ring: KeyRing, tmp_path: Path) -> None:
    """It cannot know why it is not let in, so the message names the list and the daemon's key."""
    make_pair("camera", "cam", ring.folder)
    (tmp_path / "one.png").write_bytes(encode_png(np.full((64, 64), 99, np.uint8)))

    code, out = kizu("send", tmp_path / "one.png", "--camera", "cam", "--to", line.frames_address, "--timeout", 1,
                     "--key", ring.folder / "camera-cam.key", "--server-key", ring.public)  # fmt: skip

    assert code == 1 and "list of peers this camera's key" in out


def test_whoever_is_taken_off_the_list_is_out_of_a_running_line(line: Ready, ring: KeyRing) -> None:
    """Camera and subscriber that were let in: the frame gets no answer and is counted, the other hears nothing more."""
    camera, dash = ring.admit("cam", "camera"), ring.admit("dash", "subscribe")
    picture = np.full((64, 64), 99, np.uint8)

    def metric(name: str) -> float:
        with urllib.request.urlopen(line.metrics_url, timeout=10) as page:
            lines = page.read().decode().splitlines()
        return next(float(text.split()[-1]) for text in lines if text.startswith(name))

    def until(done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not done():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with (
        CameraSender(line.frames_address, "cam", keys=camera) as sender,
        Subscriber(line.events_address, keys=dash) as heard,
    ):
        heard.wait_until_connected(30)
        sender.send(picture, encoding="raw", timeout_s=20)
        assert sender.drain(20) == 0 and heard.receive(20)[0].frame_sequence == 0
        ring.peers.write_text("")
        until(lambda: metric('kizu_connections_refused_total{reason="key_unknown"}') > 0)  # the subscriber, outside

        sender.send(picture, encoding="raw", timeout_s=20)

        until(lambda: metric('kizu_messages_refused_total{reason="key_removed"}') > 0)
        assert metric('kizu_camera_connected{camera="cam"}') == 0
        assert sender.drain(0.5) == 1 and metric('kizu_frames_received_total{camera="cam"}') == 1
        heard.latest_head = None
        with pytest.raises(SourceTimeout):
            heard.wait_until_connected(1.5)


def test_half_of_the_keys_is_refused(ring: KeyRing, tmp_path: Path) -> None:
    """Before anything is sent in plain text by mistake."""
    ring.admit("cam", "camera")
    (tmp_path / "one.png").write_bytes(encode_png(np.full((64, 64), 99, np.uint8)))
    secret = ring.folder / "camera-cam.key"

    for words in (
        ("send", tmp_path / "one.png", "--camera", "cam", "--to", "tcp://127.0.0.1:9", "--key", secret),
        ("watch", "tcp://127.0.0.1:9", "--server-key", ring.public),
    ):
        code, out = kizu(*words)
        assert code == 2 and "go together" in out
