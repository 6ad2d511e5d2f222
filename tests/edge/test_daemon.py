"""The composition root: what it refuses at the start, what it tells, and that it ends in order."""

from __future__ import annotations

import re
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest

from edge import daemon
from edge.bundle import Golden, ModelBundle, open_bundle
from edge.config import EdgeConfig, EngineConfig, LogConfig, MetricsConfig, load_config
from edge.daemon import Ready, StopRequest
from edge.demo.line import write_config
from edge.errors import BundleError, ConfigError, KizuError, ParityError
from edge.line_stages import make_stages
from edge.login import make_login
from edge.pipeline import Pipeline
from edge.sender import CameraSender
from edge.sinks.event_log import EventLog
from edge.warrant import Void
from self_signed import self_signed

ROOT = Path(__file__).parents[2]
FAKE = {"backend": "fake"}


def config_of(folder: Path, bundle: ModelBundle, **changes: object) -> EdgeConfig:
    return load_config(write_config(folder / "line.toml", bundle.path, ["cam"], **changes))


def serve_in_thread(config: EdgeConfig, stop: StopRequest, during: Callable[[Ready], None]) -> None:
    """Run the daemon in this thread, `during` beside it once it is ready, then stop it."""
    helper: list[threading.Thread] = []

    def on_ready(ready: Ready) -> None:
        def work() -> None:
            try:
                during(ready)
            finally:
                stop.set()

        helper.append(threading.Thread(target=work))
        helper[0].start()

    try:
        daemon.serve(config, Path("line.toml"), stop, on_ready=on_ready)
    finally:
        for thread in helper:
            thread.join(20)


def test_a_line_is_served_until_it_is_told_to_stop(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    """Ready means ready: the first frame is judged; afterwards everything is closed and the log complete."""
    config = config_of(tmp_path, tiny_bundle, engine=FAKE)

    def during(ready: Ready) -> None:
        with CameraSender(ready.frames_address, "cam") as sender:
            sender.send(np.full((64, 64), 128, np.uint8), encoding="raw", timeout_s=20)
            assert sender.drain(20) == 0

    serve_in_thread(config, StopRequest(), during)

    log = EventLog(Path(config.log.path), daemon.SystemClock())
    assert [event.decision for event, _ in log.read_since(0, 10)] == ["accept"]
    log.close()


def test_the_metrics_page_is_given_by_tls_and_login_where_that_is_configured(
    tmp_path: Path, tiny_bundle: ModelBundle
) -> None:
    """From the file's keys to the page; the ready line says https, and the password alone opens it."""
    certificate, private_key = self_signed(tmp_path)
    login, password = make_login("prometheus", tmp_path / "keys")
    tables = {"certificate": certificate.name, "private_key": private_key.name, "login": str(login), "port": 0}
    config = config_of(tmp_path, tiny_bundle, engine=FAKE, metrics=tables)
    pages: list[httpx.Response] = []

    def during(ready: Ready) -> None:
        context = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(verify=context) as client:
            pages.append(client.get(ready.metrics_url))
            pages.append(client.get(ready.metrics_url, auth=("prometheus", password.read_text())))

    serve_in_thread(config, StopRequest(), during)

    assert [page.status_code for page in pages] == [401, 200]
    assert 'kizu_scrapes_refused_total{reason="login"} 1.0' in pages[1].text
    assert 'kizu_state{state="ready"}' in pages[1].text and 'line="demo"' in pages[1].text


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"certificate": "page.crt"}, "metrics.certificate is given without metrics.private_key"),
        ({"private_key": "page.key"}, "metrics.private_key is given without metrics.certificate"),
        ({"login": "page.login", "host": "0.0.0.0"}, "would travel unencrypted"),
    ],
)
def test_half_a_protection_of_the_metrics_is_refused(
    tmp_path: Path, tiny_bundle: ModelBundle, tables: dict[str, object], words: str
) -> None:
    """When the file is read, with its line."""
    with pytest.raises(ConfigError, match=rf"line.toml:\d+: .*{words}"):
        config_of(tmp_path, tiny_bundle, metrics=tables)


def page_of(config: EdgeConfig) -> str:
    """The metrics page of a line that serves."""
    pages: list[str] = []

    def during(ready: Ready) -> None:
        pages.append(page_once(ready.metrics_url, "kizu_log_disk_free_bytes 0.0"))

    serve_in_thread(config, StopRequest(), during)
    return pages[0]


def page_once(url: str, gone: str) -> str:
    """The page as soon as `gone` is no longer on it: the main thread has sampled."""
    deadline = time.monotonic() + 20
    while gone in (page := httpx.get(url).text):
        assert time.monotonic() < deadline
    return page


