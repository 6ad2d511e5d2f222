"""Feed: follows the line by its public sockets and fills the board; one thread.

Owns the subscriber, where it begins, and that it begins again whatever happens to the daemon. Asks for nothing that
another program could not ask for as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from edge import sockets
from edge.client import Start, Subscriber
from edge.clock import SystemClock
from edge.console.board import Board, FeedCounts
from edge.errors import KizuError, SourceTimeout
from edge.keys import ClientKeys
from edge.protocols import Clock
from edge.replay_client import ReplayClient

BACKLOG: Final = 1500
"""Events before the newest that a page opens with, where the log can be asked."""
_TURN_S: Final = 0.25
_ASK_S: Final = 1.0
_AGAIN_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the line publishes and, if the log can be asked, where; and how we may connect."""

    events: str
    replay: str | None = None
    keys: ClientKeys | None = None
    plain_off_host: bool = False
    context: sockets.Context | None = None


class Feed:
    """Runs until closed; `on_turn` is called a few times per second while it does.

    Raises:
        ConfigError: an address cannot be used.
    """

    def __init__(
        self, sources: Sources, board: Board, clock: Clock | None = None, *, on_turn: Callable[[], None] = lambda: None
    ) -> None:
        self.failure: str | None = None
        """Why the thread ended unasked; None while it runs."""
        self._sources = sources
        self._board = board
        self._clock = clock or SystemClock()
        self._on_turn = on_turn
        self._closing = threading.Event()
        for address in (sources.events, sources.replay):
            if address is not None:
                sockets.check_address(address, sources.plain_off_host, secured=sources.keys is not None)
        self._thread = threading.Thread(target=self._run, name="console-feed", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def close(self) -> None:
        """Stop following."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(10.0)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                try:
                    self._follow()
                except KizuError as error:
                    # A log that refuses, a line with a malformed name: said on the page, and tried again.
                    self._board.fail(str(error))
                    self._closing.wait(_AGAIN_S)
        # The thread's top: without it the page would stand still and look alive.
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            self._board.fail(f"the console's feed ended: {self.failure}")
        finally:
            self._board.on_change()

    def _follow(self) -> None:
        since = self._start()
        if since is None:
            return
        with self._subscriber(since) as subscriber:
            head = None
            while not self._closing.is_set():
                self._turn(subscriber)
                if subscriber.latest_head is not head and subscriber.latest_head is not None:
                    head = subscriber.latest_head
                    self._board.head(head)
                self._board.fail("")
                self._on_turn()

    def _turn(self, subscriber: Subscriber) -> None:
        asked = subscriber.replayed
        try:
            event, mask = subscriber.receive(_TURN_S)
        except SourceTimeout:
            pass
        else:
            behind = subscriber.lag or 0
            self._board.take(event, mask, live=subscriber.replayed == asked and not behind > 1)
        self._board.counts(FeedCounts(subscriber.lag, subscriber.lost, subscriber.refused, subscriber.new_logs))

    def _subscriber(self, since: Start) -> Subscriber:
        sources = self._sources
        return Subscriber(
            sources.events,
            clock=self._clock,
            plain_off_host=sources.plain_off_host,
            context=sources.context,
            keys=sources.keys,
            replay=sources.replay,
            since=since,
        )

    def _start(self) -> Start | None:
        """Where to begin: a little before the log's newest event. None when closed before the log answered."""
        sources = self._sources
        if sources.replay is None:
            return "now"
        client = ReplayClient(
            sources.replay,
            self._clock,
            plain_off_host=sources.plain_off_host,
            context=sources.context,
            keys=sources.keys,
        )
        with closing(client):
            while not self._closing.is_set():
                try:
                    header, _ = client.events_after(0, 0, _ASK_S, limit=1)
                except SourceTimeout:
                    self._on_turn()
                    continue
                return header.log_epoch, max(0, header.head - BACKLOG)
        return None
