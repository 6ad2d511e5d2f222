"""Zones as they are drawn: polygons, masks, and what is neither."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from calib.zone_files import outline, read_zones
from edge.bundle import MapGeometry, Zone
from edge.errors import DataError
from edge.images import encode_png
from edge.stages.zones import Zones
from edge.types import AnomalyMap, FrameId, Roi


@settings(deadline=None)
@given(arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.booleans()))
def test_a_masks_outline_holds_its_pixels_and_no_other(mask: np.ndarray) -> None:
    """Holes, islands in holes, single pixels, corners that touch: by the line's own rule, a cell a pixel."""
    if not mask.any():
        return
    height, width = mask.shape
    roi = Roi(0, 0, width, height)
    anomaly_map = AnomalyMap(FrameId("cam", 1, 0, 0), np.zeros(mask.shape, np.float32), 0.0, roi, roi)

    labels = Zones([Zone("mask", outline(mask))], MapGeometry(1, 1, 1.0, 0.0, 0.0)).labels(anomaly_map)

    assert ((labels == 0) == mask).all()


def paint(path: Path, mask: np.ndarray) -> Path:
    path.write_bytes(encode_png(mask.astype(np.uint8)[:, :, None]))
    return path


def test_a_toml_file_may_name_masks_beside_polygons(tmp_path: Path) -> None:
    """By camera; a mask knows the size of its frames."""
    mask = np.zeros((20, 30))
    mask[5:9, 5:9] = 255
    paint(tmp_path / "left.png", mask)
    (tmp_path / "zones.toml").write_text(
        '[[zones]]\nname = "a"\ncamera = "left"\nmask = "left.png"\n'
        '[[zones]]\nname = "b"\ncamera = "right"\npolygon_xy = [[0, 0], [9, 0], [0, 9]]\n'
    )

    zones = read_zones(tmp_path / "zones.toml")

    assert zones["left"][0].frame_size == (20, 30) and zones["right"][0].frame_size is None
    assert zones["right"][0].rings_xy == (((0.0, 0.0), (9.0, 0.0), (0.0, 9.0)),)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[[zones]]\nname = "a"', "needs polygon_xy or mask"),
        ('[[zones]]\nname = "a"\nmask = "m.png"\npolygon_xy = [[0, 0], [1, 1], [2, 0]]', "and not both"),
        ('[[zones]]\nname = "a"\nmask = "gone.png"', r"gone\.png"),
        ("zones", "expected"),
    ],
)
def test_a_zone_without_a_shape_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    """Neither, both, a mask that is not there, no TOML."""
    (tmp_path / "zones.toml").write_text(text)

    with pytest.raises(DataError, match=complaint):
        read_zones(tmp_path / "zones.toml")


def test_a_picture_that_is_no_mask_is_refused(tmp_path: Path) -> None:
    """All black; a photograph; and one gray level is one zone."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 30))

    assert [zone.name for zone in read_zones(paint(tmp_path / "one.png", 255 * (noise > 99)))[""]] == ["mask"]
    with pytest.raises(DataError, match="all of it is 0"):
        read_zones(paint(tmp_path / "black.png", 0 * noise))
    with pytest.raises(DataError, match="gray levels, at most 16 are zones"):
        read_zones(paint(tmp_path / "photo.png", noise))
