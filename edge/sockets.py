"""The one socket factory: every ZeroMQ socket of the project is made here, with all its limits set.

Owns limits, addresses and the refusal to leave this host in plain text. What travels is `wire`; who talks is the
callers' business. Credentials (CURVE) come with a later issue; until then a TCP address that is not loopback is
refused unless the caller says `plain_off_host=True`.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket as posix
from typing import Any, Final, Literal

import zmq

from edge.errors import ConfigError

Socket = zmq.Socket[bytes]
Context = zmq.Context[zmq.Socket[bytes]]

HEARTBEAT_IVL_MS: Final = 1000
HEARTBEAT_TIMEOUT_MS: Final = 2000
HANDSHAKE_IVL_MS: Final = 2000
LINGER_MS: Final = 500
_RECONNECT_IVL_MS: Final = 50
_RECONNECT_IVL_MAX_MS: Final = 500
# What a camera or a subscription may send to a socket that expects small messages only.
SMALL_MESSAGE_BYTES: Final = 256 * 1024

_TCP = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:]+\]|[^:/\[\]]+):(?P<port>\d{1,5}|\*)")
_LOOPBACK = re.compile(r"localhost|127\.\d{1,3}\.\d{1,3}\.\d{1,3}")
# sun_path holds 108 bytes with its closing zero.
_IPC_PATH_BYTES: Final = 107


def router(
    address: str, *, hwm: int, max_message_bytes: int, plain_off_host: bool = False, context: Context | None = None
) -> Socket:
    """Bind the daemon's side of the cameras; `hwm` messages are held per camera, each part at most `max_message_bytes`.

    Raises:
        ConfigError: the address cannot be used; the message says what to do.
    """
    made = _make(zmq.ROUTER, address, hwm, max_message_bytes, plain_off_host, context)
    # A reply to an absent peer raises EHOSTUNREACH, one to a full peer EAGAIN, instead of vanishing.
    made.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return _bind(made, address)


def dealer(
    address: str,
    *,
    hwm: int,
    plain_off_host: bool = False,
    context: Context | None = None,
    max_message_bytes: int = SMALL_MESSAGE_BYTES,
) -> Socket:
    """Connect a camera; it takes messages only while connected, so nothing stale waits for a daemon that is gone."""
    made = _make(zmq.DEALER, address, hwm, max_message_bytes, plain_off_host, context)
    made.setsockopt(zmq.IMMEDIATE, 1)
    return _connect(made, address)


def xpub(address: str, *, hwm: int, plain_off_host: bool = False, context: Context | None = None) -> Socket:
    """Bind a publisher; `hwm` messages are held per subscriber, a slower one loses the rest."""
    # All that subscribers send is topics.
    return _bind(_make(zmq.XPUB, address, hwm, 1024, plain_off_host, context), address)


def sub(
    address: str, topics: list[bytes], *, hwm: int, plain_off_host: bool = False, context: Context | None = None
) -> Socket:
    """Connect a subscriber to `topics`, in their order."""
    made = _make(zmq.SUB, address, hwm, SMALL_MESSAGE_BYTES, plain_off_host, context)
    for topic in topics:
        made.setsockopt(zmq.SUBSCRIBE, topic)
    return _connect(made, address)


def wake_pair(context: Context | None = None) -> tuple[Socket, Socket]:
    """Two in-process sockets, (sleeper's, waker's): the sleeper polls its end together with its other sockets."""
    address = f"inproc://wake-{secrets.token_hex(8)}"
    sleeper = _bind(_make(zmq.PAIR, address, 1, 16, False, context), address)
    waker = _connect(_make(zmq.PAIR, address, 1, 16, False, context), address)
    return sleeper, waker


def bound_address(made: Socket) -> str:
    """The address that a bound socket really has: the port is known where the system chose it."""
    endpoint = made.getsockopt(zmq.LAST_ENDPOINT)
    return bytes(endpoint).rstrip(b"\0").decode()


def check_address(address: str, plain_off_host: bool) -> None:
    """Refuse an address that is malformed, or off this host without the caller's saying so.

    Raises:
        ConfigError: with the next step.
    """
    if address.startswith("inproc://"):
        return
    if address.startswith("ipc://"):
        path = address.removeprefix("ipc://")
        if not path or len(os.fsencode(path)) > _IPC_PATH_BYTES:
            raise ConfigError(
                f"address {address!r}: an ipc path has 1 to {_IPC_PATH_BYTES} bytes; choose a shorter one"
            )
        return
    parts = _TCP.fullmatch(address)
    if parts is None or (parts["port"] != "*" and int(parts["port"]) > 65535):
        raise ConfigError(f"address {address!r}: expected tcp://HOST:PORT or ipc://PATH, e.g. tcp://127.0.0.1:5550")
    if parts["host"].startswith("["):
        raise ConfigError(f"address {address!r}: IPv6 is switched off; give an IPv4 address or a name")
    if not plain_off_host and not _LOOPBACK.fullmatch(parts["host"]):
        raise ConfigError(
            f"address {address!r} is not on this host, and traffic there would be neither encrypted nor authenticated; "
            "use tcp://127.0.0.1:PORT or ipc://PATH, or state plain_off_host = true if the network is yours alone"
        )


def _make(
    kind: int, address: str, hwm: int, max_message_bytes: int, plain_off_host: bool, context: Context | None
) -> Socket:
    check_address(address, plain_off_host)
    owner: Any = context if context is not None else zmq.Context.instance()
    made: Socket = owner.socket(kind)
    for option, value in (
        (zmq.SNDHWM, hwm),
        (zmq.RCVHWM, hwm),
        (zmq.LINGER, LINGER_MS),
        (zmq.MAXMSGSIZE, max_message_bytes),
        (zmq.HANDSHAKE_IVL, HANDSHAKE_IVL_MS),
        (zmq.HEARTBEAT_IVL, HEARTBEAT_IVL_MS),
        (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
        (zmq.RECONNECT_IVL, _RECONNECT_IVL_MS),
        (zmq.RECONNECT_IVL_MAX, _RECONNECT_IVL_MAX_MS),
        (zmq.IPV6, 0),
    ):
        made.setsockopt(option, value)
    return made


def _bind(made: Socket, address: str) -> Socket:
    try:
        # libzmq unlinks an ipc path before it binds, which would silently take the address from a living daemon.
        if address.startswith("ipc://") and _ipc_is_alive(address.removeprefix("ipc://")):
            raise ConfigError(
                f"address {address!r} is in use by another process; stop that one or choose another address"
            )
        made.bind(address)
    except zmq.ZMQError as error:
        made.close(linger=0)
        raise ConfigError(f"address {address!r}: {_next_step(error, 'bind')}") from None
    except ConfigError:
        made.close(linger=0)
        raise
    return made


def _connect(made: Socket, address: str) -> Socket:
    try:
        made.connect(address)
    except zmq.ZMQError as error:
        made.close(linger=0)
        raise ConfigError(f"address {address!r}: {_next_step(error, 'connect')}") from None
    return made


def _next_step(error: zmq.ZMQError, verb: Literal["bind", "connect"]) -> str:
    if error.errno == zmq.EADDRINUSE:
        return "in use by another process; stop that one or choose another port"
    if error.errno in (zmq.EADDRNOTAVAIL, errno.ENODEV):
        return "no interface of this machine has that address; see `ip address`"
    return f"cannot {verb}: {error.strerror}; check that the folder of an ipc path exists and may be written"


def _ipc_is_alive(path: str) -> bool:
    if path.startswith("@") or not os.path.exists(path):
        return False
    with posix.socket(posix.AF_UNIX, posix.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
