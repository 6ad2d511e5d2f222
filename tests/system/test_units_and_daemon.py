"""What the units assume of the daemon, read from the files: folders, credentials and commands that exist."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

from edge.errors import ConfigError, LogError

UNITS = Path(__file__).parents[2] / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))


def values(text: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("unit", SERVICES, ids=lambda path: path.name)
def test_every_unit_starts_a_command_that_exists(unit: Path) -> None:
    """No unit for a command that is still to come."""
    commands = {entry.name for entry in metadata.entry_points(group="kizu.commands")}

    for line in values(unit.read_text(encoding="utf-8"), "ExecStart"):
        assert line.split()[0].endswith("/kizu") and line.split()[1] in commands


def test_the_edge_unit_passes_on_what_a_line_needs() -> None:
    """Notify, a watchdog, state that survives, a cache that may go, a secret that only the service sees."""
    text = (UNITS / "kizu-edge@.service").read_text(encoding="utf-8")
    cache = values(text, "CacheDirectory")[0]

    assert values(text, "Type") == ["notify"] and values(text, "WatchdogSec") and values(text, "StateDirectory")
    assert f"NUMBA_CACHE_DIR=/var/cache/{cache}/numba" in text and cache.startswith("kizu")
    assert values(text, "LoadCredential")[0].startswith("server.key:/")
    assert values(text, "RestartPreventExitStatus") == ["2"]


@pytest.mark.parametrize("unit", SERVICES, ids=lambda path: path.name)
def test_a_credential_that_nobody_made_does_not_keep_a_unit_from_starting(unit: Path) -> None:
    """systemd refuses to start where LoadCredential finds nothing, unless SetCredential stands in for it."""
    text = unit.read_text(encoding="utf-8")
    loaded = [line.split(":")[0] for line in values(text, "LoadCredential")]

    assert loaded and loaded == [line.split(":")[0] for line in values(text, "SetCredential")]


def test_a_line_whose_disk_is_bad_is_started_again_until_it_is_repaired() -> None:
    """Without a limit, and with the exit status of a disk that is full or read-only, not that of a wrong file."""
    text = (UNITS / "kizu-edge@.service").read_text(encoding="utf-8")

    assert values(text, "StartLimitIntervalSec") == ["0"] and values(text, "Restart") == ["on-failure"]
    assert values(text, "RestartPreventExitStatus") == [str(ConfigError.exit_code)]
    assert LogError.exit_code != ConfigError.exit_code


@pytest.mark.parametrize("unit", SERVICES, ids=lambda path: path.name)
def test_libzmq_may_set_what_it_aborts_without(unit: Path) -> None:
    """Each of its threads calls sched_setscheduler, which is in @resources; `make test-system` found it out."""
    filters = values(unit.read_text(encoding="utf-8"), "SystemCallFilter")
    without = [number for number, line in enumerate(filters) if line.startswith("~") and "@resources" in line]

    assert not without or "sched_setscheduler" in filters[without[-1] + 1 :]


def test_compiled_code_needs_pages_that_this_unit_does_not_forbid() -> None:
    """numba, OpenVINO and CUDA compile at run time; the reason stands beside the gap."""
    text = (UNITS / "kizu-edge@.service").read_text(encoding="utf-8")

    assert not values(text, "MemoryDenyWriteExecute")
    assert re.search(r"# .*MemoryDenyWriteExecute: numba", text)
