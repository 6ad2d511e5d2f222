"""Accuracy against cost: one table and one picture from what `accuracy.py` wrote.

    python benchmarks/tradeoff.py benchmarks/results/accuracy-*.json --plot docs/tradeoff.png

Each file is one preset (or control) judged on some sets; the name in the table is the file's. Prints the markdown table
that docs/benchmarks.md holds. Means are over the sets that a file has, PaDiM's beside them over the same sets; the cost
is core-milliseconds an image at 256 x 256 on the machine that judged. PaDiM's cost was not measured there, so it is a
line in the picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

SETS = ("magnetic_tile", "aitex_01", "aitex_02", "aitex_04", "hazelnut_toy", "elpv_mono", "deeppcb")
MEANS = ("image_auroc", "au_pro_30")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path, default=None)
    options = parser.parse_args()
    results = {path.stem.removeprefix("accuracy-"): json.loads(path.read_text())["sets"] for path in options.files}
    print(table(results))
    if options.plot is not None:
        draw(results, options.plot)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Image AUROC, pixel AUROC and AU-PRO to 0.30 / 0.05 for every set, a row a preset; means and cost at the end."""
    lines = [
        "| preset | " + " | ".join(SETS) + " | mean image AUROC (PaDiM) | mean AU-PRO .30 (PaDiM) | core-ms |",
        "|---|" + "---|" * (len(SETS) + 3),
    ]
    for name, sets in results.items():
        cells = [_cell(sets[one]) if one in sets else "not run" for one in SETS]
        means = [f"{_mean(sets, key, 'ours'):.3f} ({_mean(sets, key, 'padim'):.3f})" for key in MEANS]
        lines.append(f"| `{name}` | {' | '.join([*cells, *means, f'{_cost(sets):.0f}'])} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    ours = row["ours"]
    low, high = ours["intervals"]["image_auroc"]
    rest = [ours[key] for key in ("pixel_auroc", "au_pro_30", "au_pro_05")]
    shown = " / ".join("-" if value is None else f"{value:.3f}" for value in rest)
    return f"**{ours['image_auroc']:.3f}** ({low:.2f}-{high:.2f}) {shown}"


def _mean(sets: dict[str, Any], figure: str, who: str) -> float:
    """Over the sets for which both have the figure."""
    rows = [row for row in sets.values() if row["ours"].get(figure) is not None and figure in row["padim"]]
    return statistics.mean(row[who][figure] for row in rows)


def _cost(sets: dict[str, Any]) -> float:
    return statistics.median(row["core_ms"] for row in sets.values())


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Mean image AUROC and mean AU-PRO over core-milliseconds; PaDiM's mean over all sets as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharex=True)
    full = max(results.values(), key=len)
    for axis, key, title in zip(axes, ("image_auroc", "au_pro_30"), ("image AUROC", "AU-PRO to 0.30"), strict=True):
        for name, sets in results.items():
            axis.plot(_cost(sets), _mean(sets, key, "ours"), "o")
            label = name if len(sets) == len(full) else f"{name} ({len(sets)} sets)"
            axis.annotate(label, (_cost(sets), _mean(sets, key, "ours")), xytext=(5, 4), textcoords="offset points")
        axis.axhline(_mean(full, key, "padim"), linestyle="--", linewidth=1, color="gray")
        axis.annotate("PaDiM ResNet-18", (0.98, _mean(full, key, "padim")), xycoords=("axes fraction", "data"),
                      ha="right", va="bottom", color="gray")  # fmt: skip
        axis.set_title(f"mean {title}")
        axis.set_xlabel("core-ms an image")
        axis.set_xlim(left=0)
        axis.margins(0.15)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
