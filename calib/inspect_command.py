"""`kizu inspect BUNDLE [IMAGE|DIR ...]`: what a bundle is; with images, what it says of them, as a table and pictures.

Owns the options, the table and the files; scoring is `collect`, drawing is `edge.heatmap`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from edge.commands.engine_options import BackendOption, DeviceOption, PrecisionOption, engine_of
from edge.errors import CommandError

if TYPE_CHECKING:
    from calib.collect import Collected
    from edge.bundle import ModelBundle
    from edge.config import EngineConfig
    from edge.types import DefectRegion

PREVIEW_COLUMNS: Final = 96
"""Characters of a terminal preview; each shows two pixels, one above the other."""


def inspect(
    bundle: Annotated[Path, typer.Argument(help="The bundle's directory.")],
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE|DIR]...", help="Judge these; a folder is searched.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a picture of each here: photograph, map, regions.")
    ] = None,
    show: Annotated[bool, typer.Option(help="Draw each picture into this terminal too (24-bit color).")] = False,
    backend: BackendOption = "openvino",
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON and nothing else: an object, or one a line.")
    ] = False,
) -> None:
    """Show what a bundle is; with images, judge them as the line would and write pictures of map, mask and verdict.

    Raises:
        BundleError: a file of the bundle is missing, changed or malformed.
        CommandError: options without images, no image in what was given, or pictures that cannot be written.
    """
    from edge.bundle import open_bundle
    from edge.commands.inspect import show_bundle

    if not images and (out is not None or show):
        raise CommandError("--out and --show draw images: name some, kizu inspect BUNDLE IMAGE|DIR ...")
    opened = open_bundle(bundle)
    if not images:
        show_bundle(opened, as_json=as_json)
        return
    files = image_files(images)
    if out is not None:
        _make(out)
    with closing(judge(opened, files, engine_of(backend, device, precision))) as answers:
        for number, (answer, regions) in enumerate(answers):
            # The number keeps two files of one name apart.
            picture = None if out is None else out / f"{number:04}-{answer.path.stem}.png"
            if (picture is not None or show) and answer.anomaly_map is not None:
                _draw(opened, answer, regions, picture, show)
            typer.echo(_json(answer, regions) if as_json else _line(answer, regions))
    if out is not None and not as_json:
        typer.echo(f"{len(files)} images; pictures in {out}")


def image_files(given: Sequence[Path]) -> list[Path]:
    """The files in `given`, folders searched, in order of their names.

    Raises:
        CommandError: a path does not exist, or a folder holds no image.
    """
    from edge.images import IMAGE_SUFFIXES

    files: list[Path] = []
    for path in given:
        if not path.exists():
            raise CommandError(f"{path}: no such file or folder; give images, or folders of them")
        found = [path]
        if path.is_dir():
            found = sorted(one for one in path.rglob("*") if one.is_file() and one.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise CommandError(f"{path}: no image in it; expected {', '.join(sorted(IMAGE_SUFFIXES))}")
        files += found
    return files


def judge(
    bundle: ModelBundle, files: Sequence[Path], asked: EngineConfig
) -> Generator[tuple[Collected, tuple[DefectRegion, ...]], None, None]:
    """Each file's answer with its regions; a file that cannot be inspected is INCONCLUSIVE."""
    from calib.collect import collect
    from edge.bundle import check_golden
    from edge.opening import looseness, open_on
    from edge.stages.segment import Segment

    segment = Segment(bundle.calibration.pixel_threshold, max(1, bundle.calibration.min_area_px))
    with open_on(bundle, asked, max_batch=1) as engine:
        check_golden(bundle, engine, require=True, loose=looseness(asked, engine))
        for answer in collect(bundle, engine, files, skip_bad=True):
            anomaly_map = answer.anomaly_map
            yield answer, () if anomaly_map is None else segment(anomaly_map, answer.verdict.frame_size)


def preview(picture: Any) -> str:
    """(h, w, 3) RGB uint8 as lines of half blocks in 24-bit color, two rows of pixels a line."""
    from edge.images import cv2

    height = max(2, round(picture.shape[0] * PREVIEW_COLUMNS / picture.shape[1] / 2) * 2)
    small = cv2.resize(picture, (PREVIEW_COLUMNS, height), interpolation=cv2.INTER_AREA)
    lines = []
    for upper, lower in zip(small[0::2].tolist(), small[1::2].tolist(), strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out {out}: {error.strerror}; give a folder that can be written") from None


def _draw(
    bundle: ModelBundle, answer: Collected, regions: tuple[DefectRegion, ...], target: Path | None, show: bool
) -> None:
    from calib.dataset import read_stored_image
    from edge.heatmap import panels
    from edge.images import encode_png, write_atomically

    threshold = bundle.calibration.pixel_threshold
    drawn = panels(read_stored_image(answer.path), answer.anomaly_map, regions, threshold, max_side_px=512)
    if target is not None:
        try:
            write_atomically(target, encode_png(drawn))
        except OSError as error:
            raise CommandError(f"{target}: {error.strerror}; give a folder that can be written: --out DIR") from None
    if show:
        typer.echo(preview(drawn))


def _line(answer: Collected, regions: tuple[DefectRegion, ...]) -> str:
    verdict = answer.verdict
    if verdict.score is None or verdict.threshold is None:
        return f"{verdict.decision.value.upper():<13}{answer.path}: {answer.problem or verdict.detail}"
    area = sum(region.area_px for region in regions)
    marked = f"{len(regions)} regions, {area} px" if regions else "nothing marked"
    return (
        f"{verdict.decision.value.upper():<13}{answer.path}: {verdict.score:.4g} of {verdict.threshold:.4g}, {marked}"
    )


def _json(answer: Collected, regions: tuple[DefectRegion, ...]) -> str:
    import msgspec

    verdict = answer.verdict
    boxes = [{"box_xyxy": one.box_xyxy, "area_px": one.area_px, "peak": one.peak} for one in regions]
    facts = {
        "path": str(answer.path),
        "decision": verdict.decision.value,
        "reason": verdict.reason.value,
        "detail": answer.problem or verdict.detail,
        "score": verdict.score,
        "threshold": verdict.threshold,
        "p_value": verdict.p_value,
        "regions": boxes,
        "model_id": verdict.model_id,
    }
    return msgspec.json.encode(facts).decode()
