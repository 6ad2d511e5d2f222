"""Hot swap: another bundle takes over a running line at a frame boundary, or is refused and nothing changes.

Owns the control socket (one request at a time, JSON both ways), the order load, verify, warm, shadow, promote, and
what is reported. How a bundle becomes a warm engine is the daemon's to say; the exchange itself is `inference`'s.

    request   {"bundle": PATH, "shadow": N, "min_agreement": SHARE, "timeout_s": S}
    reports   {"state": "loading" | "shadow" | "promoted" | "refused", "model_id", "detail", "agreement"}
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Final, Literal

import msgspec
import zmq
from msgspec import Meta

from edge import sockets
from edge.bundle import Manifest
from edge.errors import CommandError, KizuError
from edge.inference import Stages
from edge.opening import EngineOpener
from edge.pipeline import Pipeline, ignore
from edge.protocols import Clock, Engine
from edge.shadow import Agreement, Shadow

PROMOTE_TIMEOUT_S: Final = 30.0
_POLL_MS: Final = 200
_MAX_REQUEST_BYTES: Final = 16 * 1024


class SwapRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `kizu swap` asks: compare `shadow` frames first and promote if at least `min_agreement` are answered alike.

    `bundle` is an absolute path; `timeout_s` bounds the comparison.
    """

    bundle: Annotated[str, Meta(min_length=1, max_length=4096)]
    shadow: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    min_agreement: Annotated[float, Meta(ge=0, le=1)] = 0.99
    timeout_s: Annotated[float, Meta(gt=0, le=86_400)] = 600.0


