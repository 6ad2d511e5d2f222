"""`kizu evaluate`: how well a bundle tells a test set's defects from its good parts. Owns options, table and files.

The figures are `evaluation`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from edge.commands.engine_options import BackendOption, DeviceOption, PrecisionOption, engine_of
from edge.errors import CommandError

if TYPE_CHECKING:
    from calib.evaluation import Evaluation, Figures, Judged


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="The bundle to judge.")],
    data: Annotated[Path, typer.Option(help="Folder with test/good, test/KIND and ground_truth/KIND/STEM_mask.png.")],
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write all figures there as JSON; - is stdout.")
    ] = None,
    maps: Annotated[
        Path | None, typer.Option(help="Write test/KIND/STEM.tiff, float32, to this new or empty folder.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write one page with curves, costs and the worst images.")
    ] = None,
    backend: BackendOption = "openvino",
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    skip_bad_images: Annotated[
        bool, typer.Option(help="Count files that cannot be inspected as INCONCLUSIVE.")
    ] = False,
    refine: Annotated[
        bool, typer.Option(help="Look with the bundle's coarse graph first, as a line does; or densely everywhere.")
    ] = True,
    camera: Annotated[
        str | None, typer.Option(help="Whose pictures these are, if the bundle has thresholds by camera.")
    ] = None,
) -> None:
    """Judge a bundle on labeled images: AUROC, AU-PRO, false rejects and escapes, overall and per defect kind."""
    # SciPy and numba take a second to load: not for `--help`.
    from calib.evaluation import evaluate_bundle
    from edge.bundle import open_bundle
    from edge.images import write_atomically

    engine = engine_of(backend, device, precision)
    _check_targets(json, maps, report)
    opened = open_bundle(bundle)
    judged: list[Judged] = []
    result = evaluate_bundle(
        opened,
        data,
        through=engine,
        maps=maps,
        skip_bad=skip_bad_images,
        refine=refine,
        camera=camera,
        on_judged=judged.extend,
    )
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(table(result), err=json == "-")
    encoded = msgspec.json.encode(result)
    if json == "-":
        typer.echo(encoded)
    elif json is not None:
        write_atomically(Path(json), msgspec.json.format(encoded, indent=2) + b"\n")
    if report is not None:
        from calib.report import report_page

        write_atomically(report, report_page(result, judged, opened).encode())
        typer.echo(f"report: {report}", err=True)


def table(result: Evaluation) -> str:
    """Return the figures as text: the whole set, each kind, then the rates at the bundle's threshold."""
    head = (
        f"{'':<16}{'good+bad':>10}  {'image AUROC':<19}{'pixel AUROC':<19}{'AU-PRO .30':<19}{'AU-PRO .05':<19}escapes"
    )
    lines = [head, *(_line(name, figures) for name, figures in [("all", result), *result.kinds.items()])]
    kind = "certified" if result.certified else f"{result.threshold_kind}, not certified"
    lines += ["", f"threshold {result.threshold:.6g} ({kind})"]
    for name, rate, hits, of in (
        ("false rejects", "false_reject_rate", result.false_rejects, result.good),
        ("escapes", "escape_rate", result.escapes, result.defective),
    ):
        if of:
            low, high = result.intervals[rate]
            lines.append(
                f"{name:<14} {hits} of {of} = {100 * hits / of:.3g}% (95% interval {100 * low:.3g}-{100 * high:.3g}%)"
            )
    if result.tiles and result.tiles_refined is not None:
        share = 100 * result.tiles_refined / result.tiles
        lines.append(
            f"{'refined':<14} {result.tiles_refined} of {result.tiles} tiles = {share:.3g}%, the others coarsely"
        )
    return "\n".join(lines)


def _line(name: str, figures: Figures) -> str:
    columns = "".join(f"{_cell(figures, key):<19}" for key in ("image_auroc", "pixel_auroc", "au_pro_30", "au_pro_05"))
    return f"{name:<16}{f'{figures.good}+{figures.defective}':>10}  {columns}{figures.escapes}"


def _cell(figures: Figures, key: str) -> str:
    value = getattr(figures, key)
    if value is None:
        return "-"
    if key not in figures.intervals:
        return f"{value:.3f}"
    low, high = figures.intervals[key]
    return f"{value:.3f} ({low:.2f}-{high:.2f})"


def _check_targets(json: str | None, maps: Path | None, report: Path | None) -> None:
    """Refuse what could not be written before an hour is spent on it."""
    if report is not None:
        from calib.charts import require_matplotlib

        require_matplotlib()
        if not report.absolute().parent.is_dir():
            raise CommandError(f"--report {report}: its folder does not exist; make it first")
    if json not in (None, "-") and not Path(str(json)).absolute().parent.is_dir():
        raise CommandError(f"--json {json}: its folder does not exist; make it first")
    if maps is not None and maps.exists() and not (maps.is_dir() and not any(maps.iterdir())):
        raise CommandError(f"--maps {maps}: exists and is not an empty folder; give a new one")
