"""Hot swap on a real daemon: nothing is lost, no verdict sees two models, and a refusal changes nothing."""

from __future__ import annotations

import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge import daemon, loading, sockets
from edge.bundle import ModelBundle, ScoreCalibration
from edge.config import EdgeConfig, load_config
from edge.daemon import Ready, StopRequest, default_control_address
from edge.demo.line import write_config
from edge.engines.registry import open_engine
from edge.errors import CommandError
from edge.events import DefectEvent
from edge.opening import EngineOpener
from edge.protocols import Engine
from edge.sender import CameraSender
from edge.sinks.event_log import EventLog
from edge.swap import Pace, SwapReport, SwapRequest, ask

GRAY = np.full((40, 40), 128, np.uint8)
MakeBundle = Callable[..., ModelBundle]


def other(make_bundle: MakeBundle, path: Path, threshold: float = 3.0, **changes: Any) -> ModelBundle:
    """The tiny model with another threshold: another `model_id`."""
    calibration = ScoreCalibration("provisional", False, threshold, threshold, 4, (0.5,), "onnxruntime", "0" * 64)
    return make_bundle(path, calibration=calibration, **changes)


@dataclass
class Line:
    """A daemon in a thread, and a camera that sends without a pause until the test is done."""

    config: EdgeConfig
    ready: Ready
    stop: StopRequest
    sent: int = 0

    def swap(self, bundle: Path | str, **more: Any) -> list[SwapReport]:
        reports: list[SwapReport] = []
        request = SwapRequest(str(bundle), **more)
        ask(default_control_address(self.config), request, reports.append, patience_s=30)
        return reports

    def events(self) -> list[DefectEvent]:
        log = EventLog(Path(self.config.log.path), daemon.SystemClock())
        found = [event for event, _ in log.read_since(0, 100_000)]
        log.close()
        return found


@contextmanager
def running(folder: Path, bundle: ModelBundle) -> Iterator[Line]:
    """Ends when the block does; everything sent has its verdict then, or the camera complains."""
    config = load_config(write_config(folder / "line.toml", bundle.path, ["cam"]))
    stop, found, is_ready = StopRequest(), list[Ready](), threading.Event()

    def on_ready(ready: Ready) -> None:
        found.append(ready)
        is_ready.set()

    arguments = {"config": config, "where": folder / "line.toml", "stop": stop, "on_ready": on_ready}
    server = threading.Thread(target=daemon.serve, kwargs=arguments)
    server.start()
    assert is_ready.wait(30)
    line, done, has_sent = Line(config, found[0], stop), threading.Event(), threading.Event()

    def camera() -> None:
        with CameraSender(line.ready.frames_address, "cam") as sender:
            while not done.is_set():
                sender.send(GRAY, encoding="raw", timeout_s=20)
                line.sent += 1
                has_sent.set()
            assert sender.drain(20) == 0

    sending = threading.Thread(target=camera)
    sending.start()
    try:
        assert has_sent.wait(30)  # or what is asked of the line may be over before it judged anything
        yield line
    finally:
        done.set()
        sending.join(30)
        stop.set()
        server.join(30)


def models(events: list[DefectEvent]) -> list[str]:
    """The models that judged, in order, each run of one once."""
    in_order = [event.model_id for event in sorted(events, key=lambda event: event.frame_sequence)]
    return [model for model, _ in itertools.groupby(in_order)]


def test_a_model_is_swapped_under_load_without_losing_a_frame(
    tmp_path: Path, tiny_bundle: ModelBundle, make_bundle: MakeBundle
) -> None:
    """There and back while a camera sends: every frame judged once and by one model, in three runs of verdicts."""
    new = other(make_bundle, tmp_path / "new")
    with running(tmp_path, tiny_bundle) as line:
        there, back = line.swap(new.path), line.swap(tiny_bundle.path)

    events = line.events()
    assert [one.state for one in [*there, *back]] == ["loading", "promoted"] * 2
    assert sorted(event.frame_sequence for event in events) == list(range(line.sent))
    assert {event.reason for event in events} == {"score"}
    assert models(events) == [tiny_bundle.model_id, new.model_id, tiny_bundle.model_id]
    assert {event.threshold for event in events if event.model_id == new.model_id} == {3.0}


def test_a_swap_rests_between_its_steps() -> None:
    """In proportion to what the last step took, and never for long; its steps are many, so none is a burst."""
    now, slept = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    rest = Pace(0.25, longest_s=2.0, monotonic=lambda: now[0], sleep=sleep)
    for worked_s in (0.1, 0.5, 5.0):
        now[0] += worked_s
        rest()

    assert slept == pytest.approx([0.3, 1.5, 2.0])


