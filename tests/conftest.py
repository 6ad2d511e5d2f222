"""Fixtures of the whole suite: a tiny model under the graph contract, and bundles made of it, without training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundle import Golden, InputSpec, MapGeometry, ModelBundle, ScoreCalibration, Tolerance, write_bundle

MakeBundle = Callable[..., ModelBundle]


def tiny_model(
    side: int = 32, channels: int = 1, *, input_name: str = "frames", cells: int | None = None, max_dim: Any = "N"
) -> bytes:
    """One 5x5 convolution, leaky ReLU, 2x2 max pool; the map is the sum of squares: (side - 4) // 2 cells a side."""
    from onnx import TensorProto, helper, numpy_helper

    cells = (side - 4) // 2 if cells is None else cells
    random = np.random.default_rng(5)
    weights: dict[str, NDArray[Any]] = {
        "weight": random.normal(0, 0.05, (8, channels, 5, 5)).astype(np.float32),
        "bias": random.normal(0, 0.1, 8).astype(np.float32),
        "gray": np.array(128, np.float32),
        "scale": np.array(1 / 64, np.float32),
        "channel": np.array([1], np.int64),
        "cells": np.array([1, 2], np.int64),
    }
    nodes = [
        helper.make_node("Cast", [input_name], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["pixels"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["pixels", "gray"], ["centered"]),
        helper.make_node("Mul", ["centered", "scale"], ["normal"]),
        helper.make_node("Conv", ["normal", "weight", "bias"], ["conv"]),
        helper.make_node("LeakyRelu", ["conv"], ["active"], alpha=0.005),
        helper.make_node("MaxPool", ["active"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Mul", ["pooled", "pooled"], ["squares"]),
        helper.make_node("ReduceSum", ["squares", "channel"], ["anomaly_map"], keepdims=0),
        helper.make_node("ReduceMax", ["anomaly_map", "cells"], ["image_score"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(input_name, TensorProto.UINT8, [max_dim, side, side, channels])],
        [
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, [max_dim, cells, cells]),
            helper.make_tensor_value_info("image_score", TensorProto.FLOAT, [max_dim]),
        ],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where no driver is loaded."""
    # A container may show the device and not the driver's own folder.
    if not any(map(os.path.exists, ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvhost-gpu"))):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA driver is loaded here"))


@pytest.fixture(scope="session")
def make_model() -> Callable[..., bytes]:
    """`tiny_model`, for tests that need a model that differs from the contract."""
    return tiny_model


@pytest.fixture(scope="session")
def make_bundle() -> MakeBundle:
    """Write a bundle of the tiny model at a path; keywords replace what `write_bundle` is given."""

    def make(path: Path, *, side: int = 32, channels: int = 1, max_batch: int = 4, **changes: Any) -> ModelBundle:
        import onnxruntime

        model = changes.pop("model", None) or tiny_model(side, channels)
        if "golden" not in changes:
            frames = np.random.default_rng(3).integers(0, 256, (3, side, side, channels), dtype=np.uint8)
            session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
            maps, scores = session.run(["anomaly_map", "image_score"], {"frames": frames})
            changes["golden"] = Golden(frames, maps, scores)
        cells = (side - 4) // 2
        arguments: dict[str, Any] = {
            "name": "tiny",
            "method": "none",
            "preset": "test",
            "input": InputSpec(side, side, 3 if channels == 3 else 1, max_batch),
            "map": MapGeometry(cells, cells, stride=2.0, offset_y=2.5, offset_x=2.5),
            "tolerance": Tolerance(absolute=1e-4, relative=1e-4),
            "model": model,
            "calibration": ScoreCalibration(
                kind="provisional",
                certified=False,
                threshold=2.0,
                pixel_threshold=1.5,
                min_area_px=4,
                scores=(0.5, 1.0, 1.5),
                engine="onnxruntime",
                data_sha256="0" * 64,
                margin=0.5,
            ),
            "provenance": {"seed": 5, "made_by": "tests"},
            "created_ns": 1_700_000_000_000_000_000,
        }
        return write_bundle(path, **{**arguments, **changes})

    return make


@pytest.fixture(scope="session")
def tiny_bundle(make_bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """One opened bundle for every test that only reads it: 32 x 32 gray, batches up to 4, 14 x 14 cells of stride 2."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")
