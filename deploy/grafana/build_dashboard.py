"""deploy/grafana/dashboards/kizu.json from the panels below: `make pages`. Needs grafana-foundation-sdk (extra `dev`).

Owns what the dashboard shows; every query is run against a real Prometheus beside a real daemon by
tests/system/test_prometheus_line.py. `$instance` and `$camera` are the dashboard's variables.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueTextMode, LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE: Final = DataSourceRef(type_val="prometheus", uid="kizu-prometheus")
LINE: Final = 'instance=~"$instance"'
CAMERA: Final = 'instance=~"$instance", camera=~"$camera"'
WINDOW: Final = "[$__rate_interval]"


@dataclass(frozen=True, slots=True)
class Panel:
    """`queries` are (PromQL, legend); `kind` is timeseries, stat or heatmap; `unit` is Grafana's name of one."""

    title: str
    about: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    unit: str = "short"
    width: int = 8
    height: int = 8
    name_only: bool = False


def rate(series: str, labels: str, by: str) -> str:
    """The rate of a counter, summed by labels."""
    return f"sum by ({by}) (rate({series}{{{labels}}}{WINDOW}))"


def share(part: str, whole: str, by: str) -> str:
    """The share of verdicts with labels `part` among those with `whole`; nothing where there are none."""
    verdicts = rate("kizu_verdicts_total", f"{CAMERA}, {whole}" if whole else CAMERA, by)
    return f"{rate('kizu_verdicts_total', f'{CAMERA}, {part}', by)} / ({verdicts} > 0)"


def quantiles(series: str, labels: str, by: str, *levels: float) -> tuple[tuple[str, str], ...]:
    """Quantiles of a histogram."""
    buckets = rate(f"{series}_bucket", labels, f"{by}, le")
    return tuple((f"histogram_quantile({level}, {buckets})", f"{{{{{by}}}}} p{level * 100:g}") for level in levels)


def number(title: str, about: str, query: str, legend: str = "", **options: Any) -> Panel:
    """One number, or one name, at the top."""
    return Panel(title, about, ((query, legend),), kind="stat", width=4, height=4, **options)


