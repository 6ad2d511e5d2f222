"""Keys of a whole line in a folder, for tests of who may come in."""

from __future__ import annotations

from pathlib import Path

from edge import keys
from edge.admission import Right, entry
from edge.keys import ClientKeys, ServerKeys


class KeyRing:
    """Makes keys as they are needed and keeps the list of peers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "keys"
        self.peers = folder / "peers.toml"
        self.peers.write_text("")
        self.secret, self.public = keys.make_pair("server", "server", self.folder)

    @property
    def server(self) -> ServerKeys:
        return keys.load_server(self.secret)

    def admit(self, name: str, *rights: Right) -> ClientKeys:
        """A key that is on the list."""
        made = self.stranger(name)
        with self.peers.open("a") as file:
            file.write(entry(name, made.public.decode(), rights))
        return made

    def take_off(self, name: str) -> None:
        """Remove every key of that name from the list."""
        tables = self.peers.read_text().split("[[peers]]\n")[1:]
        self.peers.write_text("".join(f"[[peers]]\n{one}" for one in tables if f'name = "{name}"' not in one))

    def stranger(self, name: str) -> ClientKeys:
        """A key that is not."""
        secret, _ = keys.make_pair("camera", name, self.folder)
        return keys.load_client(secret, self.public)
