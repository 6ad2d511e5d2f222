"""Where a cell lies in the frame, and how long a frame may wait for company."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundle import InputSpec, MapGeometry
from edge.errors import EngineBusy, EngineError
from edge.stages.infer import MicroBatcher, map_roi, to_map
from edge.types import FrameId, ModelInput, Roi

LINE_INPUT = InputSpec(height=256, width=256, channels=3, max_batch=8)
LINE_MAP = MapGeometry(height=57, width=57, stride=4.0, offset_y=15.5, offset_x=15.5)
SMALL = InputSpec(height=4, width=6, channels=1, max_batch=3)


class ManualClock:
    """Time that moves when the test says so."""

    def __init__(self) -> None:
        self.now_ns = 1_000

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_ns(self) -> int:
        return self.now_ns


def item(sequence: int, value: int = 0, side: tuple[int, int, int] = (4, 6, 1)) -> ModelInput:
    height, width, _ = side
    return ModelInput(FrameId("cam", 7, sequence, 0), np.full(side, value, np.uint8), Roi(0, 0, width, height))


def test_the_line_map_tiles_the_middle_of_the_frame() -> None:
    """Footprint 32 px, stride 4: cell 0 covers [14, 18), cell 56 ends at 242; a rim of 14 px is left all around."""
    roi = map_roi(Roi(0, 0, 256, 256), LINE_INPUT, LINE_MAP)

    assert roi == Roi(14.0, 14.0, 228.0, 228.0)


def test_a_defect_is_found_where_it_was_put() -> None:
    """A model with known cells: mark the frame at a cell's center, and that cell's square holds the mark."""
    frame_roi = Roi(x=100.0, y=40.0, width=512.0, height=384.0)
    roi = map_roi(frame_roi, LINE_INPUT, LINE_MAP)
    row, column = 10, 31
    model_y, model_x = 15.5 + row * 4 + 0.5, 15.5 + column * 4 + 0.5  # continuous coordinates of the cell's center
    frame_y, frame_x = 40.0 + model_y * 384 / 256, 100.0 + model_x * 512 / 256

    assert (frame_y - roi.y) / roi.height * 57 == pytest.approx(row + 0.5)
    assert (frame_x - roi.x) / roi.width * 57 == pytest.approx(column + 0.5)


def test_a_map_of_one_cell_for_each_pixel_tiles_exactly_the_input() -> None:
    """Stride 1, offset 0: no half pixel is lost between indices and coordinates."""
    geometry = MapGeometry(height=4, width=6, stride=1.0, offset_y=0.0, offset_x=0.0)

    assert map_roi(Roi(3.0, 5.0, 60.0, 40.0), SMALL, geometry) == Roi(3.0, 5.0, 60.0, 40.0)


def test_control_forgetting_the_half_pixel_would_shift_the_map() -> None:
    """Half a model pixel is two frame pixels at this scale; the exact test above would see it."""
    geometry = MapGeometry(height=4, width=6, stride=1.0, offset_y=-0.5, offset_x=-0.5)

    assert map_roi(Roi(0.0, 0.0, 24.0, 16.0), SMALL, geometry) == Roi(-2.0, -2.0, 24.0, 16.0)


def test_a_map_carries_its_frame_and_both_rectangles() -> None:
    """`roi` is what the cells tile, `extent` what the model saw; the scores are made read-only, not rescaled."""
    model_input = item(3, side=(256, 256, 3))
    scores = np.linspace(0, 9, 57 * 57, dtype=np.float32).reshape(57, 57)

    result = to_map(model_input, scores, 9.0, LINE_MAP)

    assert result.frame_id is model_input.frame_id and result.score == 9.0
    assert result.roi == Roi(14.0, 14.0, 228.0, 228.0) and result.extent == model_input.roi
    assert result.scores is scores and not scores.flags.writeable


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["map", "score"])
def test_a_value_that_is_not_finite_is_an_engine_fault(value: float, where: str) -> None:
    """NaN is neither above nor below a threshold: it must not become ACCEPT."""
    scores = np.zeros((57, 57), np.float32)
    if where == "map":
        scores[30, 2] = value

    with pytest.raises(EngineError, match=r"cam/7/3.*not finite"):
        to_map(item(3, side=(256, 256, 3)), scores, value if where == "score" else 0.0, LINE_MAP)


@pytest.mark.parametrize("scores", [np.zeros((56, 57), np.float32), np.zeros((57, 57), np.float64)])
def test_a_map_of_another_shape_is_an_engine_fault(scores: NDArray[np.float32]) -> None:
    """What the manifest does not promise is not interpreted."""
    with pytest.raises(EngineError, match=r"expected float32 \(57, 57\)"):
        to_map(item(3, side=(256, 256, 3)), scores, 0.0, LINE_MAP)


def batcher(clock: ManualClock, depth: int = 2, max_batch: int = 3) -> MicroBatcher:
    return MicroBatcher(SMALL, max_batch=max_batch, wait_ns=500, depth=depth, clock=clock)


def test_a_full_batch_goes_at_once_and_in_order() -> None:
    """The third of three closes the batch; pixels and inputs keep the order of arrival."""
    collecting = batcher(ManualClock())
    items = [item(index, value=index + 1) for index in range(3)]

    assert collecting.add(items[0]) is None and collecting.add(items[1]) is None
    batch = collecting.add(items[2])

    assert batch is not None and batch.inputs == tuple(items)
    assert batch.pixels.shape == (3, 4, 6, 1) and batch.pixels[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert len(collecting) == 0 and collecting.due_ns is None


def test_the_first_frame_waits_no_longer_than_its_deadline() -> None:
    """The deadline is the first frame's: later ones do not extend it."""
    clock = ManualClock()
    collecting = batcher(clock)
    collecting.add(item(0))
    clock.now_ns += 499
    collecting.add(item(1))

    assert collecting.due() is None and collecting.due_ns == 1_500
    clock.now_ns += 1
    batch = collecting.due()
    assert batch is not None and len(batch.inputs) == 2 and len(batch.pixels) == 2
    assert collecting.due() is None and collecting.flush() is None


