"""The flat field: exact to the last bit, before everything else, and refused for another camera's frames."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.bundle import InputSpec, MapGeometry
from edge.camera import CameraCalibration
from edge.errors import ImageRefused
from edge.stages.flatfield import FlatField, flat_field_of, level
from edge.stages.preprocess import Preprocess
from edge.stages.tile import tiling_of
from edge.types import Frame, FrameId, ModelInput

SPEC = InputSpec(32, 32, 1, 4)


def by_numpy(image: NDArray[np.uint8], gain: NDArray[np.float32], dark: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.clip(np.rint((image.astype(np.float32) - dark) * gain), 0, 255).astype(np.uint8)


def arrays(size: tuple[int, int, int], seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return rng.uniform(0.4, 4, size).astype(np.float32), rng.uniform(0, 30, size).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_gray_level_comes_out_as_numpy_says(channels: int) -> None:
    """Compiled and plain arithmetic agree on all 256 levels at every pixel, ties included."""
    gain, dark = arrays((37, 53, channels))
    gain[:, :20], dark[:, :20] = 0.5, 0.0  # odd levels come out halfway between two

    for gray in range(256):
        image = np.full((37, 53, channels), gray, np.uint8)
        np.testing.assert_array_equal(FlatField(gain, dark)(image), by_numpy(image, gain, dark))


def test_a_region_of_interest_is_corrected_like_the_whole() -> None:
    """Only what is looked at costs time."""
    gain, dark = arrays((40, 50, 3))
    image = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)

    part = FlatField(gain, dark)(image, (7, 5, 20, 30))

    np.testing.assert_array_equal(part[5:35, 7:27], by_numpy(image, gain, dark)[5:35, 7:27])


def test_a_vignetted_picture_becomes_even() -> None:
    """What it is for: an even target under uneven light reads one gray level."""
    rows, columns = np.mgrid[0:60, 0:80]
    light = (1 - ((rows - 30) ** 2 + (columns - 40) ** 2) / 6000)[:, :, None]
    seen = np.rint(10 + 160 * light)
    flat = FlatField((120 / (seen - 10)).astype(np.float32), np.full(seen.shape, 10, np.float32))

    assert np.ptp(seen) > 50
    assert set(np.unique(flat(seen.astype(np.uint8)))) == {120}


def test_frames_are_corrected_before_the_model_sees_them() -> None:
    """The stage that the daemon runs: same pixels as correcting first and preparing then, also within a region."""
    gain, dark = arrays((64, 64, 1))
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 1), dtype=np.uint8)
    frame, corrected = (Frame(FrameId("cam", 1, 0, 0), pixels) for pixels in (image, by_numpy(image, gain, dark)))
    roi = (3, 9, 40, 48)

    seen = Preprocess(SPEC, roi, (64, 64), FlatField(gain, dark))(frame)

    np.testing.assert_array_equal(seen.pixels, Preprocess(SPEC, roi)(corrected).pixels)


def test_a_frame_of_another_size_is_refused() -> None:
    """Its pixels are not those that were calibrated; the same where only a scale is known."""
    gain, dark = arrays((64, 64, 1))
    frame = Frame(FrameId("cam", 1, 0, 0), np.zeros((64, 80, 1), np.uint8))

    with pytest.raises(ImageRefused, match="80 x 64 px in 1 channels, the camera's flat field is for 64 x 64"):
        FlatField(gain, dark)(frame.image)
    with pytest.raises(ImageRefused, match="frame of 80 x 64 px, the camera's calibration is for 64 x 64 px"):
        Preprocess(SPEC, None, (64, 64))(frame)


def test_a_region_beyond_the_frame_is_refused_before_anything_is_corrected() -> None:
    """No pixel outside the frame is ever touched."""
    gain, dark = arrays((64, 64, 1))
    frame = Frame(FrameId("cam", 1, 0, 0), np.zeros((64, 64, 1), np.uint8))

    with pytest.raises(ImageRefused, match="region of interest"):
        Preprocess(SPEC, (40, 0, 32, 32), (64, 64), FlatField(gain, dark))(frame)


def test_a_calibration_without_arrays_has_no_flat_field() -> None:
    """A scale alone leaves frames as they are."""
    assert flat_field_of(None) is None
    assert flat_field_of(CameraCalibration("id", (8, 8))) is None


UNSCALED = [
    ("the whole frame", InputSpec(40, 48, 1, 4), None, (40, 48, 1)),
    ("a region", InputSpec(32, 32, 1, 4), (7, 5, 32, 32), (64, 64, 1)),
    ("filled up by reflection", InputSpec(32, 32, 1, 4, aspect="keep"), (7, 5, 32, 20), (64, 64, 1)),
    ("on both sides", InputSpec(33, 64, 3, 4, aspect="keep"), (0, 3, 33, 33), (40, 40, 3)),
    ("gray for an RGB model", InputSpec(32, 32, 3, 4), (1, 2, 32, 32), (40, 40, 1)),
    ("tiles of its own size", InputSpec(32, 32, 1, 4, fit="tile"), (3, 4, 61, 50), (64, 80, 1)),
    ("tiles of gray as RGB", InputSpec(32, 32, 3, 4, fit="tile"), None, (50, 37, 1)),
]


def model_pixels(stage: Preprocess, image: NDArray[np.uint8]) -> list[ModelInput]:
    """What a frame's pixels become: one input, or its tiles."""
    seen = stage(Frame(FrameId("cam", 1, 0, 0), image))
    if stage.input.fit == "resize":
        return [seen]
    tiling = tiling_of(stage.input, MapGeometry(14, 14, stride=2.0, offset_y=2.5, offset_x=2.5))
    assert tiling is not None
    return list(tiling.begin(seen).tiles())