def test_a_candidate_is_paced_through_its_golden_frames(
    tmp_path: Path, tiny_bundle: ModelBundle, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once after reading, before each golden frame, and before it takes over; at the start nobody waits."""
    rests: list[int] = []
    monkeypatch.setattr(loading, "Pace", lambda: lambda: rests.append(1))
    with running(tmp_path, tiny_bundle) as line:
        assert rests == []
        line.swap(other(make_bundle, tmp_path / "new").path)

    assert len(rests) == 2 + len(tiny_bundle.golden.frames)


class OtherEngine(EngineOpener):
    """Opens bundles called `new` with the portable engine, as where the GPU could not be used."""

    def open(self) -> Engine:
        if self._bundle.path.name != "new":
            return super().open()
        self.fallback = "lost"
        return open_engine(self._bundle, backend="onnxruntime", device="cpu", max_batch=4)


def test_the_metrics_say_which_engine_runs_after_a_swap_and_how_it_is(
    tmp_path: Path, tiny_bundle: ModelBundle, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new model's engine and its fallback, in place of the first one's."""
    monkeypatch.setattr(loading, "EngineOpener", OtherEngine)
    new = other(make_bundle, tmp_path / "new")

    def shown(line: Line, text: str) -> bool:
        with urllib.request.urlopen(line.ready.metrics_url, timeout=10) as page:
            return text in page.read().decode()

    with running(tmp_path, tiny_bundle) as line:
        assert shown(line, 'kizu_engine_info{backend="openvino"')
        assert line.swap(new.path)[-1].state == "promoted"

        assert shown(line, 'kizu_engine_info{backend="onnxruntime"')
        assert not shown(line, 'kizu_engine_info{backend="openvino"')
        deadline = time.monotonic() + 20
        while not shown(line, 'kizu_state{state="degraded"} 1.0'):
            assert time.monotonic() < deadline


@pytest.mark.parametrize("wrong", ["missing", "changed", "golden", "channels"])
def test_a_bundle_that_cannot_take_over_is_refused_and_the_old_one_stays(
    tmp_path: Path, tiny_bundle: ModelBundle, make_bundle: MakeBundle, wrong: str
) -> None:
    """Not there, a byte changed, another answer than it promises, more frames a batch than it takes."""
    path = tmp_path / "new"
    if wrong == "changed":
        other(make_bundle, path)
        (path / "calibration.json").write_bytes((path / "calibration.json").read_bytes().replace(b"3.0", b"9.0"))
    elif wrong == "golden":
        golden = type(tiny_bundle.golden)(
            tiny_bundle.golden.frames, tiny_bundle.golden.maps + 0.01, tiny_bundle.golden.scores
        )
        other(make_bundle, path, golden=golden)
    elif wrong == "channels":
        other(make_bundle, path, max_batch=1)
    with running(tmp_path, tiny_bundle) as line:
        reports = line.swap(path)

    assert reports[-1].state == "refused" and reports[-1].detail
    assert models(line.events()) == [tiny_bundle.model_id]


def test_a_shadow_that_agrees_is_promoted_and_the_comparison_is_reported(
    tmp_path: Path, tiny_bundle: ModelBundle, make_bundle: MakeBundle
) -> None:
    """It looks on for thirty frames first."""
    new = other(make_bundle, tmp_path / "new")
    with running(tmp_path, tiny_bundle) as line:
        reports = line.swap(new.path, shadow=30, timeout_s=30.0)

    last = reports[-1]
    assert last.state == "promoted" and last.agreement is not None
    assert (last.agreement.compared, last.agreement.same) == (30, 30)
    assert models(line.events()) == [tiny_bundle.model_id, new.model_id]


def test_a_shadow_that_would_reject_what_passes_is_not_promoted(
    tmp_path: Path, tiny_bundle: ModelBundle, make_bundle: MakeBundle
) -> None:
    """Its threshold is below every score; the refusal says who would reject what."""
    new = other(make_bundle, tmp_path / "new", threshold=-100.0)
    with running(tmp_path, tiny_bundle) as line:
        reports = line.swap(new.path, shadow=10, timeout_s=30.0)

    assert reports[-1].state == "refused" and "it alone rejects 10" in reports[-1].detail
    assert {event.decision for event in line.events()} == {"accept"}
    assert models(line.events()) == [tiny_bundle.model_id]


def test_the_control_socket_is_for_the_daemons_user_and_refuses_what_is_no_request(
    tmp_path: Path, tiny_bundle: ModelBundle
) -> None:
    """Mode 0600; junk gets an answer and the next request is served."""
    with running(tmp_path, tiny_bundle) as line:
        address = default_control_address(line.config)
        mode = stat.S_IMODE(os.stat(address.removeprefix("ipc://")).st_mode)
        with sockets.dealer(address, hwm=8) as junk:
            assert junk.poll(5000, 2)
            junk.send(b'{"bundle": "x", "force": true}')
            assert junk.poll(5000)
            answer = json.loads(junk.recv())
        after = line.swap(tmp_path / "missing")

    assert mode == 0o600
    assert answer["state"] == "refused" and "force" in answer["detail"]
    assert after[-1].state == "refused"


def test_asking_where_nobody_listens_says_so(tmp_path: Path) -> None:
    """Not a wait without an end."""
    with pytest.raises(CommandError, match="no daemon listens"):
        ask(f"ipc://{tmp_path}/nobody", SwapRequest("/x"), lambda report: None, patience_s=0.1)


def test_the_command_and_hangup_swap_a_real_daemon(
    tmp_path: Path, tiny_bundle: ModelBundle, make_bundle: MakeBundle
) -> None:
    """`kizu swap` tells what happened and that the file names another; SIGHUP goes back to what the file names."""
    new = other(make_bundle, tmp_path / "new")
    file = write_config(tmp_path / "line.toml", tiny_bundle.path, ["cam"])
    kizu = [sys.executable, "-m", "edge.cli"]
    with subprocess.Popen([*kizu, "run", str(file)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            next(line for line in lines if '"ready"' in line)
            asked = subprocess.run(
                [*kizu, "swap", str(file), str(new.path)], capture_output=True, text=True, timeout=60
            )
            promoted = json.loads(next(line for line in lines if "swap promoted" in line))
            process.send_signal(signal.SIGHUP)
            back = json.loads(next(line for line in lines if "swap promoted" in line))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)

    assert asked.returncode == 0, asked.stderr
    assert "promoted:" in asked.stdout and "still names" in asked.stdout
    assert (promoted["model_id"], back["model_id"]) == (new.model_id, tiny_bundle.model_id)
    assert process.returncode == 0
