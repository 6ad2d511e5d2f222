"""The GPU's benchmarks without a GPU: they refuse to report, and over stand-ins every figure asked for is there.

The numbers here mean nothing; that the programs run to their end is what saves the minutes on a lent machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.bundle import ModelBundle
from fake_nvidia import PLAN, FakeNvidia, install

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_fdfe  # noqa: E402
import gpu_graphs  # noqa: E402
import gpu_programs  # noqa: E402


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def planned(machine: FakeNvidia, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's builder is not stood in for: a plan is what the fake runtime takes."""
    monkeypatch.setattr(gpu_programs, "build_plan", lambda bundle, path: path.write_bytes(PLAN))
    machine.driver.get_driver_version = lambda: 13000  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["gpu", "gpu_fdfe"])
def test_without_a_gpu_nothing_is_reported(name: str) -> None:
    """One sentence on standard error, exit status 1, no JSON."""
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("a driver is loaded here")

    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py"], capture_output=True, text=True, timeout=110
    )

    assert done.returncode == 1 and done.stdout == "" and "there is none to measure" in done.stderr


def test_a_row_holds_every_figure_and_says_what_ran(
    tiny_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Device and versions first, then whether TensorRT ran, a row a batch, and the goals."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tiny_bundle.path), "--seconds", "0.02", "--only"])
    with install(monkeypatch, tiny_bundle) as machine:
        planned(machine, monkeypatch)
        status = gpu.main()

    header, ran, *rows, goals = lines(capsys.readouterr().out)
    assert status == 0 and header["gpu"] == "NVIDIA Fake" and header["tensorrt"] == "rtx-1.7.1.116"
    assert {"compute_capability", "driver_cuda", "pycuda", "torch"} <= header.keys()
    assert ran == {"engine": "tensorrt", "tensorrt_executed": True, "why_not": None}
    assert [row["batch"] for row in rows] == [1, 4]
    for row in rows:
        assert {"fps", "p50_ms", "p99_ms", "bare_fps", "pipeline_of_bare", "host_core_ms"} <= row.keys()
        assert row["parity_rel"] < 1e-3  # the stand-in computes in fp32
    assert goals["worst_pipeline_of_bare"] == min(row["pipeline_of_bare"] for row in rows)


def test_where_tensorrt_refuses_the_gpu_it_is_said_and_torch_is_next(
    tiny_bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it may be on a GPU that the library does not know; asked for by name it is an error."""
    graph = gpu_graphs.Graph("tiny", tiny_bundle)
    with install(monkeypatch, tiny_bundle) as machine:
        planned(machine, monkeypatch)
        monkeypatch.setattr(gpu_programs, "build_plan", lambda bundle, path: path.write_bytes(b"for another GPU"))

        kind, why = gpu_programs.choose(graph, "auto", "cuda:0", "fp16")
        with pytest.raises(gpu_programs.EngineError, match="MALFORMED_ENGINE"):
            gpu_programs.choose(graph, "tensorrt", "cuda:0", "fp16")
        assert machine.driver.held == set()

    assert kind == "torch" and why is not None and "MALFORMED_ENGINE" in why


def test_both_dense_forms_are_one_network_and_their_work_is_counted() -> None:
    """The same map from multipool and dilated; twice the multiply-adds of four networks over the padded picture."""
    import torch

    from trainer.patch_nets import PROFILES

    spec = PROFILES["paper-33"]
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8))
    modules = {form: gpu_graphs.dense_module(33, form) for form in ("multipool", "dilated")}
    with torch.inference_mode():
        maps = {form: module(frames)[0].numpy() for form, module in modules.items()}
    work = {form: gpu_graphs.flop_of(module, 16) for form, module in modules.items()}

    assert maps["dilated"].shape == (1, 16, 16)
    np.testing.assert_allclose(maps["multipool"], maps["dilated"], rtol=1e-3, atol=1e-5 * maps["dilated"].max())
    assert work["multipool"] < 4 * 2 * 16 * 16 * spec.macs(33, 33) and 0.5 < work["dilated"] / work["multipool"] < 2


def test_the_faster_form_is_chosen_and_its_share_is_of_its_own_round() -> None:
    """Medians of three rounds, one of them disturbed."""
    graphs = {
        form: gpu_graphs.Graph(form, None, gpu_graphs.dense_module(33, form)) for form in ("multipool", "dilated")
    }  # type: ignore[arg-type]
    rounds = [
        {"product": 500.0, "multipool": 300.0, "dilated": 200.0},
        {"product": 50.0, "multipool": 30.0, "dilated": 20.0},
        {"product": 500.0, "multipool": 310.0, "dilated": 200.0},
    ]

    found = gpu_fdfe.report(33, "torch", 1, graphs, rounds)

    share = found["share_of_product"]["multipool"]
    assert found["chosen"] == "multipool" and found["multipool_over_dilated_fps"] == 1.5
    assert share == pytest.approx(300.0 * found["gflop_a_frame"]["multipool"] / 1e3 / 500.0, rel=0.01)


def test_a_preset_becomes_a_graph_with_golden_answers_that_nobody_trained() -> None:
    """`line` on the demo's own pictures: exported, parseable at fp16, its module beside it."""
    from edge.bundle import open_bundle
    from edge.graph import at_precision

    graph = gpu_graphs.preset_graph("line", gpu.pictures(open_bundle(gpu.DEMO)), "cpu")

    assert graph.bundle.golden.maps.shape == (2, 57, 57) and np.isfinite(graph.bundle.golden.maps).all()
    assert graph.module is not None and at_precision(graph.bundle.model, "fp16") != graph.bundle.model
