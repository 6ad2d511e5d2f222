"""The challenge on a real daemon: READY and verdicts are withheld until known samples are told apart."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import msgspec
import numpy as np
import pytest

from dark_spots import dark_bundle, spots
from edge import daemon
from edge.bundle import ModelBundle
from edge.challenge import ChallengeResult, find_samples, take
from edge.challenge_duty import ChallengeDuty, ask_daemon
from edge.client import Subscriber
from edge.clock import SystemClock
from edge.config import EdgeConfig, load_config
from edge.daemon import Ready, StopRequest, default_control_address
from edge.demo.line import BUNDLE, PHOTOS, write_config
from edge.errors import CommandError, ConfigError, KizuError
from edge.events import DefectEvent
from edge.images import encode_png
from edge.sender import CameraSender
from edge.sinks.event_log import EventLog
from edge.swap import SwapReport, SwapRequest, ask
from edge.types import Decision, Frame, Reason, Verdict

MakeBundle = Callable[..., ModelBundle]
HOLE = (20, 20, 26, 26)


def lay_out(folder: Path, *, bad_level: int = 0, **more: bytes) -> Path:
    """Two good samples and one bad one, a hole of gray level `bad_level`; `more` files in bad/ by stem."""
    for name, picture in (
        ("good/0", spots()),
        ("good/1", spots((0, 0, 64, 64), level=120)),
        ("bad/hole", spots(HOLE, level=bad_level)),
    ):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(picture))
    for stem, data in more.items():
        (folder / "bad" / f"{stem}.png").write_bytes(data)
    return folder


@dataclass
class Line:
    """A daemon in a thread with a fixed metrics port; `ready` is set once it says so."""

    config: EdgeConfig
    stop: StopRequest = field(default_factory=StopRequest)
    ready: threading.Event = field(default_factory=threading.Event)

    @property
    def control(self) -> str:
        return default_control_address(self.config)

    def challenge(self) -> ChallengeResult:
        return ask_daemon(self.control, patience_s=30)

    def send(self, picture: np.ndarray) -> None:
        """One frame, until its verdict is durable."""
        with CameraSender(self.config.frames_address, "cam") as sender:
            sender.send(picture, encoding="raw", timeout_s=20)
            assert sender.drain(20) == 0

    def metric(self, name: str) -> float:
        text = urlopen(f"http://127.0.0.1:{self.config.metrics.port}/metrics", timeout=10).read().decode()
        return float(next(line.split()[1] for line in text.splitlines() if line.split()[0] == name))

    def wait_for(self, name: str, value: float) -> None:
        until = time.monotonic() + 20
        while self.metric(name) != value:
            assert time.monotonic() < until, f"{name} did not become {value}"

    def events(self) -> list[DefectEvent]:
        log = EventLog(Path(self.config.log.path), SystemClock())
        found = [event for event, _ in log.read_since(0, 1000)]
        log.verify()
        log.close()
        return found


@contextmanager
def running(
    folder: Path, bundle: ModelBundle, cameras: list[dict[str, Any]] | None = None, **challenge: Any
) -> Iterator[Line]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = load_config(
        write_config(
            folder / "line.toml",
            bundle.path,
            [],
            cameras=cameras or [{"name": "cam"}],
            frames_address=f"ipc://{folder}/frames",
            events_address=f"ipc://{folder}/events",
            replay_address=f"ipc://{folder}/replay",
            engine={"backend": "fake"},
            metrics={"port": port},
            challenge={"dir": "samples", **challenge},
        )
    )
    line, failures = Line(config), list[BaseException]()

    def serve() -> None:
        try:
            daemon.serve(config, folder / "line.toml", line.stop, on_ready=lambda ready: line.ready.set())
        except BaseException as error:
            failures.append(error)

    server = threading.Thread(target=serve)
    server.start()
    try:
        yield line
    finally:
        line.stop.set()
        server.join(30)
        assert failures == [] and not server.is_alive()


def test_a_line_that_tells_its_samples_apart_becomes_ready(tmp_path: Path, make_bundle: MakeBundle) -> None:
    """The challenge comes first in the log, as an event of its own kind; then the frames, each counted once."""
    lay_out(tmp_path / "samples")
    with running(tmp_path, dark_bundle(make_bundle, tmp_path / "bundle")) as line:
        assert line.ready.wait(30)
        line.send(spots())
        line.send(spots(HOLE))
        passed, taken = line.metric("kizu_challenge_passed"), line.metric('kizu_challenges_total{result="passed"}')
        received = line.metric('kizu_frames_received_total{camera="cam"}')

    first, good, bad = line.events()
    assert (first.kind, first.camera, first.decision, first.reason) == ("challenge", "challenge", "accept", "challenge")
    assert first.detail == "passed: 3 samples answered as they should be" and first.model_id == good.model_id
    assert [(event.kind, event.camera, event.decision) for event in (good, bad)] == [
        ("frame", "cam", "accept"), ("frame", "cam", "reject"),
    ]  # fmt: skip
    assert (passed, taken, received) == (1, 1, 2)


def test_a_threshold_that_was_moved_withholds_the_line(tmp_path: Path, make_bundle: MakeBundle) -> None:
    """Control: the same samples and a threshold out of reach. Not READY, which sample and why, every part held."""
    lay_out(tmp_path / "samples")
    with running(tmp_path, dark_bundle(make_bundle, tmp_path / "bundle", threshold=1.5)) as line:
        line.send(spots(HOLE))
        result = line.challenge()
        passed = line.metric("kizu_challenge_passed")
        line.wait_for('kizu_state{state="withheld"}', 1)
        assert not line.ready.is_set()

    assert not result.passed and [miss.sample for miss in result.missed] == ["bad/hole.png"]
    assert "accepted, expected rejected: score 1 is not above the threshold 1.5" in result.detail
    first, held, again = line.events()
    assert (first.kind, first.decision) == (again.kind, again.decision) == ("challenge", "inconclusive")
    assert (held.decision, held.reason) == ("inconclusive", "challenge") and "bad/hole.png" in held.detail
    assert passed == 0


def test_a_line_recovers_when_its_samples_are_answered_again(tmp_path: Path, make_bundle: MakeBundle) -> None:
    """Somebody had put a good part among the bad samples; put right, `kizu challenge` lets the line go on."""
    lay_out(tmp_path / "samples", bad_level=128)
    with running(tmp_path, dark_bundle(make_bundle, tmp_path / "bundle")) as line:
        assert not line.challenge().passed and not line.ready.is_set()
        lay_out(tmp_path / "samples", bad_level=0)

        assert line.challenge().passed
        assert line.ready.wait(30)
        line.send(spots())

    assert line.events()[-1].decision == "accept"


def test_a_failed_challenge_during_a_shift_holds_parts_from_then_on(tmp_path: Path, make_bundle: MakeBundle) -> None:
    """READY was said; now a sample fails, and the parts after it are held until it passes."""
    lay_out(tmp_path / "samples")
    with running(tmp_path, dark_bundle(make_bundle, tmp_path / "bundle")) as line:
        assert line.ready.wait(30)
        line.send(spots())
        lay_out(tmp_path / "samples", bad_level=128)
        assert not line.challenge().passed
        line.send(spots())

    assert [(event.kind, event.decision) for event in line.events()] == [
        ("challenge", "accept"), ("frame", "accept"), ("challenge", "inconclusive"), ("frame", "inconclusive"),
    ]  # fmt: skip


def test_a_challenge_under_load_is_in_no_account(tmp_path: Path, make_bundle: MakeBundle) -> None:
    """Between the frames of a camera with a deadline that gives old frames up for new ones: both accounts are exact."""
    lay_out(tmp_path / "samples")
    camera = {"name": "cam", "policy": "latest", "deadline_ms": 5000.0}
    bundle = dark_bundle(make_bundle, tmp_path / "bundle")
    with running(tmp_path, bundle, cameras=[camera]) as line, CameraSender(line.config.frames_address, "cam") as sender:
        assert line.ready.wait(30)
        results = []
        for _ in range(5):
            for _ in range(20):
                sender.send(spots(), encoding="raw", timeout_s=20)
            results.append(line.challenge().passed)
        assert sender.drain(20) == 0
        received = line.metric('kizu_frames_received_total{camera="cam"}')

    events = line.events()
    assert results == [True] * 5 and received == 100
    assert sorted(event.frame_sequence for event in events if event.kind == "frame") == list(range(100))
    assert {event.decision for event in events if event.kind == "challenge"} == {"accept"}


def test_a_duty_that_crashes_stops_the_line(tmp_path: Path) -> None:
    """An error nobody foresaw in the challenge's thread: told, or a line would hold its parts for ever, silently."""
    told: list[Exception] = []
    gone = threading.Event()

    def broken(result: ChallengeResult, news: bool) -> None:
        raise ZeroDivisionError

    def on_crash(error: Exception) -> None:
        told.append(error)
        gone.set()

    duty = ChallengeDuty(
        samples=lambda: (), probe=lambda frame, answer: None, clock=Ticking(), every_s=None, required=True,
        withhold=lambda why: None, on_result=broken, on_first=lambda: None, on_crash=on_crash,
    )  # fmt: skip
    duty.start()

    assert gone.wait(20) and isinstance(told[0], ZeroDivisionError)


