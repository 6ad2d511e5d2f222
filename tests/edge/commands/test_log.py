"""`kizu log` and `kizu rescore`, as they are typed."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge import daemon
from edge.bundle import ModelBundle
from edge.clock import SystemClock
from edge.config import load_config
from edge.demo.line import write_config
from edge.images import decode_image, encode_mask_png
from edge.masks import coco_counts
from edge.sender import CameraSender
from edge.sinks.event_log import EventLog
from edge.sinks.forgetting import Forgotten, answer
from sample_events import sample_event

MASK = np.zeros((6, 8), bool)
MASK[2:4, 3:7] = True


def kizu(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge.cli", *map(str, arguments)], capture_output=True, text=True, timeout=100
    )


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Three events, the second with a mask, and a registered subscriber."""
    path = tmp_path / "events.db"
    with EventLog(path, SystemClock()) as made:
        for number in range(3):
            made.append(sample_event(number), encode_mask_png(MASK) if number == 1 else None)
        made.move_cursor("press", 2, 0, lambda cursor: None)
        made.flush(10)
    return path


def test_verify_counts_what_is_sound_and_names_what_is_not(log: Path) -> None:
    """Exit status 1 for damage, 2 for a file that is none of ours."""
    good = kizu("log", "verify", log)
    assert (good.returncode, json.loads(good.stdout)["events"]) == (0, 3)

    with sqlite3.connect(log) as other:
        other.execute("UPDATE events SET mask = x'00' WHERE log_sequence = 2")
    bad, none = kizu("log", "verify", log), kizu("log", "verify", log.with_name("no.db"))

    assert bad.returncode == 1 and "log sequence 2: the row was changed" in bad.stderr
    assert none.returncode == 2 and "does not exist" in none.stderr


def test_export_prints_json_lines_with_coco_masks(log: Path) -> None:
    """Each event as published, and its mask for any COCO tool."""
    lines = [json.loads(line) for line in kizu("log", "export", log, "--since", 1).stdout.splitlines()]

    assert [line["log_sequence"] for line in lines] == [2, 3]
    assert lines[0]["segmentation"] == {"size": [6, 8], "counts": coco_counts(MASK)}
    assert lines[1]["segmentation"] is None


def test_stats_tell_head_subscribers_and_marks(log: Path) -> None:
    """One JSON object."""
    found = json.loads(kizu("log", "stats", log).stdout)

    assert (found["head"], found["events"], found["removed_through"]) == (3, 3, 0)
    assert [(one["name"], one["cursor"], one["lag"]) for one in found["subscribers"]] == [("press", 2, 1)]
    assert found["marks"][0]["acked_through"] == 2 and found["failures"] == []


def served(folder: Path, bundle: ModelBundle, during: Callable[[Path, daemon.Ready], None]) -> None:
    """A daemon in a thread of its own; `during` gets its configuration and runs while it does."""
    path = write_config(folder / "line.toml", bundle.path, ["cam"], engine={"backend": "fake"})
    stop, failed = daemon.StopRequest(), []

    def ready(found: daemon.Ready) -> None:
        def work() -> None:
            try:
                during(path, found)
            except BaseException as error:
                failed.append(error)
            stop.set()

        threading.Thread(target=work).start()

    daemon.serve(load_config(path), path, stop, on_ready=ready)
    if failed:
        raise failed[0]


def lags(ready: daemon.Ready) -> list[str]:
    with urllib.request.urlopen(ready.metrics_url, timeout=10) as page:
        return re.findall(r'kizu_subscriber_lag_events\{name="([^"]+)"\}', page.read().decode())


def register(path: Path, *names: str) -> None:
    with EventLog(path, SystemClock()) as made:
        for name in names:
            made.move_cursor(name, None, 0, lambda cursor: None)
        made.flush(10)


