"""A whole line of processes that can be killed: daemon, cameras, registered subscribers, and a bystander who never is.

Owns starting, killing and the account afterwards; `python tests/system/kill_line.py --kills 1000` is the long run.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import zmq

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from edge.clock import SystemClock  # noqa: E402
from edge.demo.line import write_config  # noqa: E402
from edge.sinks.event_log import EventLog  # noqa: E402

HERE = Path(__file__).resolve().parent
CAMERAS = ("cam-a", "cam-b")
CONSUMERS = ("press", "archive")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class KillLine:
    """The processes of one line in `folder`; ipc addresses stay the same across restarts."""

    def __init__(self, folder: Path, bundle: Path, *, daemon_options: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.killed: dict[str, int] = {}
        self.seen: list[tuple[int, int, str]] = []
        """What the bystander was sent, in its order."""
        self._options = daemon_options
        self._address = {name: f"ipc://{folder}/{name}" for name in ("frames", "events", "replay")}
        self._config = write_config(
            folder / "line.toml",
            bundle,
            CAMERAS,
            frames_address=self._address["frames"],
            events_address=self._address["events"],
            replay_address=self._address["replay"],
            engine={"backend": "fake"},
        )
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._ready: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._over = threading.Event()
        self._bystander = threading.Thread(target=self._watch, daemon=True)

    @property
    def log(self) -> Path:
        return self.folder / "events.sqlite"

    def start(self, name: str) -> None:
        """Start the process of that name, again if it was killed."""
        if name == "daemon":
            command = ["line_daemon.py", str(self._config), *self._options]
        elif name in CAMERAS:
            command = ["camera.py", self._address["frames"], name, str(self.folder / f"{name}.acked")]
        else:
            addresses = [self._address["events"], self._address["replay"]]
            command = ["consumer.py", *addresses, name, str(self.folder / f"{name}.got")]
        self._processes[name] = subprocess.Popen(
            [sys.executable, str(HERE / command[0]), *command[1:]],
            stdout=subprocess.PIPE if name == "daemon" else subprocess.DEVNULL,
            stderr=(self.folder / f"{name}.stderr").open("a"),
            text=True,
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        )
        if name == "daemon":
            threading.Thread(target=self._listen, args=(self._processes[name],), daemon=True).start()

    def wait_until_ready(self, timeout_s: float = 300.0) -> None:
        """Wait for the daemon's ready line."""
        if not self._ready.get(timeout=timeout_s):
            raise RuntimeError(f"the daemon ended: {(self.folder / 'daemon.stderr').read_text()[-2000:]}")

    def kill(self, name: str) -> None:
        """SIGKILL."""
        self._processes[name].kill()
        self._processes[name].wait(10)
        self.killed[name] = self.killed.get(name, 0) + 1

    def wait_until(self, what: str, done: Callable[[], bool], timeout_s: float) -> None:
        """Look every 20 ms until `done`."""
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {timeout_s} s")
            time.sleep(0.02)

    def wait_for(self, file: str, more: int, timeout_s: float) -> None:
        """Wait until `file` has `more` lines than now."""
        wanted = len(self.lines(file)) + more
        self.wait_until(f"{file} has {wanted} lines", lambda: len(self.lines(file)) >= wanted, timeout_s)

    def lines(self, file: str) -> list[str]:
        path = self.folder / file
        return path.read_text().splitlines() if path.exists() else []

    def finish(self, timeout_s: float = 300.0) -> None:
        """Stop the cameras, wait until every subscriber has everything, end the daemon in order."""
        for name in CAMERAS:
            self._processes[name].kill()
            self._processes[name].wait(10)
        self._stop_daemon()
        head = len(self.events())
        self.start("daemon")
        self.wait_until_ready()
        deadline = time.monotonic() + timeout_s
        while any(len(self.lines(f"{name}.got")) < head for name in CONSUMERS) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._stop_daemon()

    def told(self, fault: str) -> int:
        """How many frames the bystander or the camera was told of."""
        return len(self.seen) if fault == "seen_but_not_logged" else len(self.lines(f"{CAMERAS[0]}.acked"))

    def logged_now(self) -> list[int]:
        """The committed sequences, while the daemon lives."""
        with sqlite3.connect(f"file:{self.log}?mode=ro", uri=True) as other:
            return [row[0] for row in other.execute("SELECT log_sequence FROM events")]

    def events(self) -> list[Any]:
        """Everything in the log, which must be sound."""
        with EventLog(self.log, SystemClock()) as log:
            log.verify()
            return [event for event, _ in log.read_since(0, 10**9)]

    def account(self) -> dict[str, Any]:
        """What was lost, came twice, or left a hole."""
        events = self.events()
        logged = [event.id for event in events]
        numbered = {(event.log_epoch, event.log_sequence): event.id for event in events}
        acked = [line for name in CAMERAS for line in self.lines(f"{name}.acked")]
        found: dict[str, Any] = {
            "events": len(events),
            "acknowledged": len(acked),
            "bystander_saw": len(self.seen),
            "acknowledged_but_not_logged": len(set(acked) - set(logged)),
            "judged_twice": len(logged) - len(set(logged)),
            "holes_in_the_log": sum(event.log_sequence != at for at, event in enumerate(events, 1)),
            "seen_but_not_logged": sum(numbered.get((epoch, at)) != name for epoch, at, name in self.seen),
        }
        for name in CONSUMERS:
            got = [tuple(line.split()) for line in self.lines(f"{name}.got")]
            wanted = [(str(event.log_epoch), str(event.log_sequence), event.id) for event in events]
            found[f"{name}_lost"] = len(set(wanted) - set(got))
            found[f"{name}_twice"] = len(got) - len(set(got))
            found[f"{name}_out_of_order"] = int(got != wanted)
        return found

    def __enter__(self) -> Self:
        self._bystander.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for process in self._processes.values():
            process.kill()
            process.wait(10)
        self._bystander.join(5)

    def _stop_daemon(self) -> None:
        self._processes["daemon"].terminate()
        self._processes["daemon"].wait(30)

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if '"event":"ready"' in line:
                self._ready.put(True)
                for _ in process.stdout:
                    pass  # a full pipe would stop the daemon
                return
        self._ready.put(False)

    def _watch(self) -> None:
        with zmq.Context() as context, context.socket(zmq.SUB) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, 20)
            socket.setsockopt(zmq.SUBSCRIBE, b"event/")
            socket.connect(self._address["events"])
            while not self._over.is_set():
                if socket.poll(100):
                    event = json.loads(socket.recv_multipart()[1])
                    self.seen.append((event["log_epoch"], event["log_sequence"], event["id"]))


