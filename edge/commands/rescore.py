"""`kizu rescore EVENT_ID CONFIG`: score a recorded frame again and say whether the answer is identical."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge.errors import CommandError, KizuError

if TYPE_CHECKING:
    from edge.rescore import Rescored


def rescore(
    event_id: Annotated[str, typer.Argument(help="CAMERA/EPOCH/SEQUENCE, an event's `id`.")],
    config: Annotated[Path, typer.Argument(help="The line's TOML file: it names the log and the bundle.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, also where the answer differs.")
    ] = False,
    heatmap: Annotated[
        Path | None, typer.Option(help="Write the anomaly map here as a PNG to be laid over the frame.")
    ] = None,
) -> None:
    """Score the frame of a rejected part again and say "identical", or what differs (exit status 1).

    Raises:
        CommandError: no such event, its frame is not kept (any more), or the heat map cannot be written.
        ConfigError, BundleError, EngineError: the line cannot be opened.
        KizuError: the answer differs.
    """
    from edge.config import load_config
    from edge.rescore import rescore_event

    found = rescore_event(event_id, load_config(config), config, lambda text: typer.echo(text, err=True))
    if heatmap is not None:
        _write_heatmap(heatmap, found)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.encode(_facts(found)).decode())
    if found.differences:
        raise KizuError(f"event {event_id} differs from what was logged:\n  " + "\n  ".join(found.differences))
    if not as_json:
        again = found.again
        typer.echo(
            f"identical: {again.decision}, score {again.score}, {len(again.regions)} regions, model {again.model_id}"
        )


def _facts(found: Rescored) -> dict[str, Any]:
    again = found.again
    return {
        "id": again.id,
        "identical": not found.differences,
        "differences": found.differences,
        "decision": again.decision,
        "score": again.score,
        "threshold": again.threshold,
        "regions": len(again.regions),
        "model_id": again.model_id,
    }


def _write_heatmap(path: Path, found: Rescored) -> None:
    from edge.heatmap import heatmap_png
    from edge.images import write_atomically

    if found.anomaly_map is None:
        raise CommandError(f"--heatmap {path}: the model gave no map, the answer is {found.again.decision}")
    event = found.again
    png = heatmap_png(found.anomaly_map, (event.frame_height, event.frame_width), event.threshold)
    try:
        write_atomically(path, png)
    except OSError as error:
        raise CommandError(f"--heatmap {path}: {error.strerror}; name a file in a folder that can be written") from None
