"""The console's process: feed, board and web server together, from the socket's opening to the end in order.

Owns what is refused before anything is opened, the listening socket, and how the process ends.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from edge.clock import SystemClock
from edge.config import load_config
from edge.console.app import Console, make_app
from edge.console.board import Board
from edge.console.feed import Feed, Sources
from edge.console.guard import Policy, is_loopback, read_token
from edge.console.pictures import Pictures, find_folder
from edge.console.rescoring import Rescoring
from edge.console.stream import Stream
from edge.errors import CommandError, ConfigError, KizuError
from edge.health import Notifier
from edge.labels import LabelFile
from edge.sinks.rejects import rejects_folder

_LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
_BACKLOG: Final = 64
_MAX_CONNECTIONS: Final = 256


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line said. `log` and `config` are where pictures lie; only `config` can score again."""

    sources: Sources
    host: str = "127.0.0.1"
    port: int = 8470
    off_host: bool = False
    token: Path | None = None
    log: Path | None = None
    config: Path | None = None
    annotate: Path | None = None


def policy_of(settings: Settings) -> Policy:
    """Who may look.

    Raises:
        CommandError: the page would be open to other machines, and nobody said so or gave a token.
        ConfigError: the token's file cannot be used.
    """
    token = None if settings.token is None else read_token(settings.token)
    if is_loopback(settings.host):
        return Policy(token, _LOOPBACK_NAMES if token is None else None)
    if not settings.off_host:
        raise CommandError(
            f"--host {settings.host}: other machines could see the line; state --off-host and give --token FILE, or "
            "leave it on 127.0.0.1 and come by `ssh -L 8470:127.0.0.1:8470`"
        )
    if token is None:
        raise CommandError(f"--host {settings.host}: a console for other machines asks for a token; give --token FILE")
    return Policy(token, None)


def pictures_of(settings: Settings) -> Path | None:
    """The folder of rejected parts' pictures, None where nobody said where it is.

    Raises:
        CommandError, ConfigError: it cannot be found.
    """
    if settings.log is not None:
        return find_folder(settings.log)
    return None if settings.config is None else rejects_folder(Path(load_config(settings.config).log.path))


def serve(settings: Settings, on_ready: Callable[[str], None] = lambda address: None) -> None:
    """Serve until a signal; `on_ready` is told the page's address.

    Raises:
        CommandError, ConfigError, DataError, LabelError: something cannot be used; nothing was opened for long.
        KizuError: the feed ended.
    """
    clock = SystemClock()
    policy = policy_of(settings)
    pictures = Pictures(pictures_of(settings))
    labels = None if settings.annotate is None else LabelFile(settings.annotate)
    board = Board(clock)
    stream = Stream(board)
    board.on_change = stream.changed
    if labels is not None:
        for event_id, word in labels.current.items():
            board.label(event_id, word)
    with Notifier() as notifier, _listening(settings) as listening:
        feed = Feed(settings.sources, board, clock, on_turn=_watchdog(notifier, clock))
        app = make_app(Console(board, stream, pictures, Rescoring(settings.config), labels, policy, clock))
        with feed:
            on_ready(_address(settings.host, listening))
            notifier.ready()
            _run(app, listening)
            notifier.stopping()
        if feed.failure is not None:
            raise KizuError(f"the console's feed ended: {feed.failure}")


def _run(app: ASGIApp, listening: socket.socket) -> None:
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        http="h11",
        ws="none",
        loop="asyncio",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MAX_CONNECTIONS,
        backlog=_BACKLOG,
        timeout_keep_alive=30,
        # Open pages never end by themselves.
        timeout_graceful_shutdown=1,
    )
    _Server(config).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Ends on SIGTERM and SIGINT and returns; uvicorn would raise the signal again, and nothing after it would run."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _listening(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((settings.host, settings.port))
        # Now, not when the server has loaded: whoever reads the address may call at once.
        made.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        made.close()
        raise ConfigError(
            f"console: cannot listen on {settings.host} port {settings.port}: {error}; choose another --host or --port"
        ) from None
    return made


def _address(host: str, listening: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listening.getsockname()[1]}/"


def _watchdog(notifier: Notifier, clock: SystemClock) -> Callable[[], None]:
    """Tells systemd that the feed moves, as often as it asks for."""
    told_ns = 0

    def turn() -> None:
        nonlocal told_ns
        if notifier.watchdog_s is not None and clock.monotonic_ns() - told_ns >= notifier.watchdog_s / 3 * 1e9:
            notifier.watchdog()
            told_ns = clock.monotonic_ns()

    return turn
