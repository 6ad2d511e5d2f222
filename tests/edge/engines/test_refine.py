"""Coarse, then dense: what is refined is the dense answer, what is not is exact where it was looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bundle import ModelBundle
from edge.engines.fake import FakeEngine
from edge.engines.refine import RefineEngine
from edge.engines.registry import Backend, open_engine
from edge.errors import EngineError
from edge.protocols import Engine, EngineSpec, Ticket
from refining import coarse_model, noise, refine_of, refining_bundle

MakeBundle = Callable[..., ModelBundle]
SPEC = EngineSpec("fake", "1", "cpu", 8, 8, 1, 4, 4, max_batch=4, depth=2)
COARSE = EngineSpec("fake", "1", "cpu", 8, 8, 1, 2, 2, max_batch=4, depth=2)
GRAY, WHITE = np.full((8, 8, 1), 128, np.uint8), np.full((8, 8, 1), 255, np.uint8)


@pytest.fixture(scope="module")
def bundle(make_bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """Threshold 0.5, margin 0.25: about a third of `noise` is above the gate."""
    return refining_bundle(make_bundle, tmp_path_factory.mktemp("coarse") / "bundle", threshold=0.5, margin=0.25)


@pytest.fixture(scope="module")
def engines(bundle: ModelBundle) -> Iterator[tuple[Engine, Engine]]:
    """The tiny network, dense and coarse; what refines with them does not close them."""
    with open_engine(bundle) as both:
        assert isinstance(both, RefineEngine)
        yield both.dense, both.coarse


class Recorder(FakeEngine):
    """A fake that keeps what it was given; `answer`, if set, stands in for its maps."""

    def __init__(self, spec: EngineSpec, **options: Any) -> None:
        super().__init__(spec, **options)
        self.given: list[NDArray[np.uint8]] = []
        self.answer: float | None = None

    def submit(self, batch: NDArray[np.uint8]) -> Ticket:
        self.given.append(batch.copy())
        return super().submit(batch)

    def _maps(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        maps = super()._maps(batch)
        return maps if self.answer is None else np.full_like(maps, self.answer)


def refining(**options: Any) -> tuple[RefineEngine, Recorder, Recorder]:
    """An engine of two fakes with its gate at half of white; `dense` and `coarse` are the fakes' options."""
    dense = Recorder(SPEC, **options.pop("dense", {}))
    coarse = Recorder(COARSE, **options.pop("coarse", {}))
    return RefineEngine(dense, coarse, gate=0.5, every=2, **options), dense, coarse


