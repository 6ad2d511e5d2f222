"""How much faster is a camera on the same host that grabs into shared memory than one that sends its pixels?

A real ZeroMqSource and a CameraSender in two processes over ipc, 1280 x 1024 mono; the source acknowledges each frame
at once. The grab itself, which writes each pixel once into the slot or into an array that is then sent, is the same in
both cases and left out. Both kinds run in turn, several rounds; frames per second of each, and the median ratio.

    python benchmarks/ring.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time

import numpy as np

from edge.clock import SystemClock
from edge.ring import Ring
from edge.sender import CameraSender
from edge.sources.zeromq import ZeroMqSource
from edge.types import Frame

WIDTH, HEIGHT, SLOTS = 1280, 1024, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {"copy": [], "ring": []}
    for _ in range(options.rounds):
        for kind, found in rates.items():
            found.append(frames_per_second(kind, options.frames))
    ratios = [ring / copy for ring, copy in zip(rates["ring"], rates["copy"], strict=True)]
    report = {
        "benchmark": "ring",
        "frame": [HEIGHT, WIDTH, 1],
        "copy_fps": round(statistics.median(rates["copy"])),
        "ring_fps": round(statistics.median(rates["ring"])),
        "ratio": round(statistics.median(ratios), 2),
        "rounds": [round(ratio, 2) for ratio in ratios],
    }
    print(json.dumps(report))


def frames_per_second(kind: str, frames: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        clock = SystemClock()
        with ZeroMqSource(f"ipc://{folder}/frames", clock, cameras=["cam"], window=SLOTS) as source:
            camera = multiprocessing.get_context("spawn").Process(target=send, args=(source.address, kind, frames))
            camera.start()
            started = 0.0
            for index in range(frames):
                frame = source.read(30.0)
                assert isinstance(frame, Frame)
                if index == 0:
                    started = time.monotonic()
                source.acknowledge([frame.id.key])
            elapsed = time.monotonic() - started
            while camera.is_alive():
                source.service()
                camera.join(0.01)
    return (frames - 1) / elapsed


def send(address: str, kind: str, frames: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    with (
        Ring(SLOTS, WIDTH * HEIGHT) as ring,
        CameraSender(address, "cam", window=SLOTS, ring=ring if kind == "ring" else None) as sender,
    ):
        for _ in range(frames):
            if kind == "ring":
                sender.send_slot(sender.slot(30.0), "mono8", WIDTH, HEIGHT, timeout_s=30.0)
            else:
                sender.send(picture, encoding="raw", timeout_s=30.0)
        sender.drain(30.0)


if __name__ == "__main__":
    main()
