"""A bundle's graph -> TensorRT engine for stated targets.

Owns the one module for the API that `tensorrt` 10 / 11 and TensorRT for RTX share, and every refusal of what cannot be
built. How a graph is rewritten for a precision is `graph`'s; where engines are kept is `plan_cache`'s; running one is
`engines.tensorrt`'s.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, Final, Literal, get_args

import numpy as np

from edge.bundle import COARSE, MODEL, ModelBundle, coarse_bundle
from edge.bundle_files import sha256_hex
from edge.engines.contract import INPUT, MAP_OUTPUT
from edge.errors import BundleError, CommandError, EngineError, ParityError
from edge.graph import at_precision, quantized_types, require_buildable
from edge.plan_cache import CompiledPlan, CompilePrecision, PlanKey, cache_folder, find_plan, keep_plan

PRECISIONS: Final[tuple[str, ...]] = get_args(CompilePrecision)

LIBRARIES: Final = ("tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt")
"""Import names, in the order in which they are tried; the second is the first one's own inner package."""

LOOSE: Final[Mapping[str, float]] = MappingProxyType(
    {"fp32": 0.0, "fp16": 1e-2, "bf16": 5e-2, "int8": 1e-2, "fp8": 5e-2}
)
"""How far an engine may be from the golden frames beyond the bundle's tolerance, as a share of their largest value.

fp16: `line` was measured at 0.3 % on a CPU. bf16 has three bits less. Q/DQ graphs bring golden frames of their own, and
only the order of sums differs. Neither was run on a GPU yet.
"""

FP8_FROM: Final = 89
"""The first compute capability, times ten, that computes in fp8."""


class Progress:
    """Told how far a build is, 0 to 1, as far as the library says; override what is needed."""

    def __call__(self, done: float, phase: str) -> None:
        """`done` of the outermost phase, and the name of the one that was entered last."""


def compile_bundle(
    bundle: ModelBundle,
    *,
    targets: Sequence[str],
    precision: CompilePrecision,
    cache: Path | None = None,
    graph: Literal["model", "coarse"] = "model",
    progress: Progress | None = None,
) -> CompiledPlan:
    """Build the engine of `bundle` for GPUs of all `targets` (`sm89`), or take it from the cache.

    `targets` may be empty with the library `tensorrt`, which builds for the GPU at hand only.

    Raises:
        CommandError: a target or precision that the library or the bundle does not know; the message lists those.
        EngineError: no TensorRT is installed, or it refuses the graph; names node and reason.
        ConfigError: the cache cannot be used.
        ParityError: the graph in fp16 is too far from the golden frames; see `require_parity`.
        KeyboardInterrupt: the build was cancelled; nothing is left of it.
    """
    library = load_library()
    key = plan_key(bundle, library, targets=targets, precision=precision, graph=graph)
    folder = cache_folder(cache) / key.digest
    found = find_plan(key, folder)
    if found is not None:
        return found
    model = bundle.model if graph == "model" else _coarse(bundle)
    require_buildable(model, f"{bundle.path / (MODEL if graph == 'model' else COARSE)}")
    rewritten = at_precision(model, precision) if precision in ("fp32", "fp16", "bf16") else model
    started = time.monotonic()
    engine = _build(library, rewritten, key, progress or Progress())
    build_s = time.monotonic() - started
    # After the build: another library moves addresses in memory, and the engine has tables that are ordered by them.
    share = require_parity(bundle, graph, rewritten) if precision == "fp16" else None
    return keep_plan(folder, key, engine, build_s, share)


