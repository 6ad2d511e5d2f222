"""The units that are shipped: systemd understands every line, and the sandbox is as tight as the page says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"
EDGE, GPU = "kizu-edge@.service", "kizu-edge@.service.d/gpu.conf"
INSTALLED = "/opt/kizu/.venv/bin/kizu"
CONSOLE, PICTURES = "kizu-console@.service", "kizu-console@.service.d/pictures.conf"
EXPOSURE = {"cpu": 1.2, "gpu": 1.7, "console": 1.1, "pictures": 1.2}

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing; apt-get install systemd"
)


def place(folder: Path, *names: str, change: tuple[str, str] = ("", "")) -> Path:
    """Copy units so that they name a `kizu` of this machine; return the service."""
    for name in names:
        text = (UNITS / name).read_text(encoding="utf-8")
        assert change[0] in text
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text.replace(INSTALLED, sys.executable).replace(*change), encoding="utf-8")
    return folder / names[0]


def analyze(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *map(str, words)], capture_output=True, text=True, timeout=60)


def exposure(unit: Path) -> float:
    done = analyze("security", "--offline=true", "--no-pager", unit)
    found = re.search(r"Overall exposure level[^:]*: ([\d.]+)", done.stdout)
    assert found, done.stderr
    return float(found[1])


def units(kind: str) -> tuple[str, ...]:
    return {"cpu": (EDGE,), "gpu": (EDGE, GPU), "console": (CONSOLE,), "pictures": (CONSOLE, PICTURES)}[kind]


@pytest.mark.parametrize("kind", EXPOSURE)
def test_systemd_has_nothing_to_say_about_the_units(tmp_path: Path, kind: str) -> None:
    """A warning is an error: systemd skips a line that it does not know, and the sandbox has a hole."""
    unit = place(tmp_path, *units(kind))
    done = analyze("verify", unit.with_name(unit.name.replace("@", "@line-1")))

    assert done.stderr == "" and done.returncode == 0


def test_a_misspelled_line_would_be_noticed(tmp_path: Path) -> None:
    """Control: systemd ignores it at run time, `verify` tells."""
    unit = place(tmp_path, EDGE, change=("ProtectSystem=", "ProtectSytsem="))

    assert "ProtectSytsem" in analyze("verify", unit.with_name("kizu-edge@line-1.service")).stderr


@pytest.mark.parametrize("kind", EXPOSURE)
def test_the_sandbox_is_as_tight_as_promised(tmp_path: Path, kind: str) -> None:
    """systemd's own measure, 0 to 10; what stays open is named in the unit with its reason."""
    assert exposure(place(tmp_path, *units(kind))) <= EXPOSURE[kind]


def test_a_hole_in_the_sandbox_would_be_noticed(tmp_path: Path) -> None:
    """Control: without its system call filter the unit is above the limit."""
    assert (
        exposure(place(tmp_path, EDGE, change=("SystemCallFilter=~@privileged", "PrivateUsers=no"))) > EXPOSURE["cpu"]
    )
