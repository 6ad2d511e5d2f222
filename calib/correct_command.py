"""`kizu correct`: pictures as the line's model will see them, for training and score calibration.

Owns walking the folders; the correction is the runtime's own, `edge.stages.flatfield`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge.errors import CommandError, DataError, ImageRefused

GROUND_TRUTH = "ground_truth"


def correct(
    calibration: Annotated[Path, typer.Argument(help="A camera calibration with a flat field, from `kizu camera`.")],
    images: Annotated[Path, typer.Option(help="Folder of pictures as the camera took them; its subfolders too.")],
    out: Annotated[Path, typer.Option(help="New folder: the same names, as PNG.")],
) -> None:
    """Apply a camera's flat field to recorded pictures, exactly as the daemon does to frames.

    A model that will see corrected frames must be trained, and its threshold certified, on corrected pictures.

    Raises:
        CommandError: the calibration has no flat field, or --out exists.
        DataError: a picture cannot be read or is of another size; nothing after it is written.
    """
    from calib.dataset import read_stored_image
    from calib.progress import progress
    from edge.camera import open_camera
    from edge.images import IMAGE_SUFFIXES, encode_png, write_atomically
    from edge.stages.flatfield import flat_field_of

    flat = flat_field_of(open_camera(calibration))
    if flat is None:
        raise CommandError(f"{calibration} has no flat field: there is nothing to correct; see `kizu camera --flat`")
    if out.exists():
        raise CommandError(f"--out {out}: exists already; give a new folder")
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise DataError(f"{images}: no pictures in it; expected {', '.join(sorted(IMAGE_SUFFIXES))}")
    with progress("correct", len(paths)) as advance:
        for done, path in enumerate(paths):
            target = (out / path.relative_to(images)).with_suffix(".png")
            try:
                # A mask is no picture of light.
                is_mask = GROUND_TRUTH in path.relative_to(images).parts
                corrected = read_stored_image(path) if is_mask else flat(read_stored_image(path))
            except ImageRefused as error:
                raise DataError(f"{path}: {error}") from None
            if target.exists():
                raise DataError(f"{path}: {target} was written already, from a file of the same stem; rename one")
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, encode_png(corrected))
            advance(done + 1)
    typer.echo(f"{len(paths)} pictures corrected into {out}")
