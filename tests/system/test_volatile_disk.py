"""The disk of the power cuts, by itself: what is flushed stays, what is not is lost, and a lying one is found out."""

from __future__ import annotations

import importlib.util
import random
import socket
import struct
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("volatile_disk", Path(__file__).with_name("volatile_disk.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["volatile_disk"] = module
    spec.loader.exec_module(module)
    return module


volatile_disk = load()
READ, WRITE, FLUSH, WORD = 0, 1, 3, volatile_disk.SECTOR


class Client:
    """What qemu does, as far as the tests need it."""

    def __init__(self, address: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(address))
        assert self.receive(18)[:8] == b"NBDMAGIC"
        self.socket.sendall(struct.pack(">I", 3) + struct.pack(">QIIIH", 0x49484156454F5054, 7, 6, 0, 0))
        assert struct.unpack(">QIII", self.receive(20))[2:] == (3, 12)
        self.size = struct.unpack(">HQH", self.receive(12))[1]
        self.receive(20)

    def receive(self, count: int) -> bytes:
        return bytes(volatile_disk._exactly(self.socket, count))

    def tell(self, kind: int, offset: int = 0, data: bytes = b"", length: int = 0) -> None:
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 7, offset, length or len(data)) + data)

    def ask(self, kind: int, offset: int = 0, data: bytes = b"", length: int = 0) -> bytes:
        self.tell(kind, offset, data, length)
        assert struct.unpack(">IIQ", self.receive(16)) == (0x67446698, 0, 7)
        return self.receive(length)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(64 * WORD))
    return path


def test_what_was_flushed_is_there_and_the_rest_is_not(image: Path, tmp_path: Path) -> None:
    """Both are read back before the cut; after it the image holds the first only."""
    with volatile_disk.VolatileDisk(image, tmp_path / "nbd") as disk:
        client = Client(tmp_path / "nbd")
        client.ask(WRITE, 0, b"a" * WORD)
        client.ask(FLUSH)
        client.ask(WRITE, WORD, b"b" * WORD)
        assert client.size == 64 * WORD
        assert client.ask(READ, 0, length=2 * WORD) == b"a" * WORD + b"b" * WORD
        disk.cut_after(1, random.Random(0), 0.0)
        client.tell(FLUSH)
        assert disk.gone.wait(10) and (disk.cached, disk.survived) == (1, 0)

    assert image.read_bytes()[: 2 * WORD] == b"a" * WORD + bytes(WORD)


def test_a_write_is_torn_at_sectors(image: Path, tmp_path: Path) -> None:
    """Some of it arrives, whole sectors and in no order."""
    with volatile_disk.VolatileDisk(image, tmp_path / "nbd") as disk:
        client = Client(tmp_path / "nbd")
        disk.cut_after(1, random.Random(0), 0.5)
        client.tell(WRITE, 0, b"a" * 64 * WORD)
        assert disk.gone.wait(10) and disk.cached == 64 and 0 < disk.survived < 64

    found = image.read_bytes()
    sectors = {found[at : at + WORD] for at in range(0, len(found), WORD)}
    assert sectors == {b"a" * WORD, bytes(WORD)}
