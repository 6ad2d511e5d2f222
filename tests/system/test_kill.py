"""SIGKILL of daemon, cameras and subscribers at random points: nothing lost, nothing twice, no hole.

A thousand kills by one command: `make soak-kill`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
BUNDLE = HERE.parents[1] / "edge" / "demo" / "bundle"
pytestmark = pytest.mark.timeout(300)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_line", HERE / "kill_line.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_line"] = module
    spec.loader.exec_module(module)
    return module


kill_line = load()


def test_kill_of_anyone_forty_times_loses_nothing(tmp_path: Path) -> None:
    """Eight rounds; in each the daemon, two cameras and two registered subscribers are killed and started again."""
    found = kill_line.run_kills(tmp_path, BUNDLE, kills=40, seed=20)

    assert sum(found["kills"].values()) == 40
    assert {name: found[name] for name in kill_line.WRONG} == dict.fromkeys(kill_line.WRONG, 0), found
    assert found["acknowledged"] > 0 and found["bystander_saw"] > 0


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ((), None),
        (("--plant", "publish-first"), "seen_but_not_logged"),
        (("--plant", "ack-first"), "acknowledged_but_not_logged"),
    ],
)
def test_kill_between_telling_and_commit_catches_a_wrong_order(
    tmp_path: Path, options: tuple[str, ...], fault: str | None
) -> None:
    """Control: a daemon that publishes or acknowledges first is found out by the same account; the product is not."""
    with kill_line.KillLine(tmp_path, BUNDLE, daemon_options=(*options, "--stop-at", "30")) as line:
        line.start("daemon")
        line.wait_until_ready()
        line.start(kill_line.CAMERAS[0])
        line.wait_until("the moment in between", (tmp_path / "between").exists, 60)
        if fault is not None:  # what was told before the commit arrives
            told, logged = line.told, len(line.logged_now())
            line.wait_until("an event that is not logged is told", lambda: told(fault) > logged, 20)
        line.kill("daemon")
        line.kill(kill_line.CAMERAS[0])
        found = line.account()

    assert [name for name in kill_line.FAULTS if found[name]] == ([fault] if fault else []), found