def test_where_it_is_not_required_a_failure_is_only_told(tmp_path: Path, make_bundle: MakeBundle) -> None:
    """Event, metric and warning; the line goes on."""
    lay_out(tmp_path / "samples", bad_level=128)
    with running(tmp_path, dark_bundle(make_bundle, tmp_path / "bundle"), required=False) as line:
        assert line.ready.wait(30)
        assert not line.challenge().passed
        line.send(spots())

    assert line.events()[-1].decision == "accept"


def test_a_sample_that_cannot_be_read_is_named(tmp_path: Path, make_bundle: MakeBundle) -> None:
    """A damaged file is no pass, and no crash."""
    lay_out(tmp_path / "samples", torn=b"\x89PNG\r\n\x1a\n")
    with running(tmp_path, dark_bundle(make_bundle, tmp_path / "bundle")) as line:
        result = line.challenge()

    assert [miss.sample for miss in result.missed] == ["bad/torn.png"] and "torn.png" in result.detail


def test_a_model_that_fails_the_challenge_does_not_take_over(tmp_path: Path, make_bundle: MakeBundle) -> None:
    """A swap puts the candidate to the same test first; the running model stays, and the line ready."""
    lay_out(tmp_path / "samples")
    bundle = dark_bundle(make_bundle, tmp_path / "bundle")
    blind = dark_bundle(make_bundle, tmp_path / "blind", threshold=1.5)
    other = dark_bundle(make_bundle, tmp_path / "other", threshold=0.4)
    reports: list[SwapReport] = []
    with running(tmp_path, bundle) as line:
        assert line.ready.wait(30)
        for one in (blind, other):
            ask(line.control, SwapRequest(str(one.path)), reports.append, patience_s=30)
        line.send(spots())

    refused, promoted = reports[1], reports[3]
    assert refused.state == "refused" and "the line's challenge failed: 1 of 3 samples: bad/hole.png" in refused.detail
    assert promoted.state == "promoted"
    assert next(event.model_id for event in line.events() if event.kind == "frame") == other.model_id


