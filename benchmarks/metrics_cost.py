"""What do metrics cost a line of 20 cameras at 200 frames a second, as a share of one core?

    python benchmarks/metrics_cost.py [--frames 20000] [--rounds 5]

Three things in core time, measured apart and added up: every update that a frame causes, as the daemon makes them
(received, stages, watch, verdict with p-value, latency and regions, group commit); what is sampled five times a second
(queues, log, disk, subscribers, state); and the page, asked for over real HTTP every 15 seconds, asker included. The
control is the same loop without the updates. Prints one JSON object; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from edge.clock import SystemClock  # noqa: E402
from edge.events import SCHEMA_VERSION, DefectEvent, EventRegion  # noqa: E402
from edge.metrics import Metrics  # noqa: E402
from edge.metrics_server import MetricsServer  # noqa: E402
from edge.series import QUEUES  # noqa: E402

BOUND_SHARE = 0.005
FRAMES_PER_S = 200
BATCH = 4
GROUP = 2
SAMPLES_PER_S = 5
SCRAPE_EVERY_S = 15
CAMERAS = tuple(f"cam{number:02}" for number in range(20))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps(measure(options.frames, options.rounds), indent=2))


def measure(frames: int, rounds: int) -> dict[str, object]:
    """See the module's docstring."""
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    metrics = Metrics(registry, CAMERAS, SystemClock(), dict.fromkeys(CAMERAS, 0.03))
    events = [_event(sequence) for sequence in range(frames)]
    frame_s = _median(rounds, lambda: _updates(metrics, events)) / frames
    loop_s = _median(rounds, lambda: [None for event in events]) / frames
    sample_s = _median(rounds, lambda: _samples(metrics, 200)) / 200
    with MetricsServer(registry, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.port}/metrics"
        size = len(_page(url))
        scrape_s = _median(rounds, lambda: [_page(url) for _ in range(10)]) / 10
    shares = {
        "frames": (frame_s - loop_s) * FRAMES_PER_S,
        "samples": sample_s * SAMPLES_PER_S,
        "scrapes": scrape_s / SCRAPE_EVERY_S,
    }
    total = sum(shares.values())
    return {
        "cameras": len(CAMERAS),
        "frames_per_s": FRAMES_PER_S,
        "update_core_us_per_frame": round((frame_s - loop_s) * 1e6, 2),
        "sample_core_us": round(sample_s * 1e6, 1),
        "scrape_core_ms": round(scrape_s * 1e3, 2),
        "page_bytes": size,
        "share_of_a_core": {name: round(share, 5) for name, share in shares.items()},
        "total_share_of_a_core": round(total, 5),
        "bound_share_of_a_core": BOUND_SHARE,
        "ratio_to_bound": round(total / BOUND_SHARE, 3),
    }


def _event(sequence: int) -> DefectEvent:
    """Every tenth part is rejected with three regions."""
    rejected = sequence % 10 == 0
    camera = CAMERAS[sequence % len(CAMERAS)]
    return DefectEvent(
        version=SCHEMA_VERSION,
        id=f"{camera}/1/{sequence}",
        line="benchmark",
        camera=camera,
        camera_epoch=1,
        frame_sequence=sequence,
        captured_ns=1,
        decided_ns=2,
        latency_ns=3,
        decision="reject" if rejected else "accept",
        reason="score",
        detail="",
        score=1.0,
        threshold=2.0,
        p_value=0.5,
        certified=True,
        regions=(EventRegion((0, 0, 9, 9), 50, 1.0),) * 3 if rejected else (),
        frame_height=480,
        frame_width=640,
        model_id="m",
        mask="none",
    )


def _updates(metrics: Metrics, events: list[DefectEvent]) -> None:
    """What source, inference, verdict and log threads do for these frames."""
    for number, event in enumerate(events):
        metrics.frames.receive((event.camera, 1, event.frame_sequence))
        metrics.observe("preprocess", 900_000)
        if number % BATCH == 0:
            metrics.observe("engine", 20_000_000)
        metrics.observe("segment", 300_000)
        metrics.set_evidence(event.camera, 0.1)
        if number % GROUP == 0:
            metrics.observe_group(GROUP, 2_000_000)
        metrics.observe("commit", 3_000_000)
        metrics.judge(event, 30_000_000)


def _samples(metrics: Metrics, times: int) -> None:
    """What the daemon's main thread reads off, `times` times."""
    for _ in range(times):
        for queue in QUEUES:
            metrics.set_depth(queue, 1)
        metrics.log_head.set(1)
        metrics.log_bytes.set(1)
        metrics.log_removed_through.set(1)
        metrics.set_log_disk(str(ROOT / "events.sqlite"))
        metrics.set_lags(9, {"press": 3, "archive": 4})
        metrics.set_replayed(1)
        metrics.set_rejects_dropped(0)
        metrics.set_substitute(False)


def _page(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as page:
        return bytes(page.read())


def _median(rounds: int, work: Callable[[], object]) -> float:
    """Core seconds of all threads of this process, of the median round."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
