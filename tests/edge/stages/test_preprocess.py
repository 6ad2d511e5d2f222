"""Frame -> model pixels: every model pixel knows where in the frame it came from."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bundle import InputSpec
from edge.errors import ImageRefused
from edge.images import cv2
from edge.stages import preprocess
from edge.stages.preprocess import Preprocess, prepare
from edge.types import Frame, FrameId, Roi

rng = np.random.default_rng(3)


def spec(height: int = 64, width: int = 64, channels: Literal[1, 3] = 1, **more: Any) -> InputSpec:
    return InputSpec(height, width, channels, max_batch=4, min_side_px=8, **more)


def noise(height: int, width: int, channels: int = 1) -> NDArray[np.uint8]:
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def dot(size: tuple[int, int], center_xy: tuple[float, float], sigma: float) -> NDArray[np.uint8]:
    """A round bright dot; `center_xy` in frame pixels, where pixel i covers [i, i + 1)."""
    y, x = np.arange(size[0])[:, None] + 0.5, np.arange(size[1]) + 0.5
    distance2 = (x - center_xy[0]) ** 2 + (y - center_xy[1]) ** 2
    return np.asarray(np.round(250 * np.exp(-distance2 / (2 * sigma**2))), np.uint8)[:, :, None]


def found_dot(pixels: NDArray[np.uint8], roi: Roi, near_xy: tuple[float, float], reach: float) -> tuple[float, float]:
    """Center of mass in frame pixels, by `roi`, of what lies within `reach` of `near_xy`: no mirrored dot counts."""
    height, width = pixels.shape[:2]
    x = roi.x + (np.arange(width) + 0.5) * roi.width / width
    y = roi.y + (np.arange(height) + 0.5) * roi.height / height
    weight = pixels[:, :, 0].astype(float)
    weight *= (abs(x - near_xy[0]) < reach) & (abs(y - near_xy[1]) < reach)[:, None]
    return float((weight * x).sum() / weight.sum()), float((weight * y[:, None]).sum() / weight.sum())


def dot_error(data: st.DataObject) -> float:
    """Plant a dot somewhere in some frame, prepare it somehow, and say how far off it is found, in frame pixels."""
    draw = data.draw
    height, width = draw(st.integers(60, 500), label="H"), draw(st.integers(60, 500), label="W")
    whole = draw(st.booleans(), label="whole frame")
    x, y = (0, 0) if whole else (draw(st.integers(0, width - 50)), draw(st.integers(0, height - 50)))
    roi_width = width if whole else draw(st.integers(50, width - x))
    roi_height = height if whole else draw(st.integers(50, height - y))
    aspect = draw(st.sampled_from(["stretch", "keep"]))
    input = spec(draw(st.integers(40, 130)), draw(st.integers(40, 130)), aspect=aspect)
    roi_xywh = None if whole else (x, y, roi_width, roi_height)
    scale = max(roi_width / input.width, roi_height / input.height)
    sigma = 2.0 * max(scale, 1.0)
    margin = min(4 * sigma, roi_width / 2, roi_height / 2)
    center = (
        draw(st.floats(x + margin, x + roi_width - margin)),
        draw(st.floats(y + margin, y + roi_height - margin)),
    )
    pixels, roi = prepare(dot((height, width), center, sigma), input, roi_xywh)
    found = found_dot(pixels, roi, center, 4 * sigma)
    clipped = margin < 4 * sigma  # a dot cut by the region's rim has its center of mass elsewhere
    return 0.0 if clipped else max(abs(found[0] - center[0]), abs(found[1] - center[1]))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_planted_dot_comes_back_within_half_a_pixel(data: st.DataObject) -> None:
    """Stretched or kept, region of interest or not, H and W apart: `roi` maps model pixels to where they came from."""
    assert dot_error(data) < 0.5


def test_a_rectangle_that_is_one_pixel_off_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug in the mapping: the dot comes back a pixel beside itself."""
    image, center = dot((200, 300), (140.3, 90.8), 6.0), (140.3, 90.8)
    honest = found_dot(*prepare(image, spec()), center, 24.0)
    monkeypatch.setattr(preprocess, "Roi", lambda x, y, width, height: Roi(x + 1, y, width, height))
    off = found_dot(*prepare(image, spec()), center, 24.0)

    assert abs(honest[0] - center[0]) < 0.5 <= abs(off[0] - center[0])


def test_a_frame_of_the_models_size_is_passed_without_a_copy() -> None:
    """At 18 frames a second a copy is nothing, at 500 it is a core's tenth."""
    image = noise(64, 64)
    pixels, roi = prepare(image, spec())

    assert np.shares_memory(pixels, image) and roi == Roi(0, 0, 64, 64)


