"""`kizu train --labels`: what people said at the console is learned from, and a defect is not."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner, Result

import trainer.data
from calib.dataset import file_sha256
from calib.labels import open_labels
from edge.bundle import open_bundle
from edge.errors import DataError
from edge.images import encode_png
from edge.labels import Label, LabelFile, Word, picture_name, pictures_folder
from trainer.checkpoint import module_tensors, save_checkpoint
from trainer.data import TrainingSet, load_training_set, split_by_part
from trainer.labeled import NO_CHANGES, require_agreed
from trainer.patch_nets import PatchNetSpec, build_patch_net
from trainer.train_command import train

TINY = PatchNetSpec(patch=33, widths=(4, 4, 4), descriptor_dim=4)


def photograph(number: int) -> bytes:
    return encode_png(np.random.default_rng(number).integers(0, 256, (64, 64), np.uint8))


def say(file: Path, number: int, word: Word, part: str | None = None) -> Path:
    """Someone says `word` of event `number`, whose picture is photograph `number`."""
    event_id, picture = f"cam1/7/{number}", photograph(number)
    label = Label(
        version=1, id=event_id, label=word, at_ns=1, line="line-a", camera="cam1", decision="reject", model_id="m",
        part_id=part, picture=picture_name(event_id), picture_sha256=hashlib.sha256(picture).hexdigest(),
    )  # fmt: skip
    LabelFile(file).append(label, picture)
    return pictures_folder(file) / picture_name(event_id)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """good/ holds photographs 0 to 15; 3 is called a real defect, 5 and 40 to 42 false rejects, two of one part."""
    (tmp_path / "good").mkdir()
    for number in range(16):
        (tmp_path / "good" / f"p{number:02}.png").write_bytes(photograph(number))
    file = tmp_path / "labels.jsonl"
    say(file, 3, "real_defect")
    say(file, 5, "false_reject")
    say(file, 40, "false_reject", part="B7")
    say(file, 41, "false_reject", part="B7")
    say(file, 42, "false_reject")
    say(file, 43, "seen")
    return tmp_path


def load(place: Path, *, labeled: bool = True) -> TrainingSet:
    labels = open_labels(place / "labels.jsonl") if labeled else None
    return load_training_set(place / "good", size_px=64, aspect="stretch", skip_bad=False, labels=labels)


def test_false_rejects_are_good_images_and_real_defects_are_none(place: Path) -> None:
    """By content: a picture that somebody had copied into the folder counts once. Control: without labels, the 16."""
    found = load(place)

    assert found.names == (
        *(f"p{number:02}.png" for number in range(16) if number != 3),
        "labels/cam1-7-40.png", "labels/cam1-7-41.png", "labels/cam1-7-42.png",
    )  # fmt: skip
    assert found.labels.defects == ("p03.png",)
    assert found.file_sha256[-1] == hashlib.sha256(photograph(42)).hexdigest()
    assert [path.name for path in found.paths(np.array([0, 17]))] == ["p00.png", "cam1-7-42.png"]
    assert len(load(place, labeled=False).names) == 16


def test_pictures_of_one_part_stay_together(place: Path) -> None:
    """By the event's `part_id`, also where a pattern names the parts of files. Control: without it they are torn."""
    found = load(place)
    names = list(found.names)
    pair = {names.index("labels/cam1-7-40.png"), names.index("labels/cam1-7-41.png")}

    def torn(seed: int, regex: str | None, known: dict[str, str]) -> bool:
        split = split_by_part(
            names, found.file_sha256, share=0.4, seed=seed, part_regex=regex, parts={**found.labels.parts, **known}
        )
        return len(pair & set(split.train.tolist())) == 1

    apart = {name: name for name in found.labels.parts}
    assert not any(torn(seed, regex, {}) for seed in range(20) for regex in (None, r"^p(\d+)"))
    assert any(torn(seed, None, apart) for seed in range(20))


def run(place: Path, *extra: str) -> Result:
    tensors = module_tensors("net", build_patch_net(TINY, 9))
    tensors |= {"decoder.weight": torch.zeros(1, 4), "decoder.bias": torch.zeros(1)}
    save_checkpoint(place / "teacher.safetensors", tensors, {"kind": "teacher", "spec": TINY.to_json()})
    app = typer.Typer()
    app.command()(train)
    options = ["student-teacher", "--preset", "line", "--data", place / "good", "--out", place / "bundle", "--size", 64,
               "--teacher", place / "teacher.safetensors", "--steps", 3, *extra]  # fmt: skip
    return CliRunner().invoke(app, [str(option) for option in options])


def test_the_bundle_says_what_the_labels_did(place: Path) -> None:
    """In its provenance, by name and by digest: calibration will not take those pictures again."""
    result = run(place, "--labels", str(place / "labels.jsonl"))

    assert result.exit_code == 0, result.output
    assert "3 of these are false rejects" in result.output and "p03.png" in result.output
    provenance = open_bundle(place / "bundle").provenance
    assert provenance["data"]["false_rejects"] == [f"labels/cam1-7-{number}.png" for number in (40, 41, 42)]
    assert provenance["data"]["real_defects"] == ["p03.png"]
    seen = {*provenance["training_files"], *provenance["held_out_files"]}
    assert {hashlib.sha256(photograph(number)).hexdigest() for number in (5, 40, 41, 42)} <= seen
    assert file_sha256(place / "good" / "p03.png") not in seen


def test_a_real_defect_that_is_learned_from_is_noticed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control, planted: labels that take nothing out; the defect is among what the bundle has seen."""
    honest = trainer.data.label_changes
    monkeypatch.setattr(trainer.data, "label_changes", lambda *given: replace(honest(*given), defects=()))
    run(place, "--labels", str(place / "labels.jsonl"))

    provenance = open_bundle(place / "bundle").provenance
    seen = {*provenance["training_files"], *provenance["held_out_files"]}
    assert file_sha256(place / "good" / "p03.png") in seen


def test_a_picture_that_was_exchanged_stops_the_training_before_it_begins(place: Path) -> None:
    """As in a calibration; nothing is written."""
    (pictures_folder(place / "labels.jsonl") / "cam1-7-40.png").write_bytes(photograph(99))

    result = run(place, "--labels", str(place / "labels.jsonl"))

    assert isinstance(result.exception, DataError) and "not the picture that was labeled" in str(result.exception)
    assert not (place / "bundle").exists()


def test_a_part_cannot_be_good_and_bad(place: Path) -> None:
    """A false reject that lies among the bad parts a method learns from."""
    (place / "bad").mkdir()
    (place / "bad" / "x.png").write_bytes(photograph(3))
    require_agreed(open_labels(place / "labels.jsonl"), place / "bad")
    (place / "bad" / "y.png").write_bytes(photograph(42))

    with pytest.raises(DataError, match=r"y\.png is a false reject"):
        require_agreed(open_labels(place / "labels.jsonl"), place / "bad")


def test_without_labels_nothing_changes(place: Path) -> None:
    """The digest that a checkpoint is known by stays what it was."""
    found = load(place, labeled=False)

    assert found.labels is NO_CHANGES
    assert found.names == tuple(f"p{number:02}.png" for number in range(16))
