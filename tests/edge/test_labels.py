"""Labels: durable, readable by calibration, and no damage to the file costs more than what was never confirmed."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge import labels
from edge.errors import DataError, LabelError
from edge.labels import Label, LabelFile, picture_name, pictures_folder, read_labels


def label(number: int = 1, word: str = "false_reject", **changes: Any) -> Label:
    fields: dict[str, Any] = {
        "version": 1, "id": f"cam1/7/{number}", "label": word, "at_ns": 5, "line": "line-a", "camera": "cam1",
        "decision": "reject", "model_id": "m", "score": 2.5, "threshold": 1.0,
    }  # fmt: skip
    return Label(**(fields | changes))


WHOLE = msgspec.json.encode(label())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels.jsonl"


def test_the_newest_word_about_an_event_counts(path: Path) -> None:
    """False reject, then a second look."""
    file = LabelFile(path)
    for word in ("false_reject", "real_defect"):
        file.append(label(1, word))
    file.append(label(2))

    found = read_labels(path)
    assert {name: one.label for name, one in found.items()} == {"cam1/7/1": "real_defect", "cam1/7/2": "false_reject"}


def test_a_withdrawn_word_is_gone(path: Path) -> None:
    """The line stays in the file, its effect does not."""
    file = LabelFile(path)
    file.append(label(1))
    file.append(label(1, "withdrawn"))

    assert read_labels(path) == {} and len(path.read_bytes().splitlines()) == 2


def test_the_picture_is_kept_beside_the_file(path: Path) -> None:
    """The ring of rejected frames forgets; this does not."""
    LabelFile(path).append(label(1, picture=picture_name("cam1/7/1")), b"PNG bytes")

    assert (pictures_folder(path) / "cam1-7-1.png").read_bytes() == b"PNG bytes"


def test_what_was_said_before_a_restart_is_known_after_it(path: Path) -> None:
    """A console starts again and shows what was labeled."""
    LabelFile(path).append(label(1))

    assert LabelFile(path).current == {"cam1/7/1": "false_reject"}


def test_every_line_is_synced_before_it_is_confirmed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has it when `append` returns: what is in the file at the last fsync is the whole line."""
    file = LabelFile(path)
    at_sync: list[bytes] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (sync(descriptor), at_sync.append(path.read_bytes()))[0])

    file.append(label(1))

    assert at_sync[-1] == path.read_bytes() != b""


def test_a_write_that_a_power_cut_ended_is_left_out_and_not_glued_to(path: Path) -> None:
    """It was never confirmed; the next label gets a line of its own."""
    LabelFile(path).append(label(1))
    with path.open("ab") as file:
        file.write(b'{"version":1,"id":"cam1/7/2","lab')

    LabelFile(path).append(label(3))

    assert set(read_labels(path)) == {"cam1/7/1", "cam1/7/3"}


def test_a_whole_line_without_its_end_is_kept(path: Path) -> None:
    """Editors save files so."""
    LabelFile(path).append(label(1))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    before = read_labels(path)

    LabelFile(path).append(label(2))

    assert set(before) == {"cam1/7/1"} and set(read_labels(path)) == {"cam1/7/1", "cam1/7/2"}


def test_a_full_disk_is_said_and_leaves_no_half_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator is told that nothing was saved; the file is as before."""
    file = LabelFile(path)
    file.append(label(1))
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(labels.os, "fsync", full)
    with pytest.raises(LabelError, match="No space left"):
        file.append(label(2))

    assert path.read_bytes() == before and file.current == {"cam1/7/1": "false_reject"}


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (b"no json", "malformed"),
        (b'{"version":1}', "missing required field"),
        (b"[" * 5000, "line 1"),
        (b"\xff\xfe", "line 1"),
        (WHOLE.replace(b'"version":1', b'"version":9'), "version 9"),
        (WHOLE.replace(b"}", b',"picture":"../x"}'), "plain file name"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_refused_by_its_number(path: Path, line: bytes, word: str) -> None:
    """Passing over it could turn a defect into a good part."""
    path.write_bytes(line + b"\n")

    with pytest.raises(DataError, match=word):
        read_labels(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """With what to give."""
    with pytest.raises(DataError, match="kizu console --annotate"):
        read_labels(tmp_path / "none")


def test_a_folder_that_does_not_exist_is_refused_at_the_start(tmp_path: Path) -> None:
    """Not at the first label, hours later."""
    with pytest.raises(LabelError, match="folder that can be written"):
        LabelFile(tmp_path / "none" / "labels.jsonl")


def append_many(path: Path, start: int) -> None:
    file = LabelFile(path)
    for number in range(start, start + 40):
        file.append(label(number))


def test_two_consoles_may_write_to_one_file(path: Path) -> None:
    """A lock makes each line whole."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=append_many, args=(path, start)) for start in (0, 1000)]
    for one in writers:
        one.start()
    for one in writers:
        one.join(60)

    assert len(read_labels(path)) == 80
