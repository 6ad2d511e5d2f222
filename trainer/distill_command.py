"""``kizu distill``: the command line of teacher distillation.

Owns options, their checks, and the progress display.  Leaves the work to ``distill``, the card to ``teacher_card``.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from edge.errors import CommandError

if TYPE_CHECKING:
    from trainer.distill import Progress

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells report SIGINT."""


def distill(
    images: Annotated[Path, typer.Option(help="Folder of everyday photographs (a thousand or more; any subjects).")],
    out: Annotated[Path, typer.Option(help="Teacher to write, .safetensors; its card goes beside it as .json.")],
    backbone: Annotated[str, typer.Option(help="Pretrained P: resnet18 or efficientnet-lite0.")] = "resnet18",
    weights: Annotated[
        Path | None, typer.Option(help="P's weights; efficientnet-lite0 is found when its package is installed.")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Shape of the teacher, e.g. line; it decides the default of every option below.")
    ] = "line",
    target: Annotated[
        str | None,
        typer.Option(help="map: P sees a whole view (fast); patch: P sees each patch alone (the paper, slow)."),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers of P to imitate, comma separated.")] = None,
    magnify: Annotated[int | None, typer.Option(min=1, max=4, help="How much larger P sees the view.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the run in steps.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Length in minutes, instead of steps.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Everything random follows from it.")] = 1,
    views: Annotated[
        int | None,
        typer.Option(min=0, help="Views cut once, P runs once on each; 0: cut anew and ask P at every step."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Views in a batch; in the paper's schedule each is one patch.")
    ] = None,
    sampling: Annotated[
        int | None, typer.Option(min=1, help="Distance in px of the patches described in a view.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's, at its highest.")] = None,
    rate: Annotated[
        str | None, typer.Option(help="Course of the learning rate: constant, or cosine (falls to zero).")
    ] = None,
    lambda_k: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of L_k: the descriptor holds what P says.")
    ] = None,
    lambda_m: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of L_m: shifted patches are near, strangers far.")
    ] = None,
    lambda_c: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of L_c: no two numbers of a descriptor say the same.")
    ] = None,
    exposure: Annotated[
        float | None,
        typer.Option(min=0.0, help="Vary the teacher's input exposure by this much (0.3: gain 0.74 to 1.35)."),
    ] = None,
    gray: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Share of views turned gray.")] = None,
    half: Annotated[bool | None, typer.Option("--half/--no-half", help="Store the teacher in half precision.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for P's features; default is a temporary one.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    # oneDNN's bfloat16 weight gradients wait for each other by spinning: on two cores shared with other work, a step of
    # paper-65 took 4.6 s with two threads and 0.8 s with one.
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: all cores. Take 1 where other work shares them.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT's unfinished run.")] = False,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out files that are not usable images.")
    ] = False,
) -> None:
    """Distill a pretrained network into a small patch teacher; students then learn each product from it."""
    # Idle OpenMP threads spin by default: with other work on the same cores a step took 10 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from trainer.backbones import load_backbone
    from trainer.distill import Distillation
    from trainer.distill_config import configure
    from trainer.photographs import read_photographs
    from trainer.progress import stop_on_signals
    from trainer.teacher_card import publish

    working = _require_options(out, steps, minutes, device, resume)
    if threads is not None:
        torch.set_num_threads(threads)
    config = configure(
        profile, backbone,
        {
            "target": target, "layers": tuple(layers.split(",")) if layers else None, "magnify": magnify,
            "steps": steps, "minutes": minutes, "seed": seed, "views": views, "batch_views": batch,
            "sampling_px": sampling, "learning_rate": learning_rate, "rate": rate, "lambda_k": lambda_k,
            "lambda_m": lambda_m, "lambda_c": lambda_c, "exposure": exposure, "gray_share": gray, "half": half,
        },
    )  # fmt: skip
    loaded = load_backbone(backbone, weights)
    photographs = read_photographs(images, skip_bad=skip_bad_images)
    run = Distillation(config, photographs, loaded, cache=cache, device=device)
    if resume and working.exists():
        run.resume(working)
    console = Console(stderr=True)
    with ProgressDisplay(console) as display, stop_on_signals() as stopped:
        # OUT can be used while the run goes on: a student trained on it is only less good.
        finished = run.run(working, report=display, saved_hook=lambda: publish(run, out), stopped=stopped)
    if not finished:
        console.print(f"stopped at step {run.step}; the same command with --resume goes on from {working}")
        raise typer.Exit(INTERRUPTED)
    publish(run, out)
    working.unlink()
    validation = run.history[-1]["validation"]
    console.print(f"teacher written to {out}, validation {validation:.3f} of the mean predictor's error")


def working_path(out: Path) -> Path:
    """Where a run that writes the teacher ``out`` keeps its checkpoint: beside it, until that is finished."""
    return out.with_name(f"{out.stem}.training.safetensors")


class ProgressDisplay:
    """A bar with time left on a terminal, one line a minute elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._tasks = {"prepare": self._bar.add_task("features of P", total=1.0, note=""),
                       "train": self._bar.add_task("distilling", total=1.0, note="", start=False)}  # fmt: skip
        self._last_line = time.monotonic()
        self._training = False

    def __enter__(self) -> ProgressDisplay:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        prepared = progress.figures.get("prepared")
        if prepared is not None:
            self._bar.update(self._tasks["prepare"], completed=prepared)
            self._line(f"features of P: {prepared:.0%}")
            return
        if not self._training:
            self._training = True
            self._bar.update(self._tasks["prepare"], completed=1.0)
            self._bar.start_task(self._tasks["train"])
        note = f"step {progress.step}, L_k {progress.figures['knowledge']:.3f}"
        self._bar.update(self._tasks["train"], completed=progress.share, note=note)
        left_s = progress.elapsed_s * (1 / max(progress.share, 1e-6) - 1)
        validation = progress.figures.get("validation")
        tail = "" if validation is None else f", validation {validation:.4f}"
        self._line(f"{progress.share:.1%}, {note}{tail}, {left_s / 60:.0f} min left", now=validation is not None)

    def _line(self, text: str, *, now: bool = False) -> None:
        if self._console.is_terminal or (not now and time.monotonic() - self._last_line < 60.0):
            return
        self._last_line = time.monotonic()
        self._console.print(text, highlight=False)


def _require_options(out: Path, steps: int | None, minutes: float | None, device: str, resume: bool) -> Path:
    import torch

    if out.suffix != ".safetensors":
        raise CommandError(f"--out {out}: a teacher is one .safetensors file; say {out.with_suffix('.safetensors')}")
    if steps is not None and minutes is not None:
        raise CommandError("--minutes and --steps both say how long to train; give one of them")
    if device not in ("cpu", "cuda"):
        raise CommandError(f"--device {device!r}: expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: this torch sees no CUDA device; use --device cpu, or install a CUDA build")
    working = working_path(out)
    if working.exists() and not resume:
        raise CommandError(
            f"{working} holds an unfinished run for this teacher; add --resume to go on with it, "
            "or delete the file to start anew"
        )
    return working
