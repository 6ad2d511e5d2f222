"""The benchmark of the coarse look: what it counts as missed, and that its students are the shipped ones."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper
from torch import nn

from benchmarks.refine import load_students, mirrored, missed, tiles_of_map, worst
from edge.bundle import open_bundle
from edge.demo.line import BUNDLE
from trainer.patch_nets import PROFILES, build_patch_net
from trainer.student_graph import fold_input


def test_only_pixels_above_the_threshold_that_the_coarse_look_left_below_count_as_missed() -> None:
    """A lower value above the threshold is no miss, and neither is one that was below it anyway."""
    bundle = open_bundle(BUNDLE)
    limit = bundle.calibration.pixel_threshold
    dense = np.full((57, 57), limit - 1, np.float32)
    dense[10, 10:14] = limit + 2
    found = dense - 0.5
    found[10, 11:13] = limit - 3

    tiles = tiles_of_map(bundle, (256, 256))
    assert missed(bundle, dense, found, tiles) == (4, 2, 1, 1)
    assert missed(bundle, dense, dense, tiles) == (4, 0, 1, 0)


def test_the_worst_threshold_is_where_most_tiles_are_missed() -> None:
    """Two of three tiles have their threshold between coarse and dense value; a margin of 2 leaves none."""
    peaks = [(5.0, 3.0), (4.5, 3.5), (9.0, 9.0)]

    assert worst(peaks, 0.0) == 2 / 3 and worst(peaks, 1.5) == 1 / 3 and worst(peaks, 2.0) == 0.0


def test_the_students_are_those_of_the_shipped_graph() -> None:
    """Folding the normalization in again gives the exported weights."""
    model = open_bundle(BUNDLE).model
    nets = nn.ModuleList(build_patch_net(PROFILES["line"], seed) for seed in range(3))
    load_students(nets, model)
    for net in nets:
        fold_input(net, 3)

    shipped = [numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(model).graph.initializer]
    for weight in nets.state_dict().values():
        assert any(one.shape == tuple(weight.shape) and np.allclose(one, weight, atol=1e-5) for one in shipped)


def test_mirrored_frames_have_no_seams() -> None:
    """Neighbors across a border of the photograph are equal, whatever lies in it."""
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    frame = mirrored(image, 600)

    assert frame.shape == (600, 600, 3)
    np.testing.assert_array_equal(frame[255], frame[256])
    np.testing.assert_array_equal(frame[:256, :256], image)
