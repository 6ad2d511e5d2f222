"""`kizu doctor`: what this machine can run, what is missing, and the command that adds it."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

_DRIVER_FILE: Final = Path("/proc/driver/nvidia/version")
_FLAVORS: Final = (
    "tensorrt-rtx",
    "tensorrt-rtx-cu13",
    "tensorrt-rtx-cu13-bindings",  # with its libraries all that is needed; imports as tensorrt_rtx_bindings
    "tensorrt-rtx-cu12",
    "tensorrt-rtx-cu12-bindings",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-cu12",
)
_CPU_FEATURES: Final = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "asimddp")


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked for: what was found, None if nothing, and the command that adds it, "" if none does."""

    name: str
    found: str | None
    add: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Say what this machine can run. Exit status 0 when a line can run on it, 1 when not.

    Loads no backend and makes no GPU context, so it works with nothing installed and beside a running line.
    """
    findings = examine()
    backends = usable(findings)
    if as_json:
        report: dict[str, Any] = {"backends": backends, "findings": {f.name: f for f in findings}}
        typer.echo(msgspec.json.encode(report).decode())
    else:
        for finding in findings:
            missing = f"missing; {finding.add}" if finding.add else "missing"
            typer.echo(f"{finding.name:<14} {finding.found if finding.found is not None else missing}")
        typer.echo(f"a line can run on: {', '.join(backends) or 'nothing; pip install kizu'}")
    if not backends:
        raise typer.Exit(1)


def examine() -> list[Finding]:
    """Everything that decides what runs here, in the order in which one would put it right."""
    return [
        Finding("cpu", cpu_features(_text(Path("/proc/cpuinfo"))) or "no vector units that we know of"),
        _package("openvino", "pip install openvino"),
        _package("onnxruntime", "pip install 'kizu[onnxruntime]'"),
        Finding("driver", driver_version(_text(_DRIVER_FILE)), "install NVIDIA's driver, then see `nvidia-smi`"),
        *_gpu(),
        _tensorrt(),
        _package("pycuda", "pip install 'kizu[gpu]' (needs nvcc and g++)"),
        Finding("nvcc", _nvcc(), "install the CUDA toolkit; only building pycuda and kernels needs it"),
    ]


def usable(findings: list[Finding]) -> list[str]:
    """The backends that can run a line, by what was found."""
    found = {finding.name for finding in findings if finding.found is not None}
    needs = {
        "openvino": {"openvino"},
        "onnxruntime": {"onnxruntime"},
        "tensorrt": {"driver", "gpu", "tensorrt", "pycuda"},
    }
    return [backend for backend, parts in needs.items() if parts <= found]


def cpu_features(cpuinfo: str) -> str:
    """Those of the vector extensions that backends use which /proc/cpuinfo names."""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return " ".join(name for name in _CPU_FEATURES if name in present)


def driver_version(text: str) -> str | None:
    """The version in /proc/driver/nvidia/version; None where there is none."""
    found = re.search(r"\b(\d{3,4}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else None


def _gpu() -> list[Finding]:
    """The GPUs by nvidia-smi, which asks the driver without taking a context."""
    lines = [
        line.split(", ") for line in _output("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader")
    ]
    rows = [row for row in lines if len(row) == 2]
    step = "no NVIDIA GPU answers; see `nvidia-smi`"
    return [
        Finding("gpu", ", ".join(row[0] for row in rows) or None, step),
        Finding("compute_cap", ", ".join(f"sm_{row[1].replace('.', '')}" for row in rows) or None),
    ]


def _tensorrt() -> Finding:
    for name in _FLAVORS:
        if version := _version(name):
            return Finding("tensorrt", f"{'RTX' if 'rtx' in name else 'TensorRT'} {version}")
    return Finding("tensorrt", None, "pip install 'kizu[tensorrt-rtx]' (x86-64), or 'kizu[tensorrt]'")


def _nvcc() -> str | None:
    found = re.search(r"release ([\d.]+)", "\n".join(_output("nvcc", "--version")))
    return found[1] if found else None


def _package(name: str, add: str) -> Finding:
    return Finding(name, _version(name), add)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> list[str]:
    """What a tool prints, nothing where it is missing, fails or hangs, as nvidia-smi does on a lost GPU."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
