"""`kizu swap CONFIG.toml`: another model for a running line, without a frame lost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def swap(
    config: Annotated[Path, typer.Argument(help="The running line's TOML file.")],
    bundle: Annotated[
        Path | None, typer.Argument(help="The bundle that takes over; default: the one that the file names now.")
    ] = None,
    shadow: Annotated[
        int, typer.Option(min=0, metavar="N", help="Let it look on for N frames first, and compare the answers.")
    ] = 0,
    min_agreement: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="With --shadow: refuse below this share of equal answers.")
    ] = 0.99,
    timeout: Annotated[
        float, typer.Option(min=1.0, help="With --shadow: seconds until N frames must have come.")
    ] = 600.0,
) -> None:
    """Load, verify and warm another bundle beside the running one, then switch at a frame boundary.

    Whatever is wrong with it, the running model stays. After a restart the daemon runs what its file names.

    Raises:
        CommandError: no daemon listens.
        ConfigError: the file is wrong.
    """
    from edge.config import load_config
    from edge.daemon import default_control_address
    from edge.swap import SwapReport, SwapRequest, ask

    loaded = load_config(config)
    path = str(bundle.absolute()) if bundle is not None else loaded.bundle

    def show(report: SwapReport) -> None:
        found = report.agreement
        seen = "" if found is None else f"{found.compared} frames compared, {found.same} answered alike"
        line = " ".join(filter(None, [f"{report.state}:", report.detail, seen]))
        typer.echo(line, err=report.state == "refused")

    request = SwapRequest(path, shadow, min_agreement, timeout)
    if not ask(loaded.control_address or default_control_address(loaded), request, show, patience_s=60.0):
        raise typer.Exit(1)
    if path != loaded.bundle:
        typer.echo(
            f"{config} still names {loaded.bundle}, which a restart runs; change `bundle` there to keep this one"
        )
