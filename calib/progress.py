"""How far a long pass over images is, on stderr: a bar with the time left on a terminal, one line a minute
elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

LINE_EVERY_S = 60.0

Advance = Callable[[int], None]
"""Called with how many are done."""


@contextmanager
def progress(
    title: str, total: int, *, stream: TextIO | None = None, monotonic: Callable[[], float] = time.monotonic
) -> Iterator[Advance]:
    """Yield the function to call with the number done so far, out of `total`."""
    target = sys.stderr if stream is None else stream
    if target.isatty():
        with _bar(title, total, target) as advance:
            yield advance
    else:
        yield _lines(title, total, target, monotonic)


@contextmanager
def _bar(title: str, total: int, stream: TextIO) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def _lines(title: str, total: int, stream: TextIO, monotonic: Callable[[], float]) -> Advance:
    started = monotonic()
    last = started

    def advance(done: int) -> None:
        nonlocal last
        now = monotonic()
        if now - last < LINE_EVERY_S or done == 0:
            return
        last = now
        left_s = (now - started) / done * (total - done)
        print(f"{title}: {done} of {total}, {left_s / 60:.1f} min left", file=stream, flush=True)

    return advance
