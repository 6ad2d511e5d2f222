"""The daemon: composition root, the only file that chooses concrete sources, engines and sinks.

Owns the order of opening (cheap refusals first, the source last, so that no camera is admitted to a line that is not
ready), the loop that watches the pipeline, and the order of closing.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Final

import msgspec
import structlog
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from edge.bundle import GoldenCheck, ModelBundle, check_golden, open_bundle
from edge.clock import SystemClock
from edge.config import EdgeConfig
from edge.errors import BundleError, ConfigError, KizuError
from edge.health import Notifier, State, state_of
from edge.inference import Stages
from edge.metrics import Metrics, MetricsServer
from edge.opening import EngineOpener
from edge.payloads import FrameLimits
from edge.pipeline import Pipeline
from edge.protocols import Clock, Engine
from edge.sockets import check_address
from edge.stages.decide import Decide
from edge.stages.preprocess import Preprocess
from edge.stages.segment import Segment
from edge.stages.tile import Tiling, tiling_of

STOP_TIMEOUT_S: Final = 20.0
_TICK_S: Final = 0.2

Warn = Callable[[str, Mapping[str, object]], None]


@dataclass(frozen=True, slots=True)
class Ready:
    """What a started daemon really is: addresses as bound, model and engine."""

    line: str
    frames_address: str
    events_address: str
    metrics_url: str
    model_id: str
    certified: bool
    backend: str
    fallback: str | None
    golden_share_of_tolerance: float | None
    startup_s: float


@dataclass(slots=True)
class StopRequest:
    """Set by a signal or another thread: the daemon ends in order."""

    event: threading.Event = field(default_factory=threading.Event)
    signal: str | None = None

    def set(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Ask for the end; usable as a signal handler."""
        self.signal = signal.Signals(number).name if number else None
        self.event.set()


