"""`kizu compile`: engines for the GPUs of a line, built ahead and on any machine."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, cast

import typer

from edge.errors import CommandError, ParityError

if TYPE_CHECKING:
    from edge.bundle import ModelBundle
    from edge.compile import Progress
    from edge.plan_cache import CompiledPlan, CompilePrecision

INTERRUPTED: Final = 130
BACKENDS: Final = ("tensorrt", "openvino", "onnxruntime")


def compile(
    bundle: Annotated[Path, typer.Argument(help="The bundle.")],
    backend: Annotated[str, typer.Option(help="tensorrt, openvino or onnxruntime.")] = "tensorrt",
    target: Annotated[
        str, typer.Option(metavar="SM,...", help="GPUs by compute capability, e.g. sm89 or sm80,sm86,sm89,sm120.")
    ] = "",
    precision: Annotated[
        str, typer.Option(help="fp32, fp16 or bf16; int8 and fp8 for bundles of `kizu quantize`.")
    ] = "fp32",
    cache: Annotated[
        Path | None, typer.Option(help="Folder of engines; default: $CACHE_DIRECTORY or ~/.cache, kizu/engines.")
    ] = None,
    reproducible: Annotated[
        bool, typer.Option(help="Build on one core, without address randomization: the same bytes each time.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each engine.")] = False,
) -> None:
    """Build a bundle's TensorRT engines and keep them in the cache; no GPU is needed with TensorRT for RTX.

    With the other backends nothing is kept, since they build at each start: the bundle is opened and its golden frames
    are checked, and the time that takes is told.

    Raises:
        CommandError: an unknown backend, target or precision.
        EngineError: the library is missing or refuses the graph.
        ParityError: a backend, or the graph in fp16, gives other answers than the golden ones.
    """
    from edge.bundle import open_bundle
    from edge.compile import compile_bundle
    from edge.steady import restart_steadily

    if backend not in BACKENDS:
        raise CommandError(f"--backend {backend}: expected one of {', '.join(BACKENDS)}")
    if backend == "tensorrt" and reproducible and not restart_steadily():
        typer.echo("note: this system keeps address randomization on; another build's bytes may differ", err=True)
    opened = open_bundle(bundle)
    if backend != "tensorrt":
        _try(opened, backend, target, precision)
        return
    targets = [one.strip() for one in target.split(",") if one.strip()]
    graphs: list[Literal["model", "coarse"]] = ["model"] if opened.coarse is None else ["model", "coarse"]
    for graph in graphs:
        with _Bar(f"{bundle.name} {precision} {graph}") as bar:
            try:
                plan = compile_bundle(
                    opened,
                    targets=targets,
                    precision=cast("CompilePrecision", precision),
                    cache=cache,
                    graph=graph,
                    progress=cast("Progress", bar),
                )
            except KeyboardInterrupt:
                typer.echo("cancelled; nothing was kept", err=True)
                raise typer.Exit(INTERRUPTED) from None
        typer.echo(_json(plan) if json else _line(plan))


def _try(bundle: ModelBundle, backend: str, target: str, precision: str) -> None:
    from edge.bundle import check_golden
    from edge.engines.registry import open_engine, require_backend

    if target or precision != "fp32":
        raise CommandError(
            f"--backend {backend} runs on this machine's CPU in fp32; leave --target and --precision out"
        )
    started = time.monotonic()
    with open_engine(bundle, backend=require_backend(backend, CommandError)) as engine:
        found = check_golden(bundle, engine)
        took_s = time.monotonic() - started
        if not found.ok:
            raise ParityError(
                f"{backend} is {found.max_rel_of_tolerance:.3g} times the tolerance away; see kizu verify"
            )
        typer.echo(f"{engine.spec.name} {engine.spec.version}: builds at each start in {took_s:.1f} s; nothing to keep")


def _line(plan: CompiledPlan) -> str:
    key = plan.key
    apart = "" if plan.map_share is None else f", map within {plan.map_share:.2%} of fp32"
    made = f"built in {plan.build_s:.2f} s" if plan.fresh else "in the cache already"
    where = ", ".join(key.targets) or "the GPU at hand"
    what = f"{key.graph} {key.precision} for {where}: {plan.size / 2**20:.1f} MiB, {made}"
    return f"{what}, {key.library} {key.version}{apart}\n  {plan.path}"


def _json(plan: CompiledPlan) -> str:
    import msgspec

    facts: dict[str, Any] = msgspec.to_builtins(plan.key)
    facts |= {"path": str(plan.path), "sha256": plan.sha256, "size": plan.size}
    facts |= {"build_s": plan.build_s, "map_share": plan.map_share, "fresh": plan.fresh}
    return msgspec.json.encode(facts).decode()


class _Bar:
    """A progress bar on a terminal, nothing elsewhere: a build takes seconds."""

    def __init__(self, title: str) -> None:
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(disable=not sys.stderr.isatty(), transient=True)
        self._task = self._bar.add_task(title, total=1.0)

    def __call__(self, done: float, phase: str) -> None:
        self._bar.update(self._task, completed=done)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
