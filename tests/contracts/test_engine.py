"""What every Engine promises, kept by OpenVINO, ONNX Runtime and the fake alike, alone and coarse first; and by the
schedule of the GPU path, on a device that computes on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundle import ModelBundle, check_golden
from edge.engines.refine import RefineEngine
from edge.engines.registry import Backend, open_engine
from edge.errors import EngineBusy, EngineError
from edge.protocols import Engine
from refining import refining_bundle
from streaming import streamed_engine

WITHOUT_A_GPU = ("openvino", "onnxruntime", "fake")
COARSE_FIRST = {"openvino, coarse first": "openvino", "onnxruntime, coarse first": "onnxruntime"}


@pytest.fixture(scope="session")
def refining(make_bundle: Callable[..., ModelBundle], tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """The tiny bundle with a coarse graph; its gate is amid the scores of `batch_of`, so that batches are split."""
    return refining_bundle(make_bundle, tmp_path_factory.mktemp("coarse") / "bundle", threshold=2.4, margin=0.3)


@pytest.fixture(params=[*WITHOUT_A_GPU, *COARSE_FIRST, "streamed"])
def engine(request: pytest.FixtureRequest, tiny_bundle: ModelBundle, refining: ModelBundle) -> Iterator[Engine]:
    """Each backend on the tiny bundle, alone and coarse first: 32 x 32 gray, batches up to 4."""
    if request.param == "streamed":
        with streamed_engine(tiny_bundle)[0] as opened:
            yield opened
        return
    bundle = refining if request.param in COARSE_FIRST else tiny_bundle
    with open_engine(bundle, backend=COARSE_FIRST.get(request.param, request.param)) as opened:
        yield opened


def batch_of(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 1), dtype=np.uint8)


def test_the_specification_is_the_manifests(engine: Engine, tiny_bundle: ModelBundle) -> None:
    """Sizes come from the bundle; depth is at least one."""
    spec, manifest = engine.spec, tiny_bundle.manifest

    assert (spec.height, spec.width, spec.channels) == (32, 32, 1)
    assert (spec.map_height, spec.map_width) == (manifest.map.height, manifest.map.width)
    assert spec.max_batch == manifest.input.max_batch and spec.depth >= 1 and spec.name and spec.version


def test_every_batch_size_gives_finite_float32_of_the_stated_shape(engine: Engine) -> None:
    """From one frame to the largest batch, in any order."""
    engine.warmup()
    for count in (1, 4, 2, 3, 1):
        maps, scores = engine.infer(batch_of(count))

        assert maps.shape == (count, 14, 14) and scores.shape == (count,)
        assert maps.dtype == scores.dtype == np.float32 and np.isfinite(maps).all() and np.isfinite(scores).all()


def test_a_batch_is_split_where_the_coarse_pass_comes_first(refining: ModelBundle) -> None:
    """The suite means something for it: some of the pictures are refined and some are not."""
    with open_engine(refining) as engine:
        assert isinstance(engine, RefineEngine)
        for seed in range(8):
            engine.infer(batch_of(4, seed))

        assert 8 <= engine.tiles_refined <= 24 < engine.tiles == 32


def test_the_same_input_gives_the_same_bytes(engine: Engine) -> None:
    """A verdict can be computed again: not close, the same."""
    batch = batch_of(3)
    first_maps, first_scores = engine.infer(batch)

    for _ in range(5):
        engine.infer(batch_of(3, seed=9))
        maps, scores = engine.infer(batch.copy())
        assert maps.tobytes() == first_maps.tobytes() and scores.tobytes() == first_scores.tobytes()


def test_results_come_in_the_order_of_submission(engine: Engine) -> None:
    """With every stream busy, tickets count up and each answer is its own batch's."""
    alone = [engine.infer(batch_of(1 + index % 4, seed=index))[0] for index in range(8)]
    tickets, answers = [], []
    waiting = 0
    for index in range(8):
        tickets.append(engine.submit(batch_of(1 + index % 4, seed=index)))
        waiting += 1
        if waiting == engine.spec.depth:
            answers.append(engine.collect(10.0))
            waiting -= 1
    answers += [engine.collect(10.0) for _ in range(waiting)]

    assert [ticket for ticket, _, _ in answers] == tickets == list(range(tickets[0], tickets[0] + 8))
    for (_, maps, _), expected in zip(answers, alone, strict=True):
        np.testing.assert_array_equal(maps, expected)


