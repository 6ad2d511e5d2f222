"""The login of the metrics page: one name and one password, of which the daemon keeps a digest only.

Owns making both files, reading the daemon's, and the comparison; HTTP is `metrics_server`'s.

Passwords are made here, never chosen: with 256 random bits there is nothing to guess, so one SHA-256 over a salt is
enough. A slow hash, as words that people choose would need, would let anybody who asks burn a core of the line.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import stat
import tomllib
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from edge.errors import CommandError, ConfigError
from edge.keys import located, make_private_folder, write_new

MAX_LOGIN_BYTES: Final = 4096
MAX_HEADER_CHARS: Final = 512
_Hex = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Name = Annotated[str, Meta(pattern=r"\A[a-z0-9_-]{1,64}\Z")]


class Login(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who may read the page: `digest` is SHA-256 over `salt` and `NAME:PASSWORD`; both as hexadecimal digits."""

    name: _Name
    salt: _Hex
    digest: _Hex

    def __repr__(self) -> str:
        return f"Login({self.name}, digest hidden)"

    def admits(self, authorization: str) -> bool:
        """Whether an HTTP `Authorization` header (RFC 7617) names this login; every no takes equally long."""
        scheme, _, encoded = authorization[:MAX_HEADER_CHARS].partition(" ")
        try:
            given = base64.b64decode(encoded.strip(), validate=True) if scheme.lower() == "basic" else b""
        except (binascii.Error, ValueError):
            given = b""
        return hmac.compare_digest(_digest(bytes.fromhex(self.salt), given), self.digest)


def make_login(name: str, folder: Path) -> tuple[Path, Path]:
    """Write a new password and the login that goes with it into `folder`; return (login file, password file).

    The login stays with the daemon, the password goes to Prometheus (`password_file`) and may then be deleted here.

    Raises:
        CommandError: the name is malformed, a file is there already, or the folder is open to others.
    """
    password, salt = secrets.token_urlsafe(32), secrets.token_bytes(32)
    fields = {"name": name, "salt": salt.hex(), "digest": _digest(salt, f"{name}:{password}".encode())}
    try:
        login = msgspec.convert(fields, Login)
    except msgspec.ValidationError:
        raise CommandError(f"name {name!r}: expected 1 to 64 of a-z, 0-9, _ and -") from None
    make_private_folder(folder)
    login_path, password_path = folder / f"metrics-{name}.login", folder / f"metrics-{name}.password"
    for path in (login_path, password_path):
        if path.exists() or path.is_symlink():
            raise CommandError(f"{path} exists; nothing is overwritten: choose another name, or move that file away")
    write_new(password_path, password, 0o600)
    lines = [f'{key} = "{value}"\n' for key, value in msgspec.structs.asdict(login).items()]
    write_new(login_path, "# Who may read the metrics page; the password is elsewhere.\n" + "".join(lines), 0o600)
    return login_path, password_path


def load_login(path: Path | str) -> Login:
    """The login in the file at `path`, or in systemd's `credential:NAME`.

    Raises:
        ConfigError: missing, open to others, or no login file.
    """
    place, by_systemd = located(str(path))
    try:
        with place.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077 and not by_systemd:
                raise ConfigError(f"{place} has mode {mode:04o}, so others can read it; run: chmod 600 {place}")
            data = file.read(MAX_LOGIN_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"login {place}: {error.strerror}; `kizu keys metrics NAME` makes one") from None
    try:
        if len(data) > MAX_LOGIN_BYTES:
            raise ValueError
        return msgspec.convert(tomllib.loads(data.decode()), Login)
    except (ValueError, msgspec.ValidationError):
        raise ConfigError(f"{place} is no login file; `kizu keys metrics NAME` makes one") from None


def _digest(salt: bytes, given: bytes) -> str:
    return hashlib.sha256(salt + given).hexdigest()
