"""Signatures of bundles: who vouches for these bytes.

Owns what is signed, signature.json, and the store of signers that a line trusts. Which files a bundle has, and that
their bytes are as listed, is `bundle`'s; keys on disk are `keys`'.

Signed is the text

    kizu bundle signature 1
    {"bundle.json": {"sha256": ..., "size": ...}, "model.onnx": {...}, ...}

with every file of the bundle but signature.json itself, names sorted, no spaces, a newline after each line; ed25519
(RFC 8032). The digest of bundle.json alone would say the same, since it lists the others; this text can be checked
without knowing that format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Self

import msgspec
from msgspec import Meta

from edge.errors import BundleError, ConfigError
from edge.keys import read_public, read_secret, unz85

SIGNATURE_VERSION: Final = 1
MAX_SIGNATURE_BYTES: Final = 4096
MAX_SIGNERS: Final = 256
_HEADING: Final = b"kizu bundle signature 1\n"

Digests = Mapping[str, tuple[str, int]]
"""{file: (sha256 in hex, size in bytes)}"""


class SignatureFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """signature.json; it names no signer, because anybody could write any name into it."""

    schema_version: int
    algorithm: str
    public_key: Annotated[str, Meta(min_length=40, max_length=40)]
    signature: Annotated[str, Meta(pattern=r"\A[0-9a-f]{128}\Z")]


def signed_text(files: Digests) -> bytes:
    """What is signed of a bundle with these files."""
    listed = {name: {"sha256": sha256, "size": size} for name, (sha256, size) in files.items()}
    return _HEADING + msgspec.json.encode(listed, order="sorted") + b"\n"


def sign(files: Digests, key: Path | str) -> bytes:
    """The content of signature.json by the secret signing key in the file `key`.

    Raises:
        ConfigError: no such key file, open to others, or a key for another purpose.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    pair = read_secret(key, ("signing",))
    signature = Ed25519PrivateKey.from_private_bytes(unz85(str(pair.secret_key))).sign(signed_text(files))
    made = SignatureFile(SIGNATURE_VERSION, "ed25519", pair.public_key, signature.hex())
    return msgspec.json.format(msgspec.json.encode(made), indent=2) + b"\n"


def check_signature(data: bytes, files: Digests, where: str) -> str:
    """The public key (Z85) by which signature.json, `data`, vouches for `files`.

    Raises:
        BundleError: malformed, of another version, or not the signature of these files; the message names `where`.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        found = msgspec.json.decode(data, type=SignatureFile)
        key = Ed25519PublicKey.from_public_bytes(unz85(found.public_key))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError, ConfigError) as error:
        raise BundleError(f"{where} is no signature: {error}; remove it and sign the bundle again") from None
    if (found.schema_version, found.algorithm) != (SIGNATURE_VERSION, "ed25519"):
        raise BundleError(
            f"{where} has version {found.schema_version}, algorithm {found.algorithm[:40]!r}; this kizu knows version "
            f"{SIGNATURE_VERSION}, ed25519: sign the bundle again with this kizu"
        )
    try:
        key.verify(bytes.fromhex(found.signature), signed_text(files))
    except InvalidSignature:
        raise BundleError(
            f"{where} was not made for this bundle's content; a bundle that was derived or changed must be signed "
            "again: remove it, then `kizu sign BUNDLE --key FILE`"
        ) from None
    return found.public_key


@dataclass(frozen=True, slots=True)
class TrustStore:
    """Whose signatures count: names by public key (Z85)."""

    names: Mapping[str, str]
    path: Path

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read one public signing key, or every `.pub` of a folder.

        Raises:
            ConfigError: missing, empty, malformed, not a signing key, or a key under two names.
        """
        path = Path(path)
        files = sorted(path.glob("*.pub")) if path.is_dir() else [path]
        if not 0 < len(files) <= MAX_SIGNERS:
            raise ConfigError(
                f"{path} holds {len(files)} .pub files, expected 1 to {MAX_SIGNERS}; `kizu keys signing NAME` makes one"
            )
        names: dict[str, str] = {}
        for file in files:
            pair = read_public(file, ("signing",))
            if names.setdefault(pair.public_key, pair.name) != pair.name:
                raise ConfigError(f"{file}: this key is also {names[pair.public_key]}'s; remove one of the two")
        return cls(names, path)

    def signer(self, bundle: Path, signed_by: str | None) -> str:
        """The name of whoever signed the bundle at `bundle`.

        Raises:
            BundleError: nobody did, or somebody who is not trusted.
        """
        trusted = f"{', '.join(sorted(set(self.names.values())))} ({self.path})"
        if signed_by is None:
            raise BundleError(
                f"bundle {bundle} is not signed, expected a signature by {trusted}; "
                f"run `kizu sign {bundle} --key FILE` where that key is"
            )
        if signed_by not in self.names:
            raise BundleError(
                f"bundle {bundle} is signed by the unknown key {signed_by}, expected {trusted}; "
                "have it signed by one of these, or add that key's .pub file to them"
            )
        return self.names[signed_by]
