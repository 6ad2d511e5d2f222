"""`kizu calibrate`: certify a bundle's threshold on good parts it has never seen, and write it as a new bundle.

Owns the options and the table; the work is `certificate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from edge.commands.engine_options import BackendOption, DeviceOption, PrecisionOption, engine_of
from edge.errors import CommandError

if TYPE_CHECKING:
    from calib.promise import Certificate, Promise
    from calib.request import MinArea
    from edge.config import EdgeConfig


def calibrate(
    bundle: Annotated[Path, typer.Argument(help="The trained bundle.")],
    good: Annotated[Path, typer.Option(help="Folder of images of good parts; none of them may have been trained on.")],
    false_rejects: Annotated[str, typer.Option(metavar="RATE", help="Good parts that may be rejected: 0.01 or 1%.")],
    out: Annotated[Path, typer.Option(help="The new bundle.")],
    confidence: Annotated[str, typer.Option(metavar="C", help="How sure that must be: 0.95 or 95%.")] = "0.95",
    parts: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Which files show one part: columns file,part[,camera].")
    ] = None,
    part_pattern: Annotated[
        str | None, typer.Option(metavar="REGEX", help="The same by path: '(?P<part>[^/]+)/.*' is a folder a part.")
    ] = None,
    block: Annotated[
        str | None, typer.Option(metavar="N[:GAP]", help="Without part numbers: N frames in a row count as one part.")
    ] = None,
    bad: Annotated[Path | None, typer.Option(help="Folder of bad parts: how many pass; they change nothing.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="What people said at `kizu console`: false rejects are good, defects are not.")
    ] = None,
    line: Annotated[Path | None, typer.Option(help="The line's TOML file: regions of interest of its cameras.")] = None,
    zones: Annotated[Path | None, typer.Option(help="Zones, a threshold each: TOML file or mask picture.")] = None,
    min_area: Annotated[
        str | None,
        typer.Option(metavar="PX|certify", help="Smallest defect region; certify: from the good parts. As before."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="The page to sign; default: OUT.certificate.html.")
    ] = None,
    backend: BackendOption = "openvino",
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    skip_bad_images: Annotated[bool, typer.Option(help="Leave files that cannot be inspected out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Certify a threshold: at most RATE of good parts rejected, with confidence C, from other good parts."""
    # SciPy and numba take a second to load: not for `--help`.
    from calib.certificate import certify_parts
    from calib.certificate_page import certificate_page
    from calib.parts import grouping_of
    from calib.request import Request
    from calib.threshold import parse_rate
    from calib.zone_files import read_zones
    from edge.bundle import open_bundle
    from edge.config import load_config
    from edge.images import write_atomically
    from edge.opening import why_not_certified

    runs = None if line is None else load_config(line)
    flat_fields = {} if runs is None else _flat_fields(runs)
    request = Request(
        false_rejects=parse_rate(false_rejects, "--false-rejects"),
        confidence=parse_rate(confidence, "--confidence"),
        min_area_px=_min_area(min_area),
        engine=engine_of(backend, device, precision),
        skip_bad=skip_bad_images,
        grouping=grouping_of(parts, part_pattern, block),
        bad=bad,
        labels=labels,
        line=None if runs is None else {camera.name: camera.roi_xywh for camera in runs.cameras},
        flat_fields=flat_fields,
        zones={} if zones is None else read_zones(zones),
    )
    page = report or out.with_name(f"{out.name}.certificate.html")
    for option, path in (("--out", out), ("--report", page)):
        if path.exists():
            raise CommandError(f"{option} {path}: exists already, and is written once; give a new path")
        if not path.absolute().parent.is_dir():
            raise CommandError(f"{option} {path}: its folder does not exist; make it first")
    source = open_bundle(bundle)
    certified = certify_parts(source, good, out, request)
    write_atomically(page, certificate_page(certified).encode())
    if runs is not None:
        if (why := why_not_certified(certified.bundle.calibration, runs.engine)) is not None:
            typer.echo(f"warning: {line}: the certificate will not hold on this line: {why}", err=True)
        for camera in flat_fields:
            typer.echo(
                f"warning: {line}: camera {camera} has a flat field, which its pictures in {good} must have too: the "
                "certificate holds only if they are what `kizu correct` makes",
                err=True,
            )
    for warning in certified.certificate.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if source.signed_by is not None:
        # Whoever signed the source vouched for its thresholds, not for these.
        typer.echo(f"warning: {bundle} is signed, {out} is not: run `kizu sign {out} --key FILE`", err=True)
    typer.echo(msgspec.json.encode(certified.certificate) if json else table(certified.certificate))
    typer.echo(f"page to sign: {page}", err=json)


