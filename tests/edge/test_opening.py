"""Where the GPU cannot be used: refused, or the CPU in its place, announced and counted; without mocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edge import daemon
from edge.bundle import ModelBundle
from edge.config import EdgeConfig, EngineConfig, load_config
from edge.daemon import Ready, StopRequest
from edge.demo.line import write_config
from edge.engines.device import Plan
from edge.errors import DEVICE_REASONS, ConfigError, DeviceError
from edge.line_stages import make_stages
from edge.opening import EngineOpener, Plans, why_not_certified

GPU = {"backend": "tensorrt", "device": "cuda:99"}  # a hundredth GPU is nowhere


def config_of(folder: Path, bundle: ModelBundle, **engine: object) -> EdgeConfig:
    return load_config(write_config(folder / "line.toml", bundle.path, ["cam"], engine={**GPU, **engine}))


@pytest.fixture
def plans(tmp_path: Path) -> Callable[[ModelBundle, EngineConfig], Plans]:
    """A plan from elsewhere."""
    plan = Plan(tmp_path / "elsewhere.plan", b"ftrt" * 100)
    return lambda bundle, asked: Plans(plan)


def test_by_default_a_line_refuses_to_start_without_its_gpu(
    tmp_path: Path, tiny_bundle: ModelBundle, plans: Callable[[ModelBundle, EngineConfig], Plans]
) -> None:
    """The error names the next step, and the key that would allow the CPU."""
    opener = EngineOpener(config_of(tmp_path, tiny_bundle), tiny_bundle, plans_of=plans)

    with pytest.raises(DeviceError, match="on_gpu_failure") as refused:
        opener.open()
    assert refused.value.reason in DEVICE_REASONS


def test_the_cpu_takes_its_place_where_that_is_allowed_and_it_is_told(
    tmp_path: Path, tiny_bundle: ModelBundle, plans: Callable[[ModelBundle, EngineConfig], Plans]
) -> None:
    """Each time the engine is opened, with the reason as one word for the counter."""
    told: list[tuple[str, str]] = []
    config = config_of(tmp_path, tiny_bundle, on_gpu_failure="cpu")
    opener = EngineOpener(
        config, tiny_bundle, plans_of=plans, on_fallback=lambda reason, why: told.append((reason, why))
    )

    for _ in range(2):
        with opener.open() as engine:
            assert (engine.spec.name, engine.spec.device) == ("openvino", "cpu")

    assert len(told) == 2 and {reason for reason, _ in told} == {opener.fallback}
    assert opener.fallback in DEVICE_REASONS


def test_other_errors_are_no_reason_to_fall_back(
    tmp_path: Path, make_bundle: Callable[..., ModelBundle], tiny_bundle: ModelBundle
) -> None:
    """A wrong configuration is corrected, not worked around."""
    config = config_of(tmp_path, tiny_bundle, on_gpu_failure="cpu", device="cpu")

    with pytest.raises(ConfigError, match=r"engine.device: device 'cpu' is unknown to backend 'tensorrt'"):
        make_stages(config, tiny_bundle, Path("line.toml"))


def test_a_line_on_its_fallback_says_so_everywhere(
    tmp_path: Path, tiny_bundle: ModelBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ready line, log, metric and state: the whole daemon on a machine that has no such GPU."""
    from urllib.request import urlopen

    config = config_of(tmp_path, tiny_bundle, on_gpu_failure="cpu")
    stop, seen = StopRequest(), dict[str, object]()

    def on_ready(ready: Ready) -> None:
        seen["ready"] = ready
        with urlopen(ready.metrics_url, timeout=10) as page:
            seen["metrics"] = page.read().decode()
        stop.set()

    daemon.serve(config, Path("line.toml"), stop, on_ready=on_ready)

    ready = seen["ready"]
    assert isinstance(ready, Ready) and ready.fallback in DEVICE_REASONS and ready.backend.startswith("openvino")
    assert f'kizu_engine_fallbacks_total{{reason="{ready.fallback}"}} 1.0' in str(seen["metrics"])
    assert "the CPU takes its place" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("made_through", "engine", "holds"),
    [
        ("openvino 2026.4.1 cpu", {"backend": "openvino", "device": "cpu"}, True),
        ("openvino 2026.4.1 cpu", {"backend": "onnxruntime", "device": "cpu"}, False),
        ("openvino 2026.4.1 cpu", {}, False),
        ("tensorrt rtx-1.7.1.116 fp16 cuda:0 NVIDIA L4", {}, True),
        ("tensorrt rtx-1.7.1.116 fp16 cuda:0 NVIDIA L4", {"device": "cuda:1"}, True),
        ("tensorrt rtx-1.7.1.116 fp16 cuda:0 NVIDIA L4", {"precision": "bf16"}, False),
        ("tensorrt rtx-1.7.1.116 int8 cuda:0 NVIDIA L4", {"precision": "fp16"}, False),
        ("tensorrt rtx-1.7.1.116 int8 cuda:0 NVIDIA L4", {"precision": "int8"}, True),
        ("tensorrt rtx-1.7.1.116 fp16 cuda:0 NVIDIA L4", {"backend": "openvino", "device": "cpu"}, False),
        ("tensorrt rtx-1.7.1.116 cuda:0 NVIDIA L4", {}, False),  # of no known precision
        ("tensorrt", {}, False),
    ],
)
def test_a_certificate_holds_on_its_own_backend_and_precision_only(
    tmp_path: Path, make_bundle: Callable[..., ModelBundle], tiny_bundle: ModelBundle, made_through: str,
    engine: dict[str, object], holds: bool,
) -> None:  # fmt: skip
    """The same threshold still judges; nobody vouches for what it rejects, and the reason names the way out."""
    calibration = msgspec.structs.replace(tiny_bundle.calibration, certified=True, engine=made_through)
    bundle = make_bundle(tmp_path / "certified", calibration=calibration)
    config = config_of(tmp_path, bundle, **engine)

    stages = make_stages(config, bundle, Path("line.toml"))
    why = why_not_certified(calibration, config.engine)

    assert stages.decide.calibration.certified is holds
    assert stages.decide.calibration.threshold == calibration.threshold
    assert (why is None) is holds and (holds or f"--backend {config.engine.backend}" in str(why))


