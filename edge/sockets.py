"""The one socket factory: every ZeroMQ socket of the project is made here, with all its limits set.

Owns limits, addresses, encryption and the refusal to leave this host in plain text. What travels is `wire`; who is
admitted is the `doorkeeper`'s business. A socket that is given keys speaks CURVE and nothing else; without keys a TCP
address that is not loopback is refused unless the caller says `plain_off_host=True`.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket as posix
from dataclasses import dataclass
from typing import Any, Final, Literal

import zmq

from edge.errors import ConfigError
from edge.keys import ClientKeys, ServerKeys

Socket = zmq.Socket[bytes]
Context = zmq.Context[zmq.Socket[bytes]]

# Together with a camera's credit every 500 ms, a partition is noticed within 2750 ms; with 1000 and 2000 it was 3500.
HEARTBEAT_IVL_MS: Final = 750
HEARTBEAT_TIMEOUT_MS: Final = 1500
HANDSHAKE_IVL_MS: Final = 2000
LINGER_MS: Final = 500
_RECONNECT_IVL_MS: Final = 50
_RECONNECT_IVL_MAX_MS: Final = 250
# Into a network that is away the kernel would repeat its first packet after 1, 3, 7 s; a new try finds it back sooner.
_CONNECT_TIMEOUT_MS: Final = 500
# What a camera or a subscription may send to a socket that expects small messages only.
SMALL_MESSAGE_BYTES: Final = 256 * 1024
# Where libzmq asks whether a peer may come in: https://rfc.zeromq.org/spec/27/
ZAP_ADDRESS: Final = "inproc://zeromq.zap.01"
# What the doorkeeper's answer adds to each message of a connection, beside the name: two keys may bear one name.
KEY_PROPERTY: Final = "X-Kizu-Key"
_DOOR_EVENTS: Final = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_ACCEPT_FAILED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_MONITOR_STOPPED
)
_DOOR_HWM: Final = 1000

_TCP = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:]+\]|[^:/\[\]]+):(?P<port>\d{1,5}|\*)")
_LOOPBACK = re.compile(r"localhost|127\.\d{1,3}\.\d{1,3}\.\d{1,3}")
# sun_path holds 108 bytes with its closing zero.
_IPC_PATH_BYTES: Final = 107


def new_context() -> Context:
    """A context of one's own; credentials are asked for once in each, so a daemon that has keys needs its own."""
    return zmq.Context()


def router(
    address: str,
    *,
    hwm: int,
    max_message_bytes: int,
    plain_off_host: bool = False,
    context: Context | None = None,
    keys: ServerKeys | None = None,
    domain: str = "camera",
) -> Socket:
    """Bind the daemon's side of the cameras; `hwm` messages are held per camera, each part at most `max_message_bytes`.

    With `keys`, peers need the right `domain`: a `Doorkeeper` of the same context grants it, or nobody comes in.

    Raises:
        ConfigError: the address cannot be used; the message says what to do.
    """
    made = _make(zmq.ROUTER, address, hwm, max_message_bytes, plain_off_host, context, keys)
    _serve_curve(made, keys, domain)
    # A reply to an absent peer raises EHOSTUNREACH, one to a full peer EAGAIN, instead of vanishing.
    made.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return _bind(made, address)


def dealer(
    address: str,
    *,
    hwm: int,
    plain_off_host: bool = False,
    context: Context | None = None,
    keys: ClientKeys | None = None,
    max_message_bytes: int = SMALL_MESSAGE_BYTES,
) -> Socket:
    """Connect a camera; it takes messages only while connected, so nothing stale waits for a daemon that is gone."""
    made = _make(zmq.DEALER, address, hwm, max_message_bytes, plain_off_host, context, keys)
    _speak_curve(made, keys)
    made.setsockopt(zmq.IMMEDIATE, 1)
    return _connect(made, address)


def xpub(
    address: str,
    *,
    hwm: int,
    plain_off_host: bool = False,
    context: Context | None = None,
    keys: ServerKeys | None = None,
) -> Socket:
    """Bind a publisher; `hwm` messages are held per subscriber, a slower one loses the rest."""
    # All that subscribers send is topics.
    made = _make(zmq.XPUB, address, hwm, 1024, plain_off_host, context, keys)
    _serve_curve(made, keys, "subscribe")
    return _bind(made, address)


