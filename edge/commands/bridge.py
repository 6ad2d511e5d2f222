"""`kizu bridge`: cameras that speak imagezmq, to a daemon that does not."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def bridge(
    listen: Annotated[str, typer.Option(help="Where imagezmq cameras connect, e.g. tcp://127.0.0.1:5555.")],
    to: Annotated[str, typer.Option(help="The daemon's address, e.g. tcp://127.0.0.1:5550.")],
    camera: Annotated[
        list[str], typer.Option(help="A camera's name, which is the text it sends with each image; repeatable.")
    ],
    plain_off_host: Annotated[
        bool, typer.Option("--plain-off-host", help="Talk unencrypted beyond this host, on a network that is yours.")
    ] = False,
) -> None:
    """Take the frames of imagezmq's ImageSender (REQ/REP), unmodified, and reply OK once each has a durable verdict.

    Raises:
        ConfigError: an address cannot be used.
        WireError: a name is malformed.
    """
    from contextlib import ExitStack, suppress

    from edge.bridge import ImagezmqBridge
    from edge.sender import CameraSender

    def tell(why: str) -> None:
        print(f"refused: {why}", file=sys.stderr, flush=True)

    with ExitStack() as opened, suppress(KeyboardInterrupt):
        senders = [opened.enter_context(CameraSender(to, name, plain_off_host=plain_off_host)) for name in camera]
        made = opened.enter_context(ImagezmqBridge(listen, senders, on_refused=tell, plain_off_host=plain_off_host))
        typer.echo(f"listening at {made.address} for {', '.join(camera)}")
        while True:
            made.step(0.1)