@settings(deadline=None)  # a busy machine is no fault
@given(st.integers(0, 1000), st.integers(1, 4), st.floats(0.0, 2.0))
def test_refined_elements_are_dense_bit_for_bit_and_others_exact_at_the_coarse_cells(
    engines: tuple[Engine, Engine], seed: int, count: int, gate: float
) -> None:
    """Whatever the pictures and the gate; what lies between takes a neighbor's value, none of them above the gate."""
    batch = noise(count, seed)
    refined = RefineEngine(*engines, gate=gate, every=2)
    maps, scores = refined.infer(batch)
    dense, dense_scores = engines[0].infer(batch)
    coarse, _ = engines[1].infer(batch)

    chosen = coarse.max(axis=(1, 2)) > gate
    assert (refined.tiles, refined.tiles_refined) == (count, chosen.sum())
    assert maps[chosen].tobytes() == dense[chosen].tobytes()
    assert scores[chosen].tobytes() == dense_scores[chosen].tobytes()
    for one, looked in zip(maps[~chosen], coarse[~chosen], strict=True):
        np.testing.assert_array_equal(one[::2, ::2], looked)
        assert all(one[y, x] in looked[y // 2 : y // 2 + 2, x // 2 : x // 2 + 2] for y, x in np.ndindex(14, 14))
        assert one.max() <= gate
    np.testing.assert_array_equal(scores, maps.max(axis=(1, 2)))


def test_the_coarse_cells_are_the_dense_networks_own(engines: tuple[Engine, Engine]) -> None:
    """So what is exact at the coarse cells is exact, and a coarse maximum is never above the dense one."""
    batch = noise(4)
    dense, _ = engines[0].infer(batch)
    coarse, _ = engines[1].infer(batch)

    np.testing.assert_allclose(coarse, dense[:, ::2, ::2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_without_refining_the_engine_is_the_dense_one_bit_for_bit(
    make_bundle: MakeBundle, bundle: ModelBundle, tmp_path: Path, backend: Backend
) -> None:
    """The switch: as if the bundle had no coarse graph."""
    plain = make_bundle(tmp_path / "plain")
    batch = noise(4)

    with open_engine(bundle, backend=backend, refine=False) as off, open_engine(plain, backend=backend) as dense:
        assert not isinstance(off, RefineEngine)
        for found, expected in zip(off.infer(batch), dense.infer(batch), strict=True):
            assert found.tobytes() == expected.tobytes()


def test_a_bundles_gate_is_its_threshold_less_the_margin(bundle: ModelBundle) -> None:
    """And the engine is otherwise the backend's own."""
    with open_engine(bundle, max_batch=2) as engine, open_engine(bundle, max_batch=2, refine=False) as dense:
        assert isinstance(engine, RefineEngine)
        assert engine.gate == 0.25 and engine.spec == dense.spec


def test_only_what_is_suspicious_goes_to_the_dense_engine() -> None:
    """One white picture among gray ones: a dense batch of one."""
    engine, dense, _ = refining()
    maps, scores = engine.infer(np.stack([GRAY, WHITE, GRAY]))

    assert [batch.shape for batch in dense.given] == [(1, 8, 8, 1)] and (dense.given[0] == 255).all()
    assert scores.tolist() == [0.0, 127 / 128, 0.0]
    assert maps.shape == (3, 4, 4) and maps[0].max() == 0 and maps[1].min() > 0.9


def test_what_is_no_number_is_refined() -> None:
    """NaN is above no gate and below none; in doubt, look closely."""
    engine, dense, coarse = refining()
    coarse.answer = float("nan")

    maps, _ = engine.infer(np.stack([GRAY, GRAY]))

    assert len(dense.given[0]) == 2 and np.isfinite(maps).all()


def test_tiles_are_counted_where_they_are_looked_at() -> None:
    """For the daemon's counters: what was seen, and what of it was refined."""
    told: list[tuple[int, int]] = []
    engine, _, _ = refining(on_tiles=lambda seen, refined: told.append((seen, refined)))
    engine.warmup()
    engine.infer(np.stack([GRAY, WHITE, GRAY]))
    engine.infer(np.stack([GRAY]))

    assert told == [(3, 1), (1, 0)] and (engine.tiles, engine.tiles_refined) == (4, 1)


def test_the_next_batch_is_with_the_dense_engine_while_this_one_is_waited_for() -> None:
    """Two streams stay busy; a batch that needs no dense pass is answered without a look at the others."""
    engine, dense, coarse = refining()
    tickets = [engine.submit(np.stack([WHITE])), engine.submit(np.stack([WHITE]))]
    assert engine.collect(1.0)[0] == tickets[0]
    assert len(dense.given) == 2

    engine.submit(np.stack([GRAY]))
    assert engine.collect(1.0)[0] == tickets[1]
    engine.submit(np.stack([WHITE]))
    engine.collect(1.0)
    assert len(dense.given) == 2 and len(coarse.given) == 4


@pytest.mark.parametrize(("which", "message"), [("coarse", "batch 1, coarse pass: fake"), ("dense", "fake: batch 1")])
def test_a_failed_pass_fails_its_own_batch_and_no_other(which: str, message: str) -> None:
    """The failure is told when its ticket is collected, also if it was met on behalf of an earlier one."""
    engine, _, _ = refining(**{which: {"fail_tickets": {1}}})
    tickets = [engine.submit(np.stack([WHITE])), engine.submit(np.stack([WHITE]))]
    assert engine.collect(1.0)[0] == tickets[0]
    with pytest.raises(EngineError, match=message):
        engine.collect(1.0)

    ticket = engine.submit(np.stack([WHITE, GRAY]))
    answered, _, scores = engine.collect(1.0)
    assert answered == ticket and scores.tolist() == [127 / 128, 0.0]


def test_both_passes_share_the_time_of_one_collect() -> None:
    """Three seconds each: five are too few, and the batch is given up; six are enough."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    slow = {"latency_s": 3.0, "monotonic": lambda: now[0], "sleep": sleep}
    engine, _, _ = refining(dense=slow, coarse=slow, monotonic=lambda: now[0])
    engine.submit(np.stack([WHITE]))
    with pytest.raises(EngineError, match="not ready"):
        engine.collect(5.0)
    assert now == [5.0]

    engine.submit(np.stack([WHITE]))
    engine.collect(6.0)


def test_a_coarse_graph_that_breaks_the_contract_is_refused_by_its_name(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    """The manifest promises 7 x 7 cells and the graph gives 14 x 14: the engine does not open."""
    model = make_bundle(tmp_path / "plain").model
    bundle = make_bundle(tmp_path / "wrong", coarse=model, refine=refine_of(0.5))
    good = make_bundle(tmp_path / "good", coarse=coarse_model(model), refine=refine_of(0.5))

    with pytest.raises(EngineError, match=r"coarse\.onnx: the graph's anomaly_map is float32 \(N, 14, 14\)"):
        open_engine(bundle)
    open_engine(good).__exit__(None, None, None)


def test_both_engines_are_closed_with_it() -> None:
    """With a batch in flight, too."""
    engine, dense, coarse = refining()
    with engine:
        engine.submit(np.stack([WHITE]))

    for inner in (dense, coarse):
        with pytest.raises(EngineError, match="closed"):
            inner.submit(np.stack([GRAY]))


def test_the_fake_computes_no_network_and_has_no_coarse_one(bundle: ModelBundle) -> None:
    """A dry run answers as ever."""
    with open_engine(bundle, backend="fake") as engine:
        assert isinstance(engine, FakeEngine)