FAULTS = ("acknowledged_but_not_logged", "judged_twice", "holes_in_the_log", "seen_but_not_logged")
WRONG = (*FAULTS, *(f"{name}_{what}" for name in CONSUMERS for what in ("lost", "twice", "out_of_order")))


def run_kills(folder: Path, bundle: Path, kills: int, seed: int) -> dict[str, Any]:
    """Rounds of one daemon kill and four among cameras and subscribers, at random moments; the account at the end."""
    rng, started = random.Random(seed), time.monotonic()
    with KillLine(folder, bundle) as line:
        for name in ("daemon", *CAMERAS, *CONSUMERS):
            line.start(name)
        line.wait_until_ready()
        while sum(line.killed.values()) < kills:
            line.wait_for(f"{rng.choice(CAMERAS)}.acked", 5, 300)
            victims = ["daemon", *CAMERAS, *CONSUMERS][: kills - sum(line.killed.values())]
            rng.shuffle(victims)
            for name in victims:
                time.sleep(rng.uniform(0.0, 0.2))
                line.kill(name)
                line.start(name)
            line.wait_until_ready()
        line.finish()
        found = line.account()
        killed = line.killed
    return {"kills": killed, "seed": seed, "seconds": round(time.monotonic() - started, 1), **found}


def main() -> None:
    """The long run: `make soak-kill`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run_kills(Path(folder), ROOT / "edge" / "demo" / "bundle", options.kills, options.seed)
    print(json.dumps(found, indent=2))
    sys.exit(any(found[name] for name in WRONG))


if __name__ == "__main__":
    main()
