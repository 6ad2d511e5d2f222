"""Guard: who may look at the page, and what a browser may do with it.

Owns the checks before any page (name of the host, token, origin of what changes something) and the headers after it.
A page on loopback is open to whoever uses this machine, but not to web sites that a browser here happens to show: those
are recognized by the Host they believe they talk to and by their Origin.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.errors import ConfigError
from edge.keys import located

COOKIE: Final = "kizu_console"
MIN_TOKEN: Final = 20
OPEN_PATHS: Final = frozenset({"/sign-in", "/static/console.css", "/static/theme.js", "/static/icon.svg"})
_MAX_TOKEN_BYTES: Final = 1024

_HEADERS: Final = {
    # Nothing from anywhere else, nothing inline: a name that held markup could not do anything even as markup.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    # Not "no-referrer": with it a browser calls the origin of our own form "null".
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or address to listen on, can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(path: Path) -> str:
    """The token in the file at `path`, or in systemd's `credential:NAME`.

    Raises:
        ConfigError: it cannot be read, others may read it, or it is too short to be a secret.
    """
    file, by_systemd = located(str(path))
    try:
        with file.open("rb") as opened:
            mode, data = file.stat().st_mode, opened.read(_MAX_TOKEN_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"token {file}: {error.strerror}; make one with `(umask 077; head -c 24 /dev/urandom | base64 > {file})`"
        ) from None
    if mode & 0o077 and not by_systemd:
        raise ConfigError(f"token {file}: others may read it (mode {mode & 0o777:o}); run `chmod 600 {file}`")
    token = data.decode("utf-8", "replace").strip()
    if len(token) < MIN_TOKEN or len(data) > _MAX_TOKEN_BYTES or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"token {file}: expected one line of {MIN_TOKEN} to {_MAX_TOKEN_BYTES} plain characters, got {len(token)}"
        )
    return token


@dataclass(frozen=True, slots=True)
class Policy:
    """`token` None asks for none; `hosts` are the names under which the page may be called, None for any.

    With a token any name will do: the cookie is bound to the name that it was given under.
    """

    token: str | None = None
    hosts: frozenset[str] | None = frozenset({"localhost", "127.0.0.1", "[::1]"})

    @property
    def session(self) -> str:
        """What the cookie holds: it proves the token without being it."""
        return hmac.new((self.token or "").encode(), b"kizu console session", hashlib.sha256).hexdigest()

    def is_token(self, given: str) -> bool:
        """Whether `given` is the token; takes the same time for every wrong one."""
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


class Guard:
    """Wraps the application; what it refuses never reaches it."""

    def __init__(self, app: ASGIApp, policy: Policy) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refusal = self._refusal(scope)
        await (self._app if refusal is None else refusal)(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        hosts = self._policy.hosts
        if hosts is not None and _without_port(host) not in hosts:
            return PlainTextResponse("this console answers to other names; open it by the address it printed", 421)
        if scope["method"] not in ("GET", "HEAD") and not _is_ours(headers, host):
            return PlainTextResponse("a page of another site may not do this", 403)
        if self._policy.token is None or path in OPEN_PATHS or self._is_signed_in(headers):
            return None
        if path == "/":
            return RedirectResponse("/sign-in", 303)
        return PlainTextResponse("sign in first", 401)

    def _is_signed_in(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._policy.is_token(given.strip()):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self._policy.session.encode())


def _is_ours(headers: Headers, host: str) -> bool:
    """Browsers say which page sent a POST; one that does not say is not from our page."""
    origin = urlsplit(headers.get("origin", ""))
    return origin.scheme in ("http", "https") and origin.netloc != "" and origin.netloc == host


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()
