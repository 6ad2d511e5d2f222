"""`kizu doctor`: what this machine can run, what is missing, and the command that adds it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from edge.commands.nvidia import Finding, nvidia_findings, package, pip, steps

_CPU_INFO: Final = Path("/proc/cpuinfo")
_CPU_FEATURES: Final = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "asimddp")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Say what this machine can run. Exit status 0 when a line can run on it, 1 when not.

    Loads no backend and makes no GPU context, so it works with nothing installed and beside a running line.
    """
    findings = examine()
    backends, todo = usable(findings), steps(findings)
    if as_json:
        report: dict[str, Any] = {"backends": backends, "steps": todo, "findings": {f.name: f for f in findings}}
        typer.echo(msgspec.json.encode(report).decode())
    else:
        for finding in findings:
            typer.echo(f"{finding.name:<14} {told(finding)}")
        typer.echo(f"a line can run on: {', '.join(backends) or 'nothing; ' + pip('openvino')}")
        if todo:
            typer.echo("for tensorrt on this machine's GPU, in this order, then `kizu doctor` again:")
            for number, step in enumerate(todo, 1):
                typer.echo(f"  {number}. {step}")
    if not backends:
        raise typer.Exit(1)


def examine() -> list[Finding]:
    """Everything that decides what runs here, in the order in which one would put it right."""
    return [
        Finding("cpu", cpu_features(_cpu_info()) or "no vector units that we know of"),
        package("openvino", pip("openvino")),
        package("onnxruntime", pip("kizu[onnxruntime]"), "not needed beside OpenVINO"),
        *nvidia_findings(),
    ]


def usable(findings: list[Finding]) -> list[str]:
    """The backends that can run a line, by what was found."""
    found = {finding.name for finding in findings if finding.serves}
    needs = {
        "openvino": {"openvino"},
        "onnxruntime": {"onnxruntime"},
        "tensorrt": {"driver", "libcuda", "gpu", "tensorrt", "pycuda"},
    }
    return [backend for backend, parts in needs.items() if parts <= found]


def told(finding: Finding) -> str:
    """One finding in a line: what was found, or what to do and why."""
    if finding.serves:
        return str(finding.found)
    note = f" ({finding.note})" if finding.note else ""
    return "; ".join(filter(None, [f"{finding.found or 'missing'}{note}", finding.add]))


def cpu_features(cpuinfo: str) -> str:
    """Those of the vector extensions that backends use which /proc/cpuinfo names."""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return " ".join(name for name in _CPU_FEATURES if name in present)


def _cpu_info() -> str:
    try:
        return _CPU_INFO.read_text(errors="replace")
    except OSError:
        return ""