def test_subscribers_of_events_get_challenges_in_their_place(tmp_path: Path, make_bundle: MakeBundle) -> None:
    """From the log's beginning, nothing is missing and nothing is lost; who follows one camera sees only that."""
    lay_out(tmp_path / "samples")
    with running(tmp_path, dark_bundle(make_bundle, tmp_path / "bundle")) as line:
        assert line.ready.wait(30)
        line.send(spots())
        config = line.config
        with Subscriber(config.events_address, replay=config.replay_address, since=(1, 0)) as every:
            kinds = [every.receive(20)[0].kind for _ in range(2)]
        with Subscriber(config.events_address, replay=config.replay_address, since=(1, 0), cameras=["cam"]) as one:
            followed, _ = one.receive(20)

    assert kinds == ["challenge", "frame"] and every.lost == 0
    assert followed.camera == "cam"


def test_an_event_written_before_there_were_challenges_is_a_frames() -> None:
    """Old logs are read as they are."""
    from edge.wire import decode_event, encode_event
    from sample_events import sample_event

    old = msgspec.json.decode(encode_event(sample_event()))
    for key in ("kind", "calibration_id", "rules_id"):
        del old[key]

    assert decode_event(msgspec.json.encode(old)).kind == "frame"


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_shared_or_each_cameras_own(tmp_path: Path) -> None:
    """good/ and bad/ for all cameras, or a folder for each."""
    shared, own = lay_out(tmp_path / "shared"), tmp_path / "own"
    for camera in ("left", "right"):
        lay_out(own / camera)

    assert [(one.camera, one.name) for one in find_samples(shared, ["left", "right"])][3:5] == [
        ("right", "good/0.png"), ("right", "good/1.png"),
    ]  # fmt: skip
    assert find_samples(own, ["left", "right"])[-1].name == "right/bad/hole.png"
    assert [one.expected for one in find_samples(own, ["left", "right"])[:3]] == [
        Decision.ACCEPT, Decision.ACCEPT, Decision.REJECT,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: root.rename(root.with_name("gone")), "no such folder"),
        (lambda root: (root / "bad" / "hole.png").unlink(), "no sample for camera cam"),
        (lambda root: (root / "bad" / "notes.txt").write_text(""), "notes.txt: not a picture"),
    ],
)
def test_a_folder_that_proves_nothing_keeps_the_line_from_starting(
    tmp_path: Path, make_bundle: MakeBundle, change: Callable[[Path], object], words: str
) -> None:
    """A challenge without a bad sample is passed by a line that accepts everything."""
    change(lay_out(tmp_path / "samples"))
    bundle = dark_bundle(make_bundle, tmp_path / "bundle")
    config = load_config(
        write_config(
            tmp_path / "line.toml", bundle.path, ["cam"], engine={"backend": "fake"}, challenge={"dir": "samples"}
        )
    )

    with pytest.raises(ConfigError, match=f"line.toml: challenge.dir: .*{words}"):
        daemon.check(config, Path("line.toml"))
    with pytest.raises(ConfigError, match=words):
        daemon.serve(config, Path("line.toml"), StopRequest())


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"challenge": {"every_hours": 8.0}}, r"line.toml:\d+: \[challenge\] without dir"),
        ({"challenge": {"dir": "x", "every_hours": 0.0}}, "challenge.every_hours: expected"),
        ({"challenge": {"dir": "x"}, "cameras": [{"name": "challenge"}]}, "a camera is called challenge"),
    ],
)
def test_a_challenge_that_could_never_be_is_refused(
    tmp_path: Path, tiny_bundle: ModelBundle, tables: dict[str, Any], words: str
) -> None:
    """With the file's line."""
    with pytest.raises(ConfigError, match=words):
        load_config(write_config(tmp_path / "line.toml", tiny_bundle.path, ["cam"], **tables))


