"""`open_engine` loads the backend asked for, and refuses what breaks the graph contract."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge.bundle import ModelBundle
from edge.engines.contract import usable_cores
from edge.engines.registry import BACKENDS, Backend, open_engine, require_backend
from edge.errors import DeviceError, EngineError

REAL: tuple[Backend, ...] = ("openvino", "onnxruntime")


@pytest.mark.parametrize(
    ("backend", "step"), [("onnxruntime", r"kizu\[onnxruntime\]"), ("openvino", "pip install kizu")]
)
def test_a_missing_package_names_what_to_install(
    tiny_bundle: ModelBundle, backend: Backend, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine without the package: EngineError with the command, not ImportError."""
    monkeypatch.delitem(sys.modules, f"edge.engines.{backend}", raising=False)
    monkeypatch.setitem(sys.modules, backend, None)

    with pytest.raises(EngineError, match=step):
        open_engine(tiny_bundle, backend=backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorflow"}, "openvino, onnxruntime, tensorrt, fake"),
        ({"device": "cuda:0"}, "expected 'cpu'"),
        ({"streams": 0}, "streams is 0"),
        ({"max_batch": 5}, "1 to 4"),
        ({"max_batch": 0}, "1 to 4"),
    ],
)
def test_a_wrong_option_is_refused_not_corrected(
    tiny_bundle: ModelBundle, options: dict[str, Any], message: str
) -> None:
    """Each refusal says what would be accepted."""
    with pytest.raises(EngineError, match=message):
        open_engine(tiny_bundle, **options)


@pytest.mark.parametrize("backend", REAL)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"input_name": "images"}, r"inputs are \['images'\]"),
        ({"side": 36}, "frames is uint8"),
        ({"channels": 3}, "frames is uint8"),
        ({"max_dim": 1}, r"frames is uint8 \(1, 32"),
    ],
    ids=["another name", "another size", "other channels", "fixed batch"],
)
def test_a_graph_that_breaks_the_contract_is_refused(
    make_bundle: Callable[..., ModelBundle],
    make_model: Callable[..., bytes],
    tmp_path: Path,
    backend: Backend,
    model: dict[str, Any],
    message: str,
) -> None:
    """The manifest promises 32 x 32 gray with N free; a bundle whose graph takes something else does not run."""
    golden = make_bundle(tmp_path / "good").golden
    bundle = make_bundle(tmp_path / "bad", model=make_model(**model), golden=golden)

    with pytest.raises(EngineError, match=message):
        open_engine(bundle, backend=backend)


def test_control_without_the_contract_check_a_foreign_size_is_found_only_later(
    make_bundle: Callable[..., ModelBundle],
    make_model: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check is what refuses: without it the engine opens, and fails with the first frame."""
    import edge.engines.onnxruntime

    golden = make_bundle(tmp_path / "good").golden
    bundle = make_bundle(tmp_path / "bad", model=make_model(side=36), golden=golden)
    monkeypatch.setattr(edge.engines.onnxruntime, "require_graph", lambda *_: None)

    with open_engine(bundle, backend="onnxruntime") as engine, pytest.raises(EngineError):
        engine.infer(bundle.golden.frames)


def test_every_backend_named_is_there(tiny_bundle: ModelBundle) -> None:
    """The list in the error message is the list of what works."""
    for backend in map(require_backend, set(BACKENDS) - {"tensorrt"}):
        with open_engine(tiny_bundle, backend=backend, max_batch=1) as engine:
            assert engine.spec.name == backend and engine.spec.max_batch == 1


def test_tensorrt_without_a_plan_says_what_to_run(tiny_bundle: ModelBundle) -> None:
    """The registry compiles nothing; whoever calls it brings the plan."""
    with pytest.raises(DeviceError, match="kizu compile"):
        open_engine(tiny_bundle, backend="tensorrt", device="cuda:0")


def test_tensorrt_without_its_packages_names_the_extras(
    tiny_bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both flavors blocked, as on a machine that has neither."""
    from edge.engines.tensorrt import FLAVORS

    for name in FLAVORS:
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(DeviceError, match=r"kizu\[tensorrt-rtx,gpu\]") as missing:
        open_engine(tiny_bundle, backend="tensorrt", device="cuda:0", plan=tmp_path / "plan")
    assert missing.value.reason == "package"


@pytest.mark.parametrize(("text", "limit"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 99), ("", 99)])
def test_a_container_quota_limits_the_cores(
    text: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cores' worth of quota on a machine of 99: two threads, not 99 throttled ones."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(99)))
    (tmp_path / "cpu.max").write_text(text)

    assert usable_cores(tmp_path / "cpu.max") == limit
    assert usable_cores(tmp_path / "absent") == 99
