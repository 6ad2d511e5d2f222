"""Every socket that a whole line really makes, watched as it is made: limits on all, keys on all that have a peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from edge import daemon
from edge.bundle import ModelBundle
from edge.client import Subscriber
from edge.config import load_config
from edge.daemon import Ready, StopRequest
from edge.demo.line import write_config
from edge.keys import ClientKeys
from edge.sender import CameraSender
from peers import KeyRing

LIMITS = {"LINGER": (0, 1000), "SNDHWM": (1, 1100), "RCVHWM": (1, 1100), "MAXMSGSIZE": (1, 1 << 26),
               "HANDSHAKE_IVL": (1, 5000), "HEARTBEAT_IVL": (750, 750), "HEARTBEAT_TIMEOUT": (1500, 1500),
               "IPV6": (0, 0)}  # fmt: skip


class Watch:
    """Looks at each socket at the moment at which it gets an address: later would be too late for most options."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.unlimited: list[str] = []
        self.plain: list[str] = []
        for verb in ("bind", "connect"):
            patch.setattr(zmq.Socket, verb, self._around(getattr(zmq.Socket, verb), verb))

    def _around(self, original: Any, verb: str) -> Any:
        def call(made: Any, address: str, *rest: Any) -> Any:
            kind = zmq.SocketType(made.getsockopt(zmq.TYPE)).name
            what = f"{kind} {verb}"
            self.seen.append(what)
            for name, (low, high) in LIMITS.items():
                value = made.getsockopt(getattr(zmq, name))
                if not low <= value <= high:
                    self.unlimited.append(f"{what} {address}: {name} = {value}")
            enforced = verb == "connect" or (
                made.getsockopt(zmq.CURVE_SERVER) and made.getsockopt(zmq.ZAP_ENFORCE_DOMAIN)
                and made.getsockopt(zmq.ZAP_DOMAIN).rstrip(b"\0") in (b"camera", b"subscribe", b"replay")
            )  # fmt: skip
            if not address.startswith("inproc") and not (made.getsockopt(zmq.MECHANISM) == zmq.CURVE and enforced):
                self.plain.append(f"{what} {address}")
            return original(made, address, *rest)

        return call


def run_line(folder: Path, bundle: ModelBundle, **security: Any) -> None:
    """One daemon, one camera, one subscriber, until a frame is judged and its event has come."""
    ring = KeyRing(folder)
    keys: dict[str, ClientKeys | None] = {
        "cam": ring.admit("cam", "camera"),
        "dash": ring.admit("dash", "subscribe", "replay"),
    }
    if security:
        security = {"security": {"secret_key": str(ring.secret), "peers": str(ring.peers)}}
    else:
        keys = dict.fromkeys(keys)
    addresses = {"replay_address": "tcp://127.0.0.1:*"}
    path = write_config(folder / "line.toml", bundle.path, ["cam"], engine={"backend": "fake"}, **addresses, **security)
    stop, events = StopRequest(), []

    def talk(ready: Ready) -> None:
        with (
            Subscriber(ready.events_address, keys=keys["dash"], replay=ready.replay_address) as subscriber,
            CameraSender(ready.frames_address, "cam", keys=keys["cam"]) as sender,
        ):
            subscriber.wait_until_connected(20)
            sender.send(np.zeros((64, 64), np.uint8), encoding="raw", timeout_s=20)
            assert sender.drain(20) == 0
            events.append(subscriber.receive(20)[0])

    _serve_in_this_thread(path, stop, talk)
    assert [event.camera for event in events] == ["cam"]


def _serve_in_this_thread(path: Path, stop: StopRequest, talk: Any) -> None:
    import threading

    helper: list[threading.Thread] = []

    def on_ready(ready: Ready) -> None:
        def work() -> None:
            try:
                talk(ready)
            finally:
                stop.set()

        helper.append(threading.Thread(target=work))
        helper[0].start()

    daemon.serve(load_config(path), path, stop, on_ready=on_ready)
    helper[0].join(30)


@pytest.mark.parametrize("secured", [False, True])
def test_every_socket_of_a_line_has_its_limits(
    tmp_path: Path, tiny_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch, secured: bool
) -> None:
    """Daemon, camera, subscriber, their monitors and wake-ups: queue, message, handshake and heartbeat bounded."""
    watch = Watch(monkeypatch)

    run_line(tmp_path, tiny_bundle, **({"security": True} if secured else {}))

    assert watch.unlimited == []
    assert {"ROUTER bind", "XPUB bind", "REP bind", "PAIR bind", "DEALER connect", "SUB connect"} <= set(watch.seen)


def test_a_line_with_keys_speaks_to_nobody_without(
    tmp_path: Path, tiny_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever socket is added to the daemon one day: with keys it must ask for them, under a right that exists."""
    watch = Watch(monkeypatch)

    run_line(tmp_path, tiny_bundle, security=True)

    # The control socket is a file that its owner alone may open (test_swap.py), which says as much as a key.
    assert [one for one in watch.plain if not one.endswith(".control")] == []


def test_a_bare_and_a_plain_socket_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: ZeroMQ's defaults, made past the factory."""
    watch = Watch(monkeypatch)

    with zmq.Context() as context, context.socket(zmq.PULL) as bare:
        bare.bind("tcp://127.0.0.1:*")

    assert {line.partition(": ")[2].split(" ")[0] for line in watch.unlimited} >= {"LINGER", "MAXMSGSIZE"}
    assert watch.plain == ["PULL bind tcp://127.0.0.1:*"]
