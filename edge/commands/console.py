"""`kizu console EVENTS`: the operator's page. Owns its options; the page and its server are `edge.console`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def console(
    address: Annotated[str, typer.Argument(help="Where the daemon publishes, e.g. tcp://127.0.0.1:5551.")],
    replay: Annotated[
        str | None, typer.Option(help="The daemon's replay address: nothing is missed, and the page opens with a past.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where the page is served.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Its port; 0 lets the system choose.")] = 8470,
    off_host: Annotated[
        bool, typer.Option("--off-host", help="Serve other machines as well; asks for --token.")
    ] = False,
    token: Annotated[Path | None, typer.Option(help="A file, mode 0600, with the word that lets people in.")] = None,
    log: Annotated[
        Path | None, typer.Option(help="The event log or its folder, read only: rejected parts' pictures lie there.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The line's TOML file: pictures as by --log, and parts can be scored again.")
    ] = None,
    annotate: Annotated[
        Path | None, typer.Option(help="Let people say what a reject was; their labels are appended to this file.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Our secret key file, from `kizu keys subscriber NAME`.")] = None,
    server_key: Annotated[Path | None, typer.Option(help="The daemon's public key file, to go with --key.")] = None,
    plain_off_host: Annotated[
        bool, typer.Option("--plain-off-host", help="Listen to a line on another host, on a network that is yours.")
    ] = False,
) -> None:
    """Show the line to its operator: a page for any browser, fed by the line's public sockets; Ctrl-C ends it.

    Raises:
        CommandError: an option cannot be used, or the page would be open to others unsaid.
        ConfigError: an address, a key or the token cannot be used.
        DataError, LabelError: the file of labels cannot be used.
    """
    from edge.console.feed import Sources
    from edge.console.serve import Settings, serve
    from edge.keys import client_keys

    sources = Sources(address, replay, client_keys(key, server_key), plain_off_host)
    settings = Settings(sources, host, port, off_host, token, log, config, annotate)
    serve(settings, on_ready=lambda page: typer.echo(f"console at {page}"))
