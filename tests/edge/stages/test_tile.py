"""Tiles: what is put together from them is what the same network says about the whole frame, wherever they meet."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bundle import InputSpec, MapGeometry
from edge.errors import BundleError, EngineError
from edge.images import cv2
from edge.stages.infer import to_map
from edge.stages.tile import Axis, Stitch, Tiling, cut, smallest_side_px, tiling_of
from edge.types import FrameId, ModelInput, Roi

TILE = (32, 44)
"""Height and width, apart so that no axis can stand in for the other."""


@dataclass(frozen=True)
class Net:
    """A random network of two convolutions for pictures of any size, and where its cells lie in a tile."""

    session: Any
    tiling: Tiling

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The map (h', w') of one picture (H, W, C)."""
        answer: NDArray[np.float32] = self.session.run(None, {"frames": pixels[None]})[0][0]
        return answer

    def stitched(self, image: NDArray[np.uint8]) -> Stitch:
        """The map of one picture by its tiles."""
        stitch = self.tiling.begin(region(image))
        done = [stitch.put(item.tile, self.run(np.ascontiguousarray(item.pixels))) for item in stitch.tiles()]
        assert done == [False] * (len(done) - 1) + [True]
        return stitch


def spec(height: int = TILE[0], width: int = TILE[1], channels: Literal[1, 3] = 3, min_side_px: int = 12) -> InputSpec:
    return InputSpec(height, width, channels, max_batch=4, fit="tile", min_side_px=min_side_px)


def region(image: NDArray[np.uint8]) -> ModelInput:
    return ModelInput(FrameId("cam", 1, 0, 0), image, Roi(0.0, 0.0, image.shape[1], image.shape[0]))


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def session_of(nodes: list[Any], weights: dict[str, NDArray[Any]]) -> Any:
    """Cast, move channels, the given nodes from `pixels` to `features`, sum of squares."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weights = {**weights, "scale": np.float32([1 / 256]), "channel": np.array([1], np.int64)}
    nodes = [
        helper.make_node("Cast", ["frames"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["raw"], perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["raw", "scale"], ["pixels"]),
        *nodes,
        helper.make_node("Mul", ["features", "features"], ["squares"]),
        helper.make_node("ReduceSum", ["squares", "channel"], ["anomaly_map"], keepdims=0),
    ]
    sides = [helper.make_tensor_value_info("frames", TensorProto.UINT8, ["N", "h", "w", 3])]
    out = [helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, ["N", "y", "x"])]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "net", sides, out, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def weight(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(shape).normal(0, 1 / math.sqrt(math.prod(shape[1:])), shape).astype(np.float32)


@pytest.fixture(scope="module")
def valid() -> Net:
    """No padding: conv 5, pool 2, conv 3, pool 2. A cell sees 12 px, the stride is 4, 6 x 9 cells in a tile."""
    from onnx import helper

    nodes = [
        helper.make_node("Conv", ["pixels", "a"], ["b"]),
        helper.make_node("MaxPool", ["b"], ["c"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("LeakyRelu", ["c"], ["d"], alpha=0.005),
        helper.make_node("Conv", ["d", "e"], ["f"]),
        helper.make_node("MaxPool", ["f"], ["features"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    geometry = MapGeometry(6, 9, stride=4.0, offset_y=5.5, offset_x=5.5)
    return Net(session_of(nodes, {"a": weight(6, 3, 5, 5), "e": weight(4, 6, 3, 3)}), Tiling(spec(), geometry))


PADDED_MAP = MapGeometry(16, 22, stride=2.0, offset_y=0.0, offset_x=0.0, rim_px=3)


@pytest.fixture(scope="module")
def padded() -> Net:
    """Zeros around each layer: conv 5, conv 3 of stride 2. A cell sees 3 px to each side of its own: 7 in all."""
    from onnx import helper

    nodes = [
        helper.make_node("Conv", ["pixels", "a", "bias"], ["b"], pads=[2, 2, 2, 2]),
        helper.make_node("LeakyRelu", ["b"], ["c"], alpha=0.005),
        helper.make_node("Conv", ["c", "d"], ["features"], pads=[1, 1, 1, 1], strides=[2, 2]),
    ]
    weights = {"a": weight(6, 3, 5, 5), "bias": weight(6, 1)[:, 0], "d": weight(4, 6, 3, 3)}
    return Net(session_of(nodes, weights), Tiling(spec(), PADDED_MAP))


@pytest.mark.parametrize(
    "size", [(32, 44), (33, 45), (96, 132), (100, 77), (131, 61), (35, 200), (20, 30), (12, 150), (31, 43)]
)
def test_without_padding_the_stitched_map_is_the_whole_frames(valid: Net, size: tuple[int, int]) -> None:
    """Odd sides, sides that no stride divides, sides shorter than a tile: the very cells, equal to 1e-5."""
    image = noise(*size)
    whole = valid.run(image)

    stitch = valid.stitched(image)

    assert stitch.scores.shape == whole.shape
    np.testing.assert_allclose(stitch.scores, whole, rtol=0, atol=1e-5)
    assert stitch.score == pytest.approx(whole.max(), abs=1e-5)


@pytest.mark.parametrize("side", [33, 34, 35])
def test_a_tile_with_pixels_to_spare_gives_the_same_cells(valid: Net, side: int) -> None:
    """A tile whose last pixels no cell sees: the frame's last cells are found all the same."""
    net = replace(valid, tiling=Tiling(spec(side, 44), valid.tiling.geometry))
    for height in range(33, 50):
        image = noise(height, 50)

        np.testing.assert_allclose(net.stitched(image).scores, net.run(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 44), (34, 46), (96, 132), (100, 78), (130, 60), (36, 200)])
