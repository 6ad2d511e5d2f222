"""Key files: private from the moment they exist, never overwritten, never printed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edge import cli, keys
from edge.admission import AllowList
from edge.errors import CommandError, ConfigError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("kind", ["server", "camera", "subscriber", "signing"])
def test_a_secret_is_private_from_its_first_byte(tmp_path: Path, kind: keys.Kind) -> None:
    """Whatever the umask: 0600 in a folder of 0700; the public half may be read by all."""
    before = os.umask(0)
    try:
        secret, public = keys.make_pair(kind, "left", tmp_path / "keys")
    finally:
        os.umask(before)

    assert (mode(secret), mode(public), mode(tmp_path / "keys")) == (0o600, 0o644, 0o700)
    assert keys.read_secret(secret, (kind,)).public_key == keys.read_public(public, (kind,)).public_key
    assert "secret_key" not in public.read_text()


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    """A second run would lock out whoever holds the first pair."""
    secret, _ = keys.make_pair("camera", "left", tmp_path / "keys")
    before = secret.read_bytes()

    with pytest.raises(CommandError, match="never overwritten"):
        keys.make_pair("camera", "left", tmp_path / "keys")
    assert secret.read_bytes() == before
    secret.unlink()
    with pytest.raises(CommandError, match=r"left.pub exists"):
        keys.make_pair("camera", "left", tmp_path / "keys")
    assert not secret.exists()


def test_a_folder_open_to_others_is_refused(tmp_path: Path) -> None:
    """The message is the command that closes it."""
    tmp_path.chmod(0o755)

    with pytest.raises(CommandError, match="chmod 700"):
        keys.make_pair("server", "server", tmp_path)


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """It may have been copied already; at least nobody runs on it unawares."""
    secret, _ = keys.make_pair("server", "server", tmp_path / "keys")
    secret.chmod(0o640)

    with pytest.raises(ConfigError, match="chmod 600"):
        keys.load_server(secret)


def test_systemd_guards_its_credentials_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copies carry an ACL for the service's user, which shows as a mode of 0440."""
    secret, _ = keys.make_pair("server", "server", tmp_path / "keys")
    secret.chmod(0o440)
    with pytest.raises(ConfigError, match="LoadCredential"):
        keys.load_server("credential:server.key")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "keys"))

    assert keys.load_server("credential:server.key").secret
    for name in ("../keys/server.key", "", ".."):
        with pytest.raises(ConfigError, match="credential:NAME"):
            keys.load_server(f"credential:{name}")


def test_a_key_serves_its_own_purpose_only(tmp_path: Path) -> None:
    """A camera's key is no daemon's, a public file no secret, and a secret file nothing to hand around."""
    server = keys.make_pair("server", "server", tmp_path / "keys")
    camera = keys.make_pair("camera", "left", tmp_path / "keys")

    for secret, words in ((camera[0], "key of a camera, expected server"), (server[1], "mode|no secret_key")):
        with pytest.raises(ConfigError, match=words):
            keys.load_server(secret)
    with pytest.raises(ConfigError, match="holds a secret"):
        keys.load_client(camera[0], server[0])
    with pytest.raises(CommandError, match="go together"):
        keys.client_keys(camera[0], None)


@pytest.mark.parametrize(
    "text",
    ["", "kind = 3", "\xff", 'kind = "server"', "x" * 5000, 'kind = "server"\nname = "a"\npublic_key = "short"',
     f'kind = "server"\nname = "a"\npublic_key = "{"#" * 40}"\nsecret_key = "{"#" * 40}"'],
)  # fmt: skip
def test_a_damaged_key_file_is_refused_without_showing_it(tmp_path: Path, text: str) -> None:
    """Errors land in logs, so they tell what is wrong and nothing of what is there."""
    path = tmp_path / "server.key"
    path.write_text(text, encoding="latin-1")
    path.chmod(0o600)

    with pytest.raises(ConfigError, match=r"is no key file|no Z85"):
        keys.load_server(path)


def test_a_changed_public_half_is_noticed(tmp_path: Path) -> None:
    """Otherwise a daemon would run under a key that nobody can address."""
    secret, _ = keys.make_pair("server", "server", tmp_path / "keys")
    other, _ = keys.make_pair("server", "other", tmp_path / "keys")
    mixed = keys.read_secret(secret, ("server",)).public_key
    theirs = keys.read_secret(other, ("server",)).public_key
    secret.write_text(secret.read_text().replace(mixed, theirs))

    with pytest.raises(ConfigError, match="does not belong"):
        keys.load_server(secret)


def test_a_secret_shows_in_no_repr(tmp_path: Path) -> None:
    """Tracebacks and logs print objects."""
    secret, _ = keys.make_pair("camera", "left", tmp_path / "keys")
    server, server_public = keys.make_pair("server", "server", tmp_path / "keys")
    shown = [keys.read_secret(secret, ("camera",)), keys.load_client(secret, server_public), keys.load_server(server)]

    for pair, path in zip(shown, (secret, secret, server), strict=True):
        line = next(line for line in path.read_text().splitlines() if line.startswith("secret_key"))
        assert line.split('"')[1] not in repr(pair)


def kizu_keys(*words: str) -> tuple[int, str, str]:
    arguments = ["keys", *words]
    done = CliRunner().invoke(cli.build(arguments), arguments)
    return done.exit_code, done.stdout, done.stderr


def test_the_command_prints_the_table_that_admits_a_camera(tmp_path: Path) -> None:
    """`kizu keys camera left >> peers.toml` is all there is to do; the secret is not printed."""
    code, out, said = kizu_keys("camera", "left", "--folder", str(tmp_path / "keys"))
    (tmp_path / "peers.toml").write_text(out)

    assert code == 0, said
    assert AllowList.load(tmp_path / "peers.toml").names("camera") == {"left"}
    secret = keys.read_secret(tmp_path / "keys" / "camera-left.key", ("camera",)).secret_key
    assert secret is not None and secret not in out + said


@pytest.mark.parametrize("words", [("robot", "left"), ("camera",), ("camera", "Left"), ("camera", "../left")])
def test_the_command_refuses_what_is_no_key(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Nothing is written."""
    code, _, said = kizu_keys(*words, "--folder", str(tmp_path / "keys"))

    assert code == 2 and said
    assert not list(tmp_path.glob("keys/*"))
