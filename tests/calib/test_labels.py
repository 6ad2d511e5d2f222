"""`kizu calibrate --labels`: what people said at the console counts, and nothing else does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.calibrate_command import calibrate
from edge.bundle import ModelBundle, open_bundle
from edge.errors import CommandError, DataError
from edge.images import encode_png
from edge.labels import Label, LabelFile, Word, picture_name, pictures_folder

Invoke = Callable[..., Any]
PROMISE = ("--false-rejects", "5%", "--confidence", "90%", "--backend", "fake")  # 45 good parts


class Said:
    """A label file as `kizu console --annotate` leaves it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "labels.jsonl"
        self.file = LabelFile(self.path)
        self.count = 0

    def about(self, picture: bytes | None, word: Word, *, number: int | None = None) -> str:
        self.count += 1
        event_id = f"cam1/7/{self.count if number is None else number}"
        label = Label(
            version=1, id=event_id, label=word, at_ns=1, line="line-a", camera="cam1", decision="reject", model_id="m",
            picture=None if picture is None else picture_name(event_id),
            picture_sha256=None if picture is None else hashlib.sha256(picture).hexdigest(),
        )  # fmt: skip
        self.file.append(label, picture)
        return event_id


@pytest.fixture
def said(tmp_path: Path) -> Said:
    return Said(tmp_path)


@pytest.fixture
def bundle(make_fake_bundle: Callable[..., ModelBundle], tmp_path: Path) -> Path:
    return make_fake_bundle(tmp_path / "bundle", provenance={"training_files": ["0" * 64], "seed": 5}).path


def glaring(seed: int = 9) -> bytes:
    """A good part with a reflection: the model finds it anomalous."""
    image = np.random.default_rng(seed).integers(108, 149, (32, 32, 1), dtype=np.uint8)
    image[10:20, 10:20] = 250
    return encode_png(image)


def certified(path: Path) -> tuple[float, int]:
    """Threshold and number of scores."""
    calibration = open_bundle(path).calibration
    return calibration.threshold, len(calibration.scores)


def test_a_false_reject_counts_as_a_good_part(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, said: Said, tmp_path: Path
) -> None:
    """Control beside it: without the label the threshold would reject that part again."""
    folder = good_folder(45)
    said.about(glaring(), "false_reject")
    invoke(calibrate, bundle, "--good", folder, "--out", tmp_path / "without", *PROMISE)

    result = invoke(calibrate, bundle, "--good", folder, "--labels", said.path, "--out", tmp_path / "with", *PROMISE)

    (low, without), (high, counted) = certified(tmp_path / "without"), certified(tmp_path / "with")
    assert (without, counted) == (45, 46) and high > low
    assert "1 good parts are false rejects" in result.stderr


def test_a_real_defect_among_the_good_parts_is_left_out(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, said: Said, tmp_path: Path
) -> None:
    """Somebody put a bad part's picture into the folder; the label knows better."""
    folder = good_folder(45)
    (folder / "wrong.png").write_bytes(glaring())
    said.about(glaring(), "real_defect")

    result = invoke(calibrate, bundle, "--good", folder, "--labels", said.path, "--out", tmp_path / "line", *PROMISE)

    assert certified(tmp_path / "line")[1] == 45 and "1 images were left out" in result.stderr


def test_a_word_that_was_changed_or_taken_back_counts_as_it_stands(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, said: Said, tmp_path: Path
) -> None:
    """The newest about each event; `seen` says nothing."""
    said.about(glaring(1), "false_reject", number=1)
    said.about(None, "withdrawn", number=1)
    said.about(glaring(2), "false_reject", number=2)
    said.about(glaring(2), "real_defect", number=2)
    said.about(None, "seen", number=3)

    invoke(calibrate, bundle, "--good", good_folder(45), "--labels", said.path, "--out", tmp_path / "line", *PROMISE)

    assert certified(tmp_path / "line")[1] == 45


def test_a_label_without_its_picture_is_told_and_counts_for_nothing(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, said: Said, tmp_path: Path
) -> None:
    """The console had no access to the pictures."""
    said.about(None, "false_reject")

    result = invoke(
        calibrate, bundle, "--good", good_folder(45), "--labels", said.path, "--out", tmp_path / "line", *PROMISE
    )

    assert certified(tmp_path / "line")[1] == 45 and "1 labels" in result.stderr


@pytest.mark.parametrize("harm", ["missing", "another"])
def test_a_picture_that_is_not_the_one_that_was_labeled_is_refused(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, said: Said, tmp_path: Path, harm: str
) -> None:
    """A promise must not stand on a file that somebody exchanged."""
    name = picture_name(said.about(glaring(), "false_reject"))
    file = pictures_folder(said.path) / name
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(glaring(77))

    with pytest.raises(DataError, match="is missing" if harm == "missing" else "not the picture that was labeled"):
        invoke(calibrate, bundle, "--good", good_folder(45), "--labels", said.path, "--out", tmp_path / "x", *PROMISE)
    assert not (tmp_path / "x").exists()


def test_a_picture_that_the_model_was_trained_on_is_refused(
    make_fake_bundle: Callable[..., ModelBundle], good_folder: Callable[..., Path], invoke: Invoke, said: Said,
    tmp_path: Path,
) -> None:  # fmt: skip
    """As for every other good part."""
    said.about(glaring(), "false_reject")
    trained = make_fake_bundle(
        tmp_path / "bundle", provenance={"training_files": [hashlib.sha256(glaring()).hexdigest()]}
    ).path

    with pytest.raises(DataError, match="trained or quantized on cam1-7-1"):
        invoke(calibrate, trained, "--good", good_folder(45), "--labels", said.path, "--out", tmp_path / "x", *PROMISE)


def test_the_same_picture_in_folder_and_labels_counts_once(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, said: Said, tmp_path: Path
) -> None:
    """Somebody copied it over already."""
    folder = good_folder(45)
    (folder / "copied.png").write_bytes(glaring())
    said.about(glaring(), "false_reject")

    invoke(calibrate, bundle, "--good", folder, "--labels", said.path, "--out", tmp_path / "line", *PROMISE)

    assert certified(tmp_path / "line")[1] == 46


def test_labels_and_blocks_do_not_go_together(
    bundle: Path, good_folder: Callable[..., Path], invoke: Invoke, said: Said, tmp_path: Path
) -> None:
    """A single picture is no block."""
    said.about(glaring(), "false_reject")

    with pytest.raises(CommandError, match="--block"):
        invoke(
            calibrate, bundle, "--good", good_folder(45), "--labels", said.path, "--block", "1:0", "--out",
            tmp_path / "x", *PROMISE,
        )  # fmt: skip
