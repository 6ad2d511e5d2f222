"""What the trainer exports is what a TensorRT build takes, beyond the one graph that the demo ships."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edge.bundle import InputSpec
from edge.compile import compile_bundle
from trainer.config import STUDENT_TEACHER
from trainer.configs.conad import FRAMES
from trainer.configs.fcdd import CIFAR_RESNET
from trainer.data import load_training_set
from trainer.distill import load_teacher
from trainer.export import BundleFacts, export_bundle
from trainer.methods.conad import Conad
from trainer.methods.fcdd import Fcdd
from trainer.methods.student_teacher import StudentTeacher

PHOTOS = Path(__file__).parents[2] / "edge" / "demo" / "photos"


needs_tensorrt = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT for RTX is not installed: pip install 'kizu[tensorrt-rtx]'",
)


@needs_tensorrt
def test_the_best_heads_map_and_the_top_tenth_build_at_both_precisions(tmp_path: Path) -> None:
    """`conad` untrained at its own size: a comparison instead of ArgMin, bisection instead of TopK."""
    frames = load_training_set(PHOTOS, size_px=256, aspect="stretch", skip_bad=False).take(np.arange(8))
    method = Conad(FRAMES, seed=1)
    method.prepare(frames)
    method.fit_statistics(frames[4:])
    facts = BundleFacts("conad", "conad", "frames", InputSpec(256, 256, 3, max_batch=16), "0" * 64, True, {})
    bundle = export_bundle(method, tmp_path / "conad", facts, held_out=frames[4:])

    half = compile_bundle(bundle, targets=["sm89"], precision="fp16", cache=tmp_path / "engines")
    full = compile_bundle(bundle, targets=["sm80"], precision="fp32", cache=tmp_path / "engines")

    assert half.fresh and full.fresh and half.size > 100_000 and full.size > 100_000


@needs_tensorrt
def test_a_graph_that_is_not_the_demos_builds_at_both_precisions(tmp_path: Path) -> None:
    """`duo` untrained, since a build does not see what weights mean; `make compile-all` builds every preset."""
    frames = load_training_set(PHOTOS, size_px=256, aspect="stretch", skip_bad=False).take(np.arange(8))
    config = STUDENT_TEACHER["duo"]
    method = StudentTeacher(config, [load_teacher(teacher) for teacher in config.teachers], seed=1)
    method.prepare(frames[:4])
    method.fit_statistics(frames[4:])
    facts = BundleFacts("duo", "student-teacher", "duo", InputSpec(256, 256, 3, max_batch=16), "0" * 64, True, {})
    bundle = export_bundle(method, tmp_path / "duo", facts, held_out=frames[4:])

    half = compile_bundle(bundle, targets=["sm89"], precision="fp16", cache=tmp_path / "engines")
    full = compile_bundle(bundle, targets=["sm80"], precision="fp32", cache=tmp_path / "engines")

    assert half.fresh and full.fresh and half.size > 100_000 and full.size > 100_000


@needs_tensorrt
def test_an_enlargement_by_products_builds(tmp_path: Path) -> None:
    """`fcdd` on 32 px images, made twice as large in the graph, with untrained heads on ImageNet's network."""
    frames = load_training_set(PHOTOS, size_px=32, aspect="stretch", skip_bad=False).take(np.arange(8))
    method = Fcdd(replace(CIFAR_RESNET, confetti=True), seed=1)
    method.prepare(frames)
    method.fit_statistics(frames[4:])
    facts = BundleFacts("fcdd", "fcdd", "cifar-resnet", InputSpec(32, 32, 3, max_batch=16), "0" * 64, True, {})
    bundle = export_bundle(method, tmp_path / "fcdd", facts, held_out=frames[4:])

    assert compile_bundle(bundle, targets=["sm89"], precision="fp16", cache=tmp_path / "engines").size > 100_000
