"""A threshold certified through TensorRT at a precision: refused without a GPU, recorded with one, held to on the line.

No GPU runs here: the engine of the GPU path runs on the fake device, which computes the very graph that TensorRT would
be given, rewritten to fp16, by ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calib.calibrate_command import calibrate
from calib.evaluate_command import evaluate
from calib.inspect_command import inspect
from calib.quantize_command import quantize
from calib.sizes_command import sizes
from edge import opening
from edge.bundle import ModelBundle, open_bundle
from edge.commands.verify import verify
from edge.config import EngineConfig, load_config
from edge.demo.line import write_config
from edge.engines import tensorrt
from edge.engines.device import Plan
from edge.engines.streamed import StreamedEngine
from edge.errors import DEVICE_REASONS, CommandError, DeviceError, ParityError
from edge.graph import at_precision
from edge.line_stages import make_stages
from edge.opening import Plans
from streaming import streamed_engine
from tensorrt_plans import where_the_gpu_is_known

Invoke = Callable[..., Any]
GPU = ("--backend", "tensorrt", "--device", "cuda:99")  # a hundredth GPU is nowhere
PROMISE = ("--false-rejects", "5%", "--confidence", "90%")  # 45 good parts


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that runs the graph at the precision asked for; only driver and plan are stood in for."""

    def plans_of(bundle: ModelBundle, asked: EngineConfig) -> Plans:
        return Plans(Plan(tmp_path / "plan.engine", asked.precision.encode()))

    def open_it(bundle: ModelBundle, plan: Plan, **options: Any) -> Any:
        given = plan.data.decode()
        # int8 lies in the graph already.
        model = bundle.model if given == "int8" else at_precision(bundle.model, given)  # type: ignore[arg-type]
        engine, _ = streamed_engine(replace(bundle, model=model), kind=Named, quiet_below=options["quiet_below"])
        return engine

    monkeypatch.setattr(opening, "compiled_plans", plans_of)
    monkeypatch.setattr(tensorrt, "open_tensorrt", open_it)


class Named(StreamedEngine):
    """Of a version and a device as a real one has them."""

    def __init__(self, spec: Any, *args: Any, **options: Any) -> None:
        super().__init__(replace(spec, version="rtx-1.7.1.116", device="cuda:0 NVIDIA L4"), *args, **options)


def is_certified(bundle: ModelBundle, folder: Path, **engine: Any) -> bool:
    config = load_config(write_config(folder / "line.toml", bundle.path, ["cam"], engine=engine))
    return make_stages(config, bundle, folder / "line.toml").decide.calibration.certified


@pytest.mark.parametrize("command", [calibrate, evaluate, inspect, sizes, verify])
def test_without_the_gpu_every_command_says_what_is_missing(
    command: Any, tiny_bundle: ModelBundle, good_folder: Callable[..., Path], test_folder: Path, invoke: Invoke,
    tmp_path: Path,
) -> None:  # fmt: skip
    """No other engine takes its place, for nobody could tell from the result; nothing is written."""
    good = good_folder(45)
    options: dict[Any, tuple[object, ...]] = {
        calibrate: ("--good", good, "--out", tmp_path / "out", *PROMISE),
        evaluate: ("--data", test_folder),
        inspect: (next(good.iterdir()),),
        sizes: ("--good", good, "--sizes", "8"),
        verify: (),
    }

    with pytest.raises(DeviceError, match=r"pip install|nvidia|this machine has") as refused:
        invoke(command, tiny_bundle.path, *options[command], *GPU)
    assert refused.value.reason in DEVICE_REASONS and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--backend", "openvino", "--precision", "fp16"), "--precision fp16: openvino computes as the bundle's graph"),
        (("--backend", "tensorrt", "--precision", "fp12"), "--precision fp12: expected one of fp32, fp16"),
        (
            ("--backend", "tensorrt", "--device", "cpu"),
            "device 'cpu' is unknown to backend 'tensorrt'",
        ),
        (("--backend", "openvino", "--device", "cuda:0"), "device 'cuda:0' is unknown to backend 'openvino'"),
        (("--backend", "abacus"), "backend 'abacus' is unknown"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: tuple[str, ...], words: str, tiny_bundle: ModelBundle, invoke: Invoke
) -> None:
    """Before anything is opened."""
    with pytest.raises(CommandError, match=words):
        invoke(verify, tiny_bundle.path, *options)


