"""`kizu sign BUNDLE --key FILE`: vouch for a bundle as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge.errors import CommandError


def sign(
    bundle: Annotated[Path, typer.Argument(help="The bundle's directory.")],
    key: Annotated[Path, typer.Option(help="The secret signing key, from `kizu keys signing NAME`.")],
) -> None:
    """Write signature.json into a bundle whose every file is as its manifest says.

    A line with `security.require_signature` runs only bundles signed by one of its `security.signers`. Check the bundle
    with `kizu verify` first: the signature says that you did.

    Raises:
        BundleError: a file is missing, changed or malformed.
        ConfigError: the key cannot be used.
        CommandError: the bundle is signed already.
    """
    from edge import signature
    from edge.bundle import SIGNATURE, digests_of, open_bundle
    from edge.images import write_atomically

    opened = open_bundle(bundle)
    if opened.signed_by is not None:
        raise CommandError(f"{bundle} is signed already by {opened.signed_by}; remove its {SIGNATURE} to sign it anew")
    data = signature.sign(digests_of(opened), key)
    try:
        write_atomically(bundle / SIGNATURE, data)
    except OSError as error:
        raise CommandError(f"{bundle / SIGNATURE}: {error.strerror}; make the folder writable") from None
    typer.echo(f"signed {bundle}, model_id {opened.model_id}, by {open_bundle(bundle).signed_by}")
