"""Masks as runs, and regions by run-based labelling: always what a slow and obvious labelling says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import ndimage

from edge import masks, run_kernels
from edge.masks import RunLength, float32_floor, regions

Answer = tuple[tuple[int, int, int, int], int, float, bytes]

random_masks = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=150))
random_scores = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70),
    elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, float("nan")]),
)


def slow_regions(scores: NDArray[np.float32], threshold: float) -> list[Answer]:
    """By SciPy and the definition, in the order that `regions` promises."""
    labels, count = ndimage.label(scores > threshold, structure=np.ones((3, 3)))
    found = []
    for label in range(1, count + 1):
        mask = labels == label
        ys, xs = np.nonzero(mask)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        first = int(np.flatnonzero(mask)[0])
        found.append((first, (box, len(ys), float(scores[mask].max()), mask.tobytes())))
    return [answer for _, answer in sorted(found, key=lambda item: (-item[1][1], item[0]))]


def answers(found: list[masks.MaskRegion]) -> list[Answer]:
    return [(region.box_xyxy, region.area_px, region.peak, region.mask.to_mask().tobytes()) for region in found]


@given(random_masks)
def test_a_mask_comes_back_from_its_runs(mask: NDArray[np.bool_]) -> None:
    """Runs are another way to write the same mask; area and box follow from them."""
    runs = RunLength.from_mask(mask)
    assert np.array_equal(runs.to_mask(), mask)
    assert runs.area_px == mask.sum()

    ys, xs = np.nonzero(mask)
    box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1) if len(ys) else (0, 0, 0, 0)
    assert runs.box_xyxy == box


def test_runs_are_sorted_never_touch_and_are_read_only() -> None:
    """What DefectRegion promises to those who walk the runs."""
    runs = RunLength.from_mask(np.array([[1, 1, 0, 1], [0, 0, 1, 1]], bool)).runs

    assert runs.tolist() == [[0, 0, 2], [0, 3, 4], [1, 2, 4]]
    assert runs.dtype == np.int32 and not runs.flags.writeable


@pytest.mark.parametrize("wrong", [np.zeros((2, 2), np.uint8), np.zeros(4, bool), np.zeros((1, 2, 2), bool)])
def test_only_a_flat_bool_mask_has_runs(wrong: Any) -> None:
    """A uint8 mask with 255 in it is a mistake that is told, not guessed about."""
    with pytest.raises(ValueError, match=r"\(H, W\) bool"):
        RunLength.from_mask(wrong)


@settings(max_examples=200, deadline=None)
@given(random_scores)
def test_both_ways_of_labelling_give_the_slow_answer(scores: NDArray[np.float32]) -> None:
    """Runs and, past the run limit, OpenCV: same regions, boxes, areas, peaks, masks and order."""
    expected = slow_regions(scores, 0.5)

    assert answers(regions(scores, 0.5)) == expected
    assert answers(regions(scores, 0.5, run_limit=0)) == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.05, 0.3, 0.6, 0.95]), st.integers(60, 300))
def test_wide_maps_with_full_and_empty_chunks_give_the_slow_answer(seed: int, share: float, width: int) -> None:
    """The scan skips whole chunks of a row; coarse blocks make them empty, full and mixed."""
    rng = np.random.default_rng(seed)
    coarse = (rng.random((4, 1 + width // 40)) < share).astype(np.float32)
    scores = np.kron(coarse, np.ones((3, 40), np.float32))[:, :width] + rng.random((12, 1), np.float32) * 0.1
    scores = np.ascontiguousarray(scores, np.float32)
    scores[rng.random(scores.shape) < 0.002] = 0.0

    assert answers(regions(scores, 0.5)) == slow_regions(scores, 0.5)


def test_labelling_that_forgets_to_join_runs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: without union-find every run is a region of its own, and the comparison above must notice."""
    honest: Callable[..., int] = run_kernels.find_runs

    def forgetful(scores: Any, bound: Any, runs: Any, parents: Any) -> int:
        count = honest(scores, bound, runs, parents)
        parents[:count] = np.arange(count)
        return count

    scores = np.eye(5, dtype=np.float32)
    assert answers(regions(scores, 0.5)) == slow_regions(scores, 0.5)
    monkeypatch.setattr(run_kernels, "find_runs", forgetful)
    assert answers(regions(scores, 0.5)) != slow_regions(scores, 0.5)


