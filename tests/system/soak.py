"""Full load for half an hour: the daemon's memory stands still after its warm-up, its descriptors are constant.

Owns the load (two cameras as fast as they are acknowledged, a registered subscriber that commits, a scrape every few
seconds, retention at work), the samples and what follows from them; `make soak` is the half hour.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from edge.client import Subscriber  # noqa: E402
from edge.demo.line import BUNDLE, DaemonProcess, Photo, load_photos, write_config  # noqa: E402
from edge.errors import SinkFull, SourceTimeout  # noqa: E402
from edge.sender import CameraSender  # noqa: E402

CAMERAS = ("left", "right")
SAMPLE_EVERY_S = 5.0
MOST_MIB_PER_H = 1.0
# Small, so that retention works all the time and the log is as full as it will ever be once the warm-up is over.
RETAIN_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the daemon: seconds since the start, resident MiB in all and without files, descriptors, verdicts."""

    at_s: float
    resident_mib: float
    anonymous_mib: float
    descriptors: int
    verdicts: int


def slope_mib_per_h(samples: Sequence[Sample], name: str = "resident_mib") -> float:
    """Theil-Sen: the median of the slopes of all pairs, which one jump (an allocator's arena) does not bend."""
    points = [(one.at_s, float(getattr(one, name))) for one in samples]
    return 3600 * statistics.median((y2 - y1) / (x2 - x1) for i, (x1, y1) in enumerate(points) for x2, y2 in points[:i])


def account(samples: Sequence[Sample], warmup_s: float) -> dict[str, Any]:
    """What the samples after the warm-up say, and whether it is what was promised.

    Raises:
        ValueError: fewer than three samples are left.
    """
    warm = [one for one in samples if one.at_s >= warmup_s]
    if len(warm) < 3:
        raise ValueError(f"{len(warm)} samples after {warmup_s} s of warm-up; run longer")
    slope, descriptors = slope_mib_per_h(warm), sorted({one.descriptors for one in warm})
    return {
        "seconds_after_warmup": round(warm[-1].at_s - warm[0].at_s, 1),
        "verdicts": warm[-1].verdicts - warm[0].verdicts,
        "verdicts_per_s": round((warm[-1].verdicts - warm[0].verdicts) / (warm[-1].at_s - warm[0].at_s), 1),
        "resident_mib": [warm[0].resident_mib, warm[-1].resident_mib],
        "resident_mib_per_h": round(slope, 3),
        "anonymous_mib_per_h": round(slope_mib_per_h(warm, "anonymous_mib"), 3),
        "descriptors": descriptors,
        "kept": slope < MOST_MIB_PER_H and len(descriptors) == 1,
    }


def status(pid: int) -> tuple[float, float, int]:
    """Resident MiB, anonymous MiB and the number of open descriptors of a process, as Linux tells them."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {name: int(value.split()[0]) for name, value in (line.split(":", 1) for line in lines) if "kB" in value}
    return kib["VmRSS"] / 1024, kib["RssAnon"] / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def verdicts(url: str) -> int:
    """The daemon's own count, by a scrape as Prometheus makes it."""
    with urllib.request.urlopen(url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    return sum(int(float(line.rpartition(" ")[2])) for line in lines if line.startswith("kizu_verdicts_total"))


class Load:
    """Cameras that never pause and a registered subscriber, in threads of this process, which is not measured."""

    def __init__(self, ready: Mapping[str, Any], photos: Sequence[Photo]) -> None:
        self.errors: list[str] = []
        self.received = 0
        self._ready, self._photos = ready, photos
        self._over = threading.Event()
        work = [threading.Thread(target=self._send, args=(name,)) for name in CAMERAS]
        self._threads = [*work, threading.Thread(target=self._follow)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)

    def _send(self, name: str) -> None:
        with CameraSender(self._ready["frames_address"], name) as sender:
            number = 0
            while not self._over.is_set():
                photo = self._photos[number % len(self._photos)]
                with contextlib.suppress(SinkFull):
                    sender.send_encoded(photo.data, photo.encoding, photo.width, photo.height, timeout_s=1.0)
                    number += 1
            if left := sender.drain(20):
                self.errors.append(f"{name}: {left} frames were never acknowledged")

    def _follow(self) -> None:
        last = 0
        addresses = self._ready["events_address"], self._ready["replay_address"]
        with Subscriber(addresses[0], replay=addresses[1], name="soak") as subscriber:
            while not self._over.is_set():
                with contextlib.suppress(SourceTimeout):
                    event, _ = subscriber.receive(1.0)
                    if last and event.log_sequence != last + 1:
                        self.errors.append(f"event {event.log_sequence} after {last}")
                    last, self.received = event.log_sequence, self.received + 1
                    if self.received % 64 == 0:
                        subscriber.commit(5.0)


def soak(folder: Path, seconds: float, warmup_s: float, **tables: object) -> dict[str, Any]:
    """Load a real daemon for `seconds`; what `account` says of it. `tables` change its configuration."""
    settings: dict[str, object] = {"log": {"path": "events.sqlite", "retain_bytes": RETAIN_BYTES}}
    settings |= {name: f"ipc://{folder}/{name}" for name in ("frames_address", "events_address", "replay_address")}
    samples: list[Sample] = []
    with DaemonProcess(write_config(folder / "line.toml", BUNDLE, CAMERAS, **settings | tables)) as daemon:
        ready = daemon.wait_until_ready(120)
        with Load(ready, load_photos()) as load:
            started, every_s = time.monotonic(), min(SAMPLE_EVERY_S, seconds / 10)
            while (at_s := time.monotonic() - started) < seconds:
                # The scrape comes last: its connection is gone again when the next sample is taken.
                resident, anonymous, descriptors = status(daemon.pid)
                samples.append(Sample(at_s, resident, anonymous, descriptors, verdicts(ready["metrics_url"])))
                time.sleep(every_s)
        ended = daemon.stop()
    found = account(samples, warmup_s)
    return {"seconds": seconds, "warmup_s": warmup_s, "exit_status": ended, **found, "errors": load.errors[:5]}


def main() -> None:
    """The half hour: `make soak`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--warmup", type=float, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kizu-") as folder:
        found = soak(Path(folder), options.seconds, options.warmup)
    print(json.dumps(found, indent=2))
    sys.exit(not found["kept"] or bool(found["errors"]) or found["exit_status"] != 0)


if __name__ == "__main__":
    main()
