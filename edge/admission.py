"""The list of peers: which public key is which camera or subscriber, and what it may do.

Owns the file's format and the answer to "may this key do that, and by what name?". The file holds public keys only, so
everybody may read it; only its owner should be able to write it. Asking is `doorkeeper`'s business.

    [[peers]]
    name = "left"
    public_key = "..."        from `kizu keys camera left`
    may = ["camera"]          send frames, as camera `left` only

Two keys may bear one name, so that a key can be replaced without stopping the line.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, Self, get_args

import msgspec
from msgspec import Meta

from edge.errors import ConfigError

Right = Literal["camera", "subscribe", "replay"]
RIGHTS: Final[tuple[str, ...]] = get_args(Right)
"""What a peer may do; also the ZAP domains of the daemon's sockets."""

MAX_LIST_BYTES: Final = 1024 * 1024
MAX_PEERS: Final = 1024


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One `[[peers]]` table."""

    name: Annotated[str, Meta(pattern=r"\A[a-z0-9_-]{1,64}\Z")]
    public_key: Annotated[str, Meta(pattern=r"\A[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}\Z")]
    may: Annotated[tuple[Right, ...], Meta(min_length=1, max_length=3)]


class _List(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    peers: Annotated[tuple[Peer, ...], Meta(max_length=MAX_PEERS)] = ()


@dataclass(frozen=True, slots=True)
class Denied:
    """Why a key may not come in: `reason` is one word for a counter."""

    reason: Literal["key_unknown", "not_allowed"]
    detail: str


@dataclass(frozen=True, slots=True)
class AllowList:
    """Peers by public key (Z85)."""

    peers: dict[str, Peer]

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read the file at `path`.

        Raises:
            ConfigError: missing, malformed, or a key is listed twice.
        """
        found: dict[str, Peer] = {}
        for peer in _read(Path(path)).peers:
            if peer.public_key in found:
                names = f"{found[peer.public_key].name} and {peer.name}"
                raise ConfigError(f"{path}: {names} have one public_key; a key is one peer, with one or more rights")
            found[peer.public_key] = peer
        return cls(found)

    def ask(self, public_key: str, right: str) -> Peer | Denied:
        """The peer whose key it is, if it may do `right`."""
        peer = self.peers.get(public_key)
        if peer is None:
            return Denied("key_unknown", f"key {public_key} is not on the list of peers")
        if right not in peer.may:
            return Denied("not_allowed", f"{peer.name} may {', '.join(peer.may)}, not {right}")
        return peer

    def keys(self, right: str) -> frozenset[tuple[str, str]]:
        """The keys that may do `right`, each with its name."""
        return frozenset((key, peer.name) for key, peer in self.peers.items() if right in peer.may)

    def names(self, right: str) -> frozenset[str]:
        """Who may do `right`."""
        return frozenset(peer.name for peer in self.peers.values() if right in peer.may)


def entry(name: str, public_key: str, rights: tuple[Right, ...]) -> str:
    """The table that admits a peer, ready to be appended to the file."""
    quoted = ", ".join(f'"{right}"' for right in rights)
    return f'[[peers]]\nname = "{name}"\npublic_key = "{public_key}"\nmay = [{quoted}]\n'


def _read(path: Path) -> _List:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_LIST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"list of peers {path}: {error.strerror}; `kizu keys` prints its tables") from None
    if len(data) > MAX_LIST_BYTES:
        raise ConfigError(f"list of peers {path} is longer than {MAX_LIST_BYTES} bytes; is it the right file?")
    try:
        return msgspec.convert(tomllib.loads(data.decode("utf-8")), _List)
    except (ValueError, msgspec.ValidationError) as error:
        raise ConfigError(
            f"list of peers {path}: {error}; a table has name, public_key (40 characters) and may, "
            f"some of {', '.join(RIGHTS)}"
        ) from None
