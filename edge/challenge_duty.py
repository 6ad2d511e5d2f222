"""When the line takes its challenge, and what comes of it: withheld frames, an event, the metrics.

Owns the thread, the order of challenges and the question of `kizu challenge` to a running daemon. What a challenge is
says `challenge`.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
import zmq

from edge import sockets
from edge.challenge import KIND, ChallengeResult, Miss, Probe, Sample, event_of_challenge, take
from edge.config import EdgeConfig
from edge.errors import CommandError, KizuError, SinkError
from edge.events import DefectEvent
from edge.metrics import Metrics
from edge.pipeline import EventPublisher, Pipeline, VerdictLog
from edge.protocols import Clock

RETRY_S: Final = 60.0
"""How often a failed challenge is taken again by itself: an engine that was opened again should not hold the line."""

_POLL_S: Final = 0.1


class ChallengeDuty:
    """Takes the challenge when it is due, in a thread of its own: at the start, every `every_s`, and when asked.

    `samples` reads the folder, each time anew. After a failure `withhold` is told why, and None after a pass; without
    `required` it is never told. A failed one is taken again every RETRY_S. `on_result` gets each result, and whether it
    is news. `on_first` is called once the first is over, `on_crash` if the thread ends by an unforeseen error.
    """

    def __init__(
        self,
        *,
        samples: Callable[[], tuple[Sample, ...]],
        probe: Probe,
        clock: Clock,
        every_s: float | None,
        required: bool,
        withhold: Callable[[str | None], None],
        on_result: Callable[[ChallengeResult, bool], None],
        on_first: Callable[[], None],
        on_crash: Callable[[Exception], None],
    ) -> None:
        self.last: ChallengeResult | None = None
        self._samples, self._probe, self._clock = samples, probe, clock
        self._every_s, self._required = every_s, required
        self._withhold, self._on_result, self._on_first, self._on_crash = withhold, on_result, on_first, on_crash
        self._asked = threading.Event()
        self._stopping = threading.Event()
        self._taking = threading.Lock()
        self._taken_ns = 0
        self._thread = threading.Thread(target=self._run, name="challenge", daemon=True)

    @property
    def is_clear(self) -> bool:
        """Whether the line may be READY as far as the challenge is concerned; from any thread."""
        return not self._required or (self.last is not None and self.last.passed)

    def start(self) -> None:
        """Take the first challenge, and the others in time."""
        self._thread.start()

    def ask(self) -> None:
        """Take one soon; from any thread."""
        self._asked.set()

    def now(self) -> ChallengeResult:
        """Take one now, in this thread."""
        return self._take(news=True)

    def close(self) -> None:
        """Take no more; one under way ends without its answers."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._take_in_time()
        except Exception as error:  # a thread's top: a line that nobody challenges any more must not go on unnoticed
            self._on_crash(error)

    def _take_in_time(self) -> None:
        self._take(news=True)
        self._on_first()
        while not self._stopping.wait(_POLL_S):
            asked = self._asked.is_set()
            self._asked.clear()
            waited_s = (self._clock.monotonic_ns() - self._taken_ns) / 1e9
            if asked or (self._every_s is not None and waited_s >= self._every_s):
                self._take(news=True)
            elif self.last is not None and not self.last.passed and waited_s >= RETRY_S:
                self._take(news=False)

    def _take(self, *, news: bool) -> ChallengeResult:
        with self._taking:
            before = self.last
            result = self._challenge()
            self._taken_ns = self._clock.monotonic_ns()
            if self._stopping.is_set():  # the line ends: what was not answered says nothing
                return result
            self.last = result
            if self._required:
                self._withhold(None if result.passed else result.detail)
            self._on_result(result, news or before is None or result.missed != before.missed)
            return result

    def _challenge(self) -> ChallengeResult:
        try:
            samples = self._samples()
        except (KizuError, OSError) as error:
            miss = Miss("", "samples", "", "none", str(error))
            return ChallengeResult(False, 0, (miss,), "", self._clock.wall_ns(), 0)
        return take(samples, self._probe, self._clock, stopped=self._stopping.is_set)


def duty_of(
    config: EdgeConfig,
    samples: Callable[[], tuple[Sample, ...]],
    pipeline: Pipeline,
    event_log: VerdictLog,
    publisher: EventPublisher,
    metrics: Metrics,
    clock: Clock,
    warn: Callable[[str, Mapping[str, object]], None],
) -> ChallengeDuty | None:
    """Who takes the line's challenges, None where none is configured; each result is logged, published and counted."""
    if config.challenge.dir is None:
        return None
    hours, epoch, numbers = config.challenge.every_hours, secrets.randbits(53), itertools.count()

    def publish(logged: DefectEvent) -> None:
        try:
            publisher.publish(logged)
        except SinkError:  # subscribers heal from the log
            metrics.publish_drops.inc()

    def note(result: ChallengeResult, news: bool) -> None:
        metrics.challenge(result.passed, result.at_ns)
        if not result.passed:
            warn("challenge failed", {"detail": result.detail, "withheld": config.challenge.required})
        if news:
            try:
                event_log.append(event_of_challenge(result, config.line, epoch, next(numbers)), None, publish)
            except SinkError as error:
                warn("challenge not logged", {"error": str(error)})

    def crashed(error: Exception) -> None:
        warn("thread crashed", {"thread": KIND, "error": repr(error), "exc_info": True})
        metrics.crash(KIND)
        pipeline.fail(f"{KIND}: {error!r}; this is a fault of kizu")

    metrics.challenge_passed.set(0)
    if config.challenge.required:
        pipeline.withhold("the challenge has not been taken yet")
    return ChallengeDuty(
        samples=samples,
        probe=pipeline.probe,
        clock=clock,
        every_s=None if hours is None else hours * 3600,
        required=config.challenge.required,
        withhold=pipeline.withhold,
        on_result=note,
        on_first=pipeline.begin_reading,
        on_crash=crashed,
    )


def ask_daemon(address: str, *, patience_s: float) -> ChallengeResult:
    """Let the daemon at the control `address` take its challenge now.

    Raises:
        CommandError: nobody listens there, it has no challenge, or nothing was heard for `patience_s`.
    """
    socket = sockets.dealer(address, hwm=8)
    try:
        if not socket.poll(round(patience_s * 1e3), zmq.POLLOUT):
            raise CommandError(
                f"no daemon listens at {address}; is it running, and are you its user or root? --apart needs none"
            )
        socket.send(msgspec.json.encode({"ask": KIND}), zmq.NOBLOCK)
        if not socket.poll(round(patience_s * 1e3)):
            raise CommandError(f"the daemon at {address} has been silent for {patience_s:g} s; its own log says more")
        return msgspec.json.decode(socket.recv(zmq.NOBLOCK), type=ChallengeResult)
    except msgspec.DecodeError:
        raise CommandError(f"the daemon at {address} takes no challenge: its file has no [challenge] dir") from None
    finally:
        socket.close()
