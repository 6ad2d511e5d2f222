"""Metrics: every series there from the start, and an account of frames that adds up in every scrape."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from edge.bundle import ModelBundle
from edge.clock import ManualClock
from edge.events import DefectEvent, EventRegion
from edge.frame_account import FrameAccount
from edge.metrics import Metrics
from edge.series import CAMERA, GROUPS, SECONDS, SERIES, STAGES, STATES, VERDICTS, with_deadlines
from edge.types import Decision, Reason
from edge.wire import REFUSALS
from sample_events import sample_event

ROOT = Path(__file__).parents[2]
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


def test_the_last_frames_age_does_not_care_for_a_step_of_the_clock() -> None:
    """NTP sets the machine back an hour: age goes on as it was, the timestamp is what the clock said."""
    registry, clock = CollectorRegistry(), ManualClock()
    frames = Metrics(registry, CAMERAS, clock).frames
    frames.receive(("left", 1, 0))
    clock.advance(3)
    clock.step_wall(-3600)

    found = samples(registry)

    assert found['kizu_last_frame_age_seconds{camera="left"}'] == 3
    assert found['kizu_last_frame_timestamp_seconds{camera="left"}'] == 1_700_000_000
    assert found['kizu_last_frame_timestamp_seconds{camera="right"}'] == 0


def page_of(metrics: Metrics, registry: CollectorRegistry, bundle: ModelBundle) -> bytes:
    """A page on which everything happened that makes a series appear."""
    metrics.set_build("line-1")
    metrics.set_model(bundle.model_id, bundle.manifest, certified=True)
    metrics.set_engine("fake", "1", "cpu")
    metrics.set_lags(10, {"press": 3})
    for queue in ("inference", "verdict", "log"):
        metrics.set_capacity(queue, 16)
    return generate_latest(registry)


def families(page: bytes) -> dict[str, tuple[str, frozenset[str]]]:
    """Kind and labels of every family on a page."""
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for family in text_string_to_metric_families(page.decode()):
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[family.name] = (family.type, frozenset(labels))
    return {name: seen for name, seen in found.items() if not name.endswith("_created")}


def test_the_page_holds_what_is_declared_and_nothing_else(tiny_bundle: ModelBundle) -> None:
    """Names, kinds and labels; the GPUs' series are there where there are GPUs."""
    registry = CollectorRegistry()
    found = families(page_of(Metrics(registry, CAMERAS, ManualClock(), {"left": 0.03}), registry, tiny_bundle))

    declared = {one.name: (one.kind, frozenset(one.labels)) for one in SERIES.values() if one not in GROUPS["GPU"]}
    assert found == declared


def test_the_documentation_is_what_the_declarations_say() -> None:
    """`make pages` writes docs/metrics.md; it was run."""
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "metrics_page.py"], capture_output=True, text=True, timeout=60
    )

    assert done.stdout == (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), "run `make pages`"
    assert all(f"| `{one.shown}` |" in done.stdout for one in SERIES.values())


def test_every_deadline_is_a_bound_of_the_histograms() -> None:
    """The share of frames within 33 ms is read off, not interpolated."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, CAMERAS, ManualClock(), {"left": 0.033, "right": 0.1})
    for latency_ms in (10, 33, 34, 200):
        metrics.judge(event("left", latency_ms), latency_ms * 1_000_000)

    found = samples(registry)

    assert found['kizu_latency_seconds_bucket{camera="left",le="0.033"}'] == 2
    assert found['kizu_stage_seconds_bucket{le="0.033",stage="engine"}'] == 0
    assert found['kizu_camera_deadline_seconds{camera="left"}'] == 0.033
    assert with_deadlines(SECONDS, (0.1,)) == SECONDS


def test_what_a_verdict_found_is_noted() -> None:
    """P-values of judged frames, and the area of all regions of a rejected one."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, CAMERAS, ManualClock())
    regions = (EventRegion((0, 0, 4, 4), 12, 2.0), EventRegion((9, 9, 20, 20), 100, 3.0))
    rejected = sample_event(1, "left", decision="reject", p_value=0.002, regions=regions)
    for seen in (rejected, sample_event(2, "left", p_value=0.7), sample_event(3, "left", p_value=None)):
        metrics.judge(seen, 1)

    found = samples(registry)

    assert found['kizu_score_p_value_bucket{camera="left",le="0.002"}'] == 1
    assert found['kizu_score_p_value_count{camera="left"}'] == 2
    assert found['kizu_defect_area_pixels_sum{camera="left"}'] == 112
    assert found['kizu_defect_area_pixels_count{camera="left"}'] == 1


