"""A page for people: one HTML file with everything inside, printable, that loads nothing and runs nothing.

Owns escaping and looks; what is said is `certificate_page`'s and `report`'s. Text is escaped here and nowhere else:
only what this module made is taken as markup, so a file's name cannot become a tag.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.3rem; } h2 { font-size: 1.15rem; margin: 1.8rem 0 0.4rem;
  border-bottom: 1px solid #bbb; }
table { border-collapse: collapse; margin: 0.5rem 0; } th, td { text-align: left; vertical-align: top;
  padding: 0.15rem 0.9rem 0.15rem 0; border-bottom: 1px solid #e4e4e4; } th { font-weight: 600; }
td { overflow-wrap: anywhere; } code { font-size: 0.9em; overflow-wrap: anywhere; }
figure { display: inline-block; margin: 0.4rem 0.8rem 0.4rem 0; max-width: 100%; vertical-align: top; }
figure img, svg { max-width: 100%; height: auto; } figcaption { font-size: 0.85rem; max-width: 20rem;
  overflow-wrap: anywhere; }
.blank { display: inline-block; min-width: 22rem; height: 2rem; }
.note { border-left: 4px solid #b26a00; padding-left: 0.7rem; }
@media print { body { margin: 0; max-width: none; } h2, figure, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""


@dataclass(frozen=True, slots=True)
class Markup:
    """HTML that this module's functions made, or that a caller vouches for."""

    html: str


Piece = str | Markup
"""Part of a section; plain text becomes a paragraph."""

BLANK = Markup('<span class="blank"></span>')
"""Room to write by hand."""


def page(title: str, sections: Sequence[tuple[str, Sequence[Piece]]]) -> str:
    """Return a whole HTML document: `title`, then each (heading, pieces); a heading may be empty.

    The same arguments give the same text.
    """
    bodies = "\n".join(
        f"<section>{f'<h2>{escape(heading)}</h2>' if heading else ''}\n{_joined(pieces)}\n</section>"
        for heading, pieces in sections
    )
    # The policy holds whatever a browser thinks of the rest: nothing is fetched, nothing runs.
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{bodies}\n</body>\n</html>\n"
    )


def picture(png_bytes: bytes, alt: str, caption: str = "") -> Markup:
    """Return a PNG inside the page, `alt` for who cannot see it, and a caption below.

    Raises:
        ValueError: the bytes are no PNG.
    """
    if not png_bytes.startswith(PNG_SIGNATURE):
        raise ValueError(f"a page takes PNG pictures; {alt!r} is none")
    data = base64.b64encode(png_bytes).decode("ascii")
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Markup(f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alt)}">{below}</figure>')


def table(rows: Sequence[Sequence[Piece]], header: Sequence[str] = ()) -> Markup:
    """Return a table; without `header`, the first cell of each row names it."""
    head = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>" if header else ""
    return Markup(f"<table>{head}{''.join(_row(row, named=not header) for row in rows)}</table>")


def note(text: str) -> Markup:
    """Return a paragraph that stands out."""
    return Markup(f'<p class="note">{escape(text)}</p>')


def inline(piece: Piece) -> str:
    """Return HTML of `piece`, text escaped."""
    return piece.html if isinstance(piece, Markup) else escape(piece)


def _row(row: Sequence[Piece], *, named: bool) -> str:
    cells = [f"<td>{inline(cell)}</td>" for cell in row]
    if named and row:
        cells[0] = f"<th>{inline(row[0])}</th>"
    return f"<tr>{''.join(cells)}</tr>"


def _joined(pieces: Sequence[Piece]) -> str:
    return "\n".join(piece.html if isinstance(piece, Markup) else f"<p>{escape(piece)}</p>" for piece in pieces)
