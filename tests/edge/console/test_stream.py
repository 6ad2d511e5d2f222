"""Stream: every page is told what changed, at its own pace, and none of them has a queue."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import msgspec

from edge.clock import SystemClock
from edge.console.board import MAX_REJECTS, Board
from edge.console.stream import INTERVAL_S, Stream
from sample_events import sample_event


class Shop:
    """A board that wakes a stream, and parts by number."""

    def __init__(self) -> None:
        self.board = Board(SystemClock())
        self.stream = Stream(self.board)
        self.board.on_change = self.stream.changed
        self.count = 0

    def parts(self, count: int, decision: str = "accept") -> None:
        for _ in range(count):
            self.count += 1
            self.board.take(sample_event(self.count, f"cam{self.count % 4}", decision=decision), None, live=True)


def run(test: Callable[[Shop], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(Shop()), 30)

    asyncio.run(bounded())


async def message(events: Any) -> dict[str, Any]:
    """The next one that holds data."""
    while True:
        data = await anext(events)
        if data.startswith(b"data: "):
            return dict(msgspec.json.decode(data[6:]))


def test_the_first_message_holds_everything() -> None:
    """Tiles, rejects, health and trend at once: one paint."""

    async def test(shop: Shop) -> None:
        shop.parts(8, "reject")
        first = await message(shop.stream.events())
        assert len(first["tiles"]) == 4 and len(first["rejects"]) == 8
        assert first["health"] and first["trend"]

    run(test)


def test_a_burst_is_a_few_messages() -> None:
    """A thousand parts in no time; the page hears of them together."""

    async def test(shop: Shop) -> None:
        events = shop.stream.events()
        await message(events)
        shop.parts(1000)
        heard = 0
        while heard < shop.count:
            heard = (await message(events))["number"]
        assert heard == 1000
        await events.aclose()

    run(test)


def test_two_messages_are_an_interval_apart() -> None:
    """Ten a second at most, whatever the line does."""

    async def test(shop: Shop) -> None:
        loop, events = asyncio.get_running_loop(), shop.stream.events()
        await message(events)
        times = []
        for _ in range(4):
            shop.parts(1)
            await message(events)
            times.append(loop.time())
        assert min(after - before for before, after in pairwise(times)) >= INTERVAL_S * 0.9
        await events.aclose()

    run(test)


def test_a_page_that_does_not_read_costs_nothing_and_is_told_what_it_missed() -> None:
    """While it sleeps only the board is written; then the newest of each camera, the last rejects, and a number."""

    async def test(shop: Shop) -> None:
        slow, quick = shop.stream.events(), shop.stream.events()
        await message(slow)
        await message(quick)
        for _ in range(10):
            shop.parts(100, "reject")
            await message(quick)
        late = await message(slow)
        assert len(late["tiles"]) == 4 and len(late["rejects"]) == MAX_REJECTS
        assert late["skipped"] == 1000 - MAX_REJECTS
        await slow.aclose()
        await quick.aclose()

    run(test)


def test_a_page_that_is_closed_is_forgotten() -> None:
    """Its place is free again."""

    async def test(shop: Shop) -> None:
        events = shop.stream.events()
        await message(events)
        before = shop.stream.pages
        await events.aclose()
        assert (before, shop.stream.pages, len(shop.stream._waiting)) == (1, 0, 0)

    run(test)


def test_a_change_from_the_feeds_thread_wakes_a_page() -> None:
    """The board is written by another thread than the one that serves."""

    async def test(shop: Shop) -> None:
        events = shop.stream.events()
        await message(events)
        await asyncio.to_thread(shop.parts, 1)
        assert (await message(events))["number"] == 1
        await events.aclose()

    run(test)


def test_a_change_after_the_server_ended_is_no_error() -> None:
    """The feed may outlive the loop for a moment."""
    shop = Shop()

    async def open_and_close() -> None:
        shop.stream.attach()

    asyncio.run(open_and_close())
    shop.parts(2)

    assert shop.count == 2
