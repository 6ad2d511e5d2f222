"""The metrics endpoint: on loopback, over TLS and with a login where asked, and nobody can keep others out."""

from __future__ import annotations

import base64
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from edge import cli, metrics_server
from edge.clock import ManualClock
from edge.errors import CommandError, ConfigError
from edge.login import Login, load_login, make_login
from edge.metrics import Metrics
from edge.metrics_server import MetricsServer, load_certificate
from self_signed import self_signed


@pytest.fixture
def registry() -> CollectorRegistry:
    made = CollectorRegistry()
    Metrics(made, ("left",), ManualClock())
    return made


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    return self_signed(tmp_path_factory.mktemp("tls"))


def get(url: str, *, login: str | None = None, trusted: Path | None = None) -> bytes:
    request = urllib.request.Request(url)
    if login is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    context = None if trusted is None else ssl.create_default_context(cafile=str(trusted))
    with urllib.request.urlopen(request, timeout=10, context=context) as page:
        return bytes(page.read())


def test_the_endpoint_answers_on_loopback_until_it_is_closed(registry: CollectorRegistry) -> None:
    """One page, over real HTTP, and the port is free afterwards."""
    with MetricsServer(registry, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.port}/metrics"
        assert b"kizu_frames_received_total" in get(url)

    with pytest.raises(urllib.error.URLError):
        get(url)


def test_a_port_in_use_is_a_configuration_error_that_names_the_key(registry: CollectorRegistry) -> None:
    """Two daemons on one machine: the second says which key to change."""
    with (
        MetricsServer(registry, "127.0.0.1", 0) as first,
        pytest.raises(ConfigError, match=r"metrics.port \d+ on 127.0.0.1: .*in use"),
    ):
        MetricsServer(registry, "127.0.0.1", first.port)


def test_with_a_certificate_the_page_is_given_by_tls_only(
    registry: CollectorRegistry, certificate: tuple[Path, Path]
) -> None:
    """Whoever trusts the certificate reads it; plain HTTP gets nothing, and is counted."""
    refused: SimpleQueue[str] = SimpleQueue()
    tls = load_certificate(*certificate)
    with MetricsServer(registry, "127.0.0.1", 0, tls=tls, on_refused=refused.put) as server:
        assert b"kizu_state" in get(f"https://127.0.0.1:{server.port}/metrics", trusted=certificate[0])
        with pytest.raises((OSError, urllib.error.URLError)):
            get(f"http://127.0.0.1:{server.port}/metrics")

        assert refused.get(timeout=10) == "tls" and refused.empty()


def test_without_the_name_and_the_password_there_is_no_page(registry: CollectorRegistry, tmp_path: Path) -> None:
    """401 with the challenge that Prometheus and browsers understand; each is counted."""
    login_file, password_file = make_login("prometheus", tmp_path / "keys")
    password = password_file.read_text()
    refused: Counter[str] = Counter()
    login = load_login(login_file)
    wrong = [None, "", "prometheus:", f"prometheus:{password[:-1]}", f"other:{password}", f"prometheus:{password}x"]
    with MetricsServer(registry, "127.0.0.1", 0, login=login, on_refused=lambda why: refused.update([why])) as server:
        url = f"http://127.0.0.1:{server.port}/metrics"
        for given in wrong:
            with pytest.raises(urllib.error.HTTPError) as answer:
                get(url, login=given)
            assert answer.value.code == 401 and answer.value.headers["WWW-Authenticate"].startswith("Basic")
        assert b"kizu_state" in get(url, login=f"prometheus:{password}")

    assert refused == {"login": len(wrong)}


def test_the_command_makes_a_login_and_prints_no_secret(tmp_path: Path) -> None:
    """`kizu keys metrics prometheus`: where both files are, and what each is for."""
    arguments = ["keys", "metrics", "prometheus", "--folder", str(tmp_path / "keys")]
    done = CliRunner().invoke(cli.build(arguments), arguments)
    password = (tmp_path / "keys" / "metrics-prometheus.password").read_text()

    assert done.exit_code == 0 and password not in done.output
    assert "metrics.login" in done.output and "password_file" in done.output


