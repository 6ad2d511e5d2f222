"""The methods' tables are made of results, and the page shows those that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.methods_table import PAGE, RESULTS, SETS, filled, tables


def report(preset: str, sets: tuple[str, ...], figure: float) -> str:
    figures = dict.fromkeys(("image_auroc", "pixel_auroc", "au_pro_30", "au_pro_05"), figure)
    return json.dumps({"sets": {name: {"preset": preset, "ours": figures} for name in sets}})


def test_the_page_shows_the_results_that_are_there() -> None:
    """After new results: `python benchmarks/methods_table.py --write`."""
    page = PAGE.read_text(encoding="utf-8")

    assert page == filled(page, tables(RESULTS))


def test_a_method_without_results_has_no_row_and_a_missing_set_is_a_dash(tmp_path: Path) -> None:
    """A half-run method has no mean: it would be one over other sets than its neighbors'."""
    (tmp_path / "accuracy-fcdd.json").write_text(report("confetti", SETS[:2], 0.5))
    (tmp_path / "accuracy-drocc.json").write_text(report("dense", SETS, 0.25))

    drocc, fcdd = tables(tmp_path).splitlines()[2:4]

    cell = "**0.500** 0.500 / 0.500 / 0.500"
    assert fcdd == f"| [fcdd](fcdd.md) | `confetti` | {cell} | {cell} | - | - | - | - | - |"
    assert drocc.endswith("| **0.250** 0.250 / 0.250 / 0.250 |")
    assert "conad" not in tables(tmp_path)


def test_a_page_without_marks_is_left_alone() -> None:
    """Writing somewhere in it would lose what is there."""
    with pytest.raises(SystemExit, match="with the tables between them"):
        filled("a page", "tables")
