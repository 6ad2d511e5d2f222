"""Metrics: every series there from the start, and an account of frames that adds up in every scrape."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from edge.clock import ManualClock
from edge.errors import ConfigError
from edge.events import DefectEvent
from edge.metrics import STAGES, STATES, VERDICTS, FrameAccount, Metrics, MetricsServer
from edge.types import Decision, Reason
from edge.wire import REFUSALS
from sample_events import sample_event

CAMERAS = ("left", "right")


def event(camera: str, sequence: int, decision: str = "accept", reason: str = "score") -> DefectEvent:
    return sample_event(sequence, camera, camera_epoch=1, decision=decision, reason=reason)


def samples(registry: CollectorRegistry) -> dict[str, float]:
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def total(found: dict[str, float], prefix: str) -> float:
    return sum(value for name, value in found.items() if name.startswith(prefix))


def adds_up(found: dict[str, float], camera: str) -> bool:
    label = f'{{camera="{camera}"'
    judged = total(found, "kizu_verdicts_total" + label)
    return found[f"kizu_frames_received_total{label}}}"] == judged + found[f"kizu_frames_in_flight{label}}}"]


def test_every_series_exists_before_anything_happened() -> None:
    """An alert on a reason that never occurred sees 0; absence would look like a dead daemon."""
    registry = CollectorRegistry()
    Metrics(registry, CAMERAS, ManualClock())

    found = samples(registry)

    for camera in CAMERAS:
        assert found[f'kizu_frames_received_total{{camera="{camera}"}}'] == 0
        assert found[f'kizu_frames_in_flight{{camera="{camera}"}}'] == 0
        assert found[f'kizu_frames_duplicate_total{{camera="{camera}"}}'] == 0
        for decision, reason in VERDICTS:
            labels = f'camera="{camera}",decision="{decision}",reason="{reason}"'
            assert found[f"kizu_verdicts_total{{{labels}}}"] == 0
    for reason in REFUSALS:
        assert found[f'kizu_messages_refused_total{{reason="{reason}"}}'] == 0
    for stage in STAGES:
        assert found[f'kizu_stage_seconds_count{{stage="{stage}"}}'] == 0
    assert {state: found[f'kizu_state{{state="{state}"}}'] for state in STATES} == {
        state: float(state == "starting") for state in STATES
    }


def test_the_verdict_labels_are_all_that_a_verdict_can_be() -> None:
    """ACCEPT and REJECT by score or by rule, INCONCLUSIVE by every other reason."""
    judged = {(decision, reason) for decision in ("accept", "reject") for reason in ("score", "rule")}
    others = {(Decision.INCONCLUSIVE.value, reason.value) for reason in Reason if not reason.is_judged}

    assert set(VERDICTS) == judged | others


def test_received_is_judged_plus_in_flight_at_every_step() -> None:
    """The promise of the runtime, in numbers."""
    registry = CollectorRegistry()
    frames = Metrics(registry, CAMERAS, ManualClock()).frames
    for sequence in range(5):
        assert frames.receive(("left", 1, sequence))
        assert adds_up(samples(registry), "left")
    for sequence, verdict in enumerate((("accept", "score"), ("reject", "score"), ("inconclusive", "shape"))):
        frames.judge(event("left", sequence, *verdict))
        assert adds_up(samples(registry), "left")

    assert frames.in_flight == 2
    assert adds_up(samples(registry), "right")


def test_a_verdict_counted_twice_breaks_the_sum() -> None:
    """Control: the account can be wrong, so that its being right says something."""
    registry = CollectorRegistry()
    frames = Metrics(registry, CAMERAS, ManualClock()).frames
    frames.receive(("left", 1, 0))
    frames.judge(event("left", 0))
    frames.judge(event("left", 0))

    assert not adds_up(samples(registry), "left")


def test_a_frame_in_flight_is_received_once() -> None:
    """The same frame again joins the one that waits."""
    frames = FrameAccount(CAMERAS, ManualClock())

    assert frames.receive(("left", 1, 0))
    assert not frames.receive(("left", 1, 0))
    assert frames.in_flight == 1


def test_the_last_frames_age_grows_until_another_comes() -> None:
    """A camera that died shows by age, also one that never sent anything."""
    registry, clock = CollectorRegistry(), ManualClock()
    frames = Metrics(registry, CAMERAS, clock).frames
    clock.advance(7)
    frames.receive(("left", 1, 0))
    clock.advance(2)

    found = samples(registry)

    assert found['kizu_last_frame_age_seconds{camera="left"}'] == 2
    assert found['kizu_last_frame_age_seconds{camera="right"}'] == 9


def test_progress_starts_anew_when_a_frame_comes_after_a_pause() -> None:
    """An idle night is no stall: waiting counts from the first frame that waits."""
    clock = ManualClock()
    frames = FrameAccount(CAMERAS, clock)
    clock.advance(3600)
    frames.receive(("left", 1, 0))
    clock.advance(1)
    frames.receive(("left", 1, 1))

    assert clock.monotonic_ns() - frames.progress_ns == 1_000_000_000


def test_the_endpoint_answers_on_loopback_until_it_is_closed() -> None:
    """One page, over real HTTP, and the port is free afterwards."""
    registry = CollectorRegistry()
    Metrics(registry, CAMERAS, ManualClock())
    with MetricsServer(registry, "127.0.0.1", 0) as server:
        port = server.port
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            assert b"kizu_frames_received_total" in page.read()

    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


def test_a_port_in_use_is_a_configuration_error_that_names_the_key() -> None:
    """Two daemons on one machine: the second says which key to change."""
    registry = CollectorRegistry()
    with (
        MetricsServer(registry, "127.0.0.1", 0) as first,
        pytest.raises(ConfigError, match=r"metrics.port \d+ on 127.0.0.1: .*in use"),
    ):
        MetricsServer(registry, "127.0.0.1", first.port)
