"""`kizu calibrate`: certify a bundle's threshold on good parts it has never seen, and write it as a new bundle.

Owns the options and the table; the work is `certificate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from edge.errors import CommandError

if TYPE_CHECKING:
    from calib.certificate import Certificate


def calibrate(
    bundle: Annotated[Path, typer.Argument(help="The trained bundle.")],
    good: Annotated[Path, typer.Option(help="Folder of images of good parts; none of them may have been trained on.")],
    false_rejects: Annotated[str, typer.Option(metavar="RATE", help="Good parts that may be rejected: 0.01 or 1%.")],
    out: Annotated[Path, typer.Option(help="The new bundle.")],
    confidence: Annotated[str, typer.Option(metavar="C", help="How sure that must be: 0.95 or 95%.")] = "0.95",
    min_area: Annotated[
        int | None, typer.Option(min=1, help="Smallest defect region in pixels; default: as before.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Engine: openvino, onnxruntime or fake; the line must use the same.")
    ] = "openvino",
    skip_bad_images: Annotated[bool, typer.Option(help="Leave files that cannot be inspected out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Certify a threshold: at most RATE of good parts rejected, with confidence C, from other good parts."""
    # SciPy and numba take a second to load: not for `--help`.
    from calib.certificate import certify
    from calib.threshold import parse_rate
    from edge.bundle import open_bundle
    from edge.engines.registry import require_backend

    rate, sure = parse_rate(false_rejects, "--false-rejects"), parse_rate(confidence, "--confidence")
    if out.exists():
        raise CommandError(f"--out {out}: exists already, and bundles are written once; give a new path")
    if not out.absolute().parent.is_dir():
        raise CommandError(f"--out {out}: its folder does not exist; make it first")
    source = open_bundle(bundle)
    certificate = certify(
        source,
        good,
        out,
        false_rejects=rate,
        confidence=sure,
        min_area_px=min_area,
        backend=require_backend(backend, CommandError),
        skip_bad=skip_bad_images,
    )
    for warning in certificate.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if source.signed_by is not None:
        # Whoever signed the source vouched for its thresholds, not for these.
        typer.echo(f"warning: {bundle} is signed, {out} is not: run `kizu sign {out} --key FILE`", err=True)
    typer.echo(msgspec.json.encode(certificate) if json else table(certificate))


def table(certificate: Certificate) -> str:
    """Return the certificate as text: the promise first, then what it stands on."""
    from calib.threshold import percent

    extra = [f"{len(group)} {what}" for group, what in (
        (certificate.duplicates, "more with the same bytes as another, counted once"), (certificate.skipped, "skipped"),
    ) if group]  # fmt: skip
    rows = [
        (
            "certified",
            f"at most {percent(certificate.false_rejects)} of good parts rejected, "
            f"with {percent(certificate.confidence)} confidence",
        ),
        ("bound reached", percent(certificate.certified_rate)),
        ("good parts", "; ".join([f"{certificate.parts:,}", *extra])),
        (
            "threshold",
            f"{certificate.threshold:.6g}, number {certificate.rank:,} of {certificate.parts:,} scores, ascending; "
            f"reject above it ({_exceedances(certificate)})",
        ),
        (
            "before",
            f"{certificate.previous_threshold:.6g}, which rejects {certificate.rejected_before} of these good parts",
        ),
        ("pixel threshold", f"{certificate.pixel_threshold:.6g}, regions of at least {certificate.min_area_px} px"),
        ("engine", certificate.engine),
        (
            "for a tenth",
            f"{percent(certificate.false_rejects / 10)} would need {certificate.parts_for_a_tenth:,} good parts",
        ),
        ("bundle", f"{certificate.bundle}, model_id {certificate.model_id}"),
    ]
    left_out = [f"  {name}: same bytes as {first}" for name, first in certificate.duplicates.items()]
    left_out += [f"  {problem}" for problem in certificate.skipped.values()]
    return "\n".join([*(f"{name:<16}{text}" for name, text in rows), *(["left out"] if left_out else []), *left_out])


def _exceedances(certificate: Certificate) -> str:
    return (
        f"{certificate.allowed_exceedances} of the sample may lie above"
        if certificate.allowed_exceedances
        else "the sample's maximum"
    )