def test_with_padding_the_stitched_map_is_the_whole_frames(padded: Net, size: tuple[int, int]) -> None:
    """Rims that saw zeros inside the frame are thrown away; those at the frame's own edges stay what they are."""
    image = noise(*size)

    stitch = padded.stitched(image)

    np.testing.assert_allclose(stitch.scores, padded.run(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(33, 45), (97, 133), (47, 44), (20, 99)])
def test_where_the_stride_does_not_divide_the_frame_is_continued_by_reflection(
    padded: Net, size: tuple[int, int]
) -> None:
    """As if the camera had sent the mirrored lines too; cells centered in them are cut off again."""
    image = noise(*size)
    down, right = (max(-(side - tile) % 2, tile - side) for side, tile in zip(size, TILE, strict=True))
    continued = np.asarray(cv2.copyMakeBorder(image, 0, down, 0, right, cv2.BORDER_REFLECT_101), np.uint8)
    cells = tuple(-(-side // 2) for side in size)

    stitch = padded.stitched(image)

    assert stitch.scores.shape == cells
    np.testing.assert_allclose(stitch.scores, padded.run(continued)[: cells[0], : cells[1]], rtol=0, atol=1e-5)


def test_control_keeping_rims_that_saw_padding_leaves_seams(padded: Net) -> None:
    """Planted bug: a rim of one pixel less than the network has. The error is not at the edges but where tiles meet."""
    careless = replace(padded, tiling=Tiling(spec(), MapGeometry(16, 22, 2.0, 0.0, 0.0, rim_px=2)))
    image = noise(96, 132)

    error = np.abs(careless.stitched(image).scores - padded.run(image))

    rows = careless.tiling.plan(96, 132).rows
    assert error.max() > 1e-2
    assert error[rows[1].first].max() > 1e-2 and error[[0, -1]][:, :5].max() < 1e-5


def test_a_flat_picture_has_a_flat_map(valid: Net) -> None:
    """No seam: whatever a cell sees, it sees the same, and so it says the same."""
    stitch = valid.stitched(np.full((150, 170, 3), 77, np.uint8))

    assert len(stitch.plan) > 9
    assert np.ptp(stitch.scores) < 1e-6


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_the_image_score_is_the_whole_maps_and_not_made_of_the_tiles(
    padded: Net, reduction: Literal["max", "mean"]
) -> None:
    """A network that pads, and a picture in which the largest and the mean answer are about padding inside of it."""
    net = replace(padded, tiling=Tiling(spec(), MapGeometry(16, 22, 2.0, 0.0, 0.0, reduction, rim_px=3)))
    # The padding is black, which seldom gives the largest answer: of the first 20 seeds only 8 does.
    image = np.random.default_rng(8).integers(0, 256, (96, 132, 3), dtype=np.uint8)
    reduce = getattr(np, reduction)

    score = net.stitched(image).score
    of_tiles = reduce([reduce(net.run(np.ascontiguousarray(item.pixels))) for item in net.stitched(image).tiles()])

    assert score == pytest.approx(reduce(net.run(image)), rel=1e-5)
    assert abs(of_tiles - score) > 1e-3


def test_the_stitched_map_lies_where_its_cells_do(valid: Net) -> None:
    """A region in the middle of a frame: the map's rectangle starts where the first cell does, in frame pixels."""
    image = noise(100, 77)
    inside = ModelInput(FrameId("cam", 1, 0, 0), image, Roi(300.0, 40.0, 77.0, 100.0))
    stitch = valid.tiling.begin(inside)
    for item in stitch.tiles():
        stitch.put(item.tile, valid.run(np.ascontiguousarray(item.pixels)))

    made = to_map(stitch.region, stitch.scores, stitch.score, stitch.plan.geometry)

    assert made.scores.shape == (23, 17)
    assert made.roi == Roi(304.0, 44.0, 68.0, 92.0) and made.extent == inside.roi
    assert next(stitch.tiles()).roi == Roi(300.0, 40.0, 44.0, 32.0)


def test_the_line_networks_plan() -> None:
    """p = 33, stride 4, 256 px: 57 cells a tile without padding, so tiles are 228 px apart and the last ends flush."""
    axis = Axis(side_px=256, cells=57, stride_px=4, offset_px=15.5, rim_px=0)

    spans = axis.spans(1000)

    assert [span.origin_px for span in spans] == [0, 228, 456, 684, 744]
    assert [(span.first, span.stop) for span in spans] == [(0, 57), (57, 114), (114, 171), (171, 228), (228, 243)]
    assert spans[-1].origin_px == 4 * ((1000 - 256) // 4) and axis.cells_over(1000) == 243


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    """Any axis that a bundle may have, padded or not."""
    stride = draw(st.integers(1, 8), label="stride")
    side = draw(st.integers(1, 96), label="tile")
    rim = draw(st.sampled_from([0, 0, 1, 2, 3, 7, 16]), label="rim")
    offset = draw(st.integers(-1 if rim else 0, 40), label="twice the offset") / 2
    axis = Axis(side, 0, stride, offset, rim)
    axis = replace(axis, cells=axis.cells_over(side))
    assume(axis.cells >= 1 and axis.step >= 1)
    return axis


def faults(axis: Axis, side: int) -> list[str]:
    """What is wrong with the plan for `side` pixels, cell by cell."""
    found = []
    times = np.zeros(axis.cells_over(side), int)
    spans = axis.spans(side)
    end = max(side, axis.side_px)
    for span in spans:
        times[span.first : span.stop] += 1
        own = np.arange(axis.cells)[span.own]
        center = axis.offset_px + own * axis.stride_px
        if span.origin_px % axis.stride_px or len(own) != span.stop - span.first or span.own.start < 0:
            found.append(f"{span} is off the grid")
        if not np.array_equal(center + span.origin_px, axis.offset_px + np.arange(*_ends(span)) * axis.stride_px):
            found.append(f"{span} gives cells of another place")
        if span.origin_px > 0 and center.min() < axis.rim_px:
            found.append(f"{span} saw padding before its start")
        if span.origin_px + axis.side_px < end and center.max() > axis.side_px - 1 - axis.rim_px:
            found.append(f"{span} saw padding after its end")
        if axis.rim_px == 0 and span.origin_px + (center + axis.offset_px).max() > side - 1:
            found.append(f"{span} saw pixels beyond the frame")
    if (times != 1).any():
        found.append(f"cells are covered {times.tolist()} times")
    return found


def _ends(span: Any) -> tuple[int, int]:
    return span.first, span.stop


@settings(max_examples=400, deadline=None)
@given(axes(), st.integers(1, 400))
def test_every_cell_comes_once_from_a_tile_that_saw_it_whole(axis: Axis, side: int) -> None:
    """Any side, stride, offset and rim: one grid, no cell twice, none missing, none that saw what is not there."""
    assume(axis.cells_over(side) >= 1)

    assert faults(axis, side) == []


@pytest.mark.parametrize("bug", ["step", "lead", "trail"])
def test_control_a_plan_that_is_off_by_one_cell_is_noticed(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    """Planted bugs: tiles one cell too far apart, or one cell of the rim kept at one side."""
    axis = Axis(side_px=32, cells=16, stride_px=2, offset_px=0.5, rim_px=6)
    assert faults(axis, 100) == []
    wrong = getattr(axis, bug) + (1 if bug == "step" else -1)
    monkeypatch.setattr(Axis, bug, wrong)

    assert faults(axis, 100) != []


def test_tiles_are_views_of_the_frame_except_beyond_its_edge(valid: Net) -> None:
    """A frame is never copied as a whole: only what is filled by reflection is new."""
    image = noise(33, 200)
    views = [np.shares_memory(item.pixels, image) for item in valid.tiling.begin(region(image)).tiles()]
    beyond = cut(image, 20, 180, 32, 44)

    assert all(views) and len(views) > 3
    expected = cv2.copyMakeBorder(image, 0, 19, 0, 24, cv2.BORDER_REFLECT_101)[20:, 180:]
    np.testing.assert_array_equal(beyond, expected)
    assert cut(image[:1, :1], 0, 0, 3, 3).tolist() == [[image[0, 0].tolist()] * 3] * 3


def test_an_incomplete_map_is_no_number_and_a_wrong_one_is_not_taken(valid: Net) -> None:
    """A tile that never came cannot pass as good, and a map of another shape is the engine's fault."""
    stitch = valid.tiling.begin(region(noise(100, 100)))
    first = next(stitch.tiles())

    with pytest.raises(EngineError, match=r"cam/1/0.*expected float32 \(6, 9\)"):
        stitch.put(first.tile, np.zeros((9, 6), np.float32))
    assert not stitch.put(first.tile, np.zeros((6, 9), np.float32))
    with pytest.raises(EngineError, match="not finite"):
        to_map(stitch.region, stitch.scores, stitch.score, stitch.plan.geometry)


@pytest.mark.parametrize(
    ("input", "geometry", "words"),
    [
        (spec(), MapGeometry(6, 8, 4.0, 5.5, 5.5), "width of 8 cells.* make 9 over 44 px"),
        (spec(), MapGeometry(16, 22, 2.0, 1.5, 1.5), "without padding make 15"),
        (spec(), MapGeometry(16, 22, 2.0, -0.5, -0.5), "offset -0.5 of a graph without padding"),
        (spec(), MapGeometry(32, 44, 1.0, 0.0, 0.0, rim_px=16), "leaves no cell of a tile's height of 32 px"),
        (spec(min_side_px=11), MapGeometry(6, 9, 4.0, 5.5, 5.5), "frames of 11 px, .*less than one receptive field"),
    ],
)
def test_a_map_that_cannot_be_put_together_is_refused_at_once(
    input: InputSpec, geometry: MapGeometry, words: str
) -> None:
    """When the line starts, not at the first frame that shows a seam."""
    with pytest.raises(BundleError, match=words):
        tiling_of(input, geometry)


def test_only_bundles_that_want_tiles_have_a_tiling() -> None:
    """A resized frame is one picture of the model's size."""
    assert tiling_of(InputSpec(32, 44, 3, 4), MapGeometry(6, 9, 4.0, 5.5, 5.5)) is None


def test_the_shortest_side_is_one_receptive_field() -> None:
    """The line network sees 32 px; a padded one sees its rim on both sides of a pixel."""
    assert smallest_side_px(MapGeometry(57, 57, 4.0, 15.5, 15.5)) == 32
    assert smallest_side_px(PADDED_MAP) == 7