ROWS: Final[dict[str, tuple[Panel, ...]]] = {
    "Now": (
        number("State", "Of the daemon.", f"kizu_state{{{LINE}}} == 1", "{{state}}", name_only=True),
        number(
            "Frames", "A second, of all cameras.", rate("kizu_frames_received_total", CAMERA, "instance"), unit="ops"
        ),
        number(
            "Rejected",
            "Share of the judged parts.",
            share('decision="reject"', 'decision!="inconclusive"', "instance"),
            unit="percentunit",
        ),
        number("Certified", "1 while the certificate holds.", f"kizu_certificate_valid{{{LINE}}}"),
        number("Model", "The running bundle.", f"kizu_model_info{{{LINE}}}", "{{name}} {{preset}}", name_only=True),
        number("Engine", "What runs it.", f"kizu_engine_info{{{LINE}}}", "{{backend}} {{device}}", name_only=True),
    ),
    "Verdicts": (
        Panel(
            "Verdicts",
            "A second, by decision.",
            ((rate("kizu_verdicts_total", CAMERA, "camera, decision"), "{{camera}} {{decision}}"),),
            unit="ops",
        ),
        Panel(
            "Rejected share",
            "Of judged parts.",
            ((share('decision="reject"', 'decision!="inconclusive"', "camera"), "{{camera}}"),),
            unit="percentunit",
        ),
        Panel(
            "Inconclusive",
            "A second, by reason.",
            ((rate("kizu_verdicts_total", f'{CAMERA}, decision="inconclusive"', "reason"), "{{reason}}"),),
            unit="ops",
        ),
        Panel(
            "Silence",
            "Seconds since each camera's last frame.",
            ((f"kizu_last_frame_age_seconds{{{CAMERA}}}", "{{camera}}"),),
            unit="s",
        ),
        Panel(
            "Received, not judged yet",
            "Received is judged plus this, in every scrape.",
            ((f"kizu_frames_in_flight{{{CAMERA}}}", "{{camera}}"),),
        ),
        Panel(
            "Back again",
            "Reconnects, frames sent again, results too late to count.",
            (
                (rate("kizu_camera_reconnects_total", CAMERA, "camera"), "{{camera}} reconnects"),
                (rate("kizu_frames_duplicate_total", CAMERA, "camera"), "{{camera}} duplicates"),
                (rate("kizu_results_discarded_total", CAMERA, "camera"), "{{camera}} discarded"),
            ),
            unit="ops",
        ),
        Panel(
            "Connected",
            "1 while a camera is connected; falls within 3 s of a cut network.",
            ((f"kizu_camera_connected{{{CAMERA}}}", "{{camera}}"),),
        ),
    ),
    "Time": (
        Panel(
            "Latency",
            "Reception to durable verdict.",
            quantiles("kizu_latency_seconds", CAMERA, "camera", 0.5, 0.99),
            unit="s",
        ),
        Panel(
            "Late",
            "Share of all verdicts.",
            ((share('reason="late"', "", "camera"), "{{camera}}"),),
            unit="percentunit",
        ),
        Panel("Stages", "99 of 100 take less.", quantiles("kizu_stage_seconds", LINE, "stage", 0.99), unit="s"),
        Panel(
            "Queues",
            "Share of what can wait before each thread.",
            ((f"kizu_queue_depth{{{LINE}}} / kizu_queue_capacity{{{LINE}}}", "{{queue}}"),),
            unit="percentunit",
        ),
        Panel(
            "Coarse look first",
            "Tiles, and those computed densely.",
            (
                (rate("kizu_tiles_total", LINE, "instance"), "{{instance}} seen"),
                (rate("kizu_tiles_refined_total", LINE, "instance"), "{{instance}} refined"),
            ),
            unit="ops",
        ),
    ),
    "Quality": (
        Panel(
            "P-values",
            "Evenly spread while parts are like those of the calibration; a heap at 0 is bad parts or another picture.",
            ((f"sum by (le) (increase(kizu_score_p_value_bucket{{{CAMERA}}}{WINDOW}))", "{{le}}"),),
            kind="heatmap",
        ),
        Panel(
            "Defect area",
            "Frame pixels of a rejected part's regions.",
            quantiles("kizu_defect_area_pixels", CAMERA, "camera", 0.5, 0.95),
        ),
        Panel(
            "Watch",
            "How far on the way to voiding the certificate; 1 is there.",
            (
                (f"kizu_watch_evidence{{{CAMERA}}}", "{{camera}}"),
                (f"kizu_certificate_void{{{LINE}}}", "{{instance}} void"),
            ),
        ),
        Panel(
            "Challenge",
            "Whether the last one was passed (1 where none is asked for), and how many were taken.",
            (
                (f"kizu_challenge_passed{{{LINE}}}", "{{instance}} passed"),
                (f"kizu_challenges_total{{{LINE}}}", "{{instance}} {{result}}"),
            ),
        ),
    ),
    "Log and subscribers": (
        Panel(
            "Commit", "Insert to synced.", quantiles("kizu_log_commit_seconds", LINE, "instance", 0.5, 0.99), unit="s"
        ),
        Panel(
            "Events",
            "Logged, sent again, not published.",
            (
                (rate("kizu_log_group_events_total", LINE, "instance"), "{{instance}} logged"),
                (rate("kizu_events_replayed_total", LINE, "instance"), "{{instance}} sent again"),
                (rate("kizu_events_unpublished_total", LINE, "instance"), "{{instance}} not published"),
            ),
            unit="ops",
        ),
        Panel(
            "Lag",
            "Events behind, and events that retention took before a subscriber had them.",
            (
                (f"kizu_subscriber_lag_events{{{LINE}}}", "{{name}} behind"),
                (f"kizu_subscriber_passed_events_total{{{LINE}}}", "{{name}} passed"),
            ),
        ),
        Panel(
            "Log",
            "Bytes, and what its disk has left.",
            (
                (f"kizu_log_bytes{{{LINE}}}", "{{instance}} log"),
                (f"kizu_log_disk_free_bytes{{{LINE}}}", "{{instance}} free"),
            ),
            unit="bytes",
        ),
        Panel(
            "Head",
            "The log's last sequence, and the last that retention took.",
            (
                (f"kizu_log_head{{{LINE}}}", "{{instance}} head"),
                (f"kizu_log_removed_through{{{LINE}}}", "{{instance}} removed"),
            ),
        ),
        Panel(
            "Frames of rejected parts not kept",
            "A second.",
            ((rate("kizu_reject_frames_dropped_total", LINE, "instance"), "{{instance}}"),),
            unit="ops",
        ),
    ),
    "Refused and mended": (
        Panel(
            "Messages refused",
            "A second, by reason.",
            ((rate("kizu_messages_refused_total", LINE, "reason"), "{{reason}}"),),
            unit="ops",
        ),
        Panel(
            "Connections",
            "A second: by how far they came, and why some did not.",
            (
                (rate("kizu_connections_total", LINE, "socket, step"), "{{socket}} {{step}}"),
                (rate("kizu_connections_refused_total", LINE, "reason"), "refused: {{reason}}"),
                (rate("kizu_scrapes_refused_total", LINE, "reason"), "this page: {{reason}}"),
            ),
            unit="ops",
        ),
        Panel(
            "Engine and threads",
            "Failed batches, engines opened again, the CPU in the GPU's place, crashes; all should stay 0.",
            (
                (f"kizu_engine_failures_total{{{LINE}}}", "{{instance}} failures"),
                (f"kizu_engine_reopens_total{{{LINE}}}", "{{instance}} opened again"),
                (f"kizu_engine_substitute{{{LINE}}}", "{{instance}} CPU for GPU"),
                (f"sum by (instance) (kizu_thread_crashes_total{{{LINE}}})", "{{instance}} crashes"),
            ),
        ),
    ),
    "Host": (
        Panel(
            "Processor",
            "Cores that the daemon uses.",
            ((f"rate(process_cpu_seconds_total{{{LINE}}}{WINDOW})", "{{instance}}"),),
        ),
        Panel("Memory", "Resident.", ((f"process_resident_memory_bytes{{{LINE}}}", "{{instance}}"),), unit="bytes"),
        Panel(
            "GPU",
            "Where there is one: busy, and memory in use.",
            (
                (f"kizu_gpu_utilization_ratio{{{LINE}}}", "{{gpu}} busy"),
                (f"kizu_gpu_memory_used_bytes{{{LINE}}} / kizu_gpu_memory_size_bytes{{{LINE}}}", "{{gpu}} memory"),
            ),
            unit="percentunit",
        ),
    ),
}


