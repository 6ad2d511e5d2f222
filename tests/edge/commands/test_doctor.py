"""`kizu doctor` works on a bare machine and says what would make it a better one."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import typer

from edge.commands import doctor as command
from edge.commands.doctor import Finding, cpu_features, doctor, driver_version, examine, usable


def test_this_machine_can_run_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """--json: one object, the last line of nothing else."""
    doctor(as_json=True)

    report = json.loads(capsys.readouterr().out)
    assert "openvino" in report["backends"] and report["findings"]["openvino"]["found"]


def test_whatever_is_missing_comes_with_the_command_that_adds_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing installed at all: it still answers, and exits with 1."""
    monkeypatch.setattr(command, "_version", lambda name: None)
    monkeypatch.setattr(command, "_DRIVER_FILE", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(typer.Exit) as left:
        doctor()

    text = capsys.readouterr().out
    assert left.value.exit_code == 1
    for step in (
        "kizu[gpu]",
        "kizu[tensorrt-rtx]",
        "kizu[onnxruntime]",
        "NVIDIA's driver",
        "a line can run on: nothing",
    ):
        assert step in text


def test_a_gpu_is_told_by_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Name and compute capability, as this tool prints them."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA L4, 8.9'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    found = {finding.name: finding.found for finding in examine()}

    assert (found["gpu"], found["compute_cap"]) == ("NVIDIA L4", "sm_89")


@pytest.mark.parametrize(
    ("parts", "backends"),
    [
        (["openvino"], ["openvino"]),
        (["driver", "gpu", "tensorrt", "pycuda"], ["tensorrt"]),
        (["driver", "gpu", "tensorrt"], []),
        (["tensorrt", "pycuda"], []),
    ],
)
def test_a_backend_is_usable_when_all_it_needs_is_there(parts: list[str], backends: list[str]) -> None:
    """TensorRT needs four things; three of them run nothing."""
    assert usable([Finding(part, "1") for part in parts] + [Finding("nvcc", None)]) == backends


def test_versions_are_read_from_the_kernels_own_words() -> None:
    """/proc/driver/nvidia/version and /proc/cpuinfo, on x86-64 and Arm."""
    nvidia = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version:  13.2.0\n"

    assert driver_version(nvidia) == "580.65.06" and driver_version("") is None
    assert cpu_features("flags\t\t: fpu avx2 fma avx512_vnni\n") == "avx2 fma avx512_vnni"
    assert cpu_features("Features\t: fp asimd asimddp\n") == "asimd asimddp"
