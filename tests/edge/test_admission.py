"""The list of peers: strict, because a mistake in it is a door left open or a line that stands still."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.admission import AllowList, Denied, Peer, entry
from edge.errors import ConfigError

LEFT, RIGHT = "a" * 40, "b" * 40


def load(folder: Path, text: str) -> AllowList:
    (folder / "peers.toml").write_text(text)
    return AllowList.load(folder / "peers.toml")


def test_a_key_has_one_name_and_its_own_rights(tmp_path: Path) -> None:
    """Two keys may bear one name, while one of them takes over from the other."""
    text = entry("left", LEFT, ("camera",)) + entry("left", RIGHT, ("subscribe", "replay"))
    found = load(tmp_path, text)

    assert found.ask(LEFT, "camera") == Peer("left", LEFT, ("camera",))
    assert isinstance(found.ask(LEFT, "replay"), Denied) and isinstance(found.ask(RIGHT, "replay"), Peer)
    assert found.ask("c" * 40, "camera") == Denied("key_unknown", f"key {'c' * 40} is not on the list of peers")
    assert found.names("camera") == {"left"}


def test_an_empty_list_admits_nobody(tmp_path: Path) -> None:
    """It is not the same as no list."""
    assert isinstance(load(tmp_path, "").ask(LEFT, "camera"), Denied)


@pytest.mark.parametrize(
    "text",
    [
        entry("left", LEFT, ("camera",)) + entry("right", LEFT, ("camera",)),
        entry("left", LEFT, ()),
        entry("Left", LEFT, ("camera",)),
        entry("left", "short", ("camera",)),
        entry("left", LEFT, ("camera",)).replace("camera", "admin"),
        entry("left", LEFT, ("camera",)) + "more = 1\n",
        "peers = 3",
        "not toml",
    ],
)
def test_a_list_that_is_not_quite_right_is_refused(tmp_path: Path, text: str) -> None:
    """Nothing is guessed and no entry is skipped."""
    with pytest.raises(ConfigError, match=r"peers\.toml"):
        load(tmp_path, text)


def test_a_missing_list_names_the_command_that_makes_it(tmp_path: Path) -> None:
    """The next step."""
    with pytest.raises(ConfigError, match="kizu keys"):
        AllowList.load(tmp_path / "none.toml")