def test_a_voided_certificate_stays_void_for_its_model_only(tiny_bundle: ModelBundle) -> None:
    """Also after a restart, when the model is loaded without its certificate; another model has its own."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, CAMERAS, ManualClock())

    def shown() -> tuple[float, float]:
        found = samples(registry)
        return found["kizu_certificate_valid"], found["kizu_certificate_void"]

    metrics.set_model("a", tiny_bundle.manifest, certified=True)
    before = shown()
    metrics.void_certificate("a")
    void = shown()
    metrics.set_model("b", tiny_bundle.manifest, certified=True)
    other = shown()
    metrics.set_model("a", tiny_bundle.manifest, certified=False)

    assert (before, void, other, shown()) == ((1, 0), (0, 1), (1, 0), (0, 1))


def test_totals_kept_elsewhere_only_grow() -> None:
    """Sampled a few times a second; a rate over them is meaningful."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, CAMERAS, ManualClock())
    for total_so_far in (3, 3, 7):
        metrics.set_replayed(total_so_far)
        metrics.set_rejects_dropped(total_so_far)

    found = samples(registry)

    assert found["kizu_events_replayed_total"] == found["kizu_reject_frames_dropped_total"] == 7


def test_a_subscriber_that_is_no_more_is_not_shown() -> None:
    """A wiped log knows no subscribers: their last lag must not stand for ever; a lag is never negative."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, CAMERAS, ManualClock())
    metrics.set_lags(10, {"press": 3, "archive": 10})
    metrics.set_lags(0, {"press": 3})

    assert {name: value for name, value in samples(registry).items() if name.startswith("kizu_subscriber_lag")} == {
        'kizu_subscriber_lag_events{name="press"}': 0
    }
    assert not any('name="archive"' in name for name in samples(registry))


HOSTILE = ('a"} 1\nkizu_state{state="ready', "back\\slash\n", "\u202e<script>alert(1)</script>", "\u0130\U0001f600", "")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_inside_its_label(name: str) -> None:
    """The configuration refuses such names; should one come through, it forges no series and breaks no page."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, (name,), ManualClock())
    metrics.frames.receive((name, 1, 0))
    page = generate_latest(registry).decode()

    received = [f for f in text_string_to_metric_families(page) if f.name == "kizu_frames_received"]

    assert [(sample.labels, sample.value) for sample in received[0].samples] == [({"camera": name}, 1)]
    assert page.count('kizu_state{state="ready') == 1
    promtool(page)


def promtool(page: str) -> None:
    """`promtool check metrics`, where it is installed: format and naming rules."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout + done.stderr == "", done.stdout + done.stderr


def test_promtool_has_nothing_to_say_about_the_page(tiny_bundle: ModelBundle) -> None:
    """Base units, names, help texts."""
    registry = CollectorRegistry()

    promtool(page_of(Metrics(registry, CAMERAS, ManualClock(), {"left": 0.03}), registry, tiny_bundle).decode())


def test_labels_come_from_the_configuration_or_are_listed() -> None:
    """A label fed by whoever connects would grow without bound; the few in words are bounded by what runs."""
    in_words = {
        (one.name, label): words
        for one in SERIES.values()
        for label, words in one.labels.items()
        if isinstance(words, str) and words != CAMERA
    }

    assert set(in_words.values()) == {
        "a configured camera with a deadline",
        "a registered subscriber, at most 256",
        "the configured line",
        "of kizu",
        "of the interpreter",
        "the running bundle's",
        "the engine's",
        "its number",
    }
