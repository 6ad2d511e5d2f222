"""What can be said of compose.yaml without docker: paths, ports and commands are those of this repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from edge.config import load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def services(text: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
    return found


def problems(text: str) -> list[str]:
    """Everything that would fail when the services are started."""
    volumes = yaml.safe_load(text)["volumes"]
    wrong = []
    for name, service in services(text).items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            there = (DEPLOY / source).exists() if source.startswith(".") else source in volumes
            wrong += [] if there else [f"{name}: {source} is not there"]
        build = service.get("build")
        if build is not None:
            wrong += [] if (DEPLOY / build["context"] / build["dockerfile"]).is_file() else [f"{name}: no Dockerfile"]
            extras = build["args"]["EXTRAS"].split(",")
            wrong += [
                f"{name}: extra {one} is unknown" for one in extras if one not in PROJECT["optional-dependencies"]
            ]
        if service["image"] == "kizu-edge":
            command = service["command"][0]
            known = PROJECT["entry-points"]["kizu.commands"]
            wrong += [] if command in known else [f"{name}: kizu {command} is unknown"]
        elif ":" not in service["image"]:
            wrong.append(f"{name}: {service['image']} names no version")
        wrong += [] if service.get("network_mode") == "host" else [f"{name}: another network than loopback"]
    return wrong


def test_whatever_the_file_names_is_there() -> None:
    """Mounted files, Dockerfile, extras and subcommands."""
    assert problems(COMPOSE.read_text()) == []


def test_control_a_file_that_would_not_start_is_noticed() -> None:
    """Planted: a path that is gone, a volume nobody declares, an unknown command and extra, an image of any version."""
    text = COMPOSE.read_text()
    for old, new in (
        ("./prometheus/rules.yaml", "./prometheus/rule.yaml"),
        ("- alertmanager:/alert", "- alerts:/alert"),
        ("[run, ", "[start, "),
        ("gpu,console", "gpus"),
        ("grafana/grafana:11.2.0", "grafana/grafana"),
    ):
        assert old in text
        text = text.replace(old, new)

    assert problems(text) == [
        "daemon: extra gpus is unknown",
        "daemon: kizu start is unknown",
        "prometheus: ./prometheus/rule.yaml is not there",
        "alertmanager: alerts is not there",
        "grafana: grafana/grafana names no version",
    ]


def test_the_line_is_what_the_services_expect() -> None:
    """Cameras, addresses and ports of line.toml are those that cameras, console and Prometheus are given."""
    line = load_config(DEPLOY / "compose" / "line.toml")
    commands = {name: service.get("command", []) for name, service in services(COMPOSE.read_text()).items()}
    senders = [command for name, command in commands.items() if name.startswith("camera-")]
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())

    assert {sender[sender.index("--camera") + 1] for sender in senders} == {camera.name for camera in line.cameras}
    assert {sender[sender.index("--to") + 1] for sender in senders} == {line.frames_address}
    assert commands["console"][1:4] == [line.events_address, "--replay", line.replay_address]
    assert scraped["scrape_configs"][0]["static_configs"][0]["targets"] == [f"{line.metrics.host}:{line.metrics.port}"]


def test_each_finds_the_next() -> None:
    """Prometheus its Alertmanager, Grafana its Prometheus and its dashboard, by the ports they are given."""
    commands = {name: " ".join(one.get("command", [])) for name, one in services(COMPOSE.read_text()).items()}
    listens = {
        name: match[1] for name, text in commands.items() if (match := re.search(r"web\.listen-address=(\S+)", text))
    }
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    provisioning = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"][0]
    provider = yaml.safe_load((provisioning / "dashboards" / "kizu.yaml").read_text())["providers"][0]
    dashboard = (DEPLOY / "grafana" / "dashboards" / "kizu.json").read_text()
    mounts = services(COMPOSE.read_text())["grafana"]["volumes"]

    assert prometheus["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] == [listens["alertmanager"]]
    assert urlsplit(source["url"]).netloc == listens["prometheus"]
    assert set(re.findall(r'"uid": "([\w-]+)"', dashboard)) == {source["uid"], "kizu"}
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts


def test_docker_compose_accepts_the_file() -> None:
    """Schema and interpolation, where a client is installed; it needs no daemon for that."""
    clients = [["docker-compose"], ["docker", "compose"]]
    client = next((one for one in clients if shutil.which(one[0]) and not _run(one, "version").returncode), None)
    if client is None:
        pytest.skip("no docker compose here (apt-get install docker-compose)")

    done = _run(client, "-f", str(COMPOSE), "config")

    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == set(services(COMPOSE.read_text()))


def _run(client: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*client, *arguments], capture_output=True, text=True, timeout=60)
