"""The units under a real systemd: READY, sandbox, credentials, a hung line killed by its watchdog, restart, state kept.

Run by `make test-system`, as root, where systemd-nspawn is (apt-get install systemd-container). This machine's own
files become the container's, under an overlay in memory, so nothing here is changed and nothing is downloaded. The
container boots systemd and runs this file again, inside (`--inside`), which starts the shipped `kizu-edge@line-1`.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNIT = "kizu-edge@line-1"
CONSOLE = "kizu-console@line-1"
KIZU = "/opt/kizu/.venv/bin/kizu"
HANG = Path("/etc/kizu/hang")
PHOTOS = "/opt/kizu/src/edge/demo/photos/test/good"
RESULTS = Path("/kizu-results.jsonl")
TOKEN = "correct-horse-battery-staple"
SECONDS = 400

LINE = """\
line = "line-1"
bundle = "/opt/kizu/src/edge/demo/bundle"
frames_address = "tcp://127.0.0.1:5550"
events_address = "tcp://127.0.0.1:5551"
replay_address = "tcp://127.0.0.1:5552"
[[cameras]]
name = "left"
[log]
path = "/var/lib/kizu/line-1/events.sqlite"
[security]
secret_key = "credential:server.key"
peers = "/etc/kizu/peers.toml"
[metrics]
certificate = "/etc/kizu/metrics.crt"
private_key = "credential:metrics.key"
login = "credential:metrics.login"
"""
CONSOLE_LINE = """\
KIZU_EVENTS=tcp://127.0.0.1:5551
KIZU_REPLAY=tcp://127.0.0.1:5552
KIZU_CONSOLE_OPTIONS=--key credential:console.key --server-key /etc/kizu/server.pub --token credential:console.token
"""
# A flaw planted from outside: while the file is there, looking at a picture takes for ever.
HANGING = f"""\
import os, time
try:
    from edge.stages.preprocess import Preprocess
except ImportError:
    Preprocess = None
if Preprocess is not None:
    honest = Preprocess.__call__
    def call(self, frame):
        while os.path.exists({str(HANG)!r}):
            time.sleep(0.1)
        return honest(self, frame)
    Preprocess.__call__ = call
"""


# --- outside ----------------------------------------------------------------------------------------------------------


def outside() -> int:
    """Boot the container and print what it found; 0 if every step held."""
    if os.geteuid() != 0 or shutil.which("systemd-nspawn") is None:
        print("needs root and systemd-nspawn: apt-get install systemd-container", file=sys.stderr)
        return 2
    base = os.environ.get("KIZU_NSPAWN")
    if base is None:  # a mount namespace of our own: all mounts go with it
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, __file__]
        with tempfile.TemporaryDirectory(prefix="kizu-system-") as base:
            return subprocess.run(command, env={**os.environ, "KIZU_NSPAWN": base}).returncode
    _offer_cgroups()
    root = _overlay(Path(base))
    _furnish(root)
    binds = [f"--bind-ro={source}:{target}" for source, target in _binds().items()]
    boot = ["systemd-nspawn", "-q", f"--directory={root}", "--register=no", "--keep-unit", "--boot",
            "--link-journal=no", "--console=pipe", "--private-network", *binds]  # fmt: skip
    try:
        done = subprocess.run(boot, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
        said = done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        said = f"not over after {SECONDS} s\n{late.stdout!r}"
    found = root / RESULTS.relative_to("/")
    steps = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    for step in steps:
        print(json.dumps(step))
    whole = bool(steps) and steps[-1].get("step") == "end" and all(step["ok"] for step in steps)
    if not whole:
        print(said[-6000:], file=sys.stderr)
    return 0 if whole else 1


def _offer_cgroups() -> None:
    """Where systemd is not this machine's init, its hierarchy of control groups is not there either."""
    if Path("/proc/1/comm").read_text().strip() == "systemd":
        return
    subprocess.run(["umount", "-R", "/sys/fs/cgroup"], check=False)
    subprocess.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"], check=True)


def _overlay(base: Path) -> Path:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", base], check=True)
    for name in ("upper", "work", "root"):
        (base / name).mkdir()
    options = f"lowerdir=/,upperdir={base}/upper,workdir={base}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, base / "root"], check=True)
    return base / "root"


def _binds() -> dict[Path, str]:
    """Python, its packages and this checkout at places that the unit's ProtectHome does not hide."""
    packages = [Path(entry) for entry in sys.path if entry.endswith("site-packages")]
    found = {Path(sys.base_prefix): "/opt/python", ROOT: "/opt/kizu/src"}
    return found | {path: f"/opt/kizu/path/{number}" for number, path in enumerate(packages)}


