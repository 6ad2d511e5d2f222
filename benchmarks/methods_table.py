"""All methods beside each other: the tables of docs/methods/README.md, made of benchmarks/results.

    python benchmarks/methods_table.py            prints them
    python benchmarks/methods_table.py --write    puts them into the page, between its two marks

A row needs `accuracy-NAME.json` (`benchmarks/accuracy.py`, all sets) and `throughput-NAME.json`
(`benchmarks/throughput.py`); what is missing is a dash, and a method with neither has no row.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "methods" / "README.md"
BEGIN, END = "<!-- made by benchmarks/methods_table.py -->", "<!-- end -->"
SETS = ("magnetic_tile", "aitex_01", "aitex_02", "aitex_04", "hazelnut_toy", "deeppcb")
FIGURES = ("pixel_auroc", "au_pro_30", "au_pro_05")
NONE = "-"


@dataclass(frozen=True, slots=True)
class Row:
    """What a row is called, and the names of its results: of accuracy and of throughput."""

    title: str
    accuracy: str
    throughput: str | None = None


ROWS = (
    Row("[student-teacher](student-teacher.md)", "trio", "student-teacher"),
    Row("[drocc](drocc.md)", "drocc", "drocc"),
    Row("[fcdd](fcdd.md)", "fcdd", "fcdd"),
    Row("[fcdd](fcdd.md)", "fcdd-masks"),
    Row("[conad](conad.md)", "conad", "conad"),
    Row("[lrdan](lrdan.md)", "lrdan", "lrdan"),
    Row("*student-teacher, teachers that never learned*", "duo-untrained"),
    Row("*fcdd, labels drawn at random*", "fcdd-random"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into the page instead of the terminal")
    if not parser.parse_args().write:
        print(tables(RESULTS))
        return
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables(RESULTS)), encoding="utf-8")


def filled(page: str, text: str) -> str:
    """``page`` with ``text`` between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{PAGE}: expected {BEGIN} and {END}, with the tables between them")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def tables(results: Path) -> str:
    """Both tables in Markdown."""
    found = [(row, _read(results / f"accuracy-{row.accuracy}.json")) for row in ROWS]
    accuracy = [accuracy_row(row, report) for row, report in found if report]
    speed = [
        speed_row(row, one)
        for row in ROWS
        if row.throughput and (one := _read(results / f"throughput-{row.throughput}.json"))
    ]
    heads = ["method", "preset", *SETS, "mean"]
    fast = ["method", "preset", "core-ms a frame", "engine, frames/s", "daemon, frames/s", "daemon / engine"]
    return "\n".join([_markdown(heads, accuracy), "", _markdown(fast, speed)])


def accuracy_row(row: Row, report: dict[str, Any]) -> list[str]:
    """Per set the image AUROC in bold, then pixel AUROC / AU-PRO to 0.30 / to 0.05; the means of the first three."""
    sets: dict[str, Any] = report["sets"]
    presets = sorted({one["preset"] for one in sets.values()})
    cells = [_cell(sets[name]["ours"]) if name in sets else NONE for name in SETS]
    return [row.title, ", ".join(f"`{preset}`" for preset in presets), *cells, _mean(sets)]


def speed_row(row: Row, one: dict[str, Any]) -> list[str]:
    return [
        row.title, f"`{one['preset']}`", f"{one['bare_engine_core_ms_per_frame']:.1f}",
        f"{one['bare_engine_fps']:.1f}", f"{one['daemon_fps']:.1f}", f"{one['ratio']:.2f}",
    ]  # fmt: skip


def _mean(sets: dict[str, Any]) -> str:
    if any(name not in sets for name in SETS):
        return NONE
    columns = ("image_auroc", *FIGURES)
    means = {column: sum(sets[name]["ours"][column] for name in SETS) / len(SETS) for column in columns}
    return _cell(means)


def _cell(figures: dict[str, float]) -> str:
    return f"**{figures['image_auroc']:.3f}** " + " / ".join(f"{figures[name]:.3f}" for name in FIGURES)


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


if __name__ == "__main__":
    main()
