"""Prometheus, Alertmanager and a webhook as real processes and sockets, with the shipped files, only quicker.

Owns ports, the quickened copies and waiting; what must then be seen is the tests' business.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
NEEDED = ("prometheus", "promtool", "prometheus-alertmanager")


def missing() -> str | None:
    """Why nothing of this can run here; None if it can."""
    gone = [name for name in NEEDED if shutil.which(name) is None]
    return f"{', '.join(gone)} not installed (apt-get install prometheus prometheus-alertmanager)" if gone else None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def until(ask: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """What `ask` returns once it returns something; an assertion after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if answer := ask():
            return answer
        time.sleep(0.1)
    raise AssertionError(f"no {what} within {timeout_s} s")


# --- the shipped files, quickened -------------------------------------------------------------------------------------


def quick_rules(text: str) -> str:
    """The same rules, with a short `for` and age of a silent camera."""
    text = re.sub(r"( for: )\w+", r"\g<1>1s", text)
    text, changed = re.subn(r"(kizu_last_frame_age_seconds\)? > )30", r"\g<1>8", text)
    assert changed == 2, "the alerts on silent cameras are written otherwise now"
    return text


def quick_prometheus(text: str, folder: Path, target: str, alertmanager: str) -> str:
    """The same configuration with this target and Alertmanager, scraping every second; by TLS and login as it shows.

    What the page's `ca_file` and `password_file` are is to be found in `folder`.
    """
    text, shown = re.subn(r"^    # (scheme|tls_config|basic_auth)", r"    \1", text, flags=re.MULTILINE)
    assert shown == 3, "how a page with TLS and login is scraped is shown otherwise now"
    content = yaml.safe_load(text.replace("/etc/prometheus/", f"{folder}/"))
    content["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    content["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager]
    content["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    return yaml.safe_dump(content)


def quick_alertmanager(text: str, webhook: str) -> str:
    """The same routes and inhibitions, told at once, to this receiver."""
    content = yaml.safe_load(text)
    content["route"] |= {"group_wait": "1s", "group_interval": "1s"}
    content["receivers"][0]["webhook_configs"][0]["url"] = webhook
    return yaml.safe_dump(content)


# --- processes --------------------------------------------------------------------------------------------------------


class Webhook:
    """Takes what Alertmanager sends: `alerts` are (status, labels), oldest first."""

    def __init__(self) -> None:
        alerts: list[tuple[str, dict[str, str]]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                alerts.extend((alert["status"], alert["labels"]) for alert in body["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.alerts = alerts
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def told(self, status: str, **labels: str) -> bool:
        """Whether an alert with these labels among its own was told in this status."""
        return any(status == seen and labels.items() <= given.items() for seen, given in list(self.alerts))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Alertmanager:
    """Asked and told over its HTTP interface."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/api/v2/alerts"

    def tell(self, *alerts: dict[str, str]) -> None:
        """As Prometheus does: these alerts, by their labels, fire."""
        body = json.dumps([{"labels": labels} for labels in alerts]).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10):
            pass

    def states(self, instance: str) -> dict[str, str]:
        """`active` or `suppressed` by name of each alert of an instance; without those not looked at yet."""
        with urllib.request.urlopen(self.url, timeout=10) as answer:
            found = [one for one in json.load(answer) if one["labels"].get("instance") == instance]
        return {one["labels"]["alertname"]: one["status"]["state"] for one in found}


class Prometheus:
    """Asked over its HTTP interface."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _get(self, path: str, **arguments: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(arguments)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of every series that an instant query gives."""
        found = self._get("/api/v1/query", query=expression)
        assert found["resultType"] == "vector", expression
        return [(one["metric"], float(one["value"][1])) for one in found["result"]]

    def history(self, expression: str, seconds: int) -> list[float]:
        """Every value of every series over the last `seconds`, a second apart."""
        now = time.time()
        found = self._get("/api/v1/query_range", query=expression, start=str(now - seconds), end=str(now), step="1")
        return [float(value) for one in found["result"] for _, value in one["values"]]

    def firing(self) -> set[str]:
        """The alerts that fire now."""
        return {one["labels"]["alertname"] for one in self._get("/api/v1/alerts")["alerts"] if one["state"] == "firing"}


@contextmanager
def watched(folder: Path, target: str) -> Iterator[tuple[Prometheus, Alertmanager, Webhook]]:
    """Prometheus that scrapes `target` by the shipped rules, Alertmanager behind it, a webhook behind that.

    `folder` holds the page's certificate and password, by the names in the shipped configuration.
    """
    own, its = free_port(), free_port()
    webhook = Webhook()
    (folder / "rules.yaml").write_text(quick_rules((DEPLOY / "prometheus" / "rules.yaml").read_text()))
    shipped = (DEPLOY / "prometheus" / "prometheus.yaml").read_text()
    (folder / "prometheus.yaml").write_text(quick_prometheus(shipped, folder, target, f"127.0.0.1:{its}"))
    shipped = (DEPLOY / "alertmanager" / "alertmanager.yaml").read_text()
    (folder / "alertmanager.yaml").write_text(quick_alertmanager(shipped, webhook.url))
    commands = [
        "prometheus --config.file=prometheus.yaml --storage.tsdb.path=tsdb --rules.alert.resend-delay=1s "
        f"--web.listen-address=127.0.0.1:{own}",
        "prometheus-alertmanager --config.file=alertmanager.yaml --storage.path=alerts --cluster.listen-address= "
        f"--web.listen-address=127.0.0.1:{its}",
    ]
    running: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "monitoring.log").open("wb") as log:
            running += [subprocess.Popen(command.split(), stdout=log, stderr=log, cwd=folder) for command in commands]
        for port in (own, its):
            until(lambda port=port: _answers(port), 60, f"answer on port {port}: {folder}/monitoring.log")
        yield Prometheus(f"http://127.0.0.1:{own}"), Alertmanager(f"http://127.0.0.1:{its}"), webhook
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(20)
        webhook.close()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
