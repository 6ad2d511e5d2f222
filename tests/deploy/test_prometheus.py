"""Rules and alerts: every one fires when it should, stays silent when it should, and says what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge.series import SERIES

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
TESTS = ROOT / "deploy" / "prometheus" / "rules_test.yaml"
RUNBOOK = ROOT / "docs" / "runbook.md"
WANTED = {
    "KizuExporterDown", "KizuNoFrames", "KizuCameraDown", "KizuDeadlineMissed", "KizuFramesDropped", "KizuInconclusive",
    "KizuChallengeFailed",
    "KizuRejectRateUp", "KizuRejectRateDown", "KizuCertificateVoid", "KizuCpuFallback", "KizuLogDiskLow",
    "KizuSubscriberLag",
}  # fmt: skip


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def promtool(*arguments: str | Path, cwd: Path = RULES.parent) -> tuple[int, str]:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    done = subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, timeout=110)
    return done.returncode, done.stdout + done.stderr


def test_promtool_accepts_the_rules_and_the_configuration() -> None:
    """Syntax and expressions, of what is shipped."""
    for arguments in (("check", "rules", "rules.yaml"), ("check", "config", "prometheus.yaml")):
        status, output = promtool(*arguments)
        assert status == 0, output


def test_alertmanager_accepts_its_configuration() -> None:
    """Routes, inhibitions, receivers."""
    if shutil.which("amtool") is None:
        pytest.skip("amtool is not installed (apt-get install prometheus-alertmanager)")
    path = ROOT / "deploy" / "alertmanager" / "alertmanager.yaml"
    done = subprocess.run(["amtool", "check-config", path], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_and_stays_silent_as_its_tests_say() -> None:
    """`promtool test rules`, over every test of the file."""
    status, output = promtool("test", "rules", "rules_test.yaml")

    assert status == 0, output


def test_every_alert_has_a_test_that_fires_and_one_that_does_not() -> None:
    """And there are those that operations were promised."""
    expected: dict[str, set[bool]] = {}
    for test in yaml.safe_load(TESTS.read_text())["tests"]:
        for check in test["alert_rule_test"]:
            fires = bool(check["exp_alerts"])
            assert test["name"] == f"{check['alertname']} {'fires' if fires else 'stays silent'}"
            expected.setdefault(check["alertname"], set()).add(fires)

    assert set(alerts()) == WANTED
    assert expected == {name: {True, False} for name in WANTED}


@pytest.mark.parametrize(("mutant", "caught"), [("kizu_no_such_series == 1", "fires"), ("vector(1)", "stays silent")])
def test_control_a_rule_that_never_fires_or_always_does_is_caught(tmp_path: Path, mutant: str, caught: str) -> None:
    """Planted in every alert at once: each of its tests of that kind fails, by name."""
    content = yaml.safe_load(RULES.read_text())
    for group in content["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["expr"], rule["for"] = mutant, "0s"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(content))
    shutil.copy(TESTS, tmp_path)

    status, output = promtool("test", "rules", "rules_test.yaml", cwd=tmp_path)

    assert status != 0
    assert set(re.findall(rf"name: (Kizu\w+) {caught}", output)) == WANTED


def test_every_alert_leads_to_its_section_of_the_runbook() -> None:
    """What it means, what to look at, what to do."""
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK.read_text(), re.MULTILINE | re.DOTALL))

    assert set(sections) == WANTED
    for name, rule in alerts().items():
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning") and rule["annotations"]["summary"]
        assert all(part in sections[name] for part in ("**Means.**", "**Look at.**", "**Do.**")), name


def test_the_rules_and_the_runbook_name_series_that_exist() -> None:
    """A series that was renamed would leave an alert that is silent for ever."""
    shown = {one.shown for one in SERIES.values()}
    for page in (RULES, TESTS, RUNBOOK):
        named = set(re.findall(r"\bkizu_[a-z0-9_]+", page.read_text(encoding="utf-8")))
        assert named and named <= shown, named - shown