def require_parity(bundle: ModelBundle, graph: Literal["model", "coarse"], half: bytes) -> float | None:
    """How far the maps of the fp16 graph `half` are from the golden ones, as a share of their largest value.

    By ONNX Runtime on this machine's CPU, which rounds as a GPU does but sums in another order; None without it. It
    computes no convolution in bf16.

    Raises:
        ParityError: further than `LOOSE` allows; the daemon would not start with this engine.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    golden = (bundle if graph == "model" else coarse_bundle(bundle)).golden
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(half, options, providers=["CPUExecutionProvider"])
    largest, apart = float(np.abs(golden.maps).max(initial=0.0)), 0.0
    for frame, expected in zip(golden.frames, golden.maps, strict=True):
        (found,) = session.run([MAP_OUTPUT], {INPUT: frame[None]})
        apart = max(apart, float(np.abs(found[0] - expected).max()) if np.isfinite(found).all() else math.inf)
    admitted = bundle.manifest.tolerance.absolute + LOOSE["fp16"] * largest
    if apart > admitted:
        raise ParityError(
            f"{bundle.path}: in fp16 its {graph} map is up to {apart:.3g} from the golden frames, {admitted:.3g} is "
            "allowed; compile with --precision bf16 or fp32"
        )
    return apart / largest if largest else 0.0


def plan_key(
    bundle: ModelBundle,
    library: Any,
    *,
    targets: Sequence[str],
    precision: str,
    graph: Literal["model", "coarse"] = "model",
) -> PlanKey:
    """What the engine is to be, checked as far as that is possible without building it.

    Raises:
        CommandError: see `compile_bundle`.
    """
    spec = bundle.manifest.input
    model = bundle.model if graph == "model" else _coarse(bundle)
    known = check_targets(library, targets)
    _require_precision(model, bundle, precision, known)
    return PlanKey(
        library=str(library.__name__).removesuffix("_bindings"),
        version=str(library.__version__),
        model_sha256=sha256_hex(model),
        graph=graph,
        precision=precision,  # type: ignore[arg-type]  # checked by the line above
        targets=known,
        max_batch=spec.max_batch,
        shape=(spec.height, spec.width, spec.channels),
    )


def load_library() -> Any:
    """The first TensorRT that is installed; imported here and nowhere else.

    Raises:
        EngineError: there is none; says how to install one.
    """
    import importlib

    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise EngineError(
        "no TensorRT is installed: pip install 'kizu[tensorrt-rtx]' (x86-64, GeForce and RTX) or 'kizu[tensorrt]' "
        "(data center; on a Jetson, JetPack brings it)"
    )


def known_targets(library: Any) -> tuple[str, ...]:
    """Every target that `library` can build for without having it: `sm80`, ...; none for the library `tensorrt`."""
    capabilities = getattr(library, "ComputeCapability", None)
    names = () if capabilities is None else capabilities.__members__
    return tuple(name.lower() for name in names if name.startswith("SM"))


def check_targets(library: Any, targets: Sequence[str]) -> tuple[str, ...]:
    """`targets` once each, in ascending order.

    Raises:
        CommandError: one is unknown, or none is given and the library needs one.
    """
    known = known_targets(library)
    if not known:
        if targets:
            raise CommandError(
                f"--target {','.join(targets)}: {library.__name__} builds for the GPU at hand only; leave it out, "
                "or install 'kizu[tensorrt-rtx]', which builds for others"
            )
        return ()
    for target in targets:
        if target not in known:
            raise CommandError(f"--target {target}: unknown to {library.__name__}; expected some of {', '.join(known)}")
    if not targets:
        raise CommandError(f"--target is missing; give one or more of {', '.join(known)}")
    return tuple(sorted(set(targets), key=known.index))


def _coarse(bundle: ModelBundle) -> bytes:
    if bundle.coarse is None:
        raise BundleError(f"bundle {bundle.path} has no coarse graph; train it with --refine")
    return bundle.coarse


def _require_precision(model: bytes, bundle: ModelBundle, precision: str, targets: tuple[str, ...]) -> None:
    if precision not in PRECISIONS:
        raise CommandError(f"--precision {precision}: expected one of {', '.join(PRECISIONS)}")
    held = quantized_types(model)
    if precision in ("int8", "fp8") and precision not in held:
        raise CommandError(
            f"--precision {precision}: {bundle.path} is not quantized to it; make one that is: "
            f"kizu quantize {bundle.path} --good DIR --precision {precision} --out BUNDLE"
        )
    if precision not in ("int8", "fp8") and held:
        raise CommandError(f"--precision {precision}: {bundle.path} is quantized; compile it with {' or '.join(held)}")
    old = [target for target in targets if int(target.removeprefix("sm")) < FP8_FROM]
    if precision == "fp8" and old:
        raise CommandError(f"--precision fp8: GPUs of {', '.join(old)} do not compute in fp8; sm89 and later do")


# --- building ---------------------------------------------------------------------------------------------------------


def _build(library: Any, model: bytes, key: PlanKey, progress: Progress) -> bytes:
    log = _log_of(library)
    builder = library.Builder(log)
    network = builder.create_network(_creation_flags(library))
    parser = library.OnnxParser(network, log)
    if not parser.parse(model):
        told = "; ".join(_parser_error(parser.get_error(index)) for index in range(parser.num_errors))
        raise EngineError(f"{key.library} {key.version} does not take the graph: {told}")
    config = builder.create_builder_config()
    for index, target in enumerate(key.targets):
        config.num_compute_capabilities = len(key.targets)
        config.set_compute_capability(getattr(library.ComputeCapability, target.upper()), index)
    profile = builder.create_optimization_profile()
    largest = (key.max_batch, *key.shape)
    profile.set_shape("frames", (1, *key.shape), largest, largest)
    config.add_optimization_profile(profile)
    with _interruptible() as cancelled:
        config.progress_monitor = _monitor_of(library, progress, cancelled)
        plan = builder.build_serialized_network(network, config)
        if cancelled.is_set():
            raise KeyboardInterrupt
    if plan is None:
        raise EngineError(f"{key.library} {key.version} could not build the engine: {'; '.join(log.lines[-3:])}")
    return bytes(plan)


def _creation_flags(library: Any) -> int:
    # Since TensorRT 11 every network is strongly typed, and the flag may be gone.
    flag = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parser_error(error: Any) -> str:
    node = error.node_name() if callable(getattr(error, "node_name", None)) else ""
    operator = error.node_operator() if callable(getattr(error, "node_operator", None)) else ""
    return f"node {node or error.node()} ({operator or 'operator'}): {' '.join(error.desc().split())[:300]}"


def _log_of(library: Any) -> Any:
    class Log(library.ILogger):  # type: ignore[misc]
        """Keeps warnings and errors for the message; a build says much that nobody needs."""

        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= library.ILogger.Severity.WARNING:
                self.lines = [*self.lines[-31:], f"{severity.name.lower()}: {' '.join(message.split())[:300]}"]

    return Log()


def _monitor_of(library: Any, progress: Progress, cancelled: threading.Event) -> Any:
    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        """The outermost phase's steps as a share; says no once cancelled, which ends the build at its next step."""

        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self._outer: tuple[str, int] | None = None
            self._done = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._outer = (name, max(1, steps))
            progress(self._done, name)

        def step_complete(self, name: str, step: int) -> bool:
            if self._outer is not None and name == self._outer[0]:
                self._done = min(1.0, (step + 1) / self._outer[1])
                progress(self._done, name)
            return not cancelled.is_set()

        def phase_finish(self, name: str) -> None:
            if self._outer is not None and name == self._outer[0]:
                progress(1.0, name)

    return Monitor()


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C as an event: the library would carry on, and swallow an exception raised in its callback."""
    cancelled = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield cancelled
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        cancelled.set()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield cancelled
    finally:
        signal.signal(signal.SIGINT, before)
