"""Stream: the board's changes to each open page, as server-sent events.

Owns pace and bounds: a page hears at most ten times a second, of the newest of each camera and every reject since. No
queue belongs to a page. What it has not been told is looked up on the board when its socket takes more, so a slow one
costs nothing and misses rejects only when the board has forgotten them, which it is told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Final

import msgspec

from edge.console.board import Board

MAX_PAGES: Final = 32
INTERVAL_S: Final = 0.1
HEALTH_S: Final = 1.0
TREND_S: Final = 5.0


class Stream:
    """All open pages; `changed` may be called from any thread once `attach` was called in the loop's."""

    def __init__(self, board: Board) -> None:
        self.pages = 0
        self._board = board
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: set[asyncio.Event] = set()
        self._told = False

    def attach(self) -> None:
        """Take the running event loop."""
        self._loop = asyncio.get_running_loop()

    def changed(self) -> None:
        """Wake the pages; a hundred calls before they wake are one."""
        if self._loop is not None and not self._told:
            self._told = True
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # the loop is closed: nobody is there to be told
                self._loop = None

    async def events(self) -> AsyncIterator[bytes]:
        """What one page is sent until it is closed."""
        self.attach()
        changed = asyncio.Event()
        self._waiting.add(changed)
        self.pages += 1
        try:
            yield b"retry: 1000\n\n"
            number = ordinal = -1
            health_s = trend_s = -1e9
            while True:
                now_s = time.monotonic()
                changed.clear()
                health, trend = now_s - health_s >= HEALTH_S, now_s - trend_s >= TREND_S
                delta = self._board.delta(number, ordinal, health=health, trend=trend)
                if delta.tiles or delta.rejects or health:
                    yield b"data: " + msgspec.json.encode(delta) + b"\n\n"
                number, ordinal = delta.number, delta.ordinal
                health_s, trend_s = (now_s if health else health_s), (now_s if trend else trend_s)
                # The first change goes out at once; what follows within the interval goes together.
                await asyncio.sleep(max(0.0, INTERVAL_S - (time.monotonic() - now_s)))
                await _until(changed, health_s + HEALTH_S - time.monotonic())
        finally:
            self._waiting.discard(changed)
            self.pages -= 1

    def _wake(self) -> None:
        self._told = False
        for changed in self._waiting:
            changed.set()


async def _until(changed: asyncio.Event, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(changed.wait(), max(0.0, timeout_s))
    except TimeoutError:
        return
