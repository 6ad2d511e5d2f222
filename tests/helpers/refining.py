"""Bundles that look coarsely first, made of the tiny model without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from edge.bundle import MapGeometry, ModelBundle, Refine

TINY_COARSE = MapGeometry(7, 7, stride=4.0, offset_y=2.5, offset_x=2.5)
"""Every second of the tiny model's 14 x 14 cells."""


def coarse_model(model: bytes) -> bytes:
    """The tiny model at twice its stride: its pooling skips every second window, so its cells are some of the same."""
    graph = onnx.load_from_string(model)
    pool = next(node for node in graph.graph.node if node.op_type == "MaxPool")
    strides = next(attribute for attribute in pool.attribute if attribute.name == "strides")
    strides.ints[:] = [4, 4]
    for side in graph.graph.output[0].type.tensor_type.shape.dim[1:]:
        side.dim_value = -(-side.dim_value // 2)
    return bytes(graph.SerializeToString())


def refine_of(margin: float, **changes: Any) -> Refine:
    """A margin as if it stood on 2,995 good tiles."""
    refine = Refine(TINY_COARSE, margin, rate=0.001, confidence=0.95, tiles=2995, rank=2995)
    return msgspec.structs.replace(refine, **changes)


def refining_bundle(
    make_bundle: Callable[..., ModelBundle], path: Path, *, threshold: float, margin: float, **changes: Any
) -> ModelBundle:
    """The tiny bundle with a coarse graph, both thresholds at `threshold`."""
    plain = make_bundle(path.with_name(f"{path.name}-plain"))
    calibration = msgspec.structs.replace(plain.calibration, threshold=threshold, pixel_threshold=threshold)
    refine = {"coarse": coarse_model(plain.model), "refine": refine_of(margin)}
    return make_bundle(path, **{"calibration": calibration, **refine, **changes})


def noise(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Frames for the tiny model (n, 32, 32, 1): noise of a random strength about gray, so that their scores differ."""
    random = np.random.default_rng(seed)
    strength = random.uniform(1, 60, (count, 1, 1, 1))
    return np.clip(128 + strength * random.standard_normal((count, 32, 32, 1)), 0, 255).astype(np.uint8)
