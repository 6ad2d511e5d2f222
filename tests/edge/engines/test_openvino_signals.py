"""A signal after an engine was closed on another thread, as when a daemon is told twice to stop.

In a process of its own: what this guards against is a segmentation fault, and only CPUs with AMX show it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import edge.demo

BUNDLE = Path(next(iter(edge.demo.__path__))) / "bundle"
STORY = f"""
import os, signal, threading
from edge.bundle import open_bundle
from edge.engines.registry import open_engine

engine = open_engine(open_bundle({str(BUNDLE)!r}), max_batch=1)
engine.warmup()
held = [engine]
del engine
closing = threading.Thread(target=lambda: held.pop().__exit__(None, None, None))
closing.start()
closing.join()
heard = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: heard.append(1))
    os.kill(os.getpid(), number)
print(len(heard))
"""


def test_signals_reach_the_main_thread_after_another_one_closed_the_last_engine() -> None:
    """The inference thread closes the engine; the second SIGTERM comes after that."""
    done = subprocess.run([sys.executable, "-c", STORY], capture_output=True, text=True, timeout=100)

    assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr
