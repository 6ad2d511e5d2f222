"""Training folders: what is read, what is refused by name, and who is set aside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trainer.data
from edge.bundle import InputSpec
from edge.errors import DataError
from edge.images import encode_png, read_image
from edge.stages.preprocess import prepare
from trainer.data import TrainingSet, digest_of, load_training_set, split_by_part


def write_images(folder: Path, count: int, channels: int = 1, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (80, 100, channels), np.uint8)
        (folder / f"part{number:03}.png").write_bytes(encode_png(pixels))


def load(folder: Path, skip_bad: bool = False) -> TrainingSet:
    return load_training_set(folder, size_px=64, aspect="stretch", skip_bad=skip_bad)


def names_and_digests(count: int) -> tuple[list[str], list[str]]:
    return [f"part{i:03}.png" for i in range(count)], [f"digest{i}" for i in range(count)]


def test_the_mvtec_layout_and_a_plain_folder_hold_the_same_images(tmp_path: Path) -> None:
    """A newcomer has a folder of photographs, a researcher has train/good."""
    write_images(tmp_path / "set" / "train" / "good", 3)

    layout, plain = load(tmp_path / "set"), load(tmp_path / "set" / "train" / "good")

    assert layout.names == plain.names == ("part000.png", "part001.png", "part002.png")
    assert layout.data_sha256 == plain.data_sha256


def test_pixels_are_those_that_the_runtime_prepares(tmp_path: Path) -> None:
    """Training on other pixels than the line's would shift every score."""
    write_images(tmp_path, 1)

    found = load(tmp_path)

    spec = InputSpec(height=64, width=64, channels=1, max_batch=1)
    np.testing.assert_array_equal(found.frames[0], prepare(read_image(tmp_path / "part000.png"), spec)[0])


def test_gray_folders_give_one_channel_and_a_single_color_image_makes_it_three(tmp_path: Path) -> None:
    """The bundle takes what the cameras send; gray ones among color ones are replicated."""
    write_images(tmp_path, 2)
    gray = load(tmp_path)
    write_images(tmp_path, 1, channels=3, first=2)

    mixed = load(tmp_path)

    assert gray.channels == 1
    assert mixed.channels == 3
    np.testing.assert_array_equal(mixed.frames[:2], np.repeat(gray.frames, 3, axis=3))


def test_corrupt_and_foreign_files_are_named_and_refused(tmp_path: Path) -> None:
    """A half-copied photograph must not vanish silently from the training set."""
    write_images(tmp_path, 3)
    (tmp_path / "broken.png").write_bytes((tmp_path / "part000.png").read_bytes()[:300])
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "folder").mkdir()

    with pytest.raises(DataError, match=r"(?s)3 of 6.*broken\.png.*folder.*notes\.txt.*--skip-bad-images"):
        load(tmp_path)


def test_bad_files_are_left_out_by_option_and_recorded(tmp_path: Path) -> None:
    """The same folder trains with the option, and says what it left out."""
    write_images(tmp_path, 3)
    clean = load(tmp_path)
    (tmp_path / "notes.txt").write_text("not an image")

    found = load(tmp_path, skip_bad=True)

    assert [bad.name for bad in found.skipped] == ["notes.txt"]
    assert found.data_sha256 == clean.data_sha256


def test_the_digest_follows_contents_and_names(tmp_path: Path) -> None:
    """Two runs with one digest learned from the same files."""
    write_images(tmp_path, 3)
    before = load(tmp_path)
    (tmp_path / "part001.png").rename(tmp_path / "part009.png")

    renamed = load(tmp_path)

    assert renamed.data_sha256 != before.data_sha256
    assert digest_of(before, np.array([0, 2])) == digest_of(renamed, np.array([0, 1]))


def test_a_missing_or_empty_folder_is_refused(tmp_path: Path) -> None:
    """Both are typing mistakes, and the message says what was expected."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "train").mkdir(parents=True)

    for folder, text in (("nowhere", "no such folder"), ("empty", "no usable image"), ("half", "train/good")):
        with pytest.raises(DataError, match=text):
            load(tmp_path / folder)


def test_sets_larger_than_memory_go_to_a_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pixels are the same, only paged."""
    write_images(tmp_path, 3)
    in_memory = load(tmp_path)
    monkeypatch.setattr(trainer.data, "RAM_LIMIT_BYTES", 1)

    paged = load(tmp_path)

    assert isinstance(paged.frames, np.memmap)
    np.testing.assert_array_equal(paged.frames, in_memory.frames)
    np.testing.assert_array_equal(paged.take(np.array([2, 0])), in_memory.frames[[2, 0]])