@pytest.mark.parametrize("size", [(640, 640), (513, 1000), (700, 130)])
def test_stripes_too_fine_for_the_model_come_out_gray(size: tuple[int, int]) -> None:
    """Aliasing would paint broad stripes that are on no part; bilinear interpolation alone, the control, does."""
    image = np.zeros((*size, 1), np.uint8)
    image[:, ::2] = 255
    pixels, _ = prepare(image, spec())
    naive = cv2.resize(image[:, : size[1] // 2 * 2 - 1], (64, 64), interpolation=cv2.INTER_LINEAR)

    assert abs(int(pixels[4:-4, 4:-4].mean()) - 127) < 4 and pixels[4:-4, 4:-4].std() < 12
    assert naive[4:-4, 4:-4].std() > 25


def test_halving_and_interpolating_is_close_to_an_area_average() -> None:
    """On a smooth picture the cheap way and INTER_AREA agree within a few gray levels."""
    y, x = np.mgrid[:480, :640]
    smooth = np.round(127 + 60 * np.sin(x / 9) + 60 * np.cos((x + 2 * y) / 17)).astype(np.uint8)
    pixels, _ = prepare(smooth[:, :, None], spec(256, 256))
    area = cv2.resize(smooth, (256, 256), interpolation=cv2.INTER_AREA)

    assert np.abs(pixels[:, :, 0].astype(int) - area).max() <= 4


@pytest.mark.parametrize("side", [129, 255, 257, 511])
def test_the_last_line_of_an_odd_side_is_seen(side: int) -> None:
    """No pixel of the part is skipped because it did not fill a block."""
    image = np.zeros((side, side, 1), np.uint8)
    image[:, -1] = 255
    pixels, roi = prepare(image, spec(60, 60))

    assert pixels[:, -1].min() > 0
    assert roi.width >= side


def test_a_kept_aspect_is_centered_and_filled_by_reflection() -> None:
    """A wide region on a square model: mirrored above and below, and only the region itself counts as inspected."""
    image = noise(32, 64)
    made = Preprocess(spec(aspect="keep"))(Frame(FrameId("cam", 1, 0, 0), image))

    assert np.array_equal(made.pixels[16:48], image)
    assert np.array_equal(made.pixels[:16, :, 0], image[16:0:-1, :, 0])
    assert made.roi == Roi(0, -16, 64, 64) and made.extent == Roi(0, 0, 64, 32)


def test_only_the_region_of_interest_is_looked_at() -> None:
    """Pixels outside it may change as they like."""
    image = noise(100, 120)
    other = noise(100, 120)
    other[20:60, 30:90] = image[20:60, 30:90]
    make = Preprocess(spec(), roi_xywh=(30, 20, 60, 40))
    made, again = (make(Frame(FrameId("cam", 1, 0, 0), picture)) for picture in (image, other))

    assert np.array_equal(made.pixels, again.pixels) and made.pixels.flags.c_contiguous
    assert made.roi == made.extent == Roi(30, 20, 60, 40)


def test_the_stage_and_the_trainers_function_give_the_same_pixels() -> None:
    """What was trained on is what is scored."""
    image = noise(301, 211, 3)
    made = Preprocess(spec(channels=3, aspect="keep"), (3, 5, 200, 290))(Frame(FrameId("cam", 1, 0, 0), image))
    pixels, roi = prepare(image, spec(channels=3, aspect="keep"), (3, 5, 200, 290))

    assert np.array_equal(made.pixels, pixels) and made.roi == roi and pixels.shape == (64, 64, 3)


def test_gray_is_replicated_and_color_is_not_made_gray() -> None:
    """Dropping color is a decision of the line, not of the runtime."""
    image = noise(90, 70)
    gray, _ = prepare(image, spec())
    rgb, _ = prepare(image, spec(channels=3))

    assert np.array_equal(rgb, np.repeat(gray, 3, axis=2))
    with pytest.raises(ImageRefused, match="mono8") as caught:
        prepare(noise(64, 64, 3), spec())
    assert caught.value.reason == "format"


@pytest.mark.parametrize(
    ("size", "roi_xywh"),
    [((7, 64), None), ((64, 20_000), None), ((64, 64), (0, 0, 65, 64)), ((64, 64), (60, 60, 5, 4))],
)
def test_a_frame_of_another_shape_is_refused(size: tuple[int, int], roi_xywh: tuple[int, int, int, int] | None) -> None:
    """A side outside the bundle's range, or a region that is not within the frame."""
    with pytest.raises(ImageRefused) as caught:
        prepare(np.zeros((*size, 1), np.uint8), spec(), roi_xywh)

    assert caught.value.reason == "size"


def test_settings_that_fit_no_frame_are_refused_at_once() -> None:
    """At the start of the daemon, not at the first frame."""
    with pytest.raises(ValueError, match="roi_xywh"):
        Preprocess(spec(), (0, 0, 0, 10))


def test_a_region_to_be_tiled_keeps_its_own_pixels_and_is_not_copied() -> None:
    """Whatever its size; gray for a color model takes no memory either."""
    image = noise(300, 211)
    make = Preprocess(spec(channels=3, fit="tile"), (3, 5, 200, 290))
    made = make(Frame(FrameId("cam", 1, 0, 0), image))

    assert np.array_equal(made.pixels, np.repeat(image[5:295, 3:203], 3, axis=2))
    assert np.shares_memory(made.pixels, image) and made.roi == made.extent == Roi(3, 5, 200, 290)


def test_a_region_too_small_to_judge_at_its_own_size_is_refused() -> None:
    """Resized it would be seen; as it is, it has fewer pixels than the network looks at."""
    with pytest.raises(ImageRefused, match="at least 8 px") as caught:
        prepare(noise(64, 64), spec(fit="tile"), (0, 0, 64, 7))

    assert caught.value.reason == "size"
    assert prepare(noise(64, 64), spec(), (0, 0, 64, 7))[0].shape == (64, 64, 1)
