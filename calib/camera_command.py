"""`kizu camera`: what is known of one camera, from pictures of a board, an even target and no light.

Owns the options, which pictures were of use, and the table; the fits are `camera`, the directory is `edge.camera`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge.errors import CalibrationError, CommandError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from calib.camera import Board, View
    from edge.camera import CameraCalibration

Size = tuple[int, int]


def camera(
    out: Annotated[Path, typer.Option(help="The new calibration, a folder; `cameras.calibration` names it.")],
    board: Annotated[
        str | None,
        typer.Option(help="chessboard:9x6:2.5 (inner corners, mm) or charuco:7x5:4:3[:DICT_4X4_50] (squares, mm, mm)."),
    ] = None,
    views: Annotated[
        Path | None, typer.Option(help="Folder of pictures of the board, tilted to all sides: the lens.")
    ] = None,
    plane: Annotated[
        Path | None, typer.Option(help="One picture of the board lying where the parts lie: millimeters.")
    ] = None,
    mm_per_px: Annotated[
        float | None, typer.Option(help="Instead of --plane: the scale, for a camera that looks squarely.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="With --mm-per-px alone: any picture of this camera, for its size.")
    ] = None,
    flat: Annotated[
        Path | None, typer.Option(help="Folder of pictures of an even target in the line's own light: the flat field.")
    ] = None,
    dark: Annotated[Path | None, typer.Option(help="With --flat: folder of pictures with the lens covered.")] = None,
    max_error_px: Annotated[
        float, typer.Option(min=0.01, max=10.0, help="Refuse a lens or plane whose corners miss by more, in pixels.")
    ] = 0.5,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Calibrate a camera: flat field, lens, millimeters per pixel; any of the three, into one folder.

    With millimeters, verdicts say how long and how large each defect is, and rules may speak of mm (docs/camera.md).
    With a flat field, every frame is corrected before the model sees it: train and calibrate on pictures corrected by
    `kizu correct`.

    Raises:
        CommandError: the options do not go together.
        CalibrationError: the pictures do not suffice, or the error is above --max-error-px.
        DataError: a picture cannot be read.
    """
    import msgspec

    from calib.camera import parse_board
    from edge.camera import write_camera

    _check_options(out, board, views, plane, mm_per_px, flat, dark)
    printed = None if board is None else parse_board(board)
    found = _Pictures()
    lens = _lens(found, views, printed, max_error_px)
    known_plane = _plane(found, plane, printed, mm_per_px, lens, max_error_px)
    gain, black = _flat_field(found, flat, dark)
    if like is not None:
        found.read(like)
    if found.size is None:
        raise CommandError("--mm-per-px alone does not say how large a frame is; give any picture of it with --like")
    written = write_camera(
        out, size=found.size, gain=gain, dark=black, lens=lens, plane=known_plane, made_from=found.made_from
    )
    facts = describe(written, found)
    typer.echo(msgspec.json.encode(facts).decode() if json else table(facts))


class _Pictures:
    """Reads pictures of one camera: all of one size, which is remembered."""

    def __init__(self) -> None:
        self.size: Size | None = None
        self.made_from: dict[str, Any] = {}
        self.without_board: list[str] = []

    def read(self, path: Path) -> NDArray[np.uint8]:
        from calib.dataset import read_stored_image
        from edge.errors import DataError, ImageRefused

        try:
            image = read_stored_image(path)
        except ImageRefused as error:
            raise DataError(str(error)) from None
        height, width = image.shape[:2]
        if self.size not in (None, (height, width)):
            assert self.size is not None
            raise DataError(
                f"{path} is {width} x {height} px, the pictures before it {self.size[1]} x {self.size[0]}; "
                "one calibration is for one camera at one size"
            )
        self.size = (height, width)
        return image

    def folder(self, folder: Path, what: str) -> list[tuple[Path, NDArray[np.uint8]]]:
        from calib.dataset import data_sha256, file_sha256, good_images
        from calib.progress import progress

        paths = good_images(folder)
        pictures = []
        with progress(f"read {what}", len(paths)) as advance:
            for done, path in enumerate(paths):
                pictures.append((path, self.read(path)))
                advance(done + 1)
        digest = data_sha256((path.name, file_sha256(path)) for path in paths)
        self.made_from[what] = {"pictures": len(paths), "sha256": digest}
        return pictures

    def views(self, folder: Path, board: Board) -> list[View]:
        """The views in which the board is seen; the others are named later."""
        from calib.camera import find_board
        from calib.progress import progress

        pictures, found = self.folder(folder, "views"), []
        with progress("find board", len(pictures)) as advance:
            for done, (path, image) in enumerate(pictures):
                view = find_board(image, board, path.name)
                if view is None:
                    self.without_board.append(path.name)
                else:
                    found.append(view)
                advance(done + 1)
        return found


