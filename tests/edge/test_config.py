"""The daemon's file: strict, with its units in its keys, and with refusals that lead to the line that is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge import config as configuration
from edge.config import load_config
from edge.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "deploy" / "line.example.toml"

MINIMAL = """\
line = "line-1"
bundle = "bundles/nuts"
frames_address = "tcp://127.0.0.1:5550"
events_address = "tcp://127.0.0.1:5551"

[[cameras]]
name = "left"

[[cameras]]
name = "right"

[log]
path = "events.sqlite"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "line.toml"
    path.write_text(text, encoding="utf-8")
    return path


def keys_shown(text: str) -> set[str]:
    """Every key of an example file, commented out or not, as `config.keys` spells them."""
    table, found = "", set()
    for line in text.splitlines():
        if header := re.fullmatch(r"\[{1,2}(\w+)\]{1,2}", line):
            table = header[1] + "."
        elif key := re.match(r"(?:# )?(\w+) = ", line):
            found.add(table + key[1])
    return found


def test_a_minimal_file_is_completed_by_defaults(tmp_path: Path) -> None:
    """Six keys make a line; everything else has a documented default."""
    config = load_config(write(tmp_path, MINIMAL))

    assert [camera.name for camera in config.cameras] == ["left", "right"]
    assert (config.engine.backend, config.window, config.metrics.host) == ("openvino", 8, "127.0.0.1")


def test_relative_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file means the same wherever the command is started."""
    path = write(tmp_path, MINIMAL)
    monkeypatch.chdir("/")

    config = load_config(path)

    assert config.bundle == str(tmp_path / "bundles" / "nuts")
    assert config.log.path == str(tmp_path / "events.sqlite")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("[log]", "[log]\nfsync = true"), r"line.toml:13: log.fsync: unknown key"),
        (("[log]", "[lgo]"), r":12: lgo: unknown key; known here: .*\blog\b"),
        (("[log]", "[batching]\nmax_wait = 5\n[log]"), r":13: batching.max_wait: .*max_wait_ms.*milliseconds"),
        (("[log]", "[batching]\nmax_wait_s = 5\n[log]"), r":13: batching.max_wait_s: .*max_wait_ms"),
        (("[log]", '[batching]\nmax_wait_ms = "5 ms"\n[log]'), r":13: batching.max_wait_ms: expected.*plain number"),
        (("[log]", "[batching]\nmax_wait_ms = -1\n[log]"), r":13: batching.max_wait_ms: expected"),
        (('name = "right"', 'name = "Right Hand"'), r":10: cameras.1.name: .*a-z"),
        (('name = "right"', 'name = "left"'), r":10: cameras.name 'left' is given twice"),
        (('name = "right"', 'name = "right"\nroi_xywh = [0, 0, 0, 5]'), r":11: cameras.1.roi_xywh"),
        (('name = "right"', 'name = "right"\nroi = [0, 0, 5, 5]'), r":11: cameras.1.roi: unknown key; .*roi_xywh"),
        (('line = "line-1"\n', ""), r"line.toml:1: line is missing"),
        (('path = "events.sqlite"', ""), r":12: log.path is missing"),
        (('line = "line-1"', 'line = "line-1\\n"'), r":1: line: "),
        (('line = "line-1"', "line = line-1"), r"not TOML.*line 1"),
        (("[log]", '[security]\npeers = "p.toml"\n[log]'), r":12: security.peers is given without .*secret_key"),
        (("[log]", "[security]\nrequire_signature = true\n[log]"), r":12: security.require_signature .* without"),
        (("[log]", '[engine]\nbackend = "cuda"\n[log]'), r":13: engine.backend: invalid enum value 'cuda'"),
        (('frames_address = "tcp://127.0.0.1:5550"', "frames_address = 5550"), r":3: frames_address: expected `str`"),
    ],
)
def test_a_wrong_file_is_refused_with_line_key_and_next_step(
    tmp_path: Path, change: tuple[str, str], expected: str
) -> None:
    """Whoever edits the file at three in the morning is led to the line."""
    path = write(tmp_path, MINIMAL.replace(*change))

    with pytest.raises(ConfigError, match=expected) as refused:
        load_config(path)
    assert refused.value.exit_code == 2


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    """No file, a folder, a binary, an enormous file: each has its own words."""
    binary, huge = tmp_path / "binary.toml", tmp_path / "huge.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    huge.write_bytes(b"#" * (configuration.MAX_CONFIG_BYTES + 1))

    for path, words in (
        (tmp_path / "none.toml", "line.example.toml"),
        (tmp_path, "Is a directory"),
        (binary, "not UTF-8"),
        (huge, "larger than"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(path)


def test_the_example_shows_every_key_and_no_other() -> None:
    """The example is the reference: a key that is added to the code must be explained there."""
    assert keys_shown(EXAMPLE.read_text(encoding="utf-8")) == configuration.keys()


def test_a_forgotten_key_in_the_example_is_noticed() -> None:
    """Control: an example without one key, or with one too many, differs."""
    text = EXAMPLE.read_text(encoding="utf-8")

    assert keys_shown(text.replace("# window = 8", "")) != configuration.keys()
    assert keys_shown(text + "\n# verbosity = 3\n") != configuration.keys()


def test_the_example_loads_as_it_stands_and_with_every_comment_taken_away(tmp_path: Path) -> None:
    """What is commented out is the default, so that a reader can trust it."""
    text = EXAMPLE.read_text(encoding="utf-8")
    full = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    optional = {
        "roi_xywh = [64, 0, 512, 480]": "",
        "min_area_px = 16": "",
        "deadline_ms = 100.0": "",
        "frozen_after = 3": "",
        'calibration = "right.camera"': "",
        'rules = "right.rules.toml"': "",
        'dir = "samples"': "",
        "every_hours = 8.0": "",
        'control_address = "ipc:///run/kizu/line-1.control"': "",
        "retain_days = 365": "",
        "retain_bytes = 10737418240": "",
        "keep_for_subscribers_days = 7": "",
        'replay_address = "tcp://127.0.0.1:5552"': "",
        'secret_key = "/etc/kizu/keys/server.key"': "",
        'peers = "/etc/kizu/peers.toml"': "",
        'signers = "/etc/kizu/signers"': "",
        'certificate = "/etc/kizu/metrics.crt"': "",
        'private_key = "/etc/kizu/metrics.key"': "",
        'login = "/etc/kizu/keys/metrics-prometheus.login"': "",
    }
    for given, nothing in optional.items():
        assert given in full
        full = full.replace(given, nothing)

    assert load_config(write(tmp_path, full)) == load_config(write(tmp_path, text))


def test_the_documentation_names_every_key() -> None:
    """docs/configuration.md has one row for each."""
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([a-z_.]+)` \|", page, re.MULTILINE)) & (configuration.keys() | {"none"})

    assert rows == configuration.keys()


def test_backends_are_those_that_the_registry_opens() -> None:
    """config may not import the registry, so the two lists are held together here."""
    from typing import get_args, get_type_hints

    from edge.engines.registry import BACKENDS

    assert get_args(get_type_hints(configuration.EngineConfig)["backend"]) == BACKENDS