def test_a_buffer_with_the_engine_is_not_written_to() -> None:
    """Depth 1: one buffer in flight, one filling; a third batch waits for the release of the first."""
    collecting = batcher(ManualClock(), depth=1, max_batch=1)
    first = collecting.add(item(0, value=10))
    second = collecting.add(item(1, value=20))
    assert first is not None and second is not None

    assert not collecting.can_add
    with pytest.raises(EngineBusy, match="release"):
        collecting.add(item(2, value=30))
    assert (first.pixels == 10).all() and (second.pixels == 20).all()
    collecting.release(first)
    third = collecting.add(item(2, value=30))
    assert third is not None and np.shares_memory(third.pixels, first.pixels) and (second.pixels == 20).all()


def test_releasing_twice_is_a_bug_that_is_named() -> None:
    """It would hand one buffer to two batches."""
    collecting = batcher(ManualClock(), max_batch=1)
    batch = collecting.add(item(0))
    assert batch is not None
    collecting.release(batch)

    with pytest.raises(ValueError, match="twice"):
        collecting.release(batch)


def test_pixels_of_another_shape_and_senseless_limits_are_refused() -> None:
    """Broadcasting would otherwise spread one row over a whole picture."""
    with pytest.raises(ValueError, match="the model takes"):
        batcher(ManualClock()).add(item(0, side=(4, 1, 1)))
    for max_batch, wait_ns, depth in ((4, 0, 1), (0, 0, 1), (1, -1, 1), (1, 0, 0)):
        with pytest.raises(ValueError, match="expected"):
            MicroBatcher(SMALL, max_batch=max_batch, wait_ns=wait_ns, depth=depth, clock=ManualClock())
