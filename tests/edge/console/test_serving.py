"""The console's server as it is started: pages that come and go."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from console_line import Line, ServedConsole
from edge.console.stream import MAX_PAGES


@pytest.fixture
def console(tmp_path: Path) -> Iterator[ServedConsole]:
    with Line(tmp_path) as line, ServedConsole(line) as made:
        yield made


def listen(console: ServedConsole) -> tuple[socket.socket, str]:
    """A page's connection, and the status that it was answered with."""
    address = urlsplit(console.page)
    made = socket.create_connection((address.hostname, address.port), timeout=20)
    made.sendall(f"GET /events HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
    return made, made.recv(64).decode("latin-1").split(" ")[1]


def test_more_pages_than_there_is_room_for_are_told_so_and_room_comes_back(console: ServedConsole) -> None:
    """Each costs a little; whoever leaves makes room for the next, also without a goodbye."""
    pages = [listen(console) for _ in range(MAX_PAGES)]
    refused = listen(console)
    for made, _ in [*pages, refused]:
        made.close()
    deadline = time.monotonic() + 20
    while True:
        again, status = listen(console)
        again.close()
        if status == "200" or time.monotonic() > deadline:
            break

    assert {status for _, status in pages} == {"200"} and refused[1] == "503"
    assert status == "200"
