"""Key files: who a daemon, a camera, a subscriber or a signer is, on disk.

Owns the files' format, their permissions, making and reading them. CURVE pairs (server, camera, subscriber) encrypt the
wire, ed25519 pairs (signing) sign bundles; `sockets` and `signature` use them, who is admitted is `admission`'s.

A pair is two small TOML files: `NAME.key` holds the secret and is readable by its owner alone, `NAME.pub` may be given
to anybody. Public and secret keys are 32 bytes each, written as Z85 (https://rfc.zeromq.org/spec/32/), 40 characters.
"""

from __future__ import annotations

import os
import stat
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from edge.errors import CommandError, ConfigError

Kind = Literal["server", "camera", "subscriber", "signing"]

MAX_KEY_FILE_BYTES: Final = 4096
_CREDENTIAL: Final = "credential:"
_Z85 = Annotated[str, Meta(pattern=r"\A[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}\Z")]
_Name = Annotated[str, Meta(pattern=r"\A[a-z0-9_-]{1,64}\Z")]


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file: `secret_key` is None in a `.pub`. Keys are Z85; a repr never shows the secret."""

    kind: Kind
    name: _Name
    public_key: _Z85
    secret_key: _Z85 | None = None

    def __repr__(self) -> str:
        secret = "none" if self.secret_key is None else "hidden"
        return f"KeyFile({self.kind} {self.name}, public_key {self.public_key}, secret_key {secret})"


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """A daemon's CURVE pair, Z85: sockets that are given it take encrypted peers only."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """A camera's or subscriber's CURVE pair and the public key of the one daemon it talks to, Z85."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes


# --- making -----------------------------------------------------------------------------------------------------------


def make_pair(kind: Kind, name: str, folder: Path) -> tuple[Path, Path]:
    """Write a new pair into `folder`, which is made with mode 0700 if need be; return (secret file, public file).

    Raises:
        CommandError: a key of that name is there already (it is never overwritten), the name is malformed, or the
            folder is open to others or cannot be written.
    """
    public, secret = _signing_pair() if kind == "signing" else _curve_pair()
    try:
        pair = msgspec.convert({"kind": kind, "name": name, "public_key": public, "secret_key": secret}, KeyFile)
    except msgspec.ValidationError:
        raise CommandError(f"name {name!r}: expected 1 to 64 of a-z, 0-9, _ and -") from None
    make_private_folder(folder)
    secret_path, public_path = (folder / f"{file_stem(kind, name)}{suffix}" for suffix in (".key", ".pub"))
    for path in (secret_path, public_path):
        if path.exists() or path.is_symlink():
            raise CommandError(
                f"{path} exists; keys are never overwritten: choose another name or folder, or move that file away"
            )
    warning = f"# Secret. Whoever can read this is {kind} {name}. Do not copy it further than it is needed."
    write_new(secret_path, f"{warning}\n{_toml(pair)}", 0o600)
    try:
        write_new(public_path, _toml(msgspec.structs.replace(pair, secret_key=None)), 0o644)
    except CommandError:
        secret_path.unlink()
        raise
    return secret_path, public_path


def file_stem(kind: Kind, name: str) -> str:
    """`server`, or KIND-NAME for everybody else; a server of another name is `server-NAME`."""
    return "server" if kind == "server" and name == "server" else f"{kind}-{name}"


def _curve_pair() -> tuple[str, str]:
    import zmq

    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _signing_pair() -> tuple[str, str]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    secret = Ed25519PrivateKey.generate()
    return z85(secret.public_key().public_bytes_raw()), z85(secret.private_bytes_raw())


def make_private_folder(folder: Path) -> None:
    """Make `folder` for its owner alone, if it is not there.

    Raises:
        CommandError: it is open to others, or cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        mode = stat.S_IMODE(folder.stat().st_mode)
    except OSError as error:
        raise CommandError(
            f"{folder}: {error.strerror}; name a folder whose parent exists and can be written"
        ) from None
    if mode & 0o077:
        raise CommandError(f"{folder} has mode {mode:04o}, so others may look for keys there; run: chmod 700 {folder}")


def write_new(path: Path, text: str, mode: int) -> None:
    """Write a file that is not there yet, to disk, with `mode` whatever the umask.

    Raises:
        CommandError: it is there, or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, mode)  # whatever the umask
            file.write(text)
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}; nothing was overwritten") from None


def _toml(pair: KeyFile) -> str:
    # Z85 has neither quotes nor backslashes, so a basic string needs no escapes.
    return "".join(f'{key} = "{value}"\n' for key, value in msgspec.structs.asdict(pair).items() if value is not None)


# --- reading ----------------------------------------------------------------------------------------------------------


def load_server(path: Path | str) -> ServerKeys:
    """The daemon's pair from its secret file.

    Raises:
        ConfigError: missing, open to others, malformed, or a key of another kind.
    """
    pair = read_secret(path, ("server",))
    return ServerKeys(pair.public_key.encode(), str(pair.secret_key).encode())