def test_the_cpu_in_the_gpus_place_shows_in_the_metrics(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    """What the alert on it looks at, and which engine runs; on this machine the GPU really cannot be used."""
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("a driver is loaded here, so there may be a GPU")
    engine = {"backend": "tensorrt", "device": "cuda:0", "on_gpu_failure": "cpu"}
    fallen = page_of(config_of(tmp_path, tiny_bundle, engine=engine))
    asked = page_of(config_of(tmp_path, tiny_bundle))

    assert "kizu_engine_substitute 1.0" in fallen and "kizu_engine_substitute 0.0" in asked
    assert 'kizu_engine_info{backend="openvino",' in fallen
    assert re.search(r"^kizu_engine_fallbacks_total\{reason=\"\w+\"\} 1.0$", fallen, re.MULTILINE)


def test_a_certificate_that_was_voided_in_an_earlier_run_shows_in_the_metrics(
    tmp_path: Path, tiny_bundle: ModelBundle, make_bundle: Callable[..., ModelBundle]
) -> None:
    """A restart must not end the alert: the note beside the log says that it no longer holds."""
    calibration = msgspec.structs.replace(tiny_bundle.calibration, certified=True, engine="openvino 2026 cpu")
    config = config_of(tmp_path, make_bundle(tmp_path / "certified", calibration=calibration))
    whole = page_of(config)
    void = Void(open_bundle(Path(config.bundle)).model_id, "cam", "scores", 100, 1)
    Path(f"{config.log.path}.void.json").write_bytes(msgspec.json.encode([void]))
    voided = page_of(config)

    assert "kizu_certificate_valid 1.0" in whole and "kizu_certificate_void 0.0" in whole
    assert "kizu_certificate_valid 0.0" in voided and "kizu_certificate_void 1.0" in voided


def test_check_tells_what_would_run(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    """`kizu run --check`: bundle, engine and golden frames, no port."""
    found = daemon.check(config_of(tmp_path, tiny_bundle), Path("line.toml"))

    assert found["model_id"] == tiny_bundle.model_id
    assert found["backend"] == "openvino"
    assert isinstance(found["golden_share_of_tolerance"], float) and found["golden_share_of_tolerance"] <= 1


def test_a_device_that_answers_otherwise_than_the_golden_frames_is_refused(
    tmp_path: Path, tiny_bundle: ModelBundle, make_bundle: Callable[..., ModelBundle]
) -> None:
    """Both at --check and at the start: another answer than the exporter's is another model."""
    golden = Golden(tiny_bundle.golden.frames, tiny_bundle.golden.maps + 0.01, tiny_bundle.golden.scores)
    config = config_of(tmp_path, make_bundle(tmp_path / "off", golden=golden))

    with pytest.raises(ParityError, match="golden frames"):
        daemon.check(config, Path("line.toml"))
    with pytest.raises(ParityError, match="golden frames"):
        daemon.serve(config, Path("line.toml"), StopRequest())


def test_a_dry_run_never_certifies(
    tmp_path: Path, tiny_bundle: ModelBundle, make_bundle: Callable[..., ModelBundle]
) -> None:
    """A certificate covers the engine that gave its scores: not the fake one's, and not another backend's."""
    calibration = msgspec.structs.replace(tiny_bundle.calibration, certified=True, engine="openvino 2026 cpu")
    bundle = make_bundle(tmp_path / "certified", calibration=calibration)

    real = make_stages(config_of(tmp_path, bundle), bundle, Path("line.toml"))
    dry = make_stages(config_of(tmp_path, bundle, engine=FAKE), bundle, Path("line.toml"))

    other = make_stages(config_of(tmp_path, bundle, engine={"backend": "onnxruntime"}), bundle, Path("line.toml"))

    assert real.decide.calibration.certified
    assert not dry.decide.calibration.certified and not other.decide.calibration.certified


def test_a_batch_larger_than_the_bundles_is_a_configuration_error(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    """Names the key, the value and what is possible."""
    config = config_of(tmp_path, tiny_bundle, batching={"max_batch": 5})

    with pytest.raises(ConfigError, match=r"line.toml: batching.max_batch is 5, .*write 4 or less"):
        make_stages(config, tiny_bundle, Path("line.toml"))


def test_a_missing_bundle_names_the_configurations_key(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    """The file's author is told which of its lines to correct."""
    config = msgspec.structs.replace(config_of(tmp_path, tiny_bundle), bundle=str(tmp_path / "gone"))

    with pytest.raises(BundleError, match=r"line.toml: bundle: .*gone does not exist"):
        daemon.check(config, Path("line.toml"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": MetricsConfig(login="/none")}, r"line.toml: metrics: login /none: .*kizu keys metrics"),
        ({"frames_address": "udp://x"}, r"line.toml: frames_address: .*expected tcp://HOST:PORT"),
        ({"events_address": "tcp://0.0.0.0:5551"}, r"line.toml: events_address: .*plain_off_host"),
        ({"frames_address": "tcp://127.0.0.1:5550", "events_address": "tcp://127.0.0.1:5550"}, "its own port"),
        ({"engine": EngineConfig(device="GPU")}, r"line.toml: engine.device: device 'GPU'"),
    ],
)
def test_check_finds_what_could_never_run(
    tmp_path: Path, tiny_bundle: ModelBundle, changes: dict[str, object], words: str
) -> None:
    """`kizu run --check` opens no port, but it does not bless an address or a device that cannot be."""
    config = msgspec.structs.replace(config_of(tmp_path, tiny_bundle), **changes)

    with pytest.raises(ConfigError, match=words):
        daemon.check(config, Path("line.toml"))
    with pytest.raises(ConfigError, match=words):
        daemon.serve(config, Path("line.toml"), StopRequest())


@pytest.mark.parametrize("key", ["frames_address", "events_address"])
def test_a_port_in_use_names_the_configurations_key(tmp_path: Path, tiny_bundle: ModelBundle, key: str) -> None:
    """Two addresses stand in the file; the message says which of them."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        config = msgspec.structs.replace(config_of(tmp_path, tiny_bundle, engine=FAKE), **{key: address})

        with pytest.raises(ConfigError, match=rf"line.toml: {key}: .*in use"):
            daemon.serve(config, Path("line.toml"), StopRequest())


def test_a_log_that_cannot_be_opened_names_the_configurations_key(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    """A folder in the file's place."""
    config = msgspec.structs.replace(config_of(tmp_path, tiny_bundle, engine=FAKE), log=LogConfig(path=str(tmp_path)))

    with pytest.raises(ConfigError, match=r"line.toml: log.path: .*Is a directory"):
        daemon.serve(config, Path("line.toml"), StopRequest())


def test_a_full_disk_ends_the_line_and_names_the_log(
    tmp_path: Path, tiny_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 1; whoever reads the last line knows which disk to look at. Nothing was acknowledged."""

    def full(self: EventLog, *entries: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    config = config_of(tmp_path, tiny_bundle, engine=FAKE)
    monkeypatch.setattr(EventLog, "_write", full)
    left: list[int] = []

    def during(ready: Ready) -> None:
        with CameraSender(ready.frames_address, "cam") as sender:
            sender.send(np.full((64, 64), 128, np.uint8), encoding="raw", timeout_s=20)
            left.append(sender.drain(1))

    with pytest.raises(KizuError, match=rf"event log {config.log.path}: .*disk is full.*free or repair"):
        serve_in_thread(config, StopRequest(), during)
    assert left == [1]


def test_the_smallest_region_is_the_configurations_or_the_bundles(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    """min_area_px overrides what the bundle was made with."""
    own = make_stages(config_of(tmp_path, tiny_bundle), tiny_bundle, Path("line.toml"))
    set_here = config_of(tmp_path, tiny_bundle, segment={"min_area_px": 77})

    assert own.segment.min_area_px == tiny_bundle.calibration.min_area_px
    assert make_stages(set_here, tiny_bundle, Path("line.toml")).segment.min_area_px == 77


def test_a_line_that_fails_is_an_error_with_its_reason(
    tmp_path: Path, tiny_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that ends by itself ends the daemon: exit status 1, systemd starts it again."""

    def crash(self: Pipeline) -> None:
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr(Pipeline, "_read_until_stopped", crash)

    with pytest.raises(KizuError, match="nobody foresaw this"):
        daemon.serve(config_of(tmp_path, tiny_bundle, engine=FAKE), Path("line.toml"), StopRequest())


def test_state_and_watchdog_follow_the_line(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    """Under systemd: READY once, STATUS with the state, WATCHDOG while it moves, STOPPING at the end."""
    import os

    heard: list[str] = []
    address = f"kizu-daemon-{os.getpid()}"
    stop = StopRequest()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, pytest.MonkeyPatch.context() as patch:
        systemd.bind("\0" + address)
        systemd.settimeout(20)
        patch.setenv("NOTIFY_SOCKET", "@" + address)
        patch.setenv("WATCHDOG_USEC", "600000")

        def during(ready: Ready) -> None:
            while heard.count("WATCHDOG=1") < 2:
                heard.append(systemd.recv(100).decode())

        serve_in_thread(config_of(tmp_path, tiny_bundle, engine=FAKE), stop, during)
        while "STOPPING=1" not in heard:
            heard.append(systemd.recv(100).decode())

    assert heard[0] == "READY=1"
    assert "STATUS=ready" in heard


def test_importing_the_daemon_is_quick_and_loads_no_backend() -> None:
    """numba, OpenVINO and SQLite come when they are needed; the whole import stays well under a second of CPU."""
    script = (
        "import sys, time, edge.daemon; print(time.process_time()); "
        "print(sorted({'numba', 'openvino', 'sqlite3', 'onnxruntime', 'torch', 'scipy'} & set(sys.modules)))"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    used, loaded = done.stdout.splitlines()

    assert loaded == "[]"
    assert float(used) < 1.0, f"{time.monotonic() - start:.2f} s on the wall"
