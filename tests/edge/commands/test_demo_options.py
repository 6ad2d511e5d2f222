"""`kizu demo`: what cannot be written is refused before the line starts, not after it has run."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.commands import demo
from edge.errors import CommandError


@pytest.mark.parametrize(
    ("name", "words"), [("sheet.gif", "must end in one of"), ("absent/sheet.png", "folder does not exist")]
)
def test_a_picture_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    """Nobody watches a line for 20 s to learn that."""
    with pytest.raises(CommandError, match=words):
        demo.demo(picture=tmp_path / name)

    assert capsys.readouterr().out == ""