def _flat_fields(line: EdgeConfig) -> dict[str, str]:
    """The flat fields of cameras whose frames the line corrects; whether a picture was corrected, no file can tell."""
    from edge.camera import open_camera

    known = {one.name: open_camera(Path(one.calibration)) for one in line.cameras if one.calibration is not None}
    ids = {name: camera.flat_field_id for name, camera in known.items()}
    return {name: flat_field for name, flat_field in ids.items() if flat_field is not None}


def _min_area(text: str | None) -> MinArea:
    if text is None or text == "certify":
        return "certify" if text else None
    if not text.isdecimal() or int(text) < 1:
        raise CommandError(f"--min-area {text!r}: expected pixels, at least 1, or the word certify")
    return int(text)


def table(certificate: Certificate) -> str:
    """Return the certificate as text: the promise first, then what it stands on."""
    from calib.threshold import percent

    extra = [f"{len(group)} {what}" for group, what in (
        (certificate.duplicates, "more with the same bytes as another, counted once"), (certificate.skipped, "skipped"),
    ) if group]  # fmt: skip
    if certificate.images != certificate.parts:
        extra.insert(0, f"{certificate.images:,} pictures")
    rows = [
        (
            "certified",
            f"at most {percent(certificate.false_rejects)} of good parts rejected, "
            f"with {percent(certificate.confidence)} confidence",
        ),
        ("bound reached", percent(certificate.certified_rate)),
        ("good parts", "; ".join([f"{certificate.parts:,}", *extra])),
        ("one part is", certificate.grouping),
    ]
    for camera, promise in (certificate.cameras or {"": certificate}).items():
        rows += [(f"camera {camera}", f"{promise.parts:,} good parts")] if camera else []
        rows += _promise_rows(promise)
    rows += [
        ("engine", certificate.engine),
        (
            "for a tenth",
            f"{percent(certificate.false_rejects / 10)} would need {certificate.parts_for_a_tenth:,} good parts",
        ),
        ("bundle", f"{certificate.bundle}, model_id {certificate.model_id}"),
    ]
    left_out = [f"  {name}: same bytes as {first}" for name, first in certificate.duplicates.items()]
    left_out += [f"  {problem}" for problem in certificate.skipped.values()]
    left_out += [f"  {certificate.spacing} frames between two blocks"] if certificate.spacing else []
    return "\n".join([*(f"{name:<16}{text}" for name, text in rows), *(["left out"] if left_out else []), *left_out])


def _promise_rows(promise: Promise) -> list[tuple[str, str]]:
    from calib.threshold import percent

    rows = [
        (
            "threshold",
            f"{promise.threshold:.6g}: {promise.rule}; reject above it",
        ),
        ("before", f"{promise.previous_threshold:.6g}, which rejects {promise.rejected_before} of these good parts"),
        ("pixel threshold", f"{promise.pixel_threshold:.6g}, regions of at least {promise.min_area_px} px"),
        *((f"zone {name}", f"threshold {value:.6g}") for name, value in promise.zones.items()),
    ]
    if promise.suspects:
        rows.append(("suspect", f"{', '.join(promise.suspects)}: look whether these are good parts; they count"))
    if (escapes := promise.escapes) is not None:
        rows.append(
            (
                "bad parts",
                f"{escapes.escaped} of {escapes.parts} pass; of parts like these at most {percent(escapes.bound)}",
            )
        )
    return rows
