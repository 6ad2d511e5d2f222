"""Folders as people have them: with and without masks, with strangers among the images, with masks that do not fit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from calib.dataset import data_sha256, file_sha256, good_images, read_mask, read_stored_image, read_test_set
from edge.errors import DataError, ImageRefused
from edge.images import encode_mask_png, encode_png

SHARED = Path(__file__).parents[3] / "shared" / "data"


def test_good_images_come_first_and_every_kind_follows_by_name(test_folder: Path) -> None:
    """Names are paths within the data folder, with slashes, as the JSON has them."""
    images = read_test_set(test_folder)

    assert [image.kind for image in images] == ["good"] * 12 + ["hole"] * 5 + ["stain"] * 3
    assert images[12].name == "test/hole/000.png"
    assert images[12].mask_path == test_folder / "ground_truth" / "hole" / "000_mask.png"
    assert images[0].is_good and images[0].mask_path is None


def test_a_missing_mask_is_none_and_no_error(test_folder: Path) -> None:
    """Some sets have labels for images only."""
    (test_folder / "ground_truth" / "hole" / "001_mask.png").unlink()
    with_mask, without = read_test_set(test_folder)[12:14]

    assert without.mask_path is None and read_mask(without, (72, 96)) is None
    mask = read_mask(with_mask, (64, 96))
    assert mask is not None and mask.sum() == 400 and mask.dtype == bool


def test_a_mask_of_another_size_is_refused_with_both_names(test_folder: Path) -> None:
    """A silently resized mask would move the figures."""
    image = read_test_set(test_folder)[12]
    assert image.mask_path is not None
    image.mask_path.write_bytes(encode_mask_png(np.ones((64, 95), dtype=bool)))

    with pytest.raises(DataError, match=r"000_mask.png is 95 x 64 .*000.png is 96 x 64"):
        read_mask(image, (64, 96))


def test_masks_of_ones_and_of_255_are_the_same(test_folder: Path) -> None:
    """Anything but 0 is defective, as MVTec has it."""
    image = read_test_set(test_folder)[12]
    assert image.mask_path is not None
    ones = np.zeros((64, 96, 1), np.uint8)
    ones[3:5, 3:5] = 1
    image.mask_path.write_bytes(encode_png(ones))
    mask = read_mask(image, (64, 96))

    assert mask is not None and mask.sum() == 4


def test_what_is_no_test_set_is_refused_with_the_layout(tmp_path: Path, test_folder: Path) -> None:
    """No test folder, an empty one, a file beside the kinds, a damaged mask."""
    with pytest.raises(DataError, match=r"absent: no such folder"):
        read_test_set(tmp_path / "absent")
    with pytest.raises(DataError, match=r"no folder `test`"):
        read_test_set(tmp_path)
    (tmp_path / "empty" / "test").mkdir(parents=True)
    with pytest.raises(DataError, match="no image"):
        read_test_set(tmp_path / "empty")
    image = read_test_set(test_folder)[12]
    assert image.mask_path is not None
    image.mask_path.write_bytes(b"not a png")
    with pytest.raises(DataError, match=r"000_mask\.png"):
        read_mask(image, (64, 96))
    (test_folder / "test" / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt lies beside"):
        read_test_set(test_folder)


def test_two_images_with_one_stem_are_refused(test_folder: Path) -> None:
    """They would share a mask and overwrite each other's map."""
    (test_folder / "test" / "hole" / "000.bmp").write_bytes(b"")

    with pytest.raises(DataError, match="one stem"):
        read_test_set(test_folder)


def test_a_folder_of_good_parts_is_not_a_data_set(test_folder: Path, tmp_path: Path) -> None:
    """The message says which folder was probably meant."""
    with pytest.raises(DataError, match=r"folder of good parts itself"):
        good_images(test_folder)
    with pytest.raises(DataError, match="no such folder"):
        good_images(tmp_path / "nowhere")
    assert len(good_images(test_folder / "test" / "good")) == 12


def test_the_digest_of_a_set_is_that_of_what_sha256sum_prints(tmp_path: Path) -> None:
    """Anybody can check it without this program; order does not matter."""
    for name in ("b.png", "a.png"):
        (tmp_path / name).write_text(name)
    named = [(name, file_sha256(tmp_path / name)) for name in ("b.png", "a.png")]
    printed = "".join(f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n" for name in ("a.png", "b.png"))

    assert data_sha256(named) == data_sha256(named[::-1]) == hashlib.sha256(printed.encode()).hexdigest()


def test_a_file_that_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    """Not passed over: whoever put it there should know."""
    (tmp_path / "Thumbs.db").write_text("x")

    with pytest.raises(ImageRefused, match=r"Thumbs\.db"):
        read_stored_image(tmp_path / "Thumbs.db")


@pytest.mark.parametrize(
    ("name", "good", "bad", "kinds"),
    [
        ("hazelnut_toy", 4, 11, {"colour"}),
        ("aitex_02", 78, 22, {"broken_end", "broken_yarn", "crease", "fuzzyball", "nep"}),
    ],
)
def test_real_sets_have_a_mask_of_the_right_size_for_every_defect(
    name: str, good: int, bad: int, kinds: set[str]
) -> None:
    """The counts of the data's own description; every mask fits its image and marks something."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"shared data set {name} is not beside this checkout")
    images = read_test_set(SHARED / name)
    marked = [read_mask(image, read_stored_image(image.path).shape[:2]) for image in images if not image.is_good]

    assert len(images) - len(marked) == good and len(marked) == bad
    assert {image.kind for image in images} == kinds | {"good"}
    assert all(mask is not None and mask.any() for mask in marked)


def test_a_real_set_without_masks_is_read() -> None:
    """Solar cells: labels for images only, no ground_truth folder at all."""
    if not (SHARED / "elpv_mono").is_dir():
        pytest.skip("shared data set elpv_mono is not beside this checkout")
    images = read_test_set(SHARED / "elpv_mono")

    assert len(images) == 140 and all(image.mask_path is None for image in images)
