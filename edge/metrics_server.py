"""The HTTP endpoint of the metrics page: on loopback unless told otherwise, with TLS and a login where configured.

Owns the socket, its threads and who is turned away; what is on the page is `metrics`', who may read it `login`'s.
A peer that says nothing costs a thread for `TIMEOUT_S` and no more than `MOST_AT_ONCE` do; a handshake happens in that
thread, so that one who stalls in it does not keep others out, as it would in prometheus_client's own server.
"""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from types import TracebackType
from typing import Any, Final, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from edge.config import MetricsConfig
from edge.errors import ConfigError
from edge.keys import located
from edge.login import Login, load_login

TIMEOUT_S: Final = 10.0
MOST_AT_ONCE: Final = 8

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class MetricsServer:
    """The endpoint `/metrics` in threads of its own, until closed.

    `on_refused` is told one of `series.SCRAPE_REFUSALS` for everyone who did not get the page.

    Raises:
        ConfigError: the address is in use or not of this machine.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        login: Login | None = None,
        on_refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        page: Application = make_wsgi_app(registry)
        try:
            self._server = _Server(host, port, tls, on_refused)
        except OSError as error:
            raise ConfigError(
                f"metrics.port {port} on {host}: {error.strerror or error}; stop the other process or choose another "
                "metrics.port (0 lets the system choose)"
            ) from None
        self._server.set_app(page if login is None else _guarded(page, login, on_refused))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """As bound."""
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_server(asked: MetricsConfig, registry: CollectorRegistry, on_refused: Callable[[str], None]) -> MetricsServer:
    """The endpoint with address, TLS and login as configured.

    Raises:
        ConfigError: a file cannot be used, or the address.
    """
    tls, login = load_access(asked)
    return MetricsServer(registry, asked.host, asked.port, tls=tls, login=login, on_refused=on_refused)


def load_access(asked: MetricsConfig) -> tuple[ssl.SSLContext | None, Login | None]:
    """TLS and login as configured, None for what is not.

    Raises:
        ConfigError: a file cannot be used.
    """
    tls = None
    if asked.certificate is not None and asked.private_key is not None:
        tls = load_certificate(asked.certificate, asked.private_key)
    return tls, None if asked.login is None else load_login(asked.login)


def load_certificate(certificate: Path | str, private_key: Path | str) -> ssl.SSLContext:
    """TLS 1.2 or newer with the PEM files' certificate chain and key.

    Raises:
        ConfigError: a file is missing or malformed, they do not belong together, or the key is open to others.
    """
    key, by_systemd = located(str(private_key))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        mode = stat.S_IMODE(key.stat().st_mode)
        if mode & 0o077 and not by_systemd:
            raise ConfigError(f"{key} has mode {mode:04o}, so others can read the secret; run: chmod 600 {key}")
        # An encrypted key would ask the terminal for its words, and a daemon has none.
        context.load_cert_chain(located(str(certificate))[0], key, password=_no_password)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"certificate {certificate}, key {private_key}: {why}; expected a certificate chain and its unencrypted "
            "private key, both PEM"
        ) from None
    return context


def _no_password() -> str:
    raise ValueError("the private key is encrypted")


def _guarded(page: Application, login: Login, on_refused: Callable[[str], None]) -> Application:
    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if login.admits(environ.get("HTTP_AUTHORIZATION", "")):
            return page(environ, start_response)
        on_refused("login")
        challenge = [("WWW-Authenticate", 'Basic realm="kizu metrics"'), ("Content-Type", "text/plain")]
        start_response("401 Unauthorized", challenge)
        return [b"a name and a password are needed\n"]

    return guarded


class _Handler(WSGIRequestHandler):
    """One request: TLS first, where there is any; silent, for the daemon's output is its log."""

    timeout = TIMEOUT_S

    def setup(self) -> None:
        self.request.settimeout(self.timeout)
        if isinstance(self.request, ssl.SSLSocket):
            try:
                self.request.do_handshake()
            except OSError:
                assert isinstance(self.server, _Server)
                self.server.on_refused("tls")
                raise
        super().setup()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # A thread that waits for a silent peer must not hold up the end of the line.
    block_on_close = False

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, on_refused: Callable[[str], None]) -> None:
        self.on_refused = on_refused
        self._tls = tls
        self._places = threading.Semaphore(MOST_AT_ONCE)
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """As HTTPServer's, but without asking a name server who we are."""
        TCPServer.server_bind(self)
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, peer = super().get_request()
        if self._tls is not None:
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, peer

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.on_refused("busy")
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that breaks off is nobody's fault here; what is worth a number was counted."""