def _furnish(root: Path) -> None:
    """Units, and a `kizu` that runs this checkout; everything of this machine's own services is left out."""
    units = root / "etc/systemd/system"
    shutil.rmtree(units)
    (units / "multi-user.target.wants").mkdir(parents=True)
    for name in ("getty.target", "systemd-timesyncd.service", "systemd-logind.service", "systemd-resolved.service"):
        (units / name).symlink_to("/dev/null")
    (units / "default.target").symlink_to("/lib/systemd/system/multi-user.target")
    for name in ("kizu-edge@.service", "kizu-console@.service"):
        shutil.copy(ROOT / "systemd" / name, units)
    (units / "check.service").write_text(
        f"[Service]\nType=oneshot\nTimeoutStartSec={SECONDS}\nStandardOutput=journal+console\n"
        f"ExecStart=/opt/kizu/python /opt/kizu/src/{Path(__file__).relative_to(ROOT)} --inside\n"
        "ExecStopPost=/bin/systemctl --force poweroff\n"
    )
    (units / "multi-user.target.wants/check.service").symlink_to("../check.service")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    places = ":".join(["/opt/kizu/planted", *(target for target in _binds().values() if target != "/opt/python")])
    _executable(
        root / "opt/kizu/python",
        f"export LD_LIBRARY_PATH=/opt/python/lib PYTHONHOME=/opt/python PYTHONPATH={places}\n"
        f'exec /opt/python/bin/{version} "$@"\n',
    )
    _executable(root / KIZU.lstrip("/"), 'exec /opt/kizu/python -m edge.cli "$@"\n')
    (root / "opt/kizu/planted").mkdir()
    (root / "opt/kizu/planted/sitecustomize.py").write_text(HANGING)
    (root / "etc/kizu").mkdir()
    (root / "etc/kizu/line-1.toml").write_text(LINE)
    (root / "etc/kizu/line-1.console").write_text(CONSOLE_LINE)


def _executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


# --- inside -----------------------------------------------------------------------------------------------------------


def inside() -> int:
    """Every step in turn, each told as one JSON line."""
    steps: list[Callable[[], object]] = [keys, start, sandbox, inspect, metrics, console, hang, recovered, stop]
    for step in steps:
        try:
            told = {"step": step.__name__, "ok": True, "found": step()}
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            told = {
                "step": step.__name__,
                "ok": False,
                "found": f"{error}\n{_journal(UNIT)}\n{_journal(CONSOLE)}"[-6000:],
            }
        with RESULTS.open("a") as file:
            file.write(json.dumps(told) + "\n")
        if not told["ok"]:
            return 1
    with RESULTS.open("a") as file:
        file.write('{"step": "end", "ok": true}\n')
    return 0


def keys() -> str:
    """The daemon's secret stays root's; the camera is put on the list."""
    run(KIZU, "keys", "server", "--folder", "/etc/kizu/keys")
    folder, peers = Path("/etc/kizu/keys"), Path("/etc/kizu/peers.toml")
    admitted = [("camera", "left"), ("subscriber", "console")]
    peers.write_text("".join(run(KIZU, "keys", kind, name, "--folder", str(folder)) for kind, name in admitted))
    run(KIZU, "keys", "metrics", "prometheus", "--folder", str(folder))
    shutil.copy(folder / "server.pub", "/etc/kizu/server.pub")
    sys.path.insert(0, str(ROOT / "tests/helpers"))
    from self_signed import self_signed

    page, secret = self_signed(folder)
    shutil.copy(page, "/etc/kizu/metrics.crt")
    secret.rename(folder / "metrics.key")
    (folder / "console.token").write_text(TOKEN)
    (folder / "console.token").chmod(0o600)
    for public in (peers, Path("/etc/kizu/server.pub"), Path("/etc/kizu/metrics.crt")):
        public.chmod(0o644)
    return "made"


def start() -> dict[str, str]:
    """`systemctl start` returns when the daemon says READY, and not before."""
    run("ip", "link", "set", "lo", "up")
    run("systemctl", "start", UNIT)
    found = shown("ActiveState", "SubState", "User", "DynamicUser")
    assert (found["ActiveState"], found["SubState"]) == ("active", "running"), found
    deadline = time.monotonic() + 10  # its state follows with the next look at the line
    while shown("StatusText")["StatusText"] != "ready":
        assert time.monotonic() < deadline, shown("StatusText")
        time.sleep(0.1)
    return found