def sub(
    address: str,
    topics: list[bytes],
    *,
    hwm: int,
    plain_off_host: bool = False,
    context: Context | None = None,
    keys: ClientKeys | None = None,
) -> Socket:
    """Connect a subscriber to `topics`, in their order."""
    made = _make(zmq.SUB, address, hwm, SMALL_MESSAGE_BYTES, plain_off_host, context, keys)
    _speak_curve(made, keys)
    for topic in topics:
        made.setsockopt(zmq.SUBSCRIBE, topic)
    return _connect(made, address)


def wake_pair(context: Context | None = None) -> tuple[Socket, Socket]:
    """Two in-process sockets, (sleeper's, waker's): the sleeper polls its end together with its other sockets."""
    address = f"inproc://wake-{secrets.token_hex(8)}"
    sleeper = _bind(_make(zmq.PAIR, address, 1, 16, False, context), address)
    waker = _connect(_make(zmq.PAIR, address, 1, 16, False, context), address)
    return sleeper, waker


def zap(context: Context) -> Socket:
    """Bind the socket on which libzmq asks, for every peer of this context, whether it may come in.

    Raises:
        ConfigError: somebody answers in this context already.
    """
    return _bind(_make(zmq.REP, ZAP_ADDRESS, _DOOR_HWM, SMALL_MESSAGE_BYTES, False, context), ZAP_ADDRESS)


def watch_door(made: Socket, context: Context) -> Socket:
    """A socket that tells of connections and handshakes at `made`; it must be read until `made` is closed.

    libzmq's end of it waits where ours is full, which would stop all traffic of the context. It closes with `made`;
    a monitored socket that connects would have to be told, or it never reconnects, so this is for bound ones.
    """
    address = f"inproc://door-{secrets.token_hex(8)}"
    made.monitor(address, _DOOR_EVENTS)
    return _connect(_make(zmq.PAIR, address, _DOOR_HWM, 1024, False, context), address)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose connection a message came on: the name that the doorkeeper gave its key, and the key (Z85)."""

    name: str
    key: str


NOBODY: Final = Owner("", "")
"""No name that a peer could bear and no key that a list could hold."""


def owner_of_key(part: zmq.Frame) -> Owner:
    """Who sent this, as of its handshake; NOBODY if the doorkeeper did not say."""
    try:
        return Owner(str(part.get("User-Id")), str(part.get(KEY_PROPERTY)))
    except zmq.ZMQError:
        return NOBODY


def bound_address(made: Socket) -> str:
    """The address that a bound socket really has: the port is known where the system chose it."""
    endpoint = made.getsockopt(zmq.LAST_ENDPOINT)
    return bytes(endpoint).rstrip(b"\0").decode()


def check_address(address: str, plain_off_host: bool, secured: bool = False) -> None:
    """Refuse an address that is malformed, or off this host neither `secured` by keys nor by the caller's saying so.

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
    if not (plain_off_host or secured) and not _LOOPBACK.fullmatch(parts["host"]):
        raise ConfigError(
            f"address {address!r} is not on this host, and traffic there would be neither encrypted nor authenticated; "
            "give keys (`kizu keys`), use tcp://127.0.0.1:PORT or ipc://PATH, or state plain_off_host = true if the "
            "network is yours alone"
        )


def _make(
    kind: int,
    address: str,
    hwm: int,
    max_message_bytes: int,
    plain_off_host: bool,
    context: Context | None,
    keys: ServerKeys | ClientKeys | None = None,
) -> Socket:
    check_address(address, plain_off_host, secured=keys is not None)
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
        (zmq.CONNECT_TIMEOUT, _CONNECT_TIMEOUT_MS),
        (zmq.IPV6, 0),
    ):
        made.setsockopt(option, value)
    return made


def _serve_curve(made: Socket, keys: ServerKeys | None, domain: str) -> None:
    if keys is None:
        return
    made.setsockopt(zmq.CURVE_SERVER, 1)
    made.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    # A domain alone is not enough: without anybody to ask, libzmq would let every key in.
    made.setsockopt(zmq.ZAP_DOMAIN, domain.encode())
    made.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def _speak_curve(made: Socket, keys: ClientKeys | None) -> None:
    if keys is None:
        return
    made.setsockopt(zmq.CURVE_SERVERKEY, keys.server)
    made.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    made.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)


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