@pytest.mark.parametrize(("spec", "roi", "size"), [case[1:] for case in UNSCALED], ids=[case[0] for case in UNSCALED])
@pytest.mark.parametrize("off", [0, 1], ids=["", "control: a pixel off"])
def test_correcting_after_cutting_gives_the_bytes_of_correcting_before(
    spec: InputSpec, roi: tuple[int, int, int, int] | None, size: tuple[int, int, int], off: int
) -> None:
    """Where nothing is scaled: cut, tiled, reflected or made RGB, every pixel finds its own gain and dark value."""
    flat = FlatField(*arrays(size))
    image = np.random.default_rng(3).integers(0, 256, size, dtype=np.uint8)
    before = model_pixels(Preprocess(spec, roi, size[:2], flat), image)
    after = model_pixels(Preprocess(spec, roi, size[:2], flat, flat.over(roi)), image)

    equal = []
    for wanted, given in zip(before, after, strict=True):
        assert given.uneven is not None and wanted.uneven is None and given.roi == wanted.roi
        pixels = given.pixels.copy()
        level(pixels, replace(given.uneven, left=given.uneven.left + off))
        equal.append(np.array_equal(pixels, wanted.pixels))

    assert all(equal) is (off == 0)


def test_pixels_that_are_scaled_are_corrected_before_and_nowhere_else() -> None:
    """A mean of corrected pixels is not the corrected mean: asking for the other order is a fault of ours."""
    flat = FlatField(*arrays((64, 64, 1)))

    with pytest.raises(ValueError, match="scaled before their flat field"):
        Preprocess(SPEC, None, (64, 64), flat, flat.over(None))


def test_a_frame_that_is_corrected_later_is_refused_as_early() -> None:
    """Another shape than the field's, here color: told by the same words as where it is corrected at once."""
    flat = FlatField(*arrays((32, 32, 1)))
    frame = Frame(FrameId("cam", 1, 0, 0), np.zeros((32, 32, 3), np.uint8))

    for later in (None, flat.over(None)):
        with pytest.raises(ImageRefused, match="32 x 32 px in 3 channels, the camera's flat field is for 32 x 32"):
            Preprocess(InputSpec(32, 32, 3, 4), None, (32, 32), flat, later)(frame)
