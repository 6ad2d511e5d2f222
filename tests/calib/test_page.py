"""A page holds everything it shows, and a name in it stays a name."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from calib.page import Markup, note, page, picture, table
from edge.images import encode_png

NASTY = "<script>alert('x')</script> & \"quoted\".png"
PNG = encode_png(np.zeros((2, 3, 1), np.uint8))


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        self.attributes += attrs


def test_text_is_text_wherever_it_stands() -> None:
    """Title, heading, paragraph, cell, caption and alternative text of a file with an awkward name."""
    whole = page(
        NASTY, [(NASTY, [NASTY, note(NASTY), table([[NASTY, NASTY]], [NASTY]), picture(PNG, NASTY, caption=NASTY)])]
    )

    assert "script" not in Tags(whole).found
    assert ("alt", NASTY) in Tags(whole).attributes


def test_control_unescaped_text_is_seen_by_the_parser_above() -> None:
    """Planted: the same name as markup."""
    assert "script" in Tags(page("t", [("", [Markup(NASTY)])])).found


def test_a_page_fetches_nothing() -> None:
    """Pictures are inside; no address of anything else."""
    whole = page("t", [("s", ["text", picture(PNG, "a part")])])
    sources = [value for name, value in Tags(whole).attributes if name in ("src", "href")]

    assert all(source is not None and source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://", whole)
    assert "default-src 'none'" in whole


def test_what_is_no_png_is_refused() -> None:
    """A JPEG under that name would be shown by some browsers and not by others."""
    with pytest.raises(ValueError, match="a part"):
        picture(b"\xff\xd8\xff", "a part")
