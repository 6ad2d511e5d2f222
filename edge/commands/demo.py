"""`kizu demo`: a line being inspected on one machine, with nothing but what was installed. Owns what is printed."""

from __future__ import annotations

import signal
import sys
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from edge.errors import CommandError, KizuError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console

    from edge.demo.session import Seen, Summary

_STYLES: Final = {"accept": "green", "reject": "bold red", "inconclusive": "yellow"}
_TERMINATED: Final = 143  # 128 + SIGTERM, as shells give it


def demo(
    seconds: Annotated[float, typer.Option(min=0.5, help="How long the cameras send, in seconds.")] = 20.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as one JSON object; verdicts go to stderr.")
    ] = False,
    backend: Annotated[str, typer.Option(help="Engine: openvino, onnxruntime, or fake (no model).")] = "openvino",
    fps: Annotated[
        float, typer.Option(min=0.1, max=1000, help="Pictures per second of each of the two cameras.")
    ] = 4.0,
    bundle: Annotated[Path | None, typer.Option(help="Another bundle than the shipped one.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write photographs, masks and verdicts here, .png or .jpg.")
    ] = None,
    with_console: Annotated[
        bool, typer.Option("--console", help="Serve the operator's page as well; needs kizu[console].")
    ] = False,
) -> None:
    """Watch a line being inspected: a daemon, two simulated cameras and a subscriber, on shipped photographs.

    Raises:
        CommandError: an option cannot be used.
        BundleError: the bundle is missing.
        KizuError: a part of the line failed, or a frame got no answer.
    """
    from rich.console import Console

    from edge.demo.line import BUNDLE
    from edge.demo.picture import SUFFIXES, choose, write_sheet
    from edge.demo.session import run_session
    from edge.engines.registry import require_backend

    if picture is not None and picture.suffix not in SUFFIXES:
        raise CommandError(f"--picture {picture}: the name must end in one of {', '.join(SUFFIXES)}")
    if picture is not None and not picture.parent.is_dir():
        raise CommandError(f"--picture {picture}: its folder does not exist; make it first")
    # A terminated demo must end its daemon too.
    signal.signal(signal.SIGTERM, _terminated)
    console = Console(stderr=as_json, highlight=False)
    console.print("starting a daemon, two cameras and a subscriber ...", style="dim")
    seen: list[Seen] = []
    on_page = (lambda page: console.print(f"console at {page}", soft_wrap=True)) if with_console else None
    chosen = require_backend(backend, CommandError)
    with closing(run_session(bundle or BUNDLE, chosen, seconds, fps, on_page)) as session:
        while True:
            try:
                one = next(session)
            except StopIteration as end:
                summary: Summary = end.value
                break
            seen.append(one)
            _print_verdict(console, one)
    if picture is not None:
        write_sheet(picture, choose(seen))
        console.print(f"picture: {picture}", style="dim")
    _print_summary(console, summary, seen)
    if as_json:
        import msgspec

        sys.stdout.write(msgspec.json.encode(summary).decode() + "\n")
        sys.stdout.flush()
    if summary.lost:
        raise KizuError(f"{summary.lost} of {summary.frames} frames got no answer; run again with --json and report it")


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(_TERMINATED)


def _print_verdict(console: Console, one: Seen) -> None:
    from rich.text import Text

    event = one.event
    line = Text(f"{event.camera:<6}{event.frame_sequence:>4}  ")
    line.append(f"{event.decision.upper():<13}", _STYLES[event.decision])
    line.append(f"▕{thumbnail(one.mask)}▏ ", _STYLES[event.decision])
    if event.score is None:
        line.append(f"{event.reason}: {event.detail}")
    else:
        line.append(f"{event.score:6.2f} / {event.threshold:.2f}")
    line.append(f"  {one.latency_s * 1e3:5.0f} ms  ", "dim")
    line.append(f"{one.photo.path.parent.name}/{one.photo.path.name}", "dim")
    if event.regions:
        box = event.regions[0].box_xyxy
        line.append(f"  flaw at x {box[0]}-{box[2]}, y {box[1]}-{box[3]}", "red")
    console.print(line, soft_wrap=True)


def thumbnail(mask: NDArray[np.bool_] | None, columns: int = 4) -> str:
    """Where the flaw is, in braille: `columns` characters of 2 x 4 dots over the whole frame."""
    import numpy as np

    dots = np.zeros((4, 2 * columns), bool)
    if mask is not None:
        rows, across = np.nonzero(mask)
        dots[rows * 4 // mask.shape[0], across * 2 * columns // mask.shape[1]] = True
    weights = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    return "".join(chr(0x2800 + int((dots[:, 2 * c : 2 * c + 2] * weights).sum())) for c in range(columns))


def _print_summary(console: Console, summary: Summary, seen: list[Seen]) -> None:
    from rich.table import Table

    flawed = [one for one in seen if not one.photo.good]
    good = [one for one in seen if one.photo.good]
    caught = sum(one.event.decision == "reject" for one in flawed)
    passed = sum(one.event.decision == "accept" for one in good)
    rows: list[tuple[str, Any]] = [
        ("frames", f"{summary.frames} sent, {summary.lost} lost, {summary.fps:.1f} per second"),
        ("verdicts", f"{summary.accept} accept, {summary.reject} reject, {summary.inconclusive} inconclusive"),
        ("flawed photographs", f"{caught} of {len(flawed)} rejected"),
        ("good photographs", f"{passed} of {len(good)} accepted"),
        ("picture to verdict", f"median {summary.latency_p50_ms:.0f} ms, 99 % {summary.latency_p99_ms:.0f} ms"),
    ]
    if seen and not seen[0].event.certified:
        rows.append(("threshold", "provisional: `kizu calibrate` certifies one"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(name, value)
    console.print()
    console.print(table)