def test_a_frame_scores_the_same_whatever_its_neighbors_in_the_batch(engine: Engine) -> None:
    """Micro-batching must not change an answer beyond rounding."""
    batch = batch_of(4)
    together, _ = engine.infer(batch)

    for index in range(4):
        alone, _ = engine.infer(batch[index : index + 1])
        np.testing.assert_allclose(alone[0], together[index], rtol=1e-4, atol=1e-5)


def test_the_image_score_is_the_largest_cell(engine: Engine) -> None:
    """The tiny model and the fake both reduce by the maximum, as the manifest says."""
    maps, scores = engine.infer(batch_of(3))

    np.testing.assert_array_equal(scores, maps.max(axis=(1, 2)))


def test_collected_results_stay_as_they_are(engine: Engine) -> None:
    """The caller keeps maps while the engine works on: they are no views of its buffers."""
    maps, scores = engine.infer(batch_of(2))
    before = maps.tobytes(), scores.tobytes()

    for seed in range(1, 5):
        engine.infer(batch_of(2, seed=seed))
    assert (maps.tobytes(), scores.tobytes()) == before


def test_one_batch_more_than_depth_is_refused_and_loses_nothing(engine: Engine) -> None:
    """EngineBusy is an answer, not an accident: what is in flight is still collected."""
    tickets = [engine.submit(batch_of(1)) for _ in range(engine.spec.depth)]

    with pytest.raises(EngineBusy, match="depth"):
        engine.submit(batch_of(1))
    with pytest.raises(EngineBusy):
        engine.infer(batch_of(1))
    assert [engine.collect(10.0)[0] for _ in tickets] == tickets
    engine.infer(batch_of(1))


def test_collecting_with_nothing_out_is_an_error(engine: Engine) -> None:
    """It would otherwise wait for what never comes."""
    with pytest.raises(EngineError, match="no batch is in flight"):
        engine.collect(10.0)


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((0, 32, 32, 1), np.uint8),
        np.zeros((5, 32, 32, 1), np.uint8),
        np.zeros((1, 32, 32, 3), np.uint8),
        np.zeros((1, 32, 31, 1), np.uint8),
        np.zeros((32, 32, 1), np.uint8),
        np.zeros((1, 32, 32, 1), np.float32),
        np.zeros((1, 32, 64, 1), np.uint8)[:, :, ::2],
    ],
    ids=["empty", "too many", "channels", "size", "axes", "dtype", "strided"],
)
def test_a_batch_of_another_shape_is_refused(engine: Engine, batch: NDArray[np.uint8]) -> None:
    """Wrong pixels are refused before they reach the backend, and the engine goes on."""
    with pytest.raises(EngineError, match="batch"):
        engine.submit(batch)

    engine.infer(batch_of(1))


def test_a_read_only_batch_is_taken(engine: Engine, tiny_bundle: ModelBundle) -> None:
    """Golden frames and frames from shared memory cannot be written to."""
    batch = batch_of(2)
    expected, _ = engine.infer(batch)
    batch.setflags(write=False)

    np.testing.assert_array_equal(engine.infer(batch)[0], expected)


def test_a_closed_engine_refuses_work(tiny_bundle: ModelBundle, engine: Engine) -> None:
    """Also with a batch in flight at the end of the `with` block."""
    engine.submit(batch_of(4))
    engine.__exit__(None, None, None)

    for use in (lambda: engine.submit(batch_of(1)), lambda: engine.collect(1.0), engine.warmup):
        with pytest.raises(EngineError, match="closed"):
            use()


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_real_backend_gives_the_golden_answers(tiny_bundle: ModelBundle, backend: Backend) -> None:
    """Parity is a gate: both backends reproduce the golden frames to far better than bf16 would."""
    with open_engine(tiny_bundle, backend=backend) as engine:
        check = check_golden(tiny_bundle, engine, require=True)

    assert check.ok and check.max_abs < 1e-4


def test_control_the_golden_check_tells_a_wrong_engine_from_a_right_one(tiny_bundle: ModelBundle) -> None:
    """The fake does not run the model, and the check says so."""
    with open_engine(tiny_bundle, backend="fake") as engine:
        assert not check_golden(tiny_bundle, engine).ok