@pytest.mark.usefixtures("gpu")
def test_a_certificate_names_the_precision_and_holds_at_no_other(
    tiny_bundle: ModelBundle, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """The whole way: good parts through the fp16 graph; a line at fp16 is certified, at bf16 or on a CPU it is not."""
    good, out, plain = good_folder(45), tmp_path / "half", tmp_path / "plain"
    invoke(calibrate, tiny_bundle.path, "--good", good, "--out", out, *PROMISE, "--backend", "tensorrt")
    invoke(calibrate, tiny_bundle.path, "--good", good, "--out", plain, *PROMISE)
    half, full = open_bundle(out), open_bundle(plain)

    assert half.calibration.engine == "tensorrt rtx-1.7.1.116 fp16 cuda:0 NVIDIA L4"
    assert half.calibration.scores != full.calibration.scores  # the scores are fp16's own
    on = {"backend": "tensorrt", "device": "cuda:0"}
    assert is_certified(half, tmp_path, **on, precision="fp16")
    assert not is_certified(half, tmp_path, **on, precision="bf16")
    assert not is_certified(half, tmp_path, backend="openvino")
    assert is_certified(full, tmp_path, backend="openvino") and not is_certified(full, tmp_path, **on)


@pytest.mark.usefixtures("gpu")
def test_half_precision_is_judged_by_its_own_tolerance(
    tiny_bundle: ModelBundle, good_folder: Callable[..., Path], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden frames may be off by what fp16 is allowed. Control: with fp32's tolerance the same is refused."""
    look = (inspect, tiny_bundle.path, next(good_folder(1).iterdir()), "--backend", "tensorrt", "--precision", "fp16")
    invoke(*look)

    monkeypatch.setattr(opening, "LOOSE", dict.fromkeys(opening.LOOSE, 0.0))
    with pytest.raises(ParityError):
        invoke(*look)


def test_a_line_on_another_engine_is_told_while_it_can_still_be_changed(
    tiny_bundle: ModelBundle, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """`--line` names the line: calibrating for its GPU on a CPU is warned of. Control: not where both are alike."""
    told = []
    for name, engine in (("gpu", {"backend": "tensorrt", "device": "cuda:0"}), ("cpu", {"backend": "openvino"})):
        line = write_config(tmp_path / f"{name}.toml", tiny_bundle.path, ["cam"], engine=engine)
        pattern = ("--part-pattern", "(?P<camera>cam)/(?P<part>.*).png")
        good = good_folder(45, f"{name}/cam").parent
        done = invoke(
            calibrate, tiny_bundle.path, "--good", good, "--out", tmp_path / f"{name}-out", *PROMISE, *pattern,
            "--line", line,
        )  # fmt: skip
        told.append("calibrate with --backend tensorrt --device cuda:0 --precision fp16" in done.stderr)

    assert told == [True, False]


@pytest.mark.usefixtures("gpu")
def test_eight_bits_are_gated_and_refitted_on_the_gpu_that_will_run_them(
    tiny_bundle: ModelBundle, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """The quantized graph's scores are those of TensorRT at int8; where there is no such GPU nothing is written."""
    options = ("--good", good_folder(12), "--precision", "int8", "--backend", "tensorrt")
    invoke(quantize, tiny_bundle.path, *options, "--out", tmp_path / "small", "--min-agreement", "0")

    assert open_bundle(tmp_path / "small").calibration.engine == "tensorrt rtx-1.7.1.116 int8 cuda:0 NVIDIA L4"


def test_eight_bits_for_a_gpu_that_is_not_there_are_refused(
    tiny_bundle: ModelBundle, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    """Control of the above: without the stand-in the way ends at the driver."""
    options = ("--good", good_folder(12), "--precision", "int8", *GPU)
    with pytest.raises(DeviceError, match=r"pip install|nvidia|this machine has"):
        invoke(quantize, tiny_bundle.path, *options, "--out", tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.gpu
def test_a_real_gpu_certifies_through_its_own_plan(
    tiny_bundle: ModelBundle, good_folder: Callable[..., Path], invoke: Invoke, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nothing is stood in for: compiled, run, recorded, and the line that names the same is certified."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "line"
    with where_the_gpu_is_known():
        invoke(calibrate, tiny_bundle.path, "--good", good_folder(45), "--out", out, *PROMISE, "--backend", "tensorrt")
    bundle = open_bundle(out)
    print(bundle.calibration.engine)

    assert bundle.calibration.engine.startswith("tensorrt ") and " fp16 cuda:0 " in bundle.calibration.engine
    assert is_certified(bundle, tmp_path, backend="tensorrt", device="cuda:0", precision="fp16")
    assert not is_certified(bundle, tmp_path, backend="tensorrt", device="cuda:0", precision="fp32")