def test_past_the_run_limit_opencv_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame of noise must not grow the run buffers; up to the limit OpenCV stays out of it."""
    scores = np.zeros((8, 9), np.float32)
    scores[::2, ::2] = 1.0  # 20 runs
    called: list[int] = []
    honest = masks._label_by_opencv

    def by_opencv(*given: Any) -> Any:
        called.append(1)
        return honest(*given)

    monkeypatch.setattr(masks, "_label_by_opencv", by_opencv)

    assert len(regions(scores, 0.5, run_limit=20)) == 20 and not called
    assert len(regions(scores, 0.5, run_limit=19)) == 20 and called


def test_small_regions_are_left_out_and_the_biggest_come_first() -> None:
    """`min_area_px` and `limit` act before masks are built, so a noisy frame stays cheap."""
    scores = np.zeros((20, 20), np.float32)
    scores[0, 0], scores[3:5, 3:5], scores[10:15, 10:15], scores[18, 2:5] = 1.0, 2.0, 3.0, 4.0

    assert [region.area_px for region in regions(scores, 0.5)] == [25, 4, 3, 1]
    assert [region.area_px for region in regions(scores, 0.5, min_area_px=3)] == [25, 4, 3]
    assert [region.area_px for region in regions(scores, 0.5, limit=2)] == [25, 4]


def test_a_part_of_a_frame_reports_in_frame_coordinates() -> None:
    """`segment` labels only the rectangle that can hold something."""
    scores = np.zeros((4, 5), np.float32)
    scores[1:3, 2:4] = 1.0
    (region,) = regions(scores, 0.5, origin_xy=(100, 50), frame_size=(80, 120))

    assert region.box_xyxy == (102, 51, 104, 53) == region.mask.box_xyxy
    assert region.mask.to_mask().shape == (80, 120)
    with pytest.raises(ValueError, match="not within a frame"):
        regions(scores, 0.5, origin_xy=(100, 50), frame_size=(80, 104))


@given(st.floats(allow_nan=False), st.floats(width=32, allow_nan=False))
def test_comparing_in_float32_says_what_float64_would_say(threshold: float, score: float) -> None:
    """Thresholds are stored as float64; rounding one up must not hide a score between the two."""
    with np.errstate(all="ignore"):
        assert (np.float32(score) > float32_floor(threshold)) == (score > threshold)


def test_a_threshold_that_is_no_number_is_refused() -> None:
    """Nothing is greater than NaN: every part would pass."""
    with pytest.raises(ValueError, match="NaN"):
        regions(np.zeros((2, 2), np.float32), float("nan"))


@pytest.mark.parametrize("wrong", [np.zeros((2, 2)), np.zeros(3, np.float32)])
def test_scores_of_another_shape_or_type_are_refused(wrong: Any) -> None:
    """A float64 map would be read as twice as many numbers."""
    with pytest.raises(ValueError, match="float32"):
        regions(wrong, 0.5)


def test_read_only_and_strided_maps_are_labelled() -> None:
    """Maps are read-only by promise, and a slice of one is not contiguous."""
    scores = np.zeros((10, 20), np.float32)
    scores[4:6, 4:6] = 1.0
    scores.setflags(write=False)

    assert regions(scores, 0.5)[0].area_px == 4
    assert regions(scores[::2, ::2], 0.5)[0].area_px == 1


def test_without_a_place_for_a_cache_the_kernels_still_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a sealed file system numba raises when asked to cache; the service must start all the same."""
    honest = numba.njit

    def no_locator(*given: Any, **options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return honest(*given, **options)

    monkeypatch.setattr(numba, "njit", no_locator)
    double = run_kernels.compiled(numba.types.int64(numba.types.int64))(lambda number: 2 * number)
    assert double(21) == 42


def test_masks_and_types_load_without_numba_and_opencv() -> None:
    """Subscribers import the types; they must not pay for labelling. The second line shows that the check can fail."""
    look = "import sys, {}; print(sum(name in sys.modules for name in ('numba', 'cv2')))"
    run = [sys.executable, "-c"]

    assert subprocess.check_output([*run, look.format("edge.masks, edge.types")], text=True).strip() == "0"
    assert subprocess.check_output([*run, look.format("edge.images")], text=True).strip() == "1"
