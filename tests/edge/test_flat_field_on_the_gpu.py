"""`engine.flat_field = "device"`: what the line's file may ask for, and verdicts, certificate and fallback as ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from edge import daemon, opening
from edge.bundle import ModelBundle
from edge.camera import CameraCalibration, write_camera
from edge.clock import SystemClock
from edge.config import EngineConfig, load_config
from edge.demo.line import write_config
from edge.engines import cuda, tensorrt
from edge.engines.device import Plan
from edge.engines.refine import RefineEngine
from edge.errors import ConfigError, EngineError
from edge.inference import EngineRunner, Scored, Stages, Unjudged
from edge.line_stages import make_stages
from edge.metrics import Metrics
from edge.opening import EngineOpener, Plans
from edge.protocols import Engine
from edge.types import Frame, FrameId
from fake_nvidia import PLAN, install
from streaming import streamed_engine

GPU = {"backend": "tensorrt", "device": "cuda:0"}
ROI = {"left": (3, 5, 32, 32), "right": (8, 0, 32, 32)}
SIZE = (40, 48)


@pytest.fixture(scope="module")
def cameras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CameraCalibration]:
    """Two cameras whose fields differ."""
    folder, made = tmp_path_factory.mktemp("cameras"), {}
    for seed, name in enumerate(ROI):
        random = np.random.default_rng(seed)
        gain = random.uniform(0.4, 4, (*SIZE, 1)).astype(np.float32)
        dark = random.uniform(0, 30, (*SIZE, 1)).astype(np.float32)
        made[name] = write_camera(folder / name, size=SIZE, gain=gain, dark=dark)
    made["folder"] = folder  # type: ignore[assignment]
    return made


def line(
    folder: Path,
    bundle: ModelBundle,
    cameras: dict[str, Any],
    roi: dict[str, tuple[int, ...] | None] = ROI,
    **engine: Any,
) -> Path:
    tables = [
        {"name": name, "calibration": str(cameras["folder"] / name)} | ({"roi_xywh": one} if one else {})
        for name, one in roi.items()
    ]
    return write_config(folder / "line.toml", bundle.path, [], engine={**GPU, **engine}, cameras=tables)


def stages_of(path: Path, bundle: ModelBundle) -> Stages:
    return make_stages(load_config(path), bundle, path)


def maps_of(stages: Stages, engine: Engine) -> list[NDArray[np.float32]]:
    """Forty frames of both cameras in turn, through the inference thread's work; batches mix them."""
    random, answers, queue = np.random.default_rng(5), list[Scored | Unjudged](), SimpleQueue[Frame | None]()
    for index in range(40):
        image = random.integers(0, 256, (*SIZE, 1), dtype=np.uint8)
        queue.put(Frame(FrameId(("left", "right")[index % 2], 1, index, 0), image))
    queue.put(None)
    metrics = Metrics(CollectorRegistry(), list(ROI), SystemClock())
    EngineRunner(
        engine, lambda: engine, stages, metrics, SystemClock(), 3, 10**9, answers.append, lambda text, fields: None
    ).run(queue)
    found = [one.maps for one in answers if isinstance(one, Scored)]
    assert sum(map(len, found)) == 40
    return list(np.concatenate(found))


def test_a_line_without_a_gpu_cannot_leave_it_to_one(tmp_path: Path, tiny_bundle: ModelBundle) -> None:
    """Refused with the line of the file, not silently done on the host."""
    path = write_config(tmp_path / "line.toml", tiny_bundle.path, ["cam"], engine={"flat_field": "device"})

    with pytest.raises(ConfigError, match=r'line.toml:\d+: engine.flat_field = "device" needs a GPU.*\'openvino\''):
        load_config(path)


@pytest.mark.parametrize("roi", [None, (0, 0, 40, 40), (0, 0, 31, 31)], ids=["whole", "larger", "smaller"])
def test_a_camera_whose_region_is_scaled_is_refused_by_name(
    tmp_path: Path, tiny_bundle: ModelBundle, cameras: dict[str, Any], roi: tuple[int, ...] | None
) -> None:
    """The other camera would do; the message names this one, its region, and both ways out. Control: on the host."""
    regions = {"left": ROI["left"], "right": roi}

    with pytest.raises(ConfigError, match=r'flat_field = "device": the region of camera right .*"host".*roi_xywh'):
        stages_of(line(tmp_path, tiny_bundle, cameras, regions, flat_field="device"), tiny_bundle)
    assert stages_of(line(tmp_path, tiny_bundle, cameras, regions), tiny_bundle).fields == ()


@pytest.mark.parametrize("kind", ["device", "the CPU in its place", "device, coarse look first"])
def test_verdicts_cannot_tell_where_frames_were_corrected(
    tmp_path: Path, tiny_bundle: ModelBundle, cameras: dict[str, Any], kind: str
) -> None:
    """The whole inference thread: the maps of both cameras are those of the host's correction, bit for bit."""
    host = stages_of(line(tmp_path, tiny_bundle, cameras), tiny_bundle)
    with streamed_engine(tiny_bundle)[0] as engine:
        expected = maps_of(host, engine)
    device = stages_of(line(tmp_path, tiny_bundle, cameras, flat_field="device"), tiny_bundle)
    fields = [] if kind == "the CPU in its place" else device.fields
    engines = [streamed_engine(tiny_bundle, fields=fields) for _ in range(2)]
    chosen: Engine = engines[0][0]
    if kind == "device, coarse look first":
        chosen = RefineEngine(engines[0][0], engines[1][0], gate=1.0, every=1)

    found = maps_of(device, chosen)

    assert len(device.fields) == 2
    np.testing.assert_array_equal(found, expected)
    assert ("flat_field" in engines[0][1].trace) == (kind != "the CPU in its place")