def _lens(found: _Pictures, views: Path | None, board: Board | None, max_error_px: float) -> Any:
    from calib.camera import fit_lens

    if views is None or board is None:
        return None
    seen = found.views(views, board)
    assert found.size is not None  # an empty folder was refused
    return fit_lens(seen, found.size, max_error_px=max_error_px)


def _plane(
    found: _Pictures, path: Path | None, board: Board | None, mm_per_px: float | None, lens: Any, max_error_px: float
) -> Any:
    from calib.camera import find_board, fit_plane, stated_plane
    from calib.dataset import file_sha256

    if mm_per_px is not None:
        return stated_plane(mm_per_px)
    if path is None or board is None:
        return None
    view = find_board(found.read(path), board, path.name)
    if view is None or found.size is None:
        raise CalibrationError(
            f"{path}: the board {board.kind} of {board.columns} x {board.rows} is not seen in it (a chessboard must be "
            "seen as a whole, its inner corners are counted); look at the picture, or give another --board"
        )
    found.made_from["plane"] = {"picture": path.name, "sha256": file_sha256(path)}
    return fit_plane(view, found.size, lens, max_error_px=max_error_px)


def _flat_field(found: _Pictures, flat: Path | None, dark: Path | None) -> tuple[Any, Any]:
    from calib.camera import fit_flat_field

    if flat is None:
        return None, None
    bright = [image for _, image in found.folder(flat, "flat")]
    black = [image for _, image in found.folder(dark, "dark")] if dark is not None else []
    return fit_flat_field(bright, black)


def _check_options(
    out: Path,
    board: str | None,
    views: Path | None,
    plane: Path | None,
    mm_per_px: float | None,
    flat: Path | None,
    dark: Path | None,
) -> None:
    if out.exists():
        raise CommandError(f"--out {out}: exists already, and calibrations are written once; give a new path")
    if not out.absolute().parent.is_dir():
        raise CommandError(f"--out {out}: its folder does not exist; make it first")
    if views is None and plane is None and mm_per_px is None and flat is None:
        raise CommandError("nothing to calibrate: give --views, --plane or --mm-per-px, or --flat")
    if (views is not None or plane is not None) != (board is not None):
        raise CommandError("--board goes together with --views or --plane: it says what is printed on the board")
    if plane is not None and mm_per_px is not None:
        raise CommandError("--plane and --mm-per-px both say the scale; give one of them")
    if dark is not None and flat is None:
        raise CommandError("--dark says nothing without --flat")


def describe(written: CameraCalibration, found: _Pictures) -> dict[str, Any]:
    """What was fitted, as plain values."""
    height, width = written.size
    facts: dict[str, Any] = {"calibration_id": written.id, "width": width, "height": height}
    if written.lens is not None:
        facts["lens"] = {
            "error_px": written.lens.error_px,
            "views": written.lens.views,
            "without_board": found.without_board,
            "distortion": written.lens.distortion,
        }
    if written.plane is not None:
        corners = [written.mm_per_px(x, y) for x in (1.0, width - 1.0) for y in (1.0, height - 1.0)]
        facts["scale"] = {
            "mm_per_px": written.mm_per_px(width / 2, height / 2),
            "corners": corners,
            "error_mm": written.plane.error_mm,
        }
    if written.gain is not None and written.dark is not None:
        facts["flat_field"] = {
            "gain": [float(written.gain.min()), float(written.gain.max())],
            "dark": [float(written.dark.min()), float(written.dark.max())],
        }
    return facts


def table(facts: dict[str, Any]) -> str:
    """The same for people."""
    rows = [("calibration", facts["calibration_id"]), ("frames", f"{facts['width']} x {facts['height']} px")]
    if lens := facts.get("lens"):
        lost = f"; no board seen in {', '.join(lens['without_board'])}" if lens["without_board"] else ""
        rows.append(("lens", f"corners miss by {lens['error_px']:.3f} px rms in {lens['views']} pictures{lost}"))
    if scale := facts.get("scale"):
        error = "as stated" if scale["error_mm"] is None else f"corners miss by {scale['error_mm']:.4f} mm rms"
        rows.append(
            (
                "scale",
                f"{scale['mm_per_px']:.5g} mm/px in the middle, {min(scale['corners']):.5g} to "
                f"{max(scale['corners']):.5g} in the corners; {error}",
            )
        )
    if field := facts.get("flat_field"):
        rows.append(
            ("flat field", "gain {:.3f} to {:.3f}, dark {:.1f} to {:.1f}".format(*field["gain"], *field["dark"]))
        )
    return "\n".join(f"{name:<16}{text}" for name, text in rows)
