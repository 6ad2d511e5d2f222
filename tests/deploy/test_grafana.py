"""The dashboard as a file; that its queries find what they should is tried in tests/system/test_prometheus_line.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from edge.series import SERIES

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
DASHBOARD = GRAFANA / "dashboards" / "kizu.json"


def content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


def test_the_dashboard_is_what_its_script_builds() -> None:
    """`make pages` gives no difference."""
    script = GRAFANA / "build_dashboard.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)

    assert done.stdout == DASHBOARD.read_text(encoding="utf-8"), done.stderr or "run `make pages`"


def test_every_series_is_on_the_dashboard_or_left_out_knowingly() -> None:
    """A new one must be given a place, or a reason to have none."""
    queries = " ".join(target["expr"] for panel in content()["panels"] for target in panel.get("targets", []))
    named = {re.sub(r"_bucket$", "", name) for name in re.findall(r"\bkizu_[a-z_]+", queries)}
    left_out = {
        "kizu_challenge_timestamp_seconds",  # a date; the event log has it
        "kizu_build_info",  # chooses the instance
        "kizu_last_frame_timestamp_seconds",  # the age says it
        "kizu_camera_deadline_seconds",  # a setting
        "kizu_log_disk_size_bytes",  # the alert divides by it
        "kizu_engine_fallbacks_total",  # kizu_engine_substitute says that it lasts
    }

    assert {one.shown for one in SERIES.values()} - left_out == named


def test_panels_have_numbers_of_their_own_and_say_what_they_show() -> None:
    """Grafana links to a panel by its number."""
    panels = content()["panels"]

    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["type"] == "row" or (panel["title"] and panel["description"]) for panel in panels)