def build() -> str:
    """The dashboard as JSON; the same bytes every time."""
    made = (
        dashboard.Dashboard("Kizu")
        .uid("kizu")
        .tags(["kizu"])
        .description("One inspection line: verdicts, time, quality, log, refusals, host.")
        .refresh("15s")
        .time("now-1h", "now")
        .timezone("browser")
        .with_variable(_variable("instance", "label_values(kizu_build_info, instance)"))
        .with_variable(_variable("camera", f"label_values(kizu_frames_received_total{{{LINE}}}, camera)"))
    )
    ids = count(1)
    for title, panels in ROWS.items():
        made = made.with_row(dashboard.Row(title).id(next(ids)))
        for panel in panels:
            made = made.with_panel(_panel(panel).id(next(ids)))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def _variable(name: str, query: str) -> dashboard.QueryVariable:
    variable = (
        dashboard.QueryVariable(name).datasource(SOURCE).query(query).refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    )
    return variable.multi(True).include_all(True)


def _panel(panel: Panel) -> Any:
    targets = _targets(panel)
    if panel.kind == "stat":
        text = BigValueTextMode.NAME if panel.name_only else BigValueTextMode.VALUE
        newest = common.ReduceDataOptions().calcs(["lastNotNull"])
        made: Any = stat.Panel().text_mode(text).unit(panel.unit).reduce_options(newest)
    elif panel.kind == "heatmap":
        made = heatmap.Panel().calculate(False)
    else:
        legend = common.VizLegendOptions().show_legend(True)
        legend = legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).calcs([])
        made = timeseries.Panel().unit(panel.unit).min(0).fill_opacity(5).legend(legend)
    made = made.title(panel.title).description(panel.about).datasource(SOURCE).span(panel.width).height(panel.height)
    for target in targets:
        made = made.with_target(target)
    return made


def _targets(panel: Panel) -> Sequence[prometheus.Dataquery]:
    shape = PromQueryFormat.HEATMAP if panel.kind == "heatmap" else PromQueryFormat.TIME_SERIES
    return [
        prometheus.Dataquery().expr(query).legend_format(legend).ref_id(chr(ord("A") + index)).format(shape)
        for index, (query, legend) in enumerate(panel.queries)
    ]


if __name__ == "__main__":
    sys.stdout.write(build())
