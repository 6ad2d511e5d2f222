"""The daemon: composition root, the only file that chooses concrete sources, engines and sinks.

Owns the order of opening (cheap refusals first, the source last, so that no camera is admitted to a line that is not
ready), the loop that watches the pipeline, and the order of closing.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Final

import msgspec
import structlog
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from edge.admission import AllowList
from edge.bundle import ModelBundle
from edge.cameras import FlatFields, uncertified
from edge.challenge import KIND
from edge.challenge_duty import duty_of
from edge.clock import SystemClock
from edge.config import LOOPBACK, EdgeConfig, load_config
from edge.docket import terms_of
from edge.doorkeeper import Doorkeeper
from edge.errors import ConfigError, KizuError
from edge.gpu_metrics import find_gpus
from edge.health import Notifier, State, state_of
from edge.keys import ServerKeys, load_server
from edge.line_stages import find_challenge, flat_fields_of, make_stages, named
from edge.loading import (
    Running,
    Warn,
    check_engine,
    load_model,
    open_told,
    open_trusted,
    opener_of,
    watched,
)
from edge.metrics import Metrics
from edge.metrics_server import load_access, open_server
from edge.opening import EngineOpener, why_not_certified
from edge.payloads import FrameLimits
from edge.pipeline import Pipeline
from edge.protocols import Clock
from edge.sockets import LINGER_MS, Context, check_address, new_context
from edge.swap import Model, SwapDesk

STOP_TIMEOUT_S: Final = 20.0
_TICK_S: Final = 0.2
_NOT_YET_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Ready:
    """What a started daemon really is: addresses as bound, model and engine."""

    line: str
    frames_address: str
    events_address: str
    replay_address: str | None
    metrics_url: str
    model_id: str
    certified: bool
    backend: str
    fallback: str | None
    golden_share_of_tolerance: float | None
    startup_s: float


@dataclass(slots=True)
class StopRequest:
    """Set by a signal or another thread: the daemon ends in order, or looks again which bundle it is to run."""

    event: threading.Event = field(default_factory=threading.Event)
    signal: str | None = None
    reload: Callable[[], None] = lambda: None
    """What SIGHUP asks for; the daemon puts its own here once it can."""

    def set(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Ask for the end; usable as a signal handler."""
        self.signal = signal.Signals(number).name if number else None
        self.event.set()

    def hang_up(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Ask for the bundle that the configuration names now; usable as a signal handler."""
        self.reload()


def check(config: EdgeConfig, where: Path) -> dict[str, str | int | float | bool | None]:
    """Open everything that needs no port: bundle, engine, golden frames; return what was found.

    Raises:
        ConfigError, BundleError, EngineError, ParityError: what is wrong, and the next step.
    """
    check_addresses(config, where)
    open_keys(config, where)
    check_peers(config, where)
    with named(where, "metrics"):
        load_access(config.metrics)
    bundle = open_trusted(config, where)
    stages = make_stages(config, bundle, where)
    find_challenge(config, where)
    opener = EngineOpener(config, bundle, fields=stages.fields)
    with opener.open() as engine:
        golden = check_engine(config, bundle, engine)
        return {
            "line": config.line,
            "cameras": len(config.cameras),
            "bundle": config.bundle,
            "model_id": bundle.model_id,
            "certified": bundle.calibration.certified,
            "backend": engine.spec.name,
            "backend_version": engine.spec.version,
            "device": engine.spec.device,
            "fallback": opener.fallback,
            "golden_share_of_tolerance": None if golden is None else golden.max_rel_of_tolerance,
        }


def serve(
    config: EdgeConfig,
    where: Path,
    stop: StopRequest,
    *,
    on_ready: Callable[[Ready], None] = lambda ready: None,
    clock: Clock | None = None,
) -> None:
    """Run the line until `stop`, its source's end or a failure; every frame in flight gets its verdict.

    `where` is the configuration's path, for messages.

    Raises:
        ConfigError, BundleError, EngineError, ParityError: the line cannot start.
        KizuError: the line failed; frames without a verdict were not acknowledged.
    """
    from edge.sinks.event_log import EventLog
    from edge.sinks.forgetting import FORGET, answer
    from edge.sinks.publisher import Publisher
    from edge.sinks.rejects import RejectRing, rejects_folder
    from edge.sinks.replay import ReplayServer
    from edge.sinks.retention import Retention
    from edge.sources.zeromq import ZeroMqSource

    started = time.monotonic()
    clock = clock or SystemClock()
    log = structlog.get_logger(line=config.line)
    warn = _warner(log)
    names = [camera.name for camera in config.cameras]
    check_addresses(config, where)
    with ExitStack() as opened:
        notifier = opened.enter_context(Notifier())
        registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        deadlines_s = {camera.name: camera.deadline_ms / 1e3 for camera in config.cameras if camera.deadline_ms}
        metrics = Metrics(registry, names, clock, deadlines_s)
        metrics.set_build(config.line)
        if gpus := find_gpus():
            registry.register(gpus)
        with named(where, "metrics"):
            server = opened.enter_context(open_server(config.metrics, registry, metrics.refuse_scrape))
        bundle = open_trusted(config, where)
        stages = make_stages(config, bundle, where)
        opener = opener_of(config, bundle, stages, metrics, warn)
        stages = watched(stages, config, metrics, clock, warn, opener)
        find_challenge(config, where)
        _warn_of_bundle(config, bundle, flat_fields_of(stages.measures), warn)
        pipeline: Pipeline | None = None

        def log_failed(why: str) -> None:
            warn("event log failed", {"path": config.log.path, "error": why})
            if pipeline is not None:
                pipeline.fail(f"event log {config.log.path}: {why}")

        # Twice what can be in flight: frames of a camera's earlier epoch may still be there.
        capacity = config.window * len(names)
        log_capacity = max(1024, 2 * capacity)
        metrics.set_capacity("log", log_capacity)
        with named(where, "log.path"):
            days, keep_days = config.log.retain_days, config.log.keep_for_subscribers_days
            event_log = EventLog(
                Path(config.log.path),
                clock,
                capacity=log_capacity,
                on_failure=log_failed,
                on_group=metrics.observe_group,
                retention=Retention(
                    config.log.retain_bytes,
                    None if days is None else days * 86400,
                    None if keep_days is None else keep_days * 86400,
                ),
            )
        event_log.on_passed = _passer(metrics, warn)
        opened.callback(event_log.close)
        keys = open_keys(config, where)
        context = new_context()
        opened.callback(context.destroy, LINGER_MS)
        door = opened.enter_context(open_door(config, where, context, metrics, warn))
        rejects: RejectRing | None = None
        if config.log.rejects_count and config.log.rejects_bytes:
            rejects = opened.enter_context(
                RejectRing(
                    rejects_folder(Path(config.log.path)),
                    max_bytes=config.log.rejects_bytes,
                    max_count=config.log.rejects_count,
                )
            )
        with named(where, "events_address"):
            publisher = Publisher(
                config.events_address,
                config.line,
                clock,
                head=(event_log.epoch, event_log.head),
                plain_off_host=config.plain_off_host,
                context=context,
                keys=keys,
                on_bound=lambda made: door.watch(made, "events"),
            )
        opened.callback(publisher.close)
        door.when_removed("subscribe", publisher.renew)
        replay: ReplayServer | None = None
        if config.replay_address is not None:
            with named(where, "replay_address"):
                replay = ReplayServer(
                    config.replay_address,
                    event_log,
                    on_refused=metrics.refuse,
                    on_failure=lambda why: warn("replay failed", {"error": why}),
                    plain_off_host=config.plain_off_host,
                    context=context,
                    keys=keys,
                    on_bound=lambda made: door.watch(made, "replay"),
                    stands=lambda owner: door.stands(owner, "replay"),
                )
            opened.callback(replay.close)

        running = Running(opener)

        def sample_log() -> None:
            metrics.set_depth("log", event_log.waiting)
            metrics.log_head.set(event_log.head)
            metrics.log_bytes.set(event_log.size_bytes)
            metrics.log_removed_through.set(event_log.removed_through)
            metrics.set_lags(event_log.head, event_log.cursors())
            metrics.set_replayed(0 if replay is None else replay.served)
            metrics.set_rejects_dropped(0 if rejects is None else rejects.dropped)
            metrics.set_substitute(running.opener.fallback is not None)
            metrics.set_log_disk(config.log.path)

        with warming_masks():
            engine = opener.open()
            opened.push(engine.__exit__)
            golden = check_engine(config, bundle, engine)
            engine.warmup()
        metrics.set_engine(engine.spec.name, engine.spec.version, engine.spec.device)
        metrics.set_model(bundle.model_id, bundle.manifest, stages.decide.calibration.certified)

        def linked(camera: str, connected: bool) -> None:
            metrics.set_connected(camera, connected)
            tell = log.info if connected else log.warning
            tell("camera connected" if connected else "camera lost", camera=camera)

        with named(where, "frames_address"):
            source = ZeroMqSource(
                config.frames_address,
                clock,
                cameras=names,
                window=config.window,
                known=event_log.contains,
                acked_through=event_log.acked_through,
                on_refused=metrics.refuse,
                on_duplicate=metrics.duplicate,
                on_link=linked,
                on_reconnect=metrics.reconnect,
                limits=FrameLimits(
                    max_pixels=config.limits.max_pixels, max_payload_bytes=config.limits.max_payload_bytes
                ),
                plain_off_host=config.plain_off_host,
                context=context,
                keys=keys,
                on_bound=lambda made: door.watch(made, "frames"),
                stands=lambda owner: door.stands(owner, "camera"),
            )
        pipeline = Pipeline(
            source=source,
            engine=engine,
            open_engine=lambda: open_told(config, bundle, opener, metrics, running),
            stages=stages,
            log=event_log,
            publisher=publisher,
            metrics=metrics,
            clock=clock,
            capacity=capacity,
            max_batch=config.batching.max_batch,
            max_wait_ms=config.batching.max_wait_ms,
            warn=warn,
            terms={camera.name: terms_of(camera) for camera in config.cameras},
            on_reject=(lambda frame_id, image: None) if rejects is None else rejects.put,
        )
        challenge = duty_of(
            config, lambda: find_challenge(config, where), pipeline, event_log, publisher, metrics, clock, warn
        )
        pipeline.start(reading=challenge is None or not config.challenge.required)

        def promoted(model: Model) -> None:
            running.opener = model.opener
            metrics.set_model(model.model_id, model.manifest, model.certified)
            spec = model.engine.spec
            metrics.set_engine(spec.name, spec.version, spec.device)
            if challenge is not None:
                challenge.ask()

        others = {FORGET: lambda request: answer(event_log, request)}
        if challenge is not None:
            others[KIND] = lambda request: msgspec.json.encode(challenge.now())
        with named(where, "control_address"):
            desk = SwapDesk(
                config.control_address or default_control_address(config),
                pipeline=pipeline,
                load=lambda path: load_model(
                    msgspec.structs.replace(config, bundle=path), where, metrics, clock, warn, running
                ),
                configured=lambda: load_config(where).bundle,
                promoted=promoted,
                others=others,
                cameras=tuple(names),
                max_batch=config.batching.max_batch,
                clock=clock,
                tell=lambda text, fields: log.info(text, **fields),
            )
        opened.callback(desk.close)
        stop.reload = desk.reload
        ready = Ready(
            line=config.line,
            frames_address=source.address,
            events_address=publisher.address,
            replay_address=None if replay is None else replay.address,
            metrics_url=f"{'http' if config.metrics.certificate is None else 'https'}://{config.metrics.host}:{server.port}/metrics",
            model_id=bundle.model_id,
            certified=stages.decide.calibration.certified,
            backend=f"{engine.spec.name} {engine.spec.version}",
            fallback=opener.fallback,
            golden_share_of_tolerance=None if golden is None else golden.max_rel_of_tolerance,
            startup_s=round(time.monotonic() - started, 3),
        )

        def announce() -> None:
            log.info("ready", **msgspec.to_builtins(ready))
            notifier.ready()
            on_ready(ready)

        try:
            if challenge is not None:
                challenge.start()
            gate = _Gate(announce, lambda: challenge is None or challenge.is_clear)
            _watch(pipeline, publisher, metrics, notifier, stop, clock, log, sample_log, running, gate)
        finally:
            notifier.stopping()
            metrics.set_state("stopping")
            if challenge is not None:  # before the desk, which may be waiting for one
                challenge.close()
            desk.close()
            pipeline.stop(STOP_TIMEOUT_S)
            log.info("stopped", signal=stop.signal, verdicts=metrics.frames.judged, failure=pipeline.failure)
        if pipeline.failure is not None:
            raise KizuError(f"line {config.line} stopped: {pipeline.failure}")


def _watch(
    pipeline: Pipeline,
    publisher: Any,
    metrics: Metrics,
    notifier: Notifier,
    stop: StopRequest,
    clock: Clock,
    log: Any,
    sample_log: Callable[[], None],
    running: Running,
    gate: _Gate,
) -> None:
    """The main thread's loop: heads, queue depths, state and watchdog, a few times per second."""
    state: State | None = None
    told_ns = asked_ns = 0
    while gate.look() and not stop.event.wait(_TICK_S) and not pipeline.ended:
        publisher.tick("" if state is None else state.value, running.opener.fallback or "")
        pipeline.sample_queues()
        sample_log()
        now_ns, fallback = clock.monotonic_ns(), running.opener.fallback
        new = state_of(replace(pipeline.progress(), engine_fallback=fallback is not None), now_ns)
        if new is not state:
            log.info("state", state=new.value, before=None if state is None else state.value)
            metrics.set_state(new.value)
            notifier.status(new.value if fallback is None else f"{new.value}: no GPU ({fallback})")
            state = new
        if not gate.told and now_ns - asked_ns >= _NOT_YET_S / 2 * 1e9:
            notifier.not_yet(_NOT_YET_S)
            asked_ns = now_ns
        # A stalled line keeps silent, so that systemd restarts it.
        due_s = None if notifier.watchdog_s is None else notifier.watchdog_s / 3
        if due_s is not None and state is not State.STALLED and now_ns - told_ns >= due_s * 1e9:
            notifier.watchdog()
            told_ns = now_ns


@dataclass(slots=True)
class _Gate:
    """Tells once that the line is ready, when nothing withholds it any more."""

    announce: Callable[[], None]
    is_clear: Callable[[], bool]
    told: bool = False

    def look(self) -> bool:
        """Tell if it is time; always true, for a loop's condition."""
        if not self.told and self.is_clear():
            self.told = True
            self.announce()
        return True


@contextmanager
def stopping_on_signals(stop: StopRequest) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop` instead of ending the process, SIGHUP asks for a swap; only in the main thread."""
    handlers = {signal.SIGTERM: stop.set, signal.SIGINT: stop.set, signal.SIGHUP: stop.hang_up}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def configure_logging() -> None:
    """structlog as JSON lines on stdout, with UTC time and level; journald keeps them."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_to_json),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )


def _to_json(value: Any, **options: Any) -> str:
    return msgspec.json.encode(value, enc_hook=str).decode()


def _warner(log: Any) -> Warn:
    return lambda text, fields: log.warning(text, **fields)


def _passer(metrics: Metrics, warn: Warn) -> Callable[[str, int], None]:
    """Counts what retention took from a subscriber, and says it once for each, until the daemon is restarted."""
    told: set[str] = set()

    def passed(name: str, events: int) -> None:
        metrics.passed(name, events)
        if name not in told:
            told.add(name)
            warn("retention passed a subscriber: it will get a gap", {"subscriber": name, "events": events})

    return passed


def default_control_address(config: EdgeConfig) -> str:
    """Where `kizu swap` finds the daemon if the configuration does not say: beside the event log."""
    return f"ipc://{config.log.path}.control"


def check_addresses(config: EdgeConfig, where: Path) -> None:
    """Refuse addresses that could never be bound, without binding them.

    Raises:
        ConfigError: names file and key.
    """
    control = config.control_address or default_control_address(config)
    secured = config.security.secret_key is not None
    for key, address, off_host, has_keys in (
        ("frames_address", config.frames_address, config.plain_off_host, secured),
        ("events_address", config.events_address, config.plain_off_host, secured),
        ("replay_address", config.replay_address, config.plain_off_host, secured),
        ("control_address", control, False, False),
    ):
        with named(where, key):
            if address is not None:
                check_address(address, off_host, secured=has_keys)
    if config.frames_address == config.events_address and not config.frames_address.endswith(":*"):
        raise ConfigError(
            f"{where}: events_address: {config.events_address!r} is the frames_address as well; give it its own port"
        )


def open_keys(config: EdgeConfig, where: Path) -> ServerKeys | None:
    """The daemon's own keys; None where the configuration names none.

    Raises:
        ConfigError: the file is missing, open to others or malformed.
    """
    if config.security.secret_key is None:
        return None
    with named(where, "security.secret_key"):
        return load_server(config.security.secret_key)


def check_peers(config: EdgeConfig, where: Path) -> list[str]:
    """The configured cameras whose key is not on the list of peers, so that they cannot connect.

    Raises:
        ConfigError: the list cannot be read.
    """
    if config.security.peers is None:
        return []
    with named(where, "security.peers"):
        admitted = AllowList.load(config.security.peers).names("camera")
    return [camera.name for camera in config.cameras if camera.name not in admitted]


def open_door(config: EdgeConfig, where: Path, context: Context, metrics: Metrics, warn: Warn) -> Doorkeeper:
    """Who decides about connections; must be there before any socket that has keys.

    Raises:
        ConfigError: the list of peers cannot be read.
    """
    for name in check_peers(config, where):
        warn("no key for this camera: it cannot connect", {"camera": name, "peers": config.security.peers})
    with named(where, "security.peers"):
        peers = None if config.security.peers is None else Path(config.security.peers)
        return Doorkeeper(context, peers, on_refused=metrics.refuse_connection, on_step=metrics.connection, tell=warn)


def _warn_of_bundle(config: EdgeConfig, bundle: ModelBundle, flat_fields: FlatFields, warn: Warn) -> None:
    if config.engine.backend == "fake":
        warn("dry run: the fake engine does not look for flaws", {"engine.backend": "fake"})
    elif not bundle.calibration.certified:
        warn(
            "the threshold is provisional and certifies nothing; see `kizu calibrate`",
            {"bundle": config.bundle, "threshold": bundle.calibration.threshold},
        )
    elif (reason := why_not_certified(bundle.calibration, config.engine)) is not None:
        warn("the certificate does not hold on this line's engine", {"bundle": config.bundle, "why": reason})
    for camera, why in uncertified(config, bundle.calibration, flat_fields).items():
        warn("this camera's verdicts are not certified", {"camera": camera, "why": why})
    if config.plain_off_host and config.security.secret_key is None:
        warn("plain_off_host: frames and events may leave this host unencrypted", {})
    if config.metrics.host not in LOOPBACK and (config.metrics.certificate is None or config.metrics.login is None):
        warn(
            "metrics leave this host without TLS, or without a login; anybody there may read them",
            {"metrics.host": config.metrics.host},
        )


@contextmanager
def warming_masks() -> Iterator[None]:
    """Load numba's kernels beside the engine's compilation; both take about a second, on different cores."""
    from edge import masks

    thread = threading.Thread(target=masks.warm, name="warm-masks", daemon=True)
    thread.start()
    yield
    thread.join()