def load_client(path: Path | str, server: Path | str) -> ClientKeys:
    """A camera's or subscriber's pair from its secret file, with the daemon's public key from `server`.

    Raises:
        ConfigError: see `load_server`.
    """
    pair = read_secret(path, ("camera", "subscriber"))
    daemon = read_public(server, ("server",))
    return ClientKeys(pair.public_key.encode(), str(pair.secret_key).encode(), daemon.public_key.encode())


def client_keys(key: Path | None, server_key: Path | None) -> ClientKeys | None:
    """What the options --key and --server-key say; None when neither is given.

    Raises:
        CommandError: one without the other.
        ConfigError: see `load_client`.
    """
    if key is None and server_key is None:
        return None
    if key is None or server_key is None:
        raise CommandError("--key and --server-key go together: one's own secret, and the daemon's public key")
    return load_client(key, server_key)


def read_secret(path: Path | str, kinds: tuple[Kind, ...]) -> KeyFile:
    """A secret file of one of `kinds`; `credential:NAME` is a file that systemd hands to the service.

    Raises:
        ConfigError: missing, open to others, malformed, or a key of another kind.
    """
    place, by_systemd = located(str(path))
    pair = _read(place, kinds, private=not by_systemd)
    if pair.secret_key is None:
        raise ConfigError(f"{place} holds no secret_key; give the .key file, not the .pub")
    if _public_of(pair) != pair.public_key:
        raise ConfigError(f"{place}: public_key does not belong to secret_key; the file was changed, make a new pair")
    return pair


def read_public(path: Path | str, kinds: tuple[Kind, ...]) -> KeyFile:
    """A public file of one of `kinds`.

    Raises:
        ConfigError: missing, malformed, a key of another kind, or a secret file, which should not be here.
    """
    place = Path(path)
    pair = _read(place, kinds, private=False)
    if pair.secret_key is not None:
        raise ConfigError(f"{place} holds a secret; give the .pub file, and keep the .key where it is used")
    return pair


def located(path: str) -> tuple[Path, bool]:
    """Where the file is, and whether systemd guards it: its copies are readable by the service alone, by ACL."""
    if not path.startswith(_CREDENTIAL):
        return Path(path), False
    folder, name = os.environ.get("CREDENTIALS_DIRECTORY"), path.removeprefix(_CREDENTIAL)
    if not folder:
        raise ConfigError(f"{path}: no credentials were passed; start the daemon by its systemd unit (LoadCredential)")
    if not name or "/" in name or name in (".", ".."):
        raise ConfigError(f"{path}: expected credential:NAME, as in the unit's LoadCredential=NAME:PATH")
    return Path(folder) / name, True


def _read(path: Path, kinds: tuple[Kind, ...], *, private: bool) -> KeyFile:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if private and stat.S_IMODE(status.st_mode) & 0o077:
                mode = stat.S_IMODE(status.st_mode)
                raise ConfigError(f"{path} has mode {mode:04o}, so others can read the secret; run: chmod 600 {path}")
            data = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"key {path}: {error.strerror}; `kizu keys` makes keys") from None
    try:
        if len(data) > MAX_KEY_FILE_BYTES:
            raise ValueError(f"longer than {MAX_KEY_FILE_BYTES} bytes")
        pair = msgspec.convert(tomllib.loads(data.decode("utf-8")), KeyFile)
    except (ValueError, msgspec.ValidationError) as error:
        # A parser's message could quote the secret; msgspec's names types and fields only.
        why = str(error) if isinstance(error, msgspec.ValidationError) else "not TOML in UTF-8, or too long"
        raise ConfigError(f"{path} is no key file: {why}; `kizu keys` makes keys") from None
    if pair.kind not in kinds:
        raise ConfigError(f"{path} is the key of a {pair.kind}, expected {' or '.join(kinds)}; `kizu keys` makes keys")
    for key in (pair.public_key, pair.secret_key):
        if key is not None:
            unz85(key)
    return pair


def _public_of(pair: KeyFile) -> str:
    assert pair.secret_key is not None
    if pair.kind == "signing":
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return z85(Ed25519PrivateKey.from_private_bytes(unz85(pair.secret_key)).public_key().public_bytes_raw())
    import zmq

    return zmq.curve_public(pair.secret_key.encode()).decode()


def z85(raw: bytes) -> str:
    """32 bytes as 40 characters."""
    from zmq.utils import z85 as codec

    return codec.encode(raw).decode()


def unz85(text: str) -> bytes:
    """40 characters as 32 bytes.

    Raises:
        ConfigError: a group of five characters stands for more than 32 bits.
    """
    import struct

    from zmq.utils import z85 as codec

    try:
        return codec.decode(text.encode())
    except (struct.error, KeyError, ValueError):
        raise ConfigError("a key is no Z85 number of 32 bytes; copy its file again, or make a new pair") from None