class SwapReport(msgspec.Struct, frozen=True):
    """How far a request is; `promoted` and `refused` end it."""

    state: Literal["loading", "shadow", "promoted", "refused"]
    model_id: str = ""
    detail: str = ""
    agreement: Agreement | None = None

    @property
    def final(self) -> bool:
        """Whether nothing follows."""
        return self.state in ("promoted", "refused")


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A bundle ready to judge: verified against its golden frames on this device, its `engine`, of `opener`, warm."""

    model_id: str
    manifest: Manifest
    certified: bool
    engine: Engine
    open_engine: Callable[[], Engine]
    stages: Stages
    opener: EngineOpener
    open_shadow: Callable[[], Engine]
    """Another of its engines, checked and warmed as slowly as the first one."""


class Pace:
    """Rests between the steps of a swap, so that the running line keeps its cores: `share` of the time is work.

    Called between steps, it rests in proportion to the last one, `longest_s` at most. A candidate's frame takes as much
    as one of the line's; several at once would make each frame in flight wait for all of them.
    """

    def __init__(
        self,
        share: float = 0.15,
        longest_s: float = 3.0,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rest_of_work, self._longest_s = (1 - share) / share, longest_s
        self._monotonic, self._sleep = monotonic, sleep
        self._since_s = monotonic()

    def __call__(self) -> None:
        """Rest for what was done since the last rest."""
        worked_s = self._monotonic() - self._since_s
        self._sleep(min(self._longest_s, worked_s * self._rest_of_work))
        self._since_s = self._monotonic()


class SwapDesk:
    """Takes requests from the control socket, and from `reload`, in a thread of its own; one after the other.

    `others` answer requests `{"ask": NAME, ...}`, of which they get the bytes, one by one like the swaps.

    `load` makes a Model of a bundle's path (or raises KizuError: refused), `configured` says which bundle the
    configuration names now, `promoted` is told of a Model that judges.

    Raises:
        ConfigError: the address cannot be used.
    """

    def __init__(
        self,
        address: str,
        *,
        pipeline: Pipeline,
        load: Callable[[str], Model],
        configured: Callable[[], str],
        promoted: Callable[[Model], None],
        cameras: tuple[str, ...],
        max_batch: int,
        clock: Clock,
        tell: Callable[[str, Mapping[str, object]], None],
        others: Mapping[str, Callable[[bytes], bytes]] = MappingProxyType({}),
    ) -> None:
        self._pipeline, self._load, self._configured, self._promoted = pipeline, load, configured, promoted
        self._cameras, self._max_batch, self._clock, self._tell = cameras, max_batch, clock, tell
        self._others = others
        self._stopping = threading.Event()
        self._reload = threading.Event()
        self._socket = sockets.router(address, hwm=8, max_message_bytes=_MAX_REQUEST_BYTES)
        if address.startswith("ipc://"):
            # Who may connect may replace the model: nobody but the daemon's own user.
            os.chmod(address.removeprefix("ipc://"), 0o600)
        self._thread = threading.Thread(target=self._run, name="swap", daemon=True)
        self._thread.start()

    def reload(self) -> None:
        """Swap to the bundle that the configuration names now; from any thread or a signal handler."""
        self._reload.set()

    def close(self) -> None:
        """Take no more requests; one that waits for its shadow is refused."""
        self._stopping.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            if self._reload.is_set():
                self._reload.clear()
                self._serve_reload()
            if self._socket.poll(_POLL_MS):
                self._receive()

    def _serve_reload(self) -> None:
        try:
            bundle = self._configured()
        except KizuError as error:
            self._note(SwapReport("refused", detail=str(error)))
            return
        self._serve(SwapRequest(bundle), self._note)

    def _receive(self) -> None:
        parts = self._socket.recv_multipart(zmq.NOBLOCK)

        def report(one: SwapReport) -> None:
            self._note(one)
            try:
                self._socket.send_multipart([parts[0], msgspec.json.encode(one)], zmq.NOBLOCK)
            except zmq.ZMQError:  # whoever asked is gone; the log line stays
                self._tell("swap: the one who asked is gone", {})

        if len(parts) == 2 and (other := self._others.get(_asked(parts[1]))) is not None:
            with suppress(zmq.ZMQError):  # whoever asked is gone
                self._socket.send_multipart([parts[0], other(parts[1])], zmq.NOBLOCK)
            return
        try:
            if len(parts) != 2:
                raise msgspec.ValidationError(f"a request is one part, not {len(parts) - 1}")
            request = msgspec.json.decode(parts[1], type=SwapRequest)
        except msgspec.DecodeError as error:  # ValidationError is one
            report(SwapReport("refused", detail=f"this is no request: {error}"))
            return
        self._serve(request, report)

    def _serve(self, request: SwapRequest, report: Callable[[SwapReport], None]) -> None:
        report(SwapReport("loading", detail=request.bundle))
        try:
            model = self._load(request.bundle)
        except (KizuError, OSError) as error:
            report(SwapReport("refused", detail=str(error)))
            return
        with ExitStack() as given_up:
            given_up.push(model.engine.__exit__)
            try:
                agreement = self._compare(model, request, report) if request.shadow else None
            except KizuError as error:
                report(SwapReport("refused", model.model_id, str(error)))
                return
            if agreement is not None and (why := _too_different(agreement, request)):
                report(SwapReport("refused", model.model_id, why, agreement))
                return
            given_up.pop_all()  # the line's to close from here on
        if not self._pipeline.replace(model.engine, model.open_engine, model.stages, PROMOTE_TIMEOUT_S):
            why = f"no frame boundary came within {PROMOTE_TIMEOUT_S:g} s; the line stops, or its engine is stuck"
            report(SwapReport("refused", model.model_id, why, agreement))
            return
        self._promoted(model)
        report(SwapReport("promoted", model.model_id, request.bundle, agreement))

    def _compare(self, model: Model, request: SwapRequest, report: Callable[[SwapReport], None]) -> Agreement:
        """Let the candidate look on until it saw enough; told about once a second."""
        shadow = Shadow(model.open_shadow(), model.stages, self._cameras, self._clock, self._max_batch, request.shadow)
        until_s = time.monotonic() + request.timeout_s
        self._pipeline.on_judged = shadow.offer
        try:
            while True:
                found = shadow.wait(min(1.0, max(0.0, until_s - time.monotonic())))
                if found.compared >= request.shadow or self._stopping.is_set() or time.monotonic() >= until_s:
                    return found
                report(SwapReport("shadow", model.model_id, agreement=found))
        finally:
            self._pipeline.on_judged = ignore
            shadow.close()

    def _note(self, one: SwapReport) -> None:
        self._tell(f"swap {one.state}", {name: value for name, value in msgspec.to_builtins(one).items() if value})


class _Asked(msgspec.Struct, frozen=True):
    ask: str = ""


def _asked(request: bytes) -> str:
    """What else than a swap a request is about; empty if it is one, or nonsense."""
    try:
        return msgspec.json.decode(request, type=_Asked).ask
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


def ask(address: str, request: SwapRequest, on_report: Callable[[SwapReport], None], *, patience_s: float) -> bool:
    """Ask the daemon at `address` for a swap and hand every report on; whether the model was promoted.

    Raises:
        CommandError: nobody listens there, or nothing was heard for `patience_s`.
    """
    socket = sockets.dealer(address, hwm=8)
    try:
        if not socket.poll(round(patience_s * 1e3), zmq.POLLOUT):
            raise CommandError(f"no daemon listens at {address}; is it running, and are you its user or root?")
        socket.send(msgspec.json.encode(request), zmq.NOBLOCK)
        while socket.poll(round(patience_s * 1e3)):
            report = msgspec.json.decode(socket.recv(zmq.NOBLOCK), type=SwapReport)
            on_report(report)
            if report.final:
                return report.state == "promoted"
        raise CommandError(f"the daemon at {address} has been silent for {patience_s:g} s; its own log says more")
    finally:
        socket.close()


def _too_different(found: Agreement, request: SwapRequest) -> str:
    """Why the candidate is not promoted; empty if it may be."""
    if found.compared < request.shadow:
        return f"only {found.compared} of {request.shadow} frames could be compared in {request.timeout_s:g} s"
    if found.share < request.min_agreement:
        return (
            f"the candidate answers {found.share:.2%} of {found.compared} frames alike, asked for "
            f"{request.min_agreement:.2%}: it alone rejects {found.newly_rejected}, it alone accepts "
            f"{found.newly_accepted}, it cannot judge {found.unsure}"
        )
    return ""
