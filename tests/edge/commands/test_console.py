"""`kizu console`'s options: what would show the line to strangers, or cannot work, is refused before anything opens."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge.console.feed import Sources
from edge.console.guard import read_token
from edge.console.serve import Settings, pictures_of, policy_of, serve
from edge.demo.line import ConsoleProcess
from edge.errors import CommandError, ConfigError, DataError, KizuError, LabelError

EVENTS = Sources("tcp://127.0.0.1:5551")
TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    return file


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.9"])
def test_loopback_needs_no_token(host: str) -> None:
    """Whoever is on this machine may look; only names of this machine are answered."""
    policy = policy_of(Settings(EVENTS, host=host))

    assert policy.token is None and policy.hosts == {"localhost", "127.0.0.1", "[::1]"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.7.5", "line-pc", "127.0.0.1.example.org", ""])
def test_another_host_has_to_be_stated(host: str, token: Path) -> None:
    """With the way out: ssh, or --off-host and a token."""
    with pytest.raises(CommandError, match="--off-host"):
        policy_of(Settings(EVENTS, host=host, token=token))


def test_a_stated_host_needs_a_token() -> None:
    """No page for a whole network without a word."""
    with pytest.raises(CommandError, match="--token FILE"):
        policy_of(Settings(EVENTS, host="0.0.0.0", off_host=True))


def test_a_stated_host_with_a_token_is_served(token: Path) -> None:
    """Control."""
    assert policy_of(Settings(EVENTS, host="0.0.0.0", off_host=True, token=token)).is_token(TOKEN)


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        (TOKEN, 0o644, "chmod 600"),
        ("short", 0o600, "20 to"),
        ("", 0o600, "20 to"),
        ("x" * 5000, 0o600, "20 to"),
        ("two lines\n" + TOKEN, 0o600, "one line"),
        ("pa\u00dfwort-" * 5, 0o600, "plain characters"),
    ],
)
def test_a_token_that_is_none_is_refused(tmp_path: Path, content: str, mode: int, says: str) -> None:
    """Readable by others, too short, too long, of two lines."""
    file = tmp_path / "token"
    file.write_text(content)
    file.chmod(mode)

    with pytest.raises(ConfigError, match=says):
        read_token(file)


def test_a_token_may_come_from_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copies are the service's alone, by ACL, which shows as a mode that a file of ours must not have."""
    (tmp_path / "console.token").write_text(TOKEN)
    (tmp_path / "console.token").chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))

    assert read_token(Path("credential:console.token")) == TOKEN
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token(tmp_path / "console.token")


def test_a_token_that_is_missing_comes_with_the_command_that_makes_one(tmp_path: Path) -> None:
    """The next step."""
    with pytest.raises(ConfigError, match="urandom"):
        read_token(tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"sources": Sources("tcp://10.0.0.5:5551")}, ConfigError),
        ({"sources": Sources("not an address")}, ConfigError),
        ({"sources": Sources("tcp://127.0.0.1:5551", "tcp://10.0.0.5:5552")}, ConfigError),
        ({"log": Path("/nowhere")}, CommandError),
        ({"config": Path("/nowhere.toml")}, ConfigError),
        ({"annotate": Path("/nowhere/labels.jsonl")}, LabelError),
    ],
)
def test_what_cannot_work_is_refused_at_once(changes: dict[str, Any], error: type[KizuError]) -> None:
    """Not when an operator clicks on it."""
    with pytest.raises(error):
        serve(Settings(**({"sources": EVENTS, "port": 0} | changes)))


def test_a_damaged_label_file_is_refused(tmp_path: Path) -> None:
    """Nothing is appended to what cannot be read."""
    file = tmp_path / "labels.jsonl"
    file.write_text("no label\n")

    with pytest.raises(DataError, match="line 1"):
        serve(Settings(EVENTS, port=0, annotate=file))
    assert file.read_text() == "no label\n"


def test_a_port_in_use_is_named() -> None:
    """With what to change."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="choose another"):
            serve(Settings(EVENTS, port=taken.getsockname()[1]))


def test_pictures_lie_where_the_configuration_says(tmp_path: Path) -> None:
    """Beside its event log, relative to the file."""
    config = tmp_path / "line.toml"
    config.write_text(
        'line = "l"\nbundle = "b"\nframes_address = "tcp://127.0.0.1:1"\nevents_address = "tcp://127.0.0.1:2"\n'
        '[log]\npath = "events.sqlite"\n[[cameras]]\nname = "cam1"\n'
    )

    assert pictures_of(Settings(EVENTS, config=config)) == tmp_path / "events.sqlite.rejects"


def test_the_demo_serves_the_page_as_well() -> None:
    """`kizu demo --console`: one command, one address to open."""
    words = [sys.executable, "-m", "edge.cli", "demo", "--console", "--backend", "fake", "--seconds", "0.5", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)

    assert done.returncode == 0 and "console at http://127.0.0.1:" in done.stderr, done.stderr


def test_a_console_that_cannot_serve_ends_the_demo_with_its_words(tmp_path: Path) -> None:
    """Not a demo that waits for a page which never comes."""
    ready = {"events_address": "tcp://127.0.0.1:5551", "replay_address": None}

    with pytest.raises(KizuError, match=r"nowhere\.toml"):
        ConsoleProcess(tmp_path / "nowhere.toml", ready)


def test_ending_it_is_no_error(tmp_path: Path) -> None:
    """SIGTERM, as systemd sends it: exit status 0, whoever is looking."""
    words = [sys.executable, "-m", "edge.cli", "console", EVENTS.events, "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        page = process.stdout.readline().split()[-1]
        port = int(page.rsplit(":", 1)[1].rstrip("/"))
        with socket.create_connection(("127.0.0.1", port)) as looking:
            looking.sendall(f"GET /events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            assert looking.recv(100).startswith(b"HTTP/1.1 200")
            process.terminate()
            assert process.wait(30) == 0
