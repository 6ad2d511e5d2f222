"""The half hour's arithmetic and its load, in seconds: what grows is seen, and the load is a real one."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", Path(__file__).with_name("soak.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    return module


soak = load()


def series(mib_per_h: float = 0.0, jump_mib: float = 0.0, more_descriptors: int = 0) -> list[object]:
    """Half an hour: a warm-up that grows, noise of the allocator, and what is planted after it."""
    made = []
    for at_s in range(0, 1800, 5):
        warming = min(0, at_s - 300) / 10
        resident = 200 + warming + 0.2 * (at_s % 3) + mib_per_h * at_s / 3600 + (jump_mib if at_s >= 900 else 0)
        made.append(soak.Sample(at_s, resident, resident, 40 + (more_descriptors if at_s >= 900 else 0), at_s))
    return made


@pytest.mark.parametrize(
    ("planted", "kept"),
    [({}, True), ({"mib_per_h": 0.5}, True), ({"mib_per_h": 2.0}, False), ({"more_descriptors": 1}, False)],
)
def test_a_leak_of_memory_or_of_one_descriptor_is_seen(planted: dict[str, float], kept: bool) -> None:
    """Controls: 2 MiB an hour, and one descriptor more; the growth of the warm-up and the noise are none."""
    assert soak.account(series(**planted), warmup_s=300)["kept"] is kept


def test_too_short_a_run_says_nothing() -> None:
    """No slope from two points."""
    with pytest.raises(ValueError, match="run longer"):
        soak.account(series()[:2], warmup_s=0)


def test_the_load_is_judged_scraped_and_followed() -> None:
    """A few seconds on the fake engine: verdicts flow, nothing is out of order, the daemon ends well."""
    with tempfile.TemporaryDirectory(prefix="kizu-") as folder:
        found = soak.soak(Path(folder), seconds=3.0, warmup_s=1.0, engine={"backend": "fake"})

    assert found["verdicts"] > 0 and found["errors"] == [] and found["exit_status"] == 0