def check(config: EdgeConfig, where: Path) -> dict[str, str | int | float | bool | None]:
    """Open everything that needs no port: bundle, engine, golden frames; return what was found.

    Raises:
        ConfigError, BundleError, EngineError, ParityError: what is wrong, and the next step.
    """
    check_addresses(config, where)
    bundle = _open_bundle(config, where)
    make_stages(config, bundle, where)
    opener = EngineOpener(config, bundle)
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
    from edge.sinks.publisher import Publisher
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
        metrics = Metrics(registry, names, clock)
        with _named(where, "metrics"):
            server = opened.enter_context(MetricsServer(registry, config.metrics.host, config.metrics.port))
        bundle = _open_bundle(config, where)
        stages = make_stages(config, bundle, where)
        _warn_of_bundle(config, bundle, warn)
        pipeline: Pipeline | None = None

        def log_failed(why: str) -> None:
            warn("event log failed", {"path": config.log.path, "error": why})
            if pipeline is not None:
                pipeline.fail(f"event log {config.log.path}: {why}")

        # Twice what can be in flight: frames of a camera's earlier epoch may still be there.
        capacity = config.window * len(names)
        with _named(where, "log.path"):
            event_log = EventLog(Path(config.log.path), clock, capacity=max(1024, 2 * capacity), on_failure=log_failed)
        opened.callback(event_log.close)
        with _named(where, "events_address"):
            publisher = Publisher(
                config.events_address,
                config.line,
                clock,
                head=(event_log.epoch, event_log.head),
                plain_off_host=config.plain_off_host,
            )
        opened.callback(publisher.close)
        with warming_masks():

            def fell_back(reason: str, why: str) -> None:
                metrics.fall_back(reason)
                warn("the GPU cannot be used: the CPU takes its place", {"reason": reason, "error": why})

            opener = EngineOpener(config, bundle, on_tiles=metrics.count_tiles, on_fallback=fell_back)
            engine = opener.open()
            opened.push(engine.__exit__)
            golden = check_engine(config, bundle, engine)
            engine.warmup()
        metrics.set_engine(engine.spec.name, engine.spec.version, engine.spec.device)

        def open_again() -> Engine:
            with ExitStack() as again:
                fresh = again.enter_context(opener.open())
                check_engine(config, bundle, fresh)  # it may be the CPU's, which has not answered for this bundle yet
                fresh.warmup()
                again.pop_all()
            metrics.set_engine(fresh.spec.name, fresh.spec.version, fresh.spec.device)
            return fresh

        manifest = bundle.manifest
        metrics.set_model(
            bundle.model_id, manifest.name, manifest.method, manifest.preset, stages.decide.calibration.certified
        )
        with _named(where, "frames_address"):
            source = ZeroMqSource(
                config.frames_address,
                clock,
                cameras=names,
                window=config.window,
                known=event_log.contains,
                acked_through=event_log.acked_through,
                on_refused=metrics.refuse,
                on_duplicate=metrics.duplicate,
                limits=FrameLimits(
                    max_pixels=config.limits.max_pixels, max_payload_bytes=config.limits.max_payload_bytes
                ),
                plain_off_host=config.plain_off_host,
            )
        pipeline = Pipeline(
            source=source,
            engine=engine,
            open_engine=open_again,
            stages=stages,
            log=event_log,
            publisher=publisher,
            metrics=metrics,
            clock=clock,
            capacity=capacity,
            max_batch=config.batching.max_batch,
            max_wait_ms=config.batching.max_wait_ms,
            warn=warn,
        )
        pipeline.start()
        ready = Ready(
            line=config.line,
            frames_address=source.address,
            events_address=publisher.address,
            metrics_url=f"http://{config.metrics.host}:{server.port}/metrics",
            model_id=bundle.model_id,
            certified=stages.decide.calibration.certified,
            backend=f"{engine.spec.name} {engine.spec.version}",
            fallback=opener.fallback,
            golden_share_of_tolerance=None if golden is None else golden.max_rel_of_tolerance,
            startup_s=round(time.monotonic() - started, 3),
        )
        try:
            log.info("ready", **msgspec.to_builtins(ready))
            notifier.ready()
            on_ready(ready)
            _watch(pipeline, publisher, metrics, notifier, stop, clock, log, lambda: event_log.waiting, opener)
        finally:
            notifier.stopping()
            metrics.set_state("stopping")
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
    log_waiting: Callable[[], int],
    opener: EngineOpener,
) -> None:
    """The main thread's loop: heads, queue depths, state and watchdog, a few times per second."""
    state: State | None = None
    told_ns = 0
    while not stop.event.wait(_TICK_S) and not pipeline.ended:
        publisher.tick()
        pipeline.sample_queues()
        metrics.set_depth("log", log_waiting())
        now_ns = clock.monotonic_ns()
        new = state_of(replace(pipeline.progress(), engine_fallback=opener.fallback is not None), now_ns)
        if new is not state:
            log.info("state", state=new.value, before=None if state is None else state.value)
            metrics.set_state(new.value)
            notifier.status(new.value if opener.fallback is None else f"{new.value}: no GPU ({opener.fallback})")
            state = new
        # A stalled line keeps silent, so that systemd restarts it.
        due_s = None if notifier.watchdog_s is None else notifier.watchdog_s / 3
        if due_s is not None and state is not State.STALLED and now_ns - told_ns >= due_s * 1e9:
            notifier.watchdog()
            told_ns = now_ns