def sandbox() -> dict[str, object]:
    """The process has what it needs and no more: no capability, no new privileges, a filter; its cache is filled."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid()}/status").read_text().splitlines() if ":\t" in line
    )
    cache = [path.suffix for path in Path("/var/cache/kizu/line-1/numba").rglob("*") if path.is_file()]
    found = {name: status[name] for name in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")}
    assert found == {"CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}, found
    assert status["Uid"].split()[0] != "0"
    return {**found, "compiled_kernels": cache.count(".nbc")}


def inspect() -> str:
    """A camera with a key gets verdicts; one without gets none."""
    said = send(12)
    assert "acknowledged 12, left 0" in said, said
    refused = subprocess.run(
        [KIZU, "send", PHOTOS, "--camera", "left", "--to", "tcp://127.0.0.1:5550",
         "--timeout", "3"], capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 1 and "it has not admitted this camera" in refused.stderr, refused
    return said


def metrics() -> dict[str, int]:
    """By TLS and with the login only, both from credentials that the service cannot read where root keeps them."""
    context = ssl.create_default_context(cafile="/etc/kizu/metrics.crt")
    password = Path("/etc/kizu/keys/metrics-prometheus.password").read_text().strip()
    login = base64.b64encode(f"prometheus:{password}".encode()).decode()
    without, _ = page("https://127.0.0.1:9464/metrics", context)
    found, text = page("https://127.0.0.1:9464/metrics", context, {"Authorization": f"Basic {login}"})
    assert (without, found) == (401, 200), (without, found)
    assert 'kizu_verdicts_total{camera="left"' in text, text[:2000]
    return {"without": without, "with": found}


def console() -> dict[str, object]:
    """READY under its own unit; on a line with keys its page tells the verdicts to whoever has the token."""
    run("systemctl", "start", CONSOLE)
    assert shown("ActiveState", unit=CONSOLE)["ActiveState"] == "active"
    refused, _ = page("http://127.0.0.1:8470/events")
    deadline, told = time.monotonic() + 60, ""
    asked = urllib.request.Request("http://127.0.0.1:8470/events", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(asked, timeout=20) as stream:
        while '"left"' not in told:
            assert time.monotonic() < deadline, f"no camera within a minute: {told[-2000:]}\n{_journal(CONSOLE)}"
            told += stream.readline().decode()
    assert refused == 401, refused
    run("systemctl", "stop", CONSOLE)
    found = shown("ActiveState", "Result", "ExecMainStatus", unit=CONSOLE)
    assert found == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}, found
    assert Path("/var/lib/kizu-console/line-1/labels.jsonl").exists()
    return {"without a token": refused, **found}


def page(url: str, context: ssl.SSLContext | None = None, headers: dict[str, str] | None = None) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers or {}), timeout=20, context=context
        ) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def hang() -> dict[str, object]:
    """A line that holds a frame and gets nowhere is not fed, killed and started again; its frame is not lost."""
    before, logged_before = pid(), logged()
    HANG.touch()
    camera = subprocess.Popen(send_command(3), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started = time.monotonic()
    while shown("NRestarts")["NRestarts"] == "0":
        assert time.monotonic() - started < 150, "the watchdog did not bite"
        time.sleep(0.2)
    waited = time.monotonic() - started
    HANG.unlink()
    said = camera.communicate(timeout=120)[0]
    assert camera.returncode == 0 and "acknowledged 3, left 0" in said, said
    assert pid() != before
    assert logged() == logged_before + 3, (logged_before, logged())
    return {"killed_after_s": round(waited, 1), "restarts": shown("NRestarts")["NRestarts"], "camera": said.strip()}


def recovered() -> dict[str, object]:
    """It was the watchdog; the log is whole, over the kill."""
    journal = _journal()
    assert "Watchdog timeout" in journal
    return {"events": logged(), **shown("ActiveState", "StatusText")}


def stop() -> dict[str, str]:
    """An ordered end is a success, and the state stays."""
    run("systemctl", "stop", UNIT)
    found = shown("ActiveState", "Result", "ExecMainStatus")
    assert found == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}, found
    assert Path("/var/lib/kizu/line-1/events.sqlite").exists()
    return found


def send_command(count: int) -> list[str]:
    keys = ["--key", "/etc/kizu/keys/camera-left.key", "--server-key", "/etc/kizu/keys/server.pub"]
    return [KIZU, "send", PHOTOS, "--camera", "left", "--loop", "--count", str(count),
            "--to", "tcp://127.0.0.1:5550", "--timeout", "120", *keys]  # fmt: skip


def send(count: int) -> str:
    return run(*send_command(count)).strip()


def logged() -> int:
    """How many events the log holds, after its own check of numbering and checksums."""
    code = (
        "from pathlib import Path; from edge.clock import SystemClock; from edge.sinks.event_log import EventLog\n"
        "log = EventLog(Path('/tmp/copy/events.sqlite'), SystemClock()); log.verify()\n"
        "print(len(log.read_since(0, 10000))); log.close()"
    )
    shutil.rmtree("/tmp/copy", ignore_errors=True)
    shutil.copytree("/var/lib/kizu/line-1", "/tmp/copy", ignore=shutil.ignore_patterns("numba", "*.control"))
    return int(run("/opt/kizu/python", "-c", code))


def pid() -> int:
    return int(shown("MainPID")["MainPID"])


def shown(*names: str, unit: str = UNIT) -> dict[str, str]:
    lines = run("systemctl", "show", unit, *(f"--property={name}" for name in names)).splitlines()
    return dict(line.split("=", 1) for line in lines)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def _journal(unit: str = UNIT) -> str:
    return subprocess.run(["journalctl", "--no-pager", "-o", "cat", "-u", unit], capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(inside() if "--inside" in sys.argv else outside())
