"""What is particular to ONNX Runtime: one batch at a time, and its exceptions are translated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.bundle import ModelBundle
from edge.engines.onnxruntime import OnnxRuntimeEngine
from edge.errors import EngineError


def test_one_batch_is_in_flight_at_most(tiny_bundle: ModelBundle) -> None:
    """`submit` does the work, so depth is one."""
    with OnnxRuntimeEngine(tiny_bundle, max_batch=4) as engine:
        assert engine.spec.depth == 1


def test_a_run_that_fails_is_raised_by_collect_and_consumed(tiny_bundle: ModelBundle) -> None:
    """The next batch is not the failed one's victim."""
    batch = np.zeros((1, 32, 32, 1), np.uint8)
    with OnnxRuntimeEngine(tiny_bundle, max_batch=4) as engine:
        session = engine._session

        class Broken:
            def run(self, *_: Any) -> Any:
                raise RuntimeError("out of memory")

        engine._session = Broken()
        engine.submit(batch)
        with pytest.raises(EngineError, match="batch 0 failed: out of memory"):
            engine.collect(1.0)
        engine._session = session
        engine.submit(batch)

        assert engine.collect(1.0)[0] == 1


def test_a_model_that_onnx_runtime_cannot_load_is_named(
    make_bundle: Callable[..., ModelBundle], tmp_path: Path
) -> None:
    """Its exceptions derive from nothing in common; all become EngineError."""
    golden = make_bundle(tmp_path / "good").golden
    empty_graph = b"\x08\x09\x3a\x03\x12\x01g"  # ir_version 9, a graph named g, no opset
    bundle = make_bundle(tmp_path / "bad", model=empty_graph, golden=golden)

    with pytest.raises(EngineError, match=r"bad.*ONNX Runtime"):
        OnnxRuntimeEngine(bundle, max_batch=1)