@contextmanager
def stopping_on_signals(stop: StopRequest) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop` instead of ending the process; only in the main thread."""
    before = {number: signal.signal(number, stop.set) for number in (signal.SIGTERM, signal.SIGINT)}
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


def make_stages(config: EdgeConfig, bundle: ModelBundle, where: Path) -> Stages:
    """The stages of a line as its configuration and its bundle say.

    Raises:
        ConfigError: the configuration asks for what the bundle cannot do.
        BundleError: the bundle's maps cannot be put together from tiles.
    """
    from edge.engines.registry import require_device

    with _named(where, "engine.device"):
        require_device(config.engine.backend, config.engine.device, ConfigError)
    manifest, calibration = bundle.manifest, bundle.calibration
    if config.batching.max_batch > manifest.input.max_batch:
        raise ConfigError(
            f"{where}: batching.max_batch is {config.batching.max_batch}, bundle {config.bundle} was exported for at "
            f"most {manifest.input.max_batch}; write {manifest.input.max_batch} or less"
        )
    if config.engine.backend == "fake":  # its scores are not the model's, so nobody vouches for the threshold
        calibration = msgspec.structs.replace(calibration, certified=False)
    return Stages(
        line=config.line,
        input=manifest.input,
        geometry=manifest.map,
        preprocess={camera.name: Preprocess(manifest.input, camera.roi_xywh) for camera in config.cameras},
        segment=Segment(calibration.pixel_threshold, max(1, config.segment.min_area_px or calibration.min_area_px)),
        decide=Decide(calibration, bundle.model_id),
        tiling=_tiling(config, bundle, where),
    )


def _tiling(config: EdgeConfig, bundle: ModelBundle, where: Path) -> Tiling | None:
    spec = bundle.manifest.input
    try:
        tiling = tiling_of(spec, bundle.manifest.map)
    except BundleError as error:
        raise BundleError(f"{where}: bundle: {error}") from error
    for camera in config.cameras:
        if tiling is not None and camera.roi_xywh is not None and min(camera.roi_xywh[2:]) < spec.min_side_px:
            raise ConfigError(
                f"{where}: cameras: roi_xywh of {camera.name} is {camera.roi_xywh[2]} x {camera.roi_xywh[3]} px, but "
                f"bundle {config.bundle} takes regions at their own size, of at least {spec.min_side_px} px a side; "
                "make it larger"
            )
    return tiling


def check_addresses(config: EdgeConfig, where: Path) -> None:
    """Refuse addresses that could never be bound, without binding them.

    Raises:
        ConfigError: names file and key.
    """
    for key in ("frames_address", "events_address"):
        with _named(where, key):
            check_address(getattr(config, key), config.plain_off_host)
    if config.frames_address == config.events_address and not config.frames_address.endswith(":*"):
        raise ConfigError(
            f"{where}: events_address: {config.events_address!r} is the frames_address as well; give it its own port"
        )


@contextmanager
def _named(where: Path, key: str) -> Iterator[None]:
    """Say which file and key a refusal is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {key}: {error}") from None


def _open_bundle(config: EdgeConfig, where: Path) -> ModelBundle:
    try:
        return open_bundle(Path(config.bundle))
    except BundleError as error:
        raise BundleError(f"{where}: bundle: {error}") from error


def check_engine(config: EdgeConfig, bundle: ModelBundle, engine: Engine) -> GoldenCheck | None:
    """Run the golden frames on this device; None with the fake engine, which does not run the model.

    Raises:
        ParityError: beyond the bundle's tolerance.
    """
    return None if config.engine.backend == "fake" else check_golden(bundle, engine, require=True)


def _warn_of_bundle(config: EdgeConfig, bundle: ModelBundle, warn: Warn) -> None:
    if config.engine.backend == "fake":
        warn("dry run: the fake engine does not look for flaws", {"engine.backend": "fake"})
    elif not bundle.calibration.certified:
        warn(
            "the threshold is provisional and certifies nothing; see `kizu calibrate`",
            {"bundle": config.bundle, "threshold": bundle.calibration.threshold},
        )
    if config.plain_off_host:
        warn("plain_off_host: frames and events may leave this host unencrypted", {})


@contextmanager
def warming_masks() -> Iterator[None]:
    """Load numba's kernels beside the engine's compilation; both take about a second, on different cores."""
    from edge import masks

    thread = threading.Thread(target=masks.warm, name="warm-masks", daemon=True)
    thread.start()
    yield
    thread.join()
