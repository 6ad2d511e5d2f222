"""docs/metrics.md, from the declarations in edge/series.py: `make pages`, or `python docs/metrics_page.py`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from edge.series import GROUPS, Series  # noqa: E402

HEAD = """\
# Metrics

Written by `make pages` from `edge/series.py`; change it there. A daemon gives it all out at
`http://127.0.0.1:9464/metrics` ([configuration](configuration.md#metrics): address, TLS, login). `process_*` and
`python_*` are prometheus-client's own. Rules and alerts on them are in
[`deploy/prometheus`](../deploy/prometheus/rules.yaml), what to do about each alert in the [runbook](runbook.md).

In every scrape, for every camera: received = accepted + rejected + inconclusive + in flight, that is
`kizu_frames_received_total` = all `kizu_verdicts_total` + `kizu_frames_in_flight`.

Units are Prometheus' base units: seconds, bytes, ratios from 0 to 1; areas are in frame pixels. Labels take their
values from the configuration or from fixed lists; but for the names under which subscribers register, nothing that a
peer sends becomes one. Children exist from the start: what never happened is 0.
"""


def page() -> str:
    """The whole page, Markdown."""
    return HEAD + "".join(f"\n## {heading}\n\n{_table(group)}" for heading, group in GROUPS.items())


def _table(group: tuple[Series, ...]) -> str:
    rows = "".join(f"| `{one.shown}` | {one.kind} | {_labels(one)} | {_meaning(one)} |\n" for one in group)
    return "| series | kind | labels | meaning |\n|---|---|---|---|\n" + rows


def _labels(series: Series) -> str:
    return "; ".join(
        f"`{label}`: {', '.join(values) if isinstance(values, tuple) else values}"
        for label, values in series.labels.items()
    )


def _meaning(series: Series) -> str:
    bounds = f" Bounds: {', '.join(f'{bound:g}' for bound in series.bounds)}." if series.bounds else ""
    return series.text + bounds


if __name__ == "__main__":
    sys.stdout.write(page())
