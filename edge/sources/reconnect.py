"""ReconnectingSource: a stream or device that may be lost, opened again until it is back.

Owns when it is called lost (it broke off, or was silent too long) and how long to wait between attempts: doubling up to
a cap, each drawn between half and all of it, so that twenty cameras behind one switch do not come back in one moment.
The source that is opened puts its own limit on a read; a decoder that crashes takes down this process (`kizu send`) and
not the daemon.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from edge.errors import SourceBroken, SourceError, SourceTimeout
from edge.protocols import Clock, Source
from edge.types import Frame, Unreadable

FIRST_WAIT_S: Final = 0.5
LONGEST_WAIT_S: Final = 30.0
SILENCE_S: Final = 10.0
"""Without a picture for this long a live source is lost, whatever it says."""


class ReconnectingSource:
    """A Source over whatever `open_source` makes; frames of all connections in one row.

    `on_event` is told in words of each loss and each return. Raises SourceBroken from `read` once it was lost for
    `give_up_after_s`.
    """

    live = True

    def __init__(
        self,
        open_source: Callable[[], Source],
        *,
        clock: Clock,
        give_up_after_s: float,
        on_event: Callable[[str], None] = lambda text: None,
        draw: Callable[[], float] = random.random,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.reconnects = 0
        """Times a lost source delivered again."""
        self._open_source = open_source
        self._clock = clock
        self._give_up_after_ns = round(give_up_after_s * 1e9)
        self._on_event, self._draw, self._sleep = on_event, draw, sleep
        self._source: Source | None = None
        self._failures = 0
        self._due_ns = self._heard_ns = clock.monotonic_ns()
        self._lost_ns: int | None = None

    def read(self, timeout_s: float) -> Frame | Unreadable:
        """The next picture.

        Raises:
            SourceTimeout: none came in time, or the source is lost and being opened again.
            SourceBroken: it was lost for `give_up_after_s`.
        """
        if self._source is None:
            self._reopen(timeout_s)
        assert self._source is not None
        try:
            found = self._source.read(timeout_s)
        except SourceTimeout:
            silent_ns = self._clock.monotonic_ns() - self._heard_ns
            if silent_ns >= SILENCE_S * 1e9:
                self._lose(f"no picture for {silent_ns / 1e9:.0f} s")
            raise
        except SourceError as error:
            self._lose(str(error))
            raise SourceTimeout(str(error)) from None
        self._welcome()
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _reopen(self, timeout_s: float) -> None:
        now_ns = self._clock.monotonic_ns()
        if now_ns < self._due_ns:
            self._sleep(min(timeout_s, (self._due_ns - now_ns) / 1e9))
            raise SourceTimeout("the source is lost; waiting before it is opened again")
        source = self._open_source()
        source.__enter__()
        self._source, self._heard_ns = source, now_ns

    def _lose(self, why: str) -> None:
        now_ns = self._clock.monotonic_ns()
        self._close()
        if self._lost_ns is None:
            self._lost_ns = now_ns
        if now_ns - self._lost_ns >= self._give_up_after_ns:
            raise SourceBroken(f"{why}; lost for {(now_ns - self._lost_ns) / 1e9:.0f} s, given up")
        longest_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(self._failures, 30))
        wait_s = longest_s * (0.5 + 0.5 * self._draw())
        self._failures += 1
        self._due_ns = now_ns + round(wait_s * 1e9)
        self._on_event(f"lost: {why}; trying again in {wait_s:.1f} s")

    def _welcome(self) -> None:
        self._heard_ns = self._clock.monotonic_ns()
        if self._lost_ns is not None:
            self.reconnects += 1
            self._on_event(f"back after {(self._heard_ns - self._lost_ns) / 1e9:.1f} s")
        self._lost_ns, self._failures = None, 0

    def _close(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.__exit__(None, None, None)
