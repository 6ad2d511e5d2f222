"""Loading: from a bundle's folder to a model that may judge: trusted, checked against its golden frames, warm.

Owns that order, at the start, at a swap and when an engine is opened again. Which engine it is belongs to `opening`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge.bundle import GoldenCheck, ModelBundle, check_golden, open_bundle
from edge.challenge import take_apart
from edge.config import EdgeConfig
from edge.errors import BundleError, ChallengeError
from edge.inference import Stages
from edge.line_stages import find_challenge, make_stages, named
from edge.metrics import Metrics
from edge.opening import EngineOpener, looseness
from edge.protocols import Clock, Engine
from edge.signature import TrustStore
from edge.stages.watch import WatchSettings
from edge.swap import Model, Pace
from edge.types import Verdict
from edge.warrant import Void, Warrant

Warn = Callable[[str, Mapping[str, object]], None]


@dataclass(slots=True)
class Running:
    """Whose engine judges at present: the first bundle's, then that of the last swap."""

    opener: EngineOpener


def open_trusted(config: EdgeConfig, where: Path) -> ModelBundle:
    """The configured bundle, verified, and signed where the configuration asks for that.

    Raises:
        ConfigError: the signers' keys cannot be read.
        BundleError: it is missing, changed or malformed, or nobody trusted signed it.
    """
    try:
        bundle = open_bundle(Path(config.bundle))
        if config.security.require_signature:
            require_signer(config, bundle, where)
        return bundle
    except BundleError as error:
        raise BundleError(f"{where}: bundle: {error}") from error


def require_signer(config: EdgeConfig, bundle: ModelBundle, where: Path) -> str:
    """The trusted name by which the bundle is signed.

    Raises:
        ConfigError: the signers' keys cannot be read.
        BundleError: nobody, or nobody trusted, signed it.
    """
    assert config.security.signers is not None  # load_config refuses the one key without the other
    with named(where, "security.signers"):
        trusted = TrustStore.load(config.security.signers)
    return trusted.signer(bundle.path, bundle.signed_by)


def load_model(config: EdgeConfig, where: Path, metrics: Metrics, clock: Clock, warn: Warn, running: Running) -> Model:
    """A bundle verified, checked and warmed beside the one that runs.

    Raises:
        ConfigError, BundleError, EngineError, ParityError: it cannot run here, and why.
    """
    rest = Pace()
    bundle = open_trusted(config, where)
    rest()
    stages = make_stages(config, bundle, where)
    opener = opener_of(config, bundle, stages, metrics, warn)
    stages = watched(stages, config, metrics, clock, warn, opener)
    samples = find_challenge(config, where)
    if samples and config.challenge.required:
        tried = take_apart(samples, open_checked(config, bundle, opener), stages, clock, config.batching.max_batch)
        if not tried.passed:
            raise ChallengeError(f"bundle {config.bundle}: the line's challenge {tried.detail}")
    engine = open_checked(config, bundle, opener, rest)
    return Model(
        bundle.model_id,
        bundle.manifest,
        stages.decide.calibration.certified,
        engine,
        lambda: open_told(config, bundle, opener, metrics, running),
        stages,
        opener,
        lambda: open_checked(config, bundle, opener, Pace()),
    )


def watched(
    stages: Stages, config: EdgeConfig, metrics: Metrics, clock: Clock, warn: Warn, opener: EngineOpener
) -> Stages:
    """`stages` whose verdicts lose their certificate when the watch voids it, and while the CPU stands in for a GPU."""
    decide = stages.decide
    if not decide.calibration.certified:
        return stages
    if not config.watch.enabled:
        return dataclasses.replace(stages, stamp=lambda verdict: verdict if opener.fallback is None else _bare(verdict))

    def on_void(void: Void) -> None:
        metrics.void_certificate(void.model_id)
        warn(
            "certificate void: live parts are no longer like those it stands on; calibrate again",
            msgspec.structs.asdict(void),
        )

    def on_unnamed(camera: str) -> None:
        warn("frames without part_id: the certificate is by part, so they are not watched", {"camera": camera})

    cameras = [camera.name for camera in config.cameras]
    settings = WatchSettings(config.watch.parts_between_false_alarms, config.watch.reject_share)
    path = Path(f"{config.log.path}.void.json")
    warrant = Warrant(
        path, decide.calibration, decide.model_id, cameras, settings, clock, on_void=on_void, on_unnamed=on_unnamed
    )
    if warrant.void is not None:
        metrics.void_certificate(decide.model_id)
        warn("certificate void since an earlier run; calibrate again", msgspec.structs.asdict(warrant.void))
        decide = dataclasses.replace(decide, calibration=msgspec.structs.replace(decide.calibration, certified=False))

    def stamp(verdict: Verdict) -> Verdict:
        stamped = warrant.stamp(verdict) if opener.fallback is None else _bare(verdict)
        metrics.set_evidence(verdict.frame_id.camera, warrant.evidence(verdict.frame_id.camera))
        return stamped

    return dataclasses.replace(stages, decide=decide, stamp=stamp)


def _bare(verdict: Verdict) -> Verdict:
    """The verdict without its certificate."""
    return dataclasses.replace(verdict, certified=False)


def opener_of(config: EdgeConfig, bundle: ModelBundle, stages: Stages, metrics: Metrics, warn: Warn) -> EngineOpener:
    """What opens the line's engine, counting and telling what it finds."""

    def fell_back(reason: str, why: str) -> None:
        metrics.fall_back(reason)
        warn("the GPU cannot be used: the CPU takes its place", {"reason": reason, "error": why})

    return EngineOpener(config, bundle, fields=stages.fields, on_tiles=metrics.count_tiles, on_fallback=fell_back)


def open_told(
    config: EdgeConfig, bundle: ModelBundle, opener: EngineOpener, metrics: Metrics, running: Running
) -> Engine:
    """`open_checked`, and the metrics say what runs if it is the one that judges, not a shadow."""
    fresh = open_checked(config, bundle, opener)
    if running.opener is opener:
        metrics.set_engine(fresh.spec.name, fresh.spec.version, fresh.spec.device)
    return fresh


def open_checked(
    config: EdgeConfig, bundle: ModelBundle, opener: EngineOpener, rest: Callable[[], None] = lambda: None
) -> Engine:
    """An engine that answers the golden frames as it should (it may be the CPU's now), and is warm."""
    with ExitStack() as refused:
        engine = refused.enter_context(opener.open())
        check_engine(config, bundle, engine, rest)
        engine.warmup()
        rest()
        refused.pop_all()
    return engine


def check_engine(
    config: EdgeConfig, bundle: ModelBundle, engine: Engine, rest: Callable[[], None] = lambda: None
) -> GoldenCheck | None:
    """Run the golden frames on this device, with a `rest` before each; None with the fake engine, which runs no model.

    Raises:
        ParityError: beyond the bundle's tolerance.
    """
    if config.engine.backend == "fake":
        return None
    return check_golden(bundle, engine, require=True, loose=looseness(config.engine, engine), before_each=rest)
