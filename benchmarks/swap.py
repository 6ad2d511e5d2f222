"""What does a hot swap cost the frames that come while it happens?

A real daemon in this process on the demo's bundle, one camera that sends as fast as it is acknowledged. The same number
of frames is sent several times in turn: without a swap, with one in the middle (to a copy of the bundle with another
threshold, and back), and, as the control, with one that is in a hurry, as swaps were at first: no rest between its
steps, and every request of every batch run before it takes over. Latency is from reception to verdict, as the events
say. One JSON object: p50 and p99 of each kind, and what a swap added to p99, in milliseconds, in frames (the time
between two verdicts) and in latencies (the p50 of a frame, which waits for those before it).

    python benchmarks/swap.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import msgspec
import numpy as np

from edge import daemon, loading
from edge.bundle import derive_bundle, open_bundle
from edge.clock import SystemClock
from edge.config import load_config
from edge.daemon import Ready, StopRequest, default_control_address
from edge.demo.line import write_config
from edge.engines.openvino import OpenVinoEngine
from edge.sender import CameraSender
from edge.sinks.event_log import EventLog
from edge.swap import SwapRequest, ask

DEMO = Path(__file__).resolve().parents[1] / "edge" / "demo" / "bundle"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        latencies, frame_ms, seconds = run(Path(folder), options.frames, options.rounds)
    report: dict[str, object] = {"benchmark": "swap", "frames": options.frames, "rounds": options.rounds}
    found = {(kind, at): middle(rounds, at) for kind, rounds in latencies.items() for at in (50, 99)}
    report |= {f"{kind}_p{at}_ms": round(value, 2) for (kind, at), value in found.items()}
    report |= {"frame_ms": round(frame_ms, 2), "swap_seconds": round(statistics.median(seconds), 1)}
    for kind in ("swap", "hurried"):
        added = statistics.median(
            float(np.percentile(with_swap, 99) - np.percentile(plain, 99))
            for with_swap, plain in zip(latencies[kind], latencies["plain"], strict=True)
        )
        report[f"{kind}_added_to_p99_ms"] = round(added, 2)
        report[f"{kind}_added_in_frames"] = round(added / frame_ms, 2)
        report[f"{kind}_added_in_latencies"] = round(added / found["plain", 50], 2)
    print(json.dumps(report))


def middle(rounds: list[list[float]], percentile: int) -> float:
    """The median over the rounds of a percentile."""
    return statistics.median(float(np.percentile(one, percentile)) for one in rounds)


@contextmanager
def in_a_hurry() -> Iterator[None]:
    """The control: what `Pace` and the shorter warm-up replaced."""

    def all_at_once(self: OpenVinoEngine) -> None:
        spec = self.spec
        batch = np.zeros((spec.max_batch, spec.height, spec.width, spec.channels), np.uint8)
        for _ in range(spec.depth):
            self.submit(batch)
        for _ in range(spec.depth):
            self.collect(60.0)

    with patch.object(loading, "Pace", lambda: lambda: None), patch.object(OpenVinoEngine, "warmup", all_at_once):
        yield


def run(folder: Path, frames: int, rounds: int) -> tuple[dict[str, list[list[float]]], float, list[float]]:
    """Latencies in ms by kind, a list a round; ms between two verdicts without a swap; seconds that each swap took."""
    first = open_bundle(DEMO)
    calibration = msgspec.structs.replace(first.calibration, threshold=first.calibration.threshold * 1.01)
    second = derive_bundle(first, folder / "second", calibration=calibration, provenance_extra={})
    config = load_config(write_config(folder / "line.toml", first.path, ["cam"]))
    stop, ready = StopRequest(), list[Ready]()
    is_ready = threading.Event()

    def on_ready(told: Ready) -> None:
        ready.append(told)
        is_ready.set()

    arguments = {"config": config, "where": folder / "line.toml", "stop": stop, "on_ready": on_ready}
    server = threading.Thread(target=daemon.serve, kwargs=arguments)
    server.start()
    is_ready.wait(60)
    picture = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    marks: dict[str, list[tuple[int, int]]] = {"plain": [], "swap": [], "hurried": []}
    sent, plain_s, seconds, target = 0, 0.0, list[float](), first.path
    with CameraSender(ready[0].frames_address, "cam") as sender:
        for _ in range(rounds):
            for kind, found in marks.items():
                found.append((sent, sent + frames))
                if kind != "plain":
                    target = second.path if target == first.path else first.path
                kept = seconds if kind == "swap" else []
                swapping = threading.Thread(target=swap, args=(default_control_address(config), target, kept))
                started = time.monotonic()
                with in_a_hurry() if kind == "hurried" else nullcontext():
                    for index in range(frames):
                        if kind != "plain" and index == frames // 4:
                            swapping.start()
                        sender.send(picture, encoding="raw", timeout_s=60)
                    sent += frames
                    sender.drain(60)
                    if kind != "plain":
                        swapping.join()
                plain_s += time.monotonic() - started if kind == "plain" else 0.0
    stop.set()
    server.join(60)
    log = EventLog(Path(config.log.path), SystemClock())
    by_sequence = {event.frame_sequence: event.latency_ns / 1e6 for event, _ in log.read_since(0, 1_000_000)}
    log.close()
    latencies = {
        kind: [[by_sequence[at] for at in range(start, end)] for start, end in found] for kind, found in marks.items()
    }
    return latencies, plain_s / (rounds * frames) * 1e3, seconds


def swap(address: str, bundle: Path, seconds: list[float]) -> None:
    started = time.monotonic()
    assert ask(address, SwapRequest(str(bundle)), lambda report: None, patience_s=60), "the swap was refused"
    seconds.append(time.monotonic() - started)


if __name__ == "__main__":
    main()
