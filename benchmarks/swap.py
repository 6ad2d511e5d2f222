"""What does a hot swap cost the frames that come while it happens?

A real daemon in this process on the demo's bundle, one camera that sends as fast as it is acknowledged. The same number
of frames is sent several times in turn, without a swap and with one in the middle (to a copy of the bundle with another
threshold, and back); latency is from reception to verdict, as the events say. One JSON object: p50 and p99 of both
kinds, and what the swap added to p99 in frame times (the p50 without a swap).

    python benchmarks/swap.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
from pathlib import Path

import msgspec
import numpy as np

from edge import daemon
from edge.bundle import derive_bundle, open_bundle
from edge.clock import SystemClock
from edge.config import load_config
from edge.daemon import Ready, StopRequest, default_control_address
from edge.demo.line import write_config
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
        latencies = run(Path(folder), options.frames, options.rounds)
    report: dict[str, object] = {"benchmark": "swap", "frames": options.frames, "rounds": options.rounds}
    for kind, rounds in latencies.items():
        report[f"{kind}_p50_ms"] = round(statistics.median(float(np.percentile(one, 50)) for one in rounds), 2)
        report[f"{kind}_p99_ms"] = round(statistics.median(float(np.percentile(one, 99)) for one in rounds), 2)
    added = float(str(report["swap_p99_ms"])) - float(str(report["plain_p99_ms"]))
    print(json.dumps(report | {"added_to_p99_in_frame_times": round(added / float(str(report["plain_p50_ms"])), 2)}))


def run(folder: Path, frames: int, rounds: int) -> dict[str, list[list[float]]]:
    """Latencies in ms by kind, a list a round."""
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
    marks: dict[str, list[tuple[int, int]]] = {"plain": [], "swap": []}
    sent = 0
    with CameraSender(ready[0].frames_address, "cam") as sender:
        for number in range(rounds):
            for kind, found in marks.items():
                found.append((sent, sent + frames))
                target = second.path if number % 2 == 0 else first.path
                swapping = threading.Thread(target=swap, args=(default_control_address(config), target))
                for index in range(frames):
                    if kind == "swap" and index == frames // 3:
                        swapping.start()
                    sender.send(picture, encoding="raw", timeout_s=60)
                sent += frames
                sender.drain(60)
                if kind == "swap":
                    swapping.join()
    stop.set()
    server.join(60)
    log = EventLog(Path(config.log.path), SystemClock())
    by_sequence = {event.frame_sequence: event.latency_ns / 1e6 for event, _ in log.read_since(0, 1_000_000)}
    log.close()
    return {
        kind: [[by_sequence[at] for at in range(start, end)] for start, end in found] for kind, found in marks.items()
    }


def swap(address: str, bundle: Path) -> None:
    assert ask(address, SwapRequest(str(bundle)), lambda report: None, patience_s=60), "the swap was refused"


if __name__ == "__main__":
    main()
