"""`kizu sizes`: how small a defect may be and still be found, shown on defects planted into good parts.

Owns the options, the table and the files; the trials are `sizes`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from edge.commands.engine_options import BackendOption, DeviceOption, PrecisionOption, engine_of
from edge.errors import CommandError

if TYPE_CHECKING:
    from calib.places import Box
    from calib.planting import Kind
    from calib.sizes import SizesReport

DEFAULT_SIZES_PX = "2,3,4,6,8,12,16,24,32"


def sizes(
    bundle: Annotated[Path, typer.Argument(help="The bundle as the line runs it.")],
    good: Annotated[Path, typer.Option(help="Folder of images of good parts, none of them trained on.")],
    kinds: Annotated[str, typer.Option(help="What is planted: spot, scratch, dent.")] = "spot,scratch,dent",
    contrasts: Annotated[
        str, typer.Option(help="Gray levels by which it differs from what it covers; dark is negative.")
    ] = "-30,-60",
    sizes: Annotated[
        str | None,
        typer.Option(help=f"Diameters and lengths, in px ({DEFAULT_SIZES_PX}), or in mm with a --calibration."),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, max=100_000, help="Defects of each kind, contrast, region and size.")
    ] = 61,
    probability: Annotated[float, typer.Option(help="Share that must be found ...")] = 0.9,
    confidence: Annotated[float, typer.Option(help="... and how sure that must be.")] = 0.95,
    grid: Annotated[str, typer.Option(help="ROWSxCOLUMNS regions, each with a curve of its own.")] = "1x1",
    masks: Annotated[
        Path | None, typer.Option(help="Instead of --grid: a folder of masks, each file a region of its name.")
    ] = None,
    roi: Annotated[str | None, typer.Option(help="x,y,width,height in px, as the line's cameras.roi_xywh.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="The camera's calibration: its flat field is applied, sizes are in mm.")
    ] = None,
    rules: Annotated[Path | None, typer.Option(help="The camera's rule file: found is then what it rejects.")] = None,
    blur: Annotated[
        float, typer.Option(min=0.0, max=50.0, help="Standard deviation in px of a blur, as of a lens out of focus.")
    ] = 0.0,
    seen_by: Annotated[
        str | None, typer.Option("--camera", help="Whose pictures these are, if the bundle has thresholds by camera.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed plants the same defects.")] = 0,
    backend: BackendOption = "openvino",
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write everything there as JSON; - is stdout.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Write the curves there as a PNG.")] = None,
) -> None:
    """Report the smallest defect found with 90 % probability at 95 % confidence, by kind, contrast and region.

    Plants spots, scratches and dents of known size and contrast at random places into held-out good parts, and lets the
    line's own preprocessing, engine, threshold and rules look at them. Synthetic defects are a yardstick, comparable
    between models, lenses and lights; they are not your defects (docs/sizes.md).

    Raises:
        CommandError: an option cannot be used as given.
        DataError: an image was trained on, cannot be inspected, or has no room for a size.
    """
    from calib.sizes import find_sizes
    from calib.smallest import require_trials
    from calib.trials import Plan
    from edge.bundle import open_bundle
    from edge.camera import open_camera
    from edge.images import write_atomically
    from edge.rules import load_rules

    camera = None if calibration is None else open_camera(calibration)
    in_mm = camera is not None and camera.has_scale
    if sizes is None and in_mm:
        raise CommandError("--sizes: with a calibration that knows millimeters, say which sizes in mm")
    known_rules = None if rules is None else load_rules(rules)
    if known_rules is not None and known_rules.in_mm and not in_mm:
        raise CommandError(f"--rules {rules}: {known_rules.in_mm} is in millimeters; give a --calibration with a scale")
    require_trials(trials, probability=probability, confidence=confidence)
    for option, path in (("--json", None if json in (None, "-") else Path(str(json))), ("--picture", picture)):
        if path is not None and not path.absolute().parent.is_dir():
            raise CommandError(f"{option} {path}: its folder does not exist; make it first")
    plan = Plan(
        kinds=_kinds(kinds),
        contrasts=_numbers(contrasts, "--contrasts", "gray levels other than 0, at most 255", -255, 255),
        sizes=_numbers(sizes or DEFAULT_SIZES_PX, "--sizes", "sizes above 0", 0, 1e5),
        trials=trials,
        probability=probability,
        confidence=confidence,
        grid=_grid(grid),
        masks=masks,
        blur_px=blur,
        seed=seed,
    )
    report = find_sizes(
        open_bundle(bundle),
        good,
        plan,
        engine=engine_of(backend, device, precision),
        roi_xywh=_roi(roi),
        camera=camera,
        rules=known_rules,
        seen_by=seen_by,
    )
    for warning in report.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(table(report), err=json == "-")
    encoded = msgspec.json.encode(report)
    if json == "-":
        typer.echo(encoded.decode())
    elif json is not None:
        write_atomically(Path(json), msgspec.json.format(encoded, indent=2) + b"\n")
    if picture is not None:
        from calib.sizes_picture import draw

        write_atomically(picture, draw(report))


def table(report: SizesReport) -> str:
    """One line a curve: the size reported, and hits at every size tried."""
    lines = [
        f"{'kind':<9}{'contrast':>9}  {'region':<18}{f'smallest, {report.unit}':<14}found at each size",
        *(
            f"{curve.kind:<9}{curve.contrast:>+9g}  {curve.region:<18}"
            f"{'none' if curve.smallest is None else f'{curve.smallest:g}':<14}"
            + "  ".join(f"{point.size:g}: {point.hits}/{point.trials}" for point in curve.points)
            for curve in report.curves
        ),
        "",
        f"smallest: found with {report.probability:.0%} probability at {report.confidence:.0%} confidence, and so is "
        "every larger size tried",
    ]
    if report.rejected_as_they_are:
        names = ", ".join(report.rejected_as_they_are[:5])
        lines.append(f"left out: {len(report.rejected_as_they_are)} images are rejected as they are: {names}")
    return "\n".join(lines)


def _kinds(text: str) -> tuple[Kind, ...]:
    from calib.planting import KINDS

    given = [word.strip() for word in text.split(",")]
    if wrong := [word for word in given if word not in KINDS]:
        raise CommandError(f"--kinds {text}: {wrong[0]!r} is not known; expected some of {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in given)


def _numbers(text: str, option: str, what: str, low: float, high: float) -> tuple[float, ...]:
    try:
        given = tuple(dict.fromkeys(float(word) for word in text.split(",")))
    except ValueError:
        given = ()
    if not given or not all(low <= value <= high and value != 0 for value in given):
        raise CommandError(f"{option} {text}: expected {what}, with commas between them")
    return given


def _grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.lower().partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and 1 <= int(rows) * int(columns) <= 64):
        raise CommandError(f"--grid {text}: expected ROWSxCOLUMNS, as 2x3, at most 64 regions")
    return int(rows), int(columns)


def _roi(text: str | None) -> Box | None:
    if text is None:
        return None
    words = text.split(",")
    if len(words) != 4 or not all(word.strip().isdecimal() for word in words) or min(map(int, words[2:])) < 1:
        raise CommandError(f"--roi {text}: expected x,y,width,height in pixels")
    x, y, width, height = map(int, words)
    return x, y, width, height
