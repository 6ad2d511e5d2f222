"""What does the operator's page cost, and how late is it?

    python benchmarks/console.py [--cameras 20] [--fps 10] [--seconds 30] [--loads 5]

A real `kizu console` and a real headless Chromium (software rendering: no GPU here) before a real event log, publisher
and replay server. What is published are events that the daemon itself recorded on the shipped photographs a moment
before, under new camera names and with the time of now: two cores could not judge 200 frames a second beside it.

Prints one JSON object: first paint and first tile of a page (milliseconds since navigation, median and worst of
`--loads`), event on screen (from the call to publish until the frame after the one that shows it), and cores used by
console and browser, from their processes' own CPU time. Needs chromium.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests" / "helpers")) if path not in sys.path]

from browser import MISSING, Browser, chromium  # noqa: E402
from console_line import Line, ServedConsole  # noqa: E402
from edge.client import Subscriber  # noqa: E402
from edge.demo.line import BUNDLE, DaemonProcess, SimulatedCamera, load_photos, write_config  # noqa: E402
from edge.images import encode_mask_png  # noqa: E402
from edge.wire import LoggedEvent  # noqa: E402

BOUNDS = {"first_paint_ms": 1000, "on_screen_ms": 200, "cores": 1.0}
RECORDED = 24

# Writes down when each camera's newest event was on the screen: the frame after the one in which its tile changed.
WATCH = """(() => {
  window.seen = [];
  const at = new MutationObserver(changes => {
    const ids = [...new Set(changes.map(change => change.target.dataset.number))];
    requestAnimationFrame(() => requestAnimationFrame(() => {
      const now = performance.timeOrigin + performance.now();
      for (const id of ids) window.seen.push([id, now]);
    }));
  });
  at.observe(document.querySelector('#tiles'), { subtree: true, attributes: true, attributeFilter: ['data-number'] });
})()"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cameras", type=int, default=20)
    parser.add_argument("--fps", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--loads", type=int, default=5)
    options = parser.parse_args()
    if chromium() is None:
        sys.exit(MISSING)
    with tempfile.TemporaryDirectory() as folder:
        recorded = record(Path(folder))
        with Line(Path(folder), "bench") as line:
            print(json.dumps(measure(line, recorded, options), indent=2))


def record(folder: Path) -> list[LoggedEvent]:
    """Events with their masks, as a daemon published them."""
    config = write_config(folder / "line.toml", BUNDLE, ["cam"], log={"path": "recorded.sqlite"})
    with DaemonProcess(config) as daemon:
        ready = daemon.wait_until_ready(120.0)
        camera = SimulatedCamera(ready["frames_address"], "cam", load_photos(), 20.0)
        with Subscriber(ready["events_address"]) as subscriber:
            subscriber.wait_until_connected(10.0)
            camera.start()
            found: list[LoggedEvent] = []
            while len(found) < RECORDED:
                event, mask = subscriber.receive(30.0)
                found.append((event, None if mask is None else encode_mask_png(mask)))
            camera.stop()
            camera.join(30.0)
    return found


class Traffic:
    """Publishes recorded events at a steady pace; `published` maps each event's id to when."""

    def __init__(self, line: Line, recorded: Sequence[LoggedEvent], cameras: int, fps: float) -> None:
        self.published: dict[str, float] = {}
        self.rejected = 0
        self._line, self._recorded, self._cameras, self._fps = line, recorded, cameras, fps
        self._number = 0

    def run(self, seconds: float) -> float:
        """For so long; returns the rate that was kept."""
        start, count = time.monotonic(), 0
        while (now := time.monotonic() - start) < seconds:
            due = int(now * self._cameras * self._fps)
            while count < due:
                self._one()
                count += 1
            time.sleep(0.002)
        self._line.flush()
        return count / (time.monotonic() - start)

    def _one(self) -> None:
        number = self._number
        self._number += 1
        # One reject in sixty parts, as on a line that runs well.
        kind = "reject" if number % 60 == 0 else "accept"
        fitting = [one for one in self._recorded if one[0].decision == kind] or self._recorded
        event, png = fitting[number % len(fitting)]
        camera, sequence = f"cam{number % self._cameras}", number // self._cameras
        now_ns = time.time_ns()
        changed = msgspec.structs.replace(
            event, id=f"{camera}/7/{sequence}", line="bench", camera=camera, camera_epoch=7, frame_sequence=sequence,
            captured_ns=now_ns, decided_ns=now_ns, log_epoch=0, log_sequence=0,
        )  # fmt: skip
        self.rejected += event.decision == "reject"
        self.published[changed.id] = time.time() * 1e3
        self._line.put(changed, png)


def measure(line: Line, recorded: Sequence[LoggedEvent], options: argparse.Namespace) -> dict[str, object]:
    """See the module's docstring."""
    traffic = Traffic(line, recorded, options.cameras, options.fps)
    with ServedConsole(line) as console, Browser(1920, 1080) as browser:
        traffic.run(3.0)
        paints = [first_paint(browser, console.page) for _ in range(options.loads)]
        browser.run(WATCH)
        traffic.run(3.0)
        before = [cpu_s(console.pid), cpu_s(browser.pid)]
        start = time.monotonic()
        rate = traffic.run(options.seconds)
        took = time.monotonic() - start
        used = [(cpu_s(pid) - then) / took for pid, then in zip((console.pid, browser.pid), before, strict=True)]
        time.sleep(0.5)
        late = sorted(at - traffic.published[name] for name, at in browser.run("window.seen"))
        shown = browser.run("document.querySelectorAll('.tile').length")
    return {
        "cameras": options.cameras,
        "events_per_second": round(rate, 1),
        "rejects": traffic.rejected,
        "tiles": shown,
        "first_paint_ms": spread([paint for paint, _ in paints]),
        "first_tiles_ms": spread([tiles for _, tiles in paints]),
        "on_screen_ms": {
            "events": len(late),
            "median": round(statistics.median(late), 1),
            "p99": round(late[int(0.99 * len(late))], 1),
            "worst": round(late[-1], 1),
        },
        "cores": {"console": round(used[0], 3), "browser": round(used[1], 3), "together": round(sum(used), 3)},
        "bounds": BOUNDS,
        "load_average": round(psutil.getloadavg()[0], 1),
    }


def first_paint(browser: Browser, page: str) -> tuple[float, float]:
    """(first contentful paint, all tiles there), milliseconds since the navigation; nothing from a cache."""
    browser.open("about:blank")
    browser._call("Network.clearBrowserCache")
    browser.open(page)
    paint = browser.wait("(performance.getEntriesByName('first-contentful-paint')[0] || {}).startTime")
    tiles = browser.wait("document.querySelectorAll('.tile').length > 0 && performance.now()")
    return float(paint), float(tiles)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and worst."""
    return {"median": round(statistics.median(values), 1), "worst": round(max(values), 1)}


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and everything below it."""
    total, top = 0.0, psutil.Process(pid)
    for process in [top, *top.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


if __name__ == "__main__":
    main()
