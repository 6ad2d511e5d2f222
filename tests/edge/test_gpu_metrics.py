"""GPU series: through the real binding to a library that stands in for the driver's; and nothing without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge.gpu_metrics import find_gpus
from fake_nvml import build_fake_nvml

ROOT = Path(__file__).parents[2]
PAGE = """
from prometheus_client import CollectorRegistry, generate_latest
from edge.gpu_metrics import find_gpus
registry = CollectorRegistry()
registry.register(find_gpus())
print(generate_latest(registry).decode())
"""


def test_memory_and_utilization_are_shown_and_a_lost_gpu_is_left_out(tmp_path: Path) -> None:
    """Two GPUs, one of them lost: base units, and the page comes all the same."""
    library = build_fake_nvml(tmp_path)
    if library is None:
        pytest.skip("no C compiler (apt-get install gcc libc6-dev)")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library), "PYTHONPATH": str(ROOT)}

    done = subprocess.run([sys.executable, "-c", PAGE], capture_output=True, text=True, timeout=60, env=environment)

    shown = sorted(line for line in done.stdout.splitlines() if line and line[0] != "#")
    assert shown == [
        'kizu_gpu_memory_size_bytes{gpu="0"} 8.589934592e+09',
        'kizu_gpu_memory_used_bytes{gpu="0"} 2.147483648e+09',
        'kizu_gpu_utilization_ratio{gpu="0"} 0.25',
    ], done.stderr


def test_without_the_package_there_are_no_gpu_series(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-ml-py comes with the extra `gpu` only."""
    monkeypatch.setitem(sys.modules, "pynvml", None)

    assert find_gpus() is None


def test_without_a_driver_there_are_no_gpu_series() -> None:
    """The package alone finds nothing, and says so by silence."""
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("a driver is loaded here")

    assert find_gpus() is None
