"""The fake engine: its map follows from the pixels, and it fails and lags when it is told to."""

from __future__ import annotations

import numpy as np
import pytest

from edge.engines.fake import FakeEngine
from edge.errors import EngineError
from edge.protocols import EngineSpec


def spec(side: int = 32, cells: int = 8, channels: int = 1) -> EngineSpec:
    return EngineSpec("fake", "1", "cpu", side, side, channels, cells, cells, max_batch=4, depth=2)


def test_a_cell_is_the_mean_distance_of_its_block_from_gray() -> None:
    """A black block in a gray picture scores 1 where it lies and 0 elsewhere."""
    batch = np.full((1, 32, 32, 1), 128, np.uint8)
    batch[0, 8:12, 20:24] = 0

    maps, scores = FakeEngine(spec()).infer(batch)

    assert maps[0, 2, 5] == 1.0 and scores[0] == 1.0
    assert np.count_nonzero(maps) == 1


@pytest.mark.parametrize(("side", "cells", "channels"), [(256, 57, 3), (33, 7, 1), (8, 20, 3), (5, 1, 1)])
def test_any_geometry_is_served(side: int, cells: int, channels: int) -> None:
    """Blocks need not divide the picture; with more cells than pixels some are repeated."""
    engine = FakeEngine(spec(side, cells, channels))

    maps, _ = engine.infer(np.full((2, side, side, channels), 64, np.uint8))
    np.testing.assert_array_equal(maps, np.full((2, cells, cells), 0.5, np.float32))


def test_it_fails_on_cue_and_goes_on() -> None:
    """The ticket named fails, the ones around it do not."""
    engine = FakeEngine(spec(), fail_tickets={1})
    batch = np.zeros((1, 32, 32, 1), np.uint8)
    engine.submit(batch)
    engine.submit(batch)

    assert engine.collect(1.0)[0] == 0
    with pytest.raises(EngineError, match="batch 1 fails"):
        engine.collect(1.0)
    engine.infer(batch)


def test_it_lags_on_cue_without_a_real_clock() -> None:
    """A batch is ready after its latency; a shorter wait is an error, and waits no longer than it was told."""
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    engine = FakeEngine(spec(), latency_s=0.5, monotonic=lambda: now[0], sleep=sleep)
    batch = np.zeros((1, 32, 32, 1), np.uint8)
    engine.submit(batch)
    engine.collect(1.0)
    engine.submit(batch)
    with pytest.raises(EngineError, match="not ready"):
        engine.collect(0.1)

    assert slept == [0.5, 0.1]