def test_nobody_to_ask_and_nothing_to_ask_for_are_told_apart(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    """No daemon there; or one without a challenge."""
    with pytest.raises(CommandError, match="no daemon listens"):
        ask_daemon(f"ipc://{tmp_path}/nobody", patience_s=0.2)
    config = load_config(write_config(tmp_path / "line.toml", tiny_bundle.path, ["cam"], engine={"backend": "fake"}))
    found: list[KizuError] = []
    stop = StopRequest()

    def on_ready(ready: Ready) -> None:
        with pytest.raises(CommandError, match="takes no challenge") as refused:
            ask_daemon(default_control_address(config), patience_s=20)
        found.append(refused.value)
        stop.set()

    daemon.serve(config, tmp_path / "line.toml", stop, on_ready=on_ready)

    assert len(found) == 1


# --- when -------------------------------------------------------------------------------------------------------------


class Ticking:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now_ns = 0

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_ns(self) -> int:
        return self.now_ns


def test_a_challenge_is_taken_again_when_its_hours_are_over(tmp_path: Path) -> None:
    """Not before, and a failed one within a minute by itself; only news is told as such."""
    clock, told, right = Ticking(), list[tuple[bool, bool]](), [True]
    samples = find_samples(lay_out(tmp_path), ["cam"])
    seen = threading.Condition()

    def probe(frame: Frame, answer: Callable[[Verdict], None]) -> None:
        answer(_said(frame, samples[frame.id.sequence].expected if right[0] else Decision.ACCEPT))

    def on_result(result: ChallengeResult, news: bool) -> None:
        with seen:
            told.append((result.passed, news))
            seen.notify_all()

    def wait_for(count: int) -> None:
        with seen:
            assert seen.wait_for(lambda: len(told) >= count, 20)

    duty = ChallengeDuty(
        samples=lambda: samples, probe=probe, clock=clock, every_s=3600, required=True,
        withhold=lambda why: None, on_result=on_result, on_first=lambda: None, on_crash=lambda error: None,
    )  # fmt: skip
    duty.start()
    wait_for(1)
    clock.now_ns = 3599 * 10**9
    duty.ask()  # a later challenge that is not due to the hours
    wait_for(2)
    right[0] = False
    clock.now_ns += 3600 * 10**9
    wait_for(3)
    clock.now_ns += 61 * 10**9
    wait_for(4)
    duty.close()

    assert told == [(True, True), (True, True), (False, True), (False, False)]


def test_a_sample_without_an_answer_is_a_miss(tmp_path: Path) -> None:
    """An engine that hangs passes no challenge."""
    clock = Ticking()

    def probe(frame: Frame, answer: Callable[[Verdict], None]) -> None:
        clock.now_ns += 2 * 10**9

    result = take(find_samples(lay_out(tmp_path), ["cam"]), probe, clock, timeout_s=1.0)

    assert not result.passed and [miss.detail for miss in result.missed] == ["no answer within 1 s"] * 3


def _said(frame: Frame, decision: Decision) -> Verdict:
    return Verdict(frame.id, decision, Reason.SCORE, "", 1.0, 0.5, None, False, (), (64, 64), "model")


def test_systemd_hears_ready_only_after_a_pass(
    tmp_path: Path, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then it is asked for patience, so that it does not kill a daemon that says what is wrong."""
    lay_out(tmp_path / "samples", bad_level=128)
    heard: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        def listen_for(word: str) -> None:
            while word not in heard:
                heard.append(systemd.recv(200).decode())

        with running(tmp_path, dark_bundle(make_bundle, tmp_path / "bundle")) as line:
            assert not line.challenge().passed
            listen_for("STATUS=withheld")
            listen_for("EXTEND_TIMEOUT_USEC=60000000")
            before = list(heard)
            lay_out(tmp_path / "samples")
            assert line.challenge().passed
            listen_for("READY=1")

    assert "READY=1" not in before


def test_the_command_says_which_sample_and_why(tmp_path: Path, make_bundle: MakeBundle) -> None:
    """At the daemon and apart, by the real command: exit status 0 or 1, and the same answer."""
    lay_out(tmp_path / "samples")

    def kizu(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edge.cli", "challenge", str(tmp_path / "line.toml"), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    with running(tmp_path, dark_bundle(make_bundle, tmp_path / "bundle")) as line:
        assert line.ready.wait(30)
        passed = kizu("--json")
        lay_out(tmp_path / "samples", bad_level=128)
        failed = kizu()
    apart = kizu("--apart")

    assert passed.returncode == 0 and msgspec.json.decode(passed.stdout)["passed"] is True
    for one in (failed, apart):
        assert one.returncode == 1 and "bad/hole.png (cam): accepted, expected rejected" in one.stdout
        assert "the challenge of line demo is failed" in one.stderr


def test_the_demos_model_passes_with_the_demos_photographs(tmp_path: Path) -> None:
    """The real network on its engine: two good nuts and two flawed ones, by the command that needs no daemon."""
    for kind, source in (("good", "good"), ("bad", "color")):
        (tmp_path / "samples" / kind).mkdir(parents=True)
        for photo in sorted((PHOTOS / "test" / source).iterdir())[:2]:
            shutil.copy(photo, tmp_path / "samples" / kind)
    path = write_config(tmp_path / "line.toml", BUNDLE, ["nuts"], challenge={"dir": "samples"})

    done = subprocess.run(
        [sys.executable, "-m", "edge.cli", "challenge", str(path), "--apart"],
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert (done.returncode, done.stdout) == (0, "passed: 4 samples answered as they should be\n"), done.stderr