def test_a_line_on_another_engine_than_its_certificates_says_so(
    tmp_path: Path, make_bundle: Callable[..., ModelBundle], tiny_bundle: ModelBundle,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In the log, with the command that would certify it. Control: nothing is said where the engine is the same."""
    told = {}
    for made_through in ("tensorrt rtx-1.7.1.116 fp16 cuda:0 NVIDIA L4", "openvino 2026.4.1 cpu"):
        calibration = msgspec.structs.replace(tiny_bundle.calibration, certified=True, engine=made_through)
        folder = tmp_path / made_through.split(" ")[0]
        folder.mkdir()
        bundle = make_bundle(folder / "bundle", calibration=calibration)
        stop = StopRequest()
        config = config_of(folder, bundle, backend="openvino", device="cpu")
        daemon.serve(config, Path("line.toml"), stop, on_ready=lambda ready, stop=stop: stop.set())
        told[made_through.split(" ")[0]] = (
            "the certificate does not hold on this line's engine" in capsys.readouterr().out
        )

    assert told == {"tensorrt": True, "openvino": False}


def test_a_dry_run_certifies_nothing_whatever_its_bundle_says(
    tmp_path: Path, make_bundle: Callable[..., ModelBundle], tiny_bundle: ModelBundle
) -> None:
    """The fake engine runs no model, so a certificate that it made itself says nothing of one either."""
    calibration = msgspec.structs.replace(tiny_bundle.calibration, certified=True, engine="fake 1 cpu")
    bundle = make_bundle(tmp_path / "certified", calibration=calibration)
    config = config_of(tmp_path, bundle, backend="fake", device="cpu")

    assert not make_stages(config, bundle, Path("line.toml")).decide.calibration.certified
    assert "runs no model" in str(why_not_certified(calibration, config.engine))
