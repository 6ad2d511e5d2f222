"""Labels: what people say about parts that were judged, as a file that calibration reads.

Owns the line's layout, appending durably, and reading: one JSON object a line, the newest about an event counts. The
rejected part's picture is copied beside the file (`FILE.pictures/`), because the ring it comes from forgets.
"""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path
from typing import Annotated, BinaryIO, Final, Literal

import msgspec
from msgspec import Meta

from edge.errors import DataError, LabelError
from edge.images import write_atomically

LABELS_VERSION: Final = 1
MAX_FILE_BYTES: Final = 256 * 1024 * 1024
MAX_NOTE: Final = 500

Word = Literal["false_reject", "real_defect", "seen", "withdrawn"]
WORDS: Final[tuple[Word, ...]] = ("false_reject", "real_defect", "seen", "withdrawn")
_Text = Annotated[str, Meta(max_length=1000)]


class Label(msgspec.Struct, frozen=True, omit_defaults=True):
    """One word of a person about one event; `at_ns` is Unix time, `picture` a name in `FILE.pictures/`.

    `false_reject`: the part was good. `real_defect`: it was not. `seen`: looked at, nothing said. `withdrawn`: whatever
    was said before is taken back. `picture_sha256` is that of the picture's bytes.
    """

    version: int
    id: str
    label: Word
    at_ns: int
    line: _Text
    camera: _Text
    decision: _Text
    model_id: _Text
    score: float | None = None
    threshold: float | None = None
    part_id: _Text | None = None
    note: Annotated[str, Meta(max_length=MAX_NOTE)] = ""
    picture: str | None = None
    picture_sha256: str | None = None


def pictures_folder(file: Path) -> Path:
    """Where the pictures of the labels in `file` lie."""
    return Path(f"{file}.pictures")


def picture_name(event_id: str) -> str:
    """The picture's name for an event `CAMERA/EPOCH/SEQUENCE`, whose parts the caller has checked."""
    return event_id.replace("/", "-") + ".png"


def read_labels(file: Path) -> dict[str, Label]:
    """The newest label of each event, by event id, withdrawn ones left out.

    A last line that has no end and is no label is what a power cut left of a write that was never confirmed: it is left
    out.

    Raises:
        DataError: the file cannot be read, or a line of it is no label; says which.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(f"labels {file}: {error.strerror}; give a file that `kizu console --annotate` wrote") from None
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f"labels {file}: larger than {MAX_FILE_BYTES} bytes; is it the right file?")
    newest: dict[str, Label] = {}
    *lines, tail = data.split(b"\n")
    if _is_label(tail):
        lines.append(tail)
    for number, line in enumerate(lines, 1):
        if line.strip():
            label = _parsed(line, file, number)
            newest[label.id] = label
    return {name: label for name, label in newest.items() if label.label != "withdrawn"}


def _is_label(line: bytes) -> bool:
    try:
        msgspec.json.decode(line, type=Label)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _parsed(line: bytes, file: Path, number: int) -> Label:
    try:
        label = msgspec.json.decode(line, type=Label)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"labels {file}, line {number}: {error}; take the line out or restore it") from None
    if label.version != LABELS_VERSION:
        raise DataError(f"labels {file}, line {number}: version {label.version}, this reads {LABELS_VERSION}")
    if label.picture is not None and (Path(label.picture).name != label.picture or label.picture in ("", ".", "..")):
        raise DataError(f"labels {file}, line {number}: picture {label.picture[:80]!r} is not a plain file name")
    return label


class LabelFile:
    """Appends labels; thread-safe, and several processes may append to one file.

    `current` is the newest word about each event at opening and since.

    Raises:
        DataError: what is there is no file of labels.
        LabelError: it cannot be written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.close(descriptor)
            _sync_folder(file.parent)
        except OSError as error:
            raise LabelError(f"labels {file}: {error.strerror}; name a file in a folder that can be written") from None
        self.current: dict[str, Word] = {name: label.label for name, label in read_labels(file).items()}

    def append(self, label: Label, picture: bytes | None = None) -> None:
        """Write `label`, and `picture` under its name, to the disk; returns when both are durable.

        Raises:
            LabelError: they are not; the line is not there either.
        """
        with self._lock:
            try:
                if picture is not None and label.picture is not None:
                    self._keep(label.picture, picture)
                self._append(msgspec.json.encode(label) + b"\n")
            except OSError as error:
                raise LabelError(f"labels {self._file}: not saved, {error.strerror}; make room and try again") from None
            if label.label == "withdrawn":
                self.current.pop(label.id, None)
            else:
                self.current[label.id] = label.label

    def _keep(self, name: str, picture: bytes) -> None:
        folder = pictures_folder(self._file)
        folder.mkdir(mode=0o755, exist_ok=True)
        if not (folder / name).exists():
            write_atomically(folder / name, picture)
            with (folder / name).open("rb") as written:
                os.fsync(written.fileno())
            _sync_folder(folder)
            _sync_folder(folder.parent)

    def _append(self, line: bytes) -> None:
        with self._file.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            whole = _whole_lines(file, end)
            file.seek(whole)
            tail = file.read(end - whole)
            if _is_label(tail):  # somebody's editor saved it without the last line's end
                whole, line = end, b"\n" + line
            try:
                # The rest of a write that a power cut ended was never confirmed; our line must not be glued to it.
                file.truncate(whole)
                file.seek(whole)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(whole)
                raise


def _whole_lines(file: BinaryIO, end: int) -> int:
    """Where the last whole line ends."""
    position, block = end, 4096
    while position > 0:
        begin = max(0, position - block)
        file.seek(begin)
        found = file.read(position - begin).rfind(b"\n")
        if found >= 0:
            return begin + int(found) + 1
        position = begin
    return 0


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
