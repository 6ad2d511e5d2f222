"""A line without an engine for tests of the console: real event log, publisher and replay server, judged by the test.

Events go the daemon's way: logged, committed, published. `ServedConsole` is `kizu console` as a user starts it.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edge import images, wire
from edge.clock import SystemClock
from edge.events import DefectEvent, EventRegion
from edge.sinks.event_log import EventLog
from edge.sinks.publisher import Publisher
from edge.sinks.rejects import frame_path, rejects_folder
from edge.sinks.replay import ReplayServer
from sample_events import sample_event

FRAME = (120, 160)


def blob(x: int = 80, y: int = 60, radius: int = 18, shape: tuple[int, int] = FRAME) -> NDArray[np.bool_]:
    """A round flaw."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return np.asarray((rows - y) ** 2 + (columns - x) ** 2 <= radius**2)


class Line:
    """Log, publisher and replay in `folder`, with heads every second; `stop` and `start` as often as a test wants.

    The addresses stay the same over a restart.
    """

    def __init__(self, folder: Path, name: str = "line-a") -> None:
        self.log_path = folder / "events.sqlite"
        self.state, self.fallback = "ready", ""
        self._name = name
        self._numbers: dict[str, int] = {}
        self.events = self.replay = ""
        self.start()

    def start(self) -> None:
        """Open everything."""
        clock = SystemClock()
        self._log = EventLog(self.log_path, clock, capacity=100_000)
        self._publisher = Publisher(
            self.events or "tcp://127.0.0.1:*", self._name, clock, head=(self._log.epoch, self._log.head), hwm=10_000
        )
        self._server = ReplayServer(self.replay or "tcp://127.0.0.1:*", self._log)
        self.events, self.replay = self._publisher.address, self._server.address
        self._stopping = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._ticker.start()

    def stop(self) -> None:
        """As if the daemon were gone."""
        self._stopping.set()
        self._ticker.join(10)
        self._server.close()
        self._publisher.close()
        self._log.close()

    def put(self, event: DefectEvent, png: bytes | None) -> None:
        """Log, commit and publish an event that was made elsewhere."""
        self._log.append(event, png, lambda logged: self._publisher.publish(logged, png))

    def flush(self) -> None:
        """Wait until everything said is committed."""
        self._log.flush(20.0)

    def wipe(self) -> None:
        """Somebody deletes the log of a stopped line."""
        for file in self.log_path.parent.glob(f"{self.log_path.name}*"):
            if file.is_file():
                file.unlink()

    def judge(
        self, camera: str = "cam1", decision: str = "accept", mask: NDArray[np.bool_] | None = None, **changes: Any
    ) -> DefectEvent:
        """One part; returns its event as it was handed to the log."""
        number = self._numbers[camera] = self._numbers.get(camera, -1) + 1
        now_ns = time.time_ns()
        scores: dict[str, Any] = {"score": 0.4, "p_value": 0.5}
        if decision == "reject":
            scores = {"score": 2.5, "p_value": 0.01}
        if decision == "inconclusive":
            scores = {
                "score": None,
                "threshold": None,
                "p_value": None,
                "reason": "late",
                "detail": "no verdict in time",
            }
        png = None if mask is None else images.encode_mask_png(mask)
        height, width = FRAME if mask is None else mask.shape
        regions = () if mask is None else (_region(mask),)
        event = sample_event(number, camera, line=self._name, **({
            "decision": decision, "mask": wire.mask_state(png), "frame_height": height, "frame_width": width,
            "regions": regions, "captured_ns": now_ns, "decided_ns": now_ns, "latency_ns": 7_000_000,
        } | scores | changes))  # fmt: skip
        self.put(event, png)
        return event

    def reject(self, camera: str = "cam1", **changes: Any) -> DefectEvent:
        """A flawed part with a picture beside the log."""
        number = self._numbers.get(camera, -1) + 1
        picture = np.full((*FRAME, 3), (70, 110, 150), np.uint8)
        picture[blob()] = (200, 190, 60)
        file = frame_path(rejects_folder(self.log_path), camera, 7, number)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(images.encode_png(picture))
        return self.judge(camera, "reject", blob(), **changes)

    def _tick(self) -> None:
        while not self._stopping.wait(0.1):
            self._publisher.tick(self.state, self.fallback)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._stopping.is_set():
            self.stop()


def _region(mask: NDArray[np.bool_]) -> EventRegion:
    rows, columns = np.nonzero(mask)
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    return EventRegion(box, int(mask.sum()), 3.5)


class ServedConsole:
    """`kizu console` in a process of its own; `page` is the address that it printed."""

    def __init__(self, line: Line, *options: str, replay: bool = True) -> None:
        words = [line.events, *(["--replay", line.replay] if replay else []), "--port", "0", *options]
        self._words = [sys.executable, "-m", "edge.cli", "console", *words]
        self.start()

    def start(self) -> None:
        """Run it; again after `stop`, at the same port."""
        self._process = subprocess.Popen(self._words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stdout is not None and self._process.stderr is not None
        told = self._process.stdout.readline().split()
        assert told, self._process.stderr.read()
        self.page = told[-1]
        self._words[self._words.index("--port") + 1] = self.page.rsplit(":", 1)[1].rstrip("/")

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self._process.terminate()
        status = self._process.wait(20)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.stop()