def test_a_fifth_is_set_aside_but_at_least_six() -> None:
    """Design, section 2."""
    small, large = (split_by_part(*names_and_digests(n), share=0.2, seed=1) for n in (15, 100))

    assert (len(small.train), len(small.threshold)) == (9, 6)
    assert (len(large.train), len(large.threshold)) == (80, 20)
    assert small.shared and large.shared


def test_from_forty_on_statistics_and_threshold_come_from_disjoint_halves() -> None:
    """A threshold from the images that also normalized the map would be a little too low."""
    split = split_by_part(*names_and_digests(200), share=0.2, seed=1)

    assert not split.shared
    assert (len(split.statistics), len(split.threshold)) == (20, 20)
    assert not set(split.statistics) & set(split.threshold)


def test_the_split_follows_from_the_seed() -> None:
    """A resumed run must set the same images aside."""
    one, again, other = (split_by_part(*names_and_digests(50), share=0.2, seed=seed) for seed in (1, 1, 2))

    np.testing.assert_array_equal(one.train, again.train)
    assert set(one.train) != set(other.train)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("regex", [r"^(p\d+)_", r"^p\d+"])
def test_images_of_one_part_are_never_on_two_sides(seed: int, regex: str) -> None:
    """Six exposures of one tile: five in training would make the sixth look better than a new tile does."""
    names = [f"p{part}_exp{shot}.png" for part in range(60) for shot in range(4)]

    split = split_by_part(names, [f"d{i}" for i in range(240)], share=0.25, seed=seed, part_regex=regex)

    sides = [{names[i].split("_")[0] for i in places} for places in (split.train, split.statistics, split.threshold)]
    assert not split.shared
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


@pytest.mark.parametrize("seed", range(5))
def test_files_with_the_same_bytes_count_as_one_part(seed: int) -> None:
    """A photograph copied under another name is still the same part, even through a chain of parts."""
    names = [f"p{part}_exp{shot}.png" for part in range(20) for shot in range(2)]
    digests = [f"d{i}" for i in range(40)]
    digests[39] = digests[0]  # the last part holds a copy of the first part's photograph

    split = split_by_part(names, digests, share=0.2, seed=seed, part_regex=r"^(p\d+)_")

    together = {0, 1, 38, 39}
    assert together <= set(split.train) or together <= set(split.threshold)


def test_without_grouping_parts_would_leak() -> None:
    """Planted bug: leave the expression out, and the check above fails on the same names."""
    names = [f"p{part}_exp{shot}.png" for part in range(60) for shot in range(4)]

    split = split_by_part(names, [f"d{i}" for i in range(240)], share=0.25, seed=0)

    assert {names[i].split("_")[0] for i in split.train} & {names[i].split("_")[0] for i in split.threshold}


def test_too_few_images_say_how_many_are_needed() -> None:
    """Six set aside and eight to learn from is the least that can give a threshold at all."""
    with pytest.raises(DataError, match=r"13 good images are too few.*at least 14"):
        split_by_part(*names_and_digests(13), share=0.2, seed=1)
    with pytest.raises(DataError, match=r"1 physical parts.*--part-regex"):
        split_by_part([f"p{i}" for i in range(30)], list(map(str, range(30))), share=0.2, seed=1, part_regex="p")


def test_a_wrong_expression_or_share_is_refused() -> None:
    """A regular expression that finds nothing would make every image its own part in silence."""
    for options, text in (
        ({"share": 0.2, "part_regex": "("}, "not a regular expression"),
        ({"share": 0.2, "part_regex": "tile"}, "finds no part in 20 of 20"),
        ({"share": 0.0}, "above 0"),
        ({"share": 0.9}, "at most 0.5"),
    ):
        with pytest.raises(DataError, match=text):
            split_by_part(*names_and_digests(20), seed=1, **options)
