"""`kizu run CONFIG.toml`: the daemon of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    config: Annotated[Path, typer.Argument(help="The line's TOML file; deploy/line.example.toml shows every key.")],
    check: Annotated[
        bool, typer.Option("--check", help="Check file, bundle and engine on this machine, print them as JSON and end.")
    ] = False,
) -> None:
    """Inspect a line: frames in, verdicts logged, published and acknowledged.

    Ends in order on SIGTERM and Ctrl-C: frames in flight get their verdict first.

    Raises:
        ConfigError: the file is wrong; names line and key.
        BundleError: the bundle is missing or changed.
        ParityError: the golden frames come out beyond the tolerance.
        KizuError: the line failed while it ran.
    """
    import msgspec

    from edge import daemon
    from edge.config import load_config

    loaded = load_config(config)
    if check:
        typer.echo(msgspec.json.encode(daemon.check(loaded, config)).decode())
        return
    daemon.configure_logging()
    stop = daemon.StopRequest()
    with daemon.stopping_on_signals(stop):
        daemon.serve(loaded, config, stop)
