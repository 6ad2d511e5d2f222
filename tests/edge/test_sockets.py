"""The socket factory: limits everywhere, nothing in plain text off this host, clear words for a wrong address."""

from __future__ import annotations

import ast
import os
import socket as posix
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from edge import sockets
from edge.errors import ConfigError

ROOT = Path(__file__).parents[2]
LOOPBACK = "tcp://127.0.0.1:*"
Make = Callable[[], list[sockets.Socket]]

MAKERS: dict[str, Make] = {
    "router": lambda: [sockets.router(LOOPBACK, hwm=8, max_message_bytes=1000)],
    "dealer": lambda: [sockets.dealer("tcp://127.0.0.1:9", hwm=8)],
    "xpub": lambda: [sockets.xpub(LOOPBACK, hwm=8)],
    "sub": lambda: [sockets.sub("tcp://127.0.0.1:9", [b"event/"], hwm=8)],
    "wake_pair": lambda: list(sockets.wake_pair()),
}


@pytest.fixture(params=MAKERS.keys())
def made(request: pytest.FixtureRequest) -> Iterator[list[sockets.Socket]]:
    found = MAKERS[request.param]()
    yield found
    for one in found:
        one.close(linger=0)


def limits_are_set(one: Any) -> bool:
    return (
        0 < one.getsockopt(zmq.SNDHWM) <= 8
        and 0 < one.getsockopt(zmq.RCVHWM) <= 8
        and 0 <= one.getsockopt(zmq.LINGER) <= 1000
        and 0 < one.getsockopt(zmq.MAXMSGSIZE) <= 1 << 20
        and 0 < one.getsockopt(zmq.HANDSHAKE_IVL) <= 5000
        and one.getsockopt(zmq.HEARTBEAT_IVL) == 750
        and one.getsockopt(zmq.HEARTBEAT_TIMEOUT) == 1500
        and one.getsockopt(zmq.IPV6) == 0
    )


def test_every_socket_has_its_limits(made: list[sockets.Socket]) -> None:
    """Queues, lingering, message size, handshake and heartbeats are bounded on each."""
    assert [limits_are_set(one) for one in made] == [True] * len(made)


def test_a_bare_socket_would_not_pass() -> None:
    """Control: ZeroMQ's defaults wait for ever and take messages of any size."""
    with zmq.Context.instance().socket(zmq.PAIR) as bare:
        assert not limits_are_set(bare)


def test_a_dealer_queues_nothing_for_an_absent_daemon() -> None:
    """IMMEDIATE: without a connection a send says so, and the camera keeps its frame."""
    with sockets.dealer("tcp://127.0.0.1:9", hwm=8) as dealer, pytest.raises(zmq.Again):
        dealer.send(b"x", zmq.NOBLOCK)


def test_a_router_says_when_a_peer_is_gone() -> None:
    """ROUTER_MANDATORY: a reply to nobody is an error, not silence."""
    with sockets.router(LOOPBACK, hwm=8, max_message_bytes=1000) as router, pytest.raises(zmq.ZMQError) as gone:
        router.send_multipart([b"nobody", b"x"], zmq.NOBLOCK)

    assert gone.value.errno == zmq.EHOSTUNREACH


@pytest.mark.parametrize(
    "address",
    [
        "tcp://*:5550",
        "tcp://0.0.0.0:5550",
        "tcp://192.168.1.4:5550",
        "tcp://line-3.local:5550",
        "tcp://127.0.0.1.evil.org:1",
    ],
)
def test_plain_text_does_not_leave_this_host_unasked(address: str) -> None:
    """Neither encryption nor authentication exists there yet, so somebody must say that the network is his own."""
    with pytest.raises(ConfigError, match="plain_off_host"):
        sockets.check_address(address, plain_off_host=False)
    sockets.check_address(address, plain_off_host=True)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:5550", "tcp://localhost:*", "ipc:///run/kizu/a", "ipc://@kizu"])
def test_this_host_is_always_admitted(address: str) -> None:
    """Loopback and ipc."""
    sockets.check_address(address, plain_off_host=False)


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1:5550", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "udp://127.0.0.1:1", "tcp://[::1]:5550", "ipc://",
     "ipc:///" + "a" * 120, "tcp://127.0.0.1:55 50", "ws://127.0.0.1:1"],
)  # fmt: skip
def test_a_malformed_address_is_refused_with_an_example(address: str) -> None:
    """Before ZeroMQ sees it."""
    with pytest.raises(ConfigError):
        sockets.check_address(address, plain_off_host=True)


def test_a_port_in_use_is_an_error_with_the_next_step() -> None:
    """Two daemons on one port."""
    with sockets.xpub(LOOPBACK, hwm=8) as first:
        address = sockets.bound_address(first)

        with pytest.raises(ConfigError, match="in use by another process; stop that one"):
            sockets.xpub(address, hwm=8)


def test_an_ipc_path_in_use_is_not_stolen(tmp_path: Path) -> None:
    """libzmq would unlink the living daemon's socket and bind over it."""
    address = f"ipc://{os.path.relpath(tmp_path)}/a"
    with sockets.xpub(address, hwm=8), pytest.raises(ConfigError, match="in use"):
        sockets.xpub(address, hwm=8)


def test_an_ipc_path_left_by_a_dead_daemon_is_taken_over(tmp_path: Path) -> None:
    """After a kill the file is still there, but nobody listens."""
    path = os.path.relpath(tmp_path / "a")
    with posix.socket(posix.AF_UNIX) as dead:
        dead.bind(path)

    with sockets.xpub(f"ipc://{path}", hwm=8) as made:
        assert sockets.bound_address(made) == f"ipc://{path}"


def test_an_ipc_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    """The message says what to check."""
    with pytest.raises(ConfigError, match="folder of an ipc path"):
        sockets.xpub(f"ipc://{os.path.relpath(tmp_path)}/absent/a", hwm=8)


def test_a_foreign_address_of_this_network_cannot_be_bound() -> None:
    """The address must belong to this machine (192.0.2.0/24 belongs to nobody)."""
    with pytest.raises(ConfigError, match="no interface"):
        sockets.xpub("tcp://192.0.2.1:5550", hwm=8, plain_off_host=True)


def makes_a_socket(source: str) -> bool:
    """Whether code makes a ZeroMQ socket or context: `x.socket()` but Python's own, `zmq.Context()`, `zmq.Socket()`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if node.func.attr == "socket" and owner not in ("socket", "posix"):
                return True
            if owner == "zmq" and node.func.attr in ("Context", "Socket"):
                return True
    return False


def test_nothing_else_makes_a_socket() -> None:
    """One factory, so that no limit can be forgotten."""
    found = [
        str(path.relative_to(ROOT))
        for package in ("edge", "calib", "trainer")
        for path in sorted((ROOT / package).rglob("*.py"))
        if makes_a_socket(path.read_text(encoding="utf-8"))
    ]

    assert found == ["edge/sockets.py"]


def test_a_socket_made_elsewhere_would_be_found() -> None:
    """Control: the forms that it must notice, and Python's own sockets, which it must not."""
    assert makes_a_socket("import zmq\ncontext = zmq.Context()")
    assert makes_a_socket("s = self._context.socket(zmq.PUB)")
    assert not makes_a_socket("import socket\ns = socket.socket(socket.AF_UNIX)")