def test_a_login_file_holds_no_password_and_is_its_owners(tmp_path: Path) -> None:
    """Mode 0600, a digest, and a repr that shows nothing; a file open to others is refused."""
    login_file, password_file = make_login("prometheus", tmp_path / "keys")

    assert password_file.read_text() not in login_file.read_text()
    assert [path.stat().st_mode & 0o777 for path in (login_file, password_file)] == [0o600, 0o600]
    assert load_login(login_file).digest not in repr(load_login(login_file))
    login_file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_login(login_file)
    with pytest.raises(CommandError, match="nothing is overwritten"):
        make_login("prometheus", tmp_path / "keys")
    with pytest.raises(CommandError, match="a-z"):
        make_login("Prome theus", tmp_path / "keys")


@pytest.mark.parametrize("text", ["", "name = 1", 'name = "a"\nsalt = "00"\ndigest = "00"', "\udcff", "x" * 5000])
def test_what_is_no_login_file_is_refused_without_being_quoted(tmp_path: Path, text: str) -> None:
    """The message names the file and the command, never its content."""
    path = tmp_path / "login"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    path.chmod(0o600)

    with pytest.raises(ConfigError, match="kizu keys metrics NAME"):
        load_login(path)
    with pytest.raises(ConfigError, match="kizu keys metrics NAME"):
        load_login(tmp_path / "none")


@pytest.mark.parametrize("header", ["", "Basic", "Basic !!!", "Bearer abc", "Basic " + "A" * 100_000, "Basic \xff"])
def test_any_header_that_is_no_login_is_a_no(header: str) -> None:
    """Never an exception, whatever a peer writes there."""
    assert not Login("prometheus", "0" * 64, "0" * 64).admits(header)


@pytest.mark.parametrize("files", [("none.crt", "page.key"), ("page.crt", "none.key"), ("page.key", "page.crt")])
def test_a_certificate_that_cannot_be_used_is_a_configuration_error(
    certificate: tuple[Path, Path], files: tuple[str, str]
) -> None:
    """Missing, or the two mixed up."""
    folder = certificate[0].parent

    with pytest.raises(ConfigError, match="both PEM"):
        load_certificate(folder / files[0], folder / files[1])


def test_a_private_key_open_to_others_is_refused(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    """Like every other secret; the message is the command that closes it."""
    copy = tmp_path / "page.key"
    copy.write_bytes(certificate[1].read_bytes())
    copy.chmod(0o644)

    with pytest.raises(ConfigError, match="chmod 600"):
        load_certificate(certificate[0], copy)


def test_an_encrypted_key_is_refused_and_asks_nobody(certificate: tuple[Path, Path]) -> None:
    """OpenSSL would ask the terminal; the daemon has none."""
    with pytest.raises(ConfigError, match="encrypted"):
        load_certificate(certificate[0], certificate[0].parent / "locked.key")


@pytest.fixture
def silent(registry: CollectorRegistry, certificate: tuple[Path, Path]) -> Iterator[tuple[MetricsServer, Counter[str]]]:
    """A TLS server, to which peers connect that say nothing."""
    refused: Counter[str] = Counter()
    tls = load_certificate(*certificate)
    with MetricsServer(registry, "127.0.0.1", 0, tls=tls, on_refused=lambda why: refused.update([why])) as server:
        yield server, refused


def test_one_who_stalls_in_the_handshake_keeps_nobody_out(
    silent: tuple[MetricsServer, Counter[str]], certificate: tuple[Path, Path]
) -> None:
    """The page is read while another peer is connected and silent."""
    server, _ = silent
    with socket.create_connection(("127.0.0.1", server.port)):
        assert b"kizu_state" in get(f"https://127.0.0.1:{server.port}/metrics", trusted=certificate[0])


def test_no_more_than_a_few_are_served_at_once(silent: tuple[MetricsServer, Counter[str]]) -> None:
    """The ninth of nine silent peers is sent away at once, and counted."""
    server, refused = silent
    peers = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(metrics_server.MOST_AT_ONCE + 1)]
    try:
        peers[-1].settimeout(10)
        assert peers[-1].recv(1) == b""
    finally:
        for peer in peers:
            peer.close()

    assert refused["busy"] == 1


def test_a_silent_peer_is_given_up(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, certificate: tuple[Path, Path]
) -> None:
    """After the time limit its connection is closed and its thread is free again."""
    monkeypatch.setattr(metrics_server._Handler, "timeout", 0.05)
    gone = threading.Event()
    tls = load_certificate(*certificate)
    with (
        MetricsServer(registry, "127.0.0.1", 0, tls=tls, on_refused=lambda why: gone.set()) as server,
        socket.create_connection(("127.0.0.1", server.port)) as peer,
    ):
        peer.settimeout(10)
        assert peer.recv(1) == b""
        assert gone.wait(10)
