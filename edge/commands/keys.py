"""`kizu keys KIND NAME`: a new pair of keys, and the table that admits its owner."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Final, cast, get_args

import typer

from edge.admission import Right, entry
from edge.errors import CommandError
from edge.keys import Kind, make_pair, read_public
from edge.login import make_login

_RIGHTS: Final[dict[str, tuple[Right, ...]]] = {"camera": ("camera",), "subscriber": ("subscribe", "replay")}


def keys(
    kind: Annotated[
        str, typer.Argument(help="Whose: server, camera, subscriber, signing (of bundles), metrics (a password).")
    ],
    name: Annotated[str, typer.Argument(help="The camera's, subscriber's or signer's name.")] = "",
    folder: Annotated[Path, typer.Option(help="Where the files go; made with mode 0700.")] = Path("keys"),
) -> None:
    """Make a pair of keys: the secret for its owner alone, the public one for the others; or a login for the metrics.

    Prints the public key; for a camera or subscriber as the table of the list of peers that admits it:
    `kizu keys camera left >> peers.toml`. Nothing is ever overwritten.

    Raises:
        CommandError: the kind or the name is wrong, the key exists, or the folder is open to others.
    """
    if kind == "metrics":
        login, password = make_login(name or "prometheus", folder)
        print(f"login: {login} (the daemon's: metrics.login)\npassword: {password} (Prometheus' password_file)")
        return
    if kind not in get_args(Kind):
        raise CommandError(f"{kind!r}: expected one of {', '.join(get_args(Kind))}, metrics")
    if not name and kind != "server":
        raise CommandError(f"a {kind} key needs a name, e.g. `kizu keys {kind} left`")
    secret, public = make_pair(cast(Kind, kind), name or "server", folder)
    pair = read_public(public, (cast(Kind, kind),))
    print(f"secret: {secret} (mode 0600)\npublic: {public}", file=sys.stderr)
    typer.echo(entry(pair.name, pair.public_key, _RIGHTS[kind]) if kind in _RIGHTS else pair.public_key)