def test_control_pixels_that_nobody_corrects_give_other_maps(
    tmp_path: Path, tiny_bundle: ModelBundle, cameras: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the mark is lost on the way, so the engine gets raw pixels."""
    device = stages_of(line(tmp_path, tiny_bundle, cameras, flat_field="device"), tiny_bundle)
    with streamed_engine(tiny_bundle, fields=device.fields)[0] as engine:
        expected = maps_of(device, engine)
    monkeypatch.setattr("edge.inference.submit", lambda engine, batch: engine.submit(batch.pixels))

    with streamed_engine(tiny_bundle, fields=device.fields)[0] as engine:
        assert not np.array_equal(maps_of(device, engine), expected)


def test_the_lines_fields_reach_its_engine(
    tmp_path: Path, tiny_bundle: ModelBundle, cameras: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the configuration to TensorRT's engine, once each; only driver and plan are stood in for."""
    given: list[Any] = []

    def open_it(bundle: ModelBundle, plan: Plan, **options: Any) -> Any:
        given.append(options["fields"])
        raise EngineError("this is far enough")

    monkeypatch.setattr(tensorrt, "open_tensorrt", open_it)
    monkeypatch.setattr(opening, "compiled_plans", lambda bundle, asked: Plans(Plan(tmp_path / "plan", b"plan")))
    path = line(tmp_path, tiny_bundle, cameras, flat_field="device")
    stages = stages_of(path, tiny_bundle)

    with pytest.raises(EngineError, match="far enough"):
        EngineOpener(load_config(path), tiny_bundle, fields=stages.fields).open()
    assert given == [stages.fields]


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("made_with", ["left", "right"])
def test_a_certificate_is_about_one_flat_field_wherever_it_is_applied(
    tmp_path: Path, make_bundle: Callable[..., ModelBundle], tiny_bundle: ModelBundle, cameras: dict[str, Any],
    where: str, made_with: str,
) -> None:  # fmt: skip
    """The bytes are the same, so it holds on the device as on the host; with another camera's field on neither."""
    calibration = msgspec.structs.replace(
        tiny_bundle.calibration,
        certified=True,
        engine="tensorrt rtx-1.7.1.116 fp16 cuda:0 NVIDIA L4",
        roi_xywh=ROI["left"],
        flat_field=cameras[made_with].flat_field_id,
    )
    bundle = make_bundle(tmp_path / "bundle", calibration=calibration)

    stages = stages_of(line(tmp_path, bundle, cameras, {"left": ROI["left"]}, flat_field=where), bundle)

    assert stages.decide.calibration.of("left").certified is (made_with == "left")


def test_a_fallback_engine_is_opened_without_fields(
    tmp_path: Path, tiny_bundle: ModelBundle, cameras: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO in the GPU's place knows no field, and says so; the frames are then the host's to correct."""

    def no_gpu(bundle: ModelBundle, asked: EngineConfig) -> Plans:
        return Plans(Plan(tmp_path / "elsewhere.plan", b"ftrt" * 100))

    path = line(tmp_path, tiny_bundle, cameras, flat_field="device", on_gpu_failure="cpu", device="cuda:99")
    stages = stages_of(path, tiny_bundle)
    opener = EngineOpener(load_config(path), tiny_bundle, fields=stages.fields, plans_of=no_gpu)

    with opener.open() as engine:
        assert engine.spec.name == "openvino" and not engine.spec.levels
        found = maps_of(stages, engine)
    with streamed_engine(tiny_bundle)[0] as other:
        np.testing.assert_allclose(found, maps_of(stages, other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flat_field", ["device", "host"])
def test_a_line_is_checked_with_its_fields_on_the_gpu(
    tmp_path: Path, tiny_bundle: ModelBundle, cameras: dict[str, Any], monkeypatch: pytest.MonkeyPatch, flat_field: str
) -> None:
    """`kizu run --check` over a driver and a TensorRT stood in for: both fields are there, golden frames untouched."""
    (tmp_path / "kernels.fatbin").write_bytes(b"fatbin")
    monkeypatch.setattr(cuda, "FATBIN", tmp_path / "kernels.fatbin")
    monkeypatch.setattr(opening, "compiled_plans", lambda bundle, asked: Plans(Plan(tmp_path / "plan", PLAN)))
    path = line(tmp_path, tiny_bundle, cameras, flat_field=flat_field)
    with install(monkeypatch, tiny_bundle) as machine:
        allocate, sizes = machine.driver.mem_alloc, list[int]()
        machine.driver.mem_alloc = lambda size: (sizes.append(size), allocate(size))[1]  # type: ignore[method-assign]
        found = daemon.check(load_config(path), path)

    assert (found["backend"], found["fallback"]) == ("tensorrt", None) and machine.driver.held == set()
    assert len(sizes) == (4 if flat_field == "device" else 2)  # a block for each slot, and for each field