def test_a_subscriber_that_is_gone_is_forgotten_by_the_running_daemon(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    """Its lag leaves the metrics, so the alert ends; the others stay. A name nobody has is told with those that are."""
    register(tmp_path / "events.sqlite", "press", "robot")

    def forgotten(config: Path, ready: daemon.Ready) -> None:
        deadline = time.monotonic() + 20
        while sorted(lags(ready)) != ["press", "robot"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        done, again = (kizu("log", "forget", config, "--name", "press") for _ in range(2))
        assert done.returncode == 0 and "everything through 0" in done.stdout, done.stderr
        assert again.returncode == 2 and "registered: robot" in again.stderr
        while lags(ready) != ["robot"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    served(tmp_path, tiny_bundle, forgotten)

    stats = json.loads(kizu("log", "stats", tmp_path / "events.sqlite").stdout)
    assert [one["name"] for one in stats["subscribers"]] == ["robot"]


def test_where_no_daemon_runs_the_log_itself_forgets(log: Path, tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    """By the same writer, under the same lock; the events stay, and whoever was forgotten can register anew."""
    config = write_config(tmp_path / "line.toml", tiny_bundle.path, ["cam"], log={"path": str(log)})

    done, nobody = (kizu("log", "forget", config, "--name", name) for name in ("press", "who"))

    assert done.returncode == 0 and "everything through 2" in done.stdout, done.stderr
    assert nobody.returncode == 2 and "registered: nobody" in nobody.stderr
    assert json.loads(kizu("log", "verify", log).stdout)["events"] == 3
    places: list[int] = []
    with EventLog(log, SystemClock()) as made:
        assert made.cursors() == {}
        made.move_cursor("press", None, 1, places.append)
        made.flush(10)
    assert places == [1]


def test_forgetting_makes_no_log_and_needs_a_name(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    """A mistyped path is an error, not an empty log."""
    config = write_config(tmp_path / "line.toml", tiny_bundle.path, ["cam"])

    missing, unnamed = kizu("log", "forget", config, "--name", "press"), kizu("log", "forget", config)

    assert (missing.returncode, unnamed.returncode) == (2, 2)
    assert "does not exist" in missing.stderr and "--name" in unnamed.stderr
    assert not (tmp_path / "events.sqlite").exists()


@pytest.mark.parametrize("request_", [b"{}", b'{"ask": "forget", "name": 7}', b"\xff", b"[" * 100])
def test_a_request_to_forget_that_is_none_is_answered_and_forgets_nobody(log: Path, request_: bytes) -> None:
    """The control socket is the daemon's user's, and still nothing that comes through it may end the thread."""
    with EventLog(log, SystemClock()) as made:
        told = msgspec.json.decode(answer(made, request_), type=Forgotten)

        assert told.error and made.cursors() == {"press": 2}


@pytest.fixture(scope="module")
def judged(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle: ModelBundle, make_bundle: Callable[..., ModelBundle]
) -> tuple[Path, list[str]]:
    """A line that has judged three frames of noise through OpenVINO; its configuration and the rejected events' ids."""
    folder = tmp_path_factory.mktemp("line")
    strict = msgspec.structs.replace(tiny_bundle.calibration, threshold=0.05, pixel_threshold=0.04)
    path = write_config(folder / "line.toml", make_bundle(folder / "strict", calibration=strict).path, ["cam"])
    stop = daemon.StopRequest()

    def send(ready: daemon.Ready) -> None:
        noise = np.random.default_rng(8).integers(0, 256, (3, 64, 64), dtype=np.uint8)
        with CameraSender(ready.frames_address, "cam") as sender:
            for image in noise:
                sender.send(image, encoding="raw", timeout_s=20)
            assert sender.drain(20) == 0
        stop.set()

    daemon.serve(load_config(path), path, stop, on_ready=send)
    with EventLog(folder / "events.sqlite", SystemClock()) as made:
        return path, [event.id for event, _ in made.read_since(0, 10) if event.decision == "reject"]


def test_rescore_finds_the_same_answer(judged: tuple[Path, list[str]]) -> None:
    """Same frame, bundle and device: the same decision, score, regions and mask."""
    config, rejected = judged
    done = kizu("rescore", rejected[0], config)

    assert len(rejected) == 3
    assert done.returncode == 0 and done.stdout.startswith("identical: reject"), done.stderr


def test_rescore_gives_json_and_the_heat_map(judged: tuple[Path, list[str]], tmp_path: Path) -> None:
    """For programs, such as the operator's console."""
    config, rejected = judged
    done = kizu("rescore", rejected[0], config, "--json", "--heatmap", tmp_path / "heat.png")

    found = json.loads(done.stdout)
    assert (found["id"], found["identical"], found["differences"]) == (rejected[0], True, [])
    assert decode_image((tmp_path / "heat.png").read_bytes()).shape == (64, 64, 3)


def test_a_certificate_that_was_void_makes_no_difference(judged: tuple[Path, list[str]], tmp_path: Path) -> None:
    """What was void then is not scored now: the decision, the score and the mask are compared."""
    from edge.rescore import differences

    event = sample_event(certified=False)

    assert differences(event, msgspec.structs.replace(event, certified=True)) == []
    assert differences(event, msgspec.structs.replace(event, score=0.6)) == ["score: logged 0.5, now 0.6"]


def test_rescore_says_what_differs(judged: tuple[Path, list[str]]) -> None:
    """Control: another frame in its place is another score."""
    config, rejected = judged
    folder = config.parent / "events.sqlite.rejects"
    first, second = (folder / f"{name.replace('/', '-')}.png" for name in rejected[1:])
    second.replace(first)

    done = kizu("rescore", rejected[1], config)
    gone = kizu("rescore", rejected[2], config)

    assert done.returncode == 1 and "score: logged" in done.stderr and "now" in done.stderr
    assert gone.returncode == 2 and "is not there" in gone.stderr


@pytest.mark.parametrize("name", ["cam", "cam/1/2/3", "../x/1/2", "cam/one/2", "cam/1/99"])
def test_rescore_refuses_an_event_that_is_not_there(judged: tuple[Path, list[str]], name: str) -> None:
    """Exit status 2 and the next step."""
    done = kizu("rescore", name, judged[0])

    assert done.returncode == 2 and ("expected CAMERA/EPOCH/SEQUENCE" in done.stderr or "is not in" in done.stderr)
