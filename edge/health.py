"""Health: is the line moving, and telling systemd so. Owns the rule from progress to state and the notify protocol.

What progress was made is the pipeline's to say; what follows from a state is the daemon's.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Final, Self

STALL_AFTER_S: Final = 30.0
"""Longer than the engine's own time limit: a hanging engine is answered by INCONCLUSIVE, not by a restart."""


class State(StrEnum):
    """READY inspects; WITHHELD has not passed its challenge and answers INCONCLUSIVE; DEGRADED lost its engine and
    answers INCONCLUSIVE, or inspects on the CPU in place of its GPU; STALLED holds frames and gets nowhere."""

    READY = "ready"
    WITHHELD = "withheld"
    DEGRADED = "degraded"
    STALLED = "stalled"


@dataclass(frozen=True, slots=True)
class Progress:
    """A reading of the pipeline; times are of the monotonic clock.

    `moved_ns` is the last durable verdict or batch of tiles, or the first frame that waits since; `source_ns` is when
    the source's thread last came round.
    """

    in_flight: int
    moved_ns: int
    source_ns: int
    engine_lost: bool
    engine_fallback: bool = False
    withheld: bool = False


def state_of(progress: Progress, now_ns: int, stall_after_s: float = STALL_AFTER_S) -> State:
    """The state that follows from `progress`: idle is ready, waiting without an end is stalled."""
    limit_ns = round(stall_after_s * 1e9)
    if now_ns - progress.source_ns > limit_ns or (progress.in_flight > 0 and now_ns - progress.moved_ns > limit_ns):
        return State.STALLED
    if progress.withheld:
        return State.WITHHELD
    return State.DEGRADED if progress.engine_lost or progress.engine_fallback else State.READY


class Notifier:
    """Speaks systemd's notify protocol (man sd_notify) to NOTIFY_SOCKET; says nothing where that is not set.

    `watchdog_s` is how often systemd expects to hear from us, None if it does not.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the zero byte of an abstract address.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if address else None
        if self._socket is not None:
            self._socket.settimeout(0.2)
        self.watchdog_s = _watchdog_s(environment)
        self.failures = 0

    def ready(self) -> None:
        """The daemon serves."""
        self._send("READY=1")

    def watchdog(self) -> None:
        """The daemon moves."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send("STATUS=" + text.replace("\n", " "))

    def not_yet(self, more_s: float) -> None:
        """The daemon is not ready, but has not failed either: wait for it `more_s` longer than was said."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(more_s * 1e6)}")

    def stopping(self) -> None:
        """The daemon is on its way out."""
        self._send("STOPPING=1")

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, text: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(text.encode(), self._address)
        except OSError:  # the inspection goes on without its supervisor; the daemon reports the count
            self.failures += 1


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    pid = environment.get("WATCHDOG_PID")
    usec = environment.get("WATCHDOG_USEC", "")
    if not usec.isdecimal() or int(usec) == 0 or (pid is not None and pid != str(os.getpid())):
        return None
    return int(usec) / 1e6
