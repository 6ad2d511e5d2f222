"""`kizu train`: from a folder of good images to a bundle.

Owns the order of the work and what is printed.  Leaves reading to ``data``, learning to ``loop`` and the method, and
the bundle to ``export``.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

from edge.errors import CommandError

if TYPE_CHECKING:
    from calib.labels import Labeled
    from edge.bundle import InputSpec
    from trainer.config import MethodConfig, Schedule
    from trainer.data import Fit, Split, TrainingSet
    from trainer.loop import Outcome
    from trainer.method import Method
    from trainer.refine import RefineRequest

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells report SIGINT."""

Aspect = Literal["stretch", "keep"]


def train(
    method: Annotated[str, typer.Argument(help="Method, e.g. student-teacher.")],
    data: Annotated[Path, typer.Option(help="Folder of good images, or one that holds train/good.")],
    out: Annotated[Path, typer.Option(help="Bundle to write; must not exist.")],
    preset: Annotated[str | None, typer.Option(help="Named settings; default: the recommended ones.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Teachers by name or file, one a scale, by commas; default: the preset's.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of the preset, e.g. score=e; repeatable."),
    ] = None,
    photographs: Annotated[
        Path | None, typer.Option(help="Everyday photographs, for presets that are to know what a part is not.")
    ] = None,
    bad: Annotated[
        Path | None,
        typer.Option(help="A few flawed parts, for methods that learn from them; none of those to test with."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws students, image order and held-out images.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint of a stopped run.")] = False,
    minutes: Annotated[float | None, typer.Option(help="Train about this long instead of the preset's steps.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Train this many steps.")] = None,
    size: Annotated[int | None, typer.Option(min=64, max=4096, help="Side of the model's input in px.")] = None,
    fit: Annotated[
        str, typer.Option(help="resize (whole pictures), or tile (any size, at native resolution).")
    ] = "resize",
    aspect: Annotated[str, typer.Option(help="stretch, or keep (the rest filled by reflection).")] = "stretch",
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out files that are not usable images.")
    ] = False,
    holdout: Annotated[float, typer.Option(help="Share of the images never trained on (at least 6).")] = 0.2,
    part_regex: Annotated[
        str | None, typer.Option(help="What names the physical part in a file name; its images stay together.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Labels from `kizu console --annotate`: false rejects are good images too, defects are not."),
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(
            metavar="STRIDE[:RATE]",
            help="Look every STRIDE px first, compute densely only tiles that could matter; miss at most RATE (0.1%).",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
) -> None:
    """Learn what good parts look like and write a bundle with a provisional threshold."""
    _wait_politely()
    from calib.labels import open_labels
    from trainer.data import load_training_set, split_by_part
    from trainer.labeled import require_agreed
    from trainer.methods import METHODS
    from trainer.presets import choose_preset
    from trainer.refine import RefineRequest

    shorthand = {"teachers": teacher, "size_px": size, "photographs": photographs, "bad": bad}
    config = _configure(method, choose_preset(method, preset), settings or [], shorthand)
    chosen_aspect = _require_options(aspect, device, out, minutes, steps)
    chosen_fit = _require_fit(fit, chosen_aspect)
    chosen_refine = None if refine is None else RefineRequest.parse(refine)
    _require_fair(config, data, chosen_aspect, chosen_fit)
    _require_clear_start(checkpoint_path(out), resume)
    labeled = None if labels is None else open_labels(labels)
    if labeled is not None and (folder := getattr(config, "bad", None)) is not None:
        require_agreed(labeled, Path(folder))
    _use_threads(threads)
    # Before the images: a missing teacher is told at once.
    learner = METHODS[method](config, seed=seed, device=device)

    found = load_training_set(
        data, size_px=config.size_px, aspect=chosen_aspect, skip_bad=skip_bad_images, fit=chosen_fit, labels=labeled
    )
    split = split_by_part(
        found.names, found.file_sha256, share=holdout, seed=seed, part_regex=part_regex, parts=found.labels.parts
    )
    _print_data(found, split)
    if labeled is not None:
        _print_labels(found, labeled)
    job = _Job(learner, found, split, config, seed, chosen_aspect, chosen_fit, out, chosen_refine)
    _require_joinable(job)
    _require_refinable(job)

    schedule, outcome = _learn(job, steps=steps, minutes=minutes, resume=resume)
    if not outcome.finished:
        print(f"stopped after {outcome.steps} steps; go on with:\n  {_resume_command()}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED)
    _finish(job, schedule, outcome)
    checkpoint_path(out).unlink(missing_ok=True)


def checkpoint_path(out: Path) -> Path:
    """Where a run that writes the bundle ``out`` keeps its checkpoint: beside it, until that is written."""
    return out.with_name(f"{out.name}.training.safetensors")


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """What is trained on what, for which bundle; fixed once the images are read."""

    learner: Method
    found: TrainingSet
    split: Split
    config: MethodConfig
    seed: int
    aspect: Aspect
    fit: Fit
    out: Path
    refine: RefineRequest | None = None


def _wait_politely() -> None:
    """Let idle OpenMP threads sleep; must come before torch is imported.

    They spin by default: with other work on the machine's two cores a step then took 4.5 x longer (1.48 s against
    0.33 s) and 4.5 x more CPU time.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


_OPTION_OF = {"teachers": "--teacher", "size_px": "--size", "photographs": "--photographs", "bad": "--bad"}
"""Options that say the same as a setting, by that setting."""


def _configure(
    method: str, config: MethodConfig, settings: list[str], shorthand: dict[str, str | int | Path | None]
) -> MethodConfig:
    """The preset with what the command line changes of it; options are refused where the method has no such setting."""
    from trainer.config import override

    given = {key: value for key, value in shorthand.items() if value is not None}
    for key, value in given.items():
        if not hasattr(config, key):
            raise CommandError(
                f"{_OPTION_OF[key]} {value}: {method} has no use for it; leave it out, or choose another method"
            )
    return override(config, [*settings, *(f"{key}={value}" for key, value in given.items())])


def _require_fair(config: MethodConfig, data: Path, aspect: Aspect, fit: Fit) -> None:
    """Refuse bad parts that are tested with, or that the runtime would show otherwise than they were learned from."""
    from trainer.negatives import require_unseen

    bad = getattr(config, "bad", None)
    if bad is None:
        return
    if (aspect, fit) != ("stretch", "resize"):
        raise CommandError(
            f"--bad {bad}: bad parts are stretched to the model's input, so the good ones must be too; leave out "
            f"{'--fit tile' if fit == 'tile' else '--aspect keep'}"
        )
    require_unseen(Path(bad), data)


def _require_options(aspect: str, device: str, out: Path, minutes: float | None, steps: int | None) -> Aspect:
    import torch

    if minutes is not None and steps is not None:
        raise CommandError("--minutes and --steps both say how long to train; give one of them")
    if out.exists() or out.is_symlink():
        raise CommandError(f"--out {out} exists; bundles are written once: choose another name or remove it")
    if not out.parent.is_dir():
        raise CommandError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    if device not in ("cpu", "cuda"):
        raise CommandError(f"--device {device!r}: expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: this torch sees no CUDA device; use --device cpu, or install a CUDA build")
    if aspect == "stretch":
        return "stretch"
    if aspect == "keep":
        return "keep"
    raise CommandError(f"--aspect {aspect!r}: expected stretch or keep")


def _require_fit(fit: str, aspect: Aspect) -> Fit:
    if fit == "resize":
        return "resize"
    if fit != "tile":
        raise CommandError(f"--fit {fit!r}: expected resize or tile")
    if aspect != "stretch":
        raise CommandError(f"--aspect {aspect} says how pictures are resized, and --fit tile does not; leave it out")
    return "tile"


def _require_joinable(job: _Job) -> None:
    """Refuse a map that cannot be put together from tiles now, and not after the training."""
    from edge.stages.tile import tiling_of

    if job.fit == "tile" and not job.learner.local:
        # A tile's own mean, say, differs from its neighbor's: the stitched map would have seams.
        raise CommandError(
            f"--fit tile needs a map whose cells do not depend on the whole picture, and those of {job.learner.name} "
            "do with these settings; use --fit resize, or drocc, or student-teacher with center = none, a metric other "
            "than placed, no auto-encoder, and one scale or --set pad=zero with one stride"
        )
    tiling_of(_input_spec(job, 1), job.learner.map_geometry(job.config.size_px, job.config.size_px))


def _require_refinable(job: _Job) -> None:
    """Refuse a coarse look that the method or the held-out images cannot give now, and not after the training."""
    from trainer.refine import coarse_geometry, require_tiles

    if job.refine is not None:
        coarse_geometry(job.learner, _input_spec(job, 1), job.refine)
        require_tiles(sum(job.found.crops[place] for place in job.split.threshold), job.refine)


def _require_clear_start(checkpoint: Path, resume: bool) -> None:
    if checkpoint.exists() and not resume:
        raise CommandError(
            f"{checkpoint} holds an unfinished training for this bundle; add --resume to go on with it, "
            "or delete the file to start anew"
        )
    if resume and not checkpoint.exists():
        print(f"no checkpoint at {checkpoint}: starting from the beginning")


def _use_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _print_data(found: TrainingSet, split: Split) -> None:
    for bad in found.skipped:
        print(f"skipped {bad.name}: {bad.problem}", file=sys.stderr)
    skipped = f", {len(found.skipped)} files skipped" if found.skipped else ""
    kind = "gray" if found.channels == 1 else "color"
    held = len(set(split.statistics) | set(split.threshold))
    crops = f", in {len(found.frames)} crops" if len(found.frames) > len(found.names) else ""
    print(
        f"{len(found.names)} good images ({kind}{crops}{skipped}): {len(split.train)} to learn from, {held} set aside"
    )
    if split.shared:
        print("map statistics and threshold share the images set aside (40 of them would allow disjoint halves)")


def _print_labels(found: TrainingSet, labeled: Labeled) -> None:
    learned = len(found.labels.added.keys() & set(found.names))
    print(f"{learned} of these are false rejects from {labeled.file}, which `kizu calibrate` will not take again")
    if found.labels.defects:
        print(f"left out, real defects by that file: {', '.join(found.labels.defects)}", file=sys.stderr)
    if labeled.pictureless:
        print(f"{labeled.pictureless} labels have no picture and count for nothing here", file=sys.stderr)


def _learn(job: _Job, *, steps: int | None, minutes: float | None, resume: bool) -> tuple[Schedule, Outcome]:
    """Train; the returned schedule says how many steps `--minutes` came to."""
    from trainer.loop import Outcome, checkpoint_progress, plan_steps, run_training
    from trainer.progress import TerminalReporter, stop_on_signals

    checkpoint = checkpoint_path(job.out)
    frames = job.found.take(job.split.train)
    job.learner.prepare(frames)
    if not any(True for _ in job.learner.trainable.parameters()):
        print("nothing to train: this preset measures parts by what its teachers say of good ones")
        return job.config.schedule(len(frames)), Outcome(True, 0, (), 0.0)
    start, planned = checkpoint_progress(checkpoint) if resume and checkpoint.exists() else (0, None)
    schedule = job.config.schedule(len(frames))
    if steps is not None:
        schedule = replace(schedule, steps=steps)
    elif minutes is not None and planned is not None:
        schedule = replace(schedule, steps=planned)  # the interrupted run has timed its steps already
    elif minutes is not None:
        schedule = plan_steps(job.learner, frames, schedule, minutes=minutes, seed=job.seed)
        print(f"{minutes:g} minutes are about {schedule.steps} steps here; --steps {schedule.steps} repeats this run")
    if planned is not None:
        print(f"going on at step {start} of {schedule.steps}")
    with stop_on_signals() as stopped, TerminalReporter("training", start_step=start) as report:
        outcome = run_training(
            job.learner,
            frames,
            job.found.take(job.split.statistics),
            schedule,
            seed=job.seed,
            identity=_identity(job),
            checkpoint=checkpoint,
            resume=resume,
            report=report,
            stopped=stopped,
        )
    return schedule, outcome


def _identity(job: _Job) -> dict[str, Any]:
    """What two runs must share for one to go on with the other's checkpoint, beside the schedule."""
    described = job.learner.describe()
    teachers = [scale.get("teacher", {}).get("sha256", "none") for scale in described.get("scales", [described])]
    return {
        "config": job.config.to_json(),
        "seed": job.seed,
        "data_sha256": job.found.data_sha256,
        "images learned from": len(job.split.train),
        "aspect": job.aspect,
        # Only where it is new: checkpoints of the time before are of resized images.
        **({"fit": job.fit} if job.fit != "resize" else {}),
        "teacher_sha256": ", ".join(teachers),
        # The folders' names are in the settings; what lies in them is not.
        **{f"{key} seen": described[key] for key in ("bad", "photographs") if key in described},
    }


def _finish(job: _Job, schedule: Schedule, outcome: Outcome) -> None:
    from trainer.data import digest_of
    from trainer.export import MAX_BATCH, BundleFacts, export_bundle
    from trainer.refine import describe
    from trainer.training_page import FILE, training_page

    found, split = job.found, job.split
    print(f"fitting the map's statistics on {len(split.statistics)} held-out images")
    job.learner.fit_statistics(found.take(split.statistics))
    if choice := job.learner.describe().get("choice"):
        told = choice["told"]
        print(f"maps that are summed: {', '.join(choice['kept'])}")
        print(f"they tell planted flaws from good parts by {told['chosen']:.3f}, all together by {told['all']:.3f}")
    facts = BundleFacts(
        name=job.out.name,
        method=job.learner.name,
        preset=job.config.preset,
        input=_input_spec(job, MAX_BATCH),
        calibration_sha256=digest_of(found, split.threshold),
        statistics_shared=split.shared,
        provenance=_provenance(job, schedule, outcome),
    )
    whole = found.paths(split.threshold) if job.fit == "tile" else None
    held_out = found.take(split.threshold)
    bundle = export_bundle(
        job.learner, job.out, facts, held_out=held_out, whole_images=whole, refine=job.refine,
        report=lambda draft: {FILE: training_page(draft, outcome.curve).encode()},
    )  # fmt: skip
    print(f"wrote {job.out}, model {bundle.model_id[:12]}, after {outcome.elapsed_s / 60:.1f} min of training")
    print(f"what it learned, as a page: {job.out / 'report' / FILE}")
    print(
        f"provisional threshold {bundle.calibration.threshold:.4g} from {len(split.threshold)} good images, not "
        f"certified; next: kizu calibrate {job.out} --good DIR --false-rejects RATE --out BUNDLE"
    )
    if bundle.manifest.refine is not None:
        print(describe(bundle.manifest.refine, bundle.provenance["refine"]))


def _input_spec(job: _Job, max_batch: int) -> InputSpec:
    from edge.bundle import InputSpec
    from edge.stages.tile import smallest_side_px

    side, channels = job.config.size_px, job.found.channels
    spec = InputSpec(height=side, width=side, channels=channels, max_batch=max_batch, fit=job.fit, aspect=job.aspect)
    if job.fit == "resize":
        return spec
    # At its own size a picture is judged only if it holds what one cell sees.
    least = max(spec.min_side_px, smallest_side_px(job.learner.map_geometry(side, side)))
    return msgspec.structs.replace(spec, min_side_px=least)


def _provenance(job: _Job, schedule: Schedule, outcome: Outcome) -> dict[str, Any]:
    found, split = job.found, job.split
    return {
        "command": shlex.join(["kizu", *sys.argv[1:]]),
        "seed": job.seed,
        "config": job.config.to_json(),
        "data": {
            "sha256": found.data_sha256,
            "images": len(found.names),
            "train": len(split.train),
            "statistics": [found.names[place] for place in split.statistics],
            "threshold": [found.names[place] for place in split.threshold],
            "skipped": [f"{bad.name}: {bad.problem}" for bad in found.skipped],
            **({"false_rejects": list(found.labels.added)} if found.labels.added else {}),
            **({"real_defects": list(found.labels.defects)} if found.labels.defects else {}),
        },
        # `kizu calibrate` refuses these images and `kizu evaluate` points them out, by what is in the file.
        "training_files": sorted(found.file_sha256[place] for place in split.train),
        "held_out_files": sorted({found.file_sha256[place] for place in [*split.statistics, *split.threshold]}),
        "method": job.learner.describe(),
        "training": {
            "schedule": asdict(schedule),
            "steps": outcome.steps,
            "seconds": round(outcome.elapsed_s, 1),
            "curve": [[point.step, point.loss, point.held_out_loss] for point in outcome.curve],
            **_only_some_have(outcome),
        },
        "versions": versions(),
    }


def _only_some_have(outcome: Outcome) -> dict[str, Any]:
    """The terms of a loss that has several, and the step whose weights were kept where patience chose one."""
    found: dict[str, Any] = {}
    if any(point.terms for point in outcome.curve):
        found["terms"] = [point.terms for point in outcome.curve]
    if outcome.best_step is not None:
        found["best_step"] = outcome.best_step
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the result."""
    found = {"python": platform.python_version()}
    for package in ("kizu", "torch", "numpy", "opencv-python-headless", "onnx", "onnxruntime", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _resume_command() -> str:
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return shlex.join(["kizu", *arguments, "--resume"])
