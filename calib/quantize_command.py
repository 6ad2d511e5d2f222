"""`kizu quantize`: a bundle in int8 or fp8, if its verdicts stay what they were.

Owns the options and what is printed; the work is `quantize`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import typer

from edge.commands.engine_options import DeviceOption, engine_of
from edge.errors import CommandError


def quantize(
    bundle: Annotated[Path, typer.Argument(help="The bundle to quantize.")],
    good: Annotated[Path, typer.Option(help="Folder of images of good parts; some must not have been trained on.")],
    precision: Annotated[str, typer.Option(help="int8, or fp8 for GPUs from sm89 on.")],
    out: Annotated[Path, typer.Option(help="The new bundle.")],
    ranges: Annotated[str, typer.Option(help="Range finder: percentile, entropy or mse.")] = "mse",
    frames: Annotated[int, typer.Option(min=1, help="Good images that give the activations' ranges, at most.")] = 32,
    weight_bits: Annotated[
        int, typer.Option(min=7, max=8, help="7 for lines on x86 CPUs without VNNI, which add int8 products wrongly.")
    ] = 8,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER", help="Leave in float32; may be repeated, and a pattern such as '/scales.2/*'."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Labeled test set (test/good, test/KIND) for AUROC.")] = None,
    bad: Annotated[Path | None, typer.Option(help="Folder of images of bad parts for AUROC.")] = None,
    min_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Least share of frames that must get the same verdict.")
    ] = 0.95,
    max_auroc_drop: Annotated[float, typer.Option(min=0, max=1, help="Most that the image AUROC may fall.")] = 0.01,
    backend: Annotated[
        str | None, typer.Option(help="Engine for scores, as the line's; openvino for int8, onnxruntime for fp8.")
    ] = None,
    device: DeviceOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Write a bundle in int8 or fp8; refused if verdicts or AUROC change by more than allowed."""
    # SciPy and numba take a second to load: not for `--help`.
    from calib.agreement import Limits, table
    from calib.quantize import Request, quantize_bundle
    from calib.ranges import Finder, QuantizedPrecision
    from edge.bundle import open_bundle

    if out.exists():
        raise CommandError(f"--out {out}: exists already, and bundles are written once; give a new path")
    if not out.absolute().parent.is_dir():
        raise CommandError(f"--out {out}: its folder does not exist; make it first")
    chosen = _one_of(QuantizedPrecision, precision, "--precision")
    if chosen == "fp8" and weight_bits != 8:
        raise CommandError(f"--weight-bits {weight_bits}: goes with --precision int8 only; leave it out")
    request = Request(
        precision=chosen,
        finder=_one_of(Finder, ranges, "--ranges"),
        keep=tuple(keep or ()),
        frames=frames,
        weight_bits=weight_bits,
        engine=engine_of(backend or ("openvino" if chosen == "int8" else "onnxruntime"), device),
        limits=Limits(min_agreement, max_auroc_drop),
        bad=bad,
        data=data,
    )
    written, record = quantize_bundle(open_bundle(bundle), good, out, request)
    for warning in record.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if json:
        typer.echo(
            msgspec.json.encode({"bundle": str(out), "model_id": written.model_id, **msgspec.to_builtins(record)})
        )
        return
    typer.echo(table(record.agreement, record.precision))
    typer.echo(f"{len(record.ranges)} layers in {record.precision}; threshold: {record.threshold_rule}, provisional")
    typer.echo(f"bundle {out}, model_id {written.model_id}")


def _one_of(kind: Any, given: str, option: str) -> Any:
    known = get_args(kind)
    if given not in known:
        raise CommandError(f"{option} {given}: expected one of {', '.join(known)}")
    return given
