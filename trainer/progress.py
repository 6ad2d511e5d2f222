"""Progress: what a person sees of a long run, and how they stop it.

Owns the bar, the line a minute and the signals.  Leaves the steps to ``loop``, which asks and tells after each of them.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter(Protocol):
    """Told about every step; shows as much of it as the place allows."""

    def __call__(self, step: int, steps: int, loss: float) -> None: ...


class TerminalReporter:
    """A progress bar with the time left on a terminal, one line a minute elsewhere; a context manager."""

    def __init__(self, title: str, *, start_step: int = 0, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._title, self._start_step, self._monotonic = title, start_step, monotonic
        self._started = self._last_line = monotonic()
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
        )  # fmt: skip
        self._bar = Progress(*columns) if sys.stderr.isatty() and sys.stdout.isatty() else None

    def __call__(self, step: int, steps: int, loss: float) -> None:
        if self._bar is not None:
            if not self._bar.task_ids:
                self._bar.add_task(self._title, total=steps, completed=self._start_step, loss=loss)
            self._bar.update(self._bar.task_ids[0], completed=step, loss=loss)
            return
        now = self._monotonic()
        if now - self._last_line >= 60 or step == steps:
            self._last_line = now
            left_s = (now - self._started) / max(step - self._start_step, 1) * (steps - step)
            print(f"{self._title}: step {step} of {steps}, loss {loss:.3f}, {left_s / 60:.1f} min left", flush=True)

    def __enter__(self) -> TerminalReporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a question that the loop asks after each step; a second one interrupts.

    A KeyboardInterrupt in the middle of an optimizer step would leave weights of two different steps.
    """
    asked = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
