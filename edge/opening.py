"""EngineOpener: which engine a line gets, and what happens where its GPU cannot be used.

Owns the way from configuration to plan to engine, the words by which a calibration names the engine that made it, and
the fallback: allowed by `engine.on_gpu_failure`, announced, never silent. Calibrations and tests of a model go the same
way by `open_on`, without a fallback. Compiling is `compile`'s matter, what an engine does when it runs is the runner's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from edge.bundle import ModelBundle, ScoreCalibration
from edge.compile import LOOSE
from edge.config import EdgeConfig, EngineConfig
from edge.engines.device import Plan
from edge.engines.registry import open_engine
from edge.errors import DeviceError, EngineError, UsageError
from edge.protocols import Engine
from edge.types import FlatMaps


@dataclass(frozen=True, slots=True)
class Plans:
    """Compiled plans of a bundle's graph and, where it has one, of its coarse graph."""

    dense: Plan
    coarse: Plan | None = None


PlansOf = Callable[[ModelBundle, EngineConfig], Plans]
"""Raises DeviceError where there is no plan and none can be made."""

DEFAULT_ENGINE: Final = EngineConfig()
"""What a line runs on that says nothing of its engine."""


class EngineOpener:
    """Opens a line's engine, as often as it is needed; `fallback` is why the last one is the CPU's, None if it is not.

    `on_fallback` is told (reason, what happened) each time; `fallback` may be read by other threads. `fields` are the
    line's `Stages.fields`.
    """

    def __init__(
        self,
        config: EdgeConfig,
        bundle: ModelBundle,
        *,
        fields: Sequence[FlatMaps] = (),
        on_tiles: Callable[[int, int], None] = lambda seen, refined: None,
        on_fallback: Callable[[str, str], None] = lambda reason, why: None,
        plans_of: PlansOf | None = None,
    ) -> None:
        self.fallback: str | None = None
        self._config = config
        self._bundle = bundle
        self._fields = fields
        self._on_tiles = on_tiles
        self._on_fallback = on_fallback
        self._plans_of = compiled_plans if plans_of is None else plans_of

    def open(self) -> Engine:
        """The configured engine; or the CPU's, where the GPU cannot be used and the configuration allows it.

        Raises:
            EngineError: neither can be used, or the configuration refuses a fallback.
        """
        asked = self._config.engine
        if asked.backend != "tensorrt":
            return self._on(asked)
        try:
            engine = self._on(asked)
        except DeviceError as error:
            if asked.on_gpu_failure == "refuse":
                raise DeviceError(
                    error.reason, f'{error} (engine.on_gpu_failure = "cpu" would go on with OpenVINO)'
                ) from error
            self.fallback = error.reason
            self._on_fallback(error.reason, str(error))
            return self._on(EngineConfig(streams=asked.streams, refine=asked.refine))
        self.fallback = None
        return engine

    def _on(self, asked: EngineConfig) -> Engine:
        return open_on(
            self._bundle,
            asked,
            max_batch=self._config.batching.max_batch,
            fields=self._fields,
            on_tiles=self._on_tiles,
            plans_of=self._plans_of,
        )


def open_on(
    bundle: ModelBundle,
    asked: EngineConfig,
    *,
    max_batch: int | None = None,
    fields: Sequence[FlatMaps] = (),
    on_tiles: Callable[[int, int], None] = lambda seen, refined: None,
    plans_of: PlansOf | None = None,
) -> Engine:
    """The very engine that `asked` says, or an error: no other takes its place.

    Raises:
        DeviceError: the GPU cannot be used.
        EngineError: the backend or its device cannot be.
    """
    plans = None
    if asked.backend == "tensorrt":
        plans = (compiled_plans if plans_of is None else plans_of)(bundle, asked)
    return open_engine(
        bundle,
        backend=asked.backend,
        device=asked.device,
        streams=asked.streams,
        max_batch=max_batch,
        refine=asked.refine,
        on_tiles=on_tiles,
        plan=None if plans is None else plans.dense,
        coarse_plan=None if plans is None else plans.coarse,
        fields=fields,
        quiet_below=bundle.calibration.lowest() if plans is not None and asked.maps == "flawed" else None,
    )


def looseness(asked: EngineConfig, engine: Engine) -> float:
    """How far `engine` may be from the golden frames beyond the bundle's tolerance; see `compile.LOOSE`.

    0 for a CPU's, also where that stands in for the GPU asked for.
    """
    return LOOSE[asked.precision] if engine.spec.name == "tensorrt" else 0.0


def engine_words(asked: EngineConfig, engine: Engine) -> str:
    """The engine as calibrations and reports name it: backend, version, precision where it is chosen, device.

    `tensorrt rtx-1.7.1.116 fp16 cuda:0 NVIDIA L4`; on a CPU precision is the bundle's own: `openvino 2026.4.1 cpu`.
    """
    spec = engine.spec
    precision = [asked.precision] if spec.name == "tensorrt" else []
    return " ".join([spec.name, spec.version, *precision, spec.device])


def why_not_certified(calibration: ScoreCalibration, asked: EngineConfig) -> str | None:
    """Why a certificate does not hold on the engine `asked` for; None where it does.

    A threshold is certified through the engine that gave the scores: another backend sums in another order, another
    precision rounds elsewhere, and nobody vouches for their scores.
    """
    if asked.backend == "fake":
        return "the fake engine runs no model, so nothing that it accepts is certified; name a real engine.backend"
    given = calibration.engine.split(" ")
    wanted: list[str] = [asked.backend]
    made = given[:1]
    if asked.backend == "tensorrt":
        wanted.append(asked.precision)
        made += given[2:3]
    if made == wanted:
        return None
    options = f"--backend {asked.backend}"
    if asked.backend == "tensorrt":
        options += f" --device {asked.device} --precision {asked.precision}"
    return (
        f"it was made through {calibration.engine!r}, the line runs {' '.join(wanted)}; calibrate with {options}, or "
        "run the engine that it was made through"
    )


def compiled_plans(bundle: ModelBundle, asked: EngineConfig) -> Plans:
    """The plans of `bundle` for the GPU at hand: from the cache, or compiled now, which takes seconds.

    Raises:
        DeviceError: there is no GPU or no TensorRT, or the library does not build for this GPU or this graph.
    """
    from edge.compile import compile_bundle, known_targets, load_library
    from edge.engines.cuda import compute_capability, ordinal_of

    target = compute_capability(ordinal_of(asked.device))
    try:
        targets = [target] if known_targets(load_library()) else []

        def plan_of(graph: Literal["model", "coarse"]) -> Plan:
            compiled = compile_bundle(bundle, targets=targets, precision=asked.precision, graph=graph)
            return Plan(compiled.path, compiled.read())

        return Plans(plan_of("model"), plan_of("coarse") if bundle.coarse is not None and asked.refine else None)
    except DeviceError:
        raise
    except (EngineError, UsageError) as error:
        raise DeviceError("engine", str(error)) from error
