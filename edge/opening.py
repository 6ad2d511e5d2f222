"""EngineOpener: which engine a line gets, and what happens where its GPU cannot be used.

Owns the way from configuration to plan to engine, and the fallback: allowed by `engine.on_gpu_failure`, announced,
never silent. Compiling is `compile`'s matter, what an engine does when it runs is the runner's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edge.bundle import ModelBundle
from edge.config import EdgeConfig, EngineConfig
from edge.engines.device import Plan
from edge.engines.registry import open_engine
from edge.errors import DeviceError, EngineError, UsageError
from edge.protocols import Engine


@dataclass(frozen=True, slots=True)
class Plans:
    """Compiled plans of a bundle's graph and, where it has one, of its coarse graph."""

    dense: Plan
    coarse: Plan | None = None


PlansOf = Callable[[ModelBundle, EngineConfig], Plans]
"""Raises DeviceError where there is no plan and none can be made."""


class EngineOpener:
    """Opens a line's engine, as often as it is needed; `fallback` is why the last one is the CPU's, None if it is not.

    `on_fallback` is told (reason, what happened) each time; `fallback` may be read by other threads.
    """

    def __init__(
        self,
        config: EdgeConfig,
        bundle: ModelBundle,
        *,
        on_tiles: Callable[[int, int], None] = lambda seen, refined: None,
        on_fallback: Callable[[str, str], None] = lambda reason, why: None,
        plans_of: PlansOf | None = None,
    ) -> None:
        self.fallback: str | None = None
        self._config = config
        self._bundle = bundle
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
            return self._cpu(asked)
        try:
            engine = self._gpu(asked)
        except DeviceError as error:
            if asked.on_gpu_failure == "refuse":
                raise DeviceError(
                    error.reason, f'{error} (engine.on_gpu_failure = "cpu" would go on with OpenVINO)'
                ) from error
            self.fallback = error.reason
            self._on_fallback(error.reason, str(error))
            return self._cpu(EngineConfig(streams=asked.streams, refine=asked.refine))
        self.fallback = None
        return engine

    def _gpu(self, asked: EngineConfig) -> Engine:
        plans = self._plans_of(self._bundle, asked)
        return open_engine(
            self._bundle,
            backend="tensorrt",
            device=asked.device,
            max_batch=self._config.batching.max_batch,
            refine=asked.refine,
            on_tiles=self._on_tiles,
            plan=plans.dense,
            coarse_plan=plans.coarse,
            quiet_below=self._bundle.calibration.lowest() if asked.maps == "flawed" else None,
        )

    def _cpu(self, asked: EngineConfig) -> Engine:
        return open_engine(
            self._bundle,
            backend=asked.backend,
            device=asked.device,
            streams=asked.streams,
            max_batch=self._config.batching.max_batch,
            refine=asked.refine,
            on_tiles=self._on_tiles,
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
